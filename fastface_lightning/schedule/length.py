"""How many steps will a schedule take in a trainer's run? What the settings say, and the pace."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException


def total_steps_of(trainer: Trainer, validations: bool = False) -> int:
    """Steps of a schedule in the whole run, as the trainer's settings imply.

    One for each optimizer step. Several optimizers under manual optimization are taken to step
    together, once a batch: :func:`share_done` tells later whether they do.

    Args:
        trainer: set up; its training data may be loaded to count the batches.
        validations: count validations in the place of optimizer steps.

    Raises:
        MisconfigurationException: the run has no end that is known beforehand.
    """
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()
    per_epoch: float = trainer.num_training_batches
    epochs: float = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs
    steps: float = math.inf if trainer.max_steps == -1 else trainer.max_steps
    steps = math.ceil(steps / max(1, len(trainer.optimizers))) if steps < math.inf else steps
    if validations:
        batches = min(per_epoch * epochs, steps * trainer.accumulate_grad_batches)
        total = _validations_in(trainer, batches, per_epoch)
    else:
        total = min(steps, _steps_in(trainer, per_epoch, epochs))
    if not total < math.inf:
        raise MisconfigurationException(
            "FastFaceCallback needs the length of the run, got a trainer without an end: set "
            "max_steps or max_epochs, or FastFaceCallback(total_steps=...)"
        )
    return int(total)


def _steps_in(trainer: Trainer, per_epoch: float, epochs: float) -> float:
    """Optimizer steps in so many epochs of so many batches, however gradients are accumulated."""
    scheduling = callbacks_of(trainer, "GradientAccumulationScheduler")
    if not max(per_epoch, epochs) < math.inf:
        return math.inf
    if not scheduling:
        return math.ceil(per_epoch / trainer.accumulate_grad_batches) * max(1, epochs)
    factors = map(scheduling[0].get_accumulate_grad_batches, range(int(epochs) or 1))
    return sum(math.ceil(per_epoch / factor) for factor in factors)


def _validations_in(trainer: Trainer, batches: float, per_epoch: float) -> float:
    """Validations in so many training batches."""
    every: Any = trainer.val_check_batch
    if not batches < math.inf or every is None or every == math.inf:
        return math.inf
    if trainer.check_val_every_n_epoch is None:
        return max(1, batches // every)
    epochs = math.ceil(batches / per_epoch) // trainer.check_val_every_n_epoch
    return max(1, epochs * (per_epoch // every))


def share_done(trainer: Trainer, by_time: bool = True) -> float | None:
    """Share of the run that is over, in [0, 1], by its steps, epochs or time; None if unknown."""
    if callbacks_of(trainer, "GradientAccumulationScheduler"):
        return None  # its epochs differ
    epoch_loop = trainer.fit_loop.epoch_loop
    timers = callbacks_of(trainer, "Timer") if by_time else []
    shares = [timer.time_elapsed() / timer._duration for timer in timers if timer._duration]
    if trainer.max_steps > 0:
        shares.append(trainer.global_step / trainer.max_steps)
    if (trainer.max_epochs or -1) > 0:
        progress: Any = trainer.fit_loop.epoch_progress.current
        done: float = progress.processed
        if progress.ready > progress.processed and trainer.num_training_batches:
            done += epoch_loop.batch_progress.current.ready / trainer.num_training_batches
        shares.append(done / trainer.max_epochs)  # type: ignore[operator]
    return min(1.0, max(shares)) if shares else None


def callbacks_of(trainer: Trainer, kind: str) -> list[Any]:
    """The trainer's callbacks of a class of that name, of Lightning under either of its names."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    return [c for c in callbacks if any(base.__name__ == kind for base in type(c).__mro__)]
