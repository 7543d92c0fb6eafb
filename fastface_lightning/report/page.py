"""A run on one page: ``report.html`` needs no other file and no network, and says what to see."""

from __future__ import annotations

import base64
import csv
import io
import json
import re
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from omegaconf import OmegaConf
from PIL import Image

from ..files import write_text
from ..schedule.replay import LOSSES
from .curves import legend_label, plot_roc
from .figures import duration, legend_above, mark_changes, new_figure, schedule_figure, thin

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]  # steps and values
NO_CURVE: Curve = (np.empty(0), np.empty(0))
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


class Run(NamedTuple):
    """What a run folder holds; what is missing is empty."""

    title: str
    ended: str  # when the run last wrote down something of its own
    settings: str  # config.yaml as it is
    overrides: list[str]
    metrics: dict[str, Curve]  # of each column, the steps and values of its cells
    results: dict[str, Any]
    roc: dict[str, Curve]  # of each verification set, FAR and TAR
    samples: str  # the faces of samples.png, as an address that holds them
    notes: list[str]  # what a reader must know before the figures


def write_report(folder: Path) -> Path:
    """Write ``report.html``, whole or not at all, and ``schedule.png`` into a run folder.

    Args:
        folder: of a run of ``train.py``, ended or killed. What is missing or cannot be read is left
            out, and the page says so.

    Returns:
        The page, which opens without a network and can be sent alone.

    Raises:
        ValueError: the folder holds neither ``config.yaml`` nor ``metrics.csv``.
    """
    import matplotlib

    run = read_run(folder)
    with matplotlib.rc_context(STYLE):
        figures = {draw.__name__: draw(run) for draw in (schedule, verification, roc, throughput)}
        if figures["schedule"] is not None:
            figures["schedule"].savefig(folder / "schedule.png", dpi=180)
        shown = {name: svg(each, name) if each else "" for name, each in figures.items()}
    report = folder / "report.html"
    write_page(report, "page.html.jinja", run=run, figures=shown)
    return report


def write_page(file: Path, template: str, **values: Any) -> None:
    """Fill in a template of this folder, and write the page whole or not at all."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["duration"] = duration
    page = environment.get_template(template).render(**values)
    write_text(file, page.encode("utf-8", "backslashreplace").decode())


def read_run(folder: Path) -> Run:
    """Read what there is."""
    files = [folder / name for name in ("config.yaml", "metrics.csv", "results.json")]
    if not any(file.is_file() for file in files[:2]):
        raise ValueError(f"a run folder must hold config.yaml or metrics.csv, got {folder}")
    last = max(file.stat().st_mtime for file in files if file.is_file())
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
    metrics = read("metrics.csv", read_metrics, {})
    steps, losses = metrics.get("train/loss", NO_CURVE)
    every = read(LOSSES, lambda data: np.frombuffer(data[: len(data) // 4 * 4], "<f4"), losses)
    # Else of a run that was killed, or of another.
    if len(every) > (steps[-1] if len(steps) else 0):
        losses = np.where(np.isfinite(every), every, np.nan).astype(float)
        metrics["train/loss"] = np.arange(len(every), dtype=float), losses
    lost = np.count_nonzero(np.isnan(losses))
    if lost:
        notes.append(f"{lost:,} of {len(losses):,} losses are not finite.")
    config = read("config.yaml", lambda data: dict(_yaml(data)), {})
    overrides = read("overrides.yaml", lambda data: [str(each) for each in _yaml(data)], [])
    results = read("results.json", lambda data: dict(json.loads(data)), {})
    return Run(
        title_of(config, overrides) or f"Run {folder.resolve().name}",
        f"{datetime.fromtimestamp(last).astimezone():%Y-%m-%d %H:%M %Z}",
        settings=read("config.yaml", lambda data: data.decode(errors="replace"), ""),
        overrides=overrides,
        metrics=metrics,
        results=results_so_far(metrics) | results,
        roc=read("roc.json", _roc, {}),
        samples=read("samples.png", lambda data: data_uri(Image.open(io.BytesIO(data))), ""),
        notes=notes,
    )


def title_of(config: dict[str, Any], overrides: list[str]) -> str:
    """Model, data and schedule, as the command names them, else by their names or classes."""
    chosen = dict(text.partition("=")[::2] for text in overrides)
    parts = []
    for group in ("model", "data", "schedule"):
        settings = config.get(group)
        settings = settings if isinstance(settings, dict) else {}
        name = settings.get("name") or settings.get("scheduler")  # torch's class
        class_name = str(settings.get("_target_", "")).rpartition(".")[2]
        parts.append(str(chosen.get(group) or name or class_name))
    return "{} on {}, schedule {}".format(*parts) if all(parts) else ""


def _yaml(data: bytes) -> Any:
    return OmegaConf.to_container(OmegaConf.create(data.decode()))


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


def results_so_far(metrics: dict[str, Curve]) -> dict[str, Any]:
    """The parts of ``results.json`` that the metrics tell of a run before its end."""
    results: dict[str, Any] = {"verification": {}, "best": None}
    for name, (steps, accuracy) in accuracies(metrics).items():
        _, std = metrics.get(f"verify/{name}/std", (None, [None]))
        results["verification"][name] = {
            "accuracy": accuracy[-1],
            "std": std[-1],
            "accuracy_before": accuracy[0] if steps[0] == 0 else None,
        }
    steps, mean = metrics.get("verify/accuracy", NO_CURVE)
    if np.isfinite(mean).any():
        best = np.nanargmax(mean)
        results["best"] = {"step": steps[best] + 1, "accuracy": mean[best]}
    return results


def accuracies(metrics: dict[str, Curve]) -> dict[str, Curve]:
    """Accuracy of each verification set over the run."""
    pattern = re.compile("verify/(.+)/accuracy")
    return {match[1]: metrics[name] for name in metrics if (match := pattern.fullmatch(name))}


def _roc(data: bytes) -> dict[str, Any]:
    return {
        name: np.array([curve["far"], curve["tar"]], float)
        for name, curve in json.loads(data).items()
    }


def data_uri(picture: Image.Image) -> str:
    """An image as an address that holds it, as a JPEG: a PNG of faces is ten times as long."""
    jpeg = io.BytesIO()
    picture.convert("RGB").save(jpeg, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(jpeg.getvalue()).decode("ascii")


def schedule(run: Run) -> Figure | None:
    """Loss, the detector's response and learning rate, with what was taken for plateaus."""
    if "train/loss" not in run.metrics:
        return None
    steps, response = run.metrics.get("fastface/response", NO_CURVE)
    of_step = dict(zip(*run.metrics.get("fastface/threshold", NO_CURVE), strict=True))
    return schedule_figure(
        run.metrics["train/loss"],
        (steps, response) if len(steps) else None,
        np.array([of_step.get(step, np.nan) for step in steps]),  # at the first there may be none
        {name[3:]: curve for name, curve in run.metrics.items() if name.startswith("lr-")},
        [change["step"] for change in run.results.get("lr_changes", [])],
    )


