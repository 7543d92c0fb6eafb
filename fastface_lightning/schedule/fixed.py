"""torch's own schedulers, bound to a run's length: what the rate will be is known beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from inspect import signature
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

DURATIONS = ("step_size", "step_size_up", "step_size_down", "T_0", "T_max", "total_steps")
COUNTS = (*DURATIONS, "milestones", "patience", "cooldown", "total_iters", "steps_per_epoch")


class FixedSchedule:
    """A scheduler of ``torch.optim.lr_scheduler`` for runs of any length, stepped once a step.

    Args:
        scheduler: name of its class, ``MultiStepLR``.
        settings: its keyword arguments. Where they count steps (``milestones``, ``patience``,
            ``cooldown``, ``step_size``, ``T_max``, ``total_iters`` and the like), a whole number
            is optimizer steps, and a float or a fraction as text, ``8/19``, is a share of the run
            in [0, 1]: exact as it is written, then rounded down to whole steps, a period to at
            least one. OneCycleLR
            goes up to each group's own learning rate unless ``max_lr`` is given.

    Raises:
        ValueError: torch has no such scheduler, it takes no such setting, or a number of steps is
            neither.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
        >>> schedule = FixedSchedule("MultiStepLR", milestones=[0.5, 0.75, "9/10"], gamma=0.1)
        >>> sorted(schedule(optimizer, total_steps=1000).milestones)
        [500, 750, 900]
    """

    def __init__(self, scheduler: str, **settings: Any) -> None:
        from torch.optim import lr_scheduler

        if scheduler not in lr_scheduler.__all__:
            raise ValueError(f"scheduler must be one of torch.optim.lr_scheduler, got {scheduler}")
        self._class = getattr(lr_scheduler, scheduler)
        defaults = {"max_lr": None} if scheduler == "OneCycleLR" else {}
        try:
            signature(self._class).bind(None, **{**defaults, **settings})
        except TypeError as error:
            raise ValueError(f"{scheduler} got {settings}: {error}") from error
        self.scheduler, self.settings = scheduler, settings
        self.bind(1)

    def __repr__(self) -> str:
        settings = "".join(f", {name}={value!r}" for name, value in self.settings.items())
        return f"FixedSchedule({self.scheduler!r}{settings})"

    def bind(self, total_steps: int) -> dict[str, Any]:
        """The scheduler's keyword arguments in a run of ``total_steps`` optimizer steps."""
        return {
            name: _steps(name, value, total_steps) if name in COUNTS else value
            for name, value in self.settings.items()
        }

    def __call__(self, optimizer: Optimizer, total_steps: int) -> LRScheduler:
        """The scheduler of an optimizer, in a run of ``total_steps`` optimizer steps."""
        settings = self.bind(total_steps)
        if self.scheduler == "OneCycleLR":  # of one number all groups would get the same
            settings.setdefault("max_lr", [group["lr"] for group in optimizer.param_groups])
        return self._class(optimizer, **settings)


def _steps(name: str, value: Any, total_steps: int) -> Any:
    """Whole steps of a duration, or of each in a list."""
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_steps(name, part, total_steps) for part in value]
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    try:
        share = Fraction(str(value))
        if isinstance(value, (float, str)) and 0 <= share <= 1:
            return max(int(share * total_steps), int(name in DURATIONS))
    except (ValueError, ZeroDivisionError):  # no number
        pass
    raise ValueError(
        f"{name} must be a whole number of steps or a share of the run in [0, 1], got {value!r}"
    )
