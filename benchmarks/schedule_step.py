"""What a step of each schedule costs: ``python benchmarks/schedule_step.py``."""

from __future__ import annotations

import logging
import random
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from common import medians, report
from lightning.pytorch import LightningModule, Trainer
from torch.utils.data import DataLoader, Dataset

from fastface_lightning import MHLR, FastFace, FastFaceCallback, FastFaceLR
from fastface_lightning.backbones import build_backbone
from fastface_lightning.classifiers import FullClassifier
from fastface_lightning.schedule import PlateauSchedule

WINDOW = 4000


def curve(steps: int) -> list[float]:
    """A falling loss with noise."""
    noise = random.Random(0)
    return [10 / (1 + 5 * t / steps) + 5 + noise.gauss(0, 0.3) for t in range(steps)]


class NaiveMHLR:
    """MHLR as its definition reads: every window is summed anew at every step.

    Args:
        m: window.
        total: sums a list; Python's own ``sum`` is the fastest way there is for a list.
        threshold: of the response.
    """

    def __init__(self, m: int, total: Callable[[Any], float], threshold: float = 0.06) -> None:
        self.m, self.total, self.threshold = m, total, threshold
        self.losses: deque[float] = deque(maxlen=m)
        self.means: deque[float] = deque(maxlen=m)
        self.count, self.plateaus, self.scale = 0, 0, 1.0

    def step(self, loss: float) -> None:
        m, half, total = self.m, self.m // 2, self.total
        if len(self.means) == m:
            means = list(self.means)
            self.decide((total(means[:half]) - total(means[half:])) / m)
        self.losses.append(loss)
        if len(self.losses) == m:
            self.means.append(total(list(self.losses)) / m)

    def decide(self, response: float) -> None:
        if response >= self.threshold:
            self.count = self.plateaus = 0
            return
        self.count += 1
        if self.count > 2 * self.m:
            self.count = 0
            self.plateaus += 1
            self.scale *= 4 if self.plateaus == 4 else 0.5
            self.plateaus %= 4


def run_schedule(schedule: PlateauSchedule, losses: list[float]) -> Callable[[], None]:
    """All of ``losses`` through a schedule."""
    bound = schedule.bind(len(losses))

    def run() -> None:
        state = bound.init()
        for loss in losses:
            state = bound.update(state, loss)

    return run


def run_naive(losses: list[float], total: Callable[[Any], float]) -> Callable[[], None]:
    """200 steps of the naive MHLR with full windows, as they are for most of a run."""
    schedule = NaiveMHLR(WINDOW, total)
    for loss in losses[: 2 * WINDOW]:
        schedule.step(loss)

    def run() -> None:
        for loss in losses[:200]:
            schedule.step(loss)

    return run


def run_torch(losses: list[float], make: Callable[[Any], Any]) -> Callable[[], None]:
    """All of ``losses`` through a torch scheduler."""

    def run() -> None:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
        optimizer.step()
        scheduler = make(optimizer)
        for loss in losses:
            scheduler.step(loss)

    return run


def steps_table() -> list[dict[str, Any]]:
    """Microseconds a step of each schedule, paired in one run."""
    losses = curve(40_000)
    naive = {"sum()": run_naive(losses, sum), "numpy": run_naive(losses, np.sum)}
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau
    sides: dict[str, tuple[Callable[[], None], int]] = {
        "ReduceLROnPlateau.step": (run_torch(losses, plateau), len(losses)),
        "FastFace.update": (run_schedule(FastFace(), losses), len(losses)),
        f"MHLR.update, m={WINDOW}": (run_schedule(MHLR(haar_window=WINDOW), losses), len(losses)),
        **{f"naive MHLR by {by}, m={WINDOW}": (side, 200) for by, side in naive.items()},
        "FastFaceLR.step": (run_torch(losses, lambda o: FastFaceLR(o, 40_000)), len(losses)),
    }
    for m in (100, 1000, 16_000):
        side = run_schedule(MHLR(haar_window=m), losses)
        sides[f"MHLR.update, m={m}"] = (side, len(losses))
    for window in (100, 16_000):
        side = run_schedule(FastFace(ema_window=window, haar_window=window), losses)
        sides[f"FastFace.update, windows {window}"] = (side, len(losses))
    for length in (4000, 400_000):
        long = curve(length)
        sides[f"FastFace.update, {length:,} steps"] = (run_schedule(FastFace(), long), length)
        sides[f"MHLR.update, default m, {length:,} steps"] = (run_schedule(MHLR(), long), length)
    taken = medians({name: run for name, (run, _) in sides.items()}, repeats=5)
    micro = {name: taken[name] / steps * 1e6 for name, (_, steps) in sides.items()}
    base = micro["ReduceLROnPlateau.step"]
    return [
        {"schedule": name, "us a step": us, "x ReduceLROnPlateau": us / base}
        for name, us in micro.items()
    ]


class Batches(Dataset[torch.Tensor]):
    """Empty batches: the trainer's own work is what is left."""

    def __len__(self) -> int:
        return 2000

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.zeros(1)


class Idle(LightningModule):
    """A module that does next to nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        return (self.weight * 2).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)

    def train_dataloader(self) -> Iterator[torch.Tensor]:
        return DataLoader(Batches(), batch_size=1)  # type: ignore[return-value]


def fit(callbacks: list[Any], log_every: int) -> Callable[[], None]:
    """A run of 2000 empty steps."""

    def run() -> None:
        trainer = Trainer(
            max_epochs=1,
            accelerator="cpu",
            callbacks=callbacks,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            log_every_n_steps=log_every,
        )
        trainer.fit(Idle())

    return run


def default_step() -> Callable[[], None]:
    """Forward, backward and update of the default run's network at its batch size."""
    net = build_backbone("iresnet_tiny", 128, channels_last=True)
    head = FullClassifier(500, 128)
    optimizer = torch.optim.SGD([*net.parameters(), *head.parameters()], lr=0.1, momentum=0.9)
    images, labels = torch.randn(64, 3, 112, 112), torch.randint(0, 500, (64,))

    def run() -> None:
        head(net(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def main() -> None:
    """Print the table and write the JSON."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    rows = steps_table()
    by_name = {row["schedule"]: row["us a step"] for row in rows}
    sides = {
        "without": fit([], 10),
        "with": fit([FastFaceCallback()], 10),
        "without, no logging": fit([], 0),
        "with, no logging": fit([FastFaceCallback()], 0),
        "step": default_step(),
    }
    taken = {name: seconds * 1e6 for name, seconds in medians(sides, repeats=7).items()}
    steps = len(Batches())
    cost = (taken["with"] - taken["without"]) / steps
    mhlr = by_name[f"MHLR.update, m={WINDOW}"]
    report(
        "schedule_step",
        "Schedules, microseconds a step",
        rows,
        mhlr_over_fastface=mhlr / by_name["FastFace.update"],
        naive_sum_over_mhlr=by_name[f"naive MHLR by sum(), m={WINDOW}"] / mhlr,
        naive_numpy_over_mhlr=by_name[f"naive MHLR by numpy, m={WINDOW}"] / mhlr,
        empty_trainer_step_us=taken["without"] / steps,
        callback_us_a_step_logging_every_10=cost,
        callback_us_a_step_no_logging=(taken["with, no logging"] - taken["without, no logging"])
        / steps,
        default_training_step_us=taken["step"],
        callback_share_of_default_step=cost / taken["step"],
    )


if __name__ == "__main__":
    main()
