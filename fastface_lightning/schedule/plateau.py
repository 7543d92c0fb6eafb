"""Lower the learning rate once the loss has been flat for long enough: the rule all share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

ThresholdMode = Literal["abs", "rel", "peak"]
ARM_DROP = 0.05
"""Share of its peak that the smoothed loss must lose before a flat loss means a plateau."""
_HUGE = 1e290


class PlateauState(NamedTuple):
    """Everything a schedule remembers between two steps; primitives only, never changed in place.

    ``base_lr * scale`` is the learning rate of the *next* optimizer step.
    """

    step: int = 0
    """Finite losses seen so far, those of the warm-up included (optimizer steps)."""
    scale: float = 1.0
    """Factor on every base learning rate."""
    response: float = math.nan
    """The detector's answer to the last loss (see the detector); NaN until it is defined."""
    plateau_steps: int = 0
    """Steps in a row, up to now, whose response lay below the threshold."""
    plateaus: int = 0
    """Plateaus in a row, without a response above the threshold between them."""
    decays: int = 0
    """Divisions of the learning rate so far."""
    restarts: int = 0
    """Restarts of the learning rate so far."""
    level: float = math.nan
    """Smoothed loss."""
    peak: float = -math.inf
    """Highest smoothed loss, from half a smoothing window on."""
    armed: bool = False
    """Whether a flat loss counts already."""
    nonfinite: int = 0
    """Losses skipped because they were NaN or infinite."""
    nonfinite_run: int = 0
    """Those of them that came last, in a row."""
    memory: tuple[Any, ...] = ()
    """What one detector keeps besides."""


S = TypeVar("S", bound="PlateauSchedule")


