"""Figures and tables of a run: what the loss did, what the schedule saw, what the rate became."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..files import printable
from ..schedule.base import Progress
from ..schedule.replay import replay

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from ..schedule import Schedule

MAX_POINTS = 1500
Curve = tuple[ArrayLike, ArrayLike]  # (N,) optimizer steps and a value at each


def replay_figure(
    losses: Sequence[float],
    schedule: Schedule,
    total_steps: int | None = None,
    lr: float = 1.0,
    logged_lr: Sequence[float] | None = None,
) -> Figure:
    """What a schedule would have done: :func:`schedule_figure` of losses that one already has.

    Args:
        losses: of all optimizer steps, in order, at least one.
        schedule: FastFace, MHLR or another schedule.
        total_steps: optimizer steps of the run; None for as many as there are losses.
        lr: base learning rate.
        logged_lr: learning rate of each step in a recorded run, to compare.

    Example:
        >>> from fastface_lightning import FastFace
        >>> losses = [5 - min(step, 400) / 100 for step in range(2000)]
        >>> replay_figure(losses, FastFace(), lr=0.1).savefig("replay.png")  # doctest: +SKIP
    """
    steps, total_steps = range(len(losses)), total_steps or len(losses)
    changes = replay(losses, schedule, total_steps, lr)
    progress, lrs, seen = Progress.start(schedule, total_steps), [], []
    for loss in losses:
        lrs.append(lr * progress.state.scale)
        progress = progress.update(loss)
        metrics = progress.metrics()
        seen.append([metrics.get(name, math.nan) for name in ("response", "threshold")])
    response, threshold = np.transpose(seen)
    figure = schedule_figure(
        (steps, losses),
        (steps, response) if np.isfinite(response).any() else None,
        threshold,
        {"lr": (steps, lrs)},
        [change.step for change in changes],
        None if logged_lr is None else (steps, logged_lr),
    )
    name, count = type(schedule).__name__, len(changes)
    figure.suptitle(f"{name} on {len(losses):,} steps: {count} change{'s' * (count != 1)}")
    return figure


def schedule_figure(
    loss: Curve,
    response: Curve | None,
    threshold: ArrayLike | None,
    lrs: Mapping[str, Curve],
    changes: Sequence[int],
    logged_lr: Curve | None = None,
) -> Figure:
    """Loss, response with its threshold, and learning rate, a panel each over the optimizer steps.

    Args:
        loss: of training; over it stands the mean of a fiftieth of the run.
        response: the detector's; None leaves the panel out.
        threshold: at the steps of the response, below which it counts as flat, on gray ground.
        lrs: learning rates by name, on a logarithmic axis; empty leaves the panel out.
        changes: steps at which the learning rate changed, marked in every panel.
        logged_lr: learning rate of a recorded run, to compare.
    """
    panels = 1 + (response is not None) + bool(lrs)
    figure, axes = new_figure(1.2 + 1.6 * panels, panels)
    steps, losses = loss
    axes[0].plot(*thin(*loss), color="0.75", linewidth=0.8, label="loss", **_dots(losses))
    smooth = _smooth(np.asarray(losses, float))
    axes[0].plot(*thin(steps, smooth), color="tab:blue", linewidth=1.4, label="smoothed")
    axes[0].set_ylabel("loss")
    legend_above(axes[0])
    if logged_lr is not None:
        wide: Any = {"color": "0.8", "linewidth": 5, "label": "in the log"}
        axes[-1].step(*thin(*logged_lr), where="post", **wide)
    for number, (name, (steps, lr)) in enumerate(lrs.items()):
        style: Any = {"color": f"C{number + 2}", **_dots(lr)}
        axes[-1].step(*thin(steps, lr), where="post", label=name, **style)
        if (np.asarray(lr) > 0).any():
            axes[-1].set_yscale("log")
        axes[-1].set_ylabel("learning rate")
    if len(lrs) + (logged_lr is not None) > 1:
        legend_above(axes[-1])
    mark_changes(axes, changes)
    if response is not None:
        _draw_response(axes, *response, threshold)
    return figure


def _draw_response(
    axes: Sequence[Axes], steps: ArrayLike, response: ArrayLike, threshold: ArrayLike | None
) -> None:
    """The response in the second panel; in all of them gray ground where it is flat."""
    values = np.asarray(response, float)
    limits = np.full(len(values), np.nan) if threshold is None else np.asarray(threshold, float)
    style: Any = {"color": "tab:orange", "linewidth": 1, **_dots(values)}
    axes[1].plot(*thin(steps, values), label="response", **style)
    axes[1].plot(*thin(steps, limits), color="black", linestyle="--", label="threshold")
    axes[1].set_ylabel("response")
    legend_above(axes[1])
    finite = limits[np.isfinite(limits)]
    if len(finite):  # in sight, be the first peak of the response far above it or all below
        limit, seen = float(finite.max()), values[np.isfinite(values)]
        low = min(float(np.percentile(seen, 1)) if len(seen) else 0.0, 0.0)
        high = float(seen.max(initial=1.2 * limit))
        axes[1].set_ylim(max(low, -8 * limit), min(high, 12 * limit) or 1.0)
    steps = np.asarray(steps)
    places = np.linspace(steps[0], steps[-1], 1000)  # a finer stretch is not seen
    flat = (values < limits)[np.searchsorted(steps, places, side="right") - 1]
    for axis in axes:
        ground: Any = {"transform": axis.get_xaxis_transform(), "color": "0.5", "linewidth": 0}
        axis.fill_between(places, 0, 1, where=flat, alpha=0.13, **ground)


def new_figure(height: float, panels: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure as wide as the page, of some panels over one x axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, height), layout="constrained")
    return figure, [*np.atleast_1d(figure.subplots(panels, 1, sharex=True))]


def readable(text: str, limit: int = 100) -> str:
    """A stranger's text as matplotlib draws it: its first ``limit`` characters, a ``$`` taken for
    itself.

    What the font has no shape for is escaped as Python does: control characters, marks of writing
    direction, undecodable bytes of a file name (``\\udc..``) and other scripts.
    """
    from matplotlib.font_manager import findfont, get_font

    font = get_font(findfont("DejaVu Sans"))  # comes with matplotlib
    shown = (
        char
        if char.isprintable() and font.get_char_index(ord(char))
        else char.encode("unicode_escape").decode("ascii")
        for char in text[:limit]
    )
    return "".join(shown).replace("$", r"\$") + ("…" if len(text) > limit else "")


def legend_above(axis: Axes) -> None:
    """The legend beside the panel's upper edge, where no curve is."""
    axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=4, borderaxespad=0, frameon=False)


