"""torch's schedulers bound to a run's length: shares of the run become steps, exactly."""

from typing import Any

import pytest
import torch
from torch.optim import Optimizer

from fastface_lightning.schedule.fixed import FixedSchedule

POLYNOMIAL = FixedSchedule("PolynomialLR", power=2.0, total_iters=1.0)


def optimizer_of(*rates: float) -> Optimizer:
    groups = [{"params": [torch.nn.Parameter(torch.ones(1))], "lr": lr} for lr in rates]
    return torch.optim.SGD(groups, lr=0.1)


def rates(schedule: FixedSchedule, steps: int, *base: float) -> list[list[float]]:
    """The learning rate of every group at every step of a run."""
    optimizer = optimizer_of(*base)
    scheduler, found = schedule(optimizer, steps), []
    for _ in range(steps):
        found.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return found


def test_the_whole_run_is_the_share_one() -> None:
    expected = [0.02 * (1 - t / 10) ** 2 for t in range(10)]
    assert [lr for (lr,) in rates(POLYNOMIAL, 10, 0.02)] == pytest.approx(expected)


@pytest.mark.parametrize("epoch", [1, 7, 11_372, 45_489, 133_528, 10_000_000])
def test_fractions_are_exact_to_the_step(epoch: int) -> None:
    schedule = FixedSchedule("MultiStepLR", milestones=["8/19", "14/19", "17/19"])
    scheduler: Any = schedule(optimizer_of(0.1), 19 * epoch)
    assert sorted(scheduler.milestones.elements()) == [8 * epoch, 14 * epoch, 17 * epoch]


def test_steps_shares_and_roundings() -> None:
    def bound(**settings: Any) -> Any:
        return FixedSchedule("ReduceLROnPlateau", **settings).bind(1999)

    assert bound(patience=0.05, cooldown=7, factor=0.5) == {
        "patience": 99,
        "cooldown": 7,
        "factor": 0.5,
    }
    assert FixedSchedule("MultiStepLR", milestones=[0.6, 3]).bind(20)["milestones"] == [12, 3]


def test_a_period_lasts_at_least_a_step() -> None:
    assert FixedSchedule("StepLR", step_size=0.001).bind(500) == {"step_size": 1}
    cyclic = FixedSchedule("CyclicLR", base_lr=0.01, max_lr=0.1, step_size_up=0.5)
    assert cyclic.bind(100)["step_size_up"] == 50


def test_one_cycle_goes_up_to_each_groups_own_rate() -> None:
    schedule = FixedSchedule("OneCycleLR", total_steps=1.0, cycle_momentum=False)
    both = rates(schedule, 30, 0.1, 0.5)
    assert max(both) == pytest.approx([0.1, 0.5])
    assert all(b == pytest.approx(5 * a) for a, b in both)


@pytest.mark.parametrize(
    ("scheduler", "settings", "value"),
    [
        ("CosineLR", {}, "CosineLR"),
        ("MultiStepLR", {"milestone": [0.5]}, "milestone"),
        ("MultiStepLR", {"milestones": [0.5, 1.5]}, "1.5"),
        ("MultiStepLR", {"milestones": ["1/0"]}, "1/0"),
        ("PolynomialLR", {"total_iters": -1}, "-1"),
        ("PolynomialLR", {"total_iters": True}, "True"),
        ("ReduceLROnPlateau", {"patience": "soon"}, "soon"),
        ("ReduceLROnPlateau", {"patience": float("nan")}, "nan"),
        ("SequentialLR", {}, "schedulers"),
    ],
)
def test_bad_settings(scheduler: str, settings: dict[str, Any], value: str) -> None:
    with pytest.raises(ValueError, match=f"got .*{value}"):
        FixedSchedule(scheduler, **settings)
