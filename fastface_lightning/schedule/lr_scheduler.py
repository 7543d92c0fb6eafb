"""The plateau schedules as a torch learning-rate scheduler: ``scheduler.step(loss)``."""

from __future__ import annotations

import warnings
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from .base import Progress, Schedule, check_schedule
from .fastface import FastFace
from .plateau import check_count
from .rates import Rates


class FastFaceLR(LRScheduler):
    """Multiplies every parameter group's learning rate whenever the schedule makes it of the loss.

    What it multiplies is the rate that it finds: one that others set stands, and a group that
    joins later keeps its own.

    Under Lightning :class:`~fastface_lightning.FastFaceCallback` is the easier way. Returned from
    ``configure_optimizers`` this takes the loss that ``training_step`` logs (with
    ``sync_dist=True`` where there are several ranks)::

        {"scheduler": FastFaceLR(optimizer, self.trainer.estimated_stepping_batches),
         "interval": "step", "monitor": "train/loss", "reduce_on_plateau": True}

    Args:
        optimizer: its groups' learning rates are those of the run.
        total_steps: optimizer steps of the whole run, >= 1.
        schedule: ``FastFace(...)``, ``MHLR(...)``, ``AutoWU(...)`` or another
            :class:`~fastface_lightning.schedule.Schedule`; None for ``FastFace()``.
        last_epoch: as in torch: -1 for a new run; otherwise the groups' rates are those of the run
            that goes on, and :meth:`load_state_dict` must follow. (As any warm-up of torch's does,
            one of ``schedule`` sets the rates here: load the optimizer's state afterwards.)
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
        self._schedule = schedule
        self.optimizer = optimizer
        self._rates = Rates(self._groups, min_lr)
        self._progress = Progress.start(schedule, total_steps)
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
        """The groups' learning rates as they stand."""
        return [group["lr"] for group in self._groups()]

    def _groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

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
        elif self.last_epoch == -1:  # a new run, whose base rates torch has noted
            self._rates.read()
            self._rates.begin(self.state.scale)
        super().step()

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
        rates, warning = self._rates, None
        before, after = self._progress, self._progress.update(value)
        if rates.watched or after.state.scale != before.state.scale:
            rates.read()
            warning = rates.overwritten()
        if after.state.scale < before.state.scale and rates.at_floor(before.state.scale):
            after = after.without_decay(before)
        self._progress = after
        rates.apply(after.state.scale)
        for text in [*filter(None, [warning]), *after.remarks(before, value)]:
            warnings.warn(f"step {before.losses}: {text}", stacklevel=3)

    def state_dict(self) -> dict[str, Any]:
        """Primitives (and the learning rates as they are) to save in a checkpoint."""
        saved = super().state_dict()
        for name in ("_progress", "_schedule", "_rates"):
            del saved[name]
        return saved | {"schedule": self._progress.dump(), "applied": self._rates.applied}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`; as in torch, the optimizer's own state is not touched.

        Raises:
            ValueError: the state was written by another schedule, or another scheduler.
        """
        rest = dict(state_dict)
        if "schedule" not in rest or "applied" not in rest:
            raise ValueError(
                f"state_dict must be FastFaceLR's, got another scheduler's with {', '.join(rest)}"
            )
        self._progress, changed = Progress.load(rest.pop("schedule"), self._schedule)
        self._rates.applied = rest.pop("applied")
        if changed:
            warnings.warn(f"the schedule goes on with {'; '.join(changed)}", stacklevel=2)
        super().load_state_dict(rest)
