"""Faces in files of their own: one sub-folder a person, or a list that says who is in which."""

import csv
import errno
import logging
import os
import time
from abc import abstractmethod
from array import array
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from rich.progress import track

from ...files import printable
from ..formats.image import IMAGE_SUFFIXES
from ..formats.index import Arrays, cached, cached_while
from ..formats.names import Labels, Names, Packer, jpeg_name
from .base import FaceDataset

logger = logging.getLogger(__name__)
# Folders whose names of images are held at once, and that are read at once: the disk may be far.
_BLOCK, _THREADS = 4096, 16
# Folders whose times are compared at a start; all of them would take long, too.
_SAMPLE = 1000
_OPEN = os.O_RDONLY | getattr(os, "O_BINARY", 0)  # Windows would end lines
_PART = 2**14  # bytes read at first: most images; more would take longer to make room for
_TICK = 20_000_000  # nanoseconds: file systems' clocks move on every 10 ms or sooner


class _Files(FaceDataset):
    """Images that are files under ``root``."""

    root: Path
    identities: Names
    _prefix: bytes
    _files: Names

    def path(self, index: int) -> Path:
        """File of image ``index``."""
        return Path(os.fsdecode(self._path(index)))

    def name(self, index: int) -> str:
        return printable(os.fsdecode(self._path(index)))

    def _fetch(self, index: int) -> bytes:
        file = os.open(self._path(index), _OPEN)  # open() takes twice the time that reading does
        try:
            data = os.read(file, _PART)
            while part := os.read(file, len(data)):
                data += part
        finally:
            os.close(file)
        return data

    @abstractmethod
    def _path(self, index: int) -> bytes:
        """File of an image, in the file system's encoding: strings would be encoded anew."""

    def __str__(self) -> str:
        return printable(str(self.root))


class IdentityFolder(_Files):
    """Images in ``<root>/<identity>/<image>``, labelled by the sorted names of the identities.

    ``dataset[i]`` is ((3, size, size) uint8 RGB, label): see :func:`decode_image` for the pixels,
    :class:`FaceDataset` for bad images. Images are ordered by identity, then by file name.

    The folder is walked once. Its index, some 20 bytes an image, is kept beside it (see
    :func:`cached`) and mapped at the next start, until the folder of identities has changed or one
    of a thousand of the folders in it; a change in another one alone goes unseen until ``reindex``.

    Args:
        root: folder that holds the identity folders; hidden ones do not count.
        size: height and width of the images served, pixels.
        identities: names of the only identities to take; None takes all.
        min_images: identities with fewer images are left out.
        max_bad: images that may prove unreadable before the data set gives up.
        reindex: walk the folder whatever its index says.

    Raises:
        ValueError: there is no image to serve, or more than ``max_bad`` were found unreadable.
    """

    def __init__(
        self,
        root: str | Path,
        size: int = 112,
        identities: Iterable[str] | None = None,
        min_images: int = 1,
        max_bad: int = 100,
        reindex: bool = False,
    ) -> None:
        super().__init__(size, max_bad)
        self.root, self._prefix = Path(root), os.fsencode(root)
        if not self.root.is_dir():
            raise ValueError(f"no folder {root}; expected {root}/<identity>/<image>.jpg")
        index = cached(self.root, lambda: _walk(self.root), lambda i: _fresh(self.root, i), reindex)
        people = Names.from_arrays("identities", index)
        labels = np.repeat(np.arange(len(people), dtype=np.int32), index["counts"])
        self._files = Names.from_arrays("files", index)
        self._hold(people, labels)
        self._restrict(identities, min_images)

    def file_name(self, index: int) -> str:
        return jpeg_name(os.fsdecode(self._path(index)))

    def _path(self, index: int) -> bytes:
        person = self.identities.encoded(self.labels[index])
        return b"%b/%b/%b" % (self._prefix, person, self._files.encoded(self._row(index)))


class FaceList(_Files):
    """Images that a file lists with their identities; labels follow the identities' sorted names.

    Lines of a ``.csv`` file have commas between their fields, others tabs or, where there is none,
    a blank before the last field. They are all of the form of the first:

    - ``path,identity`` or ``identity,path``, below a header that says so or none;
    - ``number<TAB>identity<TAB>path``, MXNet's ``.lst``;
    - ``flag<TAB>path<TAB>identity``, InsightFace's, also with box and landmarks after them, 17
      fields, by which nothing is aligned here.

    The path is the field that ends as an image's name does; a message says what was taken for
    what. Images keep the order of the lines.

    Args:
        file: the list.
        root: folder that its paths start from; None is the folder of the list.
        size, max_bad, reindex: see :class:`IdentityFolder`.

    Raises:
        ValueError: there is no such file or folder, or a line is not of the first one's form.
    """

    def __init__(
        self,
        file: str | Path,
        root: str | Path | None = None,
        size: int = 112,
        max_bad: int = 100,
        reindex: bool = False,
    ) -> None:
        super().__init__(size, max_bad)
        self.file = Path(file)
        self.root = self.file.parent if root is None else Path(root)
        self._prefix = os.fsencode(self.root)
        if not self.file.is_file():
            raise ValueError(f"no list {file}; expected lines of path,identity")
        if not self.root.is_dir():
            raise ValueError(f"no folder {self.root}, from which the paths of {file} start")
        index = cached_while([self.file], self.file, lambda: _parse(self.file), reindex)
        self._files = Names.from_arrays("files", index)
        self._hold(Names.from_arrays("identities", index), index["labels"])
        whose = self._files[0], self.identities[self.labels[0]]
        logger.info("%s: its first image, %r, is taken to show %r", self, *map(printable, whose))

    def _path(self, index: int) -> bytes:
        return os.path.join(self._prefix, self._files.encoded(self._row(index)))

    def __str__(self) -> str:
        return printable(str(self.file))


