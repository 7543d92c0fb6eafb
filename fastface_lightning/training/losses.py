"""Every step's loss is read once: kept in a file; a run whose losses are no numbers is ended."""

from __future__ import annotations

import logging
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

from ..files import replacing
from ..schedule.length import callbacks_of
from ..schedule.plateau import check_count
from ..schedule.replay import LOSSES
from ..schedule.step_loss import returned_loss

log = logging.getLogger(__name__)


class StepLosses(Callback):
    """Keeps the loss of every optimizer step in ``losses.f32``, little-endian float32 after
    float32, and ends a run after so many in a row that are NaN or infinite.

    A step's loss is the mean over its micro-batches and ranks, what a schedule is given (which
    leaves out the steps that a loss scaler skips). They are read in blocks of 32 steps on
    accelerators, so that training does not wait for each.

    Args:
        folder: of the file. A resumed run goes on in it, or in a copy of that of the run whose
            checkpoint it was; where there is neither, none is written.
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
        self._earlier: Path | None = None  # where the losses of earlier steps are
        self._writes = True
        self._step = 0
        self._first: int | None = 0  # the step that it begins with, until the first write
        self._micro: list[Tensor] = []
        self._unread: list[Tensor] = []
        self._in_a_row = self._longest = 0  # losses that are not finite, so far and at most

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = first = self._first = trainer.global_step
        self._micro, self._unread = [], []
        self._in_a_row = self._longest = 0
        places = [self._file]
        if trainer.ckpt_path:
            places.append(Path(trainer.ckpt_path).absolute().parents[1] / LOSSES)
        known = [p for p in places if p.is_file() and p.stat().st_size >= 4 * first]
        self._earlier = known[0] if known else None
        self._writes = trainer.is_global_zero and (bool(known) or not first)
        if trainer.is_global_zero and not self._writes:
            log.info("%s is not written: losses before step %d are not known", LOSSES, first)

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
            self._read(trainer)
        if self._longest > self.max_nonfinite:
            rule = (
                f"at most max_nonfinite={self.max_nonfinite} losses in a row may be NaN or infinite"
            )
            raise self._error(trainer, f"{rule}, got {self._longest} up to step {self._step}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._read(trainer)
        finite = is_finite(pl_module.parameters(), pl_module.buffers())
        if not trainer.strategy.reduce_boolean_decision(finite):
            raise self._error(
                trainer, "a run must end with finite weights, got NaN or infinite ones"
            )

    def on_exception(self, trainer: Trainer, *_: Any) -> None:
        self._unread = []  # a rank may be gone, or the device, and cannot be asked for them

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Here every rank is called, so that they may read their losses together.
        self._read(trainer)
        if self.state_key in checkpoint.get("callbacks", {}):
            checkpoint["callbacks"][self.state_key] = self.state_dict()

    def recent_mean(self) -> float | None:
        """Of the last 100 losses, or of as many as there are; None if there is none."""
        return sum(self._recent) / len(self._recent) if self._recent else None

    def state_dict(self) -> dict[str, Any]:
        return {"recent": list(self._recent)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._recent.extend(state_dict["recent"])

    def _read(self, trainer: Trainer) -> None:
        """Take up the unread losses, and write them."""
        if not self._unread:
            return
        unread, self._unread = torch.stack(self._unread), []
        if trainer.world_size > 1:
            unread = trainer.strategy.reduce(unread, reduce_op="mean")
        losses = unread.tolist()
        for loss in losses:
            self._in_a_row = 0 if math.isfinite(loss) else self._in_a_row + 1
            self._longest = max(self._longest, self._in_a_row)
        self._recent.extend(losses)
        if self._writes:
            self._begin()
            with self._file.open("ab") as file:
                file.write(struct.pack(f"<{len(losses)}f", *losses))

    def _begin(self) -> None:
        """Before the first write: of what there is keep the losses of earlier steps alone."""
        if self._first is None:
            return
        earlier = self._earlier.read_bytes()[: 4 * self._first] if self._earlier else b""
        with replacing(self._file) as part:
            part.write_bytes(earlier)
        self._first = None

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
