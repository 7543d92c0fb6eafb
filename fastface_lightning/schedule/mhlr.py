"""The windowed Haar response of the averaged loss, exact and at O(1) a step."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from .plateau import PlateauSchedule, PlateauState, check_count, check_number

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

    The defaults are the authors': ``haar_window`` 0.015 T (here rounded down to even), threshold
    0.06, patience two windows, :math:`\times 4` instead of a fourth division in a row, no limit on
    divisions.

    Args:
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

    haar_window: int | None = None
    beta: float | None = None
    threshold: float | None = 0.06
    restart_after: int | None = 4

    _resolved = (*PlateauSchedule._resolved, "haar_window")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("haar_window", self.haar_window, least=2, unit=" steps")
        check_number("beta", self.beta)
        if self.beta is not None and not 0 < self.beta <= 0.5:
            raise ValueError(f"beta must lie in (0, 0.5], got {self.beta}")
        if self.beta is not None and self.haar_window not in (None, round(1 / self.beta)):
            raise ValueError(
                f"give haar_window or beta = 1/haar_window, not both, got "
                f"haar_window={self.haar_window}, beta={self.beta}"
            )

    def _resolve(self, total_steps: int) -> MHLR:
        m = self.haar_window
        if m is None:
            m = round(1 / self.beta) if self.beta is not None else default_window(total_steps)
        patience = 2 * m if self.patience is None else self.patience
        threshold = 0.06 if self.threshold is None else self.threshold
        return replace(self, haar_window=m, patience=patience, threshold=threshold)

    def init(self) -> PlateauState:
        # memory: the sum of all losses; Q of the last steps, zero before the first; its length.
        # The list is shared by successive states and only ever appended to.
        state = super().init()
        m = self.haar_window
        assert m is not None
        return state._replace(memory=(0, [0] * (2 * m + 2), 2 * m + 2))

    def _detect(self, state: PlateauState, loss: float) -> PlateauState:
        m = self.haar_window
        assert m is not None
        total, q, length = state.memory
        total += int(loss * _PER_UNIT)
        if length != len(q) or length >= 4 * m + 4:
            # Another state went on from the same place; or it is time, once in 2m steps, to let go
            # of what is too old. A new list leaves earlier states theirs.
            q = q[length - 2 * m - 2 : length]
        q.append(q[-1] + total)
        seen = int(state.step - self.warmup_steps)
        # q[-1 - k] is Q_{i-k}, and Q_i - Q_{i-1} the sum of all losses up to i.
        level = (total - q[-1 - m] + q[-2 - m]) / (min(seen + 1, m) * _PER_UNIT)
        response = math.nan
        if seen >= 2 * m:
            middle = m - m // 2 + 1
            haar = 2 * (q[-1 - middle] - q[-1 - m - middle]) + q[-2 - 2 * m] - q[-2]
            response = haar / (m * m * _PER_UNIT)
        return self._decide(state, level, response, m, (total, q, len(q)))

    def dump(self, state: PlateauState) -> dict[str, Any]:
        m = self.haar_window
        total, past, length = state.memory
        assert m is not None
        recent = past[length - 2 * m - 2 : length]
        return super().dump(state._replace(memory=(total, recent, len(recent))))

    def _windows(self) -> str:
        return f"Haar over {self.haar_window} steps"


def default_window(total_steps: int) -> int:
    """Window for a run of ``total_steps``, in optimizer steps; even."""
    return max(2, int(0.015 * total_steps) // 2 * 2)
