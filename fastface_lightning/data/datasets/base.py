"""Encoded faces with labels: what folders, archives and record files have in common."""

import copy
import logging
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, default_collate, get_worker_info
from typing_extensions import Self

from ...files import printable, reason
from ..formats.image import decode_into
from ..formats.names import Names

logger = logging.getLogger(__name__)


class FaceDataset(Dataset[tuple[Tensor, int]], ABC):
    """Images of identities: ``dataset[i]`` is ((3, size, size) uint8 RGB, label).

    An image that cannot be read is named in a warning, counted, and replaced by the next readable
    one with that one's label, so that batches keep their shape and a run its images, whichever
    process met the bad one first. A subclass says where the encoded images lie.

    Args:
        size: height and width of the images served, pixels.
        max_bad: images that may prove unreadable before the data set gives up.

    Attributes:
        identities: names of the identities, by label.
        labels: (N,) int32, the label of each image.
        bad: uint8, 1 for each stored image found unreadable. It lies in shared memory, so that
            loader workers and the main process count together, also over what was restricted.
        missing: identities asked for that have no image.
        damaged: why images were left out whose identity is not known.

    Raises:
        ValueError: there is no image, or more than ``max_bad`` were found unreadable.
    """

    identities: Sequence[str]
    labels: NDArray[np.int32]
    bad: Tensor

    def __init__(self, size: int, max_bad: int) -> None:
        for name, value, least in (("size", size, 1), ("max_bad", max_bad, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        self.size, self.max_bad = size, max_bad
        self.missing: list[str] = []
        self.damaged: Sequence[str] = ()
        self._rows: NDArray[np.int64] | None = None  # places of the images served; None: all

    def _hold(self, identities: Sequence[str], labels: NDArray[np.int32]) -> None:
        """Serve these images: their identities' names by label, and (N,) their labels."""
        self.identities, self.labels = identities, labels
        if self._rows is None:
            self.bad = torch.zeros(len(labels), dtype=torch.uint8).share_memory_()

    def _leave_out(self, damaged: Sequence[str]) -> None:
        """Warn of images of which not even the identity is known; sentences that say why."""
        self.damaged = damaged
        if len(damaged) > self.max_bad:
            raise ValueError(
                f"at most max_bad = {self.max_bad} images may be unreadable, got {len(damaged)},"
                f" the last because: {damaged[-1]}"
            )
        for sentence in damaged[:10]:
            logger.warning("left out: %s", printable(sentence))
        if len(damaged) > 10:
            logger.warning("left out %d more of %s", len(damaged) - 10, self)

    @abstractmethod
    def _fetch(self, index: int) -> bytes | memoryview:
        """The encoded image ``index``; ValueError or OSError says why there is none."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What messages call image ``index``: its file, or its place in one."""

    @abstractmethod
    def __str__(self) -> str:
        """Where the images lie."""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_classes(self) -> int:
        """Number of identities; labels lie in [0, num_classes)."""
        return len(self.identities)

    def file_name(self, index: int) -> str:
        """A name for a file of image ``index``, which no other image of its identity has."""
        return f"{index:08d}.jpg"

    def encoded(self, index: int) -> bytes | memoryview:
        """Image ``index`` as it is stored, neither decoded nor checked.

        Raises:
            ValueError: it is not there, or not whole.
        """
        try:
            return self._fetch(index)
        except (ValueError, OSError) as error:
            raise ValueError(f"cannot read image {self.name(index)}: {reason(error)}") from error

    def read_into(self, index: int, out: NDArray[np.uint8]) -> None:
        """Decode image ``index`` into ``out``, (size, size, 3) uint8 RGB.

        Raises:
            ValueError: it cannot be read; the message names it.
        """
        try:
            decode_into(self._fetch(index), out)
        except (ValueError, OSError) as error:
            raise ValueError(f"cannot read image {self.name(index)}: {reason(error)}") from error

    def read(self, index: int) -> NDArray[np.uint8]:
        """Image ``index`` alone, (size, size, 3) uint8 RGB; see :meth:`read_into`."""
        out = np.empty((self.size, self.size, 3), np.uint8)
        self.read_into(index, out)
        return out

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must lie in [0, {len(self) - 1}], got {index}")
        return self.__getitems__([index % len(self)])[0]

    def __getitems__(self, indices: Sequence[int]) -> "Batch":
        """What a loader calls: all images of a batch, decoded into one tensor."""
        pixels = _empty_pixels(len(indices), self.size)
        bad = self.bad.numpy().data  # the shared memory itself, which takes an index faster
        served = [self._serve(i, out, bad) for i, out in zip(indices, pixels.numpy(), strict=True)]
        labels = torch.from_numpy(self.labels[served].astype(np.int64))
        return Batch(pixels.permute(0, 3, 1, 2), labels)

    def _serve(self, index: int, out: NDArray[np.uint8], bad: memoryview) -> int:
        """Decode image ``index``, or the next that can be read, and say which."""
        i = index
        while True:
            try:
                if not bad[self._row(i)]:
                    self.read_into(i, out)
                    return i
            except ValueError as error:
                bad[self._row(i)] = 1
                count = int(self.bad.sum())
                if count > self.max_bad:
                    raise ValueError(
                        f"at most max_bad = {self.max_bad} images may be unreadable, got {count},"
                        f" the last because: {error}"
                    ) from error
                logger.warning(
                    "skipping bad image %d of at most %d: %s", count, self.max_bad, error
                )
            i = (i + 1) % len(self)
            if i == index % len(self):
                raise ValueError(f"none of the {len(self)} images in {self} can be read")

    def bad_images(self) -> list[str]:
        """Names of the images found unreadable so far, in the data set's order."""
        bad = self.bad.numpy() if self._rows is None else self.bad.numpy()[self._rows]
        return [self.name(i) for i in np.flatnonzero(bad).tolist()]

    def restricted(self, identities: Iterable[str] | None = None, min_images: int = 1) -> Self:
        """The same images, of some identities only, labelled anew by their order.

        Args:
            identities: names of those to keep; None keeps all.
            min_images: identities with fewer images are left out.

        Raises:
            ValueError: no image is left.
        """
        taken = copy.copy(self)
        taken._restrict(identities, min_images)
        return taken

    def _restrict(self, identities: Iterable[str] | None, min_images: int) -> None:
        if min_images < 1:
            raise ValueError(f"min_images must be at least 1, got {min_images}")
        counts = np.bincount(self.labels, minlength=self.num_classes)
        if identities is None:
            wanted, total, sought = np.ones(self.num_classes, bool), self.num_classes, ""
            empty = [self.identities[i] for i in np.flatnonzero(counts == 0).tolist()]
        else:
            names = set(identities)
            wanted = np.fromiter((name in names for name in self.identities), bool)
            total, sought = len(names), "sought "
            present = np.flatnonzero(wanted & (counts > 0)).tolist()
            empty = self.missing = sorted(names - {self.identities[i] for i in present})
        if len(empty) == total:
            raise ValueError(f"none of the {total} identities {sought}in {self} has an image")
        if empty:
            sentence = "%d of the %d identities %sin %s have no image: %s"
            logger.warning(sentence, len(empty), total, sought, self, abridged(empty))
        kept = wanted & (counts >= min_images)
        if not kept.any():
            raise ValueError(f"no identity in {self} has min_images = {min_images} images")
        if kept.all():
            return
        rows = np.flatnonzero(kept[self.labels])
        self._rows = rows if self._rows is None else self._rows[rows]
        names_kept = Names.of(self.identities[i] for i in np.flatnonzero(kept).tolist())
        self._hold(names_kept, (kept.cumsum() - 1)[self.labels[rows]].astype(np.int32))

    def _row(self, index: int) -> int:
        """Where image ``index`` is among the stored ones."""
        return index if self._rows is None else int(self._rows[index])


class Batch(Sequence[tuple[Tensor, int]]):
    """Samples that lie in one tensor: to a collate function a list, to :func:`collate` a batch.

    Attributes:
        images: (B, 3, H, W) uint8 RGB, in memory (B, H, W, 3) as decoders write.
        labels: (B,) int64.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> Any:
        return self.images[index], int(self.labels[index])


def collate(batch: Any) -> Any:
    """Images (B, 3, H, W) uint8 and labels (B,) int64 of samples; of a Batch without a copy."""
    return (batch.images, batch.labels) if isinstance(batch, Batch) else default_collate(batch)


def _empty_pixels(count: int, size: int) -> Tensor:
    """(count, size, size, 3) uint8; of a loader's worker in the memory that it shares."""
    if get_worker_info() is None:
        # numpy asks for huge pages, where faulting small ones in takes 5 % of the decoder's time.
        return torch.from_numpy(np.empty((count, size, size, 3), np.uint8))
    storage = torch.UntypedStorage._new_shared(count * size * size * 3, device="cpu")
    return torch.empty(0, dtype=torch.uint8).set_(storage).view(count, size, size, 3)


def abridged(names: Sequence[str], limit: int = 10) -> str:
    """The names, separated by commas; beyond ``limit`` of them, how many more there are."""
    rest = len(names) - limit
    return printable(", ".join(names[:limit])) + (f" and {rest} more" if rest > 0 else "")
