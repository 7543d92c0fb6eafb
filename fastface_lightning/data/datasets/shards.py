"""Faces in WebDataset's tar shards, read where they lie, without unpacking."""

import mmap
import os
from array import array
from pathlib import Path

import numpy as np
from rich.progress import track

from ...files import printable
from ..formats.index import Arrays, cached_while
from ..formats.names import Labels, Names, Packer
from ..formats.tar import is_shard, read_shard
from .base import FaceDataset
from .folder import leads_to

MAX_OPEN = 128  # shards that a process maps at once; each takes one of its open files


class ShardDataset(FaceDataset):
    """Samples ``<key>.jpg`` and ``<key>.cls`` of tar files, labelled by the sorted classes.

    Images keep the order of the shards, by name, and of their members; see :func:`read_shard` for
    what a sample is. Keys must differ within a shard alone. Shards are read through once; where
    their images lie is kept as an index beside ``root`` (see :func:`cached_while`). From then on
    each worker maps them and reads its images in place.

    Args:
        root: a ``.tar`` file or a folder of them.
        size: height and width of the images served, pixels.
        max_bad: images that may prove unreadable before the data set gives up.
        reindex: read the shards whatever the kept index says.

    Attributes:
        damaged: why images or classes without a counterpart were left out.

    Raises:
        ValueError: there is no shard, one is gzipped, cut short or damaged, none holds a sample, or
            more than ``max_bad`` keys make none.
    """

    def __init__(
        self, root: str | Path, size: int = 112, max_bad: int = 100, reindex: bool = False
    ) -> None:
        super().__init__(size, max_bad)
        self.root = Path(root)
        self.shards = [self.root]
        if self.root.is_dir():
            self.shards = sorted(file for file in self.root.iterdir() if is_shard(file.name))
        if not self.shards or not self.shards[0].is_file():
            raise ValueError(f"no .tar file {root}; expected <key>.jpg and <key>.cls in it")
        index = cached_while(self.shards, self.root, lambda: _read_all(self.shards), reindex)
        self._leave_out(Names.from_arrays("damaged", index))
        self._members = Names.from_arrays("members", index)
        self._shard, self._offset, self._size = index["shards"], index["offsets"], index["sizes"]
        self._hold(Names.from_arrays("identities", index), index["labels"])
        self._maps: dict[int, mmap.mmap] = {}

    def name(self, index: int) -> str:
        row = self._row(index)
        return printable(f"{self.shards[self._shard[row]]}/{self._members[row]}")

    def _fetch(self, index: int) -> memoryview:
        row = self._row(index)
        shard, offset, size = int(self._shard[row]), int(self._offset[row]), int(self._size[row])
        if shard not in self._maps:
            if len(self._maps) == MAX_OPEN:
                del self._maps[next(iter(self._maps))]
            with self.shards[shard].open("rb") as file:
                self._maps[shard] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        image = memoryview(self._maps[shard])[offset : offset + size]
        if len(image) < size:
            raise ValueError("its shard ends before it")
        return image

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_maps": {}}

    def __str__(self) -> str:
        return printable(str(self.root))


def holds_shards(folder: Path) -> bool:
    """Whether there are shards in a folder and, hidden ones aside, no folders."""
    any_shard = False
    with os.scandir(folder) as entries:
        for entry in entries:
            if not entry.name.startswith(".") and leads_to(entry.is_dir):
                return False
            any_shard |= is_shard(entry.name)
    return any_shard


def _read_all(shards: list[Path]) -> Arrays:
    members, labels, damaged, places = Packer(), Labels(), list[str](), array("q")
    for number, shard in enumerate(track(shards, "indexing shards", transient=True)):
        samples, sentences = read_shard(shard)
        for sample in samples:
            members.append(sample.name)
            labels.append(sample.identity)
            places.extend((number, sample.offset, sample.size))
        damaged += sentences
    if not members:
        raise ValueError(f"no <key>.jpg with a <key>.cls in {', '.join(map(str, shards[:3]))}")
    identities, numbers = labels.sorted()
    shard_numbers, offsets, sizes = np.array(places, np.int64).reshape(-1, 3).T.copy()
    return {
        **identities.arrays("identities"),
        **members.names().arrays("members"),
        **Names.of(damaged).arrays("damaged"),
        "labels": numbers,
        "shards": shard_numbers.astype(np.int32),
        "offsets": offsets,
        "sizes": sizes,
    }
