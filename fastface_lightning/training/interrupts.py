"""Ctrl-C and SIGTERM end a run well, after a whole step; a second one ends it now."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

TOGETHER = 1.0  # seconds


class EndOnSignal(Callback):
    """Ends the run after the optimizer step in progress, where a signal asks for it.

    As a context manager it takes over SIGINT, which Ctrl-C sends, and SIGTERM, which SLURM,
    containers and ``timeout`` send. The first one stops the trainer, which keeps its last
    checkpoint; ranks agree on it every ``log_every_n_steps``. A second one, and one that comes
    while no step has been done or all have, ends the program at once with SystemExit(128 + signal).
    Signals within a second are one: ``timeout`` sends two, torchrun passes on what SLURM sends too.
    A verification that goes on is ended first, however long it takes.
    Lightning's own handling exits while a step is under way, and with 1; it is replaced.

    Attributes:
        code: exit code of a run that was stopped, 130 or 143; 0 where none was.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.code = 0
        self._received = 0
        self._again = 0.0  # when another signal is a second one
        self._before: dict[signal.Signals, Any] = {}
        self._step: int | None = None  # optimizer steps done; None while no training goes on

    def __enter__(self) -> EndOnSignal:
        self._before = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._received and time.monotonic() < self._again:
            return
        if self._received or not self._step:
            if not self._received:
                os.write(2, b"\nended before the first step: nothing is saved\n")
            raise SystemExit(128 + number)
        self._received, self._again = number, time.monotonic() + TOGETHER
        said = (
            f"\n{signal.Signals(number).name}: the run ends after this step; again: it ends now\n"
        )
        os.write(2, said.encode())  # print and log may be what was interrupted

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = trainer.global_step
        if self._before:
            signal.signal(signal.SIGTERM, self._handle)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._step == trainer.global_step:
            return
        self._step = trainer.global_step
        received = self._received
        if trainer.world_size > 1:
            if self._step % max(trainer.log_every_n_steps, 1):  # type: ignore[attr-defined]
                return
            any_rank = trainer.strategy.reduce_boolean_decision(bool(received), all=False)
            received = (received or signal.SIGTERM) if any_rank else 0
        # What is to be verified now is verified, and the run ends a step later, or as planned.
        loop, every = trainer.fit_loop.epoch_loop, trainer.val_check_batch
        done = batch_idx if trainer.check_val_every_n_epoch else loop.total_batch_idx
        verifies = loop.batch_progress.is_last_batch or (every and (done + 1) % every == 0)
        if received and not verifies and self._step != trainer.max_steps:
            self.code = 128 + received
            trainer.should_stop = True
            trainer.fit_loop.min_epochs = trainer.fit_loop.epoch_loop.min_steps = None
            trainer.limit_val_batches = 0  # there may be no time

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._step = None
