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


class Run:
    """What a callback sees of a run that saves every so many steps, as Lightning does."""

    def __init__(self, folder: Path, most: float, device: Any, step: int = 0) -> None:
        self.losses = StepLosses(folder, most)
        self.trainer: Any = SimpleNamespace(
            world_size=1, callbacks=[], accumulate_grad_batches=1, is_global_zero=True
        )
        self.trainer.strategy = SimpleNamespace(reduce_boolean_decision=bool)
        self.trainer.global_step, self.trainer.ckpt_path = step, None
        self.module: Any = SimpleNamespace(device=device, trainer=self.trainer)

    def train(self, losses: list[float], save_every: int = 1000) -> int | None:
        """Steps done when the run is ended; None if it is not."""
        for loss in losses:
            self.trainer.global_step += 1
            outputs = {"loss": torch.tensor(loss)}
            try:
                self.losses.on_train_batch_end(self.trainer, self.module, outputs, None, 0)
            except ValueError:
                return int(self.trainer.global_step)
            if self.trainer.global_step % save_every == 0:
                self.save()
        return None

    def save(self) -> dict[str, Any]:
        """A checkpoint; states are taken before callbacks are asked to complete it."""
        checkpoint = {"callbacks": {self.losses.state_key: self.losses.state_dict()}}
        self.losses.on_save_checkpoint(self.trainer, self.module, checkpoint)
        return checkpoint["callbacks"][self.losses.state_key]


DEVICES = pytest.mark.parametrize(
    "device", [torch.device("cpu"), Accelerator("cpu")], ids=["cpu", "cuda"]
)


@DEVICES
def test_a_row_of_losses_ends_the_run_wherever_its_block_does(tmp_path: Path, device: Any) -> None:
    losses = [1.0] * 4 + [math.nan] * 25 + [1.0] * 40
    for most, cpu, cuda in ((2, 7, 32), (24, 29, 32), (25, None, None), (math.inf, None, None)):
        run = Run(tmp_path, most, device)
        run.losses.on_train_start(run.trainer, run.module)
        assert run.train(losses) == (cpu if device.type == "cpu" else cuda)
    run = Run(tmp_path, 5, device)
    run.losses.on_train_start(run.trainer, run.module)
    ended = run.train([math.nan] * 399, save_every=20)  # whoever reads them
    assert ended == 6 if device.type == "cpu" else ended == 21


@DEVICES
def test_losses_of_every_step_are_kept_and_go_on(tmp_path: Path, device: Any) -> None:
    losses = [float(k) for k in range(150)]
    whole, folder = Run(tmp_path / "run", 9, device), tmp_path / "run"
    folder.mkdir()
    (folder / "losses.f32").write_bytes(b"of a run before")
    whole.losses.on_train_start(whole.trainer, whole.module)
    whole.train(losses[:130], save_every=20)
    saved = whole.save()
    assert whole.losses.recent_mean() == np.mean(losses[30:130])
    whole.train(losses[:15])  # lost with a kill

    def resumed(place: Path, checkpoint: Path) -> Run:
        run = Run(place, 9, device, step=130)
        run.losses.load_state_dict(saved)
        run.trainer.ckpt_path = str(checkpoint)
        run.losses.on_train_start(run.trainer, run.module)
        return run

    before = (folder / "losses.f32").read_bytes()
    resumed(folder, folder / "checkpoints" / "last.ckpt")  # refused by another callback
    assert (folder / "losses.f32").read_bytes() == before
    for place in (folder, tmp_path / "other"):
        run = resumed(place, folder / "checkpoints" / "last.ckpt")
        run.train(losses[130:])
        run.save()
        assert np.fromfile(place / "losses.f32", "<f4").tolist() == losses
        assert run.losses.recent_mean() == np.mean(losses[50:])
    run = resumed(tmp_path / "third", tmp_path / "gone" / "checkpoints" / "last.ckpt")
    run.train(losses[130:])
    run.save()
    assert not (tmp_path / "third").exists()  # no file without the losses of earlier steps


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
