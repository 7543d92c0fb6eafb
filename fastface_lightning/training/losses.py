"""Every step's loss is read once: kept in a file; a run whose losses are no numbers is ended."""

from __future__ import annotations

import math
import struct
from collections import deque
from collections.abc import Iterable
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from ..schedule.length import callbacks_of
from ..schedule.plateau import check_count
from ..schedule.replay import LOSSES
from ..schedule.step_loss import returned_loss


class StepLosses(Callback):
    """Keeps the loss of every optimizer step in ``losses.f32``, little-endian float32 after
    float32, and ends a run after so many in a row that are NaN or infinite.

    A step's loss is the mean over its micro-batches and ranks, what a schedule is given. They are
    read in blocks of 32 steps on accelerators, so that training does not wait for each.

    Args:
        folder: of the file; a resumed run goes on in it, after the step it resumes from.
        max_nonfinite: losses in a row that may be so, as a loss scaler skips some; at least 1, or
            inf.

    Raises:
        ValueError: there were more, or the run has ended with weights that are not finite. It names
            the last good checkpoint.
    """

    def __init__(self, folder: Path, max_nonfinite: float = 100) -> None:
        if max_nonfinite != math.inf:
            check_count("max_nonfinite", max_nonfinite, 1)
        self.max_nonfinite = max_nonfinite
        self._recent: deque[float] = deque(maxlen=100)
        self._file = folder / LOSSES
        self._writes = False  # not a file that lacks the losses of earlier steps
        self._step = 0
        self._micro: list[Tensor] = []
        self._unread: list[Tensor] = []
        self._unwritten: list[float] = []
        self._in_a_row = 0  # losses that are not finite, up to the last that was read

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        self._micro, self._unread, self._unwritten, self._in_a_row = [], [], [], 0
        if trainer.is_global_zero:
            written = self._file.stat().st_size if self._file.is_file() else 0
            self._writes = written >= 4 * self._step
            if self._writes:
                with self._file.open("ab") as file:
                    file.truncate(4 * self._step)
            else:
                self._file.unlink(missing_ok=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (loss := returned_loss(pl_module, outputs, "loss", False)) is not None:
            self._micro.append(loss)
        if self._step != trainer.global_step and self._micro:
            self._step = trainer.global_step
            self._unread.append(torch.stack(self._micro).mean())
            self._micro = []
        if len(self._unread) >= (1 if pl_module.device.type == "cpu" else 32):
            longest, most = self._read(trainer), self.max_nonfinite
            if longest > most:
                rule = f"at most max_nonfinite={most} losses in a row may be NaN or infinite"
                raise self._error(trainer, f"{rule}, got {longest} up to step {self._step}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._read(trainer)
        self._write()
        finite = is_finite(pl_module.parameters(), pl_module.buffers())
        if not trainer.strategy.reduce_boolean_decision(finite):
            raise self._error(
                trainer, "a run must end with finite weights, got NaN or infinite ones"
            )

    def on_exception(self, trainer: Trainer, *_: Any) -> None:
        if trainer.world_size > 1:
            self._unread = []  # a rank may be gone, and cannot be asked for its losses
        self._write()

    def on_save_checkpoint(self, trainer: Trainer, *_: Any) -> None:
        self._read(trainer)
        self._write()

    def recent_mean(self) -> float | None:
        """Of the last 100 losses, or of as many as there are; None if there is none."""
        return sum(self._recent) / len(self._recent) if self._recent else None

    def state_dict(self) -> dict[str, Any]:
        return {"recent": list(self._recent)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._recent.extend(state_dict["recent"])

    def _read(self, trainer: Trainer) -> int:
        """Take up the unread losses; the longest row of those that are not finite."""
        longest = self._in_a_row
        if self._unread:
            losses = torch.stack(self._unread)
            self._unread = []
            if trainer.world_size > 1:
                losses = trainer.strategy.reduce(losses, reduce_op="mean")
            for loss in losses.tolist():
                self._in_a_row = 0 if math.isfinite(loss) else self._in_a_row + 1
                longest = max(longest, self._in_a_row)
                self._recent.append(loss)
                self._unwritten.append(loss)
        if len(self._unwritten) >= 32:
            self._write()
        return longest

    def _write(self) -> None:
        if self._writes and self._unwritten:
            with self._file.open("ab") as file:
                file.write(struct.pack(f"<{len(self._unwritten)}f", *self._unwritten))
        self._unwritten = []

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
