"""What any schedule is: the loss of each optimizer step in, a factor on the learning rate out."""

from __future__ import annotations

import copy
from typing import Any, NamedTuple, Protocol


class Schedule(Protocol):
    """A frozen dataclass of settings with pure steps over a NamedTuple of primitives.

    Whatever has the three methods below, and states with ``step``, the losses taken so far, and
    ``scale``, the factor on every base learning rate for the *next* optimizer step, goes into
    ``FastFaceCallback``, ``FastFaceLR`` and ``replay``. It may also have

    - ``describe() -> str``: one sentence for the log, of the bound schedule; else its ``repr``;
    - ``metrics(state) -> dict[str, float]``: what the callback logs besides the scale;
    - ``dump(state) -> dict``: a state's fields for a checkpoint; else all of them as they are;
    - ``total_steps``: of a bound schedule, the length it is bound to.

    Example:
        >>> from dataclasses import dataclass, replace
        >>> from typing import NamedTuple
        >>> from fastface_lightning import replay
        >>> class Seen(NamedTuple):
        ...     step: int = 0
        ...     scale: float = 1.0
        >>> @dataclass(frozen=True)
        ... class HalveEvery:
        ...     steps: int | None = None
        ...     def bind(self, total_steps):
        ...         return replace(self, steps=self.steps or total_steps // 10)
        ...     def init(self):
        ...         return Seen()
        ...     def update(self, state, loss):
        ...         return Seen(state.step + 1, 0.5 ** ((state.step + 1) // self.steps))
        >>> replay([1.0] * 9, HalveEvery(), total_steps=40, lr=0.1)
        [Change(step=3, factor=0.5, lr=0.05), Change(step=7, factor=0.5, lr=0.025)]
    """

    def bind(self, total_steps: int) -> Any:
        """The schedule for a run of ``total_steps`` optimizer steps, every None resolved."""

    def init(self) -> Any:
        """State before the first step; its scale holds for that step."""

    def update(self, state: Any, loss: float) -> Any:
        """State after the optimizer step whose mean loss was ``loss``; ``state`` stays as it was.

        NaN and infinite losses come too.
        """


class Progress(NamedTuple):
    """A schedule as its user gave it, as bound to the run, and where it stands."""

    schedule: Schedule
    bound: Any
    state: Any

    @classmethod
    def start(cls, schedule: Schedule, total_steps: int) -> Progress:
        """Before the first of ``total_steps`` optimizer steps."""
        bound = schedule.bind(total_steps)
        return cls(schedule, bound, bound.init())

    def update(self, loss: float) -> Progress:
        """After one more optimizer step."""
        return self._replace(state=self.bound.update(self.state, loss))

    def describe(self) -> str:
        """One sentence for the log: what the schedule will do."""
        return str(getattr(self.bound, "describe", self.bound.__repr__)())

    def metrics(self) -> dict[str, float]:
        """What to log besides the scale, by name."""
        return getattr(self.bound, "metrics", lambda state: {})(self.state)

    def dump(self) -> dict[str, Any]:
        """Primitives for a checkpoint."""
        return {
            "schedule": type(self.schedule).__name__,
            "settings": values_of(self.schedule),
            "bound": values_of(self.bound),
            "state": getattr(self.bound, "dump", values_of)(self.state),
        }

    @classmethod
    def load(cls, saved: dict[str, Any], schedule: Schedule) -> Progress:
        """Go on where a checkpoint stopped, with the settings its run was bound to.

        Raises:
            ValueError: the checkpoint was written by another schedule than ``schedule``.
        """
        name, settings = saved["schedule"], values_of(schedule)
        wrote = [name]
        if name == type(schedule).__name__:
            wrote = [
                f"{key}={value!r}"
                for key, value in saved["settings"].items()
                if key not in settings or settings[key] != value
            ]
        if wrote:
            raise ValueError(
                f"the checkpoint was written by another schedule ({', '.join(wrote)}) than "
                f"{schedule!r}: resume with the same schedule, or start anew from the weights alone"
            )
        bound = with_values(schedule, saved["bound"])
        return cls(schedule, bound, with_values(bound.init(), saved["state"]))


def values_of(record: Any) -> dict[str, Any]:
    """The fields of a NamedTuple or a dataclass by their names."""
    return record._asdict() if hasattr(record, "_asdict") else dict(vars(record))


def with_values(record: Any, values: dict[str, Any]) -> Any:
    """A copy of a NamedTuple or a dataclass with other values, taken as they are."""
    if hasattr(record, "_replace"):
        return record._replace(**values)
    changed = copy.copy(record)
    vars(changed).update(values)
    return changed


def left_out(before: Any, after: Any, loss: float) -> str | None:
    """What to say when a schedule first leaves out a loss that is NaN or infinite, else None."""
    if getattr(after, "nonfinite", 0) == 1 and before.nonfinite == 0:
        return f"the loss is {loss}; such losses are left out of the schedule"
    return None
