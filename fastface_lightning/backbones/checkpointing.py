"""Gradient checkpointing that counts every batch once: recomputing moves no batch norm."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def count_once(network: nn.Module) -> None:
    """From now on, batch norms of a network that backward recomputes keep their statistics.

    To be called before each forward: norms may be new in it, as Lightning puts SyncBatchNorm in.
    """
    if torch.compiler.is_compiling():  # a compiled backward recomputes tensors, no statistics
        return
    for norm in network.modules():
        if isinstance(norm, _BatchNorm) and not hasattr(norm, "freezing"):
            norm.freezing = ExitStack()  # type: ignore[assignment]
            norm.register_forward_pre_hook(_freeze)
            norm.register_forward_hook(_unfreeze, always_call=True)


def _freeze(norm: Any, _inputs: Any) -> None:
    in_backward = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
    if in_backward:
        norm.freezing.enter_context(_frozen_statistics(norm))


def _unfreeze(norm: Any, _inputs: Any, _output: Any) -> None:
    if not torch.compiler.is_compiling():
        norm.freezing.close()


@contextmanager
def _frozen_statistics(norm: Any) -> Iterator[None]:
    before = norm.momentum, norm.num_batches_tracked
    norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        norm.momentum, norm.num_batches_tracked = before
