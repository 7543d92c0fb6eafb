"""A verification set is a list of image pairs, each of one person or of two."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from .folder import IdentityFolder, abridged
from .image import IMAGE_SUFFIXES, decode_image

logger = logging.getLogger(__name__)


class VerificationPairs(NamedTuple):
    """P pairs of images; images 2i and 2i + 1 are pair i.

    Attributes:
        images: (2P, 3, H, W) uint8, RGB.
        same: (P,) bool, whether pair i shows one person.
        missing: a sentence for each pair left out because an image is absent or unreadable.
    """

    images: Tensor
    same: Tensor
    missing: list[str]


class _Pair(NamedTuple):
    first: Path
    second: Path
    same: bool


def interleaved(same: ArrayLike) -> NDArray[np.int64]:
    r"""Order in which pairs of one person and of two are spread evenly over the list.

    The k-th of the n pairs of its kind moves to the relative place

    .. math:: (k + \tfrac12) / n, \qquad k = 0, \dots, n - 1,

    so that any contiguous part of the list, a fold above all, holds both kinds in nearly the
    whole's proportion. The order within a kind stays.

    Args:
        same: (P,) bool.

    Returns:
        (P,) int64, a permutation: ``same[order]`` is interleaved.
    """
    same = np.asarray(same, dtype=bool)
    place = np.empty(len(same))
    for kind in (same, ~same):
        place[kind] = (np.arange(kind.sum()) + 0.5) / max(kind.sum(), 1)
    return place.argsort(kind="stable")


def read_pairs(file: str | Path, image_root: str | Path, size: int = 112) -> VerificationPairs:
    """Read an LFW-style pairs file and the images it names.

    The file's lines are ``name i j`` (images i and j of one person) and ``name1 i name2 j``,
    separated by tabs or blanks; the images are ``<image_root>/<name>/<name>_<4 digits>.jpg``, or
    another suffix of ``IMAGE_SUFFIXES``. The first line tells the kind of file:

    - ``N`` (LFW View 1): N pairs of one person, then N of two. Ten-fold evaluation cuts the list
      into contiguous folds, so these are :func:`interleaved`.
    - ``folds N`` (LFW View 2): folds times as many. These lie in balanced folds and keep their
      order.

    A pair with an absent or unreadable image is left out and reported in ``missing``.

    Raises:
        ValueError: the file or ``image_root`` is absent, a line is malformed, the number of pairs
            is not the promised one, or not one pair has both images.

    References:
        Huang et al., Labeled Faces in the Wild, UMass Amherst technical report 07-49, 2007.
    """
    file, image_root = Path(file), Path(image_root)
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    if not file.is_file():
        raise ValueError(f"no pairs file {file}")
    if not image_root.is_dir():
        raise ValueError(f"no folder {image_root}; expected {image_root}/<name>/<name>_0001.jpg")
    return _load(_parse(file, image_root), size, str(file))


def _parse(file: Path, image_root: Path) -> list[_Pair]:
    text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{file} is empty")
    (number, header), *rows = lines
    counts = header.split()
    if not (1 <= len(counts) <= 2 and all(c.isdecimal() and int(c) > 0 for c in counts)):
        raise ValueError(f"{file}:{number}: expected 'N' or 'folds N', got {header[:80]!r}")
    *folds, of_a_kind = map(int, counts)
    promised = 2 * of_a_kind * (folds[0] if folds else 1)
    if len(rows) != promised:
        raise ValueError(f"{file} promises {promised} pairs in its first line, got {len(rows)}")
    pairs = [_parse_row(file, number, row, image_root) for number, row in rows]
    return pairs if folds else [pairs[i] for i in interleaved([pair.same for pair in pairs])]


def _parse_row(file: Path, number: int, row: str, image_root: Path) -> _Pair:
    fields = row.strip().split("\t") if "\t" in row else row.split()
    same = len(fields) == 3
    if same:
        fields.insert(2, fields[0])
    if len(fields) != 4 or not (fields[1].isdecimal() and fields[3].isdecimal()):
        raise ValueError(
            f"{file}:{number}: expected 'name i j' or 'name1 i name2 j', got {row[:80]!r}"
        )
    name_a, i, name_b, j = fields
    return _Pair(_find(image_root, name_a, int(i)), _find(image_root, name_b, int(j)), same)


def _find(image_root: Path, name: str, number: int) -> Path:
    """The image's path; with the usual suffix if there is no such image."""
    stem = f"{name}_{number:04d}"
    paths = [image_root / name / (stem + suffix) for suffix in IMAGE_SUFFIXES]
    return next((path for path in paths if path.is_file()), paths[0])


