"""Lower the learning rate once the loss has been flat for long enough: the rule all share."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Literal, NamedTuple, TypeVar

from .base import Schedule

ARM_DROP = 0.05
"""Share of its peak that the smoothed loss must lose before a flat loss means a plateau."""
_HUGE = 1e290
_DURATIONS = ("patience", "cooldown", "arm_after", "warmup_steps")
DEFAULTS: dict[str, Any] = {
    "patience": 0.05,
    "factor": 0.5,
    "max_decays": math.inf,
    "restart_after": math.inf,
    "restart_factor": 4.0,
    "cooldown": 0,
    "arm_after": 0.2,
    "warmup_steps": 0,
    "max_nonfinite": 100,
}
"""What None stands for in every variant that does not say otherwise."""


class PlateauState(NamedTuple):
    """Everything a schedule remembers between two steps; primitives only, never changed in place.

    ``scale`` holds for the *next* optimizer step.
    """

    step: int = 0
    """Finite losses seen so far, those of the warm-up included (optimizer steps)."""
    scale: float = 1.0
    """Factor on every learning rate."""
    response: float = math.nan
    """The detector's answer to the last loss (see the detector); NaN until it is defined."""
    plateau_steps: int = 0
    """Steps in a row, up to now, whose response lay below the threshold; below 0: the steps of the
    cooldown that are left, negated."""
    plateaus: int = 0
    """Plateaus in a row, without a response above the threshold between them."""
    decays: int = 0
    """Decays of the learning rate so far."""
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
class PlateauSchedule(Schedule):
    r"""Hyper-parameters of the plateau rule; a detector adds how it measures the response.

    With :math:`R_t` the response to the loss of step :math:`t` and :math:`\lambda` the threshold,

    .. math::
        c_t = \begin{cases} c_{t-1} + 1 & \text{armed and } R_t < \lambda \\
                            0 & \text{otherwise,} \end{cases}

    and as soon as :math:`c_t` exceeds ``patience``, :math:`c_t = 0` and the learning rate decays:
    it is multiplied by ``factor`` -- or by ``restart_factor`` if this was plateau number
    ``restart_after`` in a row. The ``cooldown`` steps after it are not counted.

    The rule is *armed* once the smoothed loss has lost 5 % of its peak, at the latest after
    ``arm_after``: at the start of a run the loss of a margin softmax rises or stands still, and a
    decay there would ruin the run.

    A step is an optimizer step, warm-up excluded. Where a count of steps is asked for, a float
    below 1 is a share of the run. **None is the variant's own value, for every argument**; *no
    limit* and *never* are ``math.inf``.

    A detector of one's own overrides two methods: :meth:`of_length` gives the settings that follow
    from the run's length, :meth:`detect` measures one response and hands it to :meth:`decide`.

    Args:
        variant: which published or own rule; see the detector.
        threshold: response below which the loss counts as flat, >= 0; in the response's own unit.
        threshold_mode: ``"abs"``: the threshold is used as given; ``"rel"``: times the smoothed
            loss; ``"peak"``: times the highest smoothed loss so far. Only with a threshold;
            None is ``"abs"`` then. Of a loss that may be negative the size counts: \|loss\|, and
            under ``"peak"`` how far it has fallen where that is more.
        patience: flat steps in a row that are still forgiven, >= 0; 0.05.
        factor: multiplies the learning rate at a plateau, in (0, 1); 0.5.
        max_decays: most multiplications by ``factor``, >= 0 or inf.
        restart_after: plateaus in a row that end in a restart, >= 1, or inf for never.
        restart_factor: multiplies the learning rate at a restart, >= 1; 4.
        cooldown: steps after a decay or restart that do not count as flat, >= 0; 0.
        arm_after: steps after which the rule is armed in any case; 0 arms it from the start, inf
            never in that way; 0.2.
        warmup_steps: steps over which the scale grows linearly to 1; the detector sees none of
            their losses; 0.
        max_nonfinite: NaN or infinite losses in a row that are still skipped, >= 1 or inf; 100.
        total_steps: optimizer steps of the run; None for what :meth:`bind` is told.

    Raises:
        ValueError: a value out of its range.
    """

    variant: str | None = "default"
    threshold: float | None = None
    threshold_mode: Literal["abs", "rel", "peak"] | None = None
    patience: int | float | None = None
    factor: float | None = None
    max_decays: int | float | None = None
    restart_after: int | float | None = None
    restart_factor: float | None = None
    cooldown: int | float | None = None
    arm_after: int | float | None = None
    warmup_steps: int | float | None = None
    max_nonfinite: int | float | None = None
    total_steps: int | None = None

    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"default": {}}
    """What None stands for in each variant, beside ``DEFAULTS``; the first is the default one."""
    adjustable: ClassVar[frozenset[str]] = frozenset(
        {"threshold", "threshold_mode", "patience", "cooldown", "factor", "max_decays", "arm_after"}
        | {"restart_after", "restart_factor", "max_nonfinite"}
    )

    def __post_init__(self) -> None:
        names = list(self.variants)
        if self.variant is None:
            object.__setattr__(self, "variant", names[0])
        if self.variant not in names:
            raise ValueError(f"variant must be {' or '.join(names)}, got {self.variant!r}")
        mode = self.threshold_mode
        if mode not in (None, "abs", "rel", "peak"):
            raise ValueError(f"threshold_mode must be abs, rel or peak, got {mode!r}")
        if self.threshold is None and mode is not None:
            raise ValueError(f"threshold_mode needs a threshold, got {mode!r} alone")
        settings = self._constants() | self._given()
        factor, restart_factor = settings["factor"], settings["restart_factor"]
        threshold = settings.get("threshold", 0)
        check_number("threshold", threshold, "be >= 0 and finite", lambda x: 0 <= x < math.inf)
        check_number("factor", factor, "lie in (0, 1)", lambda x: 0 < x < 1)
        check_number("restart_factor", restart_factor, "be at least 1", lambda x: 1 <= x < math.inf)
        for name in _DURATIONS:
            check_duration(name, settings.get(name, 0), never=name == "arm_after")
        for name, least in (("max_decays", 0), ("restart_after", 1), ("max_nonfinite", 1)):
            if settings[name] != math.inf:
                check_count(name, settings[name], least)
        check_count("total_steps", settings.get("total_steps", 1), 1)
        if factor ** (settings["restart_after"] - 1) * restart_factor > 1:
            raise ValueError(
                f"restart_factor must not undo more than the decays before it, got {restart_factor}"
                f" with factor={factor}, restart_after={settings['restart_after']}"
            )

    def _constants(self) -> dict[str, Any]:
        """What None stands for, where it does not depend on the run's length."""
        return {**DEFAULTS, **self.variants[str(self.variant)]}

    def _given(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if value is not None}

    def __repr__(self) -> str:
        given = {f.name: v for f in fields(self) if (v := getattr(self, f.name)) != f.default}
        return f"{type(self).__name__}({', '.join(f'{name}={given[name]!r}' for name in given)})"

    def bind(self: S, total_steps: int) -> S:
        """The schedule with plain numbers only, for a run of ``total_steps`` >= 1; for good."""
        check_count("total_steps", total_steps, 1)
        total_steps = self.total_steps or total_steps
        settings = self._constants() | self.of_length(total_steps) | self._given()
        for name in _DURATIONS:
            if isinstance(settings[name], float) and settings[name] < 1:
                settings[name] = int(settings[name] * total_steps)
        if "threshold" not in settings:
            raise ValueError(f"threshold must be given, or follow from of_length, got {self!r}")
        if self.threshold is not None or "threshold_mode" not in settings:
            settings["threshold_mode"] = self.threshold_mode or "abs"
        return replace(self, **settings | {"total_steps": total_steps})

    def of_length(self, total_steps: int) -> dict[str, Any]:
        """What None stands for in a run of so many steps, by the setting's name."""
        return {}

    def init(self) -> PlateauState:
        """State before the first step; raises ValueError if the schedule is not bound."""
        if self.bind(1) != self:
            raise ValueError(f"init() needs a bound schedule, got {self!r}: call bind(total_steps)")
        return PlateauState(scale=1 / max(1, self.warmup_steps))  # type: ignore[type-var, operator]

    def update(self, state: PlateauState, loss: float) -> PlateauState:
        """State after the optimizer step whose mean loss was ``loss``; ``state`` stays as it was.

        A NaN or infinite loss (beyond 1e290, that is) is counted and else left out; raises
        ValueError at more than ``max_nonfinite`` of them in a row.
        """
        if not is_loss(loss):
            return left_out(state, self.max_nonfinite)
        warmup_steps: Any = self.warmup_steps
        if state.step < warmup_steps:
            step = state.step + 1
            scale = min(1.0, (step + 1) / warmup_steps)
            return state._replace(step=step, scale=scale, nonfinite_run=0)
        return self.detect(state, loss)

    @abstractmethod
    def detect(self, state: PlateauState, loss: float) -> PlateauState:
        """State after a finite loss past the warm-up: the answer of :meth:`decide`."""

    def threshold_at(self, state: PlateauState) -> float:
        """The threshold in the response's unit, as it stands at ``state``; not finite at first."""
        return self._threshold(state.level, state.peak)

    def _threshold(self, level: float, peak: float) -> float:
        assert self.threshold is not None
        if self.threshold_mode == "abs":
            return self.threshold
        if self.threshold_mode == "rel":
            return self.threshold * abs(level)
        if level <= 0 and peak > -math.inf:
            peak = max(abs(peak), peak - level)
        return self.threshold * peak

    def decide(
        self,
        state: PlateauState,
        level: float,
        response: float,
        window: float,
        memory: tuple[Any, ...] = (),
    ) -> PlateauState:
        """State after one more response, by the rule.

        Args:
            state: before the step.
            level: smoothed loss.
            response: how fast the loss falls, in the threshold's unit; NaN while it is not known.
            window: steps that the smoothed loss averages over.
            memory: what the detector wants to find in the state's ``memory`` at the next step.
        """
        bound: Any = self  # so no setting is None
        (
            step,
            scale,
            _,
            plateau_steps,
            plateaus,
            decays,
            restarts,
            _,
            peak,
            armed,
            nonfinite,
            _,
            _,
        ) = state
        seen = step - bound.warmup_steps
        if level > peak and 2 * seen >= window:
            peak = level
        armed = armed or seen >= bound.arm_after or peak - level >= ARM_DROP * abs(peak)
        if not (armed and response < self._threshold(level, peak)):
            plateaus = 0
            plateau_steps = plateau_steps + 1 if plateau_steps < 0 else 0
        elif plateau_steps < bound.patience:  # in a cooldown as well
            plateau_steps += 1
        else:
            plateau_steps = -bound.cooldown
            plateaus += 1
            if plateaus == bound.restart_after:
                plateaus = 0
                restarts += 1
                scale *= bound.restart_factor
            elif decays < bound.max_decays:
                decays += 1
                scale *= bound.factor
        return PlateauState(
            step + 1, scale, response, plateau_steps, plateaus, decays, restarts,
            level, peak, armed, nonfinite, 0, memory,
        )  # fmt: skip

    def metrics(self, state: PlateauState) -> dict[str, float]:
        """What a (bound) schedule's state is worth logging: ``plateau`` runs to 1 at a decay."""
        return {
            "response": state.response,
            "threshold": self.threshold_at(state),
            "plateau_steps": float(state.plateau_steps),
            "plateau": max(0, state.plateau_steps) / (self.patience + 1),  # type: ignore[operator]
        }

    def is_change(self, before: PlateauState, after: PlateauState) -> bool:
        """A decay or a restart; the warm-up, which no smoothed loss goes with, is none."""
        return after.scale != before.scale and not math.isnan(after.level)

    def remarks(self, before: PlateauState, after: PlateauState, loss: float) -> list[str]:
        """Of the first loss that is left out."""
        first = after.nonfinite == 1 and before.nonfinite == 0
        return [f"the loss is {loss}; such losses are left out of the schedule"] * first

    def lag(self) -> int:
        """Steps that the (bound) detector needs before its response means something."""
        windows = [value for name, value in vars(self).items() if name.endswith("_window")]
        return int(sum(windows))

    def cautions(self) -> list[str]:
        """Windows or patience that the run is too short for; a run in which no decay is allowed."""
        bound: Any = self
        run = f"in a run of {bound.total_steps} steps"
        if bound.max_decays == 0 and bound.restart_after == math.inf:
            return [
                f"the learning rate stays as it is {run}, as max_decays is 0: that or a threshold "
                f"may be given"
            ]
        if bound.warmup_steps + self.lag() + bound.patience >= bound.total_steps:
            waits = f"warmup_steps {bound.warmup_steps}, {self.lag()} steps until the windows tell"
            return [f"{waits} and patience {bound.patience} leave no time for a decay {run}"]
        return []


