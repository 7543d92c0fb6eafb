"""Partial FC: the batch's own classes and a random sample of the others, anew at every step."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from ..margins import Margin
from .chunked import ChunkedClassifier


class PartialClassifier(ChunkedClassifier):
    r"""The loss of :class:`ChunkedClassifier` over a sample of the classes.

    .. math::

        S = \{y_1, \dots, y_N\} \cup R, \qquad |S| = \max(\lfloor r C \rfloor, \min(N, C))

    with :math:`R` sampled uniformly from the others without repetition, by torch's generator
    of the device. Only the rows :math:`S` of ``weight`` enter the loss, and its gradient is
    row-sparse: SGD and AdamW of :mod:`fastface_lightning.optim` update these rows and leave weights
    and states of all others as they are. (torch's SGD refuses a sparse gradient where a weight
    decay would touch every row, its AdamW refuses all.) At rate 1, and in eval mode, it is
    :class:`ChunkedClassifier`, with a dense gradient. Where the centres are split over processes
    each samples among its own, as InsightFace's arcface_torch does: of W processes each has C / W
    of them, and N is the number of all processes' images.

    Args:
        num_classes, embedding_size, margin, scale, interclass_filter, chunk: as
            :class:`ChunkedClassifier`.
        products, shard, compile: likewise.
        rate: r, share of the classes in a step, in (0, 1]; 0.1 is the paper's.

    References:
        An et al., Killing Two Birds with One Stone: Efficient and Robust Training of Face
        Recognition CNNs by Partial FC, 2022 (arXiv 2203.15565), section 3.2.
    """

    def __init__(
        self,
        num_classes: int,
        embedding_size: int = 512,
        margin: Margin | None = None,
        scale: float = 64.0,
        interclass_filter: float | None = None,
        chunk: int | None = None,
        products: str = "float32",
        shard: Literal["auto", False] = "auto",
        compile: bool = False,
        rate: float = 0.1,
    ) -> None:
        super().__init__(
            num_classes,
            embedding_size,
            margin,
            scale,
            interclass_filter,
            chunk=chunk,
            products=products,
            shard=shard,
            compile=compile,
        )
        if not 0 < rate <= 1:
            raise ValueError(f"rate must lie in (0, 1], got {rate}")
        self.rate = rate

    def candidates(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        if self.rate == 1 or not self.training:
            return super().candidates(rows)
        sample = self.sample(rows)
        places = torch.searchsorted(sample, rows)
        return _Rows.apply(self.weight, sample), torch.where(rows < 0, -1, places)

    def sample(self, rows: Tensor) -> Tensor:
        """The rows of ``weight`` in a step: int64, ascending, with all of ``rows`` (N,) but -1."""
        total = len(self.weight)
        if not total:  # there are fewer classes than processes
            return rows[:0]
        # As though N different classes were in the batch: counting them would stall a GPU.
        size = max(int(self.rate * total), min(len(rows), total))
        priority = torch.rand(total, device=rows.device)
        wanted = torch.where(rows < 0, 0.0, 2.0)
        priority.scatter_reduce_(0, rows.clamp_min(0), wanted, "amax")
        return priority.topk(size).indices.sort().values


class _Rows(Function):
    """Rows of a matrix (C, D), (K,) ascending -> (K, D); its gradient is sparse, of these rows.

    autograd forgets that they ascend when it makes that the matrix's ``grad``, and an optimizer
    would sort them again, while a GPU's host waits. So once backward has ended the gradient is
    marked as sorted, unless it is a sum of several.
    """

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.matrix = matrix
        return matrix[rows]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        matrix, (rows,) = ctx.matrix, ctx.saved_tensors
        first = matrix.grad is None

        def mark() -> None:
            total = matrix.grad  # a sum of several has the rows of all
            if first and total is not None and total.is_sparse and total._nnz() == len(rows):
                total._coalesced_(True)

        torch.autograd.Variable._execution_engine.queue_callback(mark)
        shape = matrix.shape
        return torch.sparse_coo_tensor(rows[None], grad, shape, check_invariants=False), None
