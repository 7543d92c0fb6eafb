"""The recipes of papers say what the papers say, cost what their heads say, and train."""

import math
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from models import noise
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from programs import ROOT, Run
from test_conf import composed

RECIPES = ROOT / "recipes"
PAPERS = sorted(file.stem for file in (RECIPES / "paper").rglob("*.yaml"))
F2C = [paper for paper in PAPERS if paper.startswith("f2c_")]
MHLR = [paper for paper in PAPERS if paper.endswith("_mhlr")]
BASELINES = [paper for paper in PAPERS if paper.endswith(("_polynomial", "_multistep"))]
MS1MV2, MS1MV3, GLINT360K = (85_742, 5_822_653), (93_431, 5_179_510), (360_232, 17_091_657)
WEBFACE12M, WEBFACE42M = (617_970, 12_720_066), (2_059_906, 42_474_557)
SIZES = {"ms1mv3": MS1MV3, "webface12m": WEBFACE12M}


ARCFACE, COSFACE = ("ArcFace", 0.5), ("CosFace", 0.4)
FASTFACE = {  # identities and images, margin: the rows of arXiv 2404.11118
    "ms1mv3_r100": (MS1MV3, ARCFACE),
    "ms1mv2_r100": (MS1MV2, ARCFACE),
    "webface4m_r100": ((205_990, 4_235_242), COSFACE),
    "webface8m_r100": ((411_980, 8_465_386), COSFACE),
    "webface12m_r50": (WEBFACE12M, COSFACE),
    "webface12m_r100": (WEBFACE12M, COSFACE),
    "webface42m_r100": (WEBFACE42M, COSFACE),
}


def test_every_recipe_opens_with_its_command() -> None:
    assert {*FASTFACE, *MHLR, *BASELINES, *F2C, "attfc_ms1mv3"} == set(PAPERS)
    for paper in PAPERS:
        assert composed(f"+paper={paper}").averaging == {}
        text = (RECIPES / "paper" / f"{paper}.yaml").read_text()
        assert f"\n#   python train.py +paper={paper} data.root=DIR\n" in text


# ------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize("paper", [*FASTFACE, *MHLR, *BASELINES])
def test_one_gpu_settings(paper: str) -> None:
    """The numbers of arXiv 2404.11118, which are arcface_torch's for one GPU."""
    cfg = composed(f"+paper={paper}")
    assert cfg.classifier._target_.endswith(".ChunkedClassifier")  # the full softmax, exact
    assert (cfg.classifier.scale, cfg.classifier.interclass_filter) == (64, None)
    assert cfg.data.batch_size == 128 and cfg.trainer.accumulate_grad_batches == 1
    assert (cfg.optimizer.lr, cfg.optimizer.momentum) == (0.02, 0.9)
    assert (cfg.optimizer.weight_decay, cfg.optimizer.nesterov) == (5e-4, False)
    assert cfg.trainer.gradient_clip_val == 5
    assert cfg.data.held_out == 0  # all people are trained on
    assert cfg.augment == {
        "_target_": "fastface_lightning.data.Augment",
        "flip": 0.5,
        "crop": 0.0,
        "low_resolution": 0.0,
        "photometric": 0.0,
    }
    assert cfg.trainer.max_epochs == (20 if paper in BASELINES else 5)
    if paper not in FASTFACE:
        data = paper.partition("_")[0]
        assert (cfg.data.num_identities, cfg.data.num_images) == SIZES[data]
        assert margin_of(cfg) == (ARCFACE if data == "ms1mv3" else COSFACE)


def margin_of(cfg: DictConfig) -> tuple[str, float]:
    return cfg.margin._target_.rpartition(".")[2], cfg.margin.m