def identity_names(root: str | Path) -> list[str]:
    """Sorted names of the identity folders in ``root``; hidden ones do not count.

    Raises:
        ValueError: ``root`` is absent or holds no folder.
    """
    if not Path(root).is_dir():
        raise ValueError(f"no folder {root}; expected {root}/<identity>/<image>.jpg")
    with os.scandir(root) as entries:
        names = sorted(e.name for e in entries if not e.name.startswith(".") and leads_to(e.is_dir))
    if not names:
        raise ValueError(f"{root} holds no folders; expected {root}/<identity>/<image>.jpg")
    return names


def _walk(root: Path) -> Arrays:
    """Index a folder of identities, many folders at once."""
    # The times come first: what changes during the walk then shows at the next start.
    changed = root.stat().st_mtime_ns
    names = identity_names(root)
    people = Names.of(names)
    times = np.array([changed, *_times(root, people)], np.int64)
    if time.time_ns() - times.max() < _TICK:  # a change right now would leave such a time as it is
        time.sleep(_TICK / 1e9)
    folders = [f"{root}/{name}" for name in names]
    files, counts = Packer(), array("q")
    blocks = range(0, len(folders), _BLOCK)
    what = printable(f"indexing {root.name}")
    with ThreadPoolExecutor(_THREADS) as pool:
        for start in track(blocks, what, transient=True, disable=len(blocks) < 3):
            for image_names in pool.map(_image_names, folders[start : start + _BLOCK]):
                counts.append(len(image_names))
                for name in image_names:
                    files.append(name)
    return {
        **people.arrays("identities"),
        **files.names().arrays("files"),
        "counts": np.array(counts, np.int64),
        "times": times,
    }


def _fresh(root: Path, index: Arrays) -> bool:
    people = Names.from_arrays("identities", index)
    return index["times"].tolist() == [root.stat().st_mtime_ns, *_times(root, people)]


def _times(root: Path, names: Names) -> list[int]:
    """When folders last changed, of a sample of the identities; 0 for one that is gone."""
    times = []
    for i in np.linspace(0, len(names) - 1, min(len(names), _SAMPLE)).astype(int).tolist():
        try:
            times.append(os.stat(f"{root}/{names[i]}").st_mtime_ns)
        except OSError:
            times.append(0)
    return times


def _image_names(folder: str) -> list[str]:
    """Names of the images in ``folder``, sorted as text; none if there is no such folder."""
    try:
        with os.scandir(folder) as entries:
            return sorted(
                entry.name
                for entry in entries
                if entry.name.lower().endswith(IMAGE_SUFFIXES)
                and not entry.name.startswith(".")
                and leads_to(entry.is_file)
            )
    except (FileNotFoundError, NotADirectoryError):  # any other fault must not be kept as a truth
        return []


def leads_to(check: Callable[[], bool]) -> bool:
    """Whether an entry is of a kind; not so a symbolic link that leads round in a circle."""
    try:
        return check()
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        return False


def _parse(file: Path) -> Arrays:
    """Index a list of images, a line at a time."""
    files, labels, table = Packer(), Labels(), file.suffix.lower() == ".csv"
    form: tuple[int, int, int] | None = None  # fields of a line; places of path and identity
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as lines:
        rows = csv.reader(lines) if table else map(_fields, lines)
        try:
            for number, row in enumerate(rows, 1):
                fields = [field.strip() for field in row]
                header = number == 1 and sorted(map(str.lower, fields)) == ["identity", "path"]
                if header or not any(fields):
                    continue
                form = form or _form(fields, table)
                if form is None or len(fields) != form[0]:
                    path = identity = ""
                else:
                    path, identity = fields[form[1]], fields[form[2]]
                guessed = not table and form is not None and form[0] == 2
                wrong = not identity or (guessed and "/" in identity)  # a path with a blank in it
                if wrong or not path.lower().endswith(IMAGE_SUFFIXES):
                    raise ValueError(
                        f"{file}:{number}: expected the path of an image and an identity, in lines "
                        f"of one form, got {','.join(row)[:80]!r}"
                    )
                files.append(path)
                labels.append(identity)
        except csv.Error as error:  # a quote that is never closed, for one
            raise ValueError(f"{file} is no CSV file: {error}") from error
    if not files:
        raise ValueError(f"{file} lists no image; expected lines of path,identity")
    identities, numbers = labels.sorted()
    return {
        **identities.arrays("identities"),
        **files.names().arrays("files"),
        "labels": numbers,
    }


def _form(fields: list[str], table: bool) -> tuple[int, int, int] | None:
    """Number of a line's fields, and which are the path and the identity; None if none is."""
    images = [i for i, field in enumerate(fields) if field.lower().endswith(IMAGE_SUFFIXES)]
    if len(fields) == 2 and images:
        return 2, images[0], 1 - images[0]
    if len(fields) == 3 and images and not table:
        return (3, 2, 1) if images[-1] == 2 else (3, 1, 2)
    if len(fields) == 17 and images and not table:
        return 17, 1, 2
    return None


def _fields(line: str) -> list[str]:
    return line.split("\t") if "\t" in line else line.rsplit(maxsplit=1)
