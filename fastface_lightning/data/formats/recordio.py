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
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from typing_extensions import Self

logger = logging.getLogger(__name__)

Progress = Callable[[int, int], None]

MAGIC = 0xCED7230A
_HEAD = struct.Struct("<II")
_IMAGE_HEAD = struct.Struct("<IfQQ")
_WHOLE_HEAD = struct.Struct("<III")  # magic number, length where there is no flag, number of labels
_IMAGE_START = _HEAD.size + _IMAGE_HEAD.size
_TOO_LONG = 1 << 29  # bytes, of a payload
_INEXACT = 1 << 24  # from here on not every whole number is a float32
_BLOCK = 1 << 16  # records looked at together
_TEXT_BLOCK = 1 << 22  # bytes of an index parsed together, and of records written
_WHOLE, _FIRST, _MIDDLE, _LAST = range(4)
_Heads = np.dtype([("offset", "i8"), ("id", "u8"), ("label", "f4"), ("image", "?"), ("whole", "?")])
_MOST_DAMAGED = 10_000  # records; a file with more is not the one that was meant


class _Damage(list[str]):
    """Sentences about damaged records, of which there may be so many."""

    def append(self, sentence: str) -> None:
        super().append(sentence)
        if len(self) > _MOST_DAMAGED:
            raise ValueError(f"more than {_MOST_DAMAGED} records are damaged, the last: {sentence}")


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
            raise ValueError(f"cannot read {path}: {error.strerror}") from error
        self._view = memoryview(self._map)
        self._words = np.frombuffer(self._map, "<u4", count=self.size // 4)

    def __reduce__(self) -> tuple[type[Self], tuple[Path]]:
        return type(self), (self.path,)

    def record(self, offset: int) -> memoryview:
        """Payload of the record that begins at ``offset``: a view of the file, or parts joined.

        Raises:
            ValueError: there is no whole record at this offset, in bytes.
        """
        offset = int(offset)
        if not 0 <= offset <= self.size - _HEAD.size or offset % 4:
            raise ValueError(
                f"offsets in {self.path} must be multiples of 4 in"
                f" [0, {self.size - _HEAD.size}], got {offset}"
            )
        parts = [self._view[start : start + length] for start, length in self._parts(offset)]
        return parts[0] if len(parts) == 1 else memoryview(_MAGIC_BYTES.join(parts))

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
        if (
            0 <= offset <= self.size - _IMAGE_START and not offset % 4
        ):  # nearly all records are whole: one look
            magic, length, flag = _WHOLE_HEAD.unpack_from(self._map, offset)
            start, end = offset + _IMAGE_START + 4 * flag, offset + _HEAD.size + length
            whole = magic == MAGIC and length < _TOO_LONG
            if whole and start <= end and offset + _HEAD.size + _padded(length) <= self.size:
                return self._view[start:end]
        return self.image_record(offset).image

    def _parts(self, offset: int) -> list[tuple[int, int]]:
        """Start and length of the payload's parts, bytes."""
        parts: list[tuple[int, int]] = []
        at, total = offset, 0
        while True:
            if at > self.size - _HEAD.size:
                raise ValueError(
                    f"the record at offset {offset} of {self.path} must end within the file's"
                    f" {self.size} bytes, got another part at {at}"
                )
            magic, packed = _HEAD.unpack_from(self._map, at)
            flag, length = packed >> 29, packed & (_TOO_LONG - 1)
            start, end = at + _HEAD.size, at + _HEAD.size + _padded(length)
            expected = (_MIDDLE, _LAST) if parts else (_WHOLE, _FIRST)
            total += length + 4 * bool(parts)
            if magic != MAGIC:
                raise ValueError(
                    f"records in {self.path} must begin with the magic number {MAGIC:#010x},"
                    f" got {magic:#010x} at offset {at}"
                )
            if flag not in expected:
                raise ValueError(
                    f"the {'next' if parts else 'first'} part of the record at offset {offset} of"
                    f" {self.path} must have flag {expected[0]} or {expected[1]}, got {flag}"
                )
            if total >= _TOO_LONG:
                raise ValueError(
                    f"the record at offset {offset} of {self.path} must be shorter than 2^29"
                    f" bytes, got at least {total}"
                )
            if end > self.size:
                raise ValueError(
                    f"the record at offset {offset} of {self.path} must end within the file's"
                    f" {self.size} bytes, got {length} bytes of payload from {start} on"
                )
            parts.append((start, length))
            if flag in (_WHOLE, _LAST):
                return parts
            at = end

    def _end(self, offset: int) -> int:
        """Where the record that begins at ``offset`` ends, padding included."""
        if offset <= self.size - _HEAD.size:
            magic, length = _HEAD.unpack_from(self._map, offset)
            end = offset + _HEAD.size + _padded(length)
            if magic == MAGIC and length < _TOO_LONG and end <= self.size:
                return end
        start, length = self._parts(offset)[-1]
        return start + _padded(length)

    def _next_record(self, offset: int) -> int | None:
        """Offset of the first head of a record at or after ``offset``, if there is one."""
        while offset <= self.size - _HEAD.size:
            words = self._words[offset // 4 : offset // 4 + _BLOCK]
            for place in np.flatnonzero(words[:-1] == MAGIC):
                if words[place + 1] >> 29 in (_WHOLE, _FIRST):
                    return offset + 4 * int(place)
            offset += 4 * max(len(words) - 1, 1)  # the last word may be a head's first
        return None


def parse_image_record(payload: bytes | memoryview) -> ImageRecord:
    """Read the payload of an image's record; labels and image are views of it.

    Raises:
        ValueError: it is too short for its head, or for the labels that the head promises.
    """
    payload = memoryview(payload)
    if len(payload) < _IMAGE_HEAD.size:
        raise ValueError(
            f"an image record must hold at least {_IMAGE_HEAD.size} bytes, got {len(payload)}"
        )
    flag, _, key, id2 = _IMAGE_HEAD.unpack_from(payload)
    end = _IMAGE_HEAD.size + 4 * flag
    if len(payload) < end:
        raise ValueError(
            f"an image record with {flag} labels must hold at least {end} bytes, got {len(payload)}"
        )
    start, count = (_IMAGE_HEAD.size, flag) if flag else (4, 1)
    labels = np.frombuffer(payload, "<f4", count, start)
    return ImageRecord(flag, labels, key, id2, payload[end:])


def read_idx(path: str | Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Read an index; 42 million lines take seconds and little more memory than their numbers.

    Returns:
        Keys and offsets, each (N,) int64, in the file's order.

    Raises:
        ValueError: the file is absent, unreadable, or a line is not ``key<TAB>offset``.
    """
    keys, offsets = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    line = 1
    try:
        with open(path, "rb") as file:
            for text in _blocks_of_lines(file):
                pairs = _parse_lines(text)
                if pairs is None:
                    pairs = _parse_each_line(text, line, path)
                line += text.count(b"\n")
                keys.append(pairs[:, 0].copy())
                offsets.append(pairs[:, 1].copy())
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    return np.concatenate(keys), np.concatenate(offsets)


def read_table(
    path: str | Path, reindex: bool = False, progress: Progress | None = None
) -> RecordTable:
    """Find all images of a record file and their labels, in one pass over the file.

    The records are those that the index beside the file lists. Where there is none, all records
    are taken, and their ids for keys (which they are in files of InsightFace and of im2rec), or
    their places if the ids are not distinct.

    A record is an image's unless it has labels of its own and nothing behind them. Such are the
    records that InsightFace adds: record 0, which promises numbers of images and records, and
    one for each identity. The numbers are float32, hence inexact from 2^24 on; they are compared
    with what was found, and a warning tells of a difference.

    Damaged records are left out and said: heads that are none, offsets outside the file, labels
    that are not whole numbers in [0, 2^24). Without an index, the next head is then looked for.

    Args:
        path: a ``.rec`` file; its index has the suffix ``.idx``.
        reindex: look for the records whatever the index says.
        progress: called now and then with the bytes passed and the bytes there are.

    Raises:
        ValueError: the file is absent or empty, a line of its index is none, a key occurs twice,
            more than 10,000 records are damaged, or there is no image.
    """
    file, damaged = RecordFile(path), _Damage()
    if hasattr(mmap, "MADV_SEQUENTIAL"):  # each page once: reading ahead beats millions of seeks
        file._map.madvise(mmap.MADV_SEQUENTIAL)
    index = file.path.with_suffix(".idx")
    beyond: Iterator[tuple[int, int]] = iter(())
    if reindex or not index.exists():
        blocks = _scanned(file, progress, damaged)
        heads = _concatenated(_heads(file, block, damaged) for block in blocks)
        heads = heads[heads["whole"]]
        keys = _keys_of(heads["id"])
    else:
        keys, offsets, beyond = _indexed(file, index, damaged)
        blocks = _blocks(file, offsets, progress)
        heads = _concatenated(_heads(file, block, damaged) for block in blocks)
        keys, heads = keys[heads["whole"]], heads[heads["whole"]]
    order = keys.argsort(kind="stable")
    keys, heads = keys[order], heads[order]
    twice = np.flatnonzero(keys[1:] == keys[:-1])
    if len(twice):
        raise ValueError(f"keys in {index} must be distinct, got {keys[twice[0]]} twice")
    count = len(heads)
    _compare_count(file, keys, heads)
    keys, heads = keys[heads["image"]], heads[heads["image"]]
    good = _good_labels(file, keys, heads, damaged)
    keys, heads = keys[good], heads[good]
    for key, offset in beyond:  # the last to be said: where many are lost, it is for this
        damaged.append(
            f"{path} ends at byte {file.size}, before the record at offset {offset} that {index}"
            f" lists with key {key}: an incomplete copy, or a damaged index"
        )
    if not len(heads):
        why = f": {damaged[-1]}" if damaged else ""
        raise ValueError(f"{path} must hold images, got {count} records and none with one{why}")
    return RecordTable(keys, heads["offset"].copy(), heads["label"].astype(np.int64), list(damaged))


def pack_image(
    label: float | Sequence[float], id: int, image: bytes | memoryview, id2: int = 0
) -> bytes:
    """Payload of an image's record, as ``mxnet.recordio.pack`` makes it.

    Args:
        label: one for the head, or some to follow it (flag is their number, even of one).
        id: in [0, 2^64).
        image: encoded image.
        id2: a number of one's own, in [0, 2^64).

    Raises:
        ValueError: ``id`` is out of range, or a label is not a finite float32, or there is none.
    """
    if not 0 <= id < 1 << 64:
        raise ValueError(f"id must lie in [0, 2^64), got {id}")
    labels = np.asarray(label, np.float64)
    if labels.ndim > 1 or not labels.size or not (abs(labels) <= np.finfo(np.float32).max).all():
        raise ValueError(f"label must be one or a list of finite float32 numbers, got {label}")
    if labels.ndim == 0:
        return _IMAGE_HEAD.pack(0, float(labels), id, id2) + image
    head = _IMAGE_HEAD.pack(labels.size, 0.0, id, id2)
    return b"".join([head, labels.astype("<f4").tobytes(), image])


class _PartWriter:
    """Appends records to ``<name>.rec.part`` and ``.idx.part``; only closing gives their names.

    A line of the index is written after its record. The index gets its name first, so where there
    is a ``.rec`` it has all its records and lines. In between, or after a failure, resuming takes
    up what there is.
    """

    def __init__(self, path: str | Path, resume: bool = False) -> None:
        self.path = Path(path)
        if self.path.suffix != ".rec":
            raise ValueError(f"a record file's name must end in .rec, got {path}")
        self._idx_path = self.path.with_suffix(".idx")
        self._rec_part = self.path.with_name(self.path.name + ".part")
        self._idx_part = self._idx_path.with_name(self._idx_path.name + ".part")
        self._count, self._key, self._offset = 0, 0, 0
        self._lines: list[bytes] = []
        self._unflushed = 0
        self._done = False
        self._check_free(resume)
        try:
            if resume:
                self._recover()
            self._rec_part.touch()
            self._rec = open(self._rec_part, "r+b", buffering=_TEXT_BLOCK)  # noqa: SIM115
            self._idx = open(self._idx_part, "ab")  # noqa: SIM115
        except OSError as error:
            raise OSError(
                error.errno, f"cannot write {error.filename}: {error.strerror}"
            ) from error
        self._rec.seek(self._offset)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def close(self) -> None:
        """Write what is left to write and give the files their names.

        Raises:
            OSError: that cannot be done; the parts stay.
            ValueError: the writer was aborted, or a write has failed before.
        """
        if self._done:
            return
        self._check_open()
        self._finish()
        with self._writing():
            self._flush()
            for file in (self._rec, self._idx):
                os.fsync(file.fileno())
                file.close()
            os.replace(self._idx_part, self._idx_path)
            os.replace(self._rec_part, self.path)
        self._done = True

    def abort(self) -> None:
        """Leave the parts as they are, to be resumed; nothing gets a name."""
        with suppress(OSError, ValueError):  # ValueError: closed already
            self._flush()
        for file in (self._rec, self._idx):
            with suppress(OSError):
                file.close()

    def _kept(self, file: RecordFile, offsets: NDArray[np.int64]) -> int:
        """How many of the records found on resuming stay."""
        del file
        return len(offsets)

    def _finish(self) -> None:
        """Records to write before closing."""

    def _append(self, payload: bytes | memoryview, key: int) -> None:
        self._check_open()
        if not 0 <= key < 10**18:
            raise ValueError(f"a record's key must lie in [0, 10^18), got {key}")
        encoded = _encode(payload)
        with self._writing():
            self._rec.write(encoded)
            self._lines.append(_line(key, self._offset))
            self._offset += len(encoded)
            self._count += 1
            self._key = key + 1
            self._unflushed += len(encoded)
            if self._unflushed >= _TEXT_BLOCK:
                self._flush()

    def _flush(self) -> None:
        self._rec.flush()
        self._idx.write(b"".join(self._lines))
        self._lines.clear()
        self._idx.flush()
        self._unflushed = 0

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.abort()
            raise OSError(
                error.errno, f"cannot write {self._rec_part}: {error.strerror}"
            ) from error

    def _check_open(self) -> None:
        if self._rec.closed:
            state = "finished" if self._done else f"left as {self._rec_part}"
            raise ValueError(f"records go to an open writer, but {self.path} was {state}")

    def _check_free(self, resume: bool) -> None:
        """Refuse to overwrite anything; when resuming, undo a close that was interrupted."""
        half_closed = self._rec_part.exists() and not self._idx_part.exists()
        if resume and half_closed and self._idx_path.exists() and not self.path.exists():
            os.replace(self._idx_path, self._idx_part)
        for file in (self.path, self._idx_path):
            if file.exists():
                raise ValueError(f"a record file must be new, but {file} exists")
        for file in (self._rec_part, self._idx_part):
            if file.exists() and not resume:
                raise ValueError(f"{file} is left of an earlier run: resume that, or delete it")

    def _recover(self) -> None:
        """Cut the parts after the last record that is whole and has its line."""
        sizes = [p.stat().st_size if p.exists() else 0 for p in (self._rec_part, self._idx_part)]
        if all(sizes):
            _drop_torn_line(self._idx_part)
            keys, offsets = read_idx(self._idx_part)
            file = RecordFile(self._rec_part)
            offsets = offsets[: _agreeing(offsets, _sound_records(file))]
            offsets = offsets[: self._kept(file, offsets)]
            keys = keys[: len(offsets)]
            if len(keys):
                self._count, self._key = len(keys), int(keys[-1]) + 1
                self._offset = file._end(int(offsets[-1]))
            text_size = int((_digits(keys) + _digits(offsets) + 2).sum())
            del file  # what is mapped must not be cut
            os.truncate(self._idx_part, text_size)
            os.truncate(self._rec_part, self._offset)
            logger.info("resuming %s after %d records", self._rec_part, self._count)
        else:
            for part, size in zip((self._rec_part, self._idx_part), sizes, strict=True):
                if size:
                    os.truncate(part, 0)


class RecordWriter(_PartWriter):
    """Write a record file and its index, byte for byte as MXNet does.

    Until it is closed, or its ``with`` block is left without an exception, the files are
    ``<name>.rec.part`` and ``<name>.idx.part``. After an exception or a crash they remain, and
    ``resume`` goes on after the last record that is whole: ``len(writer)`` says how many are.

    Args:
        path: the ``.rec`` file to be; its index gets the suffix ``.idx``.
        resume: go on with the parts if there are any.

    Raises:
        ValueError: one of the files exists, or their parts do and are not to be resumed.
        OSError: they cannot be written.
    """

    def __len__(self) -> int:
        return self._count

    def write(self, payload: bytes | memoryview, key: int | None = None) -> int:
        """Append a record and return its key: the last one's plus 1, or ``key``.

        Raises:
            ValueError: the payload has 2^29 bytes or more, or ``key`` is not in [0, 10^18).
            OSError: it cannot be written.
        """
        key = self._key if key is None else key
        self._append(payload, key)
        return key

    def write_image(self, label: int, image: bytes | memoryview) -> int:
        """Append an encoded image of identity ``label``, in [0, 2^24), and return its key."""
        return self.write(pack_image(_checked(label), self._key, image))


class InsightFaceWriter(_PartWriter):
    """Write a record file in InsightFace's layout: :class:`RecordWriter` says how it is written.

    Record 0 has labels (n_images + 1, n_records + 1), the images have keys 1 to n_images, and a
    record with labels (first key, last key + 1) follows for each identity. Numbers from 2^24 on
    are rounded to float32.

    Args:
        path: the ``.rec`` file to be.
        resume: go on with the parts if there are any.

    Attributes:
        last_id2: of the last image that was there when resuming; None if there was none.

    Raises:
        ValueError: one of the files exists, or their parts do and are not to be resumed or are
            not of this layout.
        OSError: they cannot be written.
    """

    def __init__(self, path: str | Path, resume: bool = False) -> None:
        self._first_keys = array("q")  # of each identity, in order
        self._label = -1
        self.last_id2: int | None = None
        super().__init__(path, resume)
        if not self._count:
            self._append(pack_image([0, 0], 0, b""), 0)

    def __len__(self) -> int:
        return max(self._count - 1, 0)

    def write_image(self, label: int, image: bytes | memoryview, id2: int = 0) -> int:
        """Append an encoded image of identity ``label`` and return its key.

        ``id2`` is kept with it, as by :func:`pack_image`.

        Raises:
            ValueError: ``label`` is not in [0, 2^24), or below the last image's, or the image has
                2^29 bytes or more.
            OSError: it cannot be written.
        """
        if label < self._label:
            raise ValueError(
                f"images of {self.path} must come by ascending label, got {label} after"
                f" {self._label}"
            )
        key = self._key
        self._append(pack_image(_checked(label), key, image, id2), key)
        if label > self._label:
            self._first_keys.append(key)
        self._label = label
        return key

    def _kept(self, file: RecordFile, offsets: NDArray[np.int64]) -> int:
        heads = _concatenated(_heads(file, block) for block in _blocks(file, offsets))
        if not len(heads):
            return 0
        if heads["image"][0]:
            raise ValueError(f"{file.path} must begin with a header record, got an image")
        others = np.flatnonzero(~heads["image"][1:])  # identities: closing had begun
        labels = heads["label"][1 : 1 + others[0] if len(others) else None]
        if len(labels):
            starts = np.flatnonzero(np.diff(labels, prepend=-1))
            self._first_keys = array("q", (starts + 1).tolist())
            self._label = int(labels[-1])
            self.last_id2 = file.image_record(int(offsets[len(labels)])).id2
        return 1 + len(labels)

    def _finish(self) -> None:
        images_end = self._key
        for first, end in zip(self._first_keys, [*self._first_keys[1:], images_end], strict=True):
            self._append(pack_image([first, end], self._key, b""), self._key)
        with self._writing():
            self._rec.seek(0)
            self._rec.write(_encode(pack_image([images_end, self._key], 0, b"")))
            self._rec.seek(self._offset)


_MAGIC_BYTES = struct.pack("<I", MAGIC)


def _padded(length: int) -> int:
    return (length + 3) & ~3


def _encode(payload: bytes | memoryview) -> bytes:
    """The record of a payload: heads, parts and padding."""
    payload = memoryview(payload).cast("B")
    size = len(payload)
    if size >= _TOO_LONG:
        raise ValueError(f"a record must be shorter than 2^29 bytes, got {size}")
    joints = 4 * np.flatnonzero(np.frombuffer(payload[: size & ~3], "<u4") == MAGIC)
    starts, ends = [0, *(joints + 4).tolist()], [*joints.tolist(), size]
    flags = [_FIRST, *[_MIDDLE] * (len(joints) - 1), _LAST] if len(joints) else [_WHOLE]
    pieces: list[bytes | memoryview] = []
    for flag, start, end in zip(flags, starts, ends, strict=True):
        pieces += [_HEAD.pack(MAGIC, flag << 29 | end - start), payload[start:end]]
    return b"".join([*pieces, bytes(_padded(size) - size)])


def _checked(label: int) -> int:
    if not 0 <= label < _INEXACT or label != int(label):
        raise ValueError(f"an image's label must be a whole number in [0, 2^24), got {label}")
    return label


def _line(key: int, offset: int) -> bytes:
    return b"%d\t%d\n" % (key, offset)


def _digits(numbers: NDArray[np.int64]) -> NDArray[np.int64]:
    """How many decimal digits each number has, none of them negative."""
    return np.searchsorted(10 ** np.arange(1, 19), numbers, side="right") + 1


def _drop_torn_line(path: Path) -> None:
    """Cut a text file after its last line feed."""
    with open(path, "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 64, 0))  # a line of two numbers is shorter
        tail = file.read()
        file.truncate(size - len(tail) + tail.rfind(b"\n") + 1)


def _sound_records(file: RecordFile) -> NDArray[np.int64]:
    """Offsets of the records up to the first that is damaged or cut."""
    blocks = [np.empty(0, np.int64)]
    with suppress(ValueError):
        blocks.extend(_hop(file))
    return np.concatenate(blocks)


def _agreeing(a: NDArray[np.int64], b: NDArray[np.int64]) -> int:
    """Length of the beginning that two arrays have in common."""
    length = min(len(a), len(b))
    differing = np.flatnonzero(a[:length] != b[:length])
    return int(differing[0]) if len(differing) else length


def _blocks_of_lines(file: Any) -> Iterator[bytes]:
    """A text in blocks of whole lines; what has no line feed for long is a block by itself."""
    rest = b""
    while text := file.read(_TEXT_BLOCK):
        text = rest + text
        end = text.rfind(b"\n") + 1 or len(text)
        yield text[:end]
        rest = text[end:]
    if rest:
        yield rest


def _parse_lines(text: bytes) -> NDArray[np.int64] | None:
    """(lines, 2) numbers of a block, None if not all lines are as MXNet writes them."""
    letters = np.frombuffer(text, np.uint8)
    ends = np.flatnonzero(letters - np.uint8(ord("0")) > 9)  # uint8: what is below wraps around
    lengths = np.diff(ends, prepend=-1) - 1
    regular = (
        letters[-1] == ord("\n")
        and len(ends) % 2 == 0
        and (letters[ends[::2]] == ord("\t")).all()
        and (letters[ends[1::2]] == ord("\n")).all()
        and lengths.min() >= 1
        and lengths.max() <= 18  # fits int64
    )
    return np.fromstring(text, np.int64, sep=" ").reshape(-1, 2) if regular else None


def _parse_each_line(text: bytes, first: int, path: str | Path) -> NDArray[np.int64]:
    """The same, one by one: other white space and empty lines may pass."""
    pairs = array("q")
    for number, line in enumerate(text.split(b"\n"), first):
        fields = line.split()
        if not fields:
            continue
        if len(fields) != 2 or not all(f.isdigit() and len(f) <= 18 for f in fields):
            raise ValueError(
                f"{path}:{number}: expected a record's key, a tab and its offset,"
                f" got {line[:80].decode(errors='backslashreplace')!r}"
            )
        pairs.extend(map(int, fields))
    return np.array(pairs, np.int64).reshape(-1, 2)


def _hop(file: RecordFile, offset: int = 0) -> Iterator[NDArray[np.int64]]:
    """Offsets of the records in blocks; those before a bad one come before its exception."""
    while offset < file.size:
        found = array("q")
        try:
            while offset < file.size and len(found) < _BLOCK:
                end = file._end(offset)
                found.append(offset)
                offset = end
        except ValueError:
            yield np.array(found, np.int64)
            raise
        yield np.array(found, np.int64)


def _scanned(
    file: RecordFile, progress: Progress | None, damaged: list[str]
) -> Iterator[NDArray[np.int64]]:
    """Offsets of the records in blocks, from each one's end to the next one's head.

    After one that is damaged, the next head is looked for.
    """
    offset: int | None = 0
    last = -4  # the record or damage that was passed last
    while offset is not None and offset < file.size:
        try:
            for block in _hop(file, offset):
                yield block
                if len(block):
                    last = int(block[-1])
                    offset = file._end(last)
                if progress is not None:
                    progress(offset, file.size)
        except ValueError as error:
            # Within a payload, the magic number never stands where a head may.
            inside = file._next_record(last + 4)
            if inside is not None and inside < offset:
                logger.warning(
                    "the record at offset %d of %s must end before the next, at %d, got %d",
                    *(last, file.path, inside, offset),
                )
                offset = inside
            else:
                damaged.append(str(error))
                last, offset = offset, file._next_record(offset + 4)
        else:
            return


def _blocks(
    file: RecordFile, offsets: NDArray[np.int64], progress: Progress | None = None
) -> Iterator[NDArray[np.int64]]:
    """Ascending offsets in blocks."""
    for start in range(0, len(offsets), _BLOCK):
        block = offsets[start : start + _BLOCK]
        yield block
        if progress is not None:
            last = start + _BLOCK >= len(offsets)
            progress(file.size if last else int(block[-1]), file.size)


def _concatenated(heads: Iterator[NDArray[np.void]]) -> NDArray[np.void]:
    return np.concatenate([np.empty(0, _Heads), *heads])


def _heads(
    file: RecordFile, offsets: NDArray[np.int64], damaged: list[str] | None = None
) -> NDArray[np.void]:
    """What the table needs of records: (N,) of dtype ``_Heads``; ``offsets`` lie in the file.

    Those that are damaged are noted if they can be, and not ``whole``.
    """
    words, at = file._words, offsets // 4

    def word(i: int) -> NDArray[np.uint32]:
        return words[np.minimum(at + i, len(words) - 1)]

    length, flag = word(1).astype(np.int64), word(2).astype(np.int64)
    image_size = length - _IMAGE_HEAD.size - 4 * flag
    whole = (word(0) == MAGIC) & (length < _TOO_LONG) & (image_size >= 0)
    whole &= offsets + _HEAD.size + ((length + 3) & ~3) <= file.size
    heads = np.empty(len(offsets), _Heads)
    heads["offset"], heads["whole"] = offsets, True
    heads["id"] = word(4) | word(5).astype(np.uint64) << np.uint64(32)
    heads["label"] = np.where(flag > 0, word(8), word(3)).view(np.float32)
    heads["image"] = (flag == 0) | (image_size > 0)
    for i in np.flatnonzero(~whole):  # split, or bad: then this says why
        try:
            record = file.image_record(int(offsets[i]))
        except ValueError as error:
            if damaged is None:
                raise
            damaged.append(str(error))
            heads["whole"][i] = False
            continue
        has_image = not record.flag or len(record.image) > 0
        heads[i] = (offsets[i], record.id, record.labels[0], has_image, True)
    return heads


def _indexed(
    file: RecordFile, index: Path, damaged: list[str]
) -> tuple[NDArray[np.int64], NDArray[np.int64], Iterator[tuple[int, int]]]:
    """Keys and offsets that the index lists, by ascending offset: a disk reads that way.

    Last come the pairs of key and offset beyond the file's end.
    """
    keys, offsets = read_idx(index)
    order = offsets.argsort(kind="stable")
    keys, offsets = keys[order], offsets[order]
    end = int(np.searchsorted(offsets, file.size - _HEAD.size, side="right"))
    beyond = zip(keys[end:].tolist(), offsets[end:].tolist(), strict=True)
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


def _compare_count(file: RecordFile, keys: NDArray[np.int64], heads: NDArray[np.void]) -> None:
    """Warn if a header record, which has key 0, promises another number of images."""
    if not len(keys) or keys[0] or heads["image"][0]:
        return
    promised, found = heads["label"][0], int(heads["image"].sum())
    if not _is_count(promised, found):
        logger.warning(
            "%s promises %.0f images in its header, got %d", file.path, promised - 1, found
        )


def _is_count(label: np.float32, count: int) -> bool:
    """Whether a header's label says that there are so many images, as well as float32 can."""
    return bool(label == np.float32(count + 1))


def _good_labels(
    file: RecordFile, keys: NDArray[np.int64], heads: NDArray[np.void], damaged: list[str]
) -> NDArray[np.bool_]:
    """Which labels are labels; the others are noted."""
    labels = heads["label"]
    good = (labels >= 0) & (labels < _INEXACT) & (labels == np.floor(labels))
    for i in np.flatnonzero(~good):
        damaged.append(
            f"labels in {file.path} must be whole numbers in [0, 2^24), got {labels[i]} in the"
            f" record with key {keys[i]} at offset {heads['offset'][i]}"
        )
    return good