def steps_of(cfg: DictConfig) -> int:
    """Optimizer steps; the last one of an epoch may hold fewer batches."""
    batches = cfg.data.num_images // cfg.data.batch_size
    return -(-batches // cfg.trainer.accumulate_grad_batches) * cfg.trainer.max_epochs


@pytest.mark.parametrize("paper", FASTFACE)
def test_fastface(paper: str) -> None:
    """The table of results and the rule's numbers, whatever the length of the run."""
    cfg = composed(f"+paper={paper}")
    assert ((cfg.data.num_identities, cfg.data.num_images), margin_of(cfg)) == FASTFACE[paper]
    total = steps_of(cfg)
    bound = instantiate(cfg.schedule).bind(total)
    assert bound.variant == "paper" and (bound.ema_window, bound.haar_window) == (1000, 1000)
    assert (bound.threshold, bound.threshold_mode) == (5e-5, "abs")
    assert bound.patience == int(0.05 * total) and bound.arm_after == 0
    assert (bound.factor, bound.max_decays, bound.restart_after) == (0.5, 8, math.inf)


def test_mhlr() -> None:
    """The authors' logged run has windows of 4000 steps, their others 1.5 % of the run."""
    log, other = (composed(f"+paper={data}_r100_mhlr") for data in ("ms1mv3", "webface12m"))
    assert steps_of(log) == 202_320 and steps_of(other) == 496_875
    for cfg, window in ((log, 4000), (other, 7453)):  # int(0.015 T)
        bound = instantiate(cfg.schedule).bind(steps_of(cfg))
        assert (bound.haar_window, bound.patience) == (window, 2 * window)
        assert (bound.threshold, bound.threshold_mode, bound.max_decays) == (0.06, "abs", math.inf)
        assert (bound.factor, bound.restart_after, bound.restart_factor) == (0.5, 4, 4.0)


@pytest.mark.parametrize("data", ["ms1mv3", "webface12m"])
def test_baselines(data: str) -> None:
    """arcface_torch's polynomial without warm-up, and InsightFace's drops of 20 epochs."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.02)
    cfg = composed(f"+paper={data}_r100_polynomial")
    polynomial = instantiate(cfg.schedule)(optimizer, 10)
    rates = []
    for _ in range(10):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        polynomial.step()
    assert rates == pytest.approx([0.02 * (1 - t / 10) ** 2 for t in range(10)])
    assert_drops(composed(f"+paper={data}_r100_multistep"), after=[8, 12, 15, 18])


def assert_drops(cfg: DictConfig, after: list[int]) -> None:
    """Tenfold ones after these epochs, to the step."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=cfg.optimizer.lr)
    scheduler = instantiate(cfg.schedule)(optimizer, cfg.trainer.max_epochs * 45_489)
    assert sorted(scheduler.milestones.elements()) == [count * 45_489 for count in after]
    assert scheduler.gamma == 0.1


@pytest.mark.parametrize("paper", F2C)
def test_f2c(paper: str) -> None:
    """The numbers of arXiv 2105.10375's release; FastFace takes a quarter of the epochs."""
    cfg = composed(f"+paper={paper}")
    glint = paper.endswith("glint360k")
    assert (cfg.data.num_identities, cfg.data.num_images) == (GLINT360K if glint else MS1MV2)
    assert cfg.classifier._target_.endswith(".DynamicClassPool")
    assert (cfg.classifier.momentum, cfg.classifier.scale) == (0.99, 32)
    assert cfg.classifier.pool_size == (0.01 if glint else 0.1)
    assert margin_of(cfg) == ("CosFace", 0.5)
    assert cfg.optimizer == {
        "_target_": "fastface_lightning.optim.SGD",
        "_partial_": True,
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 1e-4,
        "nesterov": True,
        "no_decay": False,
        "layer_decay": None,
    }
    assert cfg.trainer.gradient_clip_val == 0
    assert cfg.trainer.accumulate_grad_batches * cfg.data.batch_size == 512
    if "fastface" in paper:
        assert cfg.trainer.max_epochs == 5
        assert cfg.schedule == composed("schedule=fastface").schedule
    else:
        assert cfg.trainer.max_epochs == 19
        assert_drops(cfg, after=[8, 14, 17])


def test_attfc() -> None:
    """The numbers of arXiv 2503.06839's release."""
    cfg = composed("+paper=attfc_ms1mv3")
    assert (cfg.data.num_identities, cfg.data.num_images) == MS1MV3
    assert cfg.classifier._target_.endswith(".AttentionClassifier")
    assert (cfg.classifier["keys"], cfg.classifier.queue_size) == (2, 0.3)
    assert (cfg.classifier.momentum, cfg.classifier.scale) == (0.999, 64)
    assert margin_of(cfg) == ARCFACE
    assert (cfg.optimizer.lr, cfg.optimizer.momentum) == (0.1, 0.9)
    assert (cfg.optimizer.weight_decay, cfg.optimizer.nesterov) == (5e-4, False)
    assert (cfg.data.batch_size, cfg.trainer.max_epochs) == (384, 5)
    assert cfg.schedule.scheduler == "CosineAnnealingLR"
    assert cfg.trainer.gradient_clip_val == 5


def test_a_command_wins_over_a_recipe() -> None:
    cfg = composed("+paper=f2c_ms1m", "margin=arcface", "model=r100", "trainer.max_epochs=2")
    assert cfg.margin == composed("margin=arcface").margin
    assert (cfg.model.name, cfg.trainer.max_epochs) == ("iresnet100", 2)
    cfg = composed("+paper=webface12m_r100", "data=glint360k", "schedule.variant=scaled")
    assert (cfg.data.name, cfg.schedule.variant) == ("glint360k", "scaled")


@pytest.mark.parametrize("paper", PAPERS)
@pytest.mark.parametrize("schedule", ["fastface", "mhlr", "cosine"])
def test_another_schedule_replaces_a_recipes_own(paper: str, schedule: str) -> None:
    told = composed(f"+paper={paper}", f"schedule={schedule}").schedule
    assert told == composed(f"schedule={schedule}").schedule


# ------------------------------------------------------------------------------------ training


@pytest.fixture
def faces(tmp_path: Path) -> None:
    """DIR in the working directory: 24 people, two noisy images each."""
    for number, image in enumerate(noise(48)):
        folder = tmp_path / "DIR" / f"person_{number // 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number % 2}.jpg")


