"""MHLR's O(1) response against the O(m) definition, and its rule against a plain twin."""

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from curves import training_curve
from hypothesis import given, settings
from hypothesis import strategies as st

from fastface_lightning import MHLR, FastFace
from fastface_lightning.schedule import PlateauSchedule, PlateauState, states
from fastface_lightning.schedule.base import Progress

LOSSES = st.lists(st.floats(-60, 60), max_size=80)


def responses(losses: Sequence[float], m: int) -> list[float]:
    schedule = MHLR(variant="paper", haar_window=m).bind(max(len(losses), 1))
    return [state.response for state in states(losses, schedule)]


# The response ------------------------------------------------------------------------------------


def response_by_definition(losses: list[float], m: int, i: int) -> float:
    """H_i, from the m averages of steps i - m ... i - 1, each the mean of its last m losses.

    (The sum of the first m // 2 of them - the sum of the rest) / m; NaN before step 2 m.
    """
    if i < 2 * m:
        return math.nan
    averages = [math.fsum(losses[j - m + 1 : j + 1]) / m for j in range(i - m, i)]
    return (math.fsum(averages[: m // 2]) - math.fsum(averages[m // 2 :])) / m


@given(LOSSES, st.integers(2, 12))
@settings(deadline=None)
def test_response_equals_the_definition(losses: list[float], m: int) -> None:
    # Even and odd windows, m = 2 and 3 among them.
    twin = [response_by_definition(losses, m, i) for i in range(len(losses))]
    np.testing.assert_allclose(responses(losses, m), twin, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("m", [4000, 1501])
def test_response_stays_exact_over_a_long_run(m: int) -> None:
    losses = training_curve(500_000, scale=50.0, noise=0.1, seed=m).losses
    ours, array = responses(losses, m), np.array(losses)
    for i in (2 * m, 250_000, 499_999):
        windows = np.lib.stride_tricks.sliding_window_view(array[i - 2 * m + 1 : i], m)
        averages = windows.mean(axis=1)
        haar = (averages[: m // 2].sum() - averages[m // 2 :].sum()) / m
        assert ours[i] == pytest.approx(haar, rel=0, abs=1e-9)


def test_level_is_the_mean_of_the_last_m_losses() -> None:
    losses = np.random.default_rng(0).uniform(0, 50, 30).tolist()
    bound = MHLR(variant="paper", haar_window=7).bind(30)
    levels = [state.level for state in states(losses, bound)]
    means = [math.fsum(losses[max(0, i - 6) : i + 1]) / min(i + 1, 7) for i in range(30)]
    np.testing.assert_allclose(levels, means, rtol=0, atol=1e-13)


@pytest.mark.parametrize("size", [1e280, 1e-300, -1.0])
def test_extreme_losses(size: float) -> None:
    # Exact to 1e-12 of the loss, and never worse than the 2**-50 that losses are counted in.
    losses = [size * (2 - step / 20) for step in range(30)]
    twin = [response_by_definition(losses, 5, i) for i in range(30)]
    np.testing.assert_allclose(responses(losses, 5), twin, rtol=0, atol=1e-12 * max(1, abs(size)))


def test_an_extreme_loss_leaves_no_trace_once_out_of_the_window() -> None:
    # Float sums would have lost every digit of the losses after it.
    after = training_curve(60).losses
    assert responses([1e280, -1e290, *after], 5)[-40:] == responses([0.0, 0.0, *after], 5)[-40:]


# The rule ----------------------------------------------------------------------------------------


def scales_by_the_rule(losses: list[float], m: int) -> list[float]:
    """If H < 0.06 count one more; beyond 2 m, a plateau: halve, or x 4 at the fourth in a row."""
    count = plateaus = 0
    scale, scales = 1.0, []
    for i in range(len(losses)):
        haar = response_by_definition(losses, m, i)
        if haar < 0.06:
            count += 1
            if count > 2 * m:
                count = 0
                plateaus += 1
                if plateaus == 4:
                    plateaus = 0
                    scale *= 4
                else:
                    scale /= 2
        elif haar >= 0.06:
            count = plateaus = 0
        scales.append(scale)
    return scales


@given(st.integers(2, 9), st.floats(0, 0.3), st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_decays_and_restarts_by_the_rule(m: int, noise: float, seed: int) -> None:
    losses = training_curve(500, scale=20.0, noise=noise, seed=seed, speed=60).losses
    bound = MHLR(variant="paper", haar_window=m).bind(500)
    assert [state.scale for state in states(losses, bound)] == scales_by_the_rule(losses, m)


def test_restarts_at_the_fourth_plateau_in_a_row() -> None:
    # m = 5: the first response at step 10, a plateau at its eleventh flat step and every 11 steps.
    bound = MHLR(variant="paper", haar_window=5).bind(100)
    ours = [state.scale for state in states([3.0] * 100, bound)]
    assert ours == scales_by_the_rule([3.0] * 100, 5)
    assert ours[20::11] == [0.5, 0.25, 0.125, 0.5, 0.25, 0.125, 0.0625, 0.25]


# Purity ------------------------------------------------------------------------------------------


def follow(schedule: PlateauSchedule, state: PlateauState, losses: list[float]) -> PlateauState:
    for loss in losses:
        state = schedule.update(state, loss)
    return state


def visible(state: PlateauState) -> str:
    """All of a state but how a detector lays out its memory; repr, because NaN equals nothing."""
    return repr(state._replace(memory=()))


@given(st.data())
@settings(max_examples=40, deadline=None)
def test_an_old_state_can_be_continued_in_several_ways(data: st.DataObject) -> None:
    # update(state, loss) leaves the state as it was: branches of a run never see one another.
    bound = MHLR(
        variant="paper", haar_window=data.draw(st.integers(2, 5)), arm_after=0, patience=1
    ).bind(100)
    runs: list[tuple[list[float], PlateauState]] = [([], bound.init())]
    for _ in range(data.draw(st.integers(1, 12))):
        seen, state = runs[data.draw(st.integers(0, len(runs) - 1))]
        more = data.draw(st.lists(st.sampled_from([0.0, 1.0, 5.0]), min_size=1, max_size=15))
        runs.append((seen + more, follow(bound, state, more)))
    for seen, state in runs:
        assert visible(state) == visible(follow(bound, bound.init(), seen))
        assert visible(bound.update(state, 2.0)) == visible(
            follow(bound, bound.init(), [*seen, 2.0])
        )


@pytest.mark.parametrize("m", [2, 3, 50])
def test_memory_stays_within_four_windows(m: int) -> None:
    bound = MHLR(variant="paper", haar_window=m).bind(1000)
    lengths = [len(state.memory[1]) for state in states([1.0] * 1000, bound)]
    assert max(lengths) <= 4 * m + 6
    assert len(bound.dump(follow(bound, bound.init(), [1.0] * 999))["memory"][1]) <= 2 * m + 2


# Checkpoints -------------------------------------------------------------------------------------


def through_a_file(saved: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@given(
    schedule=st.sampled_from(
        [
            FastFace(),
            FastFace(variant="paper", ema_window=9, haar_window=5),
            FastFace(variant="released", warmup_steps=4, ema_window=9),
            MHLR(variant="paper", haar_window=2, arm_after=0, patience=1),
            MHLR(variant="paper", haar_window=5, warmup_steps=3),
        ]
    ),
    losses=st.lists(st.floats(-1e280, 1e280) | st.floats(0, 50) | st.just(math.nan), max_size=60),
    cuts=st.sets(st.integers(0, 60), max_size=4),
)
@settings(max_examples=50, deadline=None)
def test_a_run_goes_on_bit_for_bit_after_a_checkpoint(
    schedule: PlateauSchedule, losses: list[float], cuts: set[int]
) -> None:
    whole = resumed = Progress.start(schedule, 80)
    for step, loss in enumerate(losses):
        if step in cuts:
            resumed, changed = Progress.load(through_a_file(resumed.dump()), schedule)
            assert changed == []
        whole, resumed = whole.update(loss), resumed.update(loss)
        assert visible(resumed.state) == visible(whole.state)