def held_out_pairs(dataset: IdentityFolder, num_pairs: int, seed: int = 0) -> VerificationPairs:
    """Draw distinct pairs of a data set's images, half of one person and half of two, interleaved.

    Pairs of one person are spread over the people: nobody gives a further pair before everyone
    who can has given as many. Pairs of two people are uniform over all such pairs of images. If
    there are not enough pairs of a kind, there are as many of each as there are of the rarer one.

    Args:
        dataset: people that are not trained on.
        num_pairs: even, at least 2.
        seed: at least 0; decides the draw.

    Raises:
        ValueError: ``num_pairs`` is odd or below 2, nobody has two images, there is but one
            person, or no pair can be read.
    """
    if num_pairs < 2 or num_pairs % 2:
        raise ValueError(f"num_pairs must be even and at least 2, got {num_pairs}")
    counts = np.bincount(dataset.labels)
    num_same = int((counts * (counts - 1) // 2).sum())
    num_different = int((counts.sum() ** 2 - (counts**2).sum()) // 2)
    if not num_same:
        raise ValueError(f"pairs of one person need two images of someone in {dataset.root}")
    if not num_different:
        raise ValueError(f"pairs of two people need two people in {dataset.root}, got 1")
    wanted = min(num_pairs // 2, num_same, num_different)
    rng = np.random.default_rng(seed)
    same = _draw_same(counts, wanted, rng)
    different = _draw_different(counts, wanted, rng)
    indices = np.stack([same, different], axis=1).reshape(-1, 2)
    pairs = [
        _Pair(dataset.path(i), dataset.path(j), k % 2 == 0) for k, (i, j) in enumerate(indices)
    ]
    return _load(pairs, dataset.size, str(dataset.root))


def _draw_same(
    counts: NDArray[np.int64], wanted: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """(wanted, 2) distinct image indices i < j of one person each, spread over the people."""
    available = counts * (counts - 1) // 2
    each = 1
    while np.minimum(available, each).sum() < wanted:
        each += 1
    starts = counts.cumsum() - counts
    drawn = []
    for person in np.flatnonzero(available):
        # Pair number p = j (j - 1) / 2 + i enumerates all i < j.
        p = rng.choice(available[person], min(each, available[person]), replace=False)
        j = ((1 + np.sqrt(1 + 8 * p)) / 2).astype(np.int64)
        drawn.append(starts[person] + np.stack([p - j * (j - 1) // 2, j], axis=1))
    whole = np.concatenate([pairs[: each - 1] for pairs in drawn])
    last = rng.permutation(np.concatenate([pairs[each - 1 :] for pairs in drawn]))
    return rng.permutation(np.concatenate([whole, last[: wanted - len(whole)]]))


def _draw_different(
    counts: NDArray[np.int64], wanted: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """(wanted, 2) distinct image indices i < j of two people each, uniform."""
    starts, total = counts.cumsum() - counts, counts.sum()
    weights = counts * (total - counts)  # ordered pairs whose first image is this person's
    found = np.empty((0, 2), np.int64)
    while len(found) < wanted:
        person = rng.choice(len(counts), 2 * wanted, p=weights / weights.sum())
        i = starts[person] + rng.integers(counts[person])
        j = rng.integers(total - counts[person])
        j += counts[person] * (j >= starts[person])  # skip the person's own images
        drawn = np.sort(np.stack([i, j], axis=1), axis=1)
        found = np.unique(np.concatenate([found, drawn]), axis=0)
    return rng.permutation(found)[:wanted]


def _load(pairs: Sequence[_Pair], size: int, source: str) -> VerificationPairs:
    images: list[Tensor] = []
    same, missing = [], []
    for pair in pairs:
        try:
            both = decode_image(pair.first, size), decode_image(pair.second, size)
        except ValueError as error:
            missing.append(f"{pair.first.stem} and {pair.second.stem}: {error}")
            continue
        images += both
        same.append(pair.same)
    if not images:
        raise ValueError(f"none of the {len(pairs)} pairs of {source} can be read: {missing[0]}")
    if missing:
        logger.warning(
            "left out %d of the %d pairs of %s: %s",
            len(missing),
            len(pairs),
            source,
            abridged(missing, 3),
        )
    return VerificationPairs(torch.stack(images), torch.tensor(same), missing)
