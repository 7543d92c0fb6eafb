"""A sweep's jobs side by side: what each was, what came of it, and a map over what was swept."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from omegaconf import OmegaConf

from ..files import write_text
from .figures import readable

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Row = dict[str, Any]
# What a map shows, by its title, and how.
FORMS = {
    "verification accuracy": ".2%",
    "changes of the learning rate": ".3g",
    "first change, share of the run": ".0%",
}


def report_sweep(sweep: Path) -> None:
    """Write ``sweep.json``, print the table, best first, and draw ``sweep.png``.

    Args:
        sweep: folder of the sweep, ended or stopped, whose jobs have a folder each.
    """
    rows = record_jobs(sweep)
    print_rows(rows)
    figure = sweep_figure(rows)
    if figure is not None:
        figure.savefig(sweep / "sweep.png", dpi=130)
    print(f"sweep.json{' and sweep.png are' if figure else ' is'} in {sweep}", flush=True)


def record_jobs(sweep: Path) -> list[Row]:
    """Write what each job was and what came of it as ``sweep.json``, in the order of their numbers.

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
        folder, record = overrides.parents[1], {}
        failure = folder / "failure.txt"
        error = failure.read_text(encoding="utf-8").strip() if failure.is_file() else None
        for name in ("replay.json", "results.json"):
            if error is None and (folder / name).is_file():
                record = json.loads((folder / name).read_text(encoding="utf-8"))
        accuracies = [each["accuracy"] for each in record.get("verification", {}).values()]
        row = {
            "folder": folder.relative_to(sweep).as_posix(),
            "overrides": list(OmegaConf.load(overrides)),
            "result": sum(accuracies) / len(accuracies) if accuracies else None,
            "steps": record.get("steps", record.get("total_steps")),
            "changes": record.get("lr_changes", record.get("changes")),
            "final_loss": record.get("final_loss"),
            "wall_seconds": record.get("wall_seconds"),
            "error": error,
        }
        before = earlier.get(row["folder"], row)
        achieved = not before["error"] and before["overrides"] == row["overrides"]
        rows.append(before if row["error"] and achieved else row)
    write_text(file, json.dumps(rows, indent=2) + "\n")
    return rows


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


def print_rows(rows: Sequence[Row]) -> None:
    """The jobs as a table, best first; below it those that failed, with their one-line errors."""
    from rich.console import Console
    from rich.table import Table

    keys, console = swept_keys(rows), Console(markup=False)
    short = [key.rpartition(".")[2] for key in keys]
    names = short if len({*short}) == len(keys) else keys
    lines = []
    ended = [row for row in rows if not row["error"]]
    for row in sorted(ended, key=lambda row: -(row["result"] or 0)):
        of_job, changes = settings(row), row["changes"]
        cells = dict(zip(names, (of_job.get(key, "") for key in keys), strict=True))
        for name, value, form in (
            ("accuracy", row["result"], ".2%"),
            ("changes", None if changes is None else len(changes), "d"),
            ("first at", changes[0]["step"] if changes else None, ",d"),
            ("loss", row["final_loss"], ".4f"),
            ("seconds", row["wall_seconds"], ",.1f"),
        ):
            cells[name] = "" if value is None else format(value, form)
        lines.append({**cells, "folder": row["folder"]})
    if lines:
        table = Table(title=f"Sweep of {len(rows)} jobs", title_justify="left", box=None)
        columns = [name for name in lines[0] if any(line[name] for line in lines)]
        for name in columns:
            table.add_column(name, justify="right")
        for line in lines:
            table.add_row(*(line[name] for name in columns))
        console.print(table)
    for row in rows:
        if row["error"]:
            of_job = settings(row)
            name = " ".join([row["folder"], *(f"{k}={of_job[k]}" for k in keys if k in of_job)])
            console.print(f"failed: {name}: {row['error']}", soft_wrap=True)


def measures(row: Row) -> dict[str, float | None]:
    """What a job has for each map."""
    changes = row["changes"]
    first = (changes[0]["step"] + 1) / row["steps"] if changes else None
    count = None if changes is None else len(changes)
    return dict(zip(FORMS, (row["result"], count, first), strict=True))


def in_order(values: Iterable[str]) -> list[str]:
    """Each value once: numbers by size, and before them, as they came, what is none."""

    return sorted(
        dict.fromkeys(values), key=lambda value: float(value) if is_number(value) else -math.inf
    )


def is_number(value: str) -> bool:
    try:
        float(value)
    except ValueError:
        return False
    return True


def sweep_figure(rows: Sequence[Row]) -> Figure | None:
    """A map of each measure over the one or two settings that were swept, seeds averaged; bars
    where the one setting is no number.

    Every cell, or bar, says its value, how many of its jobs failed, or that there was none.

    Returns:
        None if more settings were swept beside the seed, or none, or no job has any measure.
    """
    from matplotlib.figure import Figure

    swept = swept_keys(rows)
    keys = sorted(
        [key for key in swept if key != "seed"] or swept,
        key=lambda key: key.endswith("haar_window"),
    )
    titles = [name for name in FORMS if any(measures(row)[name] is not None for row in rows)]
    if len(keys) not in (1, 2) or not titles:
        return None
    jobs: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        jobs.setdefault(tuple(settings(row).get(key, "") for key in keys), []).append(row)
    xs, *others = (in_order(values) for values in zip(*jobs, strict=True))
    ys = others[0] if others else [""]
    bars = not others and not any(map(is_number, xs))
    tall, wide = (len(xs), 3) if bars else (len(ys), len(xs))
    size = (max(3.4, 0.75 * wide + 1.2) * len(titles), max(2.0, 0.5 * tall + 1.4))
    figure = Figure(figsize=size, layout="constrained")
    for axis, title in zip(figure.subplots(1, len(titles), squeeze=False)[0], titles, strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_facecolor("0.92")
        means = np.full((len(ys), len(xs)), np.nan)
        texts = {}
        for place, cell in jobs.items():
            at = ys.index(place[1]) if others else 0, xs.index(place[0])
            values = [value for row in cell if (value := measures(row)[title]) is not None]
            failed = sum(bool(row["error"]) for row in cell)
            texts[at] = "failed" if failed == len(cell) else "none"
            if values:
                means[at] = sum(values) / len(values)
                texts[at] = format(means[at], FORMS[title]) + (
                    f"\n{failed} failed" if failed else ""
                )
        if bars:
            axis.barh(range(len(xs)), np.nan_to_num(means[0]), color="tab:blue", alpha=0.6)
            for (_, i), text in texts.items():
                axis.text(0, i, f" {text}".replace("\n", ", "), va="center", fontsize=8)
            axis.set_yticks(range(len(xs)), [readable(x, 20) for x in xs])
            axis.set_ylabel(readable(keys[0]))
            axis.invert_yaxis()
            continue
        axis.imshow(np.ma.masked_invalid(means), origin="lower", aspect="auto")
        middle = (np.nanmin(means) + np.nanmax(means)) / 2  # dark below, where text is white
        for (j, i), text in texts.items():
            color = "white" if means[j, i] <= middle else "black"
            axis.text(i, j, text, ha="center", va="center", color=color, fontsize=8)
        axis.set_xticks(range(len(xs)), [readable(x, 20) for x in xs])
        axis.set_yticks(range(len(ys)), [readable(y, 20) for y in ys])
        axis.set_xlabel(readable(keys[0]))
        axis.set_ylabel(readable(keys[1]) if others else "")
        axis.tick_params(left=bool(others))
    if max(map(len, jobs.values())) > 1:
        figure.suptitle("means over the seeds", fontsize=10)
    return figure
