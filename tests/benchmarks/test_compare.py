"""The evidence: what is trained, kept and counted is what the program says."""

import functools
import json
import math
import statistics
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import noise
from PIL import Image
from programs import ROOT, Run, load

from fastface_lightning.data.datasets.in_memory import downsampled

sys.path.insert(0, str(ROOT / "benchmarks"))
from common import all_pairs

PROGRAM = str(ROOT / "benchmarks" / "compare.py")
compare = load(ROOT / "benchmarks" / "compare.py")
TINY = (
    *("epochs=1", "batch_size=8", "seeds=2", "jobs=1", "only=[baseline,fastface,linear]"),
    *("synthetic.identities=8", "synthetic.images=3", "synthetic.unseen=4"),
)


def row(way: str, seed: int, tar: float, lr: float = 0.1, **more: Any) -> dict[str, Any]:
    images = [800, 1600, 2400, 3200] if way == "baseline" else [200, 400, 600, 800]
    share = [0.25, 0.5, 0.75, 1.0]
    ends = {"tar": tar, "tar_1e-3": tar / 2, "auc": 0.9, "loss": 1.0, "seconds": 1.0}
    return {
        **{"way": way, "lr": lr, "seed": seed, "steps": 100, "changes": [[50, 0.5]]} | ends,
        "loss_curve": [[n, 1.0] for n in images],
        "tar_curve": [[n, tar * s] for n, s in zip(images, share, strict=True)],
        **more,
    }


@given(st.lists(st.floats(0, 1), min_size=2, max_size=10))
def test_the_interval_is_students(values: list[float]) -> None:
    from scipy.stats import t

    of_seeds = compare.Mean.of(values)
    error = statistics.stdev(values) / math.sqrt(len(values))
    assert of_seeds.value == pytest.approx(statistics.mean(values))
    assert of_seeds.reach == pytest.approx(t.ppf(0.975, len(values) - 1) * error, rel=1e-3)
    assert compare.Mean.of(values[:1]) == (values[0], None)


def test_ways_are_compared_seed_by_seed() -> None:
    mine = [row("fastface", seed, tar) for seed, tar in enumerate((0.50, 0.62, 0.70))]
    theirs = [row("linear", seed, tar) for seed, tar in enumerate((0.49, 0.60, 0.67))]
    assert compare.difference(mine, theirs[:2]) == pytest.approx((0.015, 12.71 * 0.005), rel=1e-3)


@pytest.mark.parametrize(
    ("tar", "share"),
    [(0.80, 1 / 4), (1.2, 3 / 16), (0.5, None)],
)
def test_images_until_a_point_below_the_baseline(tar: float, share: float | None) -> None:
    baseline = [row("baseline", seed, 0.81) for seed in range(2)]
    rows = [row("fastface", seed, tar) for seed in range(2)]
    reached = compare.share_to_reach(rows, baseline)
    assert reached == (share if share is None else pytest.approx(share, abs=1e-3))
    for one in rows:
        one["tar_curve"].append([1000, 0.1])  # what is lost again was not reached
    assert compare.share_to_reach(rows, baseline) is None


def test_a_way_has_the_rate_that_recognised_most(tmp_path: Path) -> None:
    kept = compare.Kept(tmp_path / "compare.json", composed_compare())
    for lr, tar in ((0.05, 0.4), (0.1, 0.6), (0.2, 0.5)):
        kept._keep(row("linear", compare.TUNING, tar, lr))
        kept._keep(row("cosine", compare.TUNING, 1 - tar, lr))
    kept._keep(row("linear", 0, 0.9, 0.2))  # a run that counts chooses nothing
    grid = (0.05, 0.1, 0.2)
    assert (kept.best_rate("linear", grid), kept.best_rate("cosine", grid)) == (0.1, 0.05)
    assert kept.best_rate("linear", (0.05, 0.2)) == 0.2  # nor a rate that is not in the grid
    assert kept.best_rate("linear", (0.3,)) == 0.3
    kept._keep(row("linear", 3, 0.5, 0.1))  # nor is a seed counted that was not asked for
    kept._keep(row("linear", 1, 0.4, 0.1))
    kept._keep(row("linear", 0, 0.2, 0.1))
    counted = kept.counted([compare.Run("linear", 0.1, 0), compare.Run("linear", 0.1, 1)])
    assert [row["tar"] for row in counted["linear"]] == [0.2, 0.4]


