"""A sweep's table, file and map: what each job was, what came of it, and which jobs failed."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from PIL import Image
from programs import ROOT, Run

from fastface_lightning import FastFace, replay
from fastface_lightning.cli import find_recipes
from fastface_lightning.report.sweep import Row, print_rows, settings, sweep_figure
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


def read_jobs(sweep: Path) -> list[Row]:
    return json.loads((sweep / "sweep.json").read_text())


def texts(rows: list[Row], title: str = "verification accuracy") -> list[str]:
    """What the cells of a map say, row by row from below."""
    figure = sweep_figure(rows)
    assert figure is not None
    (axis,) = (axis for axis in figure.axes if axis.get_title() == title)
    cells = {text.get_position()[::-1]: text.get_text() for text in axis.texts}
    return [cells[at] for at in sorted(cells)]


def windows(ema: Any, haar: Any) -> dict[str, Any]:
    return {"schedule__ema_window": ema, "schedule__haar_window": haar}


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
    counts = {}
    for (ema, haar), job in jobs.items():
        made = replay(losses, FastFace(ema_window=ema, haar_window=haar), 1500, lr=0.1)
        assert job["changes"] == [change._asdict() for change in made]
        assert (job["steps"], job["result"], job["error"]) == (1500, None, None)
        assert (sweep / job["folder"] / "replay.png").is_file()
        counts[ema, haar] = len(made)
    assert len(set(counts.values())) == 4  # else a map turned round would pass
    expected = [counts[8, 12], counts[50, 12], counts[8, 60], counts[50, 60]]
    assert texts([*jobs.values()], "changes of the learning rate") == [*map(str, expected)]
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
        *(
            "-m",
            "schedule=fastface",
            "+sweep=ema_haar",
            f"{EMA}=0,5",
            f"{HAAR}=5,10",
            f"hydra.sweep.dir={sweep}",
        ),
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
    assert ended.out.index(f"failed: 0 {EMA}=0 {HAAR}=5: {told}") > ended.out.index("Sweep of 4")
    assert (sweep / "sweep.png").is_file()


def test_the_table_reads_from_best_to_failed(capsys: pytest.CaptureFixture[str]) -> None:
    print_rows(
        [
            row(3, None, (), **windows(5, 20)),
            row(0, 0.5, (), **windows(10, 20)),
            row(1, error="no [such] thing", **windows(40, 20)),
            row(2, 0.875, (1234, 5000), **windows("[red]", 20)),
        ]
    )
    title, head, *lines = (line.split() for line in capsys.readouterr().out.splitlines())
    assert title == ["Sweep", "of", "4", "jobs"]
    assert head == ["ema_window", "accuracy", "changes", "first", "at", "seconds", "folder"]
    assert lines[0] == ["[red]", "87.50%", "2", "1,234", "1.0", "2"]
    assert lines[1] == ["10", "50.00%", "0", "1.0", "0"]
    assert lines[2] == ["5", "0", "1.0", "3"]
    assert " ".join(lines[3]) == f"failed: 1 {EMA}=40: no [such] thing" and len(lines) == 4


def test_a_cell_is_the_mean_of_its_jobs_over_the_seeds() -> None:
    results = {(10, 20): [0.5, 0.7], (9, 20): [0.25, None], (10, 5): [0.125], (9, 5): [None]}
    rows = [
        row(0, result, error="bad" if result is None else None, seed=seed, **windows(ema, haar))
        for (ema, haar), found in results.items()
        for seed, result in enumerate(found)
    ]
    assert texts(rows) == ["failed", "12.50%", "25.00%\n1 failed", "60.00%"]


def test_axes_are_in_order_and_a_haar_window_upwards() -> None:
    rows = [
        row(i, 0.5, (24, 60), schedule__haar_window=haar, schedule__ema_window=ema)
        for i, (ema, haar) in enumerate([("10", 10), ("9", 10), ("1e3", 10), ("null", 20)])
    ]
    rows.append(row(4, None, (), **windows("9", 20)))
    figure = sweep_figure(rows)
    assert figure is not None
    axis = figure.axes[0]
    labels = [label.get_text() for label in axis.get_xticklabels()]
    assert labels == ["null", "9", "10", "1e3"]
    assert (axis.get_xlabel(), axis.get_ylabel()) == (EMA, HAAR) and axis.get_ylim() == (-0.5, 1.5)
    assert texts(rows) == ["50.00%", "50.00%", "50.00%", "50.00%", "none"]
    assert texts(rows, "first change, share of the run")[-2:] == ["25%", "none"]


@pytest.mark.filterwarnings("error")
def test_one_setting_of_strange_values_is_drawn(tmp_path: Path) -> None:
    rows = [
        row(i, i / 20, (10,), data__root=name) for i, name in enumerate(["$_{", "a$b$", "\x00李"])
    ]
    figure = sweep_figure(rows)
    assert figure is not None
    figure.savefig(tmp_path / "sweep.png")
    seeds = [row(i, 0.5, seed=i) for i in range(2)]
    assert texts(seeds) == ["50.00%", "50.00%"]


def test_one_setting_that_is_no_number_has_bars() -> None:
    rows = [row(0, 0.8, schedule="constant"), row(1, 0.9, schedule="fastface")]
    figure = sweep_figure([*rows, row(2, error="bad", schedule="mhlr")])
    assert figure is not None
    axis = figure.axes[0]
    assert [bar.get_width() for bar in axis.patches] == [0.8, 0.9, 0]
    assert [text.get_text().strip() for text in axis.texts] == ["80.00%", "90.00%", "failed"]


def test_nothing_is_drawn_of_nothing() -> None:
    three = [row(i, 0.5, a=i, b=-i, c=i) for i in range(2)]
    failed = [row(i, error="bad", a=i) for i in range(2)]
    without = [row(i, None, None, a=i) for i in range(2)]
    for rows in (three, failed, without, [row(0, 0.5, a=1)]):
        assert sweep_figure(rows) is None
