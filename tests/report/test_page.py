"""A run's page: whole for a whole run, with holes for less, and nobody's words become HTML."""

import csv
import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastface_lightning.report.figures import MAX_POINTS, readable, schedule_figure, thin
from fastface_lightning.report.page import read_run, write_report

HOSTILE = '<script>alert("1")</script>&$_{'
HEADINGS = [
    *("Settings", "Loss and learning rate", "Verification over time", "ROC", "Throughput", "Data"),
]
VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """What a browser would see, and a fault for each tag that is not closed where it should be."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.source = file.read_text(encoding="utf-8")
        self.open: list[str] = []
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(self.source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1] if self.open else "", data.strip()))

    @property
    def text(self) -> str:
        return " ".join(text for tag, text in self.texts if tag != "style")

    def of(self, tag: str) -> list[str]:
        return [text for inside, text in self.texts if inside == tag]


def rows() -> list[dict[str, Any]]:
    """A run of 200 steps, verified before, in and after it."""
    trained = [
        {
            "step": step,
            "epoch": step // 100,
            "train/loss": 10 - step / 40,
            "train/images_per_second": 100 + step % 3,
            "lr-SGD": 0.02 if step < 100 else 0.01,
            "fastface/response": 0.03 if step < 60 else 0.001,
            "fastface/threshold": 0.01 if step > 9 else "",
        }
        for step in range(9, 200, 10)
    ]
    verified = [
        {
            "step": step,
            "verify/accuracy": (a + b) / 2,
            "verify/lfw/accuracy": a,
            "verify/lfw/std": 0.01,
            "verify/cfp_fp/accuracy": b,
            "verify/cfp_fp/std": 0.02,
        }
        for step, a, b in ((0, 0.55, 0.51), (99, 0.91, 0.83), (199, 0.90, 0.82))
    ]
    return sorted(trained + verified, key=lambda row: row["step"])


def results(**changes: Any) -> dict[str, Any]:
    return {
        "steps": 200,
        "epochs": 2,
        "final_loss": 5.1239,
        "verification": {
            "lfw": {"accuracy": 0.9, "std": 0.0123, "accuracy_before": 0.55},
            "cfp_fp": {"accuracy": 0.82, "std": 0.02, "accuracy_before": None},
        },
        "best": {"step": 100, "accuracy": 0.87},
        "lr_changes": [{"step": 97, "factor": 0.5, "lr": 0.01}],
        "final_lr": 0.01,
        "images": 12_800,
        "bad_images": [],
        "images_per_second": 101.4,
        "wall_seconds": 131.6,
        "peak_memory_bytes": 3 * 2**29,
        "device": "AMD EPYC, 1 threads",
        "precision": "32-true",
        "environment": {"commit": "0123abc", "python": "3.11.2"},
        **changes,
    }


def write_metrics(folder: Path, rows: list[dict[str, Any]]) -> None:
    with (folder / "metrics.csv").open("w", newline="", encoding="utf-8") as lines:
        names = dict.fromkeys(name for row in rows for name in row)
        writer = csv.DictWriter(lines, names)
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with everything in it."""
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "last.ckpt").write_bytes(bytes(2_300_000))
    (folder / "config.yaml").write_text(
        "model:\n  name: iresnet50\n"
        "data:\n  _target_: fastface_lightning.data.RecordData\n  batch_size: 64\n"
        "schedule:\n  _target_: fastface_lightning.FastFace\n"
    )
    (folder / "overrides.yaml").write_text("- data=ms1mv3\n- optimizer.lr=0.02\n")
    write_metrics(folder, rows())
    (folder / "results.json").write_text(json.dumps(results()))
    roc = {"lfw": {"far": [0, 0.01, 0.1, 1], "tar": [0.2, 0.5, 0.9, 1]}}
    (folder / "roc.json").write_text(json.dumps(roc))
    Image.new("RGB", (40, 30), (200, 10, 10)).save(folder / "samples.png")
    return folder


def test_a_fixed_schedule_has_torchs_name_and_no_response(run: Path) -> None:
    fixed = "schedule: {_target_: any.FixedSchedule, scheduler: ConstantLR}\n"
    (run / "config.yaml").write_text("model: {name: mbf}\ndata: {name: ms1mv3}\n" + fixed)
    shown = [{k: v for k, v in row.items() if "fastface" not in k} for row in rows()]
    write_metrics(run, shown)
    page = write_report(run)
    assert Page(page).of("h1") == ["mbf on ms1mv3, schedule ConstantLR"]
    assert "response" not in page.read_text()


