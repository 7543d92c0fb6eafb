"""The full softmax, exact, in memory that does not grow with batch x identities."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn import functional as F
from torch.optim import Optimizer

from ..margins import Margin
from .base import CenterClassifier, Negatives, normalize_rows
from .shards import Shard

logger = logging.getLogger(__name__)

# Classes of a chunk. On a processor 512 to 2048 take equally long, 4096 a tenth longer. On a GPU at
# most as many as its cache holds, unless launches would then cost more than the cache saves: an
# estimate, as no GPU has run this.
CHUNK = {"cpu": 2048, "cuda": 16384}
WORTH_CACHING = 4096
SMALLEST_CHUNK = 256


class ChunkedClassifier(CenterClassifier):
    r"""The loss of :class:`CenterClassifier`, one chunk of classes at a time.

    .. math::

        z_{ij} = s\, n(\cos_{ij}), \qquad
        \ell_i = \log \sum_{j \ne y_i} e^{z_{ij}}, \qquad
        L_i = -\log \sigma(s \cos'_{y_i} - \ell_i)

    :math:`\ell_i` is summed up over the chunks, as :math:`\log(e^a + e^b)` of what was there and
    what comes. The backward computes the cosines of each chunk again, and with
    :math:`p_{ij} = e^{z_{ij} - \ell_i}` and :math:`a_{ij} = \partial L / \partial \cos_{ij}`
    writes the gradient of its centres where it belongs:

    .. math::

        \frac{\partial L}{\partial w_j} = \frac{1}{\|w_j\|} \Big( \sum_i a_{ij} \hat x_i
            - \hat w_j \sum_i a_{ij} \cos_{ij} \Big), \qquad
        \frac{\partial L}{\partial \hat x_i} = \sum_j a_{ij} \hat w_j

    so that beyond ``weight`` and its gradient nothing has the size of either ``weight`` or an
    N x C matrix. Four products of N x C x D replace the plain way's three.

    Args:
        num_classes, embedding_size, margin, scale, interclass_filter: as :class:`CenterClassifier`.
        chunk: classes at a time, at least 1; None chooses at the first batch, by the device and a
            GPU's free memory, and keeps to it.
        products: ``"float32"``, on a GPU in TF32 unless torch was told how to take float32
            products; or ``"bfloat16"`` to round the factors of the four products to bfloat16; they
            are summed and everything else is computed in float32.
        shard: ``"auto"``: :meth:`shard_centers` may split the centres over processes, and
            FaceModule does so under DDP; False: each has them all.
        compile: let ``torch.compile`` make a few kernels of what is computed between the products;
            without effect where margin or filter change the negatives, as a warning says.

    Attributes:
        split: which of the C centres ``weight`` has here, once they are split; else None.

    Raises:
        ValueError: if the margin has parameters of its own and ``negatives`` that may depend on
            them.

    References:
        As :class:`CenterClassifier`. Milakov and Gimelshein, Online normalizer calculation for
        softmax, 2018 (arXiv 1805.02867), algorithm 3: the running sum.
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
    ) -> None:
        super().__init__(num_classes, embedding_size, margin, scale, interclass_filter)
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk must be at least 1 class, got {chunk}")
        if products not in ("float32", "bfloat16"):
            raise ValueError(f"products must be float32 or bfloat16, got {products!r}")
        if shard != "auto" and shard is not False:
            raise ValueError(f"shard must be auto or false, got {shard!r}")
        if compile not in (True, False):
            raise ValueError(f"compile must be true or false, got {compile!r}")
        if compile and not Negatives(self.margin, interclass_filter).is_identity:
            logger.warning(
                "compile is without effect where negatives are changed, got margin=%s and "
                "interclass_filter=%s",
                self.margin,
                interclass_filter,
            )
        has_parameters = any(True for _ in self.margin.parameters())
        if has_parameters and type(self.margin).negatives is not Margin.negatives:
            raise ValueError(
                f"a margin whose negatives are learned needs FullClassifier, got {self.margin}"
            )
        self.chunk = chunk
        self.products = products
        self.shard = shard
        self.compiled = compile
        self.split: Shard | None = None
        self._batch_size = 0  # that all processes have agreed on

    def shard_centers(self) -> None:
        r"""Keep of ``weight`` the rows [C r / W, C (r + 1) / W) of this process, r of W.

        From here on every forward and backward is a collective of torch.distributed's default
        group, on batches of one size, and the loss is exact: that of one process with all images.
        So is the gradient of ``weight``; that of the embeddings is W times one process's, for DDP
        to divide. The margin sees all images, so that its statistics are alike everywhere.
        ``state_dict()`` is a collective too: it has the whole (C, D) on rank 0, in a file mapped
        into memory, and nothing on the others; ``load_state_dict`` takes a whole one.

        Call it before the optimizer is made, which must update each row by itself, as SGD and Adam
        do; :meth:`gather_states` serves its states. Keep DDP away from ``weight``; let a gradient
        scaler find an overflow on any process (torch's ShardedGradScaler); and clip no norm that
        has this gradient in it. FaceModule sees to all of that.
        """
        if self.split is None and dist.get_world_size() > 1:
            self.split = Shard(dist.get_rank(), dist.get_world_size(), self.num_classes)
            own = self.split.part(self.weight.detach())
            self.weight = nn.Parameter(own, self.weight.requires_grad)

    def gather_states(self, optimizer: Optimizer) -> None:
        """Have ``optimizer.state_dict()``, a collective too, hold its states of all C centres."""
        if self.split is not None:
            self.split.gather_states(optimizer, self.weight)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.split is not None:
            destination[f"{prefix}weight"] = self.split.whole(self.weight)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, meta: Any, strict: bool, *faults: list[str]
    ) -> None:
        key = f"{prefix}weight"
        if self.split is not None and key in state_dict:
            whole = state_dict.pop(key)
            if whole.shape != (self.num_classes, self.embedding_size):
                expected = f"{(self.num_classes, self.embedding_size)}, got {tuple(whole.shape)}"
                faults[2].append(f"{key} must hold all centres, {expected}")
                return
            state_dict[key] = self.split.part(whole)
        super()._load_from_state_dict(state_dict, prefix, meta, strict, *faults)

    def softmax_loss(self, x: Tensor, norm: Tensor, labels: Tensor) -> Tensor:
        rows = labels
        if shard := self.split:
            self._agree_on(len(x), shard.world_size)
            x, norm, labels = shard.gather(x), shard.gather(norm), shard.gather(labels)
            rows = shard.rows(labels)
        if self.chunk is None:
            self.chunk = chunk_that_fits(len(x), self.embedding_size, x.device)
        centers, rows = self.candidates(rows)
        gradient: list[Tensor] = []
        own, _ = normalize_rows(_OwnCenters.apply(centers, rows, shard, gradient).to(x.dtype))
        cos_y = (x * own).sum(1)
        if shard:
            cos_y = shard.sum(torch.where(rows >= 0, cos_y, 0))
        cos_y_prime = self.margin(cos_y, norm, labels)
        if shard:  # what a margin samples, it samples on the image's own process
            cos_y_prime = shard.gather(shard.own(cos_y_prime))
        negatives = Negatives(self.margin, self.interclass_filter)
        others = _LogSumExpOfOthers.apply(
            x,
            own,
            cos_y,
            cos_y_prime,
            centers.detach(),
            rows,
            shard,
            negatives,
            self.scale,
            self.chunk,
            self.products == "bfloat16" and x.dtype == torch.float32,
            self.compiled and negatives.is_identity,
            gradient,
        )
        loss = -F.logsigmoid(self.scale * cos_y_prime - others)
        return shard.own(loss) if shard else loss

    def _agree_on(self, batch_size: int, world_size: int) -> None:
        """Refuse batches of several sizes, of which a collective would make anything."""
        if batch_size != self._batch_size:
            sizes = [0] * world_size
            dist.all_gather_object(sizes, batch_size)
            if len({*sizes}) > 1:
                raise ValueError(f"all processes must have batches of one size, got {sizes}")
            self._batch_size = batch_size

    def candidates(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The centres (K, D) of a step, and where those of ``rows`` (N,) are among them. A row of
        -1 is none, and stays so."""
        return self.weight, rows


def chunk_that_fits(batch_size: int, embedding_size: int, device: torch.device) -> int:
    """Classes at a time: what suits the device, less on a GPU whose free memory is short."""
    chunk = CHUNK.get(device.type, CHUNK["cuda"])
    if device.type == "cuda" and torch.cuda.is_available():
        # Float32: a row's cosines, their gradients and two temporaries, and its centre twice.
        bytes_per_class = 4 * (4 * batch_size + 2 * embedding_size)
        cached = torch.cuda.get_device_properties(device).L2_cache_size // bytes_per_class
        if cached >= WORTH_CACHING:
            chunk = min(chunk, cached)
        reserved = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + reserved
        chunk = min(chunk, free // 8 // bytes_per_class)
    return max(SMALLEST_CHUNK, chunk)


class _OwnCenters(Function):
    """The rows of ``centers`` that the batch's own classes have: (K, D), (N,) -> (N, D).

    With a shard anything, in the place of one that another process has.

    Its backward comes after that of :class:`_LogSumExpOfOthers`, whose input is its output, and
    adds to the gradient that one has left in a list: the two never are two tensors.
    """

    @staticmethod
    def forward(
        ctx: Any, centers: Tensor, rows: Tensor, shard: Shard | None, gradient: list[Tensor]
    ) -> Tensor:
        if shard:
            rows = rows.clamp_min(0)
        ctx.save_for_backward(rows)
        ctx.shard, ctx.gradient = shard, gradient
        return centers[rows] if len(centers) else centers.new_zeros(len(rows), centers.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (rows,), whole = ctx.saved_tensors, ctx.gradient.pop()
        if len(whole):
            whole.index_add_(0, rows, grad, alpha=1 / ctx.shard.world_size if ctx.shard else 1)
        return whole, None, None, None


class _LogSumExpOfOthers(Function):
    """log of the sum of exp(s n(cos)) over all classes but the own one: (N,).

    ``own`` is an input for the sake of the order of the two backwards alone.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        own: Tensor,
        cos_y: Tensor,
        cos_y_prime: Tensor,
        centers: Tensor,
        rows: Tensor,
        shard: Shard | None,
        negatives: Negatives,
        scale: float,
        chunk: int,
        bfloat16: bool,
        compiled: bool,
        gradient: list[Tensor],
    ) -> Tensor:
        total = x.new_full((len(x),), -torch.inf)
        inverse_norm = x.new_empty(len(centers), 1)
        x_rounded = _rounded(x, bfloat16)
        with tensor_cores(x.device):
            for start in range(0, len(centers), chunk):
                part = slice(start, start + chunk)
                w = centers[part].to(x.dtype)
                product = _product(_rounded(w, bfloat16), x_rounded.T)
                if compiled:
                    kernel = _compiled(_add_others)
                    inverse_norm[part], total = kernel(product, w, rows - start, scale, total)
                    continue
                norm = torch.linalg.vector_norm(w, dim=1, keepdim=True)
                # A zero row has no direction: its cosines are 0.
                inverse_norm[part] = torch.where(norm > 0, norm, 1).reciprocal_()
                cos = product.mul_(inverse_norm[part])
                z = cos if negatives.is_identity else negatives(cos.T, cos_y, cos_y_prime).T
                _set_own(z, rows - start, -torch.inf)
                torch.logaddexp(total, z.mul_(scale).logsumexp(0), out=total)
        if shard:
            total = shard.logsumexp(total)
        ctx.save_for_backward(x, cos_y, cos_y_prime, centers, rows, inverse_norm, total)
        # The statistics of a margin may have moved on when the backward asks it again.
        ctx.statistics = {name: value.clone() for name, value in negatives.named_buffers()}
        ctx.negatives, ctx.scale, ctx.chunk, ctx.bfloat16 = negatives, scale, chunk, bfloat16
        ctx.compiled, ctx.shard, ctx.gradient = compiled, shard, gradient
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, cos_y, cos_y_prime, centers, rows, inverse_norm, total = ctx.saved_tensors
        grad_x, grad_y, grad_prime = (torch.zeros_like(t) for t in (x, cos_y, cos_y_prime))
        whole = torch.empty_like(centers) if ctx.needs_input_grad[1] else None
        x_rounded, into_weight = _rounded(x, ctx.bfloat16), inverse_norm
        if ctx.shard:
            grad = ctx.shard.sum(grad)  # each process has that of its own images
            into_weight = into_weight / ctx.shard.world_size
        factor = ctx.scale * grad
        with torch.autocast(x.device.type, enabled=False), tensor_cores(x.device):
            for start in range(0, len(centers), ctx.chunk):
                part = slice(start, start + ctx.chunk)
                w, inverse = centers[part].to(x.dtype), inverse_norm[part]
                w_rounded = _rounded(w, ctx.bfloat16)
                product = _product(w_rounded, x_rounded.T)
                if ctx.compiled:
                    kernel = _compiled(_gradient_of_others)
                    a, along = kernel(product, inverse, rows - start, ctx.scale, total, factor)
                else:
                    cos = product.mul_(inverse)
                    n, leaves = cos, []
                    if not ctx.negatives.is_identity:
                        leaves = [t.detach().requires_grad_() for t in (cos, cos_y, cos_y_prime)]
                        with torch.enable_grad():
                            inputs = (leaves[0].T, *leaves[1:])
                            n = functional_call(ctx.negatives, ctx.statistics, inputs).T
                    a = (ctx.scale * n).sub_(total).exp_().mul_(factor)
                    _set_own(a, rows - start, 0)
                    if leaves:
                        a, by_y, by_prime = torch.autograd.grad(
                            n, leaves, a, materialize_grads=True
                        )
                        grad_y += by_y
                        grad_prime += by_prime
                grad_x += _product(_rounded((a * inverse).T, ctx.bfloat16), w_rounded)
                if whole is not None:
                    out = whole[part] if whole.dtype == x.dtype else None
                    block = _product(_rounded(a, ctx.bfloat16), x_rounded, out)
                    if ctx.compiled:
                        _compiled(_turn)(block, w, along, into_weight[part])
                    else:
                        # Divided by the length twice, as the square of a very short one is 0.
                        along = a.mul_(cos).sum(1, keepdim=True).mul_(-inverse)
                        block.addcmul_(w, along).mul_(into_weight[part])
                    if out is None:
                        whole[part] = block
        ctx.gradient[:] = [] if whole is None else [whole]
        return grad_x, None, grad_y, grad_prime, *[None] * 9


