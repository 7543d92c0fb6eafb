"""Faces in a RecordIO file, as InsightFace packs them, read without MXNet."""

import logging
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress

from ...files import file_stamp
from ..formats.index import Arrays, cached
from ..formats.names import Names, read_names
from ..formats.recordio import RecordFile, read_table
from .base import FaceDataset

logger = logging.getLogger(__name__)


class RecordDataset(FaceDataset):
    """Images of a ``.rec`` file, ordered by their keys: ``dataset[i]`` is (image, label).

    Labels are numbered anew from 0 in the order of the file's own. ``identities`` are the lines of
    ``<name>.identities.txt`` that the file's labels count, or the labels where there is none.

    The file is read through a memory map, by any number of workers. Where its images lie is found
    out once, by the ``.idx`` beside it or, where there is none, by going through the file, and kept
    as an index beside it (see :func:`cached`).

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
        if not self.path.is_file():
            raise ValueError(f"no record file {path}")
        names_file = self.path.with_suffix(".identities.txt")
        stamp = np.array(file_stamp(self.path, self.path.with_suffix(".idx"), names_file), np.int64)

        def table() -> Arrays:
            with Progress(transient=True) as bar:
                task = bar.add_task(f"indexing {self.path.name}")
                records = read_table(
                    self.path,
                    progress=lambda done, size: bar.update(task, completed=done, total=size),
                )
            people, labels = np.unique(records.labels, return_inverse=True)
            return {
                **_named(people, names_file).arrays("identities"),
                "labels": labels.astype(np.int32),
                "offsets": records.offsets,
                **Names.of(records.damaged).arrays("damaged"),
                "stamp": stamp,
            }

        index = cached(self.path, table, lambda kept: np.array_equal(kept["stamp"], stamp), reindex)
        self.damaged = Names.from_arrays("damaged", index)
        self._count_damaged()
        self._offsets = index["offsets"]
        self._records = RecordFile(self.path)
        self._hold(Names.from_arrays("identities", index), index["labels"])

    def _count_damaged(self) -> None:
        count = len(self.damaged)
        if count > self.max_bad:
            raise ValueError(
                f"at most max_bad = {self.max_bad} images may be unreadable, got {count},"
                f" the last because: {self.damaged[-1]}"
            )
        for sentence in self.damaged[:10]:
            logger.warning("left out: %s", sentence)
        if count > 10:
            logger.warning("left out %d more records of %s", count - 10, self.path)

    def name(self, index: int) -> str:
        return f"at byte {self._offsets[self._row(index)]} of {self.path}"

    def _fetch(self, index: int) -> bytes | memoryview:
        return self._records.image(int(self._offsets[self._row(index)]))

    def __str__(self) -> str:
        return str(self.path)


def _named(people: NDArray[np.int64], file: Path) -> Names:
    """Names of the labels that occur, (C,) ascending."""
    if not file.exists():
        width = len(str(people[-1]))  # so that sorted names keep the order of the numbers
        return Names.of(f"{number:0{width}d}" for number in people.tolist())
    names = read_names(file)
    if people[-1] >= len(names):
        raise ValueError(f"{file} must name label {people[-1]}, got {len(names)} names")
    return Names.of(names[number] for number in people.tolist())
