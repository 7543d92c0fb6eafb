"""What each knob of the schedules does to a recorded loss: ``schedule_knobs.py training.log.gz``.

Draws the pictures of docs/schedules.md and writes the numbers that stand there.
"""

from __future__ import annotations

import argparse
import itertools
import math
import runpy
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common import show, write
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fastface_lightning import MHLR, FastFace, replay
from fastface_lightning.report.figures import thin
from fastface_lightning.schedule import Change, PlateauSchedule, PlateauState, read_losses, states

ROOT = Path(__file__).resolve().parents[1]
DOCS, CURVES = ROOT / "docs", ROOT / "tests" / "schedule" / "curves.py"
Panel = dict[str, PlateauSchedule]


def vary(base: PlateauSchedule, knobs: str, values: dict[str, Any]) -> Panel:
    """``base`` with each of the values, by its label, for a knob or for several at once."""
    return {
        label: replace(base, **dict.fromkeys(knobs.split(), value))
        for label, value in values.items()
    }


FASTFACE, AUTHORS = FastFace(), MHLR(variant="paper", haar_window=4000)
VARIANTS: Panel = {name: FastFace(variant=name) for name in ("scaled", "paper", "released")}
EMA_WINDOWS = {"250": 250, "1000": 1000, "default 2015": None, "8000": 8000}
HAAR_WINDOWS = {"2000": 2000, "default 3034": None, "the log's 4000": 4000, "8000": 8000}
FASTFACE_KNOBS: dict[str, Panel] = {
    "ema_window = haar_window": vary(FASTFACE, "ema_window haar_window", EMA_WINDOWS),
    "ema_window alone": vary(FASTFACE, "ema_window", EMA_WINDOWS),
    "threshold, loss a step": vary(
        FASTFACE, "threshold", {"2.5e-5": 2.5e-5, "5e-5": 5e-5, "default": None, "2e-4": 2e-4}
    ),
    "patience, share of the run": vary(
        FASTFACE, "patience", {"0.01": 0.01, "0.025": 0.025, "default 0.05": None, "0.1": 0.1}
    ),
    "factor": vary(FASTFACE, "factor", {"0.1": 0.1, "0.3": 0.3, "default 0.5": None, "0.7": 0.7}),
    "max_decays": vary(FASTFACE, "max_decays", {"2": 2, "4": 4, "default 8": None}),
    "restart_after": vary(FASTFACE, "restart_after", {"3": 3, "4": 4, "default: never": None}),
    "variant": VARIANTS,
}
MHLR_KNOBS: dict[str, Panel] = {
    "haar_window, patience two windows": vary(AUTHORS, "haar_window", HAAR_WINDOWS),
    "threshold, loss": vary(
        AUTHORS, "threshold", {"0.015": 0.015, "0.03": 0.03, "default 0.06": None, "0.24": 0.24}
    ),
    "patience, steps": vary(
        AUTHORS, "patience", {"4000": 4000, "default 8000": None, "16000": 16_000}
    ),
    "restart_after": vary(AUTHORS, "restart_after", {"never": math.inf, "3": 3, "default 4": None}),
    "restart_factor": vary(
        AUTHORS, "restart_factor", {"1": 1.0, "2": 2.0, "default 4": None, "8": 8.0}
    ),
    "max_decays": vary(AUTHORS, "max_decays", {"4": 4, "default: no limit": None}),
    "cooldown": vary(AUTHORS, "cooldown", {"default 0": None, "4000": 4000, "8000": 8000}),
    "variant, haar_window": {
        "scaled": MHLR(),
        "paper": MHLR(variant="paper"),
        "paper, 4000": AUTHORS,
    },
}
PAPER = MHLR(variant="paper")
DEFAULTS: Panel = {"FastFace()": FASTFACE, "MHLR()": MHLR(), "MHLR(variant='paper')": PAPER}
FAMILY = [*itertools.product(
    (1560, 6240), (2.0, 45.0), (0.02, 0.1), range(5), (0.0, 0.05, 0.1), (0.1,), (6.0, 40.0)
)]  # fmt: skip
"""240 curves: steps, first loss, noise, seed, share of a rise and how far, speed of the fall."""
WINDOWS = (100, 250, 500, 1000, 2015, 4000, 8000, 16_000)
BLUES, ORANGES = ("#2171b5", "#6baed6", "#bdd7e7"), ("#d94801", "#fd8d3c", "#fdd0a2")
FLAT = slice(180_000, 202_000)
"""Where the recorded loss hardly moves, so that a response is noise."""


