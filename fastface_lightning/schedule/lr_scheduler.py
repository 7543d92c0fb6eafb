"""The plateau schedules as a torch learning-rate scheduler: ``scheduler.step(loss)``."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .base import Progress, Schedule, left_out
from .fastface import FastFace


class FastFaceLR(LRScheduler):
    """Scales every parameter group's learning rate by what the schedule makes of the loss.

    Args:
        optimizer: its groups' learning rates at construction are the base rates; their ratios stay.
        total_steps: optimizer steps of the whole run, >= 1.
        schedule: ``FastFace(...)``, ``MHLR(...)`` or another
            :class:`~fastface_lightning.schedule.Schedule`; None for ``FastFace()``.
        last_epoch: as in torch: -1 for a new run; otherwise ``initial_lr`` is taken from the groups
            and :meth:`load_state_dict` must follow.

    Raises:
        ValueError: ``total_steps`` below 1.

    Example:
        >>> import torch
        >>> from fastface_lightning import MHLR, FastFaceLR
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        >>> schedule = MHLR(haar_window=10, arm_after=0)
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
    ) -> None:
        self._progress = Progress.start(schedule or FastFace(), total_steps)
        super().__init__(optimizer, last_epoch)

    @property
    def schedule(self) -> Any:
        """The schedule, bound to the run."""
        return self._progress.bound

    @property
    def state(self) -> Any:
        """The schedule's state after the last step."""
        return self._progress.state

    def get_lr(self) -> list[float | Tensor]:
        """Base learning rates times the scale, one a group."""
        return [base * self.state.scale for base in self.base_lrs]

    def step(self, loss: float | Tensor | None = None) -> None:
        """Take the mean loss of the optimizer step just done.

        Args:
            loss: float or tensor of one element; reading a tensor waits for its device.

        Raises:
            ValueError: no loss given, or too many in a row that are NaN or infinite.
        """
        if self._is_initial:
            return super().step()
        if loss is None:
            raise ValueError("step(loss) takes the loss of the optimizer step just done, got None")
        before, value = self.state, float(loss.detach() if isinstance(loss, Tensor) else loss)
        self._progress = self._progress.update(value)
        if warning := left_out(before, self.state, value):
            warnings.warn(f"step {self.last_epoch}: {warning}", stacklevel=2)
        super().step()
        return None

    def state_dict(self) -> dict[str, Any]:
        """Primitives (and the learning rates as they are) to save in a checkpoint."""
        saved = super().state_dict()
        del saved["_progress"]
        return saved | {"schedule": self._progress.dump()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`; as in torch, the optimizer's own state is not touched.

        Raises:
            ValueError: the state was written by another schedule.
        """
        rest = dict(state_dict)
        self._progress = Progress.load(rest.pop("schedule"), self._progress.schedule)
        super().load_state_dict(rest)


def set_lr(group: dict[str, Any], lr: float) -> None:
    """Set a parameter group's learning rate, in place where it is a tensor (capturable ones)."""
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(lr)
    else:
        group["lr"] = lr
