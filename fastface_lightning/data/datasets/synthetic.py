"""A population of drawn faces as a data set, and pairs of it to verify on."""

import os
from collections.abc import Sequence
from mmap import mmap
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..formats.image import encode_jpeg
from .base import FaceDataset
from .synthetic_faces import draw_face


class SyntheticFaces(FaceDataset):
    """Photographs of invented people: index -> ((3, size, size) uint8 RGB, int label).

    Image i shows identity ``first_identity + label``, where ``label = i // images_per_identity``
    lies in [0, num_classes). It depends on the seed, the identity and the image's number among
    that identity's, on nothing else: a data set of more people begins with the same pictures, and
    sets whose ranges of identities do not meet have nobody in common.

    An image is drawn when first asked for (about 2 ms). If all images fit a quarter of the
    machine's memory, it is kept where forked loader workers share it, so each is drawn once:
    ``3 * size**2`` bytes an image drawn, 37,632 at 112. A pickled copy draws its own. More images
    than that are drawn whenever they are asked for; ``recipes/pack.py`` draws them once.

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
        _check("num_identities", num_identities, 1, 2**32)
        _check("images_per_identity", images_per_identity, 1, 2**32 - 1)
        _check("seed", seed, 0, 2**32 - 1)
        _check("first_identity", first_identity, 0, 2**32 - num_identities)
        _check("size", size, 16, 2**12)
        super().__init__(size, max_bad=0)
        self.images_per_identity, self.seed = images_per_identity, seed
        self.first_identity = first_identity
        self._num_identities = num_identities
        numbers = range(first_identity, first_identity + num_identities)
        labels = np.repeat(np.arange(num_identities, dtype=np.int32), images_per_identity)
        self._hold(_Numbered(numbers), labels)
        self._pictures: Tensor | None = None
        if len(self) * 3 * size * size <= _memory() // 4:
            # An anonymous mapping is shared by fork, needs no room in /dev/shm, and takes memory
            # only where it is written. Two workers may draw one image: they write the same bytes.
            self._drawn = torch.frombuffer(mmap(-1, len(self)), dtype=torch.uint8)
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
        if not self._drawn[row]:
            self._pictures[row] = torch.from_numpy(self._draw(row))
            self._drawn[row] = 1
        out[:] = self._pictures[row].numpy()

    def _draw(self, row: int) -> NDArray[np.uint8]:
        label, image = divmod(row, self.images_per_identity)
        pixels = draw_face(self.seed, self.first_identity + label, image, self.size)
        return pixels.transpose(1, 2, 0)

    def _fetch(self, index: int) -> bytes:
        out = np.empty((self.size, self.size, 3), np.uint8)
        self.read_into(index, out)
        return encode_jpeg(out)

    def __str__(self) -> str:
        return "the drawn faces"

    def __reduce__(self) -> tuple[Any, ...]:
        people = (self._num_identities, self.images_per_identity, self.seed, self.first_identity)
        names = ("_rows", "identities", "labels", "bad", "missing")
        restriction = {name: getattr(self, name) for name in names}
        return type(self), (*people, self.size), None if self._rows is None else restriction


class _Numbered(Sequence[str]):
    """Numbers as names, with zeros before them so that they sort alike."""

    def __init__(self, numbers: range) -> None:
        self.numbers, self.width = numbers, len(str(numbers[-1]))

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        found = self.numbers[index]
        if isinstance(found, int):
            return f"{found:0{self.width}d}"
        return [f"{number:0{self.width}d}" for number in found]


def _memory() -> int:
    """Bytes of the machine's memory."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def synthetic_pairs(
    num_pairs: int,
    num_identities: int,
    images_per_identity: int,
    seed: int = 0,
    first_identity: int = 1_000_000,
) -> tuple[Tensor, Tensor]:
    """Verification pairs of invented people: even pairs show one person, odd pairs two.

    No pair comes twice. ``num_pairs`` is a multiple of 20, so that each of ten contiguous folds
    holds both kinds in equal numbers.

    Args:
        num_pairs: number of pairs P, a multiple of 20.
        num_identities: number of people they are drawn from, at least 2.
        images_per_identity: photographs of each, at least 2.
        seed: names the population and decides the draw, in [0, 2**32).
        first_identity: number of the first person; keep the people apart from the training set's.

    Returns:
        images: (2P, 3, 112, 112) uint8, RGB; images 2i and 2i + 1 are pair i.
        same: (P,) bool, whether pair i shows one person.

    Raises:
        ValueError: an argument is outside its range, or there are too few different pairs.
    """
    n, k = num_identities, images_per_identity
    _check("num_identities", n, 2, 2**32)
    _check("images_per_identity", k, 2, 2**32 - 1)
    faces = SyntheticFaces(n, k, seed, first_identity)
    of_one, of_two = k * (k - 1) // 2, k * k  # pairs within one person, between two people
    limit = 2 * min(n * of_one, n * (n - 1) // 2 * of_two)
    if num_pairs % 20 or not 20 <= num_pairs <= limit:
        raise ValueError(
            f"num_pairs must be a multiple of 20, at least 20 and at most {limit} "
            f"for {n} identities of {k} images, got {num_pairs}"
        )
    rng = np.random.default_rng(seed)
    person, number = np.divmod(rng.choice(n * of_one, num_pairs // 2, replace=False), of_one)
    same = k * person[:, None] + _pair(number)
    number = rng.choice(n * (n - 1) // 2 * of_two, num_pairs // 2, replace=False)
    people, number = np.divmod(number, of_two)
    different = k * _pair(people) + np.stack(np.divmod(number, k), axis=1)
    indices = np.stack([same, different], axis=1).ravel().tolist()
    return torch.stack([faces[i][0] for i in indices]), torch.arange(num_pairs) % 2 == 0


def _pair(number: NDArray[np.int64]) -> NDArray[np.int64]:
    """(P, 2) pairs i < j from their numbers j (j - 1) / 2 + i."""
    j = ((1 + np.sqrt(1 + 8 * number)) / 2).astype(np.int64)
    return np.stack([number - j * (j - 1) // 2, j], axis=1)


def _check(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise ValueError(f"{name} must lie in [{least}, {most}], got {value}")
