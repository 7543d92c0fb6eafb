"""A run on one page: ``report.html`` needs no other file and no network, and says what to see."""

from __future__ import annotations

import base64
import csv
import io
import json
import os
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from omegaconf import OmegaConf
from PIL import Image

from ..files import printable, write_text
from .curves import plot_roc
from .figures import draw_loss, draw_lr, draw_response, legend_above, mark_changes, readable, thin

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text that can be searched, in the page's own font
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "0.6",
    "xtick.color": "0.35",
    "ytick.color": "0.35",
    "legend.frameon": False,
}
CONTENTS = {
    "config.yaml": "every setting, as it was",
    "overrides.yaml": "the settings given on the command line",
    "identities.txt": "names of the people trained on, by label",
    "metrics.csv": "what was logged, by optimizer step",
    "results.json": "the figures at the top of this page",
    "roc.json": "ROC of the last verification",
    "samples.png": "faces of the training data",
    "schedule.png": "loss, response and learning rate",
    "train.log": "what the program said",
    "best.ckpt": "the network of the best verification",
    "last.ckpt": "the last network, from which resume=auto goes on",
}


class Run(NamedTuple):
    """What a run folder holds; what is missing is empty."""

    folder: Path
    settings: str  # config.yaml as it is
    config: dict[str, Any]
    overrides: list[str]
    metrics: dict[str, Curve]  # of each column, the steps and values of its cells
    results: dict[str, Any]
    roc: dict[str, Curve]  # of each verification set, FAR and TAR
    samples: str  # the contact sheet, as an address that holds it
    notes: list[str]  # what a reader must know before the figures


class Tile(NamedTuple):
    """One key figure."""

    name: str
    value: str
    note: str = ""


class Plot(NamedTuple):
    """A figure of the page: what it is of, what to look for, or why it is not there."""

    title: str
    draw: Callable[[Run], Figure | None]
    caption: str
    otherwise: str


def write_report(folder: Path) -> Path:
    """Write ``report.html`` into a run folder, whole or not at all.

    Args:
        folder: of a run of ``train.py``, ended or killed. What is missing or cannot be read is left
            out, and the page says so.

    Returns:
        The file, which opens without a network and can be sent alone.

    Raises:
        ValueError: the folder holds neither ``config.yaml`` nor ``metrics.csv``.
    """
    run = read_run(folder)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("page.html.jinja").render(
        title=title_of(run),
        ended=ended(run),
        notes=run.notes,
        tiles=tiles(run),
        overrides=run.overrides,
        settings=run.settings,
        plots=[(plot, svg(run, plot)) for plot in PLOTS],
        changes=run.results.get("lr_changes", []),
        samples=run.samples,
        bad_images=run.results.get("bad_images", []),
        environment=environment_of(run),
        files=files_of(run),
    )
    report = folder / "report.html"
    write_text(report, printable(page))
    return report


# Reading ------------------------------------------------------------------------------------------


def read_run(folder: Path) -> Run:
    """Read what there is.

    Raises:
        ValueError: neither ``config.yaml`` nor ``metrics.csv`` is there.
    """
    if not any((folder / name).is_file() for name in ("config.yaml", "metrics.csv")):
        raise ValueError(f"a run folder must hold config.yaml or metrics.csv, got {folder}")
    notes: list[str] = []

    def read(name: str, parse: Callable[[bytes], Any], empty: Any) -> Any:
        file = folder / name
        if not file.is_file():
            return empty
        try:
            return parse(file.read_bytes())
        except Exception as error:  # a page with a hole is better than none
            notes.append(f"{name} cannot be read ({type(error).__name__}).")
            return empty

    if not (folder / "results.json").is_file():
        notes.append("There is no results.json: the run has not come to its end.")
    run = Run(
        folder,
        settings=read("config.yaml", lambda data: data.decode(errors="replace"), ""),
        config=read("config.yaml", _config, {}),
        overrides=read("overrides.yaml", lambda data: list(OmegaConf.create(data.decode())), []),
        metrics=read("metrics.csv", read_metrics, {}),
        results=read("results.json", lambda data: dict(json.loads(data)), {}),
        roc=read("roc.json", _roc, {}),
        samples=read("samples.png", _data_uri, ""),
        notes=notes,
    )
    _, losses = run.metrics.get("train/loss", (None, np.empty(0)))
    lost = np.count_nonzero(np.isnan(losses))
    if lost:
        notes.append(f"{lost:,} of {len(losses):,} logged losses are not finite.")
    return run


def _config(data: bytes) -> dict[str, Any]:
    return dict(OmegaConf.to_container(OmegaConf.create(data.decode())))  # type: ignore[arg-type]


