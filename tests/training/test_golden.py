"""Fifty steps of the training module give the losses that they gave when they were written down."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra.utils import instantiate
from lightning.pytorch import Callback, Trainer
from test_conf import composed
from torch.utils.data import DataLoader, TensorDataset

from fastface_lightning.backbones.iresnet import iresnet_tiny
from fastface_lightning.classifiers import ChunkedClassifier
from fastface_lightning.data import SyntheticFaces
from fastface_lightning.margins import CosFace
from fastface_lightning.optim import SGD
from fastface_lightning.schedule.fixed import FixedSchedule
from fastface_lightning.training.build import build_module
from fastface_lightning.training.devices import resolve_device
from fastface_lightning.training.module import FaceModule
from fastface_lightning.training.seeding import SeededBatches

# Optimizer steps 0 to 49.
GOLDEN = [
    8.22861, 9.43519, 10.18172, 9.59997, 8.48032, 5.2803, 6.31461, 7.14068, 5.58999, 4.77545,
    5.06748, 5.44232, 6.16375, 6.01861, 4.32189, 3.36078, 4.3961, 4.41599, 3.73056, 3.83263,
    2.70014, 3.47699, 4.53558, 3.11209, 2.61085, 4.20464, 3.05947, 2.22438, 3.46697, 2.67433,
    2.11134, 2.27094, 1.4723, 2.11896, 0.95805, 1.75748, 1.66825, 1.51805, 2.55181, 1.55897,
    0.84943, 1.74252, 0.72746, 1.34177, 0.73159, 0.59347, 0.86407, 0.43308, 0.62011, 0.87979,
]  # fmt: skip


class Losses(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"].item())


@pytest.fixture
def double() -> Iterator[None]:
    """Weights begin and are trained in float64: fifty steps make a rounding of 1e-7 a loss's 1e0,
    and one of 1e-16, which is where processors differ, nothing that shows."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.usefixtures("double")
@pytest.mark.filterwarnings("ignore")
def test_a_run_has_the_losses_it_had(tmp_path: Path) -> None:
    """A change of images, mirroring, network, margin, clipping, optimizer or schedule shows."""
    faces = SyntheticFaces(10, 8, size=32)
    images = torch.stack([faces[i][0] for i in range(len(faces))])
    labels = torch.tensor([faces[i][1] for i in range(len(faces))])
    torch.manual_seed(0)
    network = iresnet_tiny(num_classes=64, img_size=32)
    network.register_forward_pre_hook(lambda _, images: images[0].double())
    module = FaceModule(
        network,
        ChunkedClassifier(10, 64, margin=CosFace(0.3), scale=16.0, chunk=4),
        partial(SGD, lr=0.02, momentum=0.9, weight_decay=5e-4),
        FixedSchedule("MultiStepLR", milestones=["4/5"], gamma=0.1),
    )
    watch = Losses()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=10,
        callbacks=[SeededBatches(0), watch],
        gradient_clip_val=5.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    order = torch.randperm(80, generator=torch.Generator().manual_seed(0))
    loader = DataLoader(TensorDataset(images[order], labels[order]), batch_size=16)
    trainer.fit(module, loader)
    assert watch.losses == pytest.approx(GOLDEN, rel=1e-3)


def test_a_run_draws_its_backbone_before_its_classifier() -> None:
    """Accuracies that were written down for a seed stay those of the seed."""
    cfg = composed("data.num_identities=4", "data.images_per_identity=2", "data.verify_pairs=20")
    resolve_device(cfg)
    data = instantiate(cfg.data)
    data.setup("fit")
    torch.manual_seed(0)
    initial = build_module(cfg, data, instantiate(cfg.schedule)).backbone.state_dict()
    torch.manual_seed(0)
    for name, value in instantiate(cfg.model).state_dict().items():
        assert torch.equal(initial[name], value), name
