"""FastFaceLR is a torch scheduler like any other, stepped with the loss."""

import io
import math
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from curves import training_curve
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from fastface_lightning import MHLR, FastFace, FastFaceLR
from fastface_lightning.schedule import PlateauSchedule, states

FLAT = MHLR(variant="paper", haar_window=2, patience=2)  # on a flat loss: halves at step 6, 9, 12


@pytest.fixture(autouse=True)
def no_warnings() -> Iterator[None]:
    """Right use warns of nothing, `lr_scheduler.step()` before `optimizer.step()` included."""
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)  # torch's own warnings otherwise come once a process
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield
    torch.set_warn_always(before)


def sgd(*lrs: float) -> SGD:
    return SGD([{"params": [nn.Parameter(torch.ones(1))], "lr": lr} for lr in lrs], lr=1.0)


def rates(optimizer: Optimizer) -> list[float]:
    return [float(group["lr"]) for group in optimizer.param_groups]


def drive(optimizer: Optimizer, scheduler: FastFaceLR, losses: list[Any]) -> list[list[float]]:
    """The learning rates after each step."""
    trace = []
    for loss in losses:
        optimizer.step()
        scheduler.step(loss)
        trace.append(rates(optimizer))
    return trace


# torch's idioms ----------------------------------------------------------------------------------


def test_every_group_is_its_base_rate_times_the_scale() -> None:
    optimizer = sgd(0.1, 0.01)
    scheduler = FastFaceLR(optimizer, 100, FLAT)
    assert rates(optimizer) == scheduler.base_lrs == scheduler.get_last_lr() == [0.1, 0.01]
    losses = [3.0] * 14
    trace = drive(optimizer, scheduler, losses)
    scales = [state.scale for state in states(losses, FLAT.bind(100))]
    assert scales[-1] == 0.125
    assert trace == [[0.1 * scale, 0.01 * scale] for scale in scales]
    assert scheduler.get_last_lr() == trace[-1]
    assert scheduler.last_epoch == 14


def test_warmup_holds_from_the_first_step() -> None:
    optimizer = sgd(0.4)
    scheduler = FastFaceLR(optimizer, 100, FastFace(warmup_steps=4))
    assert rates(optimizer) == [0.1]
    assert drive(optimizer, scheduler, [3.0] * 4) == [[0.2], [pytest.approx(0.3)], [0.4], [0.4]]


def test_tensor_learning_rates_are_set_in_place() -> None:
    # capturable and compiled optimizers hold on to the tensor itself.
    rate = torch.tensor(0.5)
    optimizer = SGD([nn.Parameter(torch.ones(1))], lr=rate)
    scheduler = FastFaceLR(optimizer, 100, FLAT)
    held = optimizer.param_groups[0]["lr"]
    drive(optimizer, scheduler, [3.0] * 7)
    assert optimizer.param_groups[0]["lr"] is held
    assert held.item() == 0.25
    assert scheduler.base_lrs[0] == 0.5


@pytest.mark.parametrize("shape", [(), (1,)])
def test_losses_may_be_tensors_in_a_graph(shape: tuple[int, ...]) -> None:
    losses = training_curve(60).losses
    plain, tensors = sgd(0.1), sgd(0.1)
    by_float = FastFaceLR(plain, 60)
    by_tensor = FastFaceLR(tensors, 60)
    drive(plain, by_float, [float(torch.tensor(loss)) for loss in losses])
    drive(tensors, by_tensor, [torch.full(shape, x, requires_grad=True) for x in losses])
    assert by_tensor.state == by_float.state
    assert all(not isinstance(value, torch.Tensor) for value in by_tensor.state)


def test_step_without_a_loss_is_refused() -> None:
    scheduler = FastFaceLR(sgd(0.1), 100)
    with pytest.raises(ValueError, match=r"step\(loss\)"):
        scheduler.step()
    assert scheduler.state.step == 0 and scheduler.last_epoch == 0


def test_nan_warns_once_and_names_the_step() -> None:
    optimizer = sgd(0.1)
    scheduler = FastFaceLR(optimizer, 100, FLAT)
    drive(optimizer, scheduler, [3.0, 3.0])
    with pytest.warns(UserWarning, match="step 2: the loss is nan"):
        drive(optimizer, scheduler, [math.nan])
    drive(optimizer, scheduler, [3.0, math.inf, 3.0])
    assert (scheduler.state.step, scheduler.state.nonfinite) == (4, 2)
    assert scheduler.last_epoch == 6


# Checkpoints -------------------------------------------------------------------------------------


def through_a_file(saved: Any) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_state_dict_is_a_snapshot() -> None:
    optimizer = sgd(0.1)
    scheduler = FastFaceLR(optimizer, 100, FLAT)
    saved = scheduler.state_dict()
    before = repr(saved)
    drive(optimizer, scheduler, [3.0] * 20)
    assert repr(saved) == before


def test_checkpoint_of_another_schedule_is_refused() -> None:
    saved = FastFaceLR(sgd(0.1), 100, MHLR(haar_window=2)).state_dict()
    other = FastFaceLR(sgd(0.1), 100, MHLR(haar_window=4))
    before = repr(other.state_dict())
    with pytest.raises(ValueError, match=r"haar_window=2.*weights alone"):
        other.load_state_dict(saved)
    assert repr(other.state_dict()) == before


@given(
    schedule=st.sampled_from([FastFace(variant="released"), FLAT, MHLR(warmup_steps=0.1)]),
    cuts=st.lists(st.integers(0, 150), max_size=3, unique=True).map(sorted),
    seed=st.integers(0, 1000),
)
@settings(max_examples=10, deadline=None)
def test_a_resumed_run_equals_an_uninterrupted_one(
    schedule: PlateauSchedule, cuts: list[int], seed: int
) -> None:
    losses = training_curve(150, seed=seed, speed=80).losses

    def fresh() -> tuple[AdamW, FastFaceLR]:
        groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": lr} for lr in (0.3, 0.07)]
        optimizer = AdamW(groups)
        return optimizer, FastFaceLR(optimizer, 150, schedule)

    optimizer, scheduler = fresh()
    whole = drive(optimizer, scheduler, losses)
    parts: list[list[float]] = []
    optimizer, scheduler = fresh()
    for start, stop in zip([0, *cuts], [*cuts, 150], strict=True):
        saved = through_a_file([optimizer.state_dict(), scheduler.state_dict()])
        optimizer, scheduler = fresh()
        optimizer.load_state_dict(saved[0])
        scheduler.load_state_dict(saved[1])
        parts += drive(optimizer, scheduler, losses[start:stop])
    assert parts == whole


def test_last_epoch_resumes_from_the_groups_initial_rates() -> None:
    # torch's other way to go on: groups that carry initial_lr, last_epoch given.
    optimizer = sgd(0.1)
    scheduler = FastFaceLR(optimizer, 100, FLAT)
    drive(optimizer, scheduler, [3.0] * 10)
    again = sgd(0.7)
    again.load_state_dict(optimizer.state_dict())
    resumed = FastFaceLR(again, 100, FLAT, last_epoch=9)
    resumed.load_state_dict(scheduler.state_dict())
    assert resumed.base_lrs == [0.1] and resumed.last_epoch == 10
    assert drive(again, resumed, [3.0] * 5) == drive(optimizer, scheduler, [3.0] * 5)
