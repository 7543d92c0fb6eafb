"""A sweep's table, file and map: what each job was, what came of it, and which jobs failed."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from PIL import Image
from programs import ROOT, Run

from fastface_lightning import FastFace, replay
from fastface_lightning.cli import find_recipes
from fastface_lightning.report.sweep import (
    Row,
    accuracy,
    best_first,
    change_count,
    draw_map,
    first_change,
    grid_of,
    in_order,
    matrix,
    plot_rows,
    print_rows,
    read_jobs,
    settings,
    swept_keys,
)
from fastface_lightning.schedule.replay import read_losses

EMA, HAAR = "schedule.ema_window", "schedule.haar_window"


def row(
    number: int = 0,
    result: float | None = None,
    changes: tuple[int, ...] | None = (),
    error: str | None = None,
    **settings: Any,
) -> Row:
    """A job of 100 steps; ``__`` in a setting's name stands for a dot."""
    return {
        "folder": str(number),
        "overrides": [f"{key.replace('__', '.')}={value}" for key, value in settings.items()],
        "result": None if error else result,
        "steps": None if error else 100,
        "changes": None
        if error or changes is None
        else [{"step": step, "factor": 0.5, "lr": 0.1} for step in changes],
        "final_loss": None,
        "wall_seconds": 1.0,
        "error": error,
    }


def windows_of(row: Row) -> tuple[int, int]:
    return int(settings(row)[EMA]), int(settings(row)[HAAR])


def windows(ema: Any, haar: Any) -> dict[str, Any]:
    return {"schedule__ema_window": ema, "schedule__haar_window": haar}


# The programs


@pytest.fixture
def loss_csv(tmp_path: Path) -> Path:
    """1,500 noisy losses that fall twice and are flat between."""
    rng = np.random.default_rng(0)
    steps = np.arange(1500)
    loss = 8 - np.minimum(steps, 300) / 100 - 2 * np.clip((steps - 800) / 200, 0, 1)
    path = tmp_path / "loss.csv"
    path.write_text("loss\n" + "\n".join(f"{v:.6f}" for v in loss + rng.normal(0, 0.3, 1500)))
    return path


def test_a_swept_replay_equals_single_replays(run: Run, tmp_path: Path, loss_csv: Path) -> None:
    sweep = tmp_path / "sweep"
    ended = run(
        *("-m", f"log={loss_csv}", "lr=0.1", f"{EMA}=8,50", f"{HAAR}=60,12"),
        f"hydra.sweep.dir={sweep}",
        program="recipes/replay.py",
    )
    assert ended.code == 0, ended.err
    losses = read_losses(loss_csv).losses
    jobs = {windows_of(job): job for job in read_jobs(sweep)}
    assert list(jobs) == [(8, 60), (8, 12), (50, 60), (50, 12)]
    assert json.loads((sweep / "sweep.json").read_text()) == list(jobs.values())
    counts = {}
    for (ema, haar), job in jobs.items():
        made = replay(losses, FastFace(ema_window=ema, haar_window=haar), 1500, lr=0.1)
        assert job["changes"] == [change._asdict() for change in made]
        assert (job["steps"], job["result"], job["error"]) == (1500, None, None)
        assert (sweep / job["folder"] / "replay.png").is_file()
        counts[ema, haar] = len(made)
    assert len(set(counts.values())) == 4  # else a map turned round would pass
    grid = grid_of(list(jobs.values()))
    assert grid is not None and (grid.x, grid.y) == (EMA, HAAR)
    assert matrix(grid, change_count).tolist() == [
        [counts[8, 12], counts[50, 12]],
        [counts[8, 60], counts[50, 60]],
    ]
    with Image.open(sweep / "sweep.png") as figure:
        assert figure.width > 800 > figure.height > 200
    assert "sweep.json and sweep.png are in" in ended.out


