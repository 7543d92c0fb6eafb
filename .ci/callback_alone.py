"""Train 400 steps with the callbacks where torch, Lightning and this wheel are all there is.

Run by .ci/run in such an environment, away from the checkout.
"""

import importlib.util
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, __version__
from torch import Tensor, nn

from fastface_lightning import (
    MHLR,
    FastFace,
    FastFaceCallback,
    FastFaceLR,
    WeightAverage,
    replay,
)

for absent in ("timm", "hydra", "omegaconf", "torchvision", "matplotlib", "PIL", "rich"):
    assert importlib.util.find_spec(absent) is None, f"{absent} is here: this check checks nothing"


class Line(LightningModule):
    """A line through points of noise: its loss is flat after a few steps."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Linear(4, 1)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return (self.line(batch) - 1).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


torch.manual_seed(0)
quiet: dict[str, Any] = dict.fromkeys(
    ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
)
for schedule in (FastFace(), MHLR()):
    module, average = Line(), WeightAverage()
    callbacks = [FastFaceCallback(schedule), average]
    trainer = Trainer(accelerator="cpu", max_steps=400, callbacks=callbacks, **quiet)
    trainer.fit(module, torch.utils.data.DataLoader(torch.randn(200, 4), batch_size=4))
    (rate,) = (group["lr"] for group in trainer.optimizers[0].param_groups)
    assert trainer.global_step == 400 and 0 < rate < 0.1, rate
    raw = module.line.weight.clone()
    average.copy_to(module)
    assert 0 < (module.line.weight - raw).abs().max() < 0.1
    print(f"lightning {__version__}, torch {torch.__version__}, {schedule}: 0.1 -> {rate:g}")

optimizer = torch.optim.SGD(Line().parameters(), lr=0.1)
scheduler = FastFaceLR(optimizer, total_steps=400)
for _ in range(400):
    optimizer.step()
    scheduler.step(1.0)
assert scheduler.get_last_lr()[0] == replay([1.0] * 400, FastFace(), 400, 0.1)[-1].lr
