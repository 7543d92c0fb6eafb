"""Gradient checkpointing that counts every batch once: recomputing moves no batch norm."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def recompute(stage: nn.Module, x: Tensor) -> Tensor:
    """``stage(x)``, whose inner tensors backward computes anew instead of keeping them."""
    if torch.compiler.is_compiling():  # a compiled backward recomputes tensors, no statistics
        return checkpoint(stage, x, use_reentrant=False)

    def contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
        return nullcontext(), frozen_statistics(stage)

    return checkpoint(stage, x, use_reentrant=False, context_fn=contexts)


@contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Batch norms keep their running statistics: a recomputation has counted its batch already."""
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, (momentum, batches) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, batches


class CountOnce:
    """The same for a network that checkpoints its stages itself, as timm's do.

    Inside :meth:`forward_of` its batch norms count their batches; where they run outside of it,
    backward is recomputing them, and hooks freeze their statistics. The hooks are methods of this
    object, so a deep copy of the network that owns it has hooks of its own.
    """

    def __init__(self) -> None:
        self.counting = False

    @contextmanager
    def forward_of(self, network: nn.Module) -> Iterator[None]:
        """Around a forward of ``network``; norms that are new in it get their hooks first."""
        for norm in network.modules():
            if isinstance(norm, _BatchNorm) and not hasattr(norm, "freezing"):
                norm.freezing = ExitStack()  # type: ignore[assignment]
                norm.register_forward_pre_hook(self._freeze)
                norm.register_forward_hook(self._unfreeze, always_call=True)
        self.counting = True
        try:
            yield
        finally:
            self.counting = False

    def _freeze(self, norm: Any, inputs: Any) -> None:
        if not (self.counting or torch.compiler.is_compiling()):
            norm.freezing.enter_context(frozen_statistics(norm))

    def _unfreeze(self, norm: Any, inputs: Any, output: Any) -> None:
        if not torch.compiler.is_compiling():
            norm.freezing.close()
