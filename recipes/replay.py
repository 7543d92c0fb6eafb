"""What would a schedule have done to a recorded loss? ``python recipes/replay.py --help``."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from fastface_lightning.cli import check_numbers, program

if TYPE_CHECKING:
    from rich.table import Table

    from fastface_lightning.schedule import Change

CONF = Path(__file__).resolve().parents[1] / "conf"


@program(config_path=CONF, config_name="replay")
def main(cfg: DictConfig) -> None:
    """Print the changes, write replay.json and replay.png."""
    from rich.console import Console

    from fastface_lightning.files import write_text
    from fastface_lightning.report.figures import replay_figure
    from fastface_lightning.schedule import AutoWU, read_losses, replay
    from fastface_lightning.schedule.fixed import FixedSchedule
    from fastface_lightning.schedule.plateau import check_count

    folder = Path(HydraConfig.get().runtime.output_dir)
    if cfg.total_steps is not None:
        check_count("total_steps", cfg.total_steps, least=1)
    check_numbers(cfg, {"lr": 0})
    schedule = instantiate(cfg.schedule)
    if isinstance(schedule, FixedSchedule):
        raise ValueError(f"schedule must be fastface, mhlr or autowu, got {schedule}")
    losses, logged = read_losses(cfg.log, None if cfg.column is None else str(cfg.column))
    total_steps = len(losses) if cfg.total_steps is None else cfg.total_steps
    if total_steps < len(losses):
        raise ValueError(
            f"total_steps must be at least the {len(losses)} steps of the log, got {total_steps}"
        )
    lr = cfg.lr if cfg.lr is not None else (logged[0] if logged else 1.0)
    changes, in_log = replay(losses, schedule, total_steps, lr), changes_in(logged)

    console = Console()
    console.print(f"{schedule.bind(total_steps)!r}", markup=False)
    console.print(table_of(changes, in_log))
    if isinstance(schedule, AutoWU):
        console.print(
            "A change is where AutoWU's test would have ended the growth of the rate; without one "
            "it never would. The loss was not made with its rates, so this is its test on that "
            "loss, and not what its run would have done."
        )
    result = {
        "log": str(cfg.log),
        "schedule": repr(schedule),
        "total_steps": total_steps,
        "changes": [change._asdict() for change in changes],
        "changes_in_log": [change._asdict() for change in in_log],
    }
    write_text(folder / "replay.json", json.dumps(result, indent=2) + "\n")
    figure = replay_figure(losses, schedule, total_steps, lr, logged or None)
    figure.savefig(folder / "replay.png", dpi=180)
    console.print(f"replay.json and replay.png are in {folder}")


def changes_in(lrs: list[float]) -> list[Change]:
    """Changes of a logged learning rate, at the last step before each new value."""
    from fastface_lightning.schedule import Change

    return [
        Change(step, after / before, after)
        for step, (before, after) in enumerate(itertools.pairwise(lrs))
        if after != before
    ]


def table_of(changes: list[Change], in_log: list[Change]) -> Table:
    """The changes as a table, beside those of the log where it has any."""
    from rich.table import Table

    table = Table(title=f"Changes of the learning rate: {len(changes)}", title_justify="left")
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


if __name__ == "__main__":
    main()
