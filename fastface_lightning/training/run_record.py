"""What a run leaves behind: its results, a report, a figure of its schedule."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer

from ..data import FaceDataModule, FaceDataset
from ..evaluation import thresholds_of
from ..files import write_text
from ..report.curves import thin_curve
from ..report.page import write_report
from ..schedule.callback import FastFaceCallback
from ..schedule.replay import Change
from .averaging import WeightAverage
from .checkpoints import LastAndBest
from .environment import commit, device_name, environment, peak_memory
from .loggers import log_figures, log_settings
from .losses import StepLosses
from .module import FaceModule, images_in

C = TypeVar("C", bound=Callback)
UNKNOWN: dict[str, Any] = {"people": None, "trained_people": 0}  # of a set


class RunRecord(Callback):
    """Measures a run, and writes down what came of it.

    Every checkpoint gets ``run``, plain data that says what made it: ``config``, ``commit``,
    ``steps`` and, if just these weights have been verified, ``verification``, the accuracy of each
    set, and ``thresholds``, :func:`fastface_lightning.evaluation.thresholds_of` them. From it
    :func:`fastface_lightning.load_embedder` builds the network.

    Args:
        folder: the run folder.
        config: what the run was composed of, plain data; the loggers are told it too.
        resumed: whether the run goes on with an earlier part.

    Attributes:
        verification: by the name of each set ``accuracy`` at the last verification, None where no
            embedding was finite, its ``std`` over the folds and ``accuracy_before``, of the network
            as this run found it, None where that is not known; ``people`` and ``trained_people`` of
            the set; where pairs are of both kinds, what
            :func:`fastface_lightning.evaluation.rates_at_far` gives; once a run with averaged
            weights has ended, ``raw_accuracy``, of the weights as they were trained.
        verified_step: optimizer steps done at the last verification.
        images: trained on so far, by all ranks.
        train_seconds: of training with data loading, without verification.
    """

    _KEPT = ("verification", "verified_step", "images", "train_seconds", "_lr", "_peak")

    def __init__(self, folder: Path, config: Mapping[str, Any], resumed: bool = False) -> None:
        self.folder, self.config, self.resumed = folder, config, resumed
        self.commit = commit()
        self.verification: dict[str, dict[str, Any]] = {}
        self.verified_step: int | None = None
        self.images = 0
        self.train_seconds = 0.0
        self._settings_logged = False
        self._train_set: FaceDataset | None = None
        self._counts: dict[str, int] = {}
        self._people: dict[str, dict[str, Any]] = {}
        self._earlier_bad: list[str] = []
        self._lr: float | None = None
        self._peak = 0  # bytes, of earlier parts of the run
        self._lr_changes: list[Change] = []
        self._started = self._last = time.perf_counter()
        self._at_last_log = (0, 0.0)  # images and seconds of training

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, FaceDataModule):
            self._train_set, self._counts = data.train_set, data.counts()
            self._people = {
                name: {"people": pairs.num_people, "trained_people": pairs.trained_people}
                for name, pairs in data.sets.items()
            }
        if trainer.is_global_zero and not self._settings_logged:
            self._settings_logged = True
            log_settings(trainer.loggers, self.folder, self.config, self.resumed)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._last = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = time.perf_counter()
        self.train_seconds += now - self._last
        self._last = now
        self.images += images_in(batch) * trainer.world_size
        lr = float(trainer.optimizers[0].param_groups[0]["lr"])
        if self._lr and lr != self._lr:  # from 0 there is no factor
            self._lr_changes.append(Change(trainer.global_step - 1, lr / self._lr, lr))
        self._lr = lr
        if trainer._logger_connector.should_update_logs:
            images, seconds = self._at_last_log
            speed = (self.images - images) / max(self.train_seconds - seconds, 1e-9)
            self._at_last_log = (self.images, self.train_seconds)
            pl_module.log("train/images_per_second", speed)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        if module.verify_as != "verify":
            return
        for name in self.verification.keys() - module.verify_names:
            del self.verification[name]  # of an earlier part of the run, with other sets
        for name in module.verify_names:
            verified = self.verification.setdefault(name, {"accuracy_before": None})
            for key in ("raw_accuracy", "impostors", "tar", "far", "cosine_thresholds"):
                verified.pop(key, None)  # of an earlier verification
            verified.update(module.rates.get(name, {}), **self._people.get(name, UNKNOWN))
            for key in ("accuracy", "std"):
                value = trainer.callback_metrics[f"verify/{name}/{key}"].item()
                verified[key] = value if math.isfinite(value) else None
            if not trainer.global_step and not trainer.sanity_checking:
                verified["accuracy_before"] = verified["accuracy"]
        self.verified_step = trainer.global_step
        if trainer.is_global_zero:
            points = {}  # some 500 of each curve
            for name, roc in module.curves.items():
                taken = thin_curve(roc.far.numpy())
                points[name] = {"far": roc.far[taken].tolist(), "tar": roc.tar[taken].tolist()}
            write_text(self.folder / "roc.json", json.dumps(points) + "\n")
        self._last = time.perf_counter()

    def verify_raw(self, trainer: Trainer, module: FaceModule, data: FaceDataModule) -> None:
        """Where weights are averaged verify the raw ones too, logged as ``verify_raw/...``."""
        averaging = _callback(trainer, WeightAverage)
        if averaging is None:
            return
        with averaging.judging_raw(), module.verifying_as("verify_raw"):
            trainer.validate(module, data, verbose=False)
        for name in module.verify_names:
            accuracy = trainer.callback_metrics[f"verify_raw/{name}/accuracy"].item()
            self.verification[name]["raw_accuracy"] = accuracy

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self._peak = max(self._peak, peak_memory(trainer.strategy.root_device))
        verified = self.verified_step == trainer.global_step  # else the figures are of others
        accuracies = {name: each["accuracy"] for name, each in self.verification.items()}
        thresholds = thresholds_of(self.verification, True, str(trainer.precision))
        checkpoint["run"] = {
            "config": self.config,
            "commit": self.commit,
            "steps": trainer.global_step,
            "verification": accuracies if verified else {},
            "thresholds": thresholds if verified else {},
        }

    def write(self, trainer: Trainer, interrupted: bool = False) -> dict[str, Any]:
        """Write ``results.json``, and the report from it and what else is in the folder.

        Args:
            trainer: whose ``fit`` has ended.
            interrupted: whether a signal ended it.

        Returns:
            What ``results.json`` holds. ``final_loss`` is the mean of the last 100 steps or fewer;
            ``images_per_second`` counts training with data loading, not verification; time and
            images are those of all parts of a resumed run.
        """
        device = trainer.strategy.root_device
        losses, checkpoints = _callback(trainer, StepLosses), _callback(trainer, LastAndBest)
        schedule, averaging = (
            _callback(trainer, FastFaceCallback),
            _callback(trainer, WeightAverage),
        )
        changes = self._lr_changes if schedule is None else schedule.changes
        if schedule is None and 10 * len(changes) >= trainer.global_step:
            changes = []  # it always changes
        results = {
            "data": self._counts,
            "steps": trainer.global_step,
            "epochs": trainer.current_epoch,
            "final_loss": None if losses is None else losses.recent_mean(),
            "verification": self.verification,
            "verified_step": self.verified_step,
            "interrupted": interrupted,
            "best": None if checkpoints is None else checkpoints.best,
            "averaging": None if averaging is None else repr(averaging),
            "lr_changes": [change._asdict() for change in changes],
            "final_lr": float(trainer.optimizers[0].param_groups[0]["lr"]),
            "images": self.images,
            "bad_images": self._bad_images(),
            "images_per_second": self.images / max(self.train_seconds, 1e-9),
            "wall_seconds": time.perf_counter() - self._started,
            "peak_memory_bytes": max(self._peak, peak_memory(device)),
            "device": device_name(device),
            "precision": str(trainer.precision),
            "environment": environment(self.commit),
        }
        if trainer.is_global_zero:
            write_text(self.folder / "results.json", json.dumps(results, indent=2) + "\n")
            write_report(self.folder)
            log_figures(trainer.loggers, self.folder, trainer.global_step)
        return results

    def _bad_images(self) -> list[str]:
        """Training images that this process could not read, in all parts of the run."""
        now = [] if self._train_set is None else self._train_set.bad_images()
        return self._earlier_bad + [name for name in now if name not in self._earlier_bad]

    def state_dict(self) -> dict[str, Any]:
        return {
            **{name: getattr(self, name) for name in self._KEPT},
            "bad_images": self._bad_images(),
            "wall_seconds": time.perf_counter() - self._started,
            "lr_changes": [list(change) for change in self._lr_changes],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for name in self._KEPT:
            setattr(self, name, state_dict[name])
        self._earlier_bad = state_dict["bad_images"]
        self._started -= state_dict["wall_seconds"]  # as if this part had gone on at once
        self._lr_changes = [Change(*change) for change in state_dict["lr_changes"]]
        self._at_last_log = (self.images, self.train_seconds)


def _callback(trainer: Trainer, wanted: type[C]) -> C | None:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return next((callback for callback in callbacks if isinstance(callback, wanted)), None)
