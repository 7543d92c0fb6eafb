"""Class centres that nobody learns: a momentum copy of the network makes them from images."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..margins import Margin
from .base import Classifier

Batch = Mapping[str, tuple[Tensor, Tensor]]  # images and labels (N,) int64, by the loader's name


class MomentumClassifier(Classifier, ABC):
    r"""A classifier with a momentum encoder: an exponential moving average of the network.

    .. math:: \theta_G \leftarrow m\, \theta_G + (1 - m)\, \theta_P

    where :math:`\theta_P` are parameters and batch norm statistics of the network that is trained
    (the probe net), :math:`\theta_G` those of the momentum encoder and m the momentum. The encoder
    normalises by the statistics of its batch, as the probe net does, and counts them among its
    running ones, which matter only where it is used alone.

    Under torch.distributed every rank writes the features of all ranks, so that what they write
    to is the same everywhere and a checkpoint of one rank is a checkpoint of all. For that their
    labels are gathered, and waited for, at the start of a step.

    Args:
        num_classes, embedding_size, margin, scale, interclass_filter: as :class:`Classifier`; the
            margin has nothing to learn.
        momentum: m, in [0, 1).

    Attributes:
        loaders: names of the loaders whose batches, in a dict, make up a step's.
        momentum_encoder: the encoder, once :meth:`follow` has been called.

    """

    loaders: tuple[str, ...]
    queue: Tensor

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        margin: Margin | None,
        scale: float,
        interclass_filter: float | None,
        momentum: float,
    ) -> None:
        super().__init__(num_classes, embedding_size, margin, scale, interclass_filter)
        if not (isinstance(momentum, (int, float)) and 0 <= momentum < 1):
            raise ValueError(f"momentum must be a number in [0, 1), got {momentum}")
        if any(True for _ in self.margin.parameters()):
            raise ValueError(f"margin must have nothing to learn, got {self.margin}")
        self.momentum = momentum
        self.momentum_encoder: nn.Module | None = None

    def follow(self, probe: nn.Module) -> None:
        """Make the momentum encoder, or make it anew: a copy of ``probe`` without gradients."""
        self.momentum_encoder = copy.deepcopy(probe).requires_grad_(False)
        if getattr(probe, "_compiled_call_impl", None) is not None:  # a copy of it is not compiled
            self.momentum_encoder.compile()

    @torch.no_grad()
    def update_momentum_encoder(self, probe: nn.Module) -> None:
        """Move the momentum encoder towards ``probe``: once an optimizer step."""
        if self.momentum_encoder is None:
            self.follow(probe)
            return
        get_ema_multi_avg_fn(self.momentum)(_floats(self.momentum_encoder), _floats(probe), 0)

    @abstractmethod
    def training_loss(self, probe: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of a step's batch, and take its features in.

        Args:
            probe: the network that is trained, images to embeddings (N, D).
            batch: what ``loaders`` give, the images as ``probe`` takes them. Labels are read on the
                host: where they lie there, no step waits for a GPU.

        Returns:
            Scalar loss, float32 (float64 for a float64 ``queue``). Its gradient has been computed
            already, so what it was computed from may change before ``backward``.
        """

    @abstractmethod
    def sample_batch(self, batch_size: int) -> Batch:
        """A batch as ``loaders`` give, without content."""

    @abstractmethod
    def check_batch_size(self, batch_size: int) -> None:
        """Refuse batches, of all ranks together, of more identities than there are slots."""

    def check_batch(self, batch: Any) -> None:
        """Refuse what is no batch of ``loaders``."""
        if not isinstance(batch, Mapping) or set(batch) != set(self.loaders):
            got = list(batch) if isinstance(batch, Mapping) else type(batch).__name__
            raise ValueError(
                f"{type(self).__name__} trains on a dict of {' and '.join(self.loaders)} "
                f"(data.batches={self.batches}), got {got}"
            )

    def _at_least_float32(self, embeddings: Tensor) -> Tensor:
        """So that no gradient is rounded before a loss scaler has scaled it."""
        return embeddings.to(torch.promote_types(self.queue.dtype, torch.float32))

    @torch.no_grad()
    def encode(self, probe: nn.Module, images: Tensor) -> Tensor:
        """Embeddings (N, D) by the momentum encoder, in ``queue``'s dtype; no gradient."""
        if self.momentum_encoder is None:
            self.follow(probe)
        assert self.momentum_encoder is not None
        return self.momentum_encoder(images).to(self.queue.dtype)


def number_of_slots(name: str, value: float, num_classes: int) -> int:
    """Slots, of an int that is their number or a float in (0, 1], a share of the classes."""
    is_share = isinstance(value, float) and 0 < value <= 1
    slots = int(value * num_classes + 1e-6) if is_share else value  # 0.29 of 100 are 29
    if not 1 <= slots <= num_classes or slots != int(slots):
        raise ValueError(
            f"{name} must be 1 to {num_classes} slots, one an identity, or a share in (0, 1] that "
            f"makes at least one, got {value}"
        )
    return int(slots)


def labels_on_host(labels: Tensor, num_classes: int) -> list[int]:
    """The labels (N,); of a fake tensor, which has no values, any."""
    if isinstance(labels, FakeTensor):
        return [label % num_classes for label in range(len(labels))]
    return labels.tolist()


def to_device(numbers: Tensor | list[int] | list[list[int]], device: torch.device) -> Tensor:
    """Numbers of the host as int64 on a device, for which the host does not wait."""
    tensor = torch.as_tensor(numbers, dtype=torch.int64)
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()  # a copy from other memory is waited for
    return tensor.to(device, non_blocking=True)


def random_unit_vectors(*shape: int) -> Tensor:
    """Random unit vectors (..., D), on every rank and in every run the same."""
    vectors = torch.randn(shape, generator=torch.Generator().manual_seed(0), device="cpu")
    return vectors.div_(torch.linalg.vector_norm(vectors, dim=-1, keepdim=True))


def world_size() -> int:
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def all_gather(tensor: Tensor) -> Tensor:
    """The tensors (N, ...) of all ranks, one after the other."""
    if world_size() == 1:
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor.contiguous())
    return torch.cat(parts)


def _floats(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, but for counters."""
    tensors = chain(module.parameters(), module.buffers())
    return [tensor.detach() for tensor in tensors if tensor.is_floating_point()]


def eager_backward(loss_of: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """``loss_of(x)``, whose gradient is computed here and now.

    Its backward needs nothing but the gradient of x (N, D), so that ``loss_of`` may read tensors
    that change before, and what it took to compute is free again.
    """
    leaf = x.detach().requires_grad_()
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        loss = loss_of(leaf)
        (grad,) = torch.autograd.grad(loss, leaf)
    return _WithGradient.apply(x, loss.detach(), grad)


class _WithGradient(Function):
    """A loss and its gradient as they are: (N, D), (), (N, D) -> ()."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        return loss.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (grad_x,) = ctx.saved_tensors
        return grad_x * grad, None, None