# Numbers --------------------------------------------------------------------------------------


def sigma(losses: Sequence[float], every: int = 10) -> float:
    """Noise of a step's loss, from a log whose rows average ``every`` steps."""
    rows = losses[::every]
    return statistics.stdev(a - b for a, b in itertools.pairwise(rows)) * math.sqrt(every / 2)


def changes_of(schedule: PlateauSchedule, losses: Sequence[float], lr: float = 1.0) -> list[Change]:
    return replay(losses, schedule, len(losses), lr)


def first(schedule: PlateauSchedule, losses: Sequence[float]) -> int | None:
    """Step of the first change."""
    return next((change.step for change in changes_of(schedule, losses)), None)


def trace(schedule: PlateauSchedule, losses: Sequence[float]) -> list[PlateauState]:
    return list(states(losses, schedule.bind(len(losses))))


def held(losses: list[float]) -> list[float]:
    """The loss as if its learning rate had not decayed at 54,271: it stays where it was.

    It goes on at its level before step 54,000, with the noise of the log's flat end.
    """
    flat = losses[FLAT]
    up = statistics.fmean(losses[50_000:54_000]) - statistics.fmean(flat)
    noise = itertools.cycle(loss + up for loss in flat)
    return losses[:54_000] + list(itertools.islice(noise, len(losses) - 54_000))


def rising(losses: list[float], rise: int, start: float = 35.0) -> list[float]:
    """The loss after a straight rise of ``rise`` steps to it, cut to the same length."""
    slope = (losses[0] - start) / rise
    return ([start + slope * step for step in range(rise)] + losses)[: len(losses)]


def knob_rows(name: str, knobs: dict[str, Panel], losses: list[float], lr: float) -> list[Any]:
    """Every line of a picture: what was set, and the changes that came of it."""
    return [
        {"picture": name, "knob": knob, "value": value, "changes": len(made)}
        | {"first at": made[0].step if made else None}
        | {"steps": [change.step for change in made], "lr": [change.lr for change in made]}
        for knob, panel in knobs.items()
        for value, schedule in panel.items()
        for made in [changes_of(schedule, losses, lr)]
    ]


def window_rows(losses: list[float]) -> list[dict[str, Any]]:
    """Noise of the response on the flat end, predicted and found, and the first decay."""
    noise, flat = sigma(losses[FLAT]), held(losses)
    rows = []
    for window in WINDOWS:
        schedule = FastFace(ema_window=window, haar_window=window)
        after = trace(schedule, losses)
        response = [state.response for state in after[FLAT]]
        threshold = schedule.bind(len(losses)).threshold_at(after[-1])
        rows.append(
            {
                "window": window,
                "predicted noise": noise / (2 * window**1.5),
                "noise found": statistics.pstdev(response),
                "threshold": threshold,
                "above it on the flat end": sum(r >= threshold for r in response) / len(response),
                "first change": first(schedule, losses),
                "first, patience 0": first(replace(schedule, patience=0), losses),
                "first, held flat": first(schedule, flat),
            }
        )
    return rows


def mhlr_rows(losses: list[float]) -> list[dict[str, Any]]:
    """The same for MHLR, its patience held at the log's 8,000 steps."""
    noise, flat = sigma(losses[FLAT]), held(losses)
    rows = []
    for window in (250, 500, 1000, 2000, 4000, 8000):
        two_windows = replace(AUTHORS, haar_window=window)
        schedule = replace(two_windows, patience=8000)
        rows.append(
            {
                "haar_window": window,
                "predicted noise": noise / math.sqrt(6 * window),
                "noise found": statistics.pstdev(s.response for s in trace(schedule, losses)[FLAT]),
                "slope at threshold 0.06": 4 * 0.06 / window,
                "first change": first(schedule, losses),
                "first, patience two windows": first(two_windows, losses),
                "first, held flat": first(schedule, flat),
            }
        )
    return rows