def verification(run: Run) -> Figure | None:
    """Accuracy of each set, within its standard deviation, their mean and the best of it."""
    from matplotlib.ticker import PercentFormatter

    sets, best = accuracies(run.metrics), run.results["best"]
    if not sets:
        return None
    figure, (axis,) = new_figure(2.9)
    late = []  # what the second half of each set's curve spans
    for name, (steps, accuracy) in sets.items():
        (line,) = axis.plot(steps, accuracy, marker="o", markersize=3.5, label=legend_label(name))
        if raw := run.metrics.get(f"verify_raw/{name}/accuracy"):
            hollow: Any = {"markerfacecolor": "none", "color": line.get_color(), "linestyle": ""}
            axis.plot(*raw, marker="o", label=f"{legend_label(name)}, raw weights", **hollow)
        _, std = run.metrics.get(f"verify/{name}/std", (steps, np.zeros(len(steps))))
        if len(std) == len(accuracy):
            low, high = accuracy - std, accuracy + std
            axis.fill_between(steps, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
            late += [*low[len(low) // 2 :], *high[len(high) // 2 :]]
    if len(sets) > 1 and "verify/accuracy" in run.metrics:
        axis.plot(*run.metrics["verify/accuracy"], color="black", linestyle="--", label="mean")
    if best:
        star: Any = {"marker": "*", "markersize": 13, "markerfacecolor": "gold", "color": "black"}
        # Metrics count steps from 0.
        axis.plot(best["step"] - 1, best["accuracy"], linestyle="", label="best", **star)
    if np.isfinite(late).any():  # where the untrained network was would flatten all that follows
        bottom, top = np.nanmin(late), np.nanmax(late)
        axis.set_ylim(bottom=max(axis.get_ylim()[0], bottom - 2 * (top - bottom)))
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.set_ylabel("accuracy")
    mark_changes([axis], [])
    axis.legend(loc="lower right")
    return figure


def roc(run: Run) -> Figure | None:
    """True acceptances over false ones, of each set."""
    if not run.roc:
        return None
    figure, (axis,) = new_figure(3.4)
    plot_roc(axis, run.roc)
    return figure


def throughput(run: Run) -> Figure | None:
    """Images a second over the run, and their mean."""
    if "train/images_per_second" not in run.metrics:
        return None
    figure, (axis,) = new_figure(2.4)
    steps, speed = thin(*run.metrics["train/images_per_second"])
    axis.plot(steps, speed, marker="." if len(steps) <= 50 else "", label="images/s")
    if "images_per_second" in run.results:
        mean: Any = {
            "color": "black",
            "linestyle": "--",
            "linewidth": 1,
            "label": "mean of the run",
        }
        axis.axhline(run.results["images_per_second"], **mean)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("images/s")
    mark_changes([axis], [])
    legend_above(axis)
    return figure


def svg(figure: Figure, name: str) -> Markup:
    """A figure as it stands inside a page."""
    import matplotlib

    matplotlib.rcParams["svg.hashsalt"] = name  # so no figure of a page has an id of another
    text = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(text, format="svg", metadata=nothing, transparent=True)
    _, start, rest = text.getvalue().partition("<svg")
    return Markup(re.sub(r'<g id="[^"]*"', "<g", start + rest))