def test_a_whole_run_has_every_part(run: Path) -> None:
    file = write_report(run)
    page = Page(file)
    assert file == run / "report.html" and not list(run.glob("*.part*"))
    assert page.of("h1") == page.of("title") == ["iresnet50 on ms1mv3, schedule FastFace"]
    assert page.of("h2") == HEADINGS
    assert page.tags["svg"] == 4 and page.tags["img"] == 1
    assert "note" not in {value for _, name, value in page.attributes if name == "class"}
    assert page.of("code") == ["data=ms1mv3", "optimizer.lr=0.02"]
    assert page.of("pre") == [(run / "config.yaml").read_text().strip()]
    assert list(zip(page.of("dt"), page.of("dd"), page.of("small"), strict=False)) == [
        ("accuracy, lfw", "90.00%", "± 1.23%, before training 55.00%"),
        ("accuracy, cfp_fp", "82.00%", "± 2.00%"),
        ("best step", "100", "accuracy 87.00%"),
        ("final loss", "5.124", "mean of the last 100 steps"),
        ("images/s", "101", "12,800 images in all"),
        ("wall time", "2 min 12 s", "200 steps"),
        ("peak memory", "1.50 GiB", "AMD EPYC, 1 threads"),
    ]
    assert "after step factor learning rate 97 \u00d7 0.5 0.01" in page.text
    assert "commit 0123abc python 3.11.2" in page.text
    texts = page.of("text")
    assert {"loss", "response", "learning rate", "accuracy", "images/s", "lfw"} <= set(texts)


def test_a_run_with_averaged_weights_shows_both(run: Path) -> None:
    averaged = rows()
    averaged[-1] |= {"verify_raw/lfw/accuracy": 0.88}
    write_metrics(run, averaged)
    verified = {"accuracy": 0.9, "std": 0.0123, "accuracy_before": 0.55, "raw_accuracy": 0.88}
    (run / "results.json").write_text(json.dumps(results(verification={"lfw": verified})))
    page = Page(write_report(run))
    assert "raw" in page.of("small")[0] and "88.00%" in page.of("small")[0]
    assert "lfw, raw weights" in page.of("text")


def test_the_page_needs_no_other_file(run: Path) -> None:
    """And what its figures refer to is there, once."""
    page = Page(write_report(run))
    assert not page.tags["script"] and not page.tags["link"] and not page.tags["metadata"]
    for tag, name, value in page.attributes:
        if not name.startswith("xmlns"):
            assert "//" not in value or value.startswith("data:"), (tag, name, value)
        if name in ("src", "xlink:href"):
            assert value.startswith(("data:image/jpeg;base64,", "#"))
    assert not re.search(r"@import|url\((?!#)", page.source)
    ids = Counter(value for _, name, value in page.attributes if name == "id")
    assert max(ids.values()) == 1
    referred = set(re.findall(r'url\(#(\w+)\)|xlink:href="#(\w+)"', page.source))
    assert referred and {a or b for a, b in referred} <= set(ids)


@pytest.mark.filterwarnings("error")
def test_a_name_is_never_markup(run: Path) -> None:
    """Whoever named an identity, a set, a setting or a file, and every name of a set is shown."""
    (run / "config.yaml").write_text(f"model:\n  name: '{HOSTILE}'\n# {HOSTILE}\n")
    (run / "overrides.yaml").write_text(f"- 'data={HOSTILE}'\n- 'schedule={HOSTILE}'\n")
    write_metrics(run, [{**row, f"verify/{HOSTILE}/accuracy": 0.5} for row in rows()])
    found = {"accuracy": 0.9, "std": 0.01, "accuracy_before": None}
    changed = results(
        verification={HOSTILE: found},
        bad_images=[HOSTILE],
        device=HOSTILE,
        environment={HOSTILE: HOSTILE},
    )
    (run / "results.json").write_text(json.dumps(changed))
    names = [HOSTILE, "_hidden", "日本", "a\udcffb", "\x00"]
    curve = {"far": [0, 0.5, 1], "tar": [0, 0.5, 1]}
    (run / "roc.json").write_text(json.dumps(dict.fromkeys(names, curve)))
    page = Page(write_report(run))
    assert not page.tags["script"]
    assert page.of("h2") == HEADINGS
    # Title twice, settings, a tile and its note, two legends, a list and the environment.
    assert page.text.count('alert("1")') >= 11
    assert page.of("text").count(HOSTILE) == 2
    assert {readable(name).replace(r"\$", "$") for name in names} <= set(page.of("text"))


