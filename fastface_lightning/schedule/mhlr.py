"""The windowed Haar response of the averaged loss, exact and at O(1) a step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from .plateau import PlateauSchedule, PlateauState, check_window, scaled, scaled_window, window_of

_PER_UNIT = 2**50
"""Losses are counted in whole multiples of 2**-50 (9e-16), so that their running sums are exact."""


@dataclass(frozen=True, kw_only=True, repr=False)
class MHLR(PlateauSchedule):
    r"""MHLR: the moving Haar response of the loss's moving average.

    With :math:`m` the window and :math:`a_j = \frac1m \sum_{k=j-m+1}^{j} L_k` the mean of the last
    :math:`m` losses at step :math:`j`, the response to step :math:`i \ge 2m` is

    .. math::
        H_i = \frac1m \Bigl( \sum_{j=i-m}^{i-m+h-1} a_j - \sum_{j=i-m+h}^{i-1} a_j \Bigr),
        \qquad h = \lfloor m/2 \rfloor,

    in loss units: on a loss that falls by :math:`s` a step it is :math:`s m / 4` for an even
    :math:`m`. For an odd one the second sum has one mean more, so the response is low by about
    :math:`a / m`; the default is therefore even.

    With :math:`Q_i = \sum_{j \le i} \sum_{k \le j} L_k` the double sum of the losses this is

    .. math::
        H_i = \frac{2 (Q_{i-m+h-1} - Q_{i-2m+h-1}) + Q_{i-2m-1} - Q_{i-1}}{m^2},

    four look-ups a step whatever :math:`m` is. :math:`Q` is kept in integers (Python's have no
    limit): nothing drifts, however long the run, and a resumed run computes the same bits.

    Two variants differ in what they leave to the run, of :math:`T` steps:

    - ``"scaled"``: as :class:`~fastface_lightning.FastFace`'s, :math:`m = \max(5, 2000
      (T / 200000)^{2/3})` rounded to even, threshold 0.4 :math:`\times` the highest mean, from
      step :math:`m/2` on, :math:`/ T \times m / 4`, patience 0.05, as many decays as
      FastFace's, no restart.
    - ``"paper"``: the authors' rule, counting from the first response; ``haar_window`` 0.015 T
      (here rounded down to even), threshold 0.06, patience two windows, :math:`\times 4` instead of
      a fourth decay in a row, no limit on decays.

    Args:
        variant: ``"scaled"`` or ``"paper"``.
        haar_window: :math:`m`, steps, >= 2.
        beta: instead of ``haar_window``, :math:`1/m`, in (0, 0.5].
        threshold: loss units (mode ``"abs"``).

    For the other arguments see :class:`PlateauSchedule`.

    References:
        Moving Haar Learning Rate Scheduler for Large-scale Face Recognition Training with One GPU,
        arXiv 2404.11118v1.

    Example:
        >>> schedule = MHLR(haar_window=20).bind(total_steps=1000)
        >>> state = schedule.init()
        >>> for step in range(60):
        ...     state = schedule.update(state, loss=10 - 0.1 * step)
        >>> round(state.response, 9)
        0.5
    """

    variant: Literal["scaled", "paper"] | None = "scaled"
    haar_window: int | None = None
    beta: float | None = None

    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "scaled": {},
        "paper": {"threshold": 0.06, "restart_after": 4, "arm_after": 0},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window("haar_window", self.haar_window, "beta", self.beta, least=2)

    def of_length(self, total_steps: int) -> dict[str, Any]:
        if self.variant == "scaled":
            default = 2 * round(scaled_window(total_steps) / 2)
        else:
            default = max(2, int(0.015 * total_steps) // 2 * 2)
        m = window_of(self.haar_window, self.beta) or default
        if self.variant == "scaled" and self.threshold is None and m % 2:
            raise ValueError(
                f"haar_window must be even where the threshold is the scaled one, got {m}: an odd "
                f"one's response is low by a share of the loss"
            )
        settings: dict[str, Any] = {"haar_window": m, "beta": 1 / m}
        if self.variant == "scaled":  # a loss that falls by s a step has the response s m / 4
            return settings | scaled(self, total_steps, unit=m / 4)
        return settings | {"patience": 2 * m}

    def lag(self) -> int:
        """The first response comes at step 2m."""
        return 2 * self.haar_window  # type: ignore[operator]

    def init(self) -> PlateauState:
        # memory: the sum of all losses; Q of the last steps, zero before the first; its length.
        # The list is shared by successive states and only ever appended to.
        size = 2 * (self.haar_window or 0) + 2
        return super().init()._replace(memory=(0, [0] * size, size))

    def detect(self, state: PlateauState, loss: float) -> PlateauState:
        m: Any = self.haar_window
        total, q, length = state.memory
        total += int(loss * _PER_UNIT)
        if length != len(q) or length >= 4 * m + 4:
            # Another state went on from the same place; or it is time, once in 2m steps, to let go
            # of what is too old. A new list leaves earlier states theirs.
            q = q[length - 2 * m - 2 : length]
        q.append(q[-1] + total)
        seen: Any = state.step - self.warmup_steps  # type: ignore[operator]
        # q[-1 - k] is Q_{i-k}, and Q_i - Q_{i-1} the sum of all losses up to i.
        level = (total - q[-1 - m] + q[-2 - m]) / (min(seen + 1, m) * _PER_UNIT)
        response = math.nan
        if seen >= 2 * m:
            middle = m - m // 2 + 1
            haar = 2 * (q[-1 - middle] - q[-1 - m - middle]) + q[-2 - 2 * m] - q[-2]
            response = haar / (m * m * _PER_UNIT)
        return self.decide(state, level, response, m, (total, q, len(q)))

    def dump(self, state: PlateauState) -> dict[str, Any]:
        """The state's fields, of its memory only what is still needed."""
        total, past, length = state.memory
        recent = past[length - 2 * self.haar_window - 2 : length]  # type: ignore[operator]
        return state._replace(memory=(total, recent, len(recent)))._asdict()