def test_two_programs_may_add_to_one_file(tmp_path: Path) -> None:
    more = composed_compare("+schedule@ways.mine=linear")
    one, other = (compare.Kept(tmp_path / "compare.json", c) for c in (composed_compare(), more))
    one._keep(row("linear", 0, 0.5))
    other._keep(row("mine", 0, 0.4))
    one._keep(row("linear", 1, 0.6))
    both = compare.Kept(tmp_path / "compare.json", composed_compare())
    assert [r["tar"] for r in both.rows] == [0.5, 0.4, 0.6]
    assert both.ways.keys() == other.ways.keys()


@functools.cache
def composed_compare(*overrides: str) -> Any:
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("compare", list(overrides))


@pytest.mark.parametrize("setting", ["epochs=3", "synthetic.images=2", "root=LFW"])
def test_runs_of_other_settings_are_not_mixed(tmp_path: Path, setting: str) -> None:
    file = tmp_path / "compare.json"
    compare.Kept(file, composed_compare())._keep(row("linear", 0, 0.5))
    before = file.read_text()
    with pytest.raises(ValueError, match=r"has runs with .* give another hydra.run.dir"):
        compare.Kept(file, composed_compare(setting))
    with pytest.raises(ValueError, match="has runs with fastface="):
        compare.Kept(file, composed_compare("ways.fastface.patience=0.1"))
    more = "+schedule@ways.quicker=fastface"
    assert len(compare.Kept(file, composed_compare(more, "seeds=9", "jobs=1")).rows) == 1
    assert file.read_text() == before


def test_small_faces_are_area_means() -> None:
    images = torch.randint(256, (7, 3, 64, 64), dtype=torch.uint8)
    small = downsampled([(image, i % 3) for i, image in enumerate(images)], 32)
    blocks = images.view(7, 3, 32, 2, 32, 2).double().mean((3, 5))
    assert (small.images.double() - blocks).abs().max() <= 0.5
    assert small.labels.tolist() == [0, 1, 2, 0, 1, 2, 0] and small.num_classes == 3
    batch = small.__getitems__([4, 0])
    assert torch.equal(batch.images, small.images[[4, 0]]) and batch.labels.tolist() == [1, 0]


def test_lfw_trains_on_people_with_two_images(tmp_path: Path) -> None:
    """And recognises all of the test people."""
    lists = {"Train": {"Ann": 2, "Bob": 1, "Cid": 3}, "Test": {"Dan": 1, "Eve": 2}}
    for part, counts in lists.items():
        for name, count in counts.items():
            (tmp_path / "images" / name).mkdir(parents=True)
            for number, image in enumerate(noise(count), 1):
                file = tmp_path / "images" / name / f"{name}_{number:04d}.jpg"
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
        lines = [str(len(counts)), *(f"{name}\t{count}" for name, count in counts.items())]
        (tmp_path / f"peopleDev{part}.txt").write_text("\n".join(lines) + "\n")
    faces = compare.lfw(tmp_path)
    assert faces.seen.labels.tolist() == [0, 0, 1, 1, 1]
    assert faces.unseen.labels.tolist() == [0, 1, 1]
    assert faces.seen.images.shape == (5, 3, 32, 32)


@given(st.integers(2, 9), st.integers(0, 100))
def test_all_pairs(n: int, seed: int) -> None:
    torch.manual_seed(seed)
    x = torch.nn.functional.normalize(torch.randn(n, 4, dtype=torch.float64))
    labels = torch.randint(3, (n,))
    scores, same = all_pairs(x, labels)
    first, second = torch.triu_indices(n, n, offset=1)
    assert scores.tolist() == pytest.approx((x[first] * x[second]).sum(1).tolist())
    assert torch.equal(same, labels[first] == labels[second])


