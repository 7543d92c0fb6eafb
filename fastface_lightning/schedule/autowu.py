"""AutoWU: the learning rate grows until the loss turns up, then falls by half a cosine."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from .base import Schedule
from .plateau import PlateauSchedule, check_count, check_duration, check_number, is_loss, left_out

if TYPE_CHECKING:
    from numpy.typing import NDArray

BINS = 128
"""The losses of the growth are kept as at most so many means."""
LENGTHSCALE = 0.2
"""Of the Gaussian process, as a share of the time seen."""
DEFAULTS: dict[str, Any] = {
    "start_scale": 1e-5,
    "max_warmup": 0.5,
    "test_every": 0.05,
    "confidence": 0.95,
    "positive_tests": 3,
    "cosine_steps": math.inf,
    "max_nonfinite": 100,
}
_DURATIONS = ("max_warmup", "test_every", "cosine_steps")


class AutoWUState(NamedTuple):
    """Everything AutoWU remembers between two steps; ``scale`` holds for the *next* one."""

    step: int = 0
    """Finite losses seen so far (optimizer steps)."""
    scale: float = 1.0
    """Factor on every learning rate."""
    probability: float = math.nan
    """That the loss has fallen and turned up again, by the last test; NaN before the first."""
    positives: int = 0
    """Positive tests in a row."""
    peak: float = 0.0
    """Scale that the cosine falls from; 0 while the rate grows."""
    peak_step: int = 0
    """Steps after which the growth ended."""
    means: tuple[float, ...] = ()
    """Mean loss of each full bin of the growth, all of one width."""
    total: float = 0.0
    """Sum of the losses in the bin under way."""
    nonfinite: int = 0
    """Losses skipped because they were NaN or infinite."""
    nonfinite_run: int = 0
    """Those of them that came last, in a row."""


@dataclass(frozen=True, kw_only=True, repr=False)
class AutoWU(Schedule):
    r"""AutoWU, adapted: an exponential warm-up that a Gaussian process ends, then a cosine.

    With :math:`K` = ``max_warmup`` in a run of :math:`T` steps, and :math:`s_0` = ``start_scale``,
    the scale grows as :math:`s_k = s_0^{1 - k/K}`: **the optimizer's rate is the highest to try**.
    At every ``test_every`` a Gaussian process with a constant mean, an RBF kernel of lengthscale
    0.2 of the time seen, and noise is fitted to all losses so far. With :math:`f_i` its value at
    the :math:`i`-th of :math:`n` places, the test is positive where

    .. math:: p = \max_{j < i} \min\bigl( P(f_i < f_j), P(f_i < f_n) \bigr)

    exceeds ``confidence``: the loss has fallen and turned up again. ``positive_tests`` of them in a
    row end the growth. The scale then is what it was where, from the top before the fall on, the
    posterior mean is lowest, and falls by half a cosine to 0 at step :math:`T`. If the loss never
    turns up the growth ends at step :math:`K`, and the cosine falls from 1, as in the authors'
    release.

    Adapted: the release fits five random subsets of the losses, here it is the means of at most
    128 bins, without a random choice; it tests once an epoch, so never thrice within half of six
    epochs; it asks for :math:`P(f_i < f_n)` alone, and a loss that rises first is then trained at
    :math:`s_0` to the end. And no loss counts as further above the highest of the first half than
    the lowest is below it, so that an explosion leaves the fall in sight.

    Args:
        start_scale: first rate over the highest, in (0, 1); 1e-5.
        max_warmup: longest growth, steps, or a float below 1 as a share of the run; 0.5.
        test_every: steps or share between two tests, above 0; 0.05.
        confidence: probability that a positive test needs, in (0.5, 1); 0.95.
        positive_tests: in a row, that end the growth, >= 1; 3.
        cosine_steps: the cosine takes the last so many steps, or that share, of the run, and the
            rate is constant before it; inf: all that the growth leaves.
        max_nonfinite: NaN or infinite losses in a row that are still skipped, >= 1 or inf; 100.
        total_steps: optimizer steps of the run; None for what :meth:`bind` is told.

    Raises:
        ValueError: a value out of its range.

    References:
        Automated Learning Rate Scheduler for Large-batch Training, arXiv 2107.05855.

    Example:
        >>> schedule = AutoWU().bind(total_steps=1000)
        >>> state = schedule.init()
        >>> for step in range(1000):  # above a scale of 0.01 this loss turns up
        ...     state = schedule.update(state, loss=5 - min(step, 250) / 100 + 50 * state.scale)
        >>> 0.001 < state.peak < 0.01
        True
    """

    start_scale: float | None = None
    max_warmup: int | float | None = None
    test_every: int | float | None = None
    confidence: float | None = None
    positive_tests: int | float | None = None
    cosine_steps: int | float | None = None
    max_nonfinite: int | float | None = None
    total_steps: int | None = None

    adjustable: ClassVar[frozenset[str]] = frozenset(
        {"test_every", "confidence", "positive_tests", "max_nonfinite"}
    )
    __repr__ = PlateauSchedule.__repr__

    def __post_init__(self) -> None:
        settings = self._settings()
        check_number("start_scale", settings["start_scale"], "lie in (0, 1)", lambda x: 0 < x < 1)
        check_number("confidence", settings["confidence"], "lie in (0.5, 1)", lambda x: 0.5 < x < 1)
        for name in _DURATIONS:
            check_duration(name, settings[name], never=name == "cosine_steps")
        check_number("test_every", settings["test_every"], "be above 0", lambda x: x > 0)
        for name in ("positive_tests", "max_nonfinite"):
            check_number(name, settings[name], "be at least 1", lambda x: x >= 1)
        check_count("total_steps", settings.get("total_steps", 1), 1)

    def _settings(self) -> dict[str, Any]:
        return DEFAULTS | {name: value for name, value in vars(self).items() if value is not None}

    def bind(self, total_steps: int) -> AutoWU:
        """The schedule with plain numbers only, for a run of ``total_steps`` >= 1; for good."""
        check_count("total_steps", total_steps, 1)
        total_steps, settings = self.total_steps or total_steps, self._settings()
        for name in _DURATIONS:
            if isinstance(settings[name], float) and settings[name] < 1:
                settings[name] = max(int(settings[name] * total_steps), int(name == "test_every"))
        return replace(self, **settings | {"total_steps": total_steps})

    def init(self) -> AutoWUState:
        """State before the first step; raises ValueError if the schedule is not bound."""
        if self.bind(1) != self:
            raise ValueError(f"init() needs a bound schedule, got {self!r}: call bind(total_steps)")
        start = AutoWUState() if self.max_warmup else AutoWUState(peak=1.0)
        return start._replace(scale=self.scale_after(start, 0))

    def update(self, state: AutoWUState, loss: float) -> AutoWUState:
        """State after the optimizer step whose mean loss was ``loss``; ``state`` stays as it was.

        At a NaN or infinite loss, which is counted, the schedule stands still; raises ValueError
        at more than ``max_nonfinite`` of them in a row.
        """
        if not is_loss(loss):
            return left_out(state, self.max_nonfinite)
        state = state._replace(step=state.step + 1, nonfinite_run=0)
        if not state.peak:
            state = self._watch(state, loss)
        return state._replace(scale=self.scale_after(state, 0))

    def _watch(self, state: AutoWUState, loss: float) -> AutoWUState:
        """State with one more loss of the growth, and with what the test says where one is due."""
        bound: Any = self
        step, width = state.step, math.ceil(bound.max_warmup / BINS)
        state = state._replace(total=state.total + loss)
        if step % width == 0:
            state = state._replace(means=(*state.means, state.total / width), total=0.0)
        if step % bound.test_every == 0:
            probability, lowest = valley(state.means)
            positives = state.positives + 1 if probability > bound.confidence else 0
            state = state._replace(probability=probability, positives=positives)
            if positives >= bound.positive_tests:
                middle = width * lowest + (width - 1) / 2  # steps before its bin's mean loss
                scale = bound.start_scale ** (1 - middle / bound.max_warmup)
                return state._replace(peak=scale, peak_step=step)
        return state._replace(peak=1.0, peak_step=step) if step >= bound.max_warmup else state

    def scale_after(self, state: AutoWUState, steps: int) -> float:
        bound: Any = self
        step = state.step + steps
        if not state.peak:
            return float(bound.start_scale ** max(0.0, 1 - step / bound.max_warmup))
        begin = max(state.peak_step, bound.total_steps - bound.cosine_steps)
        share = (step - begin) / max(1, bound.total_steps - begin)
        return state.peak * (1 + math.cos(math.pi * min(1.0, max(0.0, share)))) / 2

    def is_change(self, before: AutoWUState, after: AutoWUState) -> bool:
        """Where tests end the growth: neither the growth itself nor the cosine is a change."""
        return not before.peak and 0 < after.peak < 1

    def metrics(self, state: AutoWUState) -> dict[str, float]:
        """1 - p as the response: a test is positive below the threshold; 1 after the growth."""
        over = state.peak and state.step > state.peak_step
        response = 1.0 if over else 1 - state.probability
        return {"response": response, "threshold": 1 - float(self.confidence or 0)}

    remarks = PlateauSchedule.remarks

    def cautions(self) -> list[str]:
        """Where the run is too short for the growth or for the tests."""
        bound: Any = self
        if bound.max_warmup >= bound.total_steps:
            return [
                f"max_warmup={bound.max_warmup} leaves no step of "
                f"total_steps={bound.total_steps} to the cosine: "
                f"unless the loss turns up, the rate grows to the end"
            ]
        tests = bound.max_warmup // bound.test_every
        if (
            not bound.max_warmup
            or tests >= bound.positive_tests
            or bound.positive_tests == math.inf
        ):
            return []  # no growth, or none that a test is to end
        return [
            f"positive_tests={bound.positive_tests}, one in {bound.test_every} steps, do not fit "
            f"into max_warmup={bound.max_warmup}: whatever the loss does, the rate grows to its "
            f"highest"
        ]


def valley(losses: Sequence[float]) -> tuple[float, int]:
    """The probability :math:`p` of :class:`AutoWU` for equally spaced losses, and the index of the
    lowest after the fall, by the posterior mean."""
    import numpy as np

    y = np.array(losses) - min(losses, default=0.0)
    y = np.minimum(y, 2 * y[: (len(y) + 1) // 2].max(initial=0.0))
    if not y.any():
        return 0.0, 0
    y = y / y.max()  # its square is finite
    mean, covariance = posterior((y - y.mean()) / y.std())
    variance = np.diag(covariance)
    # 1e-4, as in the release: of mere noise both sides of the ratio are almost 0.
    below = mean[:, None] - mean  # how far the second place is below the first, in deviations
    below /= np.sqrt(variance[:, None] + variance - 2 * covariance + 1e-4)
    valleys = np.minimum(np.triu(below, 1).max(axis=0), below[-1])
    top = int(mean[: valleys.argmax() + 1].argmax())
    return math.erfc(-valleys.max() / math.sqrt(2)) / 2, top + int(mean[top:].argmin())


def posterior(y: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    r"""Mean (n,) and covariance (n, n) of the Gaussian process at n noisy values of mean 0.

    With :math:`K = U \Lambda U^T` the kernel's matrix, :math:`s^2` the signal's variance and
    :math:`r` the noise's over it, the values' covariance is :math:`s^2 U (\Lambda + r) U^T`. Most
    likely is :math:`s^2` the mean of :math:`(U^T y)^2 / (\Lambda + r)`; :math:`r` is taken from a
    grid.
    """
    import numpy as np

    x = np.arange(len(y)) / len(y)
    eigenvalues, u = np.linalg.eigh(np.exp(-(((x[:, None] - x) / LENGTHSCALE) ** 2) / 2))
    eigenvalues = np.maximum(eigenvalues, 0)
    ratios = np.logspace(-4, 4, 41)
    z, spread = u.T @ y, eigenvalues + ratios[:, None]
    signals = (z**2 / spread).mean(axis=1)
    best = int(np.argmin(len(y) * np.log(signals) + np.log(spread).sum(axis=1)))
    kept = eigenvalues / spread[best]
    return u @ (kept * z), signals[best] * ratios[best] * (u * kept) @ u.T
