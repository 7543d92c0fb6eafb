"""Image files in a given order, aligned or not; one that cannot be read is told from the rest."""

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils.data import Dataset

from ...files import printable, reason
from ..align import align_face
from ..formats.image import IMAGE_SUFFIXES, decode_image, decode_original
from ..formats.names import Names
from .folder import leads_to


class ImageFiles(Dataset[tuple[Tensor, bool]]):
    """``files[i]`` is ((3, size, size) uint8 RGB, whether file i could be read).

    An evaluation must know which image is absent, where training may take another instead. So a
    file that is absent, broken or impossible to align comes as zeros and False, and :meth:`why`
    gives the reason.

    Args:
        paths: the files. They are kept in the space of their bytes, so there may be millions.
        points: (n, 5, 2), landmarks of each, x and y in pixels, by which it is aligned (see
            :func:`align_face`), NaN where they are not known; None resizes the whole image (see
            :func:`decode_image`).
        size: height and width of the images served, pixels.

    Raises:
        ValueError: ``size`` is below 1, or ``points`` are not five for each path.
    """

    def __init__(
        self,
        paths: Iterable[str | os.PathLike[str]],
        points: ArrayLike | None = None,
        size: int = 112,
    ) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1 pixel, got {size}")
        self.paths, self.size = Names.of(os.fspath(path) for path in paths), size
        self.points = None if points is None else np.asarray(points, np.float64)
        expected = (len(self.paths), 5, 2)
        if self.points is not None and self.points.shape != expected:
            raise ValueError(f"points must be {expected}, got {self.points.shape}")

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, bool]:
        try:
            return self._read(index), True
        except ValueError:
            return torch.zeros(3, self.size, self.size, dtype=torch.uint8), False

    def why(self, index: int) -> str:
        """Why file ``index`` comes as zeros, which is found out anew; empty if it does not."""
        try:
            self._read(index)
        except ValueError as error:
            return printable(str(error))
        return ""

    def _read(self, index: int) -> Tensor:
        path = self.paths[index]
        if self.points is None:
            return decode_image(path, self.size)
        try:
            if np.isnan(self.points[index]).all():
                raise ValueError("its landmarks are not known")
            image = decode_original(Path(path).read_bytes())
            face = align_face(image, self.points[index], self.size)
        except (OSError, ValueError) as error:
            raise ValueError(f"cannot read image {path}: {reason(error)}") from error
        return torch.from_numpy(face.transpose(2, 0, 1).copy())


def other_files(folder: str | Path) -> Counter[str]:
    """How many files in a folder :func:`find_images` passes over, by their suffixes."""
    return Counter(
        printable(Path(name).suffix.lower()) or "without suffix"
        for _, _, files in os.walk(folder)
        for name in files
        if not name.startswith(".") and not name.lower().endswith(IMAGE_SUFFIXES)
    )


def find_images(folder: str | Path) -> list[str]:
    """Sorted paths of the images in a folder at any depth, relative to it.

    As in a folder of identities, a suffix of ``IMAGE_SUFFIXES`` in either case makes an image,
    hidden files and folders do not count, and symbolic links are followed, though none that leads
    back to a folder it lies in.

    Raises:
        ValueError: there is no such folder, or no image in it.
    """
    if not Path(folder).is_dir():
        raise ValueError(f"no folder {folder}")
    images = []
    waiting: list[tuple[str, frozenset[tuple[int, int]]]] = [("", frozenset())]
    while waiting:
        inside, above = waiting.pop()
        status = os.stat(os.path.join(folder, inside))
        here = status.st_dev, status.st_ino
        if here in above:
            continue
        with os.scandir(os.path.join(folder, inside)) as entries:
            for entry in entries:
                path = os.path.join(inside, entry.name)
                if entry.name.startswith("."):
                    continue
                if leads_to(entry.is_dir):
                    waiting.append((path, above | {here}))
                elif entry.name.lower().endswith(IMAGE_SUFFIXES) and leads_to(entry.is_file):
                    images.append(path)
    if not images:
        raise ValueError(
            f"{folder} holds no image: no file in it ends in {', '.join(IMAGE_SUFFIXES)}"
        )
    return sorted(images)
