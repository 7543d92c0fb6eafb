"""The evidence: what is trained, kept and counted is what the program says."""

import functools
import json
import math
import statistics
from pathlib import Path
from typing import Any

import compared_report as shown
import compared_run as made
import pytest
import torch
from common import all_pairs
from compared_report import Line
from hypothesis import given
from hypothesis import strategies as st
from models import noise
from PIL import Image
from programs import ROOT, Run, load

from fastface_lightning.data import is_held_out
from fastface_lightning.data.datasets.in_memory import downsampled

PROGRAM = str(ROOT / "benchmarks" / "compare.py")
compare = load(ROOT / "benchmarks" / "compare.py")
TINY = (
    *("epochs=1", "batch_size=8", "seeds=2", "jobs=1", "only=[baseline,fastface,linear]"),
    *("synthetic.identities=8", "synthetic.images=3", "synthetic.unseen=24", "rivals=[baseline]"),
)
RATES = ("rates=[0.05,0.1]", "rates_of.baseline=[0.05]")


def row(
    way: str, seed: int, tar: float, lr: float = 0.01, ema: float = 0.1, **more: Any
) -> dict[str, Any]:
    images = [800, 1600, 2400, 3200] if way == "baseline" else [200, 400, 600, 800]
    points = [
        [
            n,
            {
                "raw": {"accuracy": 0.9, "tar": tar * s, "tar_1e-3": tar / 2, "tuning_tar": tar},
                "ema_100": {"accuracy": 0.8, "tar": 0.1, "tar_1e-3": 0.1, "tuning_tar": ema},
                "power_10": {"accuracy": 0.8, "tar": 0.2, "tar_1e-3": 0.1, "tuning_tar": 0.2},
            },
        ]
        for n, s in zip(images, (0.25, 0.5, 0.75, 1.0), strict=True)
    ]
    begin = {"way": way, "lr": lr, "seed": seed, "steps": 100, "changes": [[50, 0.5]]}
    return (
        begin | {"seconds": 1.0, "processor": "one", "loss": [[800, 1.0]], "points": points} | more
    )


@given(st.lists(st.floats(0, 1), min_size=2, max_size=10))
def test_the_interval_is_students(values: list[float]) -> None:
    from scipy.stats import t

    of_seeds = shown.Mean.of(values)
    error = statistics.stdev(values) / math.sqrt(len(values))
    assert of_seeds.value == pytest.approx(statistics.mean(values))
    assert of_seeds.reach == pytest.approx(t.ppf(0.975, len(values) - 1) * error, rel=1e-3)
    assert shown.Mean.of(values[:1]) == (values[0], None, 1)


def test_ways_are_compared_by_seed_and_processor() -> None:
    mine = [row("fastface", seed, tar) for seed, tar in enumerate((0.50, 0.62, 0.70))]
    theirs = [row("linear", seed, tar) for seed, tar in enumerate((0.49, 0.60))]
    theirs.append(row("linear", 2, 0.1, processor="another"))
    lines = Line(mine, "raw"), Line(theirs, "raw")
    assert shown.difference(*lines, "tar") == pytest.approx((0.015, 12.71 * 0.005, 2), rel=1e-3)
    assert shown.difference(*lines, "accuracy").value == 0
    assert shown.difference(Line(mine, "ema_100"), lines[1], "accuracy").value == pytest.approx(
        -0.1
    )
    assert shown.difference(lines[0], Line(theirs[2:], "raw"), "tar") is None


@pytest.mark.parametrize(
    ("tar", "share"),
    [(0.80, 1 / 4), (1.2, 3 / 16), (0.5, None)],
)
def test_images_until_a_point_below_the_baseline(tar: float, share: float | None) -> None:
    baseline = Line([row("baseline", seed, 0.81) for seed in range(2)], "raw")
    rows = [row("fastface", seed, tar) for seed in range(2)]
    reached = shown.share_to_reach(Line(rows, "raw"), baseline)
    assert reached == (share if share is None else pytest.approx(share, abs=1e-3))
    for one in rows:
        one["points"].append([1000, {"raw": {"tar": 0.1}}])  # what is lost again is not reached
    assert shown.share_to_reach(Line(rows, "raw"), baseline) is None


