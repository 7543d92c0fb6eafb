"""Faces in a RecordIO file, as InsightFace packs them, read without MXNet."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..formats.index import Arrays, cached_while
from ..formats.names import Names, read_names
from ..formats.recordio import RecordFile, read_table
from .base import FaceDataset


class RecordDataset(FaceDataset):
    """Images of a ``.rec`` file, ordered by their keys: ``dataset[i]`` is (image, label).

    Labels are numbered anew from 0 in the order of the file's own. ``identities`` are the lines of
    ``<name>.identities.txt`` that the file's labels count, or the labels where there is none.

    The file is read through a memory map, by any number of workers. Where its images lie is found
    out once, by the ``.idx`` beside it or, where there is none, by going through the file, and kept
    as an index beside it (see :func:`cached_while`).

    Args:
        path: the ``.rec`` file, with InsightFace's header record or without.
        size: height and width of the images served, pixels.
        max_bad: images that may prove unreadable before the data set gives up.
        reindex: look for the images whatever the kept index says.

    Attributes:
        damaged: why records were left out whose labels are not known.

    Raises:
        ValueError: there is no such file, it holds no image, or more than ``max_bad`` records are
            damaged.
    """

    def __init__(
        self, path: str | Path, size: int = 112, max_bad: int = 100, reindex: bool = False
    ) -> None:
        super().__init__(size, max_bad)
        self.path = Path(path)
        self._records = RecordFile(self.path)
        names_file = self.path.with_suffix(".identities.txt")

        def table() -> Arrays:
            records = read_table(self.path)
            people, labels = np.unique(records.labels, return_inverse=True)
            return {
                **_named(people, names_file).arrays("identities"),
                **Names.of(records.damaged).arrays("damaged"),
                "labels": labels.astype(np.int32),
                "offsets": records.offsets,
            }

        files = [self.path, self.path.with_suffix(".idx"), names_file]
        index = cached_while(files, self.path, table, reindex)
        self._leave_out(Names.from_arrays("damaged", index))
        self._offsets = index["offsets"]
        self._hold(Names.from_arrays("identities", index), index["labels"])

    def name(self, index: int) -> str:
        return f"at byte {self._offsets[self._row(index)]} of {self.path}"

    def _fetch(self, index: int) -> bytes | memoryview:
        return self._records.image_record(int(self._offsets[self._row(index)])).image

    def __str__(self) -> str:
        return str(self.path)


def _named(people: NDArray[np.int64], file: Path) -> Names:
    """Names of the labels that occur, (C,) ascending."""
    if not file.exists():
        return Names.of(map(str, people.tolist()))
    names = read_names(file)
    if people[-1] >= len(names):
        raise ValueError(f"{file} must name label {people[-1]}, got {len(names)} names")
    return Names.of(names[number] for number in people.tolist())