def scaled_window(total_steps: int) -> int:
    """Window of the scaled variants in a run of ``total_steps``, in optimizer steps."""
    return max(5, round(2000 * (total_steps / 200_000) ** (2 / 3)))


def scaled(schedule: PlateauSchedule, total_steps: int, unit: float = 1.0) -> dict[str, Any]:
    """Threshold and decays of the scaled variants; ``unit`` is the response to a fall of 1 a step.

    A short run hardly learns: by this threshold its loss is flat from the beginning, and the rate
    would decay for nothing. So it may decay once from 300 steps on, and once more for each 100 that
    it is longer, unless its user says what is flat.
    """
    if schedule.threshold is not None:
        return {"max_decays": 8}
    flat = {"threshold": 0.4 / total_steps * unit, "threshold_mode": "peak"}
    return {**flat, "max_decays": max(0, min(8, total_steps // 100 - 2))}


def window_of(window: int | None, rate: float | None) -> int | None:
    """A window in steps, given as such or by its rate, 1 / window; None if neither is."""
    return window if rate is None else round(1 / rate)


def check_window(
    name: str, window: int | None, rate_name: str, rate: float | None, least: int = 1
) -> None:
    """A window of at least so many steps, or its rate; raises ValueError."""
    if window is not None:
        check_count(name, window, least, " step" + "s" * (least > 1))
    if rate is not None:
        rule = f"lie in (0, {1 / least:g}]"
        check_number(rate_name, rate, rule, lambda rate: 0 < rate <= 1 / least)
        if window not in (None, window_of(None, rate)):
            raise ValueError(
                f"give {name} or {rate_name} = 1/{name}, got {name}={window}, {rate_name}={rate}"
            )


def is_loss(loss: float) -> bool:
    """Whether a loss is neither NaN nor infinite, nor beyond 1e290."""
    return -_HUGE < loss < _HUGE


def left_out(state: Any, most: Any) -> Any:
    """State with one more NaN or infinite loss counted; raises ValueError if over ``most``."""
    run = state.nonfinite_run + 1
    if run > most:
        raise ValueError(
            f"at most max_nonfinite={most} losses in a row may be NaN or infinite, got {run} after "
            f"{state.step} finite ones"
        )
    return state._replace(nonfinite=state.nonfinite + 1, nonfinite_run=run)


def check_duration(name: str, value: Any, never: bool = False) -> None:
    """Whole steps, a share of the run, or inf where that may be; raises ValueError."""
    share = isinstance(value, float) and 0 <= value < 1
    if not (share or (never and value == math.inf) or (type(value) is int and value >= 0)):
        raise ValueError(f"{name} must be whole steps or a share of the run below 1, got {value}")


def check_number(name: str, value: Any, rule: str, holds: Callable[[float], bool]) -> None:
    """A number for which the rule holds; raises ValueError."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not holds(value):
        raise ValueError(f"{name} must {rule}, got {value!r}")


def check_count(name: str, value: Any, least: int, unit: str = "") -> None:
    """A whole number; raises ValueError."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number, got {value}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}{unit}, got {value}")
