"""Every combination of configs composes, and every option builds what it names."""

import itertools
import re
import shlex
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import get_class, get_method, instantiate
from omegaconf import DictConfig, OmegaConf

from fastface_lightning.cli import find_recipes
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
    find_recipes(CONF)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(config, list(overrides))


def test_the_options_are_those_promised() -> None:
    assert set(OPTIONS["model"]) == {
        *("r18", "r34", "r50", "r100", "r200", "mbf", "mbf_large", "timm", "tiny"),
    }
    assert set(OPTIONS["data"]) == {
        *("synthetic", "folder", "record", "lfw"),
        *("casia_webface", "ms1mv2", "ms1mv3", "glint360k", "vggface2"),
        *("webface4m", "webface8m", "webface12m", "webface42m"),
    }
    assert set(OPTIONS["margin"]) == {
        *("softmax", "arcface", "cosface", "combined", "sphereface"),
        *("adaface", "magface", "curricularface", "elasticface"),
    }
    assert set(OPTIONS["schedule"]) == {
        *("fastface", "mhlr", "polynomial", "multistep"),
        *("cosine", "linear", "trapezoid", "onecycle", "plateau", "constant"),
    }
    assert set(OPTIONS["classifier"]) == {"full", "chunked", "partial", "dcp", "attfc"}
    assert set(OPTIONS["optimizer"]) == {"sgd", "adamw"}
    assert set(OPTIONS["trainer"]) == {"auto", "cpu", "gpu", "ddp"}
    assert set(OPTIONS["logger"]) == {"csv", "tensorboard", "none"}


@pytest.mark.slow
def test_every_combination_composes() -> None:
    """Data sets bring margins, so those are crossed. No other file chooses for another group: one
    whose options compose alone (`test_every_target_exists`) composes with all."""
    choosing = [file for file in CONF.rglob("*.yaml") if "override /" in file.read_text()]
    assert {file.parent.name for file in choosing} == {"data"}
    for data, margin in itertools.product(OPTIONS["data"], OPTIONS["margin"]):
        assert margin_option(composed(f"data={data}", f"margin={margin}")) == margin


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


def card_of(data: str) -> dict[str, str]:
    """The comments at the head of a data set's file, by what they tell of; `run` is the command."""
    lines = (CONF / "data" / f"{data}.yaml").read_text().splitlines()
    head = list(itertools.takewhile(lambda line: line.startswith("# "), lines))
    if "@package" in head[0]:
        del head[0]
    assert 4 <= len(head) <= 7, f"{data}: {len(head)} lines"
    text = " ".join(line[2:].strip() for line in head)
    parts = re.split(r"(Origin|Size|Terms|Get it|Layout): |(?=python train\.py)", text)
    title, *parts, _, run = parts
    assert title and "" not in parts
    return dict(zip(parts[::2], parts[1::2], strict=True), run=run)


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
    """Origin, size, terms, how to get it, layout, and a command that composes."""
    card = card_of(data)
    assert list(card) == ["Origin", "Size", "Terms", "Get it", "Layout", "run"]
    assert all(len(words) > 5 for words in card.values())
    counts = counts_of(data)
    if counts is None:
        assert data in ("folder", "record") and "yours" in card["Origin"]
    else:
        assert card["Size"].startswith("{:,} identities, {:,} images".format(*counts))
    if data not in ("synthetic", "folder", "record"):
        assert re.search(r"\b(19|20)\d\d\b|arXiv", card["Origin"])
        assert "research" in card["Terms"]
    assert ("withdrew MS-Celeb-1M in 2019" in card["Terms"]) == data.startswith("ms1m")
    assert ("agreement" in card["Terms"]) == data.startswith("webface")
    program, script, *overrides = shlex.split(card["run"])
    assert (program, script) == ("python", "train.py")
    cfg = composed(*overrides)
    assert cfg.data.get("name", data) == data
    assert f"data={data}" in overrides and cfg.data.get("root", "DIR") == "DIR"


@pytest.mark.parametrize("data", OPTIONS["data"])
def test_the_verification_sets_of_a_card_are_found(data: str, tmp_path: Path) -> None:
    """What a card adds for InsightFace's packs names the files that lie in them."""
    added = re.findall(r"'(data\.verify=\S+)'", card_of(data)["Layout"])
    assert bool(added) == ("InsightFace's dataset zoo" in card_of(data)["Get it"])
    assert not composed(f"data={data}").data.verify
    if added:
        module = instantiate(composed(f"data={data}", f"data.root={tmp_path}", *added).data)
        for name in ("lfw.bin", "cfp_fp.bin", "agedb_30.bin"):
            (tmp_path / name).touch()
        found = [module._find(name).name for name in module.verify]
        assert found == ["lfw.bin", "cfp_fp.bin", "agedb_30.bin"]


def test_the_page_of_data_sets_agrees_with_their_configs() -> None:
    page = (CONF.parent / "docs" / "datasets.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \| (\S+) \| (.*) \|$", page, re.MULTILINE)
    assert sorted(data for data, *_ in rows) == OPTIONS["data"]
    for data, identities, images, rest in rows:
        counts = counts_of(data)
        expected = ("yours", "yours") if counts is None else tuple(f"{n:,}" for n in counts)
        assert (identities, images) == expected, data
        assert rest.count(" | ") == 2, data
    notes = page.partition("## Notes on each\n\n")[2].split("\n\n")
    noted = {
        data: margin
        for note in notes
        for margin in re.findall(r"Margin\s`(\w+)`", note)
        for data in re.findall(r"\*\*(\w+)\*\*", note)
    }
    assert len(noted) == 7  # webface8m and webface12m lie within a range
    assert all(margin_option(composed(f"data={data}")) == noted[data] for data in noted)


def test_view_1_of_lfw_has_the_counts_of_its_card(shared_data: Path) -> None:
    lines = (shared_data / "lfw112" / "peopleDevTrain.txt").read_text().split("\n")[1:]
    images = [int(line.split("\t")[1]) for line in lines if line]
    assert counts_of("lfw") == (len(images), sum(images))
    pairs = (shared_data / "lfw112" / "pairsDevTest.txt").read_text().split("\n")
    assert f"{len([line for line in pairs[1:] if line]):,} pairs" in card_of("lfw")["Size"]


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


def test_trapezoid_is_constant_and_then_a_line() -> None:
    cfg = composed("schedule=trapezoid", "total_steps=1000", "optimizer.lr=0.1")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    scheduler, lrs = instantiate(cfg.schedule)(optimizer), []
    for _ in range(1000):
        lrs.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert lrs[:650] == pytest.approx([0.1] * 650)
    line = [0.1 * (999 - step) / 350 for step in range(649, 1000)]
    assert lrs[649:] == pytest.approx(line, abs=2e-5)


@pytest.mark.parametrize("group", ["margin", "classifier", "optimizer"])
def test_every_option_names_a_class_and_its_arguments(group: str) -> None:
    for option in OPTIONS[group]:
        part = dict(composed(f"{group}={option}")[group])
        for key in ("reinit", "lr") if group == "classifier" else ():  # the program's business
            assert not part.pop(key)
        kwargs = {"classifier": {"num_classes": 10, "margin": None}}.get(group, {})
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
