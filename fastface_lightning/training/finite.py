"""A run whose losses or weights are no numbers is ended before it spoils what it has."""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import chain
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from ..schedule.length import callbacks_of
from ..schedule.plateau import check_count


class EndOnNonFinite(Callback):
    """Ends a run after so many losses in a row that are NaN or infinite, whatever its schedule.

    Losses are read in blocks of 32 steps on accelerators, so that training does not wait for each.

    Args:
        max_nonfinite: losses in a row that may be so, as a loss scaler skips some; at least 1, or
            inf.

    Raises:
        ValueError: there were more, or the run has ended with weights that are not finite. It names
            the last good checkpoint.
    """

    def __init__(self, max_nonfinite: float = 100) -> None:
        if max_nonfinite != math.inf:
            check_count("max_nonfinite", max_nonfinite, 1)
        self.max_nonfinite = max_nonfinite
        self._unread: list[Tensor] = []
        self._run = 0  # losses in a row, up to the last that was read

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._unread, self._run = [], 0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if outputs:
            self._unread.append(outputs["loss"])
        if len(self._unread) >= (1 if pl_module.device.type == "cpu" else 32):
            longest, most = self._read(trainer), self.max_nonfinite
            if longest > most:
                rule = f"at most max_nonfinite={most} losses in a row may be NaN or infinite"
                step = trainer.global_step
                raise self._error(trainer, f"{rule}, got {longest} up to step {step}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._read(trainer)
        finite = is_finite(pl_module.parameters(), pl_module.buffers())
        if not trainer.strategy.reduce_boolean_decision(finite):
            raise self._error(
                trainer, "a run must end with finite weights, got NaN or infinite ones"
            )

    def _read(self, trainer: Trainer) -> int:
        """Take up the unread losses; the longest row of those that are not finite."""
        longest = self._run
        if self._unread:
            losses = torch.stack(self._unread).float()
            self._unread = []
            if trainer.world_size > 1:
                losses = trainer.strategy.reduce(losses, reduce_op="mean")
            for finite in losses.isfinite().tolist():
                self._run = 0 if finite else self._run + 1
                longest = max(longest, self._run)
        return longest

    def _error(self, trainer: Trainer, got: str) -> ValueError:
        kept = [callback.last_good for callback in callbacks_of(trainer, "LastAndBest")]
        goes_on = f"{kept[0]} is the last good checkpoint" if any(kept) else "no checkpoint is good"
        return ValueError(
            f"{got}; {goes_on}: a lower optimizer.lr helps, trainer.gradient_clip_val, or "
            f"trainer.precision=32-true"
        )


@torch.no_grad()
def is_finite(*tensors: Iterable[Any]) -> bool:
    """Whether no floating-point tensor among these has a NaN or an infinity in it."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in chain(*tensors):
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.numel():
            norm = torch.linalg.vector_norm(tensor.detach(), torch.inf)  # no mask of its size
            by_device.setdefault(norm.device, []).append(norm.float())
    return all(bool(torch.stack(each).isfinite().all()) for each in by_device.values())
