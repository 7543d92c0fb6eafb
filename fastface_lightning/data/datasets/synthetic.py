"""A population of synthetic faces as a data set."""

import os
from mmap import mmap
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..formats.image import encode_jpeg
from ..formats.names import Names
from .base import FaceDataset
from .synthetic_faces import draw_face


class SyntheticFaces(FaceDataset):
    """Photographs of invented people: index -> ((3, size, size) uint8 RGB, int label).

    Image i shows identity ``first_identity + label``, where ``label = i // images_per_identity``
    lies in [0, num_classes). It depends on the seed, the identity and the image's number among
    that identity's, on nothing else: a data set of more people begins with the same pictures, and
    sets whose ranges of identities do not meet have nobody in common.

    An image is rendered when first asked for (about 2 ms). If all images fit a quarter of the
    machine's memory, it is kept where forked loader workers share it, so each is rendered once:
    ``3 * size**2`` bytes an image, 37,632 at 112. A pickled copy renders its own. More images
    than that are rendered whenever they are asked for; ``recipes/pack.py`` keeps them.

    Args:
        num_identities: number of people, at least 1.
        images_per_identity: photographs of each, at least 1.
        seed: names the population, in [0, 2**32).
        first_identity: number of the first person, at least 0; the last must be below 2**32.
        size: side of the square pictures, pixels, in [16, 4096].

    Raises:
        ValueError: an argument is outside its range.
    """

    def __init__(
        self,
        num_identities: int,
        images_per_identity: int,
        seed: int = 0,
        first_identity: int = 0,
        size: int = 112,
    ) -> None:
        check_range("num_identities", num_identities, 1, 2**32)
        check_range("images_per_identity", images_per_identity, 1, 2**32 - 1)
        check_range("seed", seed, 0, 2**32 - 1)
        check_range("first_identity", first_identity, 0, 2**32 - num_identities)
        check_range("size", size, 16, 2**12)
        super().__init__(size, max_bad=0)
        self.images_per_identity, self.seed = images_per_identity, seed
        self.first_identity = first_identity
        self._num_identities = num_identities
        end = first_identity + num_identities
        width = len(str(end - 1))  # so that names sort as their numbers
        names = Names.of(f"{number:0{width}d}" for number in range(first_identity, end))
        labels = np.repeat(np.arange(num_identities, dtype=np.int32), images_per_identity)
        self._hold(names, labels)
        self._pictures: Tensor | None = None
        if len(self) * 3 * size * size <= _machine_memory() // 4:
            # An anonymous mapping is shared by fork, needs no room in /dev/shm, and takes memory
            # only where it is written. Two workers may draw one image: they write the same bytes.
            self._is_kept = torch.frombuffer(mmap(-1, len(self)), dtype=torch.uint8)
            pictures = torch.frombuffer(mmap(-1, len(self) * 3 * size * size), dtype=torch.uint8)
            self._pictures = pictures.view(len(self), size, size, 3)

    def name(self, index: int) -> str:
        label, image = divmod(self._row(index), self.images_per_identity)
        return f"{self.first_identity + label}/{image}"

    def read_into(self, index: int, out: NDArray[np.uint8]) -> None:
        row = self._row(index)
        if self._pictures is None:
            out[:] = self._draw(row)
            return
        if not self._is_kept[row]:
            self._pictures[row] = torch.from_numpy(self._draw(row))
            self._is_kept[row] = 1
        out[:] = self._pictures[row].numpy()

    def _draw(self, row: int) -> NDArray[np.uint8]:
        label, image = divmod(row, self.images_per_identity)
        pixels = draw_face(self.seed, self.first_identity + label, image, self.size)
        return pixels.transpose(1, 2, 0)

    def _fetch(self, index: int) -> bytes:
        return encode_jpeg(self.read(index))

    def __str__(self) -> str:
        return "the synthetic faces"

    def __reduce__(self) -> tuple[Any, ...]:
        people = (self._num_identities, self.images_per_identity, self.seed, self.first_identity)
        names = ("_rows", "identities", "labels", "bad", "missing")
        restriction = {name: getattr(self, name) for name in names}
        return type(self), (*people, self.size), None if self._rows is None else restriction


def _machine_memory() -> int:
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_range(name: str, value: int, low: int, high: int) -> None:
    """Raise ValueError unless the value lies in [low, high]."""
    if not low <= value <= high:
        raise ValueError(f"{name} must lie in [{low}, {high}], got {value}")
