"""How many steps will a schedule take in a trainer's run? What the settings say, and the pace."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn


def steps_left(trainer: Trainer, validations: bool = False) -> int:
    """Steps of a schedule in what is left of the run, as the trainer's settings imply; at least 1.

    One for each optimizer step. Several optimizers under manual optimization are taken to step
    together, once a batch: the pace (see :func:`share_done`) tells later whether they do.

    Args:
        trainer: about to train; its training data may be loaded to count the batches.
        validations: count validations in the place of optimizer steps.

    Raises:
        MisconfigurationException: the run has no end that is known beforehand.
    """
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()
    together = max(1, len(trainer.optimizers))
    most = math.inf if trainer.max_steps == -1 else math.ceil(trainer.max_steps / together)
    if validations:
        left = _validations_left(trainer, most * trainer.accumulate_grad_batches)
    else:
        left = min(most - trainer.global_step // together, _steps_in_epochs_left(trainer))
    if not left < math.inf:
        raise MisconfigurationException(
            "FastFaceCallback needs the length of the run, got a trainer without an end: set "
            "max_steps or max_epochs, or FastFaceCallback(total_steps=...)"
        )
    return max(1, int(left))


def _steps_in_epochs_left(trainer: Trainer) -> float:
    """However gradients are accumulated; the first epoch may be a part of one."""
    per_epoch, last = trainer.num_training_batches, _max_epochs(trainer)
    if not max(per_epoch, last) < math.inf:
        return math.inf
    done, scheduling = _epochs_done(trainer), callbacks_of(trainer, "GradientAccumulationScheduler")
    begun, last = int(done), int(last)
    if begun >= last:
        return 0
    every = trainer.accumulate_grad_batches
    first = round((begun + 1 - done) * per_epoch)
    if not scheduling:
        return math.ceil(first / every) + (last - begun - 1) * math.ceil(per_epoch / every)
    every_in = scheduling[0].get_accumulate_grad_batches
    later = sum(math.ceil(per_epoch / every_in(epoch)) for epoch in range(begun + 1, last))
    return math.ceil(first / every_in(begun)) + later


def _validations_left(trainer: Trainer, most: float) -> float:
    """In at most so many batches of the whole run; the one that is under way is left, too."""
    per_epoch, last = trainer.num_training_batches, _max_epochs(trainer)
    every: Any = trainer.val_check_batch
    if every is None or every == math.inf:
        return math.inf
    if trainer.check_val_every_n_epoch is None or per_epoch == math.inf:
        batches = min(most, last * per_epoch)
        return batches // every - max(0, trainer.fit_loop.total_batch_idx) // every
    rarely, last = trainer.check_val_every_n_epoch, min(last, most // per_epoch)
    return (last // rarely - int(_epochs_done(trainer)) // rarely) * (per_epoch // every)


def _max_epochs(trainer: Trainer) -> float:
    return math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs


def _epochs_done(trainer: Trainer) -> float:
    """Epochs that are over and, where a checkpoint was of the middle of one, its share."""
    progress: Any = trainer.fit_loop.epoch_progress.current
    done: float = progress.processed
    if trainer.fit_loop.restarting and progress.ready > done and trainer.num_training_batches:
        batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        done += batches / trainer.num_training_batches
    return done


def has_ended(trainer: Trainer) -> bool:
    """Whether all the steps or epochs that were planned are over."""
    epochs = trainer.fit_loop.epoch_progress.current.processed  # type: ignore[attr-defined]
    return 0 < trainer.max_steps <= trainer.global_step or 0 < _max_epochs(trainer) <= epochs


def share_done(trainer: Trainer) -> float | None:
    """Share of the run that is over, in [0, 1], by its steps or epochs; None if unknown."""
    if callbacks_of(trainer, "GradientAccumulationScheduler"):
        return None  # its epochs differ
    shares = []
    if trainer.max_steps > 0:
        shares.append(trainer.global_step / trainer.max_steps)
    if 0 < _max_epochs(trainer) < math.inf:
        shares.append(_epochs_done(trainer) / _max_epochs(trainer))
    return min(1.0, max(shares)) if shares else None


class Pace:
    """Compares what a schedule is given with the steps that it is made for, and warns once.

    Args:
        made_for: steps that the schedule is bound to.
        advises: whether ``total_steps=`` would mend it: not what a checkpoint or the user has set.
    """

    def __init__(self, made_for: int, advises: bool = False) -> None:
        self.made_for, self.advises = made_for, advises
        self._noted: tuple[float, int] | None = None  # share of the run, and steps given by then
        self._warned = False

    def note(self, trainer: Trainer, given: int) -> None:
        """Begin at a point of the run."""
        if (share := share_done(trainer)) is not None:
            self._noted = share, given

    def project(self, trainer: Trainer, given: int) -> None:
        """Compare where the run will end at this pace; at the end of an epoch."""
        share = share_done(trainer)
        if self._noted is None:  # a checkpoint in the middle of an epoch tells no pace
            self.note(trainer, given)
        elif share is not None and share > self._noted[0]:
            began, before = self._noted
            self.compare(given + (given - before) / (share - began) * (1 - share))

    def compare(self, steps: float, so_far: bool = False) -> None:
        """Warn if ``steps`` are others than the schedule is made for, by 5 % and two or more."""
        if self._warned or abs(steps - self.made_for) <= 0.05 * self.made_for + 2:
            return
        self._warned = True
        text = f"the schedule is made for {self.made_for} steps and the run gives it {round(steps)}"
        if so_far:
            text += " so far: total_steps is past"
        elif self.advises and steps:
            text += f": say so by FastFaceCallback(total_steps={round(steps)})"
        rank_zero_warn(text)


def callbacks_of(trainer: Trainer, kind: str) -> list[Any]:
    """The trainer's callbacks of a class of that name, of Lightning under either of its names."""
    packages = ("lightning", "pytorch_lightning", __name__.split(".")[0])
    return [
        callback
        for callback in trainer.callbacks  # type: ignore[attr-defined]
        for base in type(callback).__mro__
        if base.__name__ == kind and base.__module__.split(".")[0] in packages
    ]
