"""A sweep's jobs side by side: what each was, what came of it, and a map over what was swept."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from omegaconf import OmegaConf

from ..files import write_text
from .figures import readable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]


def report_sweep(sweep: Path) -> None:
    """Write ``sweep.json``, print the table, best first, and draw ``sweep.png``.

    Args:
        sweep: folder of the sweep, ended or stopped, whose jobs have a folder each.
    """
    rows = read_jobs(sweep)
    write_text(sweep / "sweep.json", json.dumps(rows, indent=2) + "\n")
    print_rows(rows)
    drawn = plot_rows(sweep / "sweep.png", rows)
    print(f"sweep.json{' and sweep.png are' if drawn else ' is'} in {sweep}", flush=True)


def read_jobs(sweep: Path) -> list[Row]:
    """What each job was and what came of it, in the order of their numbers.

    A job that ended well in an earlier sweep into this folder, as ``sweep.json`` knows, and was
    refused when the same command was given again, keeps what it achieved.

    Returns:
        Plain data: ``folder``; ``overrides`` (``key=value`` each); ``result``, the verification
        accuracy, mean of all sets; the run's optimizer ``steps``; ``changes`` of the learning rate;
        ``final_loss``; ``wall_seconds``; ``error``, why it failed, in one line. None: there is
        none.
    """
    file = sweep / "sweep.json"
    old_rows = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    earlier = {row["folder"]: row for row in old_rows}
    rows = []
    for overrides in sorted(
        sweep.glob("*/**/.hydra/overrides.yaml"), key=lambda path: (len(str(path)), path)
    ):
        row = job_row(overrides.parents[1], sweep)
        before = earlier.get(row["folder"], row)
        achieved = not before["error"] and before["overrides"] == row["overrides"]
        rows.append(before if row["error"] and achieved else row)
    return rows


def job_row(folder: Path, sweep: Path) -> Row:
    """One row of :func:`read_jobs`, from what Hydra, the program and its failure left."""
    failure = folder / "failure.txt"
    error = failure.read_text(encoding="utf-8").strip() if failure.is_file() else None
    record: dict[str, Any] = {}
    for name in ("replay.json", "results.json"):
        if error is None and (folder / name).is_file():
            record = json.loads((folder / name).read_text(encoding="utf-8"))
    accuracies = [each["accuracy"] for each in record.get("verification", {}).values()]
    return {
        "folder": folder.relative_to(sweep).as_posix(),
        "overrides": list(OmegaConf.load(folder / ".hydra" / "overrides.yaml")),
        "result": sum(accuracies) / len(accuracies) if accuracies else None,
        "steps": record.get("steps", record.get("total_steps")),
        "changes": record.get("lr_changes", record.get("changes")),
        "final_loss": record.get("final_loss"),
        "wall_seconds": record.get("wall_seconds"),
        "error": error,
    }


def settings(row: Row) -> dict[str, str]:
    """A job's overrides by key."""
    return {key: value for key, _, value in (text.partition("=") for text in row["overrides"])}


def swept_keys(rows: Iterable[Row]) -> list[str]:
    """Keys whose value is not the same in all jobs."""
    values: dict[str, set[str]] = {}
    for row in rows:
        for key, value in settings(row).items():
            values.setdefault(key, set()).add(value)
    return [key for key, different in values.items() if len(different) > 1]


def best_first(rows: Iterable[Row]) -> list[Row]:
    """The jobs that did not fail, by falling result; those without one last, as they came."""

    def rank(row: Row) -> float:
        result = row["result"]
        return math.inf if result is None or math.isnan(result) else -result

    return sorted((row for row in rows if not row["error"]), key=rank)


def print_rows(rows: Sequence[Row]) -> None:
    """The jobs as a table; below it those that failed, with their one-line errors."""
    from rich.console import Console
    from rich.table import Table

    keys, ended, console = swept_keys(rows), best_first(rows), Console(markup=False)
    names = [key.rpartition(".")[2] for key in keys]
    columns = {
        name: [settings(row).get(key, "") for row in ended]
        for name, key in zip(names if len({*names}) == len(keys) else keys, keys, strict=True)
    }
    for name, measure, form in (
        ("accuracy", accuracy, ".2%"),
        ("changes", change_count, "d"),
        ("first at", lambda row: row["changes"][0]["step"] if row["changes"] else None, ",d"),
        ("loss", lambda row: row["final_loss"], ".4f"),
        ("seconds", lambda row: row["wall_seconds"], ",.1f"),
    ):
        values = [measure(row) for row in ended]
        columns[name] = ["" if value is None else format(value, form) for value in values]
    columns["folder"] = [row["folder"] for row in ended]
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    table = Table(title=f"Sweep of {len(rows)} jobs", title_justify="left", box=None)
    for name in columns:
        table.add_column(name, justify="right")
    for line in zip(*columns.values(), strict=True):
        table.add_row(*line)
    if ended:
        console.print(table)
    for row in rows:
        if row["error"]:
            of_job = settings(row)
            name = " ".join([row["folder"], *(f"{k}={of_job[k]}" for k in keys if k in of_job)])
            console.print(f"failed: {name}: {row['error']}", soft_wrap=True)