def test_a_way_has_the_rate_and_window_that_recognised_most_tuning_people(tmp_path: Path) -> None:
    kept = compare.Kept(tmp_path / "compare.json", composed_compare())
    for lr, tar, ema in ((0.005, 0.4, 0.7), (0.01, 0.6, 0.6), (0.02, 0.5, 0.5)):
        kept._keep(row("constant", compare.TUNING, tar, lr, ema=ema))
        kept._keep(row("linear", compare.TUNING, 1 - tar, lr))
    kept._keep(row("constant", 0, 0.9, 0.02))  # a run that counts chooses nothing
    kept._keep(row("constant", compare.TUNING, 0.9, 0.05))  # nor a rate that is not in the grid
    chosen = kept.choose("constant")
    assert (chosen["raw"], chosen["ema"]) == ((0.01, "raw"), (0.005, "ema_100"))
    assert kept.choose("constant_long") == kept.choose("constant")
    assert kept.choose("linear")["raw"] == (0.005, "raw")
    for seed in (3, 1, 0):
        kept._keep(row("linear", seed, seed / 10, 0.01))
    runs = [compare.Run("linear", 0.01, seed) for seed in (0, 1)]
    assert [each["seed"] for each in kept.of(runs, "linear", 0.01)] == [0, 1]


def test_two_programs_may_add_to_one_file(tmp_path: Path) -> None:
    more = composed_compare("+schedule@ways.mine=linear")
    one, other = (compare.Kept(tmp_path / "compare.json", c) for c in (composed_compare(), more))
    one._keep(row("linear", 0, 0.5))
    other._keep(row("mine", 0, 0.4))
    one._keep(row("linear", 1, 0.6))
    both = compare.Kept(tmp_path / "compare.json", composed_compare())
    assert [(r["way"], r["seed"]) for r in both.rows] == [("linear", 0), ("mine", 0), ("linear", 1)]
    assert both.ways.keys() == other.ways.keys()


@functools.cache
def composed_compare(*overrides: str) -> Any:
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("compare", list(overrides))


@pytest.mark.parametrize(
    "setting", ["epochs=3", "synthetic.images=2", "root=LFW", "averages.power_05.window=0.2"]
)
def test_runs_of_other_settings_are_not_mixed(tmp_path: Path, setting: str) -> None:
    file = tmp_path / "compare.json"
    compare.Kept(file, composed_compare())._keep(row("linear", 0, 0.5))
    before = file.read_text()
    with pytest.raises(ValueError, match=r"has runs with .* give another hydra.run.dir"):
        compare.Kept(file, composed_compare(setting))
    with pytest.raises(ValueError, match="has runs with fastface="):
        compare.Kept(file, composed_compare("ways.fastface.patience=0.1"))
    with pytest.raises(ValueError, match="has runs with fastface="):
        compare.Kept(file, composed_compare("+times.fastface=2"))
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
    """And recognises all of the test people: a third to tune by, the rest to report on."""
    people = {f"Person_{n}": 1 + n % 2 for n in range(30)}
    lists = {"Train": {"Ann": 2, "Bob": 1, "Cid": 3}, "Test": people}
    for part, counts in lists.items():
        for name, count in counts.items():
            (tmp_path / "images" / name).mkdir(parents=True)
            for number, image in enumerate(noise(count), 1):
                file = tmp_path / "images" / name / f"{name}_{number:04d}.jpg"
                Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
        lines = [str(len(counts)), *(f"{name}\t{count}" for name, count in counts.items())]
        (tmp_path / f"peopleDev{part}.txt").write_text("\n".join(lines) + "\n")
    faces = made.lfw(tmp_path)
    assert faces.seen.labels.tolist() == [0, 0, 1, 1, 1]
    tuning = [n for name, n in people.items() if is_held_out(name, 1 / 3)]
    assert 5 <= len(tuning) <= 15 and faces.tuning.num_classes == len(tuning)
    assert len(faces.tuning) == sum(tuning)
    assert len(faces.unseen) == 45 - sum(tuning)
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
    run([*command, *RATES], tmp_path)
    file = tmp_path / "here" / "compare.json"
    whole = json.loads(file.read_text())
    counted = [r for r in whole["runs"] if r["seed"] != compare.TUNING]
    assert len(whole["runs"]) - len(counted) == 2 * 2 + 1
    for name in ("curves.png", "ends.png"):
        assert (tmp_path / "here" / name).stat().st_size > 10_000
    steps = {(r["way"], r["seed"]): r["steps"] for r in counted}
    assert steps["baseline", 0] == 4 * steps["linear", 0] == 12
    for one in whole["runs"]:
        points = [steps * 8 for steps in range(1, one["steps"] + 1)]  # images, at every step
        assert [images for images, _ in one["points"]] == points
        assert [images for images, _ in one["loss"]] == points
        assert set(one["points"][0][1]) == {"raw", *whole["settings"]["averages"]}
        assert one["points"][0][1]["raw"] == one["points"][0][1]["power_10"]  # of one step

    cut = {**whole, "runs": whole["runs"][:3]}
    file.write_text(json.dumps(cut))
    run([*command, *RATES], tmp_path)
    again = json.loads(file.read_text())["runs"]
    assert again[:3] == whole["runs"][:3] and len(again) == len(whole["runs"])
    timeless = [{**r, "seconds": 0} for r in again]
    assert all({**r, "seconds": 0} in timeless for r in whole["runs"])
    summary = json.loads((tmp_path / "here" / "summary.json").read_text())
    tars = [line["tar"][0] for line in summary]
    assert tars == sorted(tars, reverse=True) and len(tars) == 9


