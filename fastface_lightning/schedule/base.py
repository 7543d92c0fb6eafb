"""What any schedule is: the loss of each optimizer step in, a factor on the learning rate out."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from dataclasses import fields, is_dataclass
from typing import Any, ClassVar, NamedTuple


class Schedule(ABC):
    """A frozen dataclass of settings with pure steps over a NamedTuple of primitives.

    ``FastFaceCallback``, ``FastFaceLR`` and ``replay`` need ``bind``, ``init`` and ``update``, and
    of a state ``step``, the losses taken so far, and ``scale``, the factor on every learning rate
    for the *next* optimizer step. The rest may be overridden by a class that inherits from this
    one, which none must. For another way to measure the loss under the same rule see
    :class:`~fastface_lightning.schedule.PlateauSchedule`.

    Example:
        >>> from dataclasses import dataclass, replace
        >>> from typing import NamedTuple
        >>> from fastface_lightning import replay
        >>> from fastface_lightning.schedule import Schedule
        >>> class Seen(NamedTuple):
        ...     step: int = 0
        ...     scale: float = 1.0
        >>> @dataclass(frozen=True)
        ... class HalveEvery(Schedule):
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

    total_steps: int | None = None
    """Optimizer steps of the run, where the schedule was told them itself."""
    adjustable: ClassVar[frozenset[str]] = frozenset()
    """Settings that a run may take up anew when it resumes: those that no state depends on."""

    @abstractmethod
    def bind(self, total_steps: int) -> Any:
        """The schedule for a run of ``total_steps`` optimizer steps, every None resolved."""

    @abstractmethod
    def init(self) -> Any:
        """State before the first step; its scale holds for that step."""

    @abstractmethod
    def update(self, state: Any, loss: float) -> Any:
        """State after the optimizer step whose mean loss was ``loss``; ``state`` stays as it was.

        NaN and infinite losses come too.
        """

    def cautions(self) -> list[str]:
        """What of the (bound) schedule cannot act in its run, a sentence each."""
        return []

    def metrics(self, state: Any) -> dict[str, float]:
        """What the callback logs of a state besides the scale, by name."""
        return {}

    def remarks(self, before: Any, after: Any, loss: float) -> list[str]:
        """What to warn of after a step, a sentence each."""
        return []

    def is_change(self, before: Any, after: Any) -> bool:
        """Whether a step decayed or restarted the learning rate."""
        return bool(after.scale != before.scale)

    def scale_after(self, state: Any, steps: int) -> float:
        """The scale so many steps after a state, as far as no loss decides it.

        While it moves by more than 5 % in a block of losses the callback reads every loss at once.
        """
        return float(state.scale)

    def dump(self, state: Any) -> dict[str, Any]:
        """A state's fields as a checkpoint keeps them."""
        return values_of(state)


class Change(NamedTuple):
    """One change of the learning rate."""

    step: int
    """0-based index of the loss that triggered it; the new learning rate holds from the next."""
    factor: float
    """New learning rate over old."""
    lr: float
    """New learning rate."""