def mark_changes(axes: Sequence[Axes], changes: Sequence[int]) -> None:
    """Mark the changes of the learning rate in every panel of a figure over optimizer steps."""
    for axis in axes:
        for step in changes:
            axis.axvline(step, color="tab:red", linewidth=0.8, alpha=0.6)
        axis.grid(alpha=0.2)
    axes[-1].set_xlabel("optimizer step")


def thin(x: ArrayLike, y: ArrayLike) -> tuple[NDArray[Any], NDArray[np.float64]]:
    """A curve at MAX_POINTS points or fewer: the lowest and the highest of each stretch, and NaN.

    Args:
        x: (N,) places of the points.
        y: (N,) their values.

    Returns:
        Places and values of the points that are kept.
    """
    x, y = np.asarray(x), np.asarray(y, float)
    if len(y) <= MAX_POINTS:
        return x, y
    # NaN is the lowest and the highest of its stretch: a gap stays one.
    stretches = np.array_split(np.arange(len(y)), MAX_POINTS // 2)
    kept = [part[end(y[part])] for part in stretches for end in (np.argmin, np.argmax)]
    return x[np.unique(kept)], y[np.unique(kept)]


def _dots(values: ArrayLike) -> dict[str, Any]:
    """A line through few points shows them; of one point there is no line."""
    return {"marker": "."} if np.size(values) <= 50 else {}


def _smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean of the finite values over a fiftieth of the run, as far as it reaches at the ends."""
    window = np.ones(max(1, len(values) // 50))
    finite = np.isfinite(values)
    count = np.convolve(finite, window, "same")
    total = np.convolve(np.where(finite, values, 0), window, "same")
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def summary(results: dict[str, Any], folder: str | Path) -> str:
    """A run's ``results.json`` as a table of text, 100 columns wide."""
    from rich.console import Console
    from rich.table import Table

    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    for name, verified in results["verification"].items():
        accuracy = "none: no embedding is finite"
        if verified["accuracy"] is not None:
            accuracy = f"{verified['accuracy']:.2%} ± {verified['std']:.2%}"
            if results["verified_step"] != results["steps"]:
                accuracy += f" at step {results['verified_step']:,}"
        if verified["accuracy_before"] is not None:
            accuracy += f" (before training {verified['accuracy_before']:.2%}, chance 50 %)"
        table.add_row(f"verification {name}", accuracy)
        if "raw_accuracy" in verified:
            table.add_row("by the raw weights", f"{verified['raw_accuracy']:.2%}")
    if results["best"]:
        best = results["best"]
        table.add_row("best checkpoint", f"{best['accuracy']:.2%} at step {best['step']:,}")
    if results["averaging"]:
        table.add_row("averaging", results["averaging"])
    if results["final_loss"] is not None:
        of = f"mean of the last {min(results['steps'], 100)} steps"
        table.add_row("loss", f"{results['final_loss']:.4f} ({of})")
    lr = f"{results['final_lr']:.3g} at the end"
    changes = results["lr_changes"]
    if changes:  # the rate before the first, and after each
        lr = f"{changes[0]['lr'] / changes[0]['factor']:.3g}"
        lr += "".join(f", from step {c['step'] + 1:,} on {c['lr']:.3g}" for c in changes)
    table.add_row("learning rate", lr)
    table.add_row("trained", f"{results['steps']:,} steps, {results['images']:,} images")
    table.add_row("speed", f"{results['images_per_second']:,.0f} images/s on {results['device']}")
    table.add_row("time", f"{results['wall_seconds']:,.0f} s")
    table.add_row("peak memory", f"{results['peak_memory_bytes'] / 2**30:.2f} GiB")
    table.add_row("files", printable(str(folder)))
    console = Console(markup=False, width=100, file=io.StringIO())
    console.print(table)
    lines = str(console.file.getvalue()).splitlines()  # type: ignore[attr-defined]
    return "\n".join(line.rstrip() for line in lines)


def duration(seconds: float) -> str:
    """Two units, as people say it."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if minutes else f"{rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def print_plan(plan: dict[str, Any]) -> None:
    """Print a run's ``plan.json`` as two tables and a line on time."""
    from rich.console import Console
    from rich.table import Table

    console, chosen, heads = Console(), plan["classifier"], plan["heads"]
    title = (
        f"Plan: {plan['model']}, {plan['num_classes']:,} identities, batch {plan['batch_size']}, "
        f"{plan['precision']}, on {plan['device']}"
    )
    if plan["ranks"] > 1:
        title += f", one of {plan['ranks']}"
    held = Table(title=title, title_justify="left", box=None, padding=(0, 2))
    for column in ("held", "backbone", f"classifier={chosen}"):
        held.add_column(column, justify="left" if column == "held" else "right")
    for row, key in {
        "weights": "weights",
        "gradients": "gradients",
        "optimizer": "states",
        "activations, images": "activations",
        "logits, working memory": "work",
        "optimizer's temporaries": "update",
    }.items():
        held.add_row(row, _size(plan["backbone"][key]), _size(heads[chosen][key]))
    if plan["average"]:
        held.add_row("averaged weights", _size(plan["average"]), "")
    fits = Table(box=None, padding=(0, 2))
    fits.add_column("with")
    fits.add_column("peak", justify="right")
    fits.add_column(f"of {_size(plan['capacity'])}")
    for name, head in heads.items():
        label = f"classifier={name}" + (f", chunk {head['chunk']:,}" if head["chunk"] else "")
        label += f", {head['images']:,} images"
        label += f", {head['encoded']:,} in the second encoder" if head["encoded"] else ""
        fits.add_row(label, _size(head["peak"]), "fits" if head["fits"] else "does not fit")
    console.print(held, fits)
    petaflop = plan["flops"] / 1e15
    figure = f"{petaflop:,.0f}" if petaflop >= 100 else f"{petaflop:.3g}"
    text = f"  {plan['batches']:,} batches compute {figure} PFLOP"
    if plan["ranks"] > 1:
        text += " on each device"
    if plan["reserve"]:
        text += (
            f": at least {duration(3600 * plan['hours'])}, at the speed of the paper's RTX 4090 "
            f"and where the data come as fast. Peaks include {_size(plan['reserve'])} for the "
            f"GPU's libraries"
        )
    console.print(text + ".", soft_wrap=True)
    if not heads[chosen]["fits"]:
        fit = " or ".join(f"classifier={name}" for name, head in heads.items() if head["fits"])
        remedy = fit or "a smaller data.batch_size or model.grad_checkpointing=true"
        console.print(
            f"  This run does not fit; {remedy} {'would' if fit else 'might'} fit.", soft_wrap=True
        )


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