@pytest.mark.program
def test_a_comparison_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """Every run is made once; a run made anew is the same."""
    from test_readme import run

    command = [PROGRAM, *TINY, "hydra.run.dir=here"]
    run([*command, "rates=[0.05,0.1]"], tmp_path)
    file = tmp_path / "here" / "compare.json"
    whole = json.loads(file.read_text())
    assert len(whole["runs"]) == 3 * 2 + 3 * 2
    assert (tmp_path / "here" / "compare.png").stat().st_size > 10_000
    ends = {(r["way"], r["seed"]): r for r in whole["runs"] if r["seed"] != compare.TUNING}
    assert ends["baseline", 0]["steps"] == 4 * ends["linear", 0]["steps"] == 12
    for one in ends.values():
        points = [steps * 8 for steps in range(1, one["steps"] + 1)]  # images, at every step
        assert [images for images, _ in one["tar_curve"]] == points
        assert [images for images, _ in one["loss_curve"]] == points
        assert one["tar_curve"][-1][1] == pytest.approx(one["tar"], abs=1e-5)

    cut = {**whole, "runs": whole["runs"][:7]}
    file.write_text(json.dumps(cut))
    run([*command, "rates=[0.05,0.1]"], tmp_path)
    again = json.loads(file.read_text())["runs"]
    assert again[:7] == whole["runs"][:7] and len(again) == len(whole["runs"])
    timeless = [{**r, "seconds": 0} for r in again]
    assert all({**r, "seconds": 0} in timeless for r in whole["runs"])
    summary = json.loads((tmp_path / "here" / "summary.json").read_text())
    tars = [line["tar"][0] for line in summary]
    assert tars == sorted(tars, reverse=True) and len(tars) == 3


@pytest.mark.parametrize(
    "words",
    [
        *("epochs=many", "seeds=1.5", "jobs=0", "synthetic.unseen=1"),
        *("only=[linear,mine]", "only=linear", "only=[]", "rivals=[mine]"),
        *("rates=0.1", "rates=[]", "rates=[true]"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_name(words: str) -> None:
    with pytest.raises(ValueError, match=f"{words.partition('=')[0]} must"):
        compare.check(composed_compare(words))


@pytest.mark.program
def test_a_wrong_setting_ends_the_program_with_one_sentence(run: Run) -> None:
    ended = run("jobs=0", program="benchmarks/compare.py")
    assert (ended.code, ended.err) == (2, "error: jobs must be at least 1, got 0\n")


@pytest.mark.program
def test_a_network_that_diverged_recognises_nobody(tmp_path: Path) -> None:
    from test_readme import run

    words = [*TINY, "only=[linear,fastface]", "rates=[1e20]", "hydra.run.dir=here"]
    run([PROGRAM, *words], tmp_path)
    rows = json.loads((tmp_path / "here" / "compare.json").read_text())["runs"]
    assert [(r["tar"], r["auc"]) for r in rows] == [(0.0, 0.5)] * 4


def test_the_curve_of_the_loss_is_a_mean_over_its_steps() -> None:
    from types import SimpleNamespace

    curves = compare.Curves(None, steps=84)  # two steps a point
    for step in range(1, 14):
        images = torch.zeros(8, 1)
        curves.on_train_batch_end(
            SimpleNamespace(global_step=step),
            None,
            {"loss": torch.tensor(float(step))},
            (images, images),
            step - 1,
        )
    assert curves.loss == [(16 * i, 2 * i - 0.5) for i in range(1, 7)]


@pytest.mark.parametrize(
    ("name", "rivals"),
    [
        ("compare_lfw", ["linear", "baseline"]),
        ("compare_synthetic", ["linear", "baseline"]),
        ("compare_short", ["linear", "baseline"]),
        ("compare_knobs", ["fastface"]),
    ],
)
def test_a_summary_is_what_its_runs_show(name: str, rivals: list[str]) -> None:
    folder = ROOT / "benchmarks" / "results" / name
    runs = json.loads((folder / "compare.json").read_text())["runs"]
    counted = [run for run in sorted(runs, key=lambda run: run["seed"]) if run["seed"] < 1000]
    lines = json.loads((folder / "summary.json").read_text())
    rows_of = {
        line["way"]: [r for r in counted if (r["way"], r["lr"]) == (line["way"], line["lr"])]
        for line in lines
    }
    for line in lines:
        assert json.loads(json.dumps(compare.line_of(line["way"], rows_of, rivals))) == line
