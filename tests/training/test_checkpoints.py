"""What a run leaves, held on a toy module: the checkpoints that it can be resumed from."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from torch.utils.data import DataLoader
from watching import Killed, RaiseAt

from fastface_lightning.training.checkpoints import LARGE, LastAndBest, StreamedCheckpoints


class Batches(Callback):
    """Remembers (step, epoch, batch) of each batch."""

    def __init__(self) -> None:
        self.done: list[tuple[int, int, int]] = []

    def on_train_batch_start(self, trainer: Trainer, module: object, batch: object, i: int) -> None:
        epoch = trainer.fit_loop.epoch_progress.current.processed
        assert epoch == trainer.current_epoch
        self.done.append((trainer.global_step, epoch, i))


def trainer_of(*callbacks: Callback, **settings: Any) -> Trainer:
    """Of three epochs, unless told otherwise."""
    return Trainer(
        **{"max_epochs": 3, **settings},
        accelerator="cpu",
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def fit(
    folder: Path,
    kill_at: int | None,
    every: int | None,
    accumulate: int = 1,
    batches: Batches | None = None,
    **length: int,
) -> Trainer:
    """Three epochs of ten steps, from the last checkpoint where there is one."""
    last = folder / "last.ckpt"
    trainer = trainer_of(
        *(LastAndBest(folder, every), RaiseAt(kill_at), batches or Batches()),
        **{"accumulate_grad_batches": accumulate, "limit_val_batches": 0, **length},
    )
    loader = DataLoader(torch.randn(10 * accumulate, 32), batch_size=1)
    trainer.fit(BoringModel(), loader, ckpt_path=last if last.exists() else None)
    return trainer


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("every", "accumulate"), [(None, 1), (1, 1), (3, 2), (5, 1), (5, 2)])
def test_a_run_killed_again_and_again_takes_every_step_once(
    tmp_path: Path, every: int | None, accumulate: int
) -> None:
    """Also when steps between two checkpoints divide the epoch."""
    for kill_at in (12, 13, 20, 27):
        with pytest.raises(Killed):
            fit(tmp_path, kill_at, every, accumulate)
        saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"]
        periods = [10] if every is None else [10, every]
        assert saved == max(kill_at - kill_at % period for period in periods)
    trainer = fit(tmp_path, None, every, accumulate)
    assert (trainer.global_step, trainer.current_epoch) == (30, 3)
    again = fit(tmp_path, None, every, accumulate)
    assert again.global_step == 30


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("every", [None, 5])
@pytest.mark.parametrize("length", [{"max_epochs": -1}, {"max_epochs": 9}])
def test_runs_that_end_by_steps_resume_at_their_batch(
    tmp_path: Path, every: int | None, length: dict[str, int]
) -> None:
    """Lightning 2.6 alone would take an eleventh batch of an epoch that has ended."""
    for kill_at in (10, 13, 20):
        with pytest.raises(Killed):
            fit(tmp_path, kill_at, every, max_steps=26, **length)
        batches = Batches()
        with pytest.raises(Killed):
            fit(tmp_path, kill_at + 4, every, batches=batches, max_steps=26, **length)
        assert batches.done == [(step, step // 10, step % 10) for step, _, _ in batches.done]
    assert fit(tmp_path, None, every, max_steps=26, **length).global_step == 26


class Scored(BoringModel):
    """Its verifications find the given accuracies, one after the other."""

    def __init__(self, accuracies: list[float]) -> None:
        super().__init__()
        self.accuracies, self.found = accuracies, list[int]()

    def on_validation_epoch_end(self) -> None:
        self.log("verify/accuracy", self.accuracies[len(self.found)])
        self.found.append(self.trainer.global_step)


def scored(folder: Path, accuracies: list[float], every: int, **settings: Any) -> Scored:
    """Three epochs of ten steps, verified every so many."""
    model = Scored(accuracies)
    last = folder / "last.ckpt"
    when: dict[str, Any] = {"check_val_every_n_epoch": None, "val_check_interval": every}
    trainer = trainer_of(LastAndBest(folder), num_sanity_val_steps=0, **when, **settings)
    loader = DataLoader(torch.randn(10, 32), batch_size=1)
    trainer.fit(model, loader, loader, ckpt_path=last if last.exists() else None)
    return model


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("accuracies", "every", "best"),
    [
        ([0.5, 0.8, 0.8], 10, 20),  # epochs' ends; the earliest of equals
        ([0.5, 0.6, 0.9, 0.7], 7, 21),  # within an epoch
        ([0.9, 0.6, 0.5, 0.7, 0.6, 0.9], 5, 5),
    ],
)
def test_the_best_checkpoint_is_of_the_highest_accuracy(
    tmp_path: Path, accuracies: list[float], every: int, best: int
) -> None:
    model = scored(tmp_path, accuracies, every)
    assert model.found == list(range(every, 31, every))
    saved = torch.load(tmp_path / "best.ckpt", weights_only=True)
    assert saved["global_step"] == best
    assert saved["callbacks"]["LastAndBest"]["best"] == {
        "step": best,
        "accuracy": pytest.approx(max(accuracies)),
    }
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 30
    assert {file.name for file in tmp_path.iterdir()} == {"best.ckpt", "last.ckpt"}


@pytest.mark.filterwarnings("ignore")
def test_the_best_is_remembered_over_a_resume(tmp_path: Path) -> None:
    scored(tmp_path, [0.5, 0.8], 10, max_epochs=2)
    scored(tmp_path, [0.7], 10)
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["global_step"] == 20
    scored(tmp_path, [0.9], 10, max_epochs=4)
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["global_step"] == 40


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("every", [5, 7, 10])
def test_a_run_goes_on_from_its_best_checkpoint(tmp_path: Path, every: int) -> None:
    """Every later step once, be the best one within an epoch or at its end."""
    scored(tmp_path, [0.5, 0.9, *[0.1] * 9], every)
    (tmp_path / "best.ckpt").rename(tmp_path / "last.ckpt")
    batches = Batches()
    trainer = fit(tmp_path, None, None, batches=batches)
    assert trainer.global_step == 30
    wanted = range(2 * every, 30)
    assert batches.done == [(step, step // 10, step % 10) for step in wanted]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_replaces_the_old_one_only_when_it_is_whole(
    ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And is read by several ranks without a copy of a large table, of which each wants a few
    rows."""
    monkeypatch.setattr(dist, "is_initialized", lambda: ranks > 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: ranks)
    files, file = StreamedCheckpoints(), tmp_path / "run" / "last.ckpt"
    small, large = torch.arange(3.0), torch.zeros(LARGE // 4)
    files.save_checkpoint({"step": 1, "small": small, "nested": [{"large": large}]}, file)
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        files.save_checkpoint({"small": small, "lost": lambda: None}, file)
    assert [path.name for path in file.parent.iterdir()] == ["last.ckpt"]
    saved = files.load_checkpoint(file, weights_only=True)
    assert saved["step"] == 1 and torch.equal(saved["small"], small)
    assert saved["nested"][0]["large"].shape == large.shape
    with file.open("r+b") as opened:  # the large one is still in the file, the small one is not
        content = opened.read()
        opened.seek(content.index(small.numpy().tobytes()))
        opened.write(b"\xff" * small.nbytes)
        opened.seek(len(content) // 2)
        opened.write(b"\xff" * 64)
    assert torch.equal(saved["small"], small)
    assert (saved["nested"][0]["large"].count_nonzero() > 0) == (ranks > 1)
