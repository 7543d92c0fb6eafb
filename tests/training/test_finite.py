"""Losses and weights that are no numbers end a run, on any device after the same losses."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from fastface_lightning.training.finite import EndOnNonFinite, is_finite


def ended_at(losses: list[float], most: float, device: str) -> int | None:
    """Steps done when the run is ended; None if it is not."""
    guard = EndOnNonFinite(most)
    strategy = SimpleNamespace(reduce_boolean_decision=bool)
    trainer: Any = SimpleNamespace(world_size=1, callbacks=[], strategy=strategy)
    module: Any = SimpleNamespace(device=torch.device(device))
    guard.on_train_start(trainer, module)
    for step, loss in enumerate(losses, 1):
        trainer.global_step = step
        try:
            guard.on_train_batch_end(trainer, module, {"loss": torch.tensor(loss)}, None, 0)
        except ValueError:
            return step
    return None


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_row_of_losses_ends_the_run_wherever_its_block_does(device: str) -> None:
    losses = [1.0] * 4 + [math.nan] * 25 + [1.0] * 40
    assert ended_at(losses, 2, device) == (7 if device == "cpu" else 32)
    assert ended_at(losses, 24, device) == (29 if device == "cpu" else 32)
    assert ended_at(losses, 25, device) is ended_at(losses, math.inf, device) is None


def test_weights_that_are_no_numbers_end_a_run_whose_losses_were() -> None:
    guard, module = EndOnNonFinite(), nn.Linear(2, 2)
    strategy = SimpleNamespace(reduce_boolean_decision=bool)
    trainer: Any = SimpleNamespace(world_size=1, callbacks=[], strategy=strategy)
    guard.on_train_end(trainer, module)  # type: ignore[arg-type]
    with torch.no_grad():
        module.weight[0, 1] = math.inf
    with pytest.raises(ValueError, match=r"must end with finite weights.*; no checkpoint"):
        guard.on_train_end(trainer, module)  # type: ignore[arg-type]


def test_what_is_finite() -> None:
    good = [torch.ones(3), torch.zeros(0), torch.tensor(7), "text", torch.full((2,), 6e4).half()]
    assert is_finite(good, [torch.ones(1)]) and is_finite()
    for bad in (torch.tensor([1.0, math.nan]), torch.tensor(math.inf).half()):
        assert not is_finite(good, [bad])
