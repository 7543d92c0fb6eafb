"""What a run leaves behind: metrics that survive a resume, results, a figure of its schedule."""

from __future__ import annotations

import csv
import json
import os
import platform
import re
import subprocess
import sys
import time
import warnings
from collections import deque
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from ..data import FaceDataset
from ..evaluation import ROC
from ..files import write_text
from ..report.curves import thin_curve
from ..report.figures import plot_schedule
from ..report.page import read_metrics, write_report
from ..schedule.callback import FastFaceCallback
from ..schedule.replay import Change
from .module import images_in

_QUIET: dict[str, Any] = {"capture_output": True, "text": True}


class ResumableCSVLogger(CSVLogger):
    """Lightning's CSV logger, whose ``metrics.csv`` goes on where a resumed run goes on.

    Args:
        save_dir: folder of ``metrics.csv``.
        resume_step: optimizer step the run resumes from; earlier rows stay, later ones go.
    """

    def __init__(self, save_dir: str | Path, resume_step: int = 0) -> None:
        super().__init__(save_dir, name="", version="", flush_logs_every_n_steps=1)
        self.resume_step = resume_step

    @property
    def experiment(self) -> Any:
        if self._experiment is not None:
            return super().experiment
        kept = self._earlier_rows()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Experiment logs directory")
            writer = super().experiment
        if kept:
            writer.metrics = kept
            writer.save()
        return writer

    def _earlier_rows(self) -> list[dict[str, str]]:
        file = Path(self.log_dir) / "metrics.csv"
        if not file.is_file():
            return []
        with file.open(newline="") as lines:
            return [
                {name: value for name, value in row.items() if value}
                for row in csv.DictReader(lines)
                if float(row["step"]) < self.resume_step
            ]


