"""The recipes of papers say what the papers say, cost what their heads say, and train."""

import math
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from hydra.utils import instantiate
from models import noise
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from programs import ROOT, Run
from test_conf import composed, rates_of

RECIPES = ROOT / "recipes"
PAPERS = sorted(file.stem for file in (RECIPES / "paper").rglob("*.yaml"))
FASTFACE = [paper for paper in PAPERS if paper.endswith(("_r50", "_r100"))]
F2C = [paper for paper in PAPERS if paper.startswith("f2c_")]
MHLR = [paper for paper in PAPERS if paper.endswith("_mhlr")]
BASELINES = [paper for paper in PAPERS if paper.endswith(("_polynomial", "_multistep"))]
TIMM = [paper for paper in PAPERS if paper.startswith(("vit_", "convnext_"))]
MS1MV2, MS1MV3, GLINT360K = (85_742, 5_822_653), (93_431, 5_179_510), (360_232, 17_091_657)
WEBFACE4M, WEBFACE8M = (205_990, 4_235_242), (411_980, 8_465_386)
WEBFACE12M, WEBFACE42M = (617_970, 12_720_066), (2_059_906, 42_474_557)
# InsightFace's, FastFace's and AttFC's programs take the derivative of ArcFace's margin as 1.
ARCFACE, COSFACE = ("ArcFace", 0.5, True), ("CosFace", 0.4, None)


class Published(NamedTuple):
    """What a recipe's run was published with: of arXiv 2404.11118 (FastFace) and arcface_torch, of
    F2C's and AttFC's releases, of the commands of timm-face."""

    network: str
    data: tuple[int, int]  # identities, images
    margin: tuple[str, float, bool | None]  # m, straight_through
    batch: int = 128  # of an optimizer step
    lr: float = 0.02
    momentum: float = 0.9  # AdamW: beta1
    weight_decay: float = 5e-4
    clip: float = 5
    epochs: int = 5


def f2c(data: tuple[int, int], epochs: int) -> Published:
    margin = ("CosFace", 0.5, None)
    return Published("iresnet50", data, margin, 512, 0.1, 0.9, 1e-4, 0, epochs)


def timm(network: str, batch: int = 768, lr: float = 1e-3, weight_decay: float = 0.1) -> Published:
    return Published(network, MS1MV3, COSFACE, batch, lr, 0.9, weight_decay, 1, 30)


PUBLISHED = {
    "attfc_ms1mv3": Published("iresnet50", MS1MV3, ARCFACE, batch=384, lr=0.1),
    "convnext_atto_ms1mv3": timm("convnext_atto"),
    "convnext_nano_ms1mv3": timm("convnext_nano"),
    "f2c_fastface_glint360k": f2c(GLINT360K, 5),
    "f2c_fastface_ms1m": f2c(MS1MV2, 5),
    "f2c_glint360k": f2c(GLINT360K, 19),
    "f2c_ms1m": f2c(MS1MV2, 19),
    "ms1mv2_r100": Published("iresnet100", MS1MV2, ARCFACE),
    "ms1mv3_r100": Published("iresnet100", MS1MV3, ARCFACE),
    "ms1mv3_r100_mhlr": Published("iresnet100", MS1MV3, ARCFACE),
    "ms1mv3_r100_multistep": Published("iresnet100", MS1MV3, ARCFACE, epochs=20),
    "ms1mv3_r100_polynomial": Published("iresnet100", MS1MV3, ARCFACE, epochs=20),
    "vit_small_ms1mv3": timm("vit_small_patch16_224", 384, 5e-4, 0.05),
    "vit_tiny_ms1mv3": timm("vit_tiny_patch16_224"),
    "webface12m_r100": Published("iresnet100", WEBFACE12M, COSFACE),
    "webface12m_r100_mhlr": Published("iresnet100", WEBFACE12M, COSFACE),
    "webface12m_r100_multistep": Published("iresnet100", WEBFACE12M, COSFACE, epochs=20),
    "webface12m_r100_polynomial": Published("iresnet100", WEBFACE12M, COSFACE, epochs=20),
    "webface12m_r50": Published("iresnet50", WEBFACE12M, COSFACE),
    "webface42m_r100": Published("iresnet100", WEBFACE42M, COSFACE),
    "webface42m_r100_8gpu": Published("iresnet100", WEBFACE42M, COSFACE, 8 * 128, 8 * 0.02),
    "webface4m_r100": Published("iresnet100", WEBFACE4M, COSFACE),
    "webface8m_r100": Published("iresnet100", WEBFACE8M, COSFACE),
}


