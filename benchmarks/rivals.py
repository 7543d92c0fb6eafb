"""Ways to train that bring an optimizer or a scheduler of another package with them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer
from torch.optim.swa_utils import update_bn

from fastface_lightning.backbones import normalise

IMAGES = 3_200  # of the training set, from which batch statistics are taken anew


class GreedyLR(Callback):
    """transformers' GreedyLR on the loss of every step: up while it falls, down where it does not.

    Args:
        least: lowest rate over the optimizer's own.
        most: highest rate over the optimizer's own.
        settings: keyword arguments of ``transformers.optimization.GreedyLR``.

    References:
        Subramaniam et al., GreedyLR, arXiv 2512.14527.
    """

    def __init__(self, least: float, most: float, **settings: Any) -> None:
        self.least, self.most, self.settings = least, most, settings

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        from transformers.optimization import GreedyLR as Scheduler

        (optimizer,) = trainer.optimizers
        lr = optimizer.param_groups[0]["lr"]
        bounds = {"min_lr": lr * self.least, "max_lr": lr * self.most}
        self.scheduler = Scheduler(optimizer, **bounds, **self.settings)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.scheduler.step(outputs["loss"])


class ScheduleFree(Callback):
    """Schedule-Free SGD, whose weights to judge are a running mean of those it steps to.

    The batch statistics of that mean are taken anew wherever it is judged.

    Args:
        warmup: share of the run over which the rate rises.
        settings: keyword arguments of ``schedulefree.SGDScheduleFree``.

    References:
        Defazio et al., The Road Less Scheduled, arXiv 2405.15682.
    """

    def __init__(self, warmup: float, **settings: Any) -> None:
        self.warmup, self.settings = warmup, settings

    def optimizer(self, parameters: Any, lr: float, steps: int) -> Optimizer:
        """The optimizer for a run of so many steps."""
        from schedulefree import SGDScheduleFree

        warmup = round(self.warmup * steps)
        return SGDScheduleFree(parameters, lr=lr, warmup_steps=warmup, **self.settings)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for optimizer in trainer.optimizers:
            optimizer.train()  # type: ignore[attr-defined]

    @contextlib.contextmanager
    def averaged(self, trainer: Trainer, module: Any) -> Iterator[None]:
        """Within it the module has the mean weights and their batch statistics."""
        (optimizer,) = trainer.optimizers
        before = {name: buffer.clone() for name, buffer in module.backbone.named_buffers()}
        optimizer.eval()  # type: ignore[attr-defined]
        loader: Any = trainer.train_dataloader
        images = loader.dataset.images
        some = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:IMAGES]
        update_bn((normalise(images[part]) for part in some.split(64)), module.backbone)
        yield
        optimizer.train()  # type: ignore[attr-defined]
        for name, buffer in module.backbone.named_buffers():
            buffer.copy_(before[name])
