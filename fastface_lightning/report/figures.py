"""Figures and tables of a run: what the loss did, what the schedule saw, what the rate became."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ..files import printable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_POINTS = 1500


def plot_schedule(
    path: str | Path,
    steps: ArrayLike,
    loss: ArrayLike,
    response: ArrayLike | None = None,
    threshold: ArrayLike | None = None,
    lr: ArrayLike | None = None,
    logged_lr: ArrayLike | None = None,
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
    draw_loss(next(axes), steps, loss)
    if response is not None:
        draw_response(next(axes), steps, response, threshold)
    if lr is not None:
        axis = next(axes)
        if logged_lr is not None:
            wide = {"color": "0.8", "linewidth": 5, "label": "in the log"}
            axis.step(*thin(steps, logged_lr), where="post", **wide)
        draw_lr(axis, steps, lr)
        if logged_lr is not None:
            legend_above(axis)
    mark_changes(figure.axes, changes)
    figure.suptitle(title)
    figure.savefig(path, dpi=130)


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


def draw_loss(axis: Axes, steps: ArrayLike, loss: ArrayLike) -> None:
    """The loss, and over it the mean of a fiftieth of the run."""
    axis.plot(*thin(steps, loss), color="0.75", linewidth=0.8, label="loss", **_dots(loss))
    smooth = _smooth(np.asarray(loss, float))
    axis.plot(*thin(steps, smooth), color="tab:blue", linewidth=1.4, label="smoothed")
    axis.set_ylabel("loss")
    legend_above(axis)


def draw_response(
    axis: Axes, steps: ArrayLike, response: ArrayLike, threshold: ArrayLike | None
) -> None:
    """What the detector saw, and below what it counts as flat."""
    values = np.asarray(response, float)
    axis.plot(
        *thin(steps, values), color="tab:orange", linewidth=1, label="response", **_dots(values)
    )
    if threshold is not None:
        limits = np.asarray(threshold, float)
        axis.plot(*thin(steps, limits), color="black", linestyle="--", label="threshold")
        if np.isfinite(limits).any():
            axis.set_ylim(*_around(values, limits))
    axis.set_ylabel("response")
    legend_above(axis)


def draw_lr(axis: Axes, steps: ArrayLike, lr: ArrayLike, label: str = "lr", **style: Any) -> None:
    """The learning rate, on a logarithmic axis where it is ever above 0."""
    style = {"color": "tab:green", **_dots(lr), **style}
    axis.step(*thin(steps, lr), where="post", label=label, **style)
    if (np.asarray(lr) > 0).any():
        axis.set_yscale("log")
    axis.set_ylabel("learning rate")


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


def _around(response: NDArray[np.float64], threshold: NDArray[np.float64]) -> tuple[float, float]:
    """Limits that show the threshold, be the response's first peak far above it or all below."""
    finite = response[np.isfinite(response)]
    limit = float(threshold[np.isfinite(threshold)].max())
    low = min(float(np.percentile(finite, 1)) if len(finite) else 0.0, 0.0)
    high = float(finite.max(initial=1.2 * limit))
    return max(low, -8 * limit), min(high, 12 * limit) or 1.0


def print_summary(results: dict[str, Any], folder: str | Path) -> None:
    """Print a run's ``results.json`` as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title="Run", title_justify="left", show_header=False, box=None, padding=(0, 2))
    table.add_column(style="bold")
    table.add_column()
    for name, verified in results["verification"].items():
        accuracy = f"{verified['accuracy']:.2%} ± {verified['std']:.2%}"
        if verified["untrained_accuracy"] is not None:
            accuracy += f" (untrained {verified['untrained_accuracy']:.2%}, chance 50 %)"
        table.add_row(f"verification {name}", accuracy)
    if results["best"]:
        best = results["best"]
        table.add_row("best checkpoint", f"{best['accuracy']:.2%} at step {best['step']:,}")
    if results["final_loss"] is not None:
        table.add_row("loss", f"{results['final_loss']:.4f} (mean of the last 100 batches)")
    changes = ", ".join(f"step {c['step']}: {c['lr']:.3g}" for c in results["lr_changes"])
    lr = f"{results['final_lr']:.3g}"
    table.add_row("learning rate", f"{lr} ({changes})" if changes else lr)
    table.add_row("trained", f"{results['steps']:,} steps, {results['images']:,} images")
    table.add_row("speed", f"{results['images_per_second']:,.0f} images/s on {results['device']}")
    table.add_row("time", f"{results['wall_seconds']:,.0f} s")
    table.add_row("peak memory", f"{results['peak_memory_bytes'] / 2**30:.2f} GiB")
    table.add_row("files", printable(str(folder)))
    Console(markup=False).print(table)


def print_plan(plan: dict[str, Any]) -> None:
    """Print a run's ``plan.json`` as two tables and a line on time."""
    from rich.console import Console
    from rich.table import Table

    console, chosen = Console(), plan["classifier"]
    title = (
        f"Plan: {plan['model']}, {plan['num_classes']:,} identities, batch {plan['batch_size']}, "
        f"{plan['precision']}, on {plan['device']}"
    )
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
        held.add_row(row, _size(plan["backbone"][key]), _size(plan["heads"][chosen][key]))
    fits = Table(box=None, padding=(0, 2))
    fits.add_column("with")
    fits.add_column("peak", justify="right")
    fits.add_column(f"of {_size(plan['capacity'])}")
    for name, head in plan["heads"].items():
        label = f"classifier={name}" + (f", chunk {head['chunk']:,}" if head["chunk"] else "")
        encoded = f" + {head['encoded']:,}" if head["encoded"] else ""
        label += f", {head['images']:,}{encoded} images"
        fits.add_row(label, _size(head["peak"]), "fits" if head["fits"] else "does not fit")
    console.print(held, fits)
    petaflop = plan["flops"] / 1e15
    figure = f"{petaflop:,.0f}" if petaflop >= 100 else f"{petaflop:.3g}"
    text = f"  {plan['batches']:,} batches compute {figure} PFLOP"
    if plan["reserve"]:
        text += (
            f": at least {plan['hours']:.3g} hours, at the speed of the paper's RTX 4090 and where "
            f"the data come as fast. Peaks include "
            f"{_size(plan['reserve'])} for the GPU's own libraries"
        )
    console.print(text + ".", soft_wrap=True)
    if any(head["encoded"] for head in plan["heads"].values()):
        console.print(
            "  a + b images: in a step a go through the network, and b through its second encoder.",
            soft_wrap=True,
        )
    if not plan["heads"][chosen]["fits"]:
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
