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
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

from ...files import reason

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]

MAGIC = 0xCED7230A
MAGIC_BYTES = struct.pack("<I", MAGIC)
HEAD = struct.Struct("<II")
IMAGE_HEAD = struct.Struct("<IfQQ")
WHOLE, FIRST, MIDDLE, LAST = range(4)  # flags
TOO_LONG = 1 << 29  # bytes, of a payload
INEXACT = 1 << 24  # from here on not every whole number is a float32
_BLOCK = 1 << 16  # records looked at together
_BLOCK_WORDS = 1 << 22  # searched for heads together, 16 MB
_MAX_DAMAGED = 10_000  # records; a file with more is not the one that was meant
_PARTS = np.dtype([("offset", "i8"), ("end", "i8"), ("flag", "u1")])
_RECORDS = np.dtype(
    [
        ("offset", "i8"),
        ("id", "u8"),
        ("id2", "u8"),
        ("label", "f4"),
        ("has_image", "?"),
        ("whole", "?"),
    ]
)


class _Damage(list[str]):
    """Sentences about damaged records, of which there may be so many."""

    def append(self, sentence: str) -> None:
        super().append(sentence)
        if len(self) > _MAX_DAMAGED:
            raise ValueError(f"more than {_MAX_DAMAGED} records are damaged, the last: {sentence}")