def read_metrics(data: bytes) -> dict[str, Curve]:
    """Steps and values of each column where its cells are filled; NaN for what is not finite."""
    points: dict[str, list[tuple[float, float]]] = {}
    for row in csv.DictReader(io.StringIO(data.decode(errors="replace"))):
        step = _number(row.get("step"))
        if np.isnan(step):
            continue
        for name, cell in row.items():
            if name and cell:
                points.setdefault(name, []).append((step, _number(cell)))
    arrays = {name: np.array(column) for name, column in points.items()}
    return {name: (array[:, 0], array[:, 1]) for name, array in arrays.items()}


def _number(text: str | None) -> float:
    """A finite number or NaN; the last line of a killed run may be torn."""
    try:
        value = float(text or "nan")
    except ValueError:
        return float("nan")
    return value if np.isfinite(value) else float("nan")


def _roc(data: bytes) -> dict[str, Curve]:
    curves = {}
    for name, curve in json.loads(data).items():
        far, tar = np.array([curve["far"], curve["tar"]], float)
        curves[name] = far, tar
    return curves


def _data_uri(data: bytes) -> str:
    """An image as an address that holds it, as a JPEG: a PNG of faces is ten times as long."""
    jpeg = io.BytesIO()
    with Image.open(io.BytesIO(data)) as picture:
        picture.convert("RGB").save(jpeg, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode("ascii")


# Words and numbers --------------------------------------------------------------------------------


def title_of(run: Run) -> str:
    """Model, data and schedule, as the command names them."""
    model = _setting(run, "model", "name") or _choice(run, "model")
    data, schedule = _choice(run, "data"), _choice(run, "schedule")
    if not (model and data and schedule):
        return f"Run {run.folder.resolve().name}"
    return f"{model} on {data}, schedule {schedule}"


def _choice(run: Run, group: str) -> str:
    """What the command line chose of a group of settings, else the class it is made of."""
    for text in reversed(run.overrides):
        key, _, value = str(text).partition("=")
        if key == group:
            return value
    return _setting(run, group, "_target_").rpartition(".")[2]


def _setting(run: Run, group: str, key: str) -> str:
    settings = run.config.get(group)
    return str(settings.get(key) or "") if isinstance(settings, dict) else ""


def ended(run: Run) -> str:
    """When the run last wrote down something of its own."""
    files = [run.folder / name for name in ("config.yaml", "metrics.csv", "results.json")]
    last = max(file.stat().st_mtime for file in files if file.is_file())
    return f"{datetime.fromtimestamp(last).astimezone():%Y-%m-%d %H:%M %Z}"


def tiles(run: Run) -> list[Tile]:
    """The key figures, in the order in which they are asked for."""
    results = run.results
    found = []
    for name, (accuracy, std, untrained) in verification(run).items():
        note = [] if std is None else [f"± {std:.2%}"]
        note += [] if untrained is None else [f"untrained {untrained:.2%}"]
        found.append(Tile(f"accuracy, {name}", f"{accuracy:.2%}", ", ".join(note)))
    best = best_of(run)
    if best is not None:
        found.append(Tile("best step", f"{best[0]:,.0f}", f"mean accuracy {best[1]:.2%}"))
    if results.get("final_loss") is not None:
        found.append(
            Tile("final loss", f"{results['final_loss']:.4g}", "mean of the last 100 batches")
        )
    elif "train/loss" in run.metrics:
        steps, losses = run.metrics["train/loss"]
        found.append(Tile("last logged loss", f"{losses[-1]:.4g}", f"at step {steps[-1]:,.0f}"))
    if "images_per_second" in results:
        speed, images = results["images_per_second"], results.get("images", 0)
        found.append(Tile("images/s", f"{speed:,.0f}", f"{images:,} images in all"))
    if "wall_seconds" in results:
        steps_done = f"{results.get('steps', 0):,} steps"
        found.append(Tile("wall time", duration(results["wall_seconds"]), steps_done))
    if "peak_memory_bytes" in results:
        memory = f"{results['peak_memory_bytes'] / 2**30:.2f} GiB"
        found.append(Tile("peak memory", memory, results.get("device", "")))
    return found


def verification(run: Run) -> dict[str, tuple[float, float | None, float | None]]:
    """Last accuracy of each set, its standard deviation, and the untrained network's accuracy."""
    if run.results.get("verification"):
        return {
            name: (found["accuracy"], found.get("std"), found.get("untrained_accuracy"))
            for name, found in run.results["verification"].items()
        }
    last: dict[str, tuple[float, float | None, float | None]] = {}
    for name, (steps, accuracy) in accuracies(run).items():
        _, std = run.metrics.get(f"verify/{name}/std", (None, [None]))
        last[name] = accuracy[-1], std[-1], accuracy[0] if steps[0] == 0 else None
    return last


def accuracies(run: Run) -> dict[str, Curve]:
    """Accuracy of each verification set over the run."""
    cut = re.compile(r"verify/(.+)/accuracy")
    return {
        match[1]: curve for name, curve in run.metrics.items() if (match := cut.fullmatch(name))
    }


def best_of(run: Run) -> tuple[float, float] | None:
    """Step and mean accuracy of the best verification, by the results or else by the metrics."""
    best = run.results.get("best")
    if best:
        return best["step"], best["accuracy"]
    steps, mean = run.metrics.get("verify/accuracy", (np.empty(0), np.empty(0)))
    if not np.isfinite(mean).any():
        return None
    at = np.nanargmax(mean)
    return steps[at], mean[at]


def duration(seconds: float) -> str:
    """Two units, as people say it."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def environment_of(run: Run) -> dict[str, str]:
    """Where the run ran, and on what."""
    results = run.results
    own = {key: results[key] for key in ("device", "precision") if key in results}
    return {**own, **(results.get("environment") or results.get("versions", {}))}


def files_of(run: Run) -> list[tuple[str, str, str, str]]:
    """Of each file of the run: its address, its name, its size and what it holds."""
    files = sorted([*run.folder.glob("*"), *run.folder.glob("checkpoints/*")])
    return [
        (quote(os.fsencode(name)), name, _size(file.stat().st_size), CONTENTS.get(file.name, ""))
        for file in files
        if file.is_file() and not file.name.startswith(("report.html", "."))
        for name in [file.relative_to(run.folder).as_posix()]
    ]


def _size(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


# Figures ------------------------------------------------------------------------------------------


def loss_and_lr(run: Run) -> Figure | None:
    """Loss over learning rate, with what the schedule took for plateaus."""
    lrs = {name: curve for name, curve in run.metrics.items() if name.startswith("lr-")}
    if "train/loss" not in run.metrics:
        return None
    figure, axes = _figure(4.4 if lrs else 2.8, 1 + bool(lrs))
    draw_loss(axes[0], *run.metrics["train/loss"])
    for number, (name, curve) in enumerate(lrs.items()):
        draw_lr(axes[1], *curve, label=name[len("lr-") :], color=f"C{number + 2}")
    if len(lrs) > 1:
        legend_above(axes[1])
    _mark(run, axes)
    return figure


def response(run: Run) -> Figure | None:
    """The detector's response and its threshold."""
    if "fastface/response" not in run.metrics:
        return None
    figure, axes = _figure(2.8)
    draw_response(axes[0], *_response(run))
    _mark(run, axes)
    return figure


def _response(run: Run) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Steps, response and threshold, which is NaN at the first steps, where there is none yet."""
    nothing = np.empty(0), np.empty(0)
    steps, values = run.metrics.get("fastface/response", nothing)
    thresholds = dict(zip(*run.metrics.get("fastface/threshold", nothing), strict=True))
    return steps, values, np.array([thresholds.get(step, np.nan) for step in steps])


def verification_over_time(run: Run) -> Figure | None:
    """Accuracy of each set, within its standard deviation, their mean and the best of it."""
    from matplotlib.ticker import PercentFormatter

    sets, best = accuracies(run), best_of(run)
    if not sets:
        return None
    figure, (axis,) = _figure(2.9)
    late = []  # what the second half of each set's curve spans
    for name, (steps, accuracy) in sets.items():
        (line,) = axis.plot(steps, accuracy, marker="o", markersize=3.5, label=_label(name))
        _, std = run.metrics.get(f"verify/{name}/std", (steps, np.zeros(len(steps))))
        if len(std) == len(accuracy):
            low, high = accuracy - std, accuracy + std
            axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
            late += [*low[len(low) // 2 :], *high[len(high) // 2 :]]
    if len(sets) > 1 and "verify/accuracy" in run.metrics:
        axis.plot(*run.metrics["verify/accuracy"], color="black", linestyle="--", label="mean")
    if best is not None:
        star = {"marker": "*", "markersize": 13, "markerfacecolor": "gold", "color": "black"}
        axis.plot(*best, linestyle="", markeredgewidth=0.7, label="best", **star)
    if np.isfinite(late).any():  # where the untrained network was would flatten all that follows
        low, high = np.nanmin(late), np.nanmax(late)
        axis.set_ylim(bottom=max(axis.get_ylim()[0], low - 2 * (high - low)))
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.set_ylabel("accuracy")
    axis.set_xlabel("optimizer step")
    axis.grid(alpha=0.2)
    axis.legend(loc="lower right")
    _plain_legend(axis)
    return figure


def roc(run: Run) -> Figure | None:
    """True acceptances over false ones, of each set."""
    if not run.roc:
        return None
    figure, (axis,) = _figure(3.4)
    plot_roc(axis, {_label(name): curve for name, curve in run.roc.items()})
    _plain_legend(axis)
    return figure


def throughput(run: Run) -> Figure | None:
    """Images a second over the run, and their mean."""
    if "train/images_per_second" not in run.metrics:
        return None
    figure, (axis,) = _figure(2.4)
    steps, speed = thin(*run.metrics["train/images_per_second"])
    axis.plot(steps, speed, marker="." if len(steps) <= 50 else "", label="images/s")
    if "images_per_second" in run.results:
        mean = {"color": "black", "linestyle": "--", "linewidth": 1, "label": "mean of the run"}
        axis.axhline(run.results["images_per_second"], **mean)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("optimizer step")
    axis.set_ylabel("images/s")
    axis.grid(alpha=0.2)
    legend_above(axis)
    return figure


PLOTS = (
    Plot(
        "Loss and learning rate",
        loss_and_lr,
        "Red lines are changes of the learning rate, and on grey ground the response is below its "
        "threshold: there the smoothed loss should be flat, and fall again after a change.",
        "No loss was logged.",
    ),
    Plot(
        "Response against threshold",
        response,
        "The response is how fast the loss falls: where it has long been below the dashed "
        "threshold the learning rate is divided, and it should rise again; a first peak may be cut "
        "off.",
        "This schedule does not watch the loss, or nothing was logged.",
    ),
    Plot(
        "Verification over time",
        verification_over_time,
        "Accuracy on people never trained on, within one standard deviation over the folds: curves "
        "that fall after the star mean that the later steps did harm; a low start may be cut off.",
        "The run was not verified, or nothing was logged.",
    ),
    Plot(
        "ROC",
        roc,
        "Share of one person's pairs that pass, where a share of two people's pairs pass too: the "
        "further left a curve stays high the better; its left end hangs on single pairs.",
        "There is no roc.json: the run was not verified, or was made by an older version.",
    ),
    Plot(
        "Throughput",
        throughput,
        "Images trained on in a second: dips are waits, most often for images that are not yet "
        "decoded, and a slow decline asks for a look at the machine.",
        "No speed was logged.",
    ),
)


def svg(run: Run, plot: Plot) -> Markup:
    """Draw a figure as it stands inside a page; empty where there is nothing to draw."""
    import matplotlib

    # Salted by its title, no figure of a page has an id of another.
    with matplotlib.rc_context({**STYLE, "svg.hashsalt": plot.title}):
        figure = plot.draw(run)
        if figure is None:
            return Markup()
        drawn = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(drawn, format="svg", metadata=nothing, transparent=True)
    text = drawn.getvalue()
    return Markup(re.sub(r'<g id="[^"]*"', "<g", text[text.index("<svg") :]))


def _figure(height: float, panels: int = 1) -> tuple[Figure, NDArray[Any]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.2, height), layout="constrained")
    return figure, np.atleast_1d(figure.subplots(panels, 1, sharex=True))


def _mark(run: Run, axes: NDArray[Any]) -> None:
    """Changes of the learning rate as lines, and flat stretches as grey ground."""
    mark_changes(list(axes), [change["step"] for change in run.results.get("lr_changes", [])])
    steps, values, threshold = _response(run)
    for axis in axes:
        ground = {"transform": axis.get_xaxis_transform(), "color": "0.5", "linewidth": 0}
        axis.broken_barh(_stretches(steps, values < threshold), (0, 1), alpha=0.13, **ground)


def _stretches(steps: NDArray[np.float64], flat: NDArray[np.bool_]) -> list[tuple[float, float]]:
    """Start and length of each stretch of flat points, up to the next that is not."""
    edges = np.flatnonzero(np.diff(flat, prepend=False, append=False))
    ends = steps[np.minimum(edges, len(steps) - 1)]
    bars = zip(ends[::2], ends[1::2] - ends[::2], strict=True)
    # Less than a thousandth of the run is not seen, and could be there ten thousand times.
    return [(start, length) for start, length in bars if length > (steps[-1] - steps[0]) / 1000]


def _label(name: str) -> str:
    """A set's name as a legend takes it: what begins with _ would be left out."""
    return f"on {readable(name, 40)}"


def _plain_legend(axis: Axes) -> None:
    """A dollar in a name is a dollar, and begins no formula."""
    legend = axis.get_legend()
    for text in legend.get_texts() if legend else []:
        text.set_parse_math(False)