def _set_own(z: Tensor, rows: Tensor, value: float) -> None:
    """In place, set z (K, N) to ``value`` in row ``rows[i]`` of column i where there is one."""
    # Without asking which columns have one: a GPU would have to wait for the answer.
    inside = (rows >= 0) & (rows < len(z))
    index = rows.clamp(0, len(z) - 1)[None]
    z.scatter_(0, index, torch.where(inside, value, z.gather(0, index)))


# The same for torch.compile, which makes a kernel or two of each: nothing is changed in place that
# would have to be written back. Of a chunk: its cosines before they are divided by the centres'
# lengths, ``product`` (K, N), its centres w (K, D), values of a centre (K, 1) and of an image (N,).


def _add_others(
    product: Tensor, w: Tensor, rows: Tensor, scale: float, total: Tensor
) -> tuple[Tensor, Tensor]:
    norm = torch.linalg.vector_norm(w, dim=1, keepdim=True)
    inverse = torch.where(norm > 0, norm, 1).reciprocal()
    z = (scale * (product * inverse)).masked_fill(_is_own(product, rows), -torch.inf)
    return inverse, torch.logaddexp(total, z.logsumexp(0))


def _gradient_of_others(
    product: Tensor, inverse: Tensor, rows: Tensor, scale: float, total: Tensor, factor: Tensor
) -> tuple[Tensor, Tensor]:
    cos = product * inverse
    a = (torch.exp(scale * cos - total) * factor).masked_fill(_is_own(product, rows), 0)
    return a, (a * cos).sum(1, keepdim=True) * -inverse


def _turn(block: Tensor, w: Tensor, along: Tensor, inverse: Tensor) -> None:
    block.copy_((block + w * along) * inverse)


def _is_own(product: Tensor, rows: Tensor) -> Tensor:
    return torch.arange(len(product), device=rows.device)[:, None] == rows


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function)


@contextmanager
def tensor_cores(device: torch.device) -> Iterator[None]:
    """Within it a CUDA device takes float32 products in TF32, unless torch was told how to."""
    matmul = torch.backends.cuda.matmul
    if device.type != "cuda" or matmul.fp32_precision != "none":
        yield
        return
    matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = "none"


def _rounded(factor: Tensor, bfloat16: bool) -> Tensor:
    """A factor for :func:`_product`: a processor has no other product, so as exact, no faster."""
    if not bfloat16:
        return factor
    return factor.bfloat16() if factor.is_cuda else factor.bfloat16().float()


def _product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """The product of two matrices, summed in float32 where they are bfloat16, into ``out``."""
    if a.dtype != torch.bfloat16:
        return torch.mm(a, b, out=out)
    if out is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    return torch.ops.aten.mm.dtype_out(a, b, torch.float32, out=out)
