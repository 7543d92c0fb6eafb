"""Two chained moving averages of the loss tell, at O(1) cost, how fast it still falls."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeVar

from .plateau import PlateauSchedule, PlateauState, check_window, scaled, scaled_window, window_of

ScheduleT = TypeVar("ScheduleT", bound=PlateauSchedule)
_PUBLISHED = {"threshold": 5e-5, "max_decays": 8, "arm_after": 0}


def _without_old_names(schedule: type[ScheduleT]) -> type[ScheduleT]:
    """Let a schedule's constructor name what took the place of settings that it had once."""
    construct = schedule.__init__

    @functools.wraps(construct)
    def init(self: Any, **settings: Any) -> None:
        for old, variant in (("literal", "paper"), ("released", "released")):
            if old in settings:
                raise ValueError(f"{old} is now variant={variant!r}, got {old}={settings[old]}")
        construct(self, **settings)

    schedule.__init__ = init  # type: ignore[method-assign]
    return schedule


@_without_old_names
@dataclass(frozen=True, kw_only=True, repr=False)
class FastFace(PlateauSchedule):
    r"""FastFace: the loss drop, averaged twice, against a threshold.

    With :math:`L_t` the loss of optimizer step :math:`t`, :math:`\alpha` the weight of the first
    average and :math:`\beta` that of the second,

    .. math::
        LE_t &= LE_{t-1} + \alpha_t (L_t - LE_{t-1}), \qquad LE_0 = L_0 \\
        D_t &= LE_{t-1} - LE_t \\
        E_t &= E_{t-1} + \beta (D_t - E_{t-1})

    where :math:`D_t` is the two-tap Haar response of the smoothed loss and :math:`E_t`, the
    response, is in loss units per step: on a loss that falls by :math:`s` a step it tends to
    :math:`s`.

    Three variants differ in how they start and in what they leave to the run:

    - ``"scaled"``: :math:`\alpha_t = \max(\alpha, 1/(t+1))` and :math:`E_0 = 0`. The windows are
      :math:`w = \max(5, 2000 (T / 200000)^{2/3})` for a run of :math:`T` steps, and the
      threshold is 0.4 :math:`\times` the highest smoothed loss, from step :math:`w/2` on,
      :math:`/ T`: the noise of the response falls as :math:`w^{-1.5}`, so a threshold that grows as
      :math:`1/T` needs a window that grows as :math:`T^{2/3}`.
    - ``"paper"``: the paper's rule to the letter, :math:`\alpha_t = \alpha` and :math:`E_1 = D_1`,
      counting from the first step; windows 1000, threshold 5e-5.
    - ``"released"``: the published code, :math:`E_t = (2-\alpha-\beta) E_{t-1} -
      (1-\alpha)(1-\beta) E_{t-2} + \alpha\beta (L_{t-1} - L_t)` with :math:`E_0 = 0`, which counts
      the very first loss drop :math:`1/\beta` times; its decays take effect one call late. Kept to
      repeat runs made with it, not recommended; its smoothed loss starts far off, so its threshold
      must be absolute.

    In all of them ``patience`` is 0.05, ``max_decays`` 8 and there is no restart; with its own
    threshold ``"scaled"`` allows none below 300 steps, one there and 8 from 1,000 on.

    Args:
        variant: ``"scaled"``, ``"paper"`` or ``"released"``.
        ema_window: steps of the first average, :math:`1/\alpha`, >= 1.
        haar_window: steps of the second average, :math:`1/\beta`, >= 1.
        alpha: instead of ``ema_window``, in (0, 1].
        beta: instead of ``haar_window``, in (0, 1].
        threshold: loss units per step (mode ``"abs"``).

    For the other arguments see :class:`PlateauSchedule`.

    References:
        FastFace: Fast-converging Scheduler for Large-scale Face Recognition Training with One GPU,
        arXiv 2404.11118.

    Example:
        >>> schedule = FastFace().bind(total_steps=20_000)
        >>> state = schedule.init()
        >>> for step in range(20_000):
        ...     state = schedule.update(state, loss=10 / (1 + step / 500))
        >>> state.decays > 0
        True
    """

    variant: Literal["scaled", "paper", "released"] | None = "scaled"
    ema_window: int | None = None
    haar_window: int | None = None
    alpha: float | None = None
    beta: float | None = None

    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "scaled": {},
        "paper": _PUBLISHED,
        "released": _PUBLISHED,
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant == "released" and self.threshold_mode not in (None, "abs"):
            raise ValueError(f"variant released needs mode abs, got {self.threshold_mode!r}")
        check_window("ema_window", self.ema_window, "alpha", self.alpha)
        check_window("haar_window", self.haar_window, "beta", self.beta)

    def of_length(self, total_steps: int) -> dict[str, Any]:
        window = scaled_window(total_steps) if self.variant == "scaled" else 1000
        ema_window = window_of(self.ema_window, self.alpha) or window
        haar_window = window_of(self.haar_window, self.beta) or window
        settings: dict[str, Any] = {"ema_window": ema_window, "alpha": 1 / ema_window}
        settings |= {"haar_window": haar_window, "beta": 1 / haar_window}
        return settings | (scaled(self, total_steps) if self.variant == "scaled" else {})

    def detect(self, state: PlateauState, loss: float) -> PlateauState:
        bound: Any = self
        alpha, beta, window = bound.alpha, bound.beta, bound.ema_window
        before, response = state.level, state.response
        seen = state.step - bound.warmup_steps
        if self.variant == "scaled":
            if seen == 0:
                return self.decide(state, loss, 0.0, window)
            level = before + max(alpha, 1 / (seen + 1)) * (loss - before)
            return self.decide(state, level, response + beta * (before - level - response), window)
        if seen == 0:
            return state._replace(step=state.step + 1, level=loss, nonfinite_run=0)
        if seen == 1 and self.variant == "released":
            # E_0 = 0 in the closed recurrence is a first drop D_1 / beta in the chained averages,
            # and that is what a smoothed loss which starts here gives.
            before, response = loss + (before - loss) / beta, 0.0
        level = before + alpha * (loss - before)
        drop = before - level
        if seen == 1 and self.variant == "paper":
            response = drop
        response += beta * (drop - response)
        if self.variant == "paper":
            return self.decide(state, level, response, window)
        due = state.memory[0] if state.memory else state.scale
        decided = self.decide(state._replace(scale=due), level, response, window)
        return decided._replace(scale=due, memory=(decided.scale,))
