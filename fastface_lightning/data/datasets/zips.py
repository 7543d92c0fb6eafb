"""Faces in zip archives, read where they lie, without unpacking."""

import mmap
import struct
import zipfile
import zlib
from array import array
from pathlib import Path

import numpy as np
from rich.progress import track

from ...files import file_stamp, printable
from ..formats.image import IMAGE_SUFFIXES
from ..formats.index import Arrays, cached
from ..formats.names import Labels, Names, Packer
from .base import FaceDataset

_LARGEST = 1 << 26  # bytes of an image
_STORED, _DEFLATED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED
# A member's own header: signature and, from byte 26, the lengths of name and extra field.
_LOCAL = struct.Struct("<4s22xHH")


class ZippedFaces(FaceDataset):
    """Members ``…/<identity>/<image>`` of zip archives, labelled by the sorted identity names.

    The identity is the folder that holds the image; folders above it do not count. Images keep the
    order of the archives, by name, and of their members. Archives are read once for their tables of
    contents, which are kept as an index beside ``root`` (see :func:`cached`), and mapped from then
    on: each worker reads its images in place. Checksums are compared at every reading.

    Args:
        root: a ``.zip`` file or a folder of them.
        size, max_bad, reindex: see :class:`IdentityFolder`.

    Raises:
        ValueError: there is no archive, one is damaged, or none holds an image.
    """

    def __init__(
        self, root: str | Path, size: int = 112, max_bad: int = 100, reindex: bool = False
    ) -> None:
        super().__init__(size, max_bad)
        self.root = Path(root)
        self.archives = sorted(self.root.glob("*.zip")) if self.root.is_dir() else [self.root]
        if not self.archives or not self.archives[0].is_file():
            raise ValueError(f"no .zip archive {root}; expected <identity>/<image>.jpg in it")
        stamp = np.array(file_stamp(*self.archives), np.int64)
        self._index = cached(
            self.root,
            lambda: {**_contents(self.archives), "stamp": stamp},
            lambda kept: np.array_equal(kept["stamp"], stamp),
            reindex,
        )
        self._files = Names.from_arrays("files", self._index)
        self._hold(Names.from_arrays("identities", self._index), self._index["labels"])
        self._maps: dict[int, mmap.mmap] = {}

    def name(self, index: int) -> str:
        row = self._row(index)
        return printable(f"{self.archives[self._index['archives'][row]]}/{self._files[row]}")

    def _fetch(self, index: int) -> bytes | memoryview:
        row = self._row(index)
        start, stored, method, checksum = (
            int(self._index[name][row]) for name in ("offsets", "sizes", "methods", "checksums")
        )
        data = memoryview(self._map(int(self._index["archives"][row])))
        header = data[start : start + _LOCAL.size]
        if len(header) < _LOCAL.size or header[:4] != b"PK\x03\x04":
            raise ValueError("the archive holds no member where its table says")
        _, name_length, extra_length = _LOCAL.unpack(header)
        start += _LOCAL.size + name_length + extra_length
        content: bytes | memoryview = data[start : start + stored]
        if method == _DEFLATED:
            content = _inflate(content, int(self._index["inflated"][row]))
        if zlib.crc32(content) != checksum:
            raise ValueError("its checksum is wrong")
        return content

    def _map(self, archive: int) -> mmap.mmap:
        if archive not in self._maps:
            with self.archives[archive].open("rb") as file:
                self._maps[archive] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._maps[archive]

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_maps": {}}

    def __str__(self) -> str:
        return printable(str(self.root))


def _inflate(data: bytes | memoryview, size: int) -> bytes:
    """Inflate to the size that the table promises, and no further.

    Raises:
        ValueError: it promises more than any face takes, or the data are damaged.
    """
    if size > _LARGEST:
        raise ValueError(f"it must be at most {_LARGEST} bytes, got {size}")
    try:
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
    except zlib.error as error:
        raise ValueError(f"it is damaged ({error})") from error


def _contents(archives: list[Path]) -> Arrays:
    """Index the images of all archives; one archive's table of contents is held at a time."""
    files, labels = Packer(), Labels()
    columns = {name: array("q") for name in ("archives", "offsets", "sizes", "inflated")}
    methods, checksums = array("B"), array("L")
    for number, archive in enumerate(track(archives, "indexing archives", transient=True)):
        for member in _images(archive):
            files.append(member.filename)
            labels.append(_identity(member.filename))
            place = (number, member.header_offset, member.compress_size, member.file_size)
            for column, value in zip(columns.values(), place, strict=True):
                column.append(value)
            methods.append(member.compress_type)
            checksums.append(member.CRC)
    if not files:
        raise ValueError(f"no <identity>/<image>.jpg in {', '.join(map(str, archives))}")
    identities, numbers = labels.sorted()
    return {
        **identities.arrays("identities"),
        **files.names().arrays("files"),
        "labels": numbers,
        "methods": np.array(methods, np.uint8),
        "checksums": np.array(checksums, np.uint32),
        **{name: np.array(column, np.int64) for name, column in columns.items()},
    }


def _images(archive: Path) -> list[zipfile.ZipInfo]:
    """Members that are images in a folder.

    Raises:
        ValueError: the archive or a member cannot be read by this reader.
    """
    try:
        with zipfile.ZipFile(archive) as opened:
            members = opened.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise ValueError(f"cannot read archive {archive}: {error}") from error
    images = [
        member
        for member in members
        if "/" in member.filename
        and member.filename.lower().endswith(IMAGE_SUFFIXES)
        and not member.filename.rpartition("/")[2].startswith(".")
        and _is_name(_identity(member.filename))
    ]
    for member in images:
        if member.compress_type not in (_STORED, _DEFLATED) or member.flag_bits & 1:
            raise ValueError(
                f"members must be stored or deflated, not encrypted, got {member.filename} in"
                f" {archive} with method {member.compress_type}"
            )
    return images


def _identity(member: str) -> str:
    """The folder that holds a member."""
    return member.rpartition("/")[0].rpartition("/")[2]


def _is_name(identity: str) -> bool:
    """Whether it names a folder, and not the one above or none."""
    return identity not in ("", ".", "..") and "\0" not in identity
