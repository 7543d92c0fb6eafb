"""A training run whose loss is written beforehand, and the learning rates it must then show."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils.data import DataLoader, IterableDataset

from fastface_lightning.schedule import PlateauSchedule, PlateauState

Script = Callable[[int, int], float | None]
"""(optimizer step, micro-batch of that step) -> loss; None to skip the micro-batch."""

LR = 0.125


def stairs(step: int, micro: int = 0) -> float:
    """Five times: a fall of 20 steps, then 28 nearly flat ones; up and down by the micro-batch.

    A multiple of 1/1024, so that sums of a few are exact in float32; four micro-batches have the
    mean that a single one of another number would have.
    """
    stage, at = divmod(step, 48)
    level = 8 * 0.75**stage * (0.75 + 0.25 * math.exp(-at / 6)) + 0.01 * math.sin(37 * step)
    return (round(1024 * level) + (0, 24, -40, 16)[micro % 4]) / 1024


def one_sgd(module: LightningModule) -> Optimizer:
    return SGD(module.parameters(), lr=LR)


class Scripted(LightningModule):
    """The loss is the script's, whatever the weights; its gradient is zero."""

    def __init__(
        self, script: Script = stairs, optimizers: Callable[[LightningModule], Any] = one_sgd
    ) -> None:
        super().__init__()
        self.script, self.optimizers_of = script, optimizers
        self.first, self.second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
        self.at = (-1, -1)

    def scripted_loss(self) -> Tensor | None:
        step, micro = self.at
        micro = micro + 1 if step == self.trainer.global_step else 0
        self.at = (self.trainer.global_step, micro)
        value = self.script(*self.at)
        return None if value is None else 0 * (self.first.sum() + self.second.sum()) + value

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        return self.scripted_loss()

    def configure_optimizers(self) -> Any:
        return self.optimizers_of(self)


class LearningRates(Callback):
    """The learning rates, one a group, that each optimizer step was taken with."""

    def __init__(self) -> None:
        self.at: dict[int, list[float]] = {}

    def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
        groups = [group for o in trainer.optimizers for group in o.param_groups]
        rates = [float(group["lr"]) for group in groups]
        assert self.at.setdefault(trainer.global_step, rates) == rates  # the same in each micro

    @property
    def first_group(self) -> dict[int, float]:
        return {step: rates[0] for step, rates in self.at.items()}


class StopAt(Callback):
    """Stops a run after a step, as a timer does, or raises an error there."""

    def __init__(self, step: int, error: type[BaseException] | None = None) -> None:
        self.step, self.error = step, error

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        if self.error is None:
            trainer.should_stop |= trainer.global_step >= self.step
        elif trainer.global_step == self.step:
            raise self.error


class Endless(IterableDataset[Tensor]):
    """Data without a length or an end."""

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield torch.zeros(1)


@dataclass(frozen=True, kw_only=True, repr=False)
class Tape(PlateauSchedule):
    """Remembers every loss it is given, and halves the learning rate after the losses listed."""

    halve_after: tuple[int, ...] = ()

    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": {"threshold": 0.0, "patience": 0}
    }

    def detect(self, state: PlateauState, loss: float) -> PlateauState:
        return state._replace(
            step=state.step + 1,
            scale=state.scale / 2 if state.step in self.halve_after else state.scale,
            level=loss,
            memory=(*state.memory, loss),
        )


def batches(number: int) -> DataLoader[Tensor]:
    return DataLoader(torch.zeros(number, 1))  # type: ignore[arg-type]


def quiet_trainer(root: Path, callbacks: Sequence[Callback], **settings: Any) -> Trainer:
    """On one CPU; it shows nothing, logs and saves only what is asked for."""
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": any(isinstance(c, Checkpoint) for c in callbacks),
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    return Trainer(callbacks=list(callbacks), default_root_dir=root, **{**quiet, **settings})


def by_hand(
    losses: Iterable[float], schedule: PlateauSchedule, read_every: int = 1
) -> dict[int, float]:
    """Learning rate of each step: the scale at a step's end holds from the next, block by block."""
    state = schedule.init()
    rates = {0: LR * state.scale}
    for step, loss in enumerate(losses, start=1):
        state = schedule.update(state, loss)
        rates[step] = LR * state.scale if step % read_every == 0 else rates[step - 1]
    return rates
