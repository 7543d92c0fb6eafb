"""A run keeps its last weights and its best, goes on exactly where it stopped, may end early."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from ..files import replacing
from .losses import is_finite

log = logging.getLogger(__name__)
LARGE = 2**28  # bytes: no layer of a network, but the centres of 131,072 identities


class LastAndBest(Checkpoint):
    """Keeps ``last.ckpt``: every so many steps, after every epoch, and where the run stops; and
    ``best.ckpt``: of the verification with the highest mean accuracy, the earliest among equals.
    Weights or optimizer states that are not finite are kept as neither.

    Never after the last batch of an epoch but at the epoch's end, when it has been verified:
    Lightning 2.6 counts an epoch twice when it goes on from between the two.

    Args:
        dirpath: folder of the two files.
        every_n_steps: optimizer steps between two savings of ``last.ckpt`` within an epoch; None
            for none.

    Attributes:
        best: optimizer steps done at the best verification and its accuracy, ``{"step": int,
            "accuracy": float}``; None before the first. The untrained network does not count.
        last_good: path of ``last.ckpt``, once this run has written or resumed it; else None.

    Raises:
        ValueError: ``every_n_steps`` below 1.
    """

    def __init__(self, dirpath: str | Path, every_n_steps: int | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise ValueError(f"checkpoint.every_n_steps must be at least 1, got {every_n_steps}")
        self.folder, self.every_n_steps = Path(dirpath), every_n_steps
        self.best: dict[str, Any] | None = None
        self.last_good: Path | None = None
        self._saved_step = -1
        self._best_is_due = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A resumed run is at a saved step until its next optimizer step.
        self._saved_step = trainer.global_step
        self.last_good = Path(trainer.ckpt_path) if trainer.ckpt_path else None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        due = step == trainer.max_steps or (self.every_n_steps and step % self.every_n_steps == 0)
        # Of a run that is stopped within an epoch, what is saved at the epoch's end goes on with
        # the next epoch.
        if (
            due or trainer.should_stop
        ) and not trainer.fit_loop.epoch_loop.batch_progress.is_last_batch:
            self._save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        accuracy = trainer.callback_metrics.get("verify/accuracy")
        if accuracy is None or not trainer.global_step:
            return
        if self.best is None or accuracy.item() > self.best["accuracy"]:
            self.best = {"step": trainer.global_step, "accuracy": accuracy.item()}
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
            if self._write(trainer, "last.ckpt"):
                self.last_good = self.folder / "last.ckpt"

    def _save_best(self, trainer: Trainer) -> None:
        if self._best_is_due:
            self._best_is_due = False
            self._write(trainer, "best.ckpt")

    def _write(self, trainer: Trainer, name: str) -> bool:
        module, optimizers = trainer.lightning_module, trainer.optimizers
        states = [state.values() for each in optimizers for state in each.state.values()]
        finite = is_finite(module.parameters(), module.buffers(), *states)
        if not trainer.strategy.reduce_boolean_decision(finite):
            text = "step %d: weights or optimizer states are not finite, %s is left as it was"
            log.warning(text, trainer.global_step, name)
            return False
        trainer.save_checkpoint(self.folder / name, weights_only=False)
        return True


class StreamedCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint straight to a file beside the old one, which it then replaces.

    Lightning's own saves into memory first: of 2,059,906 identities another 8.4 GB.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        if storage_options is not None:
            raise TypeError(f"storage_options must be None, got {storage_options!r}")
        with replacing(Path(path)) as part:
            torch.save(checkpoint, part)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """A checkpoint on the CPU. Of several ranks each takes the rows that are its own from the
        file: tensors of at least ``LARGE`` bytes stay there."""
        several = dist.is_initialized() and dist.get_world_size() > 1
        saved = torch.load(path, map_location="cpu", weights_only=weights_only, mmap=several)
        if several:
            _copy_small(saved)
        return saved


def _copy_small(container: Any) -> None:
    """Copy, in place, what nested dictionaries and lists hold of a file mapped into memory."""
    items = container.items() if isinstance(container, dict) else enumerate(container)
    for key, value in list(items):
        if isinstance(value, dict | list):
            _copy_small(value)
        elif isinstance(value, Tensor) and value.nbytes < LARGE:
            container[key] = value.clone()


class EarlyStop(EarlyStopping):
    """Lightning's EarlyStopping; a resume may have another patience, and does not train a run on
    that has been ended."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({**state_dict, "patience": self.patience})

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop |= self.wait_count >= self.patience


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
