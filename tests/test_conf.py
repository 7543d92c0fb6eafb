"""Every combination of configs composes, and every option builds what it names."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import get_class, get_method, instantiate
from omegaconf import DictConfig, OmegaConf

from fastface_lightning.schedule import PlateauSchedule

CONF = Path(__file__).resolve().parents[1] / "conf"
OPTIONS = {
    group.name: sorted(file.stem for file in group.glob("*.yaml"))
    for group in sorted(CONF.iterdir())
    if group.is_dir()
}
MARGINS = {
    option: OmegaConf.load(CONF / "margin" / f"{option}.yaml") for option in OPTIONS["margin"]
}


def composed(*overrides: str, config: str = "train") -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(config, list(overrides))


def steps_of(share: float, *, _root_: Any) -> int:
    return int(share * _root_.total_steps)


def test_the_options_are_those_promised() -> None:
    assert set(OPTIONS["model"]) == {
        *("r18", "r34", "r50", "r100", "r200", "mbf", "mbf_large", "timm", "tiny"),
    }
    assert set(OPTIONS["data"]) == {
        *("synthetic", "folder", "lfw", "ms1mv2", "ms1mv3"),
        *("webface4m", "webface8m", "webface12m", "webface42m"),
    }
    assert set(OPTIONS["margin"]) == {
        *("softmax", "arcface", "cosface", "combined", "sphereface"),
        *("adaface", "magface", "curricularface", "elasticface"),
    }
    assert set(OPTIONS["schedule"]) == {
        *("fastface", "fastface_released", "mhlr", "polynomial", "multistep", "cosine"),
        *("linear", "onecycle", "plateau", "constant"),
    }
    assert set(OPTIONS["classifier"]) == {"full", "chunked", "partial"}
    assert set(OPTIONS["optimizer"]) == {"sgd", "adamw"}
    assert set(OPTIONS["trainer"]) == {"auto", "cpu", "gpu", "ddp"}
    assert set(OPTIONS["logger"]) == {"csv", "tensorboard", "none"}


def combinations(*groups: str) -> list[str]:
    choices = [[f"{group}={option}" for option in OPTIONS[group]] for group in groups]
    return [" ".join(choice) for choice in itertools.product(*choices)]


@pytest.mark.slow
def test_every_combination_composes() -> None:
    """Data sets bring margins, so those are crossed; the other groups are independent of them."""
    for choice in combinations("data", "margin"):
        cfg = composed(*choice.split())
        assert f"margin={margin_option(cfg)}" in choice.split()
    for choice in combinations("model", "data"):
        composed(*choice.split())
    for choice in combinations("schedule", "optimizer", "trainer", "logger"):
        composed(*choice.split())


def margin_option(cfg: DictConfig) -> str:
    """The margin group's option whose file says what a config's margin says."""
    (option,) = (option for option, margin in MARGINS.items() if margin == cfg.margin)
    return option


@pytest.mark.parametrize("data", OPTIONS["data"])
def test_a_data_set_brings_the_papers_margin(data: str) -> None:
    cfg = composed("model=r100", f"data={data}")
    assert margin_option(cfg) == ("arcface" if data.startswith("ms1m") else "cosface")
    assert composed(f"data={data}", "margin=softmax").margin._target_.endswith("Softmax")
    for key in ("batch_size", "num_workers"):
        assert cfg.data[key] >= 0


def test_the_paper_run() -> None:
    """Batch 128, lr 0.02, SGD momentum 0.9, weight decay 5e-4, clip 5, 5 epochs, D = 512."""
    cfg = composed("model=r100", "data=webface12m")
    assert (cfg.data.batch_size, cfg.optimizer.lr, cfg.optimizer.momentum) == (128, 0.02, 0.9)
    assert (cfg.optimizer.weight_decay, cfg.trainer.gradient_clip_val) == (5e-4, 5.0)
    assert (cfg.trainer.max_epochs, cfg.model.embedding_size, cfg.margin.m) == (5, 512, 0.4)
    assert cfg.classifier.scale == 64 and cfg.model.name == "iresnet100"
    assert cfg.data.num_images // 128 * 5 == 496_875


@pytest.mark.parametrize("schedule", OPTIONS["schedule"])
def test_every_schedule_builds_and_steps(schedule: str) -> None:
    OmegaConf.register_new_resolver("steps", steps_of, replace=True)
    cfg = composed(f"schedule={schedule}", "total_steps=100", "optimizer.lr=0.1")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=cfg.optimizer.lr)
    if not cfg.schedule.get("_partial_"):
        built = instantiate(cfg.schedule)
        assert isinstance(built, PlateauSchedule) and built.bind(100).init().scale == 1
        return
    scheduler = instantiate(cfg.schedule)(optimizer)
    lrs = []
    for _ in range(100):
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step(*([1.0] if schedule == "plateau" else []))
    last = {"constant": 0.1, "multistep": 1e-4, "plateau": 0.1 * 0.5**16}
    assert max(lrs) == pytest.approx(0.1)
    assert lrs[-1] == pytest.approx(last.get(schedule, 0), abs=2e-3)


@pytest.mark.parametrize("group", ["margin", "classifier", "optimizer"])
def test_every_option_names_a_class_and_its_arguments(group: str) -> None:
    for option in OPTIONS[group]:
        part = dict(composed(f"{group}={option}")[group])
        for key in ("reinit", "lr") if group == "classifier" else ():  # the program's business
            assert not part.pop(key)
        kwargs = {"classifier": {"num_classes": 3, "margin": None}}.get(group, {})
        built = instantiate(part, **kwargs)
        if group == "optimizer":
            built = built([torch.nn.Parameter(torch.ones(1))])
        assert isinstance(built, get_class(part["_target_"]))


def test_every_target_exists() -> None:
    for choice in (f"{group}={option}" for group in OPTIONS for option in OPTIONS[group]):
        cfg = composed(choice)
        for part in (cfg.model, cfg.data, cfg.trainer, *cfg.logger.values()):
            if part._target_.rpartition(".")[2][0].islower():
                assert get_method(part._target_)
            else:
                assert get_class(part._target_)


def test_every_config_says_what_it_is() -> None:
    """The first line (after the package) is a comment."""
    for file in CONF.rglob("*.yaml"):
        lines = [line for line in file.read_text().splitlines() if "@package" not in line]
        assert lines[0].startswith("# "), file
