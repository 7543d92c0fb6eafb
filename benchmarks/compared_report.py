"""What the runs of the comparison show: a table, its JSON and two figures."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

from compared_run import Row
from rich.console import Console
from rich.table import Table

from fastface_lightning.files import write_text

BASELINE, PLANNED = "baseline", ("planned_", "trapezoid_20")
SHOWN = {"accuracy": "accuracy", "tar": "TAR at FAR 1e-2", "tar_1e-3": "TAR at 1e-3"}
# Student's t: the 95 % interval of a mean of n values is T95[n] standard errors to each side; of
# more than ten it is taken as wide as of ten.
T95 = [math.nan, math.nan, 12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]


class Line(NamedTuple):
    """Runs of one way and one rate, seed by seed, and which weights of theirs are judged."""

    rows: list[Row]
    weights: str
    at_edge: bool = False
    """Whether the best rate was the lowest or the highest that was tried."""


class Mean(NamedTuple):
    """A mean over seeds, and how far its 95 % interval reaches to each side; None of one seed."""

    value: float
    reach: float | None
    number: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        n = len(values)
        if n == 1:
            return cls(values[0], None, 1)
        return cls(mean(values), T95[min(n, len(T95) - 1)] * stdev(values) / math.sqrt(n), n)

    def percent(self) -> str:
        reach = " (1 run)" if self.reach is None else f" ± {100 * self.reach:.1f}"
        return f"{100 * self.value:.1f}{reach}"


def report(lines: dict[str, Line], rivals: list[str], plotted: list[str], folder: Path) -> None:
    """Print what the runs show, keep it as ``summary.json``, draw ``curves.png`` of some lines and
    ``ends.png``."""
    table = Table(title="People not trained on, mean over seeds and 95 % interval (%)")
    summary = sorted(
        (summary_of(name, lines, rivals) for name in lines), key=lambda line: -line["tar"].value
    )
    for column in summary[0]:
        table.add_column(column)
    for line in summary:
        table.add_row(*(v.percent() if isinstance(v, Mean) else str(v) for v in line.values()))
    Console(width=200).print(table)
    write_text(folder / "summary.json", json.dumps(summary, indent=1) + "\n")
    draw_curves(lines, plotted, folder / "curves.png")
    draw_ends(lines, folder / "ends.png")


def summary_of(name: str, lines: dict[str, Line], rivals: list[str]) -> Row:
    """What a line shows, also above some others."""
    line = lines[name]
    rows = line.rows
    lr = f"{rows[0]['lr']:g}" + " (edge)" * line.at_edge
    summary: Row = {"way": name, "lr": lr, "weights": line.weights, "seeds": len(rows)}
    summary |= {figure: Mean.of(ends(line, figure)) for figure in SHOWN}
    for rival in rivals:
        for figure in ("accuracy", "tar"):
            above = None if rival == name else difference(line, lines[rival], figure)
            summary[f"{figure} - {rival}"] = above
    summary["images"] = share_to_reach(line, lines.get(BASELINE))
    first = [f"{row['changes'][0][0] / row['steps']:.2f}" for row in rows if row["changes"]]
    summary["changes"] = " ".join(str(len(row["changes"])) for row in rows) if first else ""
    summary["first at"] = " ".join(first)
    summary["processors"] = ", ".join(sorted({row["processor"] for row in rows}))
    return summary


def ends(line: Line, figure: str) -> list[float]:
    """A figure of every run's last weights."""
    return [row["points"][-1][1][line.weights][figure] for row in line.rows]


def difference(line: Line, other: Line, figure: str) -> Mean | None:
    """A figure above that of another line, seed by seed: equal seeds on processors of one type
    begin with the same weights and differ by the way alone."""
    values, theirs = (
        {
            (row["seed"], row["processor"]): end
            for row, end in zip(each.rows, ends(each, figure), strict=True)
        }
        for each in (line, other)
    )
    pairs = [value - theirs[pair] for pair, value in values.items() if pair in theirs]
    return Mean.of(pairs) if pairs else None


def share_to_reach(line: Line, baseline: Line | None) -> float | None:
    """Images until the mean TAR is within a point of where the baseline's ends, and stays there,
    over the baseline's images; None if it never is."""
    if baseline is None:
        return None
    goal = mean(ends(baseline, "tar")) - 0.01
    all_images = baseline.rows[0]["points"][-1][0]
    curve = mean_curve(line, "tar")
    short = [i for i, (_, value) in enumerate(curve) if value < goal]
    first = short[-1] + 1 if short else 0
    return None if first == len(curve) else round(curve[first][0] / all_images, 3)


def mean_curve(line: Line, figure: str) -> list[tuple[int, float]]:
    """A figure over the images seen, the mean over the seeds."""
    return [
        (points[0][0], mean(figures[line.weights][figure] for _, figures in points))
        for points in zip(*(row["points"] for row in line.rows), strict=True)
    ]


def draw_curves(lines: dict[str, Line], plotted: list[str], path: Path) -> None:
    """Accuracy and TAR of some lines over the images seen, from an eighth of the longest run on;
    runs planned for other lengths by their ends."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    figure = Figure(figsize=(13, 5), layout="constrained")
    curves = {name: lines[name] for name in plotted if name in lines}
    most = max(line.rows[0]["points"][-1][0] for line in curves.values()) if curves else 0
    for axis, which in zip(figure.subplots(1, 2), ("tar", "accuracy"), strict=True):
        for name, line in curves.items():
            curve = [(n / 1e3, 100 * v) for n, v in mean_curve(line, which) if 8 * n >= most]
            axis.plot(*zip(*curve, strict=True), label=name)
        planned = [
            (line.rows[0]["points"][-1][0] / 1e3, Mean.of([100 * v for v in ends(line, which)]))
            for name, line in lines.items()
            if name.startswith(PLANNED) and " + " not in name
        ]
        if planned:
            lengths, means = zip(*sorted(planned), strict=True)
            axis.errorbar(
                lengths,
                [end.value for end in means],
                [end.reach or 0 for end in means],
                fmt="ko",
                capsize=3,
                label="runs of that length",
            )
        axis.set(xlabel="images seen, thousands", ylabel=f"{SHOWN[which]}, %", xscale="log")
        axis.xaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_locator=NullLocator())
        axis.xaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
    axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)


def draw_ends(lines: dict[str, Line], path: Path) -> None:
    """Where every run ended."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1 + 0.24 * len(lines)), layout="constrained")
    order = sorted(lines, key=lambda name: mean(ends(lines[name], "tar")))
    for axis, which in zip(figure.subplots(1, 2, sharey=True), ("tar", "accuracy"), strict=True):
        for place, name in enumerate(order):
            values = [100 * value for value in ends(lines[name], which)]
            end: Any = Mean.of(values)
            color = "C1" if " + " in name else "C0"
            axis.plot(values, [place] * len(values), ".", color="0.7")
            axis.errorbar(end.value, place, xerr=end.reach, fmt="o", color=color, capsize=3)
        reached = [100 * value for line in lines.values() for value in ends(line, which)]
        axis.set_xlim(min(reached) - 2, max(reached) + 2)  # two seeds' interval may be far wider
        axis.set(xlabel=f"{SHOWN[which]} at the end, %")
        axis.set(yticks=range(len(order)), yticklabels=order)
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