@pytest.mark.parametrize("paper", PAPERS)
def test_settings_are_the_published_ones(paper: str) -> None:
    cfg = composed(f"+paper={paper}")
    margin, optimizer = cfg.margin, cfg.optimizer
    momentum = optimizer.betas[0] if paper in TIMM else optimizer.momentum
    assert PUBLISHED[paper] == Published(
        cfg.model.name,
        (cfg.data.num_identities, cfg.data.num_images),
        (margin._target_.rpartition(".")[2], margin.m, margin.get("straight_through")),
        cfg.data.batch_size * cfg.trainer.accumulate_grad_batches * cfg.trainer.devices,
        optimizer.lr,
        momentum,
        optimizer.weight_decay,
        cfg.trainer.gradient_clip_val,
        cfg.trainer.max_epochs,
    )
    kind = "AdamW" if paper in TIMM else "SGD"
    assert optimizer._target_ == f"fastface_lightning.optim.{kind}"
    assert optimizer.get("nesterov", False) == (paper in F2C)
    assert (optimizer.no_decay, optimizer.layer_decay) == (False, None)
    assert cfg.classifier.scale == (32 if paper in F2C else 64)
    assert cfg.data.held_out == 0  # all people are trained on
    operations = 2 if paper == "vit_small_ms1mv3" else 0
    assert cfg.augment == {
        "_target_": "fastface_lightning.data.Augment",
        "flip": 0.5,
        "crop": 0.0,
        "low_resolution": 0.0,
        "photometric": 0.0,
        "rand_augment": operations,
    }


def test_every_recipe_opens_with_its_command() -> None:
    for paper in PAPERS:
        text = (RECIPES / "paper" / f"{paper}.yaml").read_text()
        assert f"\n#   python train.py +paper={paper} data.root=DIR\n" in text


# ------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize("paper", [*FASTFACE, *MHLR, *BASELINES])
def test_one_gpu_has_the_full_softmax(paper: str) -> None:
    cfg = composed(f"+paper={paper}")
    assert cfg.classifier._target_.endswith(".ChunkedClassifier")
    assert cfg.classifier.interclass_filter is None and cfg.averaging == {}


def steps_of(cfg: DictConfig) -> int:
    """Optimizer steps; the last one of an epoch may hold fewer batches."""
    batches = cfg.data.num_images // cfg.data.batch_size
    return -(-batches // cfg.trainer.accumulate_grad_batches) * cfg.trainer.max_epochs


@pytest.mark.parametrize("paper", FASTFACE)
def test_fastface(paper: str) -> None:
    """The rule's numbers, whatever the length of the run."""
    cfg = composed(f"+paper={paper}")
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
    assert cfg.classifier._target_.endswith(".DynamicClassPool") and cfg.averaging == {}
    assert cfg.classifier.momentum == 0.99
    assert cfg.classifier.pool_size == (0.01 if paper.endswith("glint360k") else 0.1)
    if "fastface" in paper:
        assert cfg.schedule == composed("schedule=fastface").schedule
    else:
        assert_drops(cfg, after=[8, 14, 17])


def test_attfc() -> None:
    """The numbers of arXiv 2503.06839's release."""
    cfg = composed("+paper=attfc_ms1mv3")
    assert cfg.classifier._target_.endswith(".AttentionClassifier") and cfg.averaging == {}
    assert (cfg.classifier["keys"], cfg.classifier.queue_size) == (2, 0.3)
    assert cfg.classifier.momentum == 0.999
    assert cfg.schedule.scheduler == "CosineAnnealingLR"


@pytest.mark.parametrize("paper", TIMM)
def test_timm(paper: str) -> None:
    """The commands of timm-face: networks at 112 pixels, steps, warm-up, sampled identities."""
    cfg = composed(f"+paper={paper}")
    vit, small, nano = (name in paper for name in ("vit_", "small", "nano"))
    more = {
        key: value for key, value in cfg.model.items() if key not in composed("model=timm").model
    }
    gap = {"class_token": False, "global_pool": "avg", "patch_drop_rate": 0.1} if small else {}
    path = {"drop_path_rate": 0.1} if nano else {}
    assert more == {"patch_size": 8 if vit else 2, **gap, **path}
    assert cfg.trainer.max_steps == (400_000 if small else 200_000) < steps_of(cfg)
    assert cfg.classifier._target_.endswith(".PartialClassifier")
    assert int(cfg.classifier.rate * MS1MV3[0]) == (MS1MV3[0] if small else 16_384)
    average = instantiate(cfg.averaging)
    assert average.decay**10 == pytest.approx(0.999, abs=1e-6) and average.every_n_steps == 10
    rates = rates_of(instantiate(cfg.schedule), steps=1000)
    top = 99 if nano else 49
    assert rates.index(max(rates)) == top and max(rates) == pytest.approx(0.1)
    assert rates[0] == pytest.approx(1e-3) and rates[-1] == pytest.approx(1e-3)
    cosine = [
        1e-3 + 0.099 * (1 + math.cos(math.pi * t / (999 - top))) / 2 for t in range(1000 - top)
    ]
    assert rates[top:] == pytest.approx(cosine)


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
        *("trainer.max_steps=2", "trainer.log_every_n_steps=1", "trainer.devices=1"),
        "trainer.enable_progress_bar=false",
    ]


@pytest.mark.program
@pytest.mark.usefixtures("faces")
@pytest.mark.parametrize("paper", PAPERS)
def test_a_recipe_trains(paper: str, run: Run) -> None:
    """Two steps, of a small network of its kind, from another folder than the program's."""
    kind = paper.partition("_")[0] if paper in TIMM else "iresnet"
    small = {"vit": "test_vit", "convnext": "test_convnext", "iresnet": "iresnet_tiny"}[kind]
    ended = run(*two_steps(paper), f"model.name={small}")
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