@pytest.mark.program
def test_the_recipe_sweeps_both_windows_also_without_m(
    run: Run, tmp_path: Path, loss_csv: Path
) -> None:
    sweep = tmp_path / "sweep"
    arguments = ["+sweep=ema_haar", f"log={loss_csv}", f"hydra.sweep.dir={sweep}"]
    ended = run(*arguments, f"{HAAR}=40", program="recipes/replay.py")
    assert ended.code == 0, ended.err
    assert [windows_of(job) for job in read_jobs(sweep)] == [(20, 40), (40, 40), (80, 40)]


def test_the_recipe_goes_with_a_paper() -> None:
    find_recipes(ROOT / "conf")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        overrides = ["+sweep=ema_haar", "+paper=f2c_fastface_ms1m", "data.root=DIR"]
        cfg = compose("train", overrides, return_hydra_config=True)
    assert cfg.hydra.sweeper.params == {EMA: "20,40,80", HAAR: "20,40,80"}
    assert cfg.classifier._target_.endswith("DynamicClassPool")
    assert {"ema_window", "haar_window"} <= set(cfg.schedule)


@pytest.mark.program
def test_a_sweep_of_runs_goes_on_past_a_bad_one(run: Run, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    ended = run(
        *("-m", "+sweep=ema_haar", f"{EMA}=0,5", f"{HAAR}=5,10", f"hydra.sweep.dir={sweep}"),
        *("data.num_identities=8", "data.images_per_identity=4", "data.verify_identities=6"),
        *("data.verify_pairs=20", "data.batch_size=8", "trainer.enable_progress_bar=false"),
        *("trainer.max_steps=4", "schedule.patience=1", "schedule.arm_after=0"),
        *("schedule.threshold=100", "schedule.threshold_mode=abs"),
    )
    told = "ema_window must be at least 1 step, got 0"
    assert ended.code == 2 and f"error: {told}" in ended.err and "Traceback" not in ended.err
    jobs = read_jobs(sweep)
    assert [job["folder"] for job in jobs] == ["0", "1", "2", "3"]
    assert [job["error"] for job in jobs] == [told, told, None, None]
    for job in jobs[2:]:
        results = json.loads((sweep / job["folder"] / "results.json").read_text())
        assert job["result"] == results["verification"]["synthetic"]["accuracy"]
        assert job["changes"] == results["lr_changes"] != []
        for key in ("final_loss", "wall_seconds", "steps"):
            assert job[key] == results[key] > 0
    assert [windows_of(job) for job in jobs] == [(0, 5), (0, 10), (5, 5), (5, 10)]
    best, other = best_first(jobs)
    assert best["result"] >= other["result"]
    assert ended.out.index(f"failed: 0 {EMA}=0 {HAAR}=5: {told}") > ended.out.index("Sweep of 4")
    assert (sweep / "sweep.png").is_file()


# The table


def test_the_best_come_first_and_those_without_a_result_last() -> None:
    jobs = [row(i, result) for i, result in enumerate([0.5, None, 0.9, math.nan, 0.7])]
    jobs.append(row(5, error="bad"))
    assert [job["folder"] for job in best_first(jobs)] == ["2", "4", "0", "1", "3"]


def test_the_table_reads_from_best_to_failed(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows(
        [
            row(0, 0.5, (), **windows(10, 20)),
            row(1, error="no [such] thing", **windows(40, 20)),
            row(2, 0.875, (1234, 5000), **windows(20, 20)),
        ]
    )
    title, head, *lines = (line.split() for line in capsys.readouterr().out.splitlines())
    assert title == ["Sweep", "of", "3", "jobs"]
    assert head == ["ema_window", "accuracy", "changes", "first", "at", "seconds", "folder"]
    assert lines[0] == ["20", "87.50%", "2", "1,234", "1.0", "2"]
    assert lines[1] == ["10", "50.00%", "0", "1.0", "0"]
    assert " ".join(lines[2]) == f"failed: 1 {EMA}=40: no [such] thing" and len(lines) == 3


def test_a_list_is_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows([row(i, 0.5, data__verify=f"[{name}]") for i, name in enumerate(("lfw", "red"))])
    out = capsys.readouterr().out
    assert "[lfw]" in out and "[red]" in out


# The map


@given(
    st.lists(
        st.tuples(
            st.sampled_from([5, 10, 100]), st.sampled_from([2, 30]), st.none() | st.floats(0, 1)
        ),
        min_size=1,
    )
)
def test_a_cell_is_the_mean_of_its_jobs(jobs: list[tuple[int, int, float | None]]) -> None:
    rows = [
        row(i, result, error="bad" if result is None else None, seed=i, **windows(ema, haar))
        for i, (ema, haar, result) in enumerate(jobs)
    ]
    grid = grid_of(rows)
    emas, haars = ({job[axis] for job in jobs} for axis in (0, 1))
    swept = [name for name, values in ((EMA, emas), (HAAR, haars)) if len(values) > 1]
    if not swept:
        assert (grid is None) == (len(jobs) == 1)
        return
    assert grid is not None and [grid.x, *([grid.y] if grid.y else [])] == swept
    values = matrix(grid, accuracy)
    for i, x in enumerate(grid.xs):
        for j, y in enumerate(grid.ys):
            here = dict(zip(swept, (int(x), int(y or 0)), strict=False))
            found = [
                result
                for ema, haar, result in jobs
                if here.get(EMA, ema) == ema and here.get(HAAR, haar) == haar and result is not None
            ]
            expected = statistics.fmean(found) if found else math.nan
            assert values[j, i] == pytest.approx(expected, nan_ok=True)


def test_measures_by_hand() -> None:
    assert first_change(row(changes=(24, 60))) == 0.25
    for failed in (row(error="bad"), row(changes=())):
        assert first_change(failed) is None and accuracy(failed) is None
    assert (change_count(row(error="bad")), change_count(row(changes=()))) == (None, 0)


def test_numbers_are_in_order_and_words_before_them() -> None:
    assert in_order(["10", "9", "null", "1e3", "9"]) == ["null", "9", "10", "1e3"]


def test_what_a_map_needs() -> None:
    assert swept_keys([row(a=1, b=2), row(a=1, b=3)]) == ["b"]
    three = [row(i, a=i, b=-i, c=i) for i in range(2)]
    assert grid_of([row(a=1)]) is None and grid_of(three) is None
    seeds = grid_of([row(i, seed=i) for i in range(2)])
    assert seeds is not None and (seeds.x, seeds.y, seeds.xs) == ("seed", "", ["0", "1"])
    haar_first = grid_of([row(i, schedule__haar_window=i, schedule__ema_window=i) for i in (1, 2)])
    assert haar_first is not None and (haar_first.x, haar_first.y) == (EMA, HAAR)


def test_cells_say_their_value_or_why_there_is_none() -> None:
    rows = [
        row(0, 0.5, **windows(10, 10)),
        row(1, error="bad", **windows(20, 10)),
        row(2, None, **windows(10, 20)),
    ]
    grid = grid_of(rows)
    assert grid is not None
    axis = Figure().subplots()
    draw_map(axis, grid, matrix(grid, accuracy), ".2%")
    assert [text.get_text() for text in axis.texts] == ["50.00%", "failed", "none", ""]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["10", "20"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == (EMA, HAAR)
    assert axis.get_ylim() == (-0.5, 1.5)  # upwards


@pytest.mark.filterwarnings("error")
def test_strange_values_are_drawn(tmp_path: Path) -> None:
    rows = [
        row(i, i / 20, (10,), data__root=name) for i, name in enumerate(["$_{", "a$b$", "\x00李"])
    ]
    assert plot_rows(tmp_path / "sweep.png", rows)


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    failed = [row(i, error="bad", a=i) for i in range(2)]
    assert not plot_rows(tmp_path / "sweep.png", failed)
    assert not plot_rows(tmp_path / "sweep.png", [row(i, None, None, a=i) for i in range(2)])
    assert not list(tmp_path.iterdir())
