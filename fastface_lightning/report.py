"""Figures and tables of a run: what the loss did, what the schedule saw, what the rate became."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

MAX_POINTS = 4000


def plot_schedule(
    path: str | Path,
    steps: Sequence[int],
    loss: Sequence[float],
    response: Sequence[float] | None = None,
    threshold: Sequence[float] | None = None,
    lr: Sequence[float] | None = None,
    logged_lr: Sequence[float] | None = None,
    changes: Sequence[int] = (),
    title: str = "",
) -> None:
    """Draw loss, response with its threshold, and learning rate over the optimizer steps.

    Args:
        path: image file to write.
        steps: optimizer step of each point.
        loss: training loss at each point.
        response: the detector's response; None leaves the panel out.
        threshold: below which a response counts as flat.
        lr: learning rate, on a logarithmic axis; None leaves the panel out.
        logged_lr: learning rate of a recorded run, to compare.
        changes: steps at which the learning rate changed, marked in every panel.
        title: of the figure.
    """
    from matplotlib.figure import Figure

    panels = 1 + (response is not None) + (lr is not None)
    figure = Figure(figsize=(9, 2.4 * panels + 0.6), layout="constrained")
    axes = iter(np.atleast_1d(figure.subplots(panels, 1, sharex=True)))
    x, pick = np.asarray(steps), _thin(len(steps))

    axis = next(axes)
    values = np.asarray(loss, float)
    axis.plot(x[pick], values[pick], color="0.75", linewidth=0.8, label="loss")
    axis.plot(x[pick], _smooth(values)[pick], color="tab:blue", linewidth=1.4, label="smoothed")
    axis.set_ylabel("loss")
    axis.legend(loc="upper right", frameon=False)
    if response is not None:
        axis = next(axes)
        values = np.asarray(response, float)
        axis.plot(x[pick], values[pick], color="tab:orange", linewidth=1, label="response")
        if threshold is not None:
            limits = np.asarray(threshold, float)
            axis.plot(x[pick], limits[pick], color="black", linestyle="--", label="threshold")
            axis.set_ylim(*_around(values, limits))
        axis.set_ylabel("response")
        axis.legend(loc="upper right", frameon=False)
    if lr is not None:
        axis = next(axes)
        if logged_lr is not None:
            wide = {"color": "0.8", "linewidth": 5, "label": "in the log"}
            axis.step(x[pick], np.asarray(logged_lr, float)[pick], where="post", **wide)
        axis.step(x[pick], np.asarray(lr, float)[pick], where="post", color="tab:green", label="lr")
        if logged_lr is not None:
            axis.legend(loc="upper right", frameon=False)
        axis.set_yscale("log")
        axis.set_ylabel("learning rate")
    for axis in figure.axes:
        for step in changes:
            axis.axvline(step, color="tab:red", linewidth=0.8, alpha=0.6)
        axis.grid(alpha=0.2)
    axis.set_xlabel("optimizer step")
    figure.suptitle(title)
    figure.savefig(path, dpi=130)


def _thin(count: int) -> np.ndarray:
    """Indices of at most MAX_POINTS evenly spaced points."""
    return np.unique(np.linspace(0, count - 1, min(count, MAX_POINTS)).round().astype(int))


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a fiftieth of the run, as far as it reaches at the ends."""
    window = max(1, len(values) // 50)
    ones = np.convolve(np.ones(len(values)), np.ones(window), "same")
    return np.convolve(values, np.ones(window), "same") / ones


def _around(response: np.ndarray, threshold: np.ndarray) -> tuple[float, float]:
    """Limits that show the threshold: the response's first peak is far above it."""
    seen = response[np.isfinite(response)]
    limit = float(np.nanmax(threshold)) if np.isfinite(threshold).any() else 0.0
    low = min(float(np.percentile(seen, 1)) if len(seen) else 0.0, 0.0)
    return max(low, -8 * limit), min(float(seen.max()) if len(seen) else 1.0, 12 * limit) or 1.0


def print_summary(results: dict[str, Any], folder: str | Path) -> None:
    """Print a run's ``results.json`` as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Run", title_justify="left", show_header=False, box=None, padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    for name, found in results["verification"].items():
        accuracy = f"{found['accuracy']:.2%} ± {found['std']:.2%}"
        if found["untrained_accuracy"] is not None:
            accuracy += f" (untrained {found['untrained_accuracy']:.2%}, chance 50 %)"
        table.add_row(f"verification {name}", accuracy)
    if results["final_loss"] is not None:
        table.add_row("loss", f"{results['final_loss']:.4f} (mean of the last 100 batches)")
    changes = ", ".join(f"step {c['step']}: {c['lr']:.3g}" for c in results["lr_changes"])
    table.add_row(
        "learning rate", f"{results['final_lr']:.3g}" + (f" ({changes})" if changes else "")
    )
    table.add_row("trained", f"{results['steps']:,} steps, {results['images']:,} images")
    table.add_row("speed", f"{results['images_per_second']:,.0f} images/s on {results['device']}")
    table.add_row("time", f"{results['wall_seconds']:,.0f} s")
    table.add_row("peak memory", f"{results['peak_memory_bytes'] / 2**30:.2f} GiB")
    table.add_row("files", str(folder))
    Console().print(table)


def print_plan(plan: dict[str, Any]) -> None:
    """Print a run's ``plan.json`` as two tables and a line on time."""
    from rich.console import Console
    from rich.table import Table

    console, this = Console(), plan["classifier"]
    title = (
        f"Plan: {plan['model']}, {plan['num_classes']:,} identities, batch {plan['batch_size']}, "
        f"{plan['precision']}, on {plan['device']}"
    )
    held = Table(title=title, title_justify="left", box=None, padding=(0, 2))
    for column in ("held", "backbone", f"classifier={this}"):
        held.add_column(column, justify="left" if column == "held" else "right")
    for row, key in {
        "weights": "weights",
        "gradients": "gradients",
        "optimizer": "states",
        "activations, images": "activations",
        "logits, working memory": "work",
        "optimizer's temporaries": "update",
    }.items():
        held.add_row(row, _size(plan["backbone"][key]), _size(plan["heads"][this][key]))
    fits = Table(box=None, padding=(0, 2))
    fits.add_column("with")
    fits.add_column("peak", justify="right")
    fits.add_column(f"of {_size(plan['capacity'])}")
    for name, head in plan["heads"].items():
        label = f"classifier={name}" + (f", chunk {head['chunk']:,}" if head["chunk"] else "")
        fits.add_row(label, _size(head["peak"]), "fits" if head["fits"] else "does not fit")
    console.print(held, fits)
    petaflop = plan["flops"] / 1e15
    figure = f"{petaflop:,.0f}" if petaflop >= 100 else f"{petaflop:.3g}"
    text = f"  {plan['batches']:,} batches compute {figure} PFLOP"
    if plan["reserve"]:
        text += (
            f": at least {plan['hours']:.3g} hours, at the speed of the paper's RTX 4090 and where "
            f"the data come as fast. Peaks include "
            f"{_size(plan['reserve'])} for the card's own libraries"
        )
    console.print(text + ".", soft_wrap=True)
    if not plan["heads"][this]["fits"]:
        console.print(f"  {_advice(plan['heads'])}", soft_wrap=True)


def _advice(heads: dict[str, Any]) -> str:
    fit = [f"classifier={name}" for name, head in heads.items() if head["fits"]]
    if fit:
        return f"This run does not fit; {' or '.join(fit)} would fit."
    return (
        "No classifier fits: a smaller data.batch_size and model.grad_checkpointing=true leave "
        "less to hold; then plan again."
    )


def _size(count: int) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
