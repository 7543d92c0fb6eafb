"""Record files of MXNet: millions of images one after the other in one file, and where each begins.

A record is a little-endian head, uint32 magic number and uint32 flag (upper 3 bits) and length
(lower 29), then so many bytes of payload and zeros up to a multiple of 4. So that the magic number
stands at a multiple of 4 nowhere but in heads, a payload that holds it there is split at it and
loses it: flag 0 marks a whole payload, 1 its first part, 2 a middle one and 3 the last. The
payload of an image is flag, label, id and id2 (``<IfQQ``), ``flag`` float32 labels, the image.
Beside ``train.rec``, each line of ``train.idx`` is a record's key, a tab and its offset.
"""

import logging
import mmap
import os
import struct
import warnings
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress
from typing_extensions import Self

from ...files import reason

logger = logging.getLogger(__name__)

MAGIC = 0xCED7230A
MAGIC_BYTES = struct.pack("<I", MAGIC)
HEAD = struct.Struct("<II")
IMAGE_HEAD = struct.Struct("<IfQQ")
WHOLE, FIRST, MIDDLE, LAST = range(4)  # flags
TOO_LONG = 1 << 29  # bytes, of a payload
INEXACT = 1 << 24  # from here on not every whole number is a float32
_MAX_DAMAGED = 10_000  # records; a file with more is not the one that was meant


class ImageRecord(NamedTuple):
    """What the payload of an image's record says.

    Attributes:
        flag: 0 for the one label of the head, else the number of labels that follow it.
        labels: max(flag, 1) float32 numbers; the first is the identity.
        id: uint64, by custom the record's key.
        id2: uint64, which readers leave alone.
        image: the encoded image, empty in records that only tell about others.
    """

    flag: int
    labels: tuple[float, ...]
    id: int
    id2: int
    image: memoryview

    @property
    def has_image(self) -> bool:
        """Whether it is an image's: it has no labels of its own, or something behind them."""
        return not self.flag or len(self.image) > 0


class RecordTable(NamedTuple):
    """The N images of a record file, by ascending key.

    Attributes:
        keys: (N,) int64, distinct.
        offsets: (N,) int64, where in the file the record begins, bytes.
        labels: (N,) int64 in [0, 2^24), as stored.
        damaged: a sentence for each record that is left out because it cannot be read.
    """

    keys: NDArray[np.int64]
    offsets: NDArray[np.int64]
    labels: NDArray[np.int64]
    damaged: list[str]


