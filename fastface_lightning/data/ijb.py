"""IJB-B and IJB-C: faces in templates, each a person's photographs and video frames, to compare."""

import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .align import read_landmarks

_INTEGER = r"(-?\d{1,18})"  # so many digits fit into 64 bits
_FACE = re.compile(rf"(\S+)\s+{_INTEGER}\s+{_INTEGER}", re.ASCII)
_PAIR = re.compile(rf"{_INTEGER}\s+{_INTEGER}\s+{_INTEGER}", re.ASCII)
_ROW = re.compile(rf"{_INTEGER}\s*,\s*{_INTEGER}\s*(?:,.*)?", re.ASCII)

Integers = NDArray[np.int64]


class TemplateSubjects(NamedTuple):
    """T templates to search, or to search for.

    Attributes:
        templates: (T,) int64, ascending and distinct.
        subjects: (T,) int64, whom each shows.
    """

    templates: Integers
    subjects: Integers


class IJBData(NamedTuple):
    """What a folder of IJB-B or IJB-C says about its n faces, P pairs and its searches.

    Attributes:
        name: "ijbb" or "ijbc".
        images: n paths, in the order of the list of faces. Whether they are there is not checked.
        points: (n, 5, 2) float64, landmarks, x and y in pixels, for :func:`align_face`.
        scores: (n,) float64, how sure the detector was of each face.
        templates: (n,) int64, the template that each face belongs to.
        media: (n,) int64, the photograph or video that each face comes from.
        pairs: (P, 2) int64, templates to compare.
        same: (P,) bool, whether the two show one person.
        galleries: templates to search, none if the folder has no list of them.
        probes: templates to search for in each gallery, None if the folder has no list of them.
    """

    name: str
    images: list[str]
    points: NDArray[np.float64]
    scores: NDArray[np.float64]
    templates: Integers
    media: Integers
    pairs: Integers
    same: NDArray[np.bool_]
    galleries: list[TemplateSubjects]
    probes: TemplateSubjects | None


def is_ijb(root: str | Path) -> bool:
    """Whether a folder looks like IJB's, which is that ``meta/`` in it lists faces."""
    return any(Path(root).glob("meta/*_face_tid_mid.txt"))


def read_ijb(root: str | Path) -> IJBData:
    """Read the lists in a folder of IJB-B or IJB-C, as InsightFace hands them out.

    Of ``ijbc`` (or ``ijbb``), the folder holds::

        loose_crop/<image>                  the images
        meta/ijbc_face_tid_mid.txt          image, template, media
        meta/ijbc_name_5pts_score.txt       image, x1 y1 … x5 y5, score: the same images in order
        meta/ijbc_template_pair_label.txt   template, template, 1 for one person or 0 for two
        meta/ijbc_1N_gallery_*.csv          template, subject, …: a line an image, below a header
        meta/ijbc_1N_probe_mixed.csv        the same

    of which the last two, for identification, may be absent. IJB-C's 469,375 faces and 15.7
    million pairs take some ten seconds and a gigabyte.

    Raises:
        ValueError: a folder or list is absent, a line malformed, the two lists of images differ,
            a template has no image or two subjects, or the folder holds both benchmarks.

    References:
        Whitelam et al., IARPA Janus Benchmark-B Face Dataset, CVPR Workshops 2017.
        Maze et al., IARPA Janus Benchmark-C: Face Dataset and Protocol, ICB 2018.
    """
    meta = Path(root) / "meta"
    for folder in (Path(root), meta):
        if not folder.is_dir():
            raise ValueError(f"no folder {folder}; expected {meta}/ijbc_face_tid_mid.txt")
    names = [name for name in ("ijbb", "ijbc") if any(meta.glob(f"{name}_*"))]
    if len(names) != 1:
        got = "both" if names else "neither"
        raise ValueError(f"{meta} must hold the lists of either ijbb or ijbc, got {got}")
    (name,) = names
    lists = "face_tid_mid", "name_5pts_score", "template_pair_label"
    faces_file, points_file, pairs_file = files = [meta / f"{name}_{kind}.txt" for kind in lists]
    for file in files:
        if not file.is_file():
            raise ValueError(f"no file {file}")
    faces = [(m[1], int(m[2]), int(m[3])) for m in _lines(faces_file, _FACE, "image tid mid")]
    if not faces:
        raise ValueError(f"{faces_file} lists no image")
    images, templates, media = zip(*faces, strict=True)
    points, scores = _read_points(points_file, images)
    known = np.unique(templates)
    pairs, same = _read_pairs(pairs_file, known)
    galleries = sorted(meta.glob(f"{name}_1N_gallery_*.csv"))
    probes = meta / f"{name}_1N_probe_mixed.csv"
    return IJBData(
        name,
        [f"{root}/loose_crop/{image}" for image in images],
        points,
        scores,
        np.array(templates, np.int64),
        np.array(media, np.int64),
        pairs,
        same,
        [_read_subjects(gallery, known) for gallery in galleries],
        _read_subjects(probes, known) if probes.is_file() else None,
    )


