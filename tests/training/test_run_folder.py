"""Which checkpoint a run goes on from, and which it refuses."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import nn

from fastface_lightning.classifiers import FullClassifier
from fastface_lightning.data import People
from fastface_lightning.optim import SGD
from fastface_lightning.training.module import FaceModule
from fastface_lightning.training.resumed import optimizer_record
from fastface_lightning.training.run_folder import (
    check_checkpoint,
    checkpoint_to_resume,
    in_use,
    read_checkpoint,
)

PEOPLE = People(["ann", "bob", "cem", "dan"])


def chosen(folder: Path, resume: Any = None, weights: Any = None, reinit: bool = False) -> Any:
    config = {"resume": resume, "weights": weights, "classifier": {"reinit": reinit}}
    return checkpoint_to_resume(OmegaConf.create(config), folder)


def faces(size: int = 5) -> FaceModule:
    return FaceModule(nn.Linear(3, size), FullClassifier(4, size), partial(SGD, lr=0.1))


def save(module: FaceModule, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    saved = {
        "global_step": 7,
        "state_dict": module.state_dict(),
        "optimizer": optimizer_record(module.build_optimizer(), module),
        "FaceData": PEOPLE.state_dict(),
    }
    torch.save(saved, file)
    return file


def test_a_run_goes_on_from_its_last_checkpoint_or_from_a_file(tmp_path: Path) -> None:
    last = save(faces(), tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert chosen(tmp_path) is chosen(tmp_path, resume="auto") is None
    assert chosen(tmp_path / "run", resume="auto") == last
    assert chosen(tmp_path / "run", resume="auto", weights="backbone.pth") == last
    assert chosen(tmp_path / "run", resume=str(last)) == last
    assert chosen(tmp_path / "other", resume=str(last)) == last
    saved = read_checkpoint(last)
    check_checkpoint(saved, faces(), PEOPLE)
    assert saved.step == 7


@pytest.mark.parametrize("name", ["checkpoints/last.ckpt", "metrics.csv", "results.json"])
def test_another_run_is_never_overwritten(tmp_path: Path, name: str) -> None:
    save(faces(), tmp_path / "run" / name)
    other = save(faces(), tmp_path / "best.ckpt")
    for resume in (None, str(other)):
        with pytest.raises(ValueError, match=f"must be new, .* with {Path(name).name}"):
            chosen(tmp_path / "run", resume)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"resume": "nowhere.ckpt"}, "nowhere.ckpt"),
        ({"reinit": True}, "reinit"),
    ],
)
def test_settings_that_contradict(tmp_path: Path, settings: dict[str, Any], key: str) -> None:
    with pytest.raises(ValueError, match=key):
        chosen(tmp_path, **settings)


def test_a_checkpoint_of_another_network_or_of_none(tmp_path: Path) -> None:
    last = save(faces(), tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"of the same network .* \(6, 3\), got \(5, 3\)"):
        check_checkpoint(read_checkpoint(last), faces(6), PEOPLE)
    with pytest.raises(ValueError, match="got 'eva' for 'dan'"):
        check_checkpoint(read_checkpoint(last), faces(), People(["ann", "bob", "cem", "eva"]))
    for content in ("text", {"global_step": 1, "state_dict": {}}):
        torch.save(content, last)
        with pytest.raises(ValueError, match=r"a checkpoint of train\.py, got .*last\.ckpt"):
            read_checkpoint(last)
    last.write_bytes(b"no checkpoint")
    with pytest.raises(ValueError, match=r"a checkpoint of train\.py"):
        read_checkpoint(last)


def test_what_a_killed_run_was_writing_is_removed(tmp_path: Path) -> None:
    """Once the folder is this run's alone; a checkpoint stays."""
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    for name in ("last.ckpt", ".last.0123abcd.part.ckpt"):
        (folder / name).touch()
    with in_use(tmp_path):
        assert [file.name for file in folder.iterdir()] == ["last.ckpt"]