class ImageRecord(NamedTuple):
    """What the payload of an image's record says.

    Attributes:
        flag: 0 for the one label of the head, else the number of labels that follow it.
        labels: (max(flag, 1),) float32; the first is the identity.
        id: uint64, by custom the record's key.
        id2: uint64, which readers leave alone.
        image: the encoded image, empty in records that only tell about others.
    """

    flag: int
    labels: NDArray[np.float32]
    id: int
    id2: int
    image: memoryview


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
        self.words = np.frombuffer(self._map, "<u4", count=self.size // 4)

    def __reduce__(self) -> tuple[type[Self], tuple[Path]]:
        return type(self), (self.path,)

    def record(self, offset: int) -> memoryview:
        """Payload of the record that begins at ``offset``: a view of the file, or parts joined.

        Raises:
            ValueError: there is no whole record at this offset, in bytes.
        """
        if not 0 <= offset <= self.size - HEAD.size or offset % 4:
            raise ValueError(
                f"offsets in {self.path} must be multiples of 4 in"
                f" [0, {self.size - HEAD.size}], got {offset}"
            )
        parts: list[memoryview] = []
        at, total, flag = offset, 0, FIRST
        while flag not in (WHOLE, LAST):
            expected = (MIDDLE, LAST) if parts else (WHOLE, FIRST)
            start = at + HEAD.size
            magic, packed = HEAD.unpack_from(self._map, at) if start <= self.size else (0, 0)
            flag, length = packed >> 29, packed & (TOO_LONG - 1)
            at = start + padded(length)
            total += length + 4 * bool(parts)
            if max(start, at) > self.size or total >= TOO_LONG:
                raise ValueError(
                    f"the record at offset {offset} of {self.path} must end within the file's"
                    f" {self.size} bytes and be shorter than 2^29, got a part of {length} bytes"
                    f" from {start} on"
                )
            if magic != MAGIC or flag not in expected:
                raise ValueError(
                    f"the parts of the record at offset {offset} of {self.path} must begin with"
                    f" the magic number {MAGIC:#010x} and have flags 0, or 1, 2 ... 3, got"
                    f" {magic:#010x} and flag {flag} at offset {start - HEAD.size}"
                )
            parts.append(self._view[start : start + length])
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

    def image(self, offset: int) -> memoryview:
        """The encoded image in the record that begins at ``offset``.

        Raises:
            ValueError: there is no whole image record at this offset, in bytes.
        """
        payload = self.record(offset)
        if len(payload) >= IMAGE_HEAD.size:  # as image_record does, in half its time
            start = IMAGE_HEAD.size + 4 * IMAGE_HEAD.unpack_from(payload)[0]
            if start <= len(payload):
                return payload[start:]
        return self.image_record(offset).image

    def read_ahead(self) -> None:
        """Tell the system that the file is read in order: that beats millions of seeks."""
        if hasattr(mmap, "MADV_SEQUENTIAL"):
            self._map.madvise(mmap.MADV_SEQUENTIAL)


def parse_image_record(payload: bytes | memoryview) -> ImageRecord:
    """Read the payload of an image's record; labels and image are views of it.

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
    labels = np.frombuffer(payload, "<f4", count, start)
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


def read_table(path: str | Path, progress: Progress | None = None) -> RecordTable:
    """Find all images of a record file and their labels, in one pass over the file.

    The records are those that the index beside the file lists. Where there is none, all records
    are taken, and their ids for keys (which they are in files of InsightFace and of im2rec), or
    their places if the ids are not distinct.

    A record is an image's unless it has labels of its own and nothing behind them. Such are the
    records that InsightFace adds: record 0, which promises numbers of images and records, and
    one for each identity. The numbers are float32, hence inexact from 2^24 on; they are compared
    with what was found, and a warning tells of a difference.

    Damaged records are left out and said: heads that are none, offsets outside the file, labels
    that are not whole numbers in [0, 2^24). Without an index the heads are found by their magic
    number, whatever the lengths before them say.

    Args:
        path: a ``.rec`` file; its index has the suffix ``.idx``.
        progress: called now and then with the bytes passed and the bytes there are.

    Raises:
        ValueError: the file is absent or empty, a line of its index is none, a key occurs twice,
            more than 10,000 records are damaged, or there is no image.
    """
    file, damaged = RecordFile(path), _Damage()
    file.read_ahead()
    index = file.path.with_suffix(".idx")
    beyond: list[tuple[int, int]] = []
    if index.exists():
        keys, offsets, beyond = _indexed(file, index, damaged)
        records = _records_at(file, offsets, damaged, progress)
        keys, records = keys[records["whole"]], records[records["whole"]]
    else:
        parts, records = scan(file, damaged, progress)
        _check_parts(file, parts, records, damaged)
        records = records[records["whole"]]
        keys = _keys_of(records["id"])
    order = keys.argsort(kind="stable")
    keys, records = keys[order], records[order]
    twice = np.flatnonzero(keys[1:] == keys[:-1])
    if len(twice):
        raise ValueError(f"keys in {index} must be distinct, got {keys[twice[0]]} twice")
    count = len(records)
    if count and not keys[0] and not records["has_image"][0]:  # a header
        _compare_count(file, records["label"][0], int(records["has_image"].sum()))
    keys, records = keys[records["has_image"]], records[records["has_image"]]
    labels = records["label"]
    good = (labels >= 0) & (labels < INEXACT) & (labels == np.floor(labels))
    for i in np.flatnonzero(~good):
        damaged.append(
            f"labels in {file.path} must be whole numbers in [0, 2^24), got {labels[i]} in the"
            f" record with key {keys[i]} at offset {records['offset'][i]}"
        )
    keys, records = keys[good], records[good]
    for key, offset in beyond:  # the last to be said: where many are lost, it is for this
        damaged.append(
            f"{path} ends at byte {file.size}, before the record at offset {offset} that {index}"
            f" lists with key {key}: an incomplete copy, or a damaged index"
        )
    if not len(records):
        why = f": {damaged[-1]}" if damaged else ""
        raise ValueError(f"{path} must hold images, got {count} records and none with one{why}")
    offsets, labels = records["offset"].copy(), records["label"].astype(np.int64)
    return RecordTable(keys, offsets, labels, list(damaged))


def padded(length: Any) -> Any:
    """Bytes that payloads of so many, a number or an array, take in the file."""
    return (length + 3) & ~3


def scan(
    file: RecordFile, damaged: list[str] | None = None, progress: Progress | None = None
) -> tuple[NDArray[np.void], NDArray[np.void]]:
    """All heads in a file: every place, at a multiple of 4, of the magic number.

    Args:
        file: a record file.
        damaged: gets a sentence for each record that cannot be read.
        progress: called now and then with the bytes passed and the bytes there are.

    Returns:
        The parts, by ascending offset: offset of the head, end of the part with its padding, flag;
        and the records that begin with one: offset, id, id2, first label, has_image, whole.
    """
    words = file.words
    parts, records = [np.empty(0, _PARTS)], [np.empty(0, _RECORDS)]
    for start in range(0, len(words), _BLOCK_WORDS):
        at = start + np.flatnonzero(words[start : start + _BLOCK_WORDS] == MAGIC)
        at = at[at < len(words) - 1]
        block = np.empty(len(at), _PARTS)
        length = (words[at + 1] & (TOO_LONG - 1)).astype(np.int64)
        block["offset"], block["flag"] = 4 * at, words[at + 1] >> 29
        block["end"] = 4 * at + HEAD.size + padded(length)
        parts.append(block)
        begins = ~np.isin(block["flag"], (MIDDLE, LAST))
        records.append(_records_at(file, block["offset"][begins], damaged))
        if progress is not None:
            progress(min(4 * (start + _BLOCK_WORDS), file.size), file.size)
    return np.concatenate(parts), np.concatenate(records)


def following(parts: NDArray[np.void]) -> NDArray[np.bool_]:
    """Which parts begin where the one before ends, and have a flag that may come after its flag.

    Args:
        parts: (N,), as :func:`scan` finds them.
    """
    ends = np.concatenate([[0], parts["end"][:-1]])
    flags = np.concatenate([[WHOLE], parts["flag"][:-1]])
    within = np.isin(flags, (FIRST, MIDDLE))
    return (parts["offset"] == ends) & (within == np.isin(parts["flag"], (MIDDLE, LAST)))


def _check_parts(
    file: RecordFile,
    parts: NDArray[np.void],
    records: NDArray[np.void],
    damaged: list[str],
) -> None:
    """Note what lies between parts, and parts of no record; warn of lengths that reach too far."""
    starts = np.append(parts["offset"], file.size)
    ends = np.concatenate([[0], parts["end"]])
    odd = np.flatnonzero(np.append(~following(parts), ends[-1] < file.size))
    readable = np.isin(starts[odd - 1], records["offset"][records["whole"]])
    for i, before_is_readable in zip(odd.tolist(), readable.tolist(), strict=True):
        if ends[i] < starts[i]:
            damaged.append(
                f"records in {file.path} must begin with the magic number {MAGIC:#010x},"
                f" got something else at offset {ends[i]}, up to {starts[i]}"
            )
        elif i < len(parts) and parts["flag"][i] in (MIDDLE, LAST):
            damaged.append(
                f"records in {file.path} must begin with a first part, got flag"
                f" {parts['flag'][i]} at offset {starts[i]}"
            )
        elif before_is_readable:
            logger.warning(
                "the record at offset %d of %s must end before the next, at %d, got %d",
                *(starts[i - 1], file.path, starts[i], ends[i]),
            )


def _records_at(
    file: RecordFile,
    offsets: NDArray[np.int64],
    damaged: list[str] | None,
    progress: Progress | None = None,
) -> NDArray[np.void]:
    """The records at ascending offsets in the file, (N,) of dtype ``_RECORDS``.

    Those that are damaged are noted, and not ``whole``.
    """
    records = [np.empty(0, _RECORDS)]
    for start in range(0, len(offsets), _BLOCK):
        block = offsets[start : start + _BLOCK]
        records.append(_record_block(file, block, damaged))
        if progress is not None:
            last = start + _BLOCK >= len(offsets)
            progress(file.size if last else int(block[-1]), file.size)
    return np.concatenate(records)


def _record_block(
    file: RecordFile, offsets: NDArray[np.int64], damaged: list[str] | None
) -> NDArray[np.void]:
    words, at = file.words, offsets // 4

    def word(i: int) -> NDArray[np.uint32]:
        return words[np.minimum(at + i, len(words) - 1)]

    length, count = word(1).astype(np.int64), word(2).astype(np.int64)
    image_size = length - IMAGE_HEAD.size - 4 * count
    whole = (word(0) == MAGIC) & (length < TOO_LONG) & (image_size >= 0)
    whole &= offsets + HEAD.size + padded(length) <= file.size
    records = np.empty(len(offsets), _RECORDS)
    records["offset"], records["whole"] = offsets, whole
    records["id"] = word(4) | word(5).astype(np.uint64) << np.uint64(32)
    records["id2"] = word(6) | word(7).astype(np.uint64) << np.uint64(32)
    records["label"] = np.where(count > 0, word(8), word(3)).view(np.float32)
    records["has_image"] = (count == 0) | (image_size > 0)
    for i in np.flatnonzero(~whole):  # split, or bad: then this says why
        try:
            record = file.image_record(int(offsets[i]))
        except ValueError as error:
            if damaged is not None:
                damaged.append(str(error))
            continue
        has_image = not record.flag or len(record.image) > 0
        records[i] = (offsets[i], record.id, record.id2, record.labels[0], has_image, True)
    return records


def _indexed(
    file: RecordFile, index: Path, damaged: list[str]
) -> tuple[NDArray[np.int64], NDArray[np.int64], list[tuple[int, int]]]:
    """Keys and offsets that the index lists, by ascending offset: a disk reads that way.

    Last come the pairs of key and offset beyond the file's end.
    """
    keys, offsets = read_idx(index)
    order = offsets.argsort(kind="stable")
    keys, offsets = keys[order], offsets[order]
    end = int(np.searchsorted(offsets, file.size - HEAD.size, side="right"))
    beyond = list(zip(keys[end:].tolist(), offsets[end:].tolist(), strict=True))
    keys, offsets = keys[:end], offsets[:end]
    aligned = offsets % 4 == 0
    for key, offset in zip(keys[~aligned].tolist(), offsets[~aligned].tolist(), strict=True):
        damaged.append(f"offsets in {index} must be multiples of 4, got {offset} for key {key}")
    return keys[aligned], offsets[aligned], beyond


def _keys_of(ids: NDArray[np.uint64]) -> NDArray[np.int64]:
    """Ids are keys if they are distinct, else places are."""
    ordered = np.sort(ids)
    distinct = (ordered[1:] != ordered[:-1]).all() and (ids < np.uint64(1 << 63)).all()
    return ids.astype(np.int64) if distinct else np.arange(len(ids))


def _compare_count(file: RecordFile, promise: np.float32, count: int) -> None:
    """Warn if a header promises another number of images, as well as a float32 can."""
    if promise != np.float32(count + 1):
        logger.warning(
            "%s promises %.0f images in its header, got %d", file.path, promise - 1, count
        )
