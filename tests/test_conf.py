"""Every combination of configs composes, and every option builds what it names."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import get_class, get_object, instantiate
from omegaconf import DictConfig, OmegaConf

from fastface_lightning.cli import find_recipes
from fastface_lightning.schedule.fixed import FixedSchedule

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
    find_recipes(CONF)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(config, list(overrides))


def margin_option(cfg: DictConfig) -> str:
    """The margin group's option whose file says what a config's margin says."""
    (option,) = (option for option, margin in MARGINS.items() if margin == cfg.margin)
    return option


@pytest.mark.parametrize("data", OPTIONS["data"])
def test_a_data_set_brings_the_papers_margin(data: str) -> None:
    cfg = composed("model=r100", f"data={data}")
    assert margin_option(cfg) == ("arcface_insightface" if data.startswith("ms1m") else "cosface")
    # Data sets alone choose for another group: the command still wins.
    assert composed(f"data={data}", "margin=softmax").margin._target_.endswith("Softmax")
    for key in ("batch_size", "num_workers"):
        assert cfg.data[key] >= 0


def counts_of(data: str) -> tuple[int, int] | None:
    """Identities and images that a config promises; None if it promises none."""
    cfg = composed(f"data={data}").data
    if data == "synthetic":
        return cfg.num_identities, cfg.num_identities * cfg.images_per_identity
    if data == "lfw":
        return 4038, 9525  # of peopleDevTrain.txt; a test below counts them there
    return (cfg.num_identities, cfg.num_images) if cfg.num_identities else None


@pytest.mark.parametrize("data", OPTIONS["data"])
def test_a_data_set_has_a_card(data: str) -> None:
    """Its size, and a command that composes."""
    card = (CONF / "data" / f"{data}.yaml").read_text()
    for topic in ("Origin", "Size", "Terms", "Get it", "Layout"):
        assert f"\n# {topic}: " in card or f". {topic}: " in card
    counts = counts_of(data)
    if counts is not None:
        assert "Size: {:,} identities, {:,} images".format(*counts) in card
    command = next(line[2:] for line in card.splitlines() if line.startswith("#   python train.py"))
    cfg = composed(*shlex.split(command)[2:])
    assert f"data={data}" in command
    assert cfg.data.get("name", data) == data and cfg.data.get("root", "DIR") == "DIR"


def test_view_1_of_lfw_has_the_counts_of_its_card(shared_data: Path) -> None:
    lines = (shared_data / "lfw112" / "peopleDevTrain.txt").read_text().split("\n")[1:]
    images = [int(line.split("\t")[1]) for line in lines if line]
    assert counts_of("lfw") == (len(images), sum(images))


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
    built = instantiate(composed(f"schedule={schedule}").schedule)
    if not isinstance(built, FixedSchedule):
        assert built.bind(100).init().scale == (1e-5 if schedule == "autowu" else 1)
        return
    rates = rates_of(built, steps=100)
    last = {"constant": 0.1, "multistep": 1e-4, "plateau": 0.1 * 0.5**16}
    assert max(rates) == pytest.approx(0.1)
    assert rates[-1] == pytest.approx(last.get(schedule, 0), abs=2e-3)


def test_trapezoid_is_constant_and_then_a_line() -> None:
    rates = rates_of(instantiate(composed("schedule=trapezoid").schedule), steps=1000)
    assert rates[:650] == pytest.approx([0.1] * 650)
    line = [0.1 * (999 - step) / 350 for step in range(649, 1000)]
    assert rates[649:] == pytest.approx(line, abs=2e-5)


def rates_of(schedule: FixedSchedule, steps: int) -> list[float]:
    """The learning rate at every step of a run at a constant loss."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    scheduler, rates = schedule(optimizer, steps), []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step(*([1.0] if schedule.scheduler == "ReduceLROnPlateau" else []))
    return rates


@pytest.mark.parametrize("group", ["margin", "classifier", "optimizer"])
def test_every_option_names_a_class_and_its_arguments(group: str) -> None:
    for option in OPTIONS[group]:
        part = dict(OmegaConf.load(CONF / group / f"{option}.yaml"))
        own = {"classifier": ("reinit", "lr"), "optimizer": ("no_decay", "layer_decay")}
        for key in own.get(group, ()):  # the program's business
            assert not part.pop(key)
        kwargs = {"classifier": {"num_classes": 10, "margin": None}}.get(group, {})
        built = instantiate(part, **kwargs)
        if group == "optimizer":
            built = built([torch.nn.Parameter(torch.ones(1))])
        assert isinstance(built, get_class(part["_target_"]))


def test_every_average_builds() -> None:
    built = {option: composed(f"averaging={option}").averaging for option in OPTIONS["averaging"]}
    assert built.pop("none") == {}
    assert built["power"] == composed().averaging
    said = {option: repr(instantiate(averaging)) for option, averaging in built.items()}
    assert "window=0.05" in said["power"] and "decay=0.999" in said["ema"]


def test_every_target_exists() -> None:
    for file in CONF.rglob("*.yaml"):
        for target in re.findall(r"^ *_target_: (\S+)", file.read_text(), re.MULTILINE):
            assert callable(get_object(target)), file


@pytest.mark.parametrize("group", ["trainer", "logger", "callbacks", "model", "averaging"])
def test_every_option_composes(group: str) -> None:
    for option in OPTIONS[group]:
        assert group in composed(f"{group}={option}")
