"""Write a record file of faces as InsightFace does; one that was killed goes on where it was."""

import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

import numpy as np
from typing_extensions import Self

from ...files import replacing
from .recordio import (
    FIRST,
    HEAD,
    IMAGE_HEAD,
    INEXACT,
    LAST,
    MAGIC,
    MIDDLE,
    TOO_LONG,
    WHOLE,
    RecordFile,
    logger,
    padded,
)

_BUFFER = 1 << 18  # bytes written together


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
        return IMAGE_HEAD.pack(0, float(labels), id, id2) + image
    head = IMAGE_HEAD.pack(labels.size, 0.0, id, id2)
    return b"".join([head, labels.astype("<f4").tobytes(), image])


def encode_record(payload: bytes | memoryview) -> bytes:
    """The record of a payload, byte for byte as MXNet writes it: heads, parts and padding.

    Raises:
        ValueError: the payload has 2^29 bytes or more.
    """
    payload = memoryview(payload).cast("B")
    size = len(payload)
    if size >= TOO_LONG:
        raise ValueError(f"a record must be shorter than 2^29 bytes, got {size}")
    joints = 4 * np.flatnonzero(np.frombuffer(payload[: size & ~3], "<u4") == MAGIC)
    starts, ends = [0, *(joints + 4).tolist()], [*joints.tolist(), size]
    flags = [FIRST, *[MIDDLE] * (len(joints) - 1), LAST] if len(joints) else [WHOLE]
    pieces: list[bytes | memoryview] = []
    for flag, start, end in zip(flags, starts, ends, strict=True):
        pieces += [HEAD.pack(MAGIC, flag << 29 | end - start), payload[start:end]]
    return b"".join([*pieces, bytes(padded(size) - size)])


class InsightFaceWriter:
    """Write a record file and its index in InsightFace's layout.

    Record 0 has labels (n_images + 1, n_records + 1), the images have keys 1 to n_images, and a
    record with labels (first key, last key + 1) follows for each identity. Numbers from 2^24 on
    are rounded to float32.

    Until it is closed, or its ``with`` block is left without an exception, there is only
    ``<name>.rec.part``, one record after the other. After an exception or a crash it remains, and
    ``resume`` goes on behind its last whole image: ``len(writer)`` says how many there are. The
    index is made on closing and gets its name first, so where there is a ``.rec`` it is complete.

    Args:
        path: the ``.rec`` file to be; its index gets the suffix ``.idx``.
        resume: go on with the part if there is one.

    Attributes:
        id2: (N,) uint64, of the images that were there when resuming.

    Raises:
        ValueError: one of the files exists, or a part that is not to be resumed or is not of this
            layout.
        OSError: the part cannot be written.
    """

    def __init__(self, path: str | Path, resume: bool = False) -> None:
        self.path = Path(path)
        if self.path.suffix != ".rec":
            raise ValueError(f"a record file's name must end in .rec, got {path}")
        self._idx = self.path.with_suffix(".idx")
        self._part = self.path.with_name(self.path.name + ".part")
        self._offsets = array("q")  # of the records; their keys are 0, 1, 2 ...
        self._first_keys = array("q")  # of each identity, in order
        self._end = 0  # of the last record, bytes
        self._label = -1  # of the last image
        self.id2 = np.empty(0, np.uint64)
        part_exists = self._part.exists()
        if part_exists and not resume:
            raise ValueError(f"{self._part} is left of an earlier run: resume that, or delete it")
        # A close that was interrupted between the two names leaves the index and the part.
        for file in (self.path,) if part_exists else (self.path, self._idx):
            if file.exists():
                raise ValueError(f"a record file must be new, but {file} exists")
        if part_exists and self._part.stat().st_size:
            self._recover()
        with self._named_errors():
            self._rec = open(self._part, "r+b" if self._end else "wb", _BUFFER)  # noqa: SIM115
            self._rec.truncate(self._end)
            self._rec.seek(self._end)
        if not self._offsets:
            self._append(pack_image([0, 0], 0, b""))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, _: BaseException | None, __: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.abort()

    def write_image(self, label: int, image: bytes | memoryview, id2: int = 0) -> int:
        """Append an encoded image of identity ``label`` and return its key.

        ``id2`` is kept with it, as by :func:`pack_image`.

        Raises:
            ValueError: ``label`` is not in [0, 2^24), or below the last image's, or the image has
                2^29 bytes or more; or the writer is closed.
            OSError: it cannot be written.
        """
        if not 0 <= label < INEXACT or label != int(label):
            raise ValueError(f"an image's label must be a whole number in [0, 2^24), got {label}")
        if label < self._label:
            raise ValueError(
                f"images must come by ascending label, got {label} after {self._label}"
            )
        key = len(self._offsets)
        self._append(pack_image(label, key, image, id2))
        self._note_label(label, key)
        return key

    def close(self) -> None:
        """Write what is left to write and give the files their names.

        Raises:
            OSError: that cannot be done; the part stays.
            ValueError: the writer was aborted, or a write has failed before.
        """
        if self._rec.closed and self.path.exists():
            return
        images_end = len(self._offsets)
        for first, end in zip(self._first_keys, [*self._first_keys[1:], images_end], strict=True):
            self._append(pack_image([first, end], len(self._offsets), b""))
        with self._named_errors():
            self._rec.seek(0)
            self._rec.write(encode_record(pack_image([images_end, len(self._offsets)], 0, b"")))
            self._rec.flush()
            os.fsync(self._rec.fileno())
            self._rec.close()
        with replacing(self._idx) as part, open(part, "wb") as lines:
            lines.writelines(b"%d\t%d\n" % pair for pair in enumerate(self._offsets))
            lines.flush()
            os.fsync(lines.fileno())
        os.replace(self._part, self.path)

    def abort(self) -> None:
        """Leave the part as it is, to be resumed; nothing gets its name."""
        with suppress(OSError):  # what the disk did not take before
            self._rec.close()

    def _append(self, payload: bytes) -> None:
        record = encode_record(payload)
        with self._named_errors():
            self._rec.write(record)
        self._offsets.append(self._end)
        self._end += len(record)

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """After an error nothing more is written, and the error names the file."""
        try:
            yield
        except OSError as error:
            if hasattr(self, "_rec"):
                self.abort()
            raise OSError(error.errno, f"cannot write {self._part}: {error.strerror}") from error

    def _recover(self) -> None:
        """Find the images in the part, up to the first that is damaged or cut."""
        file, id2 = RecordFile(self._part), array("Q")
        while self._end < file.size:
            try:
                record, end = file.image_record(self._end), file.end(self._end)
            except ValueError:
                break
            if record.has_image and not self._offsets:
                raise ValueError(f"{self._part} must begin with a header record, got an image")
            if record.has_image:
                self._note_label(int(record.labels[0]), len(self._offsets))
                id2.append(record.id2)
            elif self._offsets:
                break  # an identity: closing had begun
            self._offsets.append(self._end)
            self._end = end
        self.id2 = np.array(id2, np.uint64)
        logger.info("resuming %s after %d images", self._part, len(id2))

    def _note_label(self, label: int, key: int) -> None:
        if label > self._label:
            self._first_keys.append(key)
        self._label = label