@dataclass(frozen=True, kw_only=True, repr=False)
class PlateauSchedule(ABC):
    r"""Hyper-parameters of the plateau rule; a detector adds how it measures the response.

    With :math:`R_t` the response to the loss of step :math:`t` and :math:`\lambda` the threshold,

    .. math::
        c_t = \begin{cases} c_{t-1} + 1 & \text{armed and } R_t < \lambda \\
                            0 & \text{otherwise,} \end{cases}

    and as soon as :math:`c_t` exceeds ``patience``, :math:`c_t = 0` and the learning rate is
    multiplied by ``factor`` -- or by ``restart_factor`` if this was plateau number
    ``restart_after`` in a row.

    The rule is *armed* once the smoothed loss has lost 5 % of its peak, at the latest after
    ``arm_after``: at the start of a run the loss of a margin softmax rises or stands still, and a
    division there would ruin the run.

    A step is an optimizer step, warm-up excluded. Where a count of steps is asked for, a float
    below 1 is a share of the run.

    Args:
        threshold: response below which the loss counts as flat, >= 0; in the response's own unit.
        threshold_mode: ``"abs"``: the threshold is used as given; ``"rel"``: times the smoothed
            loss; ``"peak"``: times the highest smoothed loss so far.
        patience: flat steps in a row that are still forgiven, >= 0.
        factor: multiplies the learning rate at a plateau, in (0, 1).
        max_decays: most multiplications by ``factor``; None for no limit.
        restart_after: plateaus in a row that end in a restart; None for never.
        restart_factor: multiplies the learning rate at a restart, >= 1.
        arm_after: steps after which the rule is armed in any case; 0 arms it from the start, None
            after a fifth of the run.
        warmup_steps: steps over which the scale grows linearly to 1; the detector sees none of
            their losses.
        max_nonfinite: NaN or infinite losses in a row that are still skipped.
        total_steps: optimizer steps of the run; None for what :meth:`bind` is told.

    Raises:
        ValueError: a value out of its range.
    """

    threshold: float | None = None
    threshold_mode: ThresholdMode | None = None
    patience: int | float | None = None
    factor: float = 0.5
    max_decays: int | None = None
    restart_after: int | None = None
    restart_factor: float = 4.0
    arm_after: int | float | None = None
    warmup_steps: int | float = 0
    max_nonfinite: int = 100
    total_steps: int | None = None

    _resolved: ClassVar[tuple[str, ...]] = ("threshold", "threshold_mode")

    def __post_init__(self) -> None:
        for name in ("threshold", "factor", "restart_factor"):
            check_number(name, getattr(self, name))
        if self.threshold is not None and not 0 <= self.threshold < math.inf:
            raise ValueError(f"threshold must be at least 0 and finite, got {self.threshold}")
        if self.threshold_mode not in (None, "abs", "rel", "peak"):
            raise ValueError(
                f"threshold_mode must be 'abs', 'rel' or 'peak', got {self.threshold_mode!r}"
            )
        if self.threshold is None and self.threshold_mode is not None:
            raise ValueError(
                f"threshold_mode needs a threshold, got {self.threshold_mode!r} and threshold=None"
            )
        for name in ("patience", "arm_after", "warmup_steps"):
            check_duration(name, getattr(self, name), optional=name != "warmup_steps")
        if not 0 < self.factor < 1:
            raise ValueError(f"factor must lie in (0, 1), got {self.factor}")
        if not 1 <= self.restart_factor < math.inf:
            raise ValueError(f"restart_factor must be at least 1, got {self.restart_factor}")
        check_count("max_decays", self.max_decays, least=0)
        check_count("restart_after", self.restart_after, least=1)
        if self.restart_after and self.factor ** (self.restart_after - 1) * self.restart_factor > 1:
            raise ValueError(
                f"restart_factor must not undo more than the divisions before it, "
                f"factor**(restart_after - 1) * restart_factor <= 1, got restart_factor="
                f"{self.restart_factor}, factor={self.factor}, restart_after={self.restart_after}"
            )
        check_count("max_nonfinite", self.max_nonfinite, least=1, optional=False)
        check_count("total_steps", self.total_steps, least=1)

    def __repr__(self) -> str:
        given = (
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if getattr(self, f.name) != f.default
        )
        return f"{type(self).__name__}({', '.join(given)})"

    def bind(self: S, total_steps: int) -> S:
        """Resolve every None and every share of the run for a run of ``total_steps`` steps.

        Args:
            total_steps: optimizer steps of the whole run, >= 1.

        Returns:
            The schedule with plain numbers only. Binding it again changes nothing.

        Raises:
            ValueError: ``total_steps`` below 1.
        """
        if isinstance(total_steps, bool) or not isinstance(total_steps, int) or total_steps < 1:
            raise ValueError(f"total_steps must be at least 1 step, got {total_steps}")
        total_steps = self.total_steps or total_steps
        bound = self._resolve(total_steps)
        return replace(
            bound,
            threshold_mode=bound.threshold_mode or "abs",
            patience=as_steps(bound.patience, total_steps),
            arm_after=as_steps(0.2 if bound.arm_after is None else bound.arm_after, total_steps),
            warmup_steps=as_steps(bound.warmup_steps, total_steps),
            total_steps=total_steps,
        )

    @abstractmethod
    def _resolve(self: S, total_steps: int) -> S:
        """The detector's own defaults, for those hyper-parameters that are None."""

    def init(self) -> PlateauState:
        """State before the first step.

        Raises:
            ValueError: the schedule is not bound to a number of steps yet.
        """
        durations = (self.patience, self.arm_after, self.warmup_steps)
        if not all(isinstance(steps, int) for steps in durations) or any(
            getattr(self, name) is None for name in self._resolved
        ):
            raise ValueError(f"init() needs a bound schedule, got {self!r}: call bind(total_steps)")
        warming = self.warmup_steps > 0
        return PlateauState(scale=1 / self.warmup_steps if warming else 1.0)

    def update(self, state: PlateauState, loss: float) -> PlateauState:
        """State after the optimizer step whose mean loss was ``loss``; ``state`` stays as it was.

        A NaN or infinite loss (beyond 1e290, that is) changes nothing but the two counters of such
        losses.

        Raises:
            ValueError: more than ``max_nonfinite`` of them in a row.
        """
        if not -_HUGE < loss < _HUGE:
            return self._skip(state, loss)
        if state.step < self.warmup_steps:
            step = state.step + 1
            scale = min(1.0, (step + 1) / self.warmup_steps)
            return state._replace(step=step, scale=scale, nonfinite_run=0)
        return self._detect(state, loss)

    @abstractmethod
    def _detect(self, state: PlateauState, loss: float) -> PlateauState:
        """State after a finite loss past the warm-up: measure the response, then decide."""

    def _skip(self, state: PlateauState, loss: float) -> PlateauState:
        run = state.nonfinite_run + 1
        if run > self.max_nonfinite:
            raise ValueError(
                f"at most max_nonfinite={self.max_nonfinite} losses in a row may be NaN or "
                f"infinite, got {run} (the last is {loss}, after {state.step} finite ones)"
            )
        return state._replace(nonfinite=state.nonfinite + 1, nonfinite_run=run)

    def threshold_at(self, state: PlateauState) -> float:
        """The threshold in the response's unit, as it stands at ``state``; not finite at first."""
        return self._threshold(state.level, state.peak)

    def _threshold(self, level: float, peak: float) -> float:
        assert self.threshold is not None
        if self.threshold_mode == "abs":
            return self.threshold
        return self.threshold * (level if self.threshold_mode == "rel" else peak)

    def _decide(
        self,
        state: PlateauState,
        level: float,
        response: float,
        window: float,
        memory: tuple[Any, ...] = (),
    ) -> PlateauState:
        """Apply the rule to one response; ``window`` is what the smoothed loss averages over."""
        step, scale = state.step, state.scale
        plateau_steps, plateaus = state.plateau_steps, state.plateaus
        decays, restarts = state.decays, state.restarts
        seen = step - self.warmup_steps
        peak = max(state.peak, level) if 2 * seen >= window else state.peak
        armed = state.armed or seen >= self.arm_after or peak - level >= ARM_DROP * abs(peak)  # type: ignore[operator]
        if not (armed and response < self._threshold(level, peak)):
            plateau_steps = plateaus = 0
        elif plateau_steps < self.patience:  # type: ignore[operator]
            plateau_steps += 1
        else:
            plateau_steps = 0
            plateaus += 1
            if plateaus == self.restart_after:
                plateaus = 0
                restarts += 1
                scale *= self.restart_factor
            elif self.max_decays is None or decays < self.max_decays:
                decays += 1
                scale *= self.factor
        return PlateauState(
            step + 1, scale, response, plateau_steps, plateaus, decays, restarts,
            level, peak, armed, state.nonfinite, 0, memory,
        )  # fmt: skip

    def dump(self, state: PlateauState) -> dict[str, Any]:
        """``state`` as a dictionary of primitives that ``torch.load(weights_only=True)`` reads."""
        return state._asdict()

    def restore(self, saved: dict[str, Any]) -> PlateauState:
        """The state that :meth:`dump` wrote."""
        return PlateauState(**{**saved, "memory": tuple(saved["memory"])})

    def describe(self) -> str:
        """One sentence for the log: what the (bound) schedule will do."""
        unit = {"abs": "", "rel": " x the smoothed loss", "peak": " x the highest smoothed loss"}
        flat = f"{self.threshold:.3g}{unit[self.threshold_mode or 'abs']}"
        parts = [f"{self._windows()}; flat below {flat}; {self._answer()}"]
        if self.arm_after:
            latest = f"at the latest after {self.arm_after} steps"
            parts.append(f"counts once the smoothed loss fell 5 %, {latest}")
        else:
            parts.append("counts from the first step")
        if self.warmup_steps:
            parts.append(f"warm-up over {self.warmup_steps} steps")
        return f"{type(self).__name__}: {'; '.join(parts)}"

    def _answer(self) -> str:
        """What follows a plateau, for the log."""
        flat = f"flat for more than {self.patience} steps"
        answer = f"lr x {self.factor:g} when {flat}"
        if self.max_decays is not None:
            answer += f", at most {self.max_decays} times"
        if self.restart_after:
            answer += f", at plateau {self.restart_after} in a row x {self.restart_factor:g}"
        return answer

    @abstractmethod
    def _windows(self) -> str:
        """What the detector averages over, for the log."""