class Progress(NamedTuple):
    """A schedule bound to a run, and where it stands."""

    bound: Any
    total_steps: int
    """Optimizer steps that it is bound to."""
    state: Any
    optional: Any
    """The class whose optional methods are the schedule's: its own, or else Schedule."""
    losses: int = 0
    """Losses given so far, those that it left out among them."""

    @classmethod
    def start(cls, schedule: Schedule, total_steps: int) -> Progress:
        """Before the first of ``total_steps`` optimizer steps."""
        bound = schedule.bind(total_steps)
        if not isinstance(bound, Schedule):
            return cls(bound, total_steps, bound.init(), Schedule)
        return cls(bound, bound.total_steps or total_steps, bound.init(), type(bound))

    def update(self, loss: float) -> Progress:
        """After one more optimizer step."""
        state = self.bound.update(self.state, loss)
        if not 0 <= state.scale < math.inf or self.state.scale == 0 < state.scale:
            raise ValueError(
                f"scale must be finite and >= 0, and 0 is for good as rates are multiplied by it, "
                f"got {state.scale} after {self.state.scale} from {self.bound!r}"
            )
        return self._replace(state=state, losses=self.losses + 1)

    def without_decay(self, before: Progress) -> Progress:
        """This, but for a decay since ``before``: for rates that can fall no further."""
        old = values_of(before.state)
        kept = {name: old[name] for name in ("scale", "decays", "plateaus") if name in old}
        return self._replace(state=self.state._replace(**kept))

    def change(self, before: Progress, lr: float) -> Change | None:
        """The decay or restart since ``before``, of a base learning rate; warm-up is none."""
        old, new = before.state, self.state
        if not self.optional.is_change(self.bound, old, new):
            return None
        return Change(before.losses, new.scale / old.scale, lr * new.scale)

    def moves(self, steps: int) -> bool:
        """Whether the scale moves by more than 5 % in so many steps, whatever the losses are."""
        later = self.optional.scale_after(self.bound, self.state, steps)
        return bool(abs(later - self.state.scale) > 0.05 * self.state.scale)

    def metrics(self) -> dict[str, float]:
        """What to log besides the scale, by name."""
        return dict(self.optional.metrics(self.bound, self.state))

    def cautions(self) -> list[str]:
        """What of the schedule cannot act in its run, a sentence each."""
        return list(self.optional.cautions(self.bound))

    def remarks(self, before: Progress, loss: float) -> list[str]:
        """What to warn of after the last step, a sentence each."""
        return list(self.optional.remarks(self.bound, before.state, self.state, loss))

    def dump(self) -> dict[str, Any]:
        """Primitives for a checkpoint, and nothing that a later step would change."""
        saved = {
            "schedule": type(self.bound).__name__,
            "bound": values_of(self.bound),
            "total_steps": self.total_steps,
            "state": self.optional.dump(self.bound, self.state),
            "losses": self.losses,
        }
        return copy.deepcopy(saved)

    @classmethod
    def load(cls, saved: dict[str, Any], schedule: Schedule) -> tuple[Progress, list[str]]:
        """Where a checkpoint stopped, bound to the length of its run; and what is new, in words.

        Raises:
            ValueError: the checkpoint was written by another schedule than ``schedule``, or by one
                with another value of a setting that its state depends on.
        """
        if "losses" not in saved:
            raise ValueError(
                "the checkpoint was written by an earlier release of fastface_lightning, whose "
                "schedules cannot go on: start anew from the weights alone"
            )
        fresh = cls.start(schedule, saved["total_steps"])
        wrote, old, new = saved["schedule"], saved["bound"], values_of(fresh.bound)
        changed = [name for name in new if name not in old or old[name] != new[name]]
        fixed = [name for name in changed if name not in fresh.optional.adjustable]
        if wrote != type(fresh.bound).__name__ or fixed:
            of = ", ".join(f"{name}={old.get(name)!r}" for name in fixed)
            raise ValueError(
                f"the checkpoint was written by another schedule, {wrote}({of}), than "
                f"{schedule!r}: resume with the same schedule, or start anew from the weights alone"
            )
        state = fresh.state._replace(**copy.deepcopy(saved["state"]))
        phrases = [f"{name} {new[name]!r}, was {old.get(name)!r}" for name in changed]
        return fresh._replace(state=state, losses=saved["losses"]), phrases


def check_schedule(schedule: Any) -> None:
    """Something with a schedule's three methods; raises ValueError."""
    if isinstance(schedule, type):
        raise ValueError(f"schedule must be an object, {schedule.__name__}(), got the class")
    if not all(callable(getattr(schedule, name, None)) for name in ("bind", "init", "update")):
        raise ValueError(
            "schedule must be FastFace(...), MHLR(...) or another Schedule with bind, init and "
            f"update, got {schedule!r}"
        )


def values_of(record: Any) -> dict[str, Any]:
    """The fields of a NamedTuple or a dataclass, or what another object has, by their names."""
    if hasattr(record, "_asdict"):
        return dict(record._asdict())
    if is_dataclass(record):
        return {field.name: getattr(record, field.name) for field in fields(record)}
    return dict(vars(record))
