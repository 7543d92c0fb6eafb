"""What a training run will hold in memory and compute, found on tensors without data."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from .module import flip_some, normalise

MakeOptimizer = Callable[[Iterable[nn.Parameter]], Optimizer]

AUTOCAST = {"32-true": None, "bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
# Class centres below this many bytes are planned with real tensors: a few classes ask for shapes
# that depend on the labels.
REAL = 2**26
# What a CUDA context, cuDNN's workspaces and gaps between allocations take of a card.
CARD_RESERVE = 3 * 2**29


class PartPlan(NamedTuple):
    """Bytes that one part of a run holds, and what it computes in a step.

    Attributes:
        weights: parameters and buffers.
        gradients: of the parameters; of a sparse one its rows and their numbers.
        states: the optimizer's.
        activations: what a step's forward leaves for its backward, images included; 0 for a
            classifier, whose backward follows at once.
        work: above all of these, at the part's own peak in forward and backward.
        update: above weights, gradients and states, at the peak of the optimizer's step.
        flops: floating-point operations of a step, counting products and convolutions.
    """

    weights: int
    gradients: int
    states: int
    activations: int
    work: int
    update: int
    flops: int


class MemoryMeter(TorchDispatchMode):
    """Bytes of all tensors made within the context that are alive, and the most there ever were.

    Attributes:
        live: bytes now.
        peak: most bytes since it was last set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, Tensor) and leaf.layout == torch.strided:
                self._count(leaf.untyped_storage())
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            self._known.add(key)
            self.live += storage.nbytes()
            self.peak = max(self.peak, self.live)
            weakref.finalize(storage, self._drop, key, storage.nbytes())

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def plan_backbone(
    build: Callable[[], nn.Module],
    make_optimizer: MakeOptimizer,
    batch_size: int,
    precision: str,
) -> PartPlan:
    """One training step of a backbone on fake tensors.

    Args:
        build: makes the backbone; called where tensors hold no data.
        make_optimizer: takes its parameters.
        batch_size: images N of a step, 112x112 RGB.
        precision: the trainer's, ``32-true``, ``bf16-mixed`` or ``16-mixed``.
    """
    dtype = _autocast_dtype(precision)
    with FakeTensorMode(), MemoryMeter() as meter:
        net = build().train()
        counter = FlopCounterMode(display=False)
        start = meter.live
        with counter:
            images = torch.empty(batch_size, 3, 112, 112, dtype=torch.uint8)
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                x = net(normalise(flip_some(images)))
            activations = meter.live - start
            if x.requires_grad:  # not if all of it is frozen
                x.backward(torch.empty_like(x))
        del x, images
        work = meter.peak - start - activations
        return PartPlan(
            weights=_bytes(*net.parameters(), *net.buffers()),
            gradients=_gradient_bytes(net),
            activations=activations,
            work=work,
            flops=counter.get_total_flops(),
            **_optimizer_bytes(make_optimizer, net, meter),
        )


def plan_classifier(
    build: Callable[[], nn.Module],
    make_optimizer: MakeOptimizer,
    batch_size: int,
    embedding_size: int,
    num_classes: int,
) -> PartPlan:
    """One training step of a classifier, by the arguments of :func:`plan_backbone`."""
    few = 4 * num_classes * embedding_size < REAL
    mode: AbstractContextManager[Any] = nullcontext() if few else FakeTensorMode()
    with mode, MemoryMeter() as meter:
        head = build().train()
        embeddings = torch.ones(batch_size, embedding_size, requires_grad=True)
        labels = torch.arange(batch_size) % num_classes
        start = meter.live
        with FlopCounterMode(display=False) as counter:
            head(embeddings, labels).backward()
        gradients = _gradient_bytes(head)
        work = meter.peak - start - gradients
        return PartPlan(
            weights=_bytes(*head.parameters(), *head.buffers()),
            gradients=gradients,
            activations=0,
            work=work,
            flops=counter.get_total_flops(),
            **_optimizer_bytes(make_optimizer, head, meter),
        )


def peak(backbone: PartPlan, classifier: PartPlan) -> int:
    """Most bytes a run holds at once: when the classifier works, when the backbone's backward turns
    activations into gradients, or when the optimizer steps."""
    both = (backbone, classifier)
    held = sum(part.weights + part.states for part in both)
    step = backbone.activations + classifier.gradients + max(part.work for part in both)
    update = sum(part.gradients for part in both) + max(part.update for part in both)
    return held + max(step, update)


def _autocast_dtype(precision: str) -> torch.dtype | None:
    if precision not in AUTOCAST:
        raise ValueError(
            f"a plan's precision must be one of {', '.join(AUTOCAST)}, got {precision}"
        )
    return AUTOCAST[precision]


def _bytes(*tensors: Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def _gradient_bytes(module: Any) -> int:
    total = 0
    for p in module.parameters():
        if p.grad is not None and p.grad.is_sparse:
            # A fake sparse tensor forgets how many rows it has: floor(r C), and their numbers.
            total += math.floor(module.rate * len(p)) * (p[0].nbytes + 8)
        elif p.grad is not None:
            total += p.grad.nbytes
    return total


def _optimizer_bytes(
    make_optimizer: MakeOptimizer, module: nn.Module, meter: MemoryMeter
) -> dict[str, int]:
    """``states`` and ``update`` of a module whose gradients are there."""
    optimizer = make_optimizer(module.parameters())
    optimizer.step()  # the first one makes the states
    meter.peak = meter.live
    optimizer.step()
    made = [t for state in optimizer.state.values() for t in state.values()]
    states = _bytes(*(t for t in made if isinstance(t, Tensor)))
    return {"states": states, "update": meter.peak - meter.live}
