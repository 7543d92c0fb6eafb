"""FastFace() and MHLR() need no tuning: on a family of curves the rate decays in time."""

from itertools import product

import numpy as np
import pytest
from curves import Curve, training_curve

from fastface_lightning import MHLR, FastFace, replay
from fastface_lightning.schedule.plateau import PlateauSchedule
from fastface_lightning.schedule.replay import states

STEPS = [300, 1560, 6240, 20_000, 200_000]
SCALES = [2.0, 45.0]
NOISES = [0.0, 0.02, 0.1]
RISES = [0.0, 0.05, 0.1]
SPEEDS = [6.0, 15.0, 40.0]


def first_decay(schedule: PlateauSchedule, losses: list[float]) -> int | None:
    bound = schedule.bind(len(losses))
    return next((t for t, s in enumerate(states(losses, bound)) if s.decays), None)


def last_clear_fall(curve: Curve) -> int:
    """Last step at which the noiseless loss falls by 0.4 x its peak / T or more a step."""
    falls = -np.diff(curve.smooth) >= 0.4 * curve.smooth.max() / len(curve.losses)
    return int(np.flatnonzero(falls)[-1])


def decays_in_time(curve: Curve) -> None:
    """FastFace() decays after the clear fall, and within the delay its windows explain.

    Patience is 0.05 T; each of the two averages lags by a window w, and the noise starts the
    count anew until the response has sunk clearly below the threshold.
    """
    steps = len(curve.losses)
    flat_from, first = last_clear_fall(curve), first_decay(FastFace(), curve.losses)
    assert first is None or first > flat_from, "decayed while the loss still fell"
    window = FastFace().bind(steps).ema_window
    assert window is not None
    latest = flat_from + 0.05 * steps + 4 * window + 0.08 * steps
    assert (first if first is not None else steps) <= latest, "decayed late or never"


# The whole family in the slow test; here each length meets each hard corner.
@pytest.mark.parametrize("rise", [0.0, 0.1])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("steps", STEPS[:4])
def test_decays_in_time(steps: int, scale: float, rise: float) -> None:
    for seed, (noise, speed) in enumerate(product([0.02, 0.1], [6.0, 40.0])):
        decays_in_time(training_curve(steps, scale, noise, seed, rise, speed=speed))


def test_decays_in_time_on_a_long_run() -> None:
    decays_in_time(training_curve(200_000, scale=45.0, noise=0.1, rise=0.05))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "seeds"), list(zip(STEPS, [20, 20, 6, 2, 1], strict=True)), ids=str
)
def test_decays_in_time_on_the_whole_family(steps: int, seeds: int) -> None:
    for scale, noise, rise, speed in product(SCALES, NOISES, RISES, SPEEDS):
        for seed in range(seeds if noise else 1):
            decays_in_time(training_curve(steps, scale, noise, seed, rise, speed=speed))


@pytest.mark.parametrize("steps", STEPS[:4])
def test_never_decays_on_a_straight_fall(steps: int) -> None:
    # L_0 / T a step is 2.5 times the threshold, to the very end and under any noise in the family.
    smooth = np.linspace(10.0, 0.5, steps)
    noise = 1 + 0.1 * np.random.default_rng(0).standard_normal(steps)
    assert replay((smooth * noise).tolist(), FastFace(), steps, lr=0.1) == []

    # MHLR's H = s m / 4 as well, at an even window.
    if steps > 300:
        assert replay(np.linspace(45, 5, steps).tolist(), MHLR(), steps, lr=0.1) == []


@pytest.mark.parametrize("schedule", [FastFace(), MHLR()], ids=repr)
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("steps", STEPS[:4])
def test_nothing_happens_before_the_rule_is_armed(
    schedule: PlateauSchedule, scale: float, steps: int
) -> None:
    # While the loss rises, for a fifth of the run and no more, neither counts a flat step.
    curve = training_curve(steps, scale, noise=0.02, rise=0.19)
    bound = schedule.bind(steps)
    rising = list(states(curve.losses[: int(0.19 * steps)], bound))
    assert not any(s.armed or s.plateau_steps for s in rising)
    assert {s.scale for s in rising} == {1.0}


@pytest.mark.parametrize("steps", [1560, 20_000])
def test_a_loss_that_never_falls_counts_from_a_fifth_of_the_run(steps: int) -> None:
    # Armed after 0.2 T in any case; then comes the patience of 0.05 T.
    for schedule in (FastFace(), MHLR()):
        assert first_decay(schedule, [5.0] * steps) == int(0.2 * steps) + int(0.05 * steps)
