"""FastFace's three variants, each against a plain twin of its definition."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np
import pytest
from curves import training_curve
from hypothesis import given, settings
from hypothesis import strategies as st

from fastface_lightning import FastFace
from fastface_lightning.schedule import PlateauState, states

ALPHA = BETA = 1e-3
THRESHOLD = 5e-5


class CountingRule:
    """If E < lambda: if count < int(tau T) count one more, else divide by delta and count from 0.

    If E >= lambda: count from 0. At most 8 decays.
    """

    def __init__(self, patience: int, threshold: float = THRESHOLD, delta: int = 2) -> None:
        self.patience, self.threshold, self.delta = patience, threshold, delta
        self.count = self.decays = 0

    def see(self, response: float) -> float:
        """The scale after this response."""
        if response >= self.threshold:
            self.count = 0
        elif self.count < self.patience:
            self.count += 1
        else:
            self.count = 0
            self.decays = min(self.decays + 1, 8)
        return 1 / self.delta**self.decays


def run(schedule: FastFace, losses: Sequence[float], total_steps: int) -> list[PlateauState]:
    return list(states(losses, schedule.bind(total_steps)))


# Paper ------- ------------------------------------------------------------------------------


def two_averages(losses: list[float]) -> Iterator[float]:
    """E_t for t >= 1: the drop D of the loss's moving average, averaged once more; E_1 = D_1."""
    drop = response = ALPHA * (losses[0] - losses[1])
    yield response
    for before, loss in pairwise(losses[1:]):
        drop = (1 - ALPHA) * drop + ALPHA * (before - loss)
        response = (1 - BETA) * response + BETA * drop
        yield response


def closed_recurrence(losses: list[float], first: float, second: float) -> Iterator[float]:
    """E_t for t >= 1 from E_0 = ``first`` and E_1 = ``second``, one state fewer."""
    yield second
    for before, loss in pairwise(losses[1:]):
        first, second = (
            second,
            (2 - ALPHA - BETA) * second
            - (1 - ALPHA) * (1 - BETA) * first
            + ALPHA * BETA * (before - loss),
        )
        yield second


def test_paper_equals_the_two_averages_and_the_closed_recurrence() -> None:
    # The closed recurrence equals the two chained averages when it starts with E_0 = E_1 = D_1.
    steps = 100_000
    losses = training_curve(steps, scale=45.0, noise=0.1, rise=0.02).losses
    ours = [state.response for state in run(FastFace(variant="paper"), losses, steps)[1:]]
    first = ALPHA * (losses[0] - losses[1])
    np.testing.assert_allclose(ours, list(two_averages(losses)), rtol=0, atol=1e-12)
    np.testing.assert_allclose(
        ours, list(closed_recurrence(losses, first, first)), rtol=0, atol=1e-12
    )


def test_paper_decays_by_the_counting_rule() -> None:
    steps = 30_000
    losses = training_curve(steps, noise=0.05, speed=40).losses
    ours = run(FastFace(variant="paper", patience=0.01), losses, steps)
    rule = CountingRule(patience=int(0.01 * steps))
    assert [state.scale for state in ours[1:]] == [rule.see(e) for e in two_averages(losses)]
    assert rule.decays >= 3


# Released: the published code --------------------------------------------------------------------


def released_scales(losses: list[float], patience: int) -> Iterator[float]:
    """The scale after each loss: E_0 = 0, E_1 = alpha (L_0 - L_1), a decay one call late."""
    rule = CountingRule(patience)
    pending = 1.0
    yield pending
    for response in closed_recurrence(losses, 0.0, ALPHA * (losses[0] - losses[1])):
        yield pending
        pending = rule.see(response)


def test_released_equals_its_definition() -> None:
    steps = 40_000
    losses = training_curve(steps, noise=0.1).losses
    ours = run(FastFace(variant="released"), losses, steps)
    twin = closed_recurrence(losses, 0.0, ALPHA * (losses[0] - losses[1]))
    np.testing.assert_allclose(
        [state.response for state in ours[1:]], list(twin), rtol=0, atol=1e-10
    )
    scales = [state.scale for state in ours]
    assert scales == list(released_scales(losses, patience=int(0.05 * steps)))
    assert scales[-1] < 1


# Scaled ------------------------------------------------------------------------------------------


def scaled_scales(losses: list[float], total_steps: int) -> Iterator[float]:
    """The rule, sentence by sentence.

    Both windows are w = max(5, 2000 (T / 200,000)^(2/3)). LE is an EMA with gain
    max(1/w, 1/(t+1)); E, the EMA of its drop, starts at 0. L_ref is the highest LE from step w/2
    on. Armed once LE <= 0.95 L_ref, or after 0.2 T. Flat below 0.4 L_ref / T; more than 0.05 T
    flat steps in a row halve the scale; at most 8 times, and T // 100 - 2 times.
    """
    window = max(5, round(2000 * (total_steps / 200_000) ** (2 / 3)))
    smooth, response, reference = losses[0], 0.0, -np.inf
    armed, count, decays = False, 0, 0
    for step, loss in enumerate(losses):
        before = smooth
        smooth += max(1 / window, 1 / (step + 1)) * (loss - smooth)
        response += 1 / window * (before - smooth - response)
        if step >= window / 2:
            reference = max(reference, smooth)
        if smooth <= 0.95 * reference or step >= int(0.2 * total_steps):
            armed = True
        if armed and response < 0.4 / total_steps * reference:
            count += 1
        else:
            count = 0
        if count > int(0.05 * total_steps):
            count = 0
            decays = min(decays + 1, 8, max(0, total_steps // 100 - 2))
        yield 0.5**decays


@given(st.lists(st.floats(0, 60), min_size=1, max_size=400), st.integers(1, 1200))
@settings(max_examples=60, deadline=None)
def test_scaled_equals_its_rule_on_any_losses(losses: list[float], total_steps: int) -> None:
    ours = run(FastFace(), losses, total_steps)
    assert [state.scale for state in ours] == list(scaled_scales(losses, total_steps))


@given(
    steps=st.integers(20, 3000),
    scale=st.sampled_from([2.0, 45.0]),
    noise=st.floats(0, 0.3),
    seed=st.integers(0, 10**6),
    rise=st.just(0.0) | st.floats(0.01, 0.4),
    speed=st.floats(1, 80),
)
@settings(max_examples=30, deadline=None)
def test_scaled_equals_its_rule_on_training_curves(
    steps: int, scale: float, noise: float, seed: int, rise: float, speed: float
) -> None:
    losses = training_curve(steps, scale, noise, seed, rise, speed).losses
    ours = run(FastFace(), losses, steps)
    assert [state.scale for state in ours] == list(scaled_scales(losses, steps))


@given(st.integers(1, 500))
def test_a_window_is_the_inverse_of_its_rate(window: int) -> None:
    # alpha = 1 / ema_window, beta = 1 / haar_window: either name gives the same run.
    by_window = FastFace(ema_window=window, haar_window=window + 1).bind(100)
    by_rate = FastFace(alpha=1 / window, beta=1 / (window + 1)).bind(100)
    losses = training_curve(60).losses
    assert list(states(losses, by_window)) == list(states(losses, by_rate))


# Extremes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [1e280, 1e-300, -1.0])
@pytest.mark.parametrize("variant", FastFace.variants)
def test_stays_finite_on_extreme_losses(size: float, variant: str) -> None:
    losses = [size * (2 - step / 200) for step in range(300)]
    last = run(FastFace(variant=variant), losses, 300)[-1]  # type: ignore[arg-type]
    assert np.isfinite([last.level, last.response, last.scale]).all()
