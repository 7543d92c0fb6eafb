"""A figure of what a schedule would have done: its rates, beside those of the log."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pytest

from fastface_lightning import MHLR, FastFace, replay
from fastface_lightning.report.figures import replay_figure
from fastface_lightning.schedule import Schedule

LOSSES = [5 - min(step, 400) / 100 for step in range(1000)]


@pytest.mark.parametrize("schedule", [FastFace(), MHLR(haar_window=40)], ids=repr)
def test_a_replay_is_drawn_as_it_goes(schedule: Schedule) -> None:
    changes = replay(LOSSES, schedule, 1000, lr=0.2)
    loss, response, rate = replay_figure(LOSSES, schedule, lr=0.2, logged_lr=[0.3] * 1000).axes
    assert loss.lines[0].get_ydata().tolist() == LOSSES
    assert {line.get_label() for line in response.lines} >= {"response", "threshold"}
    logged, replayed = (line.get_ydata() for line in rate.lines[:2])
    assert set(logged) == {0.3}
    expected = np.full(1000, 0.2)
    for change in changes:
        expected[change.step + 1 :] = change.lr
    assert changes and replayed.tolist() == expected.tolist()


def test_the_run_may_be_longer_than_its_losses() -> None:
    # In a run of 100,000 steps these are too few to be flat for long enough.
    assert len(set(replay_figure(LOSSES, FastFace(), 100_000).axes[-1].lines[0].get_ydata())) == 1


class Seen(NamedTuple):
    step: int = 0
    scale: float = 1.0


@dataclass(frozen=True)
class HalveOnce(Schedule):
    def bind(self, total_steps: int) -> "HalveOnce":
        return self

    def init(self) -> Seen:
        return Seen()

    def update(self, state: Seen, loss: float) -> Seen:
        return Seen(state.step + 1, 0.5 if state.step >= 500 else 1.0)


def test_a_schedule_without_a_response_has_two_panels() -> None:
    loss, rate = replay_figure(LOSSES, HalveOnce()).axes
    assert loss.get_ylabel() == "loss" and set(rate.lines[0].get_ydata()) == {1.0, 0.5}
