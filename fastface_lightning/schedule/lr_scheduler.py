"""The plateau schedules as a torch learning-rate scheduler: ``scheduler.step(loss)``."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .base import Progress, Schedule, check_schedule
from .fastface import FastFace
from .plateau import check_count, check_number


class FastFaceLR(LRScheduler):
    """Multiplies every parameter group's learning rate whenever the schedule makes it of the loss.

    What it multiplies is the rate that it finds: one that others set stands, and a group that
    joins later keeps its own.

    Under Lightning :class:`~fastface_lightning.FastFaceCallback` is the easier way. Returned from
    ``configure_optimizers`` this takes the loss that ``training_step`` logs::

        {"scheduler": FastFaceLR(optimizer, self.trainer.estimated_stepping_batches),
         "interval": "step", "monitor": "train/loss", "reduce_on_plateau": True}

    Args:
        optimizer: its groups' learning rates are those of the run.
        total_steps: optimizer steps of the whole run, >= 1.
        schedule: ``FastFace(...)``, ``MHLR(...)`` or another
            :class:`~fastface_lightning.schedule.Schedule`; None for ``FastFace()``.
        last_epoch: as in torch: -1 for a new run; otherwise the groups' rates are those of the run
            that goes on, and :meth:`load_state_dict` must follow.
        min_lr: no decay takes a rate below it, >= 0; a rate that is lower already stays. Once
            every rate stands there no decay counts.

    Raises:
        ValueError: ``total_steps`` below 1, or another argument out of its range.

    Example:
        >>> import torch
        >>> from fastface_lightning import MHLR, FastFaceLR
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        >>> schedule = MHLR(haar_window=10, patience=20, arm_after=0)
        >>> scheduler = FastFaceLR(optimizer, total_steps=1000, schedule=schedule)
        >>> for loss in [3.0] * 50:
        ...     optimizer.step()
        ...     scheduler.step(loss)
        >>> scheduler.get_last_lr()
        [0.05]
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        schedule: Schedule | None = None,
        last_epoch: int = -1,
        min_lr: float = 0.0,
    ) -> None:
        schedule = FastFace() if schedule is None else schedule
        check_schedule(schedule)
        check_count("total_steps", total_steps, 1)
        check_min_lr(min_lr)
        self.min_lr = min_lr
        self._schedule = schedule
        self._progress = Progress.start(schedule, total_steps)
        self._applied = 1.0 if last_epoch == -1 else self.state.scale
        super().__init__(optimizer, last_epoch)

    def __repr__(self) -> str:
        return f"FastFaceLR({self._schedule!r}, step {self.state.step}, scale {self.state.scale:g})"

    @property
    def schedule(self) -> Any:
        """The schedule, bound to the run."""
        return self._progress.bound

    @property
    def state(self) -> Any:
        """The schedule's state after the last step."""
        return self._progress.state

    def get_lr(self) -> list[float | Tensor]:
        """The groups' learning rates, times what the scale has changed by since it was applied."""
        ratio = self.state.scale / self._applied
        return [scaled_lr(g["lr"], ratio, self.min_lr) for g in self.optimizer.param_groups]

    def step(self, loss: float | Tensor | None = None) -> None:
        """Take the mean loss of the optimizer step just done.

        Args:
            loss: float or tensor of one element; reading a tensor waits for its device.

        Raises:
            ValueError: no loss given, one of several elements, or too many in a row that are NaN
                or infinite.
        """
        if not self._is_initial:
            self._take(loss)
        super().step()
        self._applied = self.state.scale

    def _take(self, loss: float | Tensor | None) -> None:
        if loss is None:
            raise ValueError(
                "step(loss) takes the loss of the optimizer step just done, got None; in "
                "configure_optimizers give {'scheduler': ..., 'interval': 'step', 'monitor': "
                "'train/loss', 'reduce_on_plateau': True}, or use FastFaceCallback instead"
            )
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise ValueError(f"loss must be a scalar, got a tensor of shape {tuple(loss.shape)}")
        value = float(loss.detach() if isinstance(loss, Tensor) else loss)
        before, after = self._progress, self._progress.update(value)
        if after.state.scale < before.state.scale and at_floor(
            (group["lr"] for group in self.optimizer.param_groups), 1.0, self.min_lr
        ):
            after = after.without_decay(before)
        self._progress = after
        if warning := after.remark(before, value):
            warnings.warn(f"step {self.last_epoch}: {warning}", stacklevel=3)

    def state_dict(self) -> dict[str, Any]:
        """Primitives (and the learning rates as they are) to save in a checkpoint."""
        saved = super().state_dict()
        for name in ("_progress", "_schedule", "min_lr"):
            del saved[name]
        return saved | {"schedule": self._progress.dump()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`; as in torch, the optimizer's own state is not touched.

        Raises:
            ValueError: the state was written by another schedule, or another scheduler.
        """
        rest = dict(state_dict)
        if "schedule" not in rest or "_applied" not in rest:
            raise ValueError(
                f"state_dict must be FastFaceLR's, got another scheduler's with {', '.join(rest)}"
            )
        self._progress, changed = Progress.load(rest.pop("schedule"), self._schedule)
        if changed:
            warnings.warn(f"the schedule goes on with {'; '.join(changed)}", stacklevel=2)
        super().load_state_dict(rest)


def scaled_lr(lr: float | Tensor, ratio: float, min_lr: float) -> Any:
    """A learning rate times ``ratio``; a decay ends at ``min_lr``, or at ``lr`` if that is less."""
    if ratio >= 1:
        return lr if ratio == 1 else lr * ratio
    if isinstance(lr, Tensor):
        return torch.maximum(lr * ratio, lr.clamp(max=min_lr))
    return max(lr * ratio, min(lr, min_lr))


def scale_lr(group: dict[str, Any], ratio: float, min_lr: float) -> None:
    """:func:`scaled_lr` of a parameter group, in place where it is a tensor (capturable ones)."""
    if isinstance(group["lr"], Tensor):
        group["lr"].copy_(scaled_lr(group["lr"], ratio, min_lr))
    else:
        group["lr"] = scaled_lr(group["lr"], ratio, min_lr)


def at_floor(lrs: Iterable[float | Tensor], ratio: float, min_lr: float) -> bool:
    """Whether all learning rates, times ``ratio``, can fall no further."""
    return all(float(scaled_lr(lr, ratio, min_lr)) <= min_lr for lr in lrs)


def check_min_lr(min_lr: float) -> None:
    """Raises ValueError unless it is >= 0 and finite."""
    check_number("min_lr", min_lr, "be >= 0 and finite", lambda lr: 0 <= lr < math.inf)


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
