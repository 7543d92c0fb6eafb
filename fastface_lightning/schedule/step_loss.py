"""The loss of a micro-batch: from what ``training_step`` returns, or from what it logs."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor


def returned_loss(
    pl_module: LightningModule, outputs: Any, key: str, needed: bool
) -> Tensor | None:
    """What training_step returned under ``key``, undivided by the accumulation of gradients.

    None where it is missing and not ``needed``. ``outputs`` are those of ``on_train_batch_end``,
    whose ``"loss"`` Lightning has divided by the number of micro-batches.
    """
    if isinstance(outputs, dict) and key in outputs:
        divided_by = pl_module.trainer.accumulate_grad_batches if key == "loss" else 1
        return scalar(outputs[key], key, pl_module) * divided_by
    if needed:
        got = ", ".join(map(str, outputs or ())) or "nothing"
        raise MisconfigurationException(f"training_step must return loss_key={key!r}, got {got}")
    return None


def logged_loss(trainer: Trainer, name: str) -> Tensor | None:
    """What the last training step to log ``name`` logged, a new tensor each time; None if none did.

    (The trainer's ``callback_metrics`` would read the progress bar's values, and so wait.)
    """
    for item in trainer.fit_loop.epoch_loop._results.values():
        if name in (item.meta.name, item.meta.forked_name(on_step=True)):
            if not item.meta.on_step:
                raise MisconfigurationException(
                    f"monitor={name!r} must be logged with on_step=True in training_step, got an "
                    f"average of the epoch"
                )
            value: Tensor | None = item._forward_cache
            return value
    return None


def was_validated(trainer: Trainer, name: str) -> bool:
    """Whether the validation that has just ended logged ``name``, and not an earlier one alone."""
    items = trainer.fit_loop.epoch_loop.val_loop._results.items()
    names = [key.split(".", 1)[-1] for key, item in items if not item.has_reset]
    return any(
        name == n or name == f"{n}_epoch" or name.startswith(f"{n}/dataloader") for n in names
    )


def scalar(value: Any, name: str, pl_module: LightningModule) -> Tensor:
    """A loss as a float32 scalar on the module's device, out of any graph."""
    loss = torch.as_tensor(value, dtype=torch.float32, device=pl_module.device).detach()
    if loss.numel() != 1:
        raise MisconfigurationException(
            f"the loss {name!r} must be a scalar, got a tensor of shape {tuple(loss.shape)}"
        )
    return loss.reshape(())
