"""Small faces held in memory: a training run on them takes minutes, on one core."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from .base import Batch


class InMemoryDataset(Dataset[Any]):
    """Images and who they show, in memory; :class:`FaceLoader` and the samplers take them.

    Args:
        images: (N, 3, H, W) uint8 RGB.
        labels: (N,) int64, identities from 0 on.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images = images
        self.labels = labels.numpy()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> Batch:
        return Batch(self.images[indices], torch.from_numpy(self.labels[indices]))

    @property
    def num_classes(self) -> int:
        return int(self.labels.max()) + 1


def downsampled(faces: Any, pixels: int) -> InMemoryDataset:
    """All images of a data set at ``pixels`` x ``pixels``, each pixel the mean of its area.

    Args:
        faces: indexes to (uint8 (3, H, W) RGB, int label).
        pixels: side of an image, at least 1.
    """
    images, labels = zip(*(faces[i] for i in range(len(faces))), strict=True)
    small = [
        F.interpolate(
            torch.stack(images[start : start + 500]).float(), (pixels, pixels), mode="area"
        )
        for start in range(0, len(images), 500)
    ]
    return InMemoryDataset(torch.cat(small).round().byte(), torch.tensor(labels))
