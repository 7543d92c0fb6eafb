"""What would a schedule have done to a recorded loss? ``python recipes/replay.py --help``."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from fastface_lightning.cli import program
from fastface_lightning.report.figures import plot_schedule
from fastface_lightning.schedule import (
    Change,
    PlateauSchedule,
    read_losses,
    replay,
    states,
)
from fastface_lightning.schedule.fixed import FixedSchedule
from fastface_lightning.schedule.plateau import check_count, check_number

CONF = Path(__file__).resolve().parents[1] / "conf"


@program(config_path=CONF, config_name="replay")
def main(cfg: DictConfig) -> None:
    """Print the changes, write replay.json and replay.png."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    given = instantiate(cfg.schedule)
    if isinstance(given, FixedSchedule):
        raise ValueError(f"schedule must be fastface, fastface_released or mhlr, got {given}")
    check_count("total_steps", cfg.total_steps, least=1)
    check_number("lr", cfg.lr)
    losses, logged = read_losses(cfg.log, None if cfg.column is None else str(cfg.column))
    total_steps = len(losses) if cfg.total_steps is None else cfg.total_steps
    if total_steps < len(losses):
        raise ValueError(
            f"total_steps must be at least the {len(losses)} steps of the log, got {total_steps}"
        )
    lr = cfg.lr if cfg.lr is not None else (logged[0] if logged else 1.0)
    schedule = given.bind(total_steps)
    changes = replay(losses, schedule, total_steps, lr)

    in_log = changes_in(logged)
    Console().print(schedule.describe())
    Console().print(table_of(changes, in_log))
    found = {
        "log": str(cfg.log),
        "schedule": repr(given),
        "total_steps": total_steps,
        "changes": [change._asdict() for change in changes],
        "changes_in_log": [change._asdict() for change in in_log],
    }
    (folder / "replay.json").write_text(json.dumps(found, indent=2) + "\n")
    draw(folder / "replay.png", losses, logged, schedule, changes, lr)
    Console().print(f"replay.json and replay.png are in {folder}")


def changes_in(lrs: list[float]) -> list[Change]:
    """Changes of a logged learning rate, at the last step before each new value."""
    return [
        Change(step, after / before, after)
        for step, (before, after) in enumerate(itertools.pairwise(lrs))
        if after != before
    ]


def table_of(changes: list[Change], in_log: list[Change]) -> Table:
    """The changes as a table, beside those of the log where it has any."""
    table = Table(title=f"{len(changes)} changes of the learning rate", title_justify="left")
    for name in ("step", "factor", "learning rate"):
        table.add_column(name, justify="right")
    if in_log:
        table.add_column("nearest in the log", justify="right")
    for change in changes:
        cells = [f"{change.step:,}", f"x {change.factor:g}", f"{change.lr:.4g}"]
        if in_log:
            nearest = min(in_log, key=lambda logged: abs(logged.step - change.step))
            cells.append(f"{nearest.step:,} x {nearest.factor:.2g}")
        table.add_row(*cells)
    return table


def draw(
    path: Path,
    losses: list[float],
    logged: list[float],
    schedule: PlateauSchedule,
    changes: list[Change],
    lr: float,
) -> None:
    """Draw loss, response and learning rate, at 10,000 points or so."""
    every = max(1, len(losses) // 10_000)
    trace = [
        (state, schedule.threshold_at(state))
        for step, state in enumerate(states(losses, schedule))
        if step % every == 0
    ]
    plot_schedule(
        path,
        steps=range(0, len(losses), every),
        loss=losses[::every],
        response=[state.response for state, _ in trace],
        threshold=[threshold for _, threshold in trace],
        lr=[lr * state.scale for state, _ in trace],
        logged_lr=logged[::every] or None,
        changes=[change.step for change in changes],
        title=f"{type(schedule).__name__} on {len(losses):,} steps: {len(changes)} changes",
    )


if __name__ == "__main__":
    main()
