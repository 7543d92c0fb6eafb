"""A sweep's jobs side by side: what each was, what came of it, and a map over what was swept."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..files import write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Row = dict[str, Any]


def job_row(
    folder: Path,
    sweep: Path,
    overrides: Sequence[str],
    windows: dict[str, int | None],
    seconds: float,
    error: str | None,
) -> Row:
    """What a job was and what came of it, from the record that it left in its folder.

    Args:
        folder: the job's own folder.
        sweep: folder of the sweep.
        overrides: ``key=value`` of the job, those of the whole sweep among them.
        windows: the schedule's windows as given, in optimizer steps; None: by its own rule.
        seconds: the job took.
        error: why it failed, in one line; None if it did not.

    Returns:
        Plain data. ``result`` is the verification accuracy, the mean of all sets; None where there
        is none. ``changes`` are those of the learning rate, ``steps`` the run's optimizer steps.
    """
    found = {} if error else _record_of(folder)
    accuracies = [each["accuracy"] for each in found.get("verification", {}).values()]
    return {
        "folder": Path(os.path.relpath(folder, sweep)).as_posix(),
        "overrides": list(overrides),
        "windows": windows,
        "result": sum(accuracies) / len(accuracies) if accuracies else None,
        "steps": found.get("steps", found.get("total_steps")),
        "changes": found.get("lr_changes", found.get("changes")),
        "final_loss": found.get("final_loss"),
        "wall_seconds": found.get("wall_seconds", seconds),
        "error": error,
    }


def _record_of(folder: Path) -> dict[str, Any]:
    """What train.py or replay.py wrote; nothing of another program."""
    for name in ("results.json", "replay.json"):
        if (folder / name).is_file():
            found: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
            return found
    return {}


def read_rows(sweep: Path) -> list[Row]:
    """The jobs in a sweep's ``sweep.json``, in the order they first ended."""
    file = sweep / "sweep.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []


def add_row(sweep: Path, row: Row) -> None:
    """Write a job into ``sweep.json``; a failure does not replace what the same job achieved."""
    rows = {old["folder"]: old for old in read_rows(sweep)}
    before = rows.get(row["folder"])
    achieved = before and not before["error"] and before["overrides"] == row["overrides"]
    if not (achieved and row["error"]):
        rows[row["folder"]] = row
    write_text(sweep / "sweep.json", json.dumps(list(rows.values()), indent=2) + "\n")


def report_sweep(sweep: Path) -> None:
    """Print a sweep's table, best first, name the jobs that failed, and draw ``sweep.png``."""
    rows = read_rows(sweep)
    print_rows(rows)
    drawn = plot_rows(sweep / "sweep.png", rows)
    print(f"sweep.json{' and sweep.png are' if drawn else ' is'} in {sweep}", flush=True)


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

    def place(row: Row) -> float:
        result = row["result"]
        return math.inf if result is None or math.isnan(result) else -result

    return sorted((row for row in rows if not row["error"]), key=place)


def print_rows(rows: Sequence[Row]) -> None:
    """The jobs as a table; below it those that failed, with their one-line errors."""
    from rich.console import Console
    from rich.table import Table

    keys, ended, console = swept_keys(rows), best_first(rows), Console()
    short = [key.rpartition(".")[2] for key in keys]
    columns = [
        *(
            (name, [settings(row).get(key, "") for row in ended])
            for name, key in zip(short if len({*short}) == len(keys) else keys, keys, strict=True)
        ),
        ("accuracy", [_told(row["result"], ".2%") for row in ended]),
        ("changes", [_told(change_count(row), "d") for row in ended]),
        ("first at", [f"{row['changes'][0]['step']:,}" if row["changes"] else "" for row in ended]),
        ("loss", [_told(row["final_loss"], ".4f") for row in ended]),
        ("seconds", [_told(row["wall_seconds"], ",.1f") for row in ended]),
        ("folder", [row["folder"] for row in ended]),
    ]
    table = Table(title=f"Sweep of {len(rows)} jobs", title_justify="left", box=None)
    filled = [(name, cells) for name, cells in columns if any(cells)]
    for name, _ in filled:
        table.add_column(name, justify="right")
    for line in zip(*(cells for _, cells in filled), strict=True):
        table.add_row(*line)
    if ended:
        console.print(table)
    for row in rows:
        if row["error"]:
            own = settings(row)
            name = " ".join([row["folder"], *(f"{key}={own[key]}" for key in keys if key in own)])
            console.print(f"failed: {name}: {row['error']}", markup=False, soft_wrap=True)


def _told(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


class Grid(NamedTuple):
    """The jobs of a sweep by the values of one or two swept settings."""

    x: str
    y: str | None
    """Key over the rows; None if one setting alone was swept."""
    xs: list[str]
    ys: list[str]
    cells: list[list[list[Row]]]
    """``cells[j][i]``: jobs with ``x=xs[i]`` and ``y=ys[j]``; several where seeds were swept."""


def grid_of(rows: Sequence[Row]) -> Grid | None:
    """Lay a sweep's jobs out over what was swept, a Haar window upwards, seeds together.

    Returns:
        None if more than two settings were swept beside the seed, or none.
    """
    swept = swept_keys(rows)
    axes = [key for key in swept if key != "seed"] or swept
    if len(axes) not in (1, 2):
        return None
    x, *rest = sorted(axes, key=lambda key: key.endswith("haar_window"))
    y = rest[0] if rest else None
    places = [(settings(row).get(x, ""), settings(row).get(y, "") if y else "") for row in rows]
    xs, ys = in_order(place[0] for place in places), in_order(place[1] for place in places)
    cells: list[list[list[Row]]] = [[[] for _ in xs] for _ in ys]
    for row, (at_x, at_y) in zip(rows, places, strict=True):
        cells[ys.index(at_y)][xs.index(at_x)].append(row)
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
        found = [value for row in cell if (value := measure(row)) is not None]
        return sum(found) / len(found) if found else math.nan

    return np.array([[mean(cell) for cell in line] for line in grid.cells])


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


def plot_rows(path: Path, rows: Sequence[Row]) -> bool:
    """Draw each of ``MAPS`` that any job has over what was swept.

    Returns:
        Whether there was something to draw.
    """
    from matplotlib.figure import Figure

    grid = grid_of(rows)
    if grid is None:
        return False
    maps = {
        name: (values, form)
        for name, (measure, form) in MAPS.items()
        if np.isfinite(values := matrix(grid, measure)).any()
    }
    if not maps:
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
    for j, line in enumerate(grid.cells):
        for i, cell in enumerate(line):
            value, failed = values[j, i], sum(bool(row["error"]) for row in cell)
            lost = failed > 0 and failed == len(cell)
            text = "failed" if lost else "none" if cell else ""
            colour = "tab:red" if lost else "black"
            if np.isfinite(value):
                text = format(value, form) + (f"\n{failed} failed" if failed else "")
                colour = "white" if value <= middle else "black"
            axis.text(i, j, text, ha="center", va="center", color=colour, fontsize=8)
    axis.set_xticks(range(len(grid.xs)), grid.xs)
    axis.set_yticks(range(len(grid.ys)), grid.ys)
    axis.set_xlabel(grid.x)
    axis.set_ylabel(grid.y or "")
    if grid.y is None:
        axis.tick_params(left=False)