class Checkpointed(NamedTuple):
    """A schedule as its user gave it, as bound to the run, and where it stands."""

    given: PlateauSchedule
    bound: PlateauSchedule
    state: PlateauState

    def dump(self) -> dict[str, Any]:
        """Primitives for a checkpoint."""
        return {
            "schedule": type(self.given).__name__,
            "given": asdict(self.given),
            "bound": asdict(self.bound),
            "state": self.bound.dump(self.state),
        }

    @classmethod
    def load(cls, saved: dict[str, Any], given: PlateauSchedule) -> Checkpointed:
        """Go on where a checkpoint stopped, with the settings its run was bound to.

        A setting that an older checkpoint does not know has its default there.

        Raises:
            ValueError: the checkpoint was written by another schedule than ``given``.
        """
        defaults = {field.name: field.default for field in fields(given)}
        saved = saved | {"given": defaults | saved["given"]}
        if saved["schedule"] != type(given).__name__ or saved["given"] != asdict(given):
            wrote = ", ".join(_differences(saved, given))
            raise ValueError(
                f"the checkpoint was written by another schedule ({wrote}) than {given!r}: resume "
                f"with the same schedule, or start anew from the weights alone"
            )
        bound = type(given)(**saved["bound"])
        return cls(given, bound, bound.restore(saved["state"]))


def _differences(saved: dict[str, Any], given: PlateauSchedule) -> Iterator[str]:
    if saved["schedule"] != type(given).__name__:
        yield saved["schedule"]
        return
    now = asdict(given)
    for name, value in saved["given"].items():
        if name not in now or now[name] != value:
            yield f"{name}={value!r}"


def check_number(name: str, value: float | None) -> None:
    """A number or None; raises ValueError naming the value."""
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise ValueError(f"{name} must be a number, got {value!r}")


def check_count(
    name: str, value: int | None, least: int, unit: str = "", optional: bool = True
) -> None:
    """A whole number, or None where that has a meaning; raises ValueError."""
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, got {value}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}{unit}, got {value}")


def check_duration(name: str, value: int | float | None, optional: bool = True) -> None:
    """A whole number of steps, a share of the run in [0, 1), or None where that has a meaning."""
    if value is None and optional:
        return
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if not whole and not (isinstance(value, float) and 0 <= value < 1):
        raise ValueError(
            f"{name} must be a whole number of steps or a share of the run below 1, got {value}"
        )


def as_steps(value: int | float | None, total_steps: int) -> int:
    """Whole steps of a duration; a float is a share of ``total_steps``, rounded down."""
    assert value is not None
    return int(value * total_steps) if isinstance(value, float) else value
