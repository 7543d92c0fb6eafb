"""A recorded loss curve tells what a schedule would have done to it."""

from __future__ import annotations

import csv
import gzip
import math
import re
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..files import printable
from .base import Change, Progress, Schedule, check_schedule

LOSSES = "losses.f32"  # in a run folder: the loss of every optimizer step, little-endian float32


class Recording(NamedTuple):
    """Losses read from a log, one an optimizer step."""

    losses: list[float]
    lrs: list[float]
    """Learning rate logged for each step; empty where the log has none."""


def states(losses: Iterable[float], schedule: Schedule) -> Iterator[Any]:
    """The state of a bound schedule after each loss."""
    state = schedule.init()
    for loss in losses:
        state = schedule.update(state, loss)
        yield state


def replay(
    losses: Iterable[float], schedule: Schedule, total_steps: int, lr: float
) -> list[Change]:
    """Changes of the learning rate that ``schedule`` would take on a recorded loss.

    A loss does not answer: from the first change on, and with AutoWU, whose rates moved all along,
    from the start, this is the rule's opinion on a loss that other rates have made.

    Args:
        losses: loss of every optimizer step, in order.
        schedule: FastFace, MHLR, AutoWU or another :class:`Schedule`, bound or not.
        total_steps: optimizer steps of the run that was recorded, >= 1.
        lr: base learning rate.

    Returns:
        The decays and restarts in order.

    Example:
        >>> from fastface_lightning import MHLR, replay
        >>> losses = [5 - min(step, 400) / 100 for step in range(2000)]
        >>> replay(losses, MHLR(haar_window=40), total_steps=2000, lr=0.1)[0]
        Change(step=559, factor=0.5, lr=0.05)
    """
    if not 0 < lr < math.inf:
        raise ValueError(f"lr must be positive and finite, got {lr}")
    check_schedule(schedule)
    changes, before = [], Progress.start(schedule, total_steps)
    for loss in losses:
        after = before.update(loss)
        if made := after.change(before, lr):
            changes.append(made)
        before = after
    return changes


_LOG_LINE = re.compile(
    r"Loss\s+(?P<loss>\S+)(?:\s+LearningRate\s+(?P<lr>\S+))?.*?Global Step:\s*(?P<step>\d+)"
)


def read_losses(path: str | Path, column: str | None = None) -> Recording:
    """Read a loss curve, one value an optimizer step.

    Understood are InsightFace's and FastFace's ``training.log`` (a row at step s averages the
    steps since the row before, so it is repeated for each of them), and CSV files with a header:
    a loss column (``column``, or the first of ``train/loss``, ``train_loss``, ``loss``) and, unless
    every row is a step, a ``step`` column (0-based, as Lightning's ``metrics.csv`` has it).
    Either may be gzipped (``.gz``). Beside the ``metrics.csv`` of ``train.py`` lies
    ``losses.f32``, the loss of every step: as far as it goes the losses are its, of either name,
    unless a ``column`` is given.

    Raises:
        ValueError: no such file, or no loss in it.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"log must be an existing file, got {path}")
    exact: list[float] = []
    if column is None and path.name in (LOSSES, "metrics.csv"):
        exact = _step_losses(path.with_name(LOSSES))
    try:
        losses, lrs = _rows(path.with_name("metrics.csv") if path.name == LOSSES else path, column)
    except (OSError, ValueError):  # a run without that logger has no rates
        if path.name != LOSSES:
            raise
        losses, lrs = [], []
    if len(lrs) < len(losses):  # or in some rows alone
        lrs = []
    losses = [*exact, *losses[len(exact) :]]  # of a run that goes on the file comes after the rows
    if not losses:
        raise ValueError(f"log must hold at least one loss, got none in {path}")
    return Recording(losses, [*lrs, *lrs[-1:] * (len(losses) - len(lrs))][: len(losses)])


def _step_losses(file: Path) -> list[float]:
    """What a run folder's ``losses.f32`` holds; nothing if there is none."""
    data = file.read_bytes() if file.is_file() else b""
    return [loss for (loss,) in struct.iter_unpack("<f", data[: len(data) // 4 * 4])]


def _rows(path: Path, column: str | None) -> tuple[list[float], list[float]]:
    """Losses and learning rates of a log's rows, each for the steps since the row before."""
    is_csv = path.name.removesuffix(".gz").endswith(".csv")
    losses: list[float] = []
    lrs: list[float] = []
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        try:
            for end, loss, lr in _csv_rows(file, column) if is_csv else _log_rows(file):
                steps = end - len(losses)
                losses += [float(loss)] * steps
                lrs += [float(lr)] * steps if lr else []
        except (gzip.BadGzipFile, EOFError, ValueError, OverflowError, MemoryError) as error:
            raise ValueError(f"log must hold losses, got {path}: {error}") from error
    return losses, lrs


def _log_rows(lines: Iterable[str]) -> Iterator[tuple[int, str, str | None]]:
    """Steps up to a row's, its loss and its learning rate."""
    for line in lines:
        if row := _LOG_LINE.search(line):
            yield int(row["step"]), row["loss"], row["lr"]


def _csv_rows(lines: Iterable[str], column: str | None) -> Iterator[tuple[int, str, str | None]]:
    reader = csv.DictReader(lines)
    names = reader.fieldnames or []
    wanted = (column,) if column else ("train/loss", "train_loss", "loss")
    loss_column = next((name for name in wanted if name in names), None)
    if loss_column is None:
        raise ValueError(
            f"no column {' or '.join(wanted)}, only {printable(', '.join(names)) or 'none'}"
        )
    lr_column = next((name for name in names if name.startswith("lr-")), None)
    for number, row in enumerate(reader):
        at = row["step"] if "step" in names else str(number)
        if row[loss_column] and at:  # the last line of a killed run may be torn
            step = int(float(at))
            yield step + 1, row[loss_column], row[lr_column] if lr_column else None
