"""The recipes of papers say what the papers say, and train."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from models import noise
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from programs import ROOT, Run, load
from test_conf import composed
from test_readme import small

PAPERS = sorted(file.stem for file in (ROOT / "recipes" / "paper").rglob("*.yaml"))
F2C = [paper for paper in PAPERS if paper.startswith("f2c_")]
MS1MV2, MS1MV3, GLINT360K = (85_742, 5_822_653), (93_431, 5_179_510), (360_232, 17_091_657)


def test_the_recipes_are_those_promised() -> None:
    assert len(PAPERS) == 5 and len(F2C) == 4


def head_of(paper: str) -> list[str]:
    """The comments that a recipe opens with, from its second line on."""
    first, *lines = (ROOT / "recipes" / "paper" / f"{paper}.yaml").read_text().splitlines()
    assert first == "# @package _global_"
    return lines[: lines.index("defaults:")]


def command_of(paper: str) -> list[str]:
    (command,) = (line for line in head_of(paper) if line.startswith("#   python "))
    return shlex.split(command[1:])


@pytest.mark.parametrize("paper", PAPERS)
def test_a_recipe_opens_with_what_one_needs_to_know(paper: str) -> None:
    head = head_of(paper)
    assert re.findall(r"^# (Data|Batch|Paper): ", "\n".join(head), re.MULTILINE) == [
        *("Data", "Batch", "Paper"),
    ]
    assert head[-1] == "# No accuracy is promised: none was measured here."
    assert command_of(paper) == ["python", "train.py", f"+paper={paper}", "data.root=DIR"]
    cfg = composed(*command_of(paper)[2:])
    assert cfg.data.root == "DIR" and cfg.model.name == "iresnet50"


@pytest.mark.parametrize("paper", F2C)
def test_f2c(paper: str) -> None:
    """The numbers of arXiv 2105.10375's release; FastFace takes a quarter of the epochs."""
    cfg = composed(f"+paper={paper}")
    glint = paper.endswith("glint360k")
    assert (cfg.data.num_identities, cfg.data.num_images) == (GLINT360K if glint else MS1MV2)
    assert cfg.classifier._target_.endswith(".DynamicClassPool")
    assert (cfg.classifier.momentum, cfg.classifier.scale) == (0.99, 32)
    assert cfg.classifier.pool_size == (0.01 if glint else 0.1)
    assert (cfg.margin._target_.rpartition(".")[2], cfg.margin.m) == ("CosFace", 0.5)
    assert cfg.optimizer == {
        "_target_": "fastface_lightning.sgd.SGD",
        "_partial_": True,
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "nesterov": True,
    }
    assert cfg.trainer.gradient_clip_val == 0
    assert cfg.trainer.accumulate_grad_batches * cfg.data.batch_size == 512
    if "fastface" in paper:
        assert cfg.trainer.max_epochs == 5
        assert cfg.schedule == composed("schedule=fastface").schedule
    else:
        assert cfg.trainer.max_epochs == 19
        assert_drops_after_epochs_8_14_17(cfg)


def assert_drops_after_epochs_8_14_17(cfg: DictConfig) -> None:
    """To the step, however many steps an epoch has."""
    train = load(ROOT / "train.py")
    for epoch in (1, 7, 11_372, 45_489, 133_528, 10_000_000):
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=cfg.optimizer.lr)
        scheduler = train.torch_schedule(cfg, optimizer, 19 * epoch)
        assert sorted(scheduler.milestones.elements()) == [8 * epoch, 14 * epoch, 17 * epoch]
        assert scheduler.gamma == 0.1


def test_attfc() -> None:
    """The numbers of arXiv 2503.06839's release."""
    cfg = composed("+paper=attfc_ms1mv3")
    assert (cfg.data.num_identities, cfg.data.num_images) == MS1MV3
    assert cfg.classifier._target_.endswith(".AttentionClassifier")
    assert (cfg.classifier["keys"], cfg.classifier.queue_size) == (2, 0.3)
    assert (cfg.classifier.momentum, cfg.classifier.scale) == (0.999, 64)
    assert (cfg.margin._target_.rpartition(".")[2], cfg.margin.m) == ("ArcFace", 0.5)
    assert (cfg.optimizer.lr, cfg.optimizer.momentum) == (0.1, 0.9)
    assert (cfg.optimizer.weight_decay, cfg.optimizer.nesterov) == (5e-4, False)
    assert (cfg.data.batch_size, cfg.trainer.max_epochs) == (384, 5)
    assert cfg.schedule._target_.endswith("CosineAnnealingLR")
    assert cfg.trainer.gradient_clip_val == 5


def test_what_a_command_says_outdoes_a_recipe() -> None:
    cfg = composed("+paper=f2c_ms1m", "margin=arcface", "model=r100", "trainer.max_epochs=2")
    assert cfg.margin == composed("margin=arcface").margin
    assert (cfg.model.name, cfg.trainer.max_epochs) == ("iresnet100", 2)


@pytest.fixture
def faces(tmp_path: Path) -> None:
    """DIR in the working directory: 24 people, two noisy images each."""
    for number, image in enumerate(noise(48)):
        folder = tmp_path / "DIR" / f"person_{number // 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number % 2}.jpg")


@pytest.mark.slow
@pytest.mark.usefixtures("faces")
@pytest.mark.parametrize("paper", PAPERS)
def test_a_recipe_trains(paper: str, run: Run) -> None:
    """Two steps, of a small network, from another folder than the program's."""
    ended = run(*small(command_of(paper)[1:])[1:])
    assert ended.code == 0, ended.err
    config = OmegaConf.load(ended.folder / "config.yaml")
    assert config.classifier._target_ == composed(f"+paper={paper}").classifier._target_
    assert steps_done(ended.folder) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("faces")
def test_a_recipe_resumes(run: Run) -> None:
    """With resume=auto alone: the recipe is found again."""
    run(*small(command_of("f2c_ms1m")[1:])[1:])
    ended = run("resume=auto", "trainer.max_steps=3")
    assert ended.code == 0, ended.err
    assert steps_done(ended.folder) == 3
    assert "+paper=f2c_ms1m" in OmegaConf.load(ended.folder / "overrides.yaml")


def steps_done(folder: Path) -> int:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