class RecordFile:
    """The records of a file, mapped into memory: forked processes share it, others map it anew.

    It pickles as its path. The file must not shrink as long as it is mapped.

    Args:
        path: a ``.rec`` file.

    Raises:
        ValueError: it is absent, unreadable or empty.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise ValueError(f"no record file {path}")
        try:
            with open(self.path, "rb") as file:
                self.size = os.fstat(file.fileno()).st_size
                if not self.size:
                    raise ValueError(f"{path} must hold records, got an empty file")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise ValueError(f"cannot read {path}: {reason(error)}") from error
        self._view = memoryview(self._map)

    def __reduce__(self) -> tuple[type[Self], tuple[Path]]:
        return type(self), (self.path,)

    def record(self, offset: int) -> memoryview:
        """Payload of the record that begins at ``offset``: a view of the file, or parts joined.

        Raises:
            ValueError: there is no whole record at this offset, in bytes.
        """
        parts, _ = self._parts(offset)
        return parts[0] if len(parts) == 1 else memoryview(MAGIC_BYTES.join(parts))

    def image_record(self, offset: int) -> ImageRecord:
        """The record that begins at ``offset``, as :func:`parse_image_record` reads it.

        Raises:
            ValueError: there is no whole image record at this offset, in bytes.
        """
        payload = self.record(offset)
        try:
            return parse_image_record(payload)
        except ValueError as error:
            raise ValueError(f"{self.path} at offset {offset}: {error}") from error

    def end(self, offset: int) -> int:
        """Where the record that begins at ``offset`` ends, with its padding.

        Raises:
            ValueError: there is no whole record at this offset, in bytes.
        """
        return self._parts(offset)[1]

    def scan(self) -> Iterator[int]:
        """Where records begin, or should: behind a whole one, else at the next magic number."""
        at = 0
        while at < self.size:
            yield at
            try:
                parts, end = self._parts(at)
                count = len(parts)
            except ValueError:
                count, end = 1, self.size
            for _ in range(count):
                at = self._next_head(at + 4)
            at = min(at, end)  # no payload holds the magic number: a longer one is of wrong length

    def read_ahead(self) -> None:
        """Tell the system that the file is read in order: that beats millions of seeks."""
        if hasattr(mmap, "MADV_SEQUENTIAL"):
            self._map.madvise(mmap.MADV_SEQUENTIAL)

    def _parts(self, offset: int) -> tuple[list[memoryview], int]:
        """The parts of the record at ``offset``, and its end."""
        if offset < 0 or offset % 4:
            raise ValueError(f"offsets in {self.path} must be multiples of 4, got {offset}")
        parts: list[memoryview] = []
        end, total, flag = offset, 0, FIRST
        while flag not in (WHOLE, LAST):
            at, start = end, end + HEAD.size
            magic, packed = HEAD.unpack_from(self._map, at) if start <= self.size else (MAGIC, 0)
            flag, length = packed >> 29, packed & (TOO_LONG - 1)
            if magic != MAGIC or flag not in ((MIDDLE, LAST) if parts else (WHOLE, FIRST)):
                raise ValueError(
                    f"the parts of the record at offset {offset} of {self.path} must begin with the"
                    f" magic number {MAGIC:#010x} and have flags 0, or 1, 2 ... 3, got"
                    f" {magic:#010x} and flag {flag} at offset {at}"
                )
            end = start + padded(length)
            total += length + 4 * bool(parts)
            if max(start, end) > self.size or total >= TOO_LONG:
                raise ValueError(
                    f"{self.path} ends at byte {self.size}, before the record at offset {offset}"
                    f" does: an incomplete copy, or a damaged length or index"
                )
            parts.append(self._view[start : start + length])
        return parts, end

    def _next_head(self, start: int) -> int:
        at = self._map.find(MAGIC_BYTES, start)
        while at >= 0 and at % 4:
            at = self._map.find(MAGIC_BYTES, at + 1)
        return at if at >= 0 else self.size


def parse_image_record(payload: bytes | memoryview) -> ImageRecord:
    """Read the payload of an image's record; the image is a view of it.

    Raises:
        ValueError: it is too short for its head, or for the labels that the head promises.
    """
    payload = memoryview(payload)
    if len(payload) < IMAGE_HEAD.size:
        raise ValueError(
            f"an image record must hold at least {IMAGE_HEAD.size} bytes, got {len(payload)}"
        )
    flag, _, key, id2 = IMAGE_HEAD.unpack_from(payload)
    end = IMAGE_HEAD.size + 4 * flag
    if len(payload) < end:
        raise ValueError(
            f"an image record with {flag} labels must hold at least {end} bytes, got {len(payload)}"
        )
    start, count = (IMAGE_HEAD.size, flag) if flag else (4, 1)
    labels = struct.unpack_from(f"<{count}f", payload, start)
    return ImageRecord(flag, labels, key, id2, payload[end:])


def read_idx(path: str | Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Read an index; 42 million lines take seconds and little more memory than their numbers.

    Returns:
        Keys and offsets, each (N,) int64, in the file's order.

    Raises:
        ValueError: the file is absent, unreadable, or a line is not ``key<TAB>offset``.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "loadtxt: input contained no data")
            warnings.filterwarnings("error", category=DeprecationWarning)  # fractions
            pairs = np.loadtxt(path, np.int64, comments=None, ndmin=2)
        if pairs.size and (pairs.shape[1] != 2 or pairs.min() < 0):
            raise ValueError(f"got {pairs.shape[1]} columns, the lowest number {pairs.min()}")
    except OSError as error:
        raise ValueError(f"cannot read {path}: {reason(error)}") from error
    except (ValueError, DeprecationWarning) as error:
        raise ValueError(
            f"each line of {path} must be a record's key, a tab and its offset: {error!s:.200}"
        ) from error
    keys, offsets = pairs.reshape(-1, 2).T.copy()
    return keys, offsets


def read_table(path: str | Path) -> RecordTable:
    """Find all images of a record file and their labels, in one pass over the file.

    The records are those that the index beside the file lists. Where there is none, all records
    are taken, and their ids for keys (which they are in files of InsightFace and of im2rec), or
    their places if the ids are not distinct.

    A record is an image's unless it has labels of its own and nothing behind them. Such are the
    records that InsightFace adds: record 0, which promises numbers of images and records, and
    one for each identity. The numbers are float32, hence inexact from 2^24 on; they are compared
    with what was found, and a warning tells of a difference.

    Damaged records are left out and said: heads that are none, offsets outside the file, labels
    that are not whole numbers in [0, 2^24). Without an index the next record is then found by its
    magic number.

    Args:
        path: a ``.rec`` file; its index has the suffix ``.idx``.

    Raises:
        ValueError: the file is absent or empty, a line of its index is none, a key occurs twice,
            more than 10,000 records are damaged, or there is no image.
    """
    file = RecordFile(path)
    file.read_ahead()
    index = file.path.with_suffix(".idx")
    places: Iterable[tuple[int | None, int]] = ((None, offset) for offset in file.scan())
    if index.exists():
        listed, starts = read_idx(index)
        different, counts = np.unique(listed, return_counts=True)
        if len(different) < len(listed):
            twice = different[counts.argmax()]
            raise ValueError(f"keys in {index} must be distinct, got {twice} twice")
        order = starts.argsort(kind="stable")  # as a disk reads
        # One by one: as Python's numbers, all at once, 42 million of them would take 3 GB.
        places = zip(map(int, listed[order]), map(int, starts[order]), strict=True)
    found, offsets, labels = array("Q"), array("q"), array("q")
    promised: float | None = None
    count, damaged = 0, list[str]()
    with Progress(transient=True) as bar:
        task = bar.add_task(f"indexing {file.path.name}", total=file.size)
        for key, offset in places:
            count += 1
            if count % 10_000 == 0:
                bar.update(task, completed=offset)
            try:
                record = file.image_record(offset)
                label = record.labels[0]
                if record.has_image and not (0 <= label < INEXACT and label.is_integer()):
                    raise ValueError(
                        f"labels in {path} must be whole numbers in [0, 2^24), got {label} at"
                        f" offset {offset}"
                    )
            except ValueError as error:
                damaged.append(str(error))
                if len(damaged) > _MAX_DAMAGED:
                    raise ValueError(
                        f"more than {_MAX_DAMAGED} records are damaged, the last: {error}"
                    ) from error
                continue
            number = record.id if key is None else key
            if record.has_image:
                found.append(number)
                offsets.append(offset)
                labels.append(int(label))
            elif number == 0 and promised is None:
                promised = label
    if not found:
        why = f": {damaged[-1]}" if damaged else ""
        raise ValueError(f"{path} must hold images, got none in {count} records{why}")
    if promised is not None and np.float32(promised) != np.float32(len(found) + 1):
        logger.warning(
            "%s promises %.0f images in its header, got %d", path, promised - 1, len(found)
        )
    ids = np.array(found, np.uint64)
    distinct = len(np.unique(ids)) == len(ids) and ids.max() < 1 << 63
    keys = ids.astype(np.int64) if distinct else np.arange(len(ids))
    order = keys.argsort(kind="stable")
    starts, people = np.array(offsets, np.int64), np.array(labels, np.int64)
    return RecordTable(keys[order], starts[order], people[order], damaged)


def padded(length: int) -> int:
    """Bytes that a payload of so many takes in the file."""
    return (length + 3) & ~3
