"""Callbacks that a test gives a run of train.py: one kills it, one writes down what it sees."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor


class Killed(Exception):
    """What :class:`RaiseAt` raises."""


class RaiseAt(Callback):
    """Ends ``fit`` in this process before the batch that follows an optimizer step."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise Killed


class KillAt(Callback):
    """A signal to every process of the run, or to this one, before one of its batches."""

    def __init__(
        self, batch: int | None, signal: str = "SIGKILL", group: bool = True, times: int = 1
    ) -> None:
        self.batch, self.signal, self.group, self.times = batch, signal, group, times

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_progress.total.ready == self.batch:
            for turn in range(self.times):
                if turn:
                    time.sleep(1.2)  # signals within a second are one
                number = getattr(signal, self.signal)
                os.killpg(0, number) if self.group else os.kill(os.getpid(), number)


class WriteInputs(Callback):
    """A line for each batch: epoch, batch, and what the network was really given, flips and all."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)
        self.inputs: list[Tensor] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.file = self.folder / f"inputs-{trainer.global_rank}.jsonl"
        pl_module.backbone.register_forward_pre_hook(self.see)

    def see(self, module: torch.nn.Module, inputs: tuple[Tensor]) -> None:
        self.inputs.append(inputs[0].detach())

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        at = [trainer.fit_loop.epoch_progress.current.processed, batch_idx]
        images, self.inputs = torch.cat(self.inputs), []
        place = torch.arange(images[0].numel(), dtype=torch.float64).view(images[0].shape)
        prints = (images.double() * place).sum((1, 2, 3)).tolist()
        parts = batch.values() if isinstance(batch, dict) else [batch]
        labels = [label for _, part in parts for label in part.tolist()]
        with self.file.open("a") as lines:
            lines.write(json.dumps([at, labels, prints]) + "\n")