def two_steps(paper: str) -> list[str]:
    """A recipe's command on the people of DIR, two steps long."""
    small = {"dynamic_pool": "classifier.pool_size=12", "attfc": "classifier.queue_size=12"}
    kind = "dynamic_pool" if paper in F2C else paper.partition("_")[0]
    return [
        f"+paper={paper}",
        "data.root=DIR",
        *("data.batch_size=4", "data.num_workers=0", *([small[kind]] if kind in small else [])),
        *("trainer.max_steps=2", "trainer.log_every_n_steps=1"),
        "trainer.enable_progress_bar=false",
    ]


@pytest.mark.program
@pytest.mark.usefixtures("faces")
@pytest.mark.parametrize("paper", PAPERS)
def test_a_recipe_trains(paper: str, run: Run) -> None:
    """Two steps, of a small network, from another folder than the program's."""
    ended = run(*two_steps(paper), "model.name=iresnet_tiny")
    assert ended.code == 0, ended.err
    config, told = OmegaConf.load(ended.folder / "config.yaml"), composed(f"+paper={paper}")
    assert config.classifier._target_ == told.classifier._target_
    assert config.schedule._target_ == told.schedule._target_
    assert steps_done(ended.folder) == 2


@pytest.mark.program
@pytest.mark.usefixtures("faces")
def test_a_recipe_resumes(run: Run) -> None:
    """With resume=auto alone: the recipe is found again."""
    run(*two_steps("f2c_fastface_ms1m"), "model.name=iresnet_tiny")
    ended = run("resume=auto", "trainer.max_steps=3")
    assert ended.code == 0, ended.err
    assert steps_done(ended.folder) == 3
    assert "+paper=f2c_fastface_ms1m" in OmegaConf.load(ended.folder / "overrides.yaml")


def steps_done(folder: Path) -> int:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