def _lines(
    file: Path, pattern: re.Pattern[str], expected: str, header: bool = False
) -> Iterator[re.Match[str]]:
    """What the pattern finds in each line that is not blank; the first may be a header."""
    with file.open(encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            match = pattern.fullmatch(line.strip())
            if match:
                yield match
            elif line.strip() and not (header and number == 1):
                got = line[:80].strip()
                raise ValueError(f"{file}:{number}: expected {expected!r}, got {got!r}")


def _read_points(
    file: Path, images: tuple[str, ...]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Landmarks and scores of the images, which the file must list in the same order."""
    listed = list(read_landmarks(file))
    rule = f"{file.name} must list the same images as the list of faces"
    if len(listed) != len(images):
        raise ValueError(f"{rule}, got {len(listed)} of {len(images)}")
    for number, (image, face) in enumerate(zip(images, listed, strict=True), 1):
        if face.name != image:
            raise ValueError(f"{rule}, got {face.name!r} for {image!r} in line {number}")
        if face.score is None:
            raise ValueError(f"{file.name} must end each line in a score, not so line {number}")
    points = np.array([face.points for face in listed])
    return points, np.array([face.score for face in listed], np.float64)


def _read_pairs(file: Path, known: Integers) -> tuple[Integers, NDArray[np.bool_]]:
    """Pairs and whether they show one person: read by numpy, or again to name a bad line."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it would warn of an empty file, and cut fractions off
        try:
            table = np.loadtxt(file, np.int64, comments=None, ndmin=2, encoding="utf-8-sig")
        except (ValueError, Warning):
            table = np.empty((0, 0), np.int64)
    if table.shape[1] != 3:
        rows = [tuple(map(int, m.groups())) for m in _lines(file, _PAIR, "tid1 tid2 label")]
        table = np.array(rows, np.int64).reshape(-1, 3)
    if not len(table):
        raise ValueError(f"{file} lists no pair")
    pairs, labels = table[:, :2], table[:, 2]
    wrong = (labels != 0) & (labels != 1)
    if wrong.any():
        raise ValueError(f"{file.name} must label a pair 0 or 1, got {table[wrong.argmax()]}")
    for column in pairs.T:  # one after the other, which takes half the memory
        _require_images(file, column, known)
    return pairs, labels == 1


def _read_subjects(file: Path, known: Integers) -> TemplateSubjects:
    lines = _lines(file, _ROW, "template,subject,…", header=True)
    rows = np.array([(int(m[1]), int(m[2])) for m in lines], np.int64).reshape(-1, 2)
    if not len(rows):
        raise ValueError(f"{file} lists no template")
    templates, subjects = np.unique(rows, axis=0).T
    twice = templates[1:][templates[1:] == templates[:-1]]
    if len(twice):
        raise ValueError(f"{file.name} must give template {twice[0]} one subject, got several")
    _require_images(file, templates, known)
    return TemplateSubjects(templates, subjects)


def _require_images(file: Path, templates: Integers, known: Integers) -> None:
    absent = ~np.isin(templates, known)
    if absent.any():
        got = templates[absent.argmax()]
        raise ValueError(f"{file.name} must name templates that have images, got {got}")