PARTS = {
    "config.yaml": "There is no config.yaml",
    "overrides.yaml": "Nothing differs from the defaults",
    "metrics.csv": "No loss was logged.",
    "results.json": "the run has not come to its end",
    "roc.json": "There is no roc.json",
    "samples.png": "There is no samples.png",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
def test_a_missing_file_leaves_a_hole_that_says_so(run: Path, name: str) -> None:
    (run / name).unlink()
    page = Page(write_report(run))
    assert [part for part, words in PARTS.items() if words in page.text] == [name]
    assert page.of("h2") == HEADINGS


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\x00\n\x00", b"null", b"- ${a: ["])
def test_damaged_files_are_left_out(run: Path, content: bytes) -> None:
    for name in PARTS:
        (run / name).write_bytes(content)
    page = Page(write_report(run))
    assert page.of("h2") == HEADINGS
    assert page.tags["svg"] == 0
    for name in ("results.json", "roc.json", "samples.png"):
        assert f"{name} cannot be read" in page.text


def test_rates_logged_apart_from_the_loss_are_drawn(run: Path) -> None:
    """So does Lightning's monitor, a row of its own each, with a column for each group."""
    changed = [{k: v for k, v in row.items() if not k.startswith("lr-")} for row in rows()]
    changed += [{"step": s, "lr-SGD/pg1": 0.1 / (1 + s), "lr-SGD/pg2": 0.0} for s in range(9, 200)]
    write_metrics(run, changed)
    page = Page(write_report(run))
    assert {"SGD/pg1", "SGD/pg2", "learning rate"} <= set(page.of("text"))


def test_a_killed_run_is_told_from_its_metrics(run: Path) -> None:
    (run / "results.json").unlink()
    (run / "overrides.yaml").unlink()
    changed = rows()
    lost = [row for row in changed if "train/loss" in row][3:6]
    for row, value in zip(lost, ("nan", "inf", "1.2e"), strict=True):  # the last one is torn
        row["train/loss"] = value
    write_metrics(run, changed)
    page = Page(write_report(run))
    assert page.of("h1") == ["iresnet50 on RecordData, schedule FastFace"]
    assert "3 of 20 losses are not finite." in page.text
    assert list(zip(page.of("dt"), page.of("dd"), page.of("small"), strict=True)) == [
        ("accuracy, lfw", "90.00%", "± 1.00%, before training 55.00%"),
        ("accuracy, cfp_fp", "82.00%", "± 2.00%, before training 51.00%"),
        ("best step", "100", "accuracy 87.00%"),
        ("last logged loss", "5.025", "at step 199"),
    ]
    assert page.tags["svg"] == 4


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("value", ["nan", "0", "1e30"])
def test_metrics_alone_will_do_whatever_they_are(run: Path, value: str) -> None:
    """One row, and many of one value."""
    for file in run.glob("*.*"):
        file.unlink()
    for kept in (rows()[:2], rows()):
        write_metrics(run, [{k: value if k != "step" else v for k, v in r.items()} for r in kept])
        page = Page(write_report(run))
        assert page.of("h1") == ["Run run"] and page.tags["svg"] == 3
    (run / "metrics.csv").unlink()
    with pytest.raises(ValueError, match=r"config\.yaml or metrics\.csv"):
        write_report(run)


@given(st.integers(0, 5 * MAX_POINTS), st.integers(0, 2**32 - 1))
def test_thinning_keeps_order_extremes_and_gaps(count: int, seed: int) -> None:
    y = np.random.default_rng(seed).random(count)
    kept, values = thin(range(count), y)
    assert len(kept) <= MAX_POINTS
    assert (values == y[kept.astype(int)]).all() and (np.diff(kept) > 0).all()
    if count:
        assert values.min() == y.min() and values.max() == y.max()
        y[seed % count] = np.nan
        assert np.isnan(thin(range(count), y)[1]).sum() == 1


def test_the_smoothed_loss_is_the_mean_of_the_finite_losses_around() -> None:
    loss = np.random.default_rng(0).normal(size=250)
    loss[40] = np.nan
    figure = schedule_figure((np.arange(250), loss), None, None, {}, [])
    expected = [np.nanmean(loss[max(i - 2, 0) : i + 3]) for i in range(250)]
    np.testing.assert_allclose(figure.axes[0].lines[1].get_ydata(), expected, atol=1e-12)


@pytest.mark.parametrize("scale", [0.1, 1, 100])
def test_the_threshold_is_always_in_sight(scale: float) -> None:
    response, loss = ([0, 1, 2], [0.0, scale, -scale]), ([0, 1, 2], [3.0, 2.0, 1.0])
    figure = schedule_figure(loss, response, [float("nan"), 0.5, 0.5], {}, [])
    low, high = figure.axes[1].get_ylim()
    assert low < 0.5 < high and high - low < 20 * 0.5 + 1e-9


def test_the_loss_of_every_step_is_drawn_where_it_is_there(run: Path) -> None:
    steps, logged = read_run(run).metrics["train/loss"]
    every = np.arange(steps[-1] + 40, dtype="<f4")
    every[3] = np.inf
    (run / "losses.f32").write_bytes(every.tobytes() + b"to")
    at, losses = read_run(run).metrics["train/loss"]
    assert at.tolist() == list(range(len(every))) and np.isnan(losses).nonzero()[0].tolist() == [3]
    assert "1 of " in "".join(read_run(run).notes)
    (run / "losses.f32").write_bytes(every[: int(steps[-1])].tobytes())  # of a run that was killed
    assert read_run(run).metrics["train/loss"][1].tolist() == logged.tolist()
    # A run too short for a row in metrics.csv.
    write_metrics(run, [row for row in rows() if "train/loss" not in row])
    assert len(read_run(run).metrics["train/loss"][1]) == int(steps[-1])
    assert Page(write_report(run)).tags["svg"] == 3 and (run / "schedule.png").exists()
