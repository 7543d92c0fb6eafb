"""A few faces of a few people of a data set, to be looked at."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ..formats.image import decode_original
from .base import FaceDataset


class Sample(NamedTuple):
    """Some of a data set's images, and what they are; the arguments of an image grid."""

    images: list[Tensor]  # (3, S, S) uint8 RGB each
    labels: list[int]
    names: list[str]  # of each image's identity
    title: str  # the whole data set, and how much it holds


def sample_of(faces: FaceDataset) -> Sample:
    """A few images of a few identities of a data set, by :func:`pick_images`."""
    images, labels = zip(*(faces[i] for i in pick_images(faces.labels)), strict=True)
    names = [faces.identities[label] for label in labels]
    title = f"{faces}: {len(faces):,} images of {faces.num_classes:,} identities"
    return Sample(list(images), list(labels), names, title)


def common_size(faces: FaceDataset, images: int = 20) -> tuple[int, int]:
    """Height and width, pixels, that most of some images of a data set have as they are stored;
    (0, 0) where none can be read."""
    sizes: Counter[tuple[int, int]] = Counter()
    for i in _spread(np.arange(len(faces)), images).tolist():
        with suppress(ValueError):
            sizes[decode_original(faces.encoded(i)).shape[:2]] += 1
    return max(sizes, key=lambda size: sizes[size], default=(0, 0))


def pick_images(labels: ArrayLike, identities: int = 10, images: int = 6) -> list[int]:
    """Indices of a few images of a few identities, evenly spread over a data set.

    Identities with one image say nothing about labels: they come only where there are too few
    others.

    Args:
        labels: (N,) integers from 0, each image's label.
        identities: how many at most, at least 1.
        images: of each, how many at most, at least 1.

    Returns:
        Indices into ``labels``, ascending by label, then by index.
    """
    labels = np.asarray(labels, np.int64)
    counts = np.bincount(labels)
    several, single = np.flatnonzero(counts > 1), np.flatnonzero(counts == 1)
    taken = _spread(several, identities)
    taken = np.sort(np.concatenate([taken, _spread(single, identities - len(taken))]))
    return [int(i) for k in taken for i in _spread(np.flatnonzero(labels == k), images)]


def _spread(items: NDArray[Any], count: int) -> NDArray[Any]:
    """At most ``count`` items, evenly spaced from the first to the last."""
    count = min(count, len(items))
    return items[np.linspace(0, len(items) - 1, count).round().astype(int)]
