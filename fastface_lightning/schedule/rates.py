"""Learning rates are multiplied as they are found, whenever a schedule's scale has changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .plateau import check_number

Group = dict[str, Any]


class Rates:
    """What a schedule has done to the learning rates of some parameter groups.

    Args:
        groups: returns them as they are now; others may join.
        min_lr: a decay ends there, or at a rate that is lower already; >= 0.
    """

    def __init__(self, groups: Callable[[], list[Group]], min_lr: float) -> None:
        check_number("min_lr", min_lr, "be >= 0 and finite", lambda lr: 0 <= lr < math.inf)
        self.groups = groups
        self.min_lr = min_lr
        self.applied = 1.0
        """The scale that the rates have been multiplied by."""
        self._warned = False
        self._read: dict[int, float] = {}  # rates that are tensors, by id
        self._left: list[tuple[Group, float]] = []  # what the last decision made of each group

    def tensors(self) -> list[Tensor]:
        """The rates that are tensors: on their device."""
        return [group["lr"] for group in self.groups() if isinstance(group["lr"], Tensor)]

    def read(self, values: Iterable[float] | None = None) -> None:
        """Take the values of :meth:`tensors`; None waits for their device."""
        tensors = self.tensors()
        values = map(float, tensors) if values is None else values
        self._read = dict(zip(map(id, tensors), values, strict=True))

    @property
    def watched(self) -> bool:
        """Whether a decision has been applied, which something else may overwrite."""
        return bool(self._left) and not self._warned

    def now(self) -> list[float]:
        """The groups' learning rates; a tensor's as last read, NaN before that."""
        lrs = [group["lr"] for group in self.groups()]
        return [self._read.get(id(x), math.nan) if isinstance(x, Tensor) else x for x in lrs]

    def scaled(self, lr: float, scale: float) -> float:
        """A learning rate, as found, once ``scale`` is applied."""
        ratio = scale / self.applied if self.applied else 1.0  # 0 is for good
        return lr * ratio if ratio >= 1 else max(lr * ratio, min(lr, self.min_lr))

    def at_floor(self, scale: float) -> bool:
        """Whether no rate can fall below where ``scale`` takes it."""
        return all(self.scaled(lr, scale) <= self.min_lr for lr in self.now())

    def begin(self, scale: float) -> None:
        """Apply a schedule's first scale: that of a warm-up is no decay, and has no floor."""
        floor, self.min_lr = self.min_lr, 0.0
        self.apply(scale)
        self.min_lr = floor

    def apply(self, scale: float) -> None:
        """Multiply every rate by what ``scale`` has changed by, in place where it is a tensor."""
        if scale == self.applied:
            return
        groups, left = self.groups(), [self.scaled(lr, scale) for lr in self.now()]
        for tensor in {
            id(tensor): tensor for tensor in self.tensors()
        }.values():  # groups may share
            floor = tensor.clamp(max=self.min_lr)
            tensor.mul_(scale / self.applied)  # a capturable optimizer's graph has it
            if scale < self.applied:
                torch.maximum(tensor, floor, out=tensor)
        for group, lr in zip(groups, left, strict=True):
            if not isinstance(group["lr"], Tensor):
                group["lr"] = lr
        self.applied = scale
        self._left = list(zip(groups, left, strict=True))
        self._read = {id(group["lr"]): lr for group, lr in self._left}

    def overwritten(self) -> str | None:
        """What to warn of, once, where a rate no longer is what the last decision made of it."""
        for group, left in [] if self._warned else self._left:
            lr = group["lr"]
            now = self._read.get(id(lr), left) if isinstance(lr, Tensor) else lr
            if left and abs(now - left) > 1e-6 * left:  # never of a NaN
                self._warned = True
                return (
                    f"the schedule left a learning rate of {left:.6g} and finds {now:.6g}: "
                    f"something else sets it too, and may undo the schedule's decays"
                )
        return None


def lr_names(optimizers: list[Optimizer]) -> list[list[str]]:
    """A name for every group of every optimizer, as Lightning's LearningRateMonitor has them."""
    names = []
    kinds = [type(optimizer).__name__ for optimizer in optimizers]
    for i, (kind, optimizer) in enumerate(zip(kinds, optimizers, strict=True)):
        number = kinds[:i].count(kind)
        name = f"lr-{kind}-{number}" if number else f"lr-{kind}"
        groups = optimizer.param_groups
        several = [f"{name}/{g.get('name', f'pg{k}')}" for k, g in enumerate(groups, 1)]
        names.append(several if len(groups) > 1 else [name])
    return names
