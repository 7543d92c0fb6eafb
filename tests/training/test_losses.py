"""Losses and weights that are no numbers end a run, on any device after the same losses."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastface_lightning.training.losses import StepLosses, is_finite


class Accelerator(str):
    """The processor, which says that it is a GPU."""

    type = "cuda"


def ended_at(folder: Path, losses: list[float], most: float, device: Any) -> int | None:
    """Steps done when the run is ended; None if it is not."""
    guard = StepLosses(folder, most)
    strategy = SimpleNamespace(reduce_boolean_decision=bool)
    trainer: Any = SimpleNamespace(
        world_size=1, callbacks=[], strategy=strategy, accumulate_grad_batches=1
    )
    trainer.is_global_zero, trainer.global_step = True, 0
    module: Any = SimpleNamespace(device=device, trainer=trainer)
    guard.on_train_start(trainer, module)
    for step, loss in enumerate(losses, 1):
        trainer.global_step = step
        try:
            guard.on_train_batch_end(trainer, module, {"loss": torch.tensor(loss)}, None, 0)
        except ValueError:
            return step
    guard.on_save_checkpoint(trainer)
    written = np.fromfile(folder / "losses.f32", "<f4")
    assert np.array_equal(written, losses, equal_nan=True)
    assert guard.recent_mean() == pytest.approx(np.mean(losses[-100:]), nan_ok=True)
    return None


@pytest.mark.parametrize("device", [torch.device("cpu"), Accelerator("cpu")], ids=["cpu", "cuda"])
def test_a_row_of_losses_ends_the_run_wherever_its_block_does(tmp_path: Path, device: Any) -> None:
    losses = [1.0] * 4 + [math.nan] * 25 + [1.0] * 40
    assert ended_at(tmp_path, losses, 2, device) == (7 if device.type == "cpu" else 32)
    assert ended_at(tmp_path, losses, 24, device) == (29 if device.type == "cpu" else 32)
    for most in (25, math.inf):
        assert ended_at(tmp_path, losses, most, device) is None


def test_weights_that_are_no_numbers_end_a_run_whose_losses_were(tmp_path: Path) -> None:
    guard, module = StepLosses(tmp_path), nn.Linear(2, 2)
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
