"""The loss of a micro-batch: from what ``training_step`` returns, or from what it logs."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor


def returned_loss(pl_module: LightningModule, outputs: Any, key: str) -> Tensor | None:
    """What training_step returned under ``key``, undivided by the accumulation of gradients.

    Args:
        pl_module: in its training.
        outputs: as ``on_train_batch_end`` gets them.
        key: ``"loss"`` is what Lightning divides by the number of micro-batches.

    Returns:
        float32 scalar on the module's device, or None where the key is missing.
    """
    if not isinstance(outputs, dict) or key not in outputs:
        return None
    divided_by = pl_module.trainer.accumulate_grad_batches if key == "loss" else 1
    return scalar(outputs[key], key, pl_module) * divided_by


def logged_item(trainer: Trainer, name: str) -> Any:
    """Lightning's record of what this epoch's training steps log under ``name``, else None.

    Its ``_forward_cache`` is the last micro-batch's value, a new tensor each time. (The trainer's
    ``callback_metrics`` would read what goes to the progress bar, and wait for the device.)
    """
    for item in trainer.fit_loop.epoch_loop._results.values():
        if name in (item.meta.name, item.meta.forked_name(on_step=True)):
            if not item.meta.on_step:
                raise MisconfigurationException(
                    f"monitor={name!r} must be logged with on_step=True in training_step, got an "
                    f"average of the epoch"
                )
            return item
    return None


def scalar(value: Any, name: str, pl_module: LightningModule) -> Tensor:
    """A loss as a float32 scalar on the module's device, out of any graph."""
    loss = torch.as_tensor(value, dtype=torch.float32, device=pl_module.device).detach()
    if loss.numel() != 1:
        raise MisconfigurationException(
            f"the loss {name!r} must be a scalar, got a tensor of shape {tuple(loss.shape)}"
        )
    return loss.reshape(())
