"""Millions of names in one block of bytes, where a list of strings would take gigabytes."""

import os
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from ...files import replacing
from .image import IMAGE_SUFFIXES


class Names(Sequence[str]):
    """A sequence of strings, file names among them, that can lie in a memory map.

    Args:
        blob: (B,) uint8, the names in the file system's encoding, one after the other.
        ends: (N + 1,) int64, name i is ``blob[ends[i]:ends[i + 1]]``.
    """

    def __init__(self, blob: NDArray[np.uint8], ends: NDArray[np.int64]) -> None:
        self.blob, self.ends = blob, ends
        self._bytes, self._places = blob.data, ends.data  # which take an index faster

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.blob, self.ends)

    @classmethod
    def of(cls, names: Iterable[str]) -> "Names":
        """Pack strings, which may hold a file system's undecodable bytes as surrogates."""
        packer = Packer()
        for name in names:
            packer.append(name)
        return packer.names()

    def arrays(self, name: str) -> dict[str, NDArray[Any]]:
        """The two arrays, as :meth:`from_arrays` takes them."""
        return {name: self.blob, f"{name}_ends": self.ends}

    @classmethod
    def from_arrays(cls, name: str, arrays: dict[str, NDArray[Any]]) -> "Names":
        """The names of that name among arrays that belong together."""
        return cls(arrays[name], arrays[f"{name}_ends"])

    def encoded(self, index: int) -> bytes:
        """Name ``index``, from 0, as it is stored."""
        return self._bytes[self._places[index] : self._places[index + 1]].tobytes()

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...

    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"index must lie in [0, {len(self)}), got {index}")
        return os.fsdecode(self.encoded(index % len(self)))


class Packer:
    """Collects names one at a time in the space of their bytes."""

    def __init__(self) -> None:
        self._blob, self._lengths = bytearray(), array("q")

    def __len__(self) -> int:
        return len(self._lengths)

    def append(self, name: str) -> None:
        encoded = os.fsencode(name)
        self._blob += encoded
        self._lengths.append(len(encoded))

    def names(self) -> Names:
        """All of them."""
        ends = np.concatenate([[0], np.array(self._lengths, np.int64).cumsum()])
        return Names(np.frombuffer(self._blob, np.uint8), ends)


class Labels:
    """Turns identity names, one an image, into labels by the names' sorted order."""

    def __init__(self) -> None:
        self._numbers = array("i")
        self._number_of: dict[str, int] = {}

    def append(self, identity: str) -> None:
        """The next image's identity."""
        number = self._number_of.setdefault(identity, len(self._number_of))
        self._numbers.append(number)

    def sorted(self) -> tuple[Names, NDArray[np.int32]]:
        """The identities' names by label, and (N,) the label of each image."""
        names = sorted(self._number_of)
        label_of = np.empty(len(names), np.int32)
        label_of[[self._number_of[name] for name in names]] = np.arange(len(names))
        return Names.of(names), label_of[np.array(self._numbers, np.int64)]


def jpeg_name(path: str) -> str:
    """Name of a JPEG made of the image at ``path``; two images of a folder never have the same."""
    name = os.path.basename(path)
    stem, suffix = os.path.splitext(name)
    # A file a.png.jpg may lie beside a.png.
    kept = suffix == ".jpg" and not stem.lower().endswith(IMAGE_SUFFIXES)
    return name if kept else f"{name}.jpg"


def write_names(file: Path, names: Iterable[str]) -> None:
    """One name a line, in the bytes that the file system has for it; whole or not at all."""
    text = "".join(name.replace("\n", "\\n") + "\n" for name in names)
    with replacing(file) as part:
        part.write_bytes(text.encode("utf-8", "surrogateescape"))


def read_names(file: Path) -> list[str]:
    """What :func:`write_names` wrote."""
    with file.open(encoding="utf-8", errors="surrogateescape", newline="\n") as lines:
        return [line.rstrip("\n") for line in lines]
