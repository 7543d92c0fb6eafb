"""A folder of identities is a data set: one sub-folder a person, one file an image."""

import logging
import os
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .image import IMAGE_SUFFIXES, decode_image

logger = logging.getLogger(__name__)


def identity_names(root: str | Path) -> list[str]:
    """Sorted names of the identity folders in ``root``; hidden ones do not count.

    Raises:
        ValueError: ``root`` is absent or holds no folder.
    """
    if not Path(root).is_dir():
        raise ValueError(f"no folder {root}; expected {root}/<identity>/<image>.jpg")
    with os.scandir(root) as entries:
        names = sorted(e.name for e in entries if not e.name.startswith(".") and e.is_dir())
    if not names:
        raise ValueError(f"{root} holds no folders; expected {root}/<identity>/<image>.jpg")
    return names


class IdentityFolder(Dataset[tuple[Tensor, int]]):
    """Images in ``<root>/<identity>/<image>``, labelled by the sorted names of the identities.

    ``dataset[i]`` is ((3, size, size) uint8 RGB, label): see :func:`decode_image` for the pixels.
    Images are ordered by identity, then by file name. An image that cannot be read is named in a
    warning, counted, and replaced by the next readable one with that one's label, so that batches
    keep their shape.

    Args:
        root: folder that holds the identity folders.
        size: height and width of the images served, pixels.
        identities: names of the only identities to take; None takes all.
        min_images: identities with fewer images are left out.
        max_bad: images that may prove unreadable before the data set gives up.

    Attributes:
        identities: names of the identities, by label.
        labels: (N,) int32, ascending; the label of each image.
        missing: names in the argument ``identities`` that have no image under ``root``.
        bad: (N,) uint8, 1 for each image found unreadable. It lies in shared memory, so that
            loader workers and the main process count together.

    Raises:
        ValueError: there is no image to serve, or more than ``max_bad`` were found unreadable.
    """

    def __init__(
        self,
        root: str | Path,
        size: int = 112,
        identities: Iterable[str] | None = None,
        min_images: int = 1,
        max_bad: int = 100,
    ) -> None:
        if size < 1:
            raise ValueError(f"size must be at least 1 pixel, got {size}")
        if min_images < 1:
            raise ValueError(f"min_images must be at least 1, got {min_images}")
        if max_bad < 0:
            raise ValueError(f"max_bad must be at least 0 images, got {max_bad}")
        self.root, self.size, self.max_bad = Path(root), size, max_bad
        present = identity_names(root)
        names = present if identities is None else sorted(set(identities))
        empty = self._scan(names, min_images)
        self.missing = [] if identities is None else empty
        if len(empty) == len(names):
            raise ValueError(f"none of the {len(names)} identities sought in {root} has an image")
        if not self.identities:
            raise ValueError(f"no identity in {root} has min_images = {min_images} images")
        if empty:
            logger.warning(
                "%d of the %d identities sought in %s have no image: %s",
                len(empty),
                len(names),
                root,
                abridged(empty),
            )
        self.bad = torch.zeros(len(self), dtype=torch.uint8).share_memory_()

    def _scan(self, names: Sequence[str], min_images: int) -> list[str]:
        """Index the identities' images; return the names of those that have none."""
        self.identities: list[str] = []
        empty = []
        # One blob of file names: millions of str objects would take gigabytes.
        blob, ends, counts = bytearray(), array("q", [0]), array("q")
        for name in names:
            files = _image_names(self.root / name)
            if not files:
                empty.append(name)
            if len(files) < min_images:
                continue
            self.identities.append(name)
            counts.append(len(files))
            for file in files:
                blob += os.fsencode(file)
                ends.append(len(blob))
        self._files, self._ends = bytes(blob), np.array(ends, np.int64)
        self.labels = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        return empty

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Number of identities; labels lie in [0, num_classes)."""
        return len(self.identities)

    def path(self, index: int) -> Path:
        """File of image ``index``."""
        file = os.fsdecode(self._files[self._ends[index] : self._ends[index + 1]])
        return self.root / self.identities[self.labels[index]] / file

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        start, count = range(len(self))[index], len(self)
        for i in (k % count for k in range(start, start + count)):
            if self.bad[i]:
                continue
            try:
                return decode_image(self.path(i), self.size), int(self.labels[i])
            except ValueError as error:
                self._count_bad(i, error)
        raise ValueError(f"none of the {count} images under {self.root} can be read")

    def _count_bad(self, index: int, error: ValueError) -> None:
        self.bad[index] = 1
        count = int(self.bad.sum())
        if count > self.max_bad:
            raise ValueError(
                f"at most max_bad = {self.max_bad} images may be unreadable,"
                f" got {count}, the last because: {error}"
            ) from error
        logger.warning("skipping bad image %d of at most %d: %s", count, self.max_bad, error)

    def bad_files(self) -> list[str]:
        """Paths of the images found unreadable so far, in the data set's order."""
        return [str(self.path(int(i))) for i in self.bad.nonzero()]


def abridged(names: Sequence[str], limit: int = 10) -> str:
    """The names, separated by commas; beyond ``limit`` of them, how many more there are."""
    rest = len(names) - limit
    return ", ".join(names[:limit]) + (f" and {rest} more" if rest > 0 else "")


def _image_names(folder: Path) -> list[str]:
    """Sorted names of the images in ``folder``; none if there is no such folder."""
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return sorted(
            entry.name
            for entry in entries
            if entry.name.lower().endswith(IMAGE_SUFFIXES)
            and not entry.name.startswith(".")
            and entry.is_file()
        )