@pytest.mark.program
def test_rivals_of_other_packages_train(tmp_path: Path) -> None:
    from test_readme import run

    words = [*TINY, "only=[greedy,schedule_free]", "rates=[0.01]", "rates_of.schedule_free=[0.3]"]
    run([PROGRAM, *words, "seeds=1", "rivals=[]", "hydra.run.dir=here"], tmp_path)
    rows = json.loads((tmp_path / "here" / "compare.json").read_text())["runs"]
    greedy, free = rows[-2:]
    assert set(free["points"][-1][1]) == {"raw"} and len(greedy["points"][-1][1]) == 5


@pytest.mark.parametrize(
    "words",
    [
        *("epochs=many", "seeds=1.5", "jobs=0", "synthetic.unseen=1"),
        *("only=[linear,mine]", "only=linear", "only=[]", "times.baseline=1.02"),
        *("rates=0.1", "rates=[]", "rates=[true]", "rates_of.baseline=[0]"),
        *("rivals=[mine]", "rivals=[linear + best]", "plotted=[linear + best]"),
        *("+times.mine=2", "+rates_of.mine=[0.1]", "tuned_as.constant_long=mine"),
    ],
)
def test_a_wrong_setting_is_refused_by_its_name(words: str) -> None:
    with pytest.raises(
        ValueError, match=f"{words.partition('=')[0].split('.')[0].strip('+')}.* must"
    ):
        compare.check(composed_compare(words))


@pytest.mark.program
def test_a_wrong_setting_ends_the_program_with_one_sentence(run: Run) -> None:
    ended = run("jobs=0", program="benchmarks/compare.py")
    assert (ended.code, ended.err) == (2, "error: jobs must be at least 1, got 0\n")


@pytest.mark.program
def test_a_network_that_diverged_recognises_nobody(tmp_path: Path) -> None:
    from test_readme import run

    words = [*TINY, "only=[linear,fastface]", "rates=[1e20]", "rivals=[]", "hydra.run.dir=here"]
    run([PROGRAM, *words], tmp_path)
    rows = json.loads((tmp_path / "here" / "compare.json").read_text())["runs"]
    ends = [r["points"][-1][1]["raw"] for r in rows]
    assert [(end["accuracy"], end["tar"]) for end in ends] == [(0.5, 0.0)] * len(rows)


def faces_of(people: int) -> made.Faces:
    images, labels = torch.zeros(2 * people, 3, 8, 8).byte(), torch.arange(people).repeat(2)
    return made.Faces(*3 * [made.InMemoryDataset(images, labels)])


def test_the_curve_of_the_loss_is_a_mean_over_its_steps() -> None:
    from types import SimpleNamespace

    curves = made.Curves(faces_of(8), {}, None, None, epochs=6, steps=14, last=84)  # two a point
    curves.judges = ()
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