def run_rows() -> list[dict[str, Any]]:
    """What the defaults make of a run's length."""
    rows = []
    for steps in (1000, 6240, 20_000, 50_000, 100_000, 202_320, 500_000):
        fastface, mhlr = FastFace().bind(steps), MHLR().bind(steps)
        paper = MHLR(variant="paper").bind(steps)
        assert fastface.ema_window and fastface.threshold
        assert mhlr.haar_window and mhlr.threshold and paper.haar_window
        rows.append(
            {
                "run, steps": steps,
                "window": fastface.ema_window,
                "patience": fastface.patience,
                "threshold / highest loss": fastface.threshold,
                "noise / threshold at 2 %": 0.02
                / (2 * fastface.ema_window**1.5)
                / fastface.threshold,
                "MHLR's window": mhlr.haar_window,
                "MHLR's threshold / highest loss": mhlr.threshold,
                "MHLR's noise / threshold at 2 %": 0.02
                / math.sqrt(6 * mhlr.haar_window)
                / mhlr.threshold,
                "MHLR paper's window": paper.haar_window,
                "MHLR paper's patience": paper.patience,
                "slope at threshold 0.06": 4 * 0.06 / paper.haar_window,
            }
        )
    return rows


def scale_rows(losses: list[float]) -> list[dict[str, Any]]:
    """The same loss in other units."""
    schedules = {
        "FastFace()": FASTFACE,
        "FastFace(variant='paper')": VARIANTS["paper"],
        "MHLR()": MHLR(),
        "MHLR(variant='paper', haar_window=4000)": AUTHORS,
    }
    return [
        {"schedule": name, "loss x": unit, "changes": len(made)}
        | {"steps": [change.step for change in made]}
        for name, schedule in schedules.items()
        for unit in (0.1, 1, 10)
        for made in [changes_of(schedule, [unit * loss for loss in losses])]
    ]


def rise_rows(losses: list[float]) -> list[dict[str, Any]]:
    """First change on a loss that rises at first and then stays flat (see held)."""
    return [
        {
            "rise, steps": rise,
            **{name: first(schedule, risen) for name, schedule in VARIANTS.items()},
            "scaled, arm_after=0": first(replace(FASTFACE, arm_after=0), risen),
            "MHLR": first(MHLR(), risen),
            "MHLR paper, m = 4000": first(AUTHORS, risen),
        }
        for rise in (5000, 10_000, 15_000, 20_000, 40_000, 60_000)
        for risen in [rising(held(losses), rise)]
    ]