class LastAndBest(Checkpoint):
    """Keeps ``last.ckpt``: every so many steps, after every epoch, and where the run stops; and
    ``best.ckpt``: of the verification with the highest mean accuracy, the earliest among equals.

    Never after the last batch of an epoch but at the epoch's end, when it has been verified:
    Lightning 2.6 counts an epoch twice when it goes on from between the two.

    Args:
        dirpath: folder of the two files.
        every_n_steps: optimizer steps between two savings of ``last.ckpt`` within an epoch; None
            for none.

    Attributes:
        best: optimizer steps done at the best verification and its accuracy, ``{"step": int,
            "accuracy": float}``; None before the first. The untrained network does not count.

    Raises:
        ValueError: ``every_n_steps`` below 1.
    """

    def __init__(self, dirpath: str | Path, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"checkpoint.every_n_steps must be at least 1, got {every_n_steps}")
        self.folder, self.every_n_steps = Path(dirpath), every_n_steps
        self.best: dict[str, Any] | None = None
        self._saved_step = -1
        self._best_is_due = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A resumed run is at a saved step until its next optimizer step.
        self._saved_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        due = step == trainer.max_steps or (self.every_n_steps and step % self.every_n_steps == 0)
        if due and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = trainer.callback_metrics.get("verify/accuracy")
        if found is None or not trainer.global_step:
            return
        if self.best is None or found.item() > self.best["accuracy"]:
            self.best = {"step": trainer.global_step, "accuracy": found.item()}
            self._best_is_due = True
            fitting = trainer.state.fn == TrainerFn.FITTING
            if not (fitting and trainer.fit_loop.epoch_loop.batch_progress.is_last_batch):
                self._save_best(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._save_best(trainer)
        self._save(trainer)

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # A run with max_steps would go on with one batch more of an epoch that has ended, from any
        # callback's checkpoint.
        loop = checkpoint["loops"]["fit_loop"]
        if loop["epoch_progress"]["current"]["processed"] > trainer.current_epoch:
            batches = loop["epoch_loop.batch_progress"]
            batches.update(current=dict.fromkeys(batches["current"], 0), is_last_batch=False)
            for count in ("total", "current"):
                epochs = loop["epoch_progress"][count]
                epochs["completed"] = epochs["processed"]

    def _save(self, trainer: Trainer) -> None:
        if self._saved_step != trainer.global_step:
            self._saved_step = trainer.global_step
            trainer.save_checkpoint(self.folder / "last.ckpt")

    def _save_best(self, trainer: Trainer) -> None:
        if self._best_is_due:
            self._best_is_due = False
            trainer.save_checkpoint(self.folder / "best.ckpt")


class OneRun(Callback):
    """Refuses ranks that are not of one run: each of them finds its folder and checkpoint itself.

    Args:
        folder: the run folder.
        resume_step: optimizer step that the run goes on from; 0 for a new one.

    Raises:
        MisconfigurationException: on every rank, when the ranks have not the same.
    """

    def __init__(self, folder: Path, resume_step: int) -> None:
        self.place = f"{folder} at step {resume_step}"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size == 1:
            return
        places = [""] * trainer.world_size
        dist.all_gather_object(places, self.place)
        if len(set(places)) > 1:
            raise MisconfigurationException(
                f"all ranks must have one run folder and go on from one checkpoint, got "
                f"{' and '.join(sorted(set(places)))}: give hydra.run.dir, on a disk they share"
            )


class RunRecord(Callback):
    """Measures a run, and writes down what came of it.

    Every checkpoint gets ``run``, plain data that says what made it: ``config``, ``commit``,
    ``steps`` and ``verification``, the accuracy of each set, if just these weights have been
    verified. From it
    :func:`fastface_lightning.load_embedder` builds the network.

    Args:
        folder: the run folder.
        config: what the run was composed of, plain data.

    Attributes:
        untrained: verification accuracy of each set before training, by its name; to be set.
        accuracy: the same at the last verification.
        std: its standard deviation over the folds.
        verified_step: optimizer steps done at the last verification.
        train_set: the training set, whose bad images are written down; to be set.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        self.folder, self.config = folder, config
        self.commit = commit()
        self.untrained: dict[str, float] = {}
        self.accuracy: dict[str, float] = {}
        self.std: dict[str, float] = {}
        self.verified_step: int | None = None
        self.train_set: FaceDataset | None = None
        self._earlier_bad: list[str] = []
        self._images = 0
        self._lr: float | None = None
        self._lr_changes: list[Change] = []
        self._train_seconds = 0.0
        self._earlier_seconds = 0.0
        self._losses: deque[Tensor] = deque(maxlen=100)
        self._started = self._last = time.perf_counter()
        self._at_last_log = (0, 0.0)  # images and seconds of training

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        self._train_seconds += now - self._last
        self._last = now
        self._images += images_in(batch) * trainer.world_size
        if outputs:
            self._losses.append(outputs["loss"].float() * trainer.accumulate_grad_batches)
        lr = trainer.optimizers[0].param_groups[0]["lr"]
        if self._lr and lr != self._lr:  # from 0 there is no factor
            self._lr_changes.append(Change(trainer.global_step - 1, lr / self._lr, lr))
        self._lr = lr
        if trainer._logger_connector.should_update_logs:
            images, seconds = self._at_last_log
            speed = (self._images - images) / max(self._train_seconds - seconds, 1e-9)
            self._at_last_log = (self._images, self._train_seconds)
            pl_module.log("train/images_per_second", speed)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for key, value in trainer.callback_metrics.items():
            group, _, rest = key.partition("/")
            name, _, kind = rest.rpartition("/")
            if group == "verify" and name:
                (self.accuracy if kind == "accuracy" else self.std)[name] = value.item()
        self.verified_step = trainer.global_step
        if trainer.is_global_zero:
            self._write_roc(pl_module.curves)  # type: ignore[arg-type]
        self._last = time.perf_counter()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        verified = self.verified_step == trainer.global_step  # else the figures are of others
        checkpoint["run"] = {
            "config": self.config,
            "commit": self.commit,
            "steps": trainer.global_step,
            "verification": dict(self.accuracy) if verified else {},
        }

    def _write_roc(self, curves: Mapping[str, ROC]) -> None:
        """The last verification's ROC curves, at some 500 points each, as ``roc.json``."""
        points = {}
        for name, roc in curves.items():
            taken = thin_curve(roc.far.numpy())
            points[name] = {"far": roc.far[taken].tolist(), "tar": roc.tar[taken].tolist()}
        write_text(self.folder / "roc.json", json.dumps(points) + "\n")

    def write(self, trainer: Trainer) -> dict[str, Any]:
        """Write ``results.json``, ``report.html`` and, from a ``metrics.csv``, ``schedule.png``.

        Args:
            trainer: whose ``fit`` has ended.

        Returns:
            What ``results.json`` holds. ``final_loss`` is the mean of the last 100 micro-batches;
            ``images_per_second`` counts training with data loading, not verification; time and
            images are those of all parts of a resumed run.
        """
        results = self._results(trainer)
        if trainer.is_global_zero:
            write_text(self.folder / "results.json", json.dumps(results, indent=2) + "\n")
            if (self.folder / "metrics.csv").is_file():
                plot_run(self.folder, [change["step"] for change in results["lr_changes"]])
            write_report(self.folder)
        return results

    def _results(self, trainer: Trainer) -> dict[str, Any]:
        device = trainer.strategy.root_device
        losses = [loss.item() for loss in self._losses]
        return {
            "steps": trainer.global_step,
            "epochs": trainer.current_epoch,
            "final_loss": sum(losses) / len(losses) if losses else None,
            "verification": {
                name: {
                    "accuracy": accuracy,
                    "std": self.std[name],
                    "untrained_accuracy": self.untrained.get(name),
                }
                for name, accuracy in self.accuracy.items()
            },
            "best": self._best(trainer),
            "lr_changes": [change._asdict() for change in self._changes(trainer)],
            "final_lr": float(trainer.optimizers[0].param_groups[0]["lr"]),
            "images": self._images,
            "bad_images": self._bad_images(),
            "images_per_second": self._images / max(self._train_seconds, 1e-9),
            "wall_seconds": self._wall_seconds(),
            "peak_memory_bytes": peak_memory(device),
            "device": device_name(device),
            "precision": str(trainer.precision),
            "environment": environment(self.commit),
        }

    def _best(self, trainer: Trainer) -> dict[str, Any] | None:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, LastAndBest):
                return callback.best
        return None

    def _changes(self, trainer: Trainer) -> list[Change]:
        """Steps at which the learning rate changed; none for a schedule that always changes it."""
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, FastFaceCallback):
                return callback.changes
        return self._lr_changes if 10 * len(self._lr_changes) < trainer.global_step else []

    def _bad_images(self) -> list[str]:
        """Training images that this process could not read, in all parts of the run."""
        now = [] if self.train_set is None else self.train_set.bad_images()
        return self._earlier_bad + [name for name in now if name not in self._earlier_bad]

    def _wall_seconds(self) -> float:
        return self._earlier_seconds + time.perf_counter() - self._started

    def state_dict(self) -> dict[str, Any]:
        return {
            "images": self._images,
            "bad_images": self._bad_images(),
            "train_seconds": self._train_seconds,
            "wall_seconds": self._wall_seconds(),
            "untrained": self.untrained,
            "accuracy": self.accuracy,
            "std": self.std,
            "verified_step": self.verified_step,
            "losses": [loss.item() for loss in self._losses],
            "lr": None if self._lr is None else float(self._lr),
            "lr_changes": [
                [step, float(factor), float(lr)] for step, factor, lr in self._lr_changes
            ],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._images = state_dict["images"]
        self._earlier_bad = state_dict["bad_images"]
        self._train_seconds = state_dict["train_seconds"]
        self._at_last_log = (self._images, self._train_seconds)
        self._earlier_seconds = state_dict["wall_seconds"]
        self.untrained = state_dict["untrained"]
        self.accuracy, self.std = state_dict["accuracy"], state_dict["std"]
        self.verified_step = state_dict["verified_step"]
        self._losses.extend(torch.tensor(state_dict["losses"]))
        self._lr = state_dict["lr"]
        self._lr_changes = [Change(*made) for made in state_dict["lr_changes"]]


def plot_run(folder: Path, changes: list[int]) -> None:
    """Draw ``schedule.png`` from the ``metrics.csv`` of a run folder."""
    metrics = read_metrics((folder / "metrics.csv").read_bytes())
    if "train/loss" not in metrics:
        return
    steps, loss = metrics["train/loss"]

    def series(name: str | None) -> Any:
        """A column at the steps of the loss, or before: some are logged in rows of their own."""
        if name not in metrics:
            return None
        at, values = metrics[name]
        return values[np.searchsorted(at, steps, side="right").clip(1) - 1]

    plot_schedule(
        folder / "schedule.png",
        steps=steps,
        loss=loss,
        response=series("fastface/response"),
        threshold=series("fastface/threshold"),
        lr=series(next((name for name in metrics if name.startswith("lr-")), None)),
        changes=changes,
    )


def peak_memory(device: torch.device) -> int:
    """Bytes: most allocated on a GPU so far; on a CPU the process's largest resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # what getrusage tells may be the parent's
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) * 1024
    import resource  # not there on Windows

    # macOS counts bytes, others kilobytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_of(device: torch.device) -> int:
    """Bytes: all of a GPU's memory; on a CPU the system's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def device_name(device: torch.device) -> str:
    """What a reader of a figure wants to know of the hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()}, {torch.get_num_threads()} threads"


def commit() -> str | None:
    """The project's commit, ``+`` after it where files differ from it; None outside a checkout."""
    here = Path(__file__).resolve()
    git = ["git", "-C", str(here.parent)]
    try:
        # Installed into some other project's folder, the commit would be that project's.
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], check=True, **_QUIET)
        head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, **_QUIET).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], check=False, **_QUIET)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed.returncode else "")


def environment(commit: str | None) -> dict[str, str]:
    """Where a run took place, by what a reader calls it."""
    memory = memory_of(torch.device("cpu")) / 2**30
    packages = ("torch", "lightning", "torchmetrics", "timm", "hydra-core", "numpy")
    return {
        "commit": commit or "unknown",
        "system": platform.platform(),
        "processor": f"{processor_name()}, {os.cpu_count()} logical cores, {memory:.0f} GiB",
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def processor_name() -> str:
    """The processor's name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()
