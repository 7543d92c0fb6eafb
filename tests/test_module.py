"""FaceModule: what happens to images, gradients and embeddings between the parts."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastface_lightning.classifiers import FullClassifier
from fastface_lightning.module import FaceModule, flip_some, normalise

IMAGES = torch.randint(0, 256, (8, 3, 4, 4), dtype=torch.uint8)
LABELS = torch.arange(8) % 3


def module(**optimizer: Any) -> FaceModule:
    torch.manual_seed(0)
    backbone = nn.Sequential(nn.Flatten(), nn.Linear(48, 5))
    return FaceModule(
        backbone, FullClassifier(3, 5), partial(torch.optim.SGD, lr=1e-3, **optimizer)
    )


def fit(tmp_path: Path, faces: FaceModule, **settings: Any) -> None:
    trainer = Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        **settings,
    )
    trainer.fit(faces, DataLoader(TensorDataset(IMAGES, LABELS), batch_size=8))


def test_bytes_become_numbers_from_minus_one_to_one() -> None:
    ends = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 1, 2)
    assert normalise(ends).flatten().tolist() == [-1.0, 1.0]
    assert ends.dtype == torch.uint8  # and the batch itself stays as it was


def test_each_image_is_mirrored_or_not_as_a_whole() -> None:
    images = torch.arange(2000 * 3 * 2 * 4).view(2000, 3, 2, 4)
    torch.manual_seed(0)
    flipped = flip_some(images)
    same = (flipped == images).flatten(1).all(1)
    mirrored = (flipped == images.flip(-1)).flatten(1).all(1)
    assert (same ^ mirrored).all()
    assert 900 < mirrored.sum() < 1100


def test_an_embedding_is_that_of_image_and_mirror_image() -> None:
    faces = module().eval()
    embedding = faces.embed(IMAGES)
    torch.testing.assert_close(embedding.norm(dim=1), torch.ones(8))
    torch.testing.assert_close(embedding, faces.embed(IMAGES.flip(-1)))
    summed = faces(IMAGES) + faces(IMAGES.flip(-1))
    torch.testing.assert_close(embedding, summed / summed.norm(dim=1, keepdim=True))


def test_clipping_is_the_backbones_alone(tmp_path: Path) -> None:
    """lr 1e-3 without momentum: the step is the gradient, so its norm is the clip's."""
    plain, clipped = module(), module()
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    for faces, clip in ((plain, None), (clipped, 0.5)):
        torch.manual_seed(1)  # the same mirror images
        fit(tmp_path, faces, gradient_clip_val=clip)

    def moved(faces: FaceModule, part: str) -> float:
        steps = [
            (tensor - before[name]).flatten() / 1e-3
            for name, tensor in faces.state_dict().items()
            if name.startswith(part)
        ]
        return torch.cat(steps).norm().item()

    assert moved(plain, "backbone") > 1
    assert moved(clipped, "backbone") == pytest.approx(0.5, rel=1e-2)
    assert moved(clipped, "classifier") == pytest.approx(moved(plain, "classifier"), rel=1e-6)


def test_a_fused_optimizer_under_a_scaler_cannot_clip(tmp_path: Path) -> None:
    """Its gradients are still scaled when they would be clipped."""
    scaler = torch.amp.GradScaler("cpu")
    with pytest.raises(MisconfigurationException, match="cannot clip its gradients"):
        fit(tmp_path, module(fused=True), gradient_clip_val=5.0,
            plugins=[MixedPrecision("16-mixed", "cpu", scaler)])  # fmt: skip