def first_loss_rows(losses: list[float]) -> list[dict[str, Any]]:
    """A first loss below the second: flat steps counted at once, and the first change.

    On the run, and on one of a tenth of its length, a step of which is a row of the log.
    """
    rows = []
    for run, below in itertools.product((losses, losses[::10]), (0.0, 0.5, 1.0, 3.0, 5.0)):
        lowered = [run[0] - below, *run[1:]]
        row: dict[str, Any] = {"run, steps": len(run), "first loss lower by": below}
        for name, schedule in VARIANTS.items():
            early = trace(schedule, lowered)[: len(run) // 7]
            row[f"{name}: flat steps"] = max(state.plateau_steps for state in early)
            row[f"{name}: first change"] = first(schedule, lowered)
        rows.append(row)
    return rows


def last_clear_fall(smooth: NDArray[np.float64]) -> int:
    """Last step at which a loss without noise falls by 0.4 x its highest value / T or more."""
    return int(np.flatnonzero(-np.diff(smooth) >= 0.4 * smooth.max() / len(smooth))[-1])


def curve_rows() -> list[dict[str, Any]]:
    """Synthetic losses: how often each default decays, when, and how often too early."""
    training_curve = runpy.run_path(str(CURVES))["training_curve"]
    curves = [training_curve(*settings) for settings in FAMILY]
    rows = []
    for name, schedule in DEFAULTS.items():
        made = [changes_of(schedule, curve.losses) for curve in curves]
        begun = [
            (c, of_curve[0].step) for c, of_curve in zip(curves, made, strict=True) if of_curve
        ]
        rows.append(
            {
                "schedule": name,
                "curves": len(curves),
                "first while it falls": sum(s <= last_clear_fall(c.smooth) for c, s in begun),
                "never": len(curves) - len(begun),
                "changes, median": statistics.median(map(len, made)),
                "changes, most": max(map(len, made)),
                "first, median share": statistics.median(s / len(c.losses) for c, s in begun),
            }
        )
    return rows


def cross_entropy_rows(steps: int = 20_000) -> list[dict[str, Any]]:
    """An ordinary cross-entropy, from 2.3 to 0.1: when each default decays, and how often."""
    smooth = 0.1 + 2.2 * np.exp(-5 * np.arange(steps) / steps)
    bumps = np.random.default_rng(0).standard_normal(steps)
    return [
        {"noise": noise, "schedule": name, "falls until": last_clear_fall(smooth)}
        | {"first at": made[0].step if made else None, "changes": len(made)}
        for noise in (0.0, 0.05, 0.2)
        for name, schedule in DEFAULTS.items()
        for made in [changes_of(schedule, (smooth * (1 + noise * bumps)).tolist())]
    ]


def nan_facts(losses: list[float]) -> dict[str, Any]:
    """One NaN in a thousand losses: how far the first change moves, and on a loss held flat."""

    def holed(losses: list[float]) -> list[float]:
        return [math.nan if step % 1000 == 500 else loss for step, loss in enumerate(losses)]

    flat = held(losses)
    return {
        "NaN losses": sum(map(math.isnan, holed(losses))),
        "first change": first(FASTFACE, holed(losses)),
        "first, held flat": first(FASTFACE, holed(flat)),
        "first, held flat, none NaN": first(FASTFACE, flat),
    }


def close_call(losses: list[float]) -> dict[str, Any]:
    """The plateau that the recorded run ended by its own first decay: how long it counts."""
    states = trace(replace(FASTFACE, patience=len(losses) // 2), losses)[:60_000]
    longest = max(states, key=lambda state: state.plateau_steps)
    return {"flat steps": longest.plateau_steps, "last of them": longest.step - 1}


# Pictures -------------------------------------------------------------------------------------


def draw_knobs(
    path: Path,
    knobs: dict[str, Panel],
    base: PlateauSchedule,
    losses: list[float],
    lrs: list[float],
) -> None:
    """A panel a knob: the loss in grey, over it the learning rate at each of the knob's values."""
    rows = len(knobs) // 2
    figure = Figure(figsize=(8, 2.2 * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, 2, sharex=True, squeeze=False)
    recorded = [step / 1000 for step, (a, b) in enumerate(itertools.pairwise(lrs)) if a != b]
    for axis, (knob, panel) in zip(axes.flat, knobs.items(), strict=True):
        behind(axis, losses)
        place = list(panel.values()).index(base)
        for number, (value, schedule) in enumerate(panel.items()):
            draw_rate(axis, schedule, losses, value, lrs[0], number - place)
        foot = axis.get_xaxis_transform()
        axis.plot(recorded, [0.03] * len(recorded), "^", color="0.35", markersize=4, transform=foot)
        head(axis, knob)
    for axis in axes[-1]:
        axis.set_xlabel("optimizer step, thousands", fontsize=9)
    save(figure, path)


def draw_rate(
    axis: Axes, schedule: PlateauSchedule, losses: list[float], label: str, lr: float, side: int
) -> None:
    """The learning rate: black for the base (side 0), blue for values before it, orange after."""
    shades = BLUES if side < 0 else ORANGES
    style = {"color": shades[abs(side) - 1], "linewidth": 2.4} if side else {"color": "black"}
    steps, rates = thin(range(len(losses)), [lr * s.scale for s in trace(schedule, losses)])
    axis.step(steps / 1000, rates, where="post", label=label, zorder=2 if side else 3, **style)
    axis.set_yscale("log")
    axis.set_ylabel("learning rate", fontsize=9)


def behind(axis: Axes, losses: Sequence[float]) -> None:
    """The loss as a grey shape behind a panel, from 0 at its foot."""
    scale = axis.twinx()
    steps, values = thin(range(len(losses)), losses)
    scale.fill_between(steps / 1000, values, color="0.9", linewidth=0)
    scale.set_ylim(0, 1.05 * max(losses))
    scale.set_yticks([])
    axis.set_zorder(scale.get_zorder() + 1)
    axis.patch.set_visible(False)


def draw_limits(path: Path, losses: list[float], lr: float) -> None:
    """Four ways to go wrong: a short window, another unit, a rising loss, a first loss."""
    figure = Figure(figsize=(8, 5.8), layout="constrained")
    axes = figure.subplots(2, 2)
    (short, unit), (rise, start) = axes

    span = slice(40_000, 60_000)
    for window, color in ((250, BLUES[1]), (500, BLUES[0]), (2015, "black")):
        schedule = FastFace(ema_window=window, haar_window=window)
        draw_response(short, trace(schedule, losses), span, 1e4, str(window), color)
    threshold = FASTFACE.bind(len(losses)).threshold_at(trace(FASTFACE, losses)[-1])
    short.axhline(threshold * 1e4, color="tab:red", linestyle="--", label="threshold")
    short.set(ylabel="response, 1e-4 loss a step")
    short.set_ylim(-5, 9)

    paper = VARIANTS["paper"]
    behind(unit, losses)
    draw_rate(unit, FASTFACE, losses, "scaled, both", lr, 0)
    draw_rate(unit, paper, losses, "paper, loss", lr, 1)
    draw_rate(unit, paper, [loss / 10 for loss in losses], "paper, loss / 10", lr, -1)

    risen = rising(held(losses), 15_000)
    behind(rise, risen)
    draw_rate(rise, FASTFACE, risen, "scaled", lr, 0)
    draw_rate(rise, paper, risen, "paper", lr, 1)

    lowered = [losses[0] - 5, *losses[1:]]
    for name, color in (("scaled", "black"), ("paper", ORANGES[0]), ("released", BLUES[0])):
        draw_response(start, trace(VARIANTS[name], lowered), slice(1, 20_000), 1, name, color)
    start.axhline(5e-5, color="tab:red", linestyle="--", label="threshold")
    start.set_yscale("symlog", linthresh=1e-4)
    start.set(ylabel="response, loss a step")
    start.set_yticks([-1, -1e-2, -1e-4, 1e-4, 1e-2])

    titles = (
        "windows: noise resets the count",
        "a fixed threshold and another unit",
        "a loss that rises for 15,000 steps",
        "a first loss 5 below the second",
    )
    for axis, title in zip(axes.flat, titles, strict=True):
        head(axis, title)
        axis.yaxis.label.set_fontsize(9)
        axis.set_xlabel("optimizer step, thousands", fontsize=9)
    save(figure, path)


def draw_response(
    axis: Axes, after: list[PlateauState], span: slice, unit: float, label: str, color: str
) -> None:
    steps, values = thin(range(len(after))[span], [state.response for state in after[span]])
    axis.plot(steps / 1000, values * unit, color=color, linewidth=1.2, label=label)


def head(axis: Axes, title: str) -> None:
    """The title, and the legend in one line below it, where no curve is."""
    axis.set_title(title, fontsize=10, loc="left", pad=19)
    tight: Any = {"borderaxespad": 0, "handlelength": 1.2, "handletextpad": 0.4, "columnspacing": 1}
    place: Any = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": 4}
    axis.legend(fontsize=8.5, frameon=False, **place, **tight)


def save(figure: Figure, path: Path) -> None:
    for axis in figure.axes:
        axis.tick_params(labelsize=8)
    figure.savefig(path, dpi=130)


def main() -> None:
    """Print the tables, draw the pictures and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("log", type=Path, help="the authors' training.log of MS1MV3, may be .gz")
    log = parser.parse_args().log
    losses, lrs = read_losses(log)
    rows = knob_rows("fastface", FASTFACE_KNOBS, losses, lrs[0])
    rows += knob_rows("mhlr", MHLR_KNOBS, losses, lrs[0])
    tables = {
        "windows": window_rows(losses),
        "mhlr_windows": mhlr_rows(losses),
        "runs": run_rows(),
        "scale": scale_rows(losses),
        "rise": rise_rows(losses),
        "first_loss": first_loss_rows(losses),
        "curves": curve_rows(),
        "cross_entropy": cross_entropy_rows(),
    }
    brief = [{k: v for k, v in row.items() if k not in ("steps", "lr")} for row in rows]
    facts = {"steps": len(losses), "sigma": sigma(losses[FLAT]), "nan": nan_facts(losses)}
    facts["first plateau, default windows"] = close_call(losses)
    show("Changes of the learning rate on the recorded loss", brief, **facts)
    for name, table in tables.items():
        show(name, table)
    write("schedule_knobs", log=log.name, **facts, knobs=rows, **tables)
    draw_knobs(DOCS / "fastface_knobs.png", FASTFACE_KNOBS, FASTFACE, losses, lrs)
    draw_knobs(DOCS / "mhlr_knobs.png", MHLR_KNOBS, AUTHORS, losses, lrs)
    draw_limits(DOCS / "schedule_limits.png", losses, lrs[0])


if __name__ == "__main__":
    main()