def accuracy(row: Row) -> float | None:
    """Verification accuracy of a job."""
    return row["result"]


def change_count(row: Row) -> int | None:
    """How often a job's learning rate changed."""
    return None if row["changes"] is None else len(row["changes"])


def first_change(row: Row) -> float | None:
    """When it first did, as a share of the run; None if it never did."""
    return (row["changes"][0]["step"] + 1) / row["steps"] if row["changes"] else None


MAPS: dict[str, tuple[Callable[[Row], float | None], str]] = {
    "verification accuracy": (accuracy, ".2%"),
    "changes of the learning rate": (change_count, ".3g"),
    "first change, share of the run": (first_change, ".0%"),
}


class Grid(NamedTuple):
    """The jobs of a sweep by the values of one or two swept settings."""

    x: str
    y: str  # key over the rows; empty if one setting alone was swept
    xs: list[str]
    ys: list[str]
    cells: list[list[list[Row]]]  # [j][i]: jobs with x=xs[i] and y=ys[j], several of several seeds


def grid_of(rows: Sequence[Row]) -> Grid | None:
    """Lay a sweep's jobs out over what was swept, a Haar window upwards, seeds together.

    Returns:
        None if more than two settings were swept beside the seed, or none.
    """
    swept = swept_keys(rows)
    axes = [key for key in swept if key != "seed"] or swept
    if len(axes) not in (1, 2):
        return None
    x, y = (*sorted(axes, key=lambda key: key.endswith("haar_window")), "")[:2]
    places = [(settings(row).get(x, ""), settings(row).get(y, "")) for row in rows]
    xs, ys = in_order(place[0] for place in places), in_order(place[1] for place in places)
    cells: list[list[list[Row]]] = [[[] for _ in xs] for _ in ys]
    for row, (x_value, y_value) in zip(rows, places, strict=True):
        cells[ys.index(y_value)][xs.index(x_value)].append(row)
    return Grid(x, y, xs, ys, cells)


def in_order(values: Iterable[str]) -> list[str]:
    """Each value once: numbers by size, and before them, as they came, what is none."""

    def size(value: str) -> float:
        try:
            return float(value)
        except ValueError:
            return -math.inf

    return sorted(dict.fromkeys(values), key=size)


def matrix(grid: Grid, measure: Callable[[Row], float | None]) -> NDArray[np.float64]:
    """(len(ys), len(xs)) means of a measure over each cell's jobs; NaN where none has it."""

    def mean(cell: list[Row]) -> float:
        values = [value for row in cell if (value := measure(row)) is not None]
        return sum(values) / len(values) if values else math.nan

    return np.array([[mean(cell) for cell in line] for line in grid.cells])


def plot_rows(path: Path, rows: Sequence[Row]) -> bool:
    """Draw each of ``MAPS`` that any job has over what was swept.

    Returns:
        Whether there was something to draw.
    """
    from matplotlib.figure import Figure

    grid = grid_of(rows)
    maps = {name: (matrix(grid, measure), form) for name, (measure, form) in MAPS.items() if grid}
    maps = {name: each for name, each in maps.items() if np.isfinite(each[0]).any()}
    if grid is None or not maps:
        return False
    size = (max(3.4, 0.75 * len(grid.xs) + 1.2) * len(maps), max(2.0, 0.5 * len(grid.ys) + 1.4))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(maps), squeeze=False)[0]
    for axis, (name, (values, form)) in zip(axes, maps.items(), strict=True):
        draw_map(axis, grid, values, form)
        axis.set_title(name, fontsize=10)
    if any(len(cell) > 1 for line in grid.cells for cell in line):
        figure.suptitle("means over the seeds", fontsize=10)
    figure.savefig(path, dpi=130)
    return True


def draw_map(axis: Axes, grid: Grid, values: NDArray[np.float64], form: str) -> None:
    """One map; every cell says its value, how many of its jobs failed, or that there was none."""
    axis.imshow(np.ma.masked_invalid(values), origin="lower", aspect="auto")
    axis.set_facecolor("0.92")
    middle = (np.nanmin(values) + np.nanmax(values)) / 2  # dark below, where text is white
    for (j, i), value in np.ndenumerate(values):
        cell = grid.cells[j][i]
        failed = sum(bool(row["error"]) for row in cell)
        if np.isfinite(value):
            text = format(value, form) + (f"\n{failed} failed" if failed else "")
            color = "white" if value <= middle else "black"
        elif failed and failed == len(cell):
            text, color = "failed", "tab:red"
        else:
            text, color = "none" if cell else "", "black"
        axis.text(i, j, text, ha="center", va="center", color=color, fontsize=8)
    axis.set_xticks(range(len(grid.xs)), [readable(x, 20) for x in grid.xs])
    axis.set_yticks(range(len(grid.ys)), [readable(y, 20) for y in grid.ys])
    axis.set_xlabel(readable(grid.x))
    axis.set_ylabel(readable(grid.y))
    if not grid.y:
        axis.tick_params(left=False)
