"""Two chained moving averages of the loss tell, at O(1) cost, how fast it still falls."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .plateau import PlateauSchedule, PlateauState, check_count, check_number


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

    Three variants differ in how they start:

    - default: :math:`\alpha_t = \max(\alpha, 1/(t+1))` and :math:`E_0 = 0`. The windows, left
      open, are :math:`w = \max(5, 2000 (T / 200000)^{2/3})` for a run of :math:`T` steps, and the
      threshold is 0.4 :math:`\times` the highest smoothed loss, from step :math:`w/2` on,
      :math:`/ T`: the noise of the response falls as :math:`w^{-1.5}`, so a threshold that grows as
      :math:`1/T` needs a window that grows as :math:`T^{2/3}`.
    - ``literal``: the paper's rule, :math:`\alpha_t = \alpha` and :math:`E_1 = D_1`, counting from
      the first step; windows 1000, threshold 5e-5, unless given.
    - ``released``: the published code, :math:`E_t = (2-\alpha-\beta) E_{t-1} - (1-\alpha)(1-\beta)
      E_{t-2} + \alpha\beta (L_{t-1} - L_t)` with :math:`E_0 = 0`, which counts the very first loss
      drop :math:`1/\beta` times; its divisions take effect one call late. Kept to repeat runs made
      with it, not recommended; its smoothed loss starts far off, so its threshold must be absolute.

    Args:
        ema_window: steps of the first average, :math:`1/\alpha`, >= 1.
        haar_window: steps of the second average, :math:`1/\beta`, >= 1.
        alpha: instead of ``ema_window``, in (0, 1].
        beta: instead of ``haar_window``, in (0, 1].
        literal: follow the paper to the letter.
        released: follow the published code.
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

    ema_window: int | None = None
    haar_window: int | None = None
    alpha: float | None = None
    beta: float | None = None
    literal: bool = False
    released: bool = False
    patience: int | float | None = 0.05
    max_decays: int | None = 8

    _resolved = (*PlateauSchedule._resolved, "alpha", "beta")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.literal and self.released:
            raise ValueError("literal and released exclude each other, got both True")
        if self.released and self.threshold_mode not in (None, "abs"):
            raise ValueError(f"released needs threshold_mode 'abs', got {self.threshold_mode!r}")
        _check_window("ema_window", self.ema_window, "alpha", self.alpha)
        _check_window("haar_window", self.haar_window, "beta", self.beta)

    def _resolve(self, total_steps: int) -> FastFace:
        verbatim = self.literal or self.released
        window = 1000 if verbatim else default_window(total_steps)
        settings: dict[str, object] = {}
        if self.alpha is None:
            ema_window = self.ema_window or window
            settings |= {"ema_window": ema_window, "alpha": 1 / ema_window}
        if self.beta is None:
            haar_window = self.haar_window or window
            settings |= {"haar_window": haar_window, "beta": 1 / haar_window}
        if self.threshold is None and verbatim:
            settings |= {"threshold": 5e-5, "threshold_mode": "abs"}
        elif self.threshold is None:
            settings |= {"threshold": 0.4 / total_steps, "threshold_mode": "peak"}
        if verbatim and self.arm_after is None:
            settings["arm_after"] = 0
        if self.patience is None:
            settings["patience"] = 0.05
        return replace(self, **settings)  # type: ignore[arg-type]

    def _detect(self, state: PlateauState, loss: float) -> PlateauState:
        alpha, beta = self.alpha, self.beta
        assert alpha is not None and beta is not None
        window = self.ema_window or round(1 / alpha)
        seen = state.step - self.warmup_steps
        if self.literal or self.released:
            return self._detect_verbatim(state, loss, int(seen), window)
        if seen == 0:
            return self._decide(state, loss, 0.0, window)
        level = state.level + max(alpha, 1 / (seen + 1)) * (loss - state.level)
        response = state.response + beta * (state.level - level - state.response)
        return self._decide(state, level, response, window)

    def _detect_verbatim(
        self, state: PlateauState, loss: float, seen: int, window: int
    ) -> PlateauState:
        alpha, beta = self.alpha, self.beta
        assert alpha is not None and beta is not None
        if seen == 0:
            return state._replace(step=state.step + 1, level=loss, nonfinite_run=0)
        before, response = state.level, state.response
        if seen == 1 and self.released:
            # E_0 = 0 in the closed recurrence is a first drop D_1 / beta in the chained averages,
            # and that is what a smoothed loss which starts here gives.
            before, response = loss + (before - loss) / beta, 0.0
        level = before + alpha * (loss - before)
        drop = before - level
        response = drop if seen == 1 and self.literal else response + beta * (drop - response)
        if not self.released:
            return self._decide(state, level, response, window)
        due = state.memory[0] if state.memory else state.scale
        decided = self._decide(state._replace(scale=due), level, response, window)
        return decided._replace(scale=due, memory=(decided.scale,))

    def _windows(self) -> str:
        return (
            f"EMA over {1 / (self.alpha or 1):.4g} and Haar over {1 / (self.beta or 1):.4g} steps"
        )


def default_window(total_steps: int) -> int:
    """Window of both averages for a run of ``total_steps``, in optimizer steps."""
    return max(5, round(2000 * (total_steps / 200_000) ** (2 / 3)))


def _check_window(name: str, window: int | None, rate_name: str, rate: float | None) -> None:
    check_count(name, window, least=1, unit=" step")
    check_number(rate_name, rate)
    if rate is not None and not 0 < rate <= 1:
        raise ValueError(f"{rate_name} must lie in (0, 1], got {rate}")
    if window is not None and rate is not None and rate != 1 / window:
        raise ValueError(
            f"give {name} or {rate_name} = 1/{name}, not both, got {name}={window}, "
            f"{rate_name}={rate}"
        )
