"""A verification set is a list of image pairs, each of one person or of two."""

import csv
import io
import logging
import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import Self

from .datasets.base import FaceDataset, abridged
from .datasets.synthetic import SyntheticFaces, check_range
from .formats.image import IMAGE_SUFFIXES, decode_image, decode_into
from .formats.verification_bin import unpack_verification_bin

logger = logging.getLogger(__name__)

_TRUTH = {"1": True, "true": True, "0": False, "false": False}
# A `.bin` may refer to an image as often as it likes in two bytes each, and each use becomes a
# decoded image. Real sets have up to 14,000 images and use each a few times.
_MOST_IMAGES, _MOST_USES = 20_000, 100


class _Pairs(NamedTuple):
    images: Tensor
    same: Tensor
    missing: list[str]


class VerificationPairs(_Pairs):
    """P pairs of images; images 2i and 2i + 1 are pair i, unless there is an ``index``.

    A tuple of the first three.

    Attributes:
        images: (2P, 3, H, W) uint8, RGB; with an index (M, 3, H, W), each image once.
        same: (P,) bool, whether pair i shows one person.
        missing: a sentence for each pair left out because an image is absent or unreadable.
        index: (P, 2) int64, the images of each pair; None: 2i and 2i + 1.
        names: what to call each image; empty where that is not known.
        people: names of the people of a pairs file, the folders of its images; empty for others.
        num_people: how many people it shows; None where that is not known.
        trained_people: how many of them the model was trained on, as far as names tell.
    """

    index: Tensor | None  # type: ignore[assignment]  # which hides a tuple's method
    names: Sequence[str]
    people: Sequence[str] = ()
    num_people: int | None = None
    trained_people: int = 0

    def __new__(
        cls,
        images: Tensor,
        same: Tensor,
        missing: list[str],
        index: Tensor | None = None,
        names: Sequence[str] = (),
    ) -> Self:
        pairs = super().__new__(cls, images, same, missing)
        pairs.index, pairs.names = index, names
        return pairs

    def pairs(self) -> Tensor:
        """(P, 2) int64, the images of each pair, whether there is an ``index`` or not."""
        return torch.arange(2 * len(self.same)).view(-1, 2) if self.index is None else self.index


class PairImages(Dataset[tuple[Tensor, int]]):
    """The images of pairs in which they recur: ``images[i]`` is (image i, i).

    Their ``same`` and ``index`` are those of the pairs, which a verification compares once all
    images are embedded.
    """

    def __init__(self, pairs: VerificationPairs) -> None:
        self._images, self.same, self.index = pairs.images, pairs.same, pairs.pairs()

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._images[index], index


class PairFiles(NamedTuple):
    """The two image files of a pair, and whether they show one person."""

    first: Path
    second: Path
    same: bool


def interleaved(same: ArrayLike) -> NDArray[np.int64]:
    r"""Order in which pairs of one person and of two are spread evenly over the list.

    The k-th of the n pairs of its kind moves to the relative place

    .. math:: (k + \tfrac12) / n, \qquad k = 0, \dots, n - 1,

    so that any contiguous part of the list, a fold above all, holds both kinds in nearly the
    whole's proportion. The order within a kind stays.

    Returns:
        (P,) int64: of ``same``, (P,) bool, ``same[order]`` is interleaved.
    """
    same = np.asarray(same, dtype=bool)
    place = np.empty(len(same))
    for of_kind in (same, ~same):
        place[of_kind] = (np.arange(of_kind.sum()) + 0.5) / max(of_kind.sum(), 1)
    return place.argsort(kind="stable")


def read_verification(
    path: str | Path, image_root: str | Path | None = None, size: int = 112
) -> VerificationPairs:
    """Read a verification set of either kind: a ``.bin``, or a pairs file and its images.

    Raises:
        ValueError: see :func:`read_verification_bin` and :func:`read_pairs`.
    """
    if Path(path).suffix.lower() == ".bin":
        return read_verification_bin(path, size)
    return read_pairs(path, image_root, size)


def read_verification_bin(path: str | Path, size: int = 112) -> VerificationPairs:
    """Read a verification set that InsightFace or :func:`write_verification_bin` packed.

    The file is a pickle, but no code in it is run: see :func:`unpack_verification_bin`. The pairs
    keep the file's order, of which ten-fold evaluation takes contiguous tenths as folds. A pair
    with an image that cannot be decoded is left out and reported in ``missing``.

    Args:
        path: the ``.bin``.
        size: height and width of the images, pixels; others are resized.

    Raises:
        ValueError: the file is absent, truncated or holds anything but images and truth values;
            not one pair has both images; there are more than 20,000 images of which each occurs
            more than 100 times, on average.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    images, same = unpack_verification_bin(path)
    if len(images) > max(_MOST_IMAGES, _MOST_USES * len(set(images))):
        raise ValueError(f"{path} must use each image at most {_MOST_USES} times on average")

    @cache  # images often stand in several pairs
    def decoded(image: bytes) -> Tensor | str:
        pixels = np.empty((size, size, 3), np.uint8)
        try:
            decode_into(image, pixels)
        except ValueError as error:
            return str(error)
        return _planes(pixels)

    def read(index: int) -> Tensor:
        pixels = decoded(images[index])
        if isinstance(pixels, str):
            raise ValueError(f"cannot read image {index} of {path}: {pixels}")
        return pixels

    pairs = [(2 * i, 2 * i + 1, truth) for i, truth in enumerate(same)]
    return _load(pairs, read, lambda index: f"image {index}", str(path))


def read_pairs(
    file: str | Path, image_root: str | Path | None = None, size: int = 112
) -> VerificationPairs:
    """Read a pairs file and the images it names.

    For the kinds of file and the order of their pairs see :func:`pair_files`. A pair with an absent
    or unreadable image is left out and reported in ``missing``.

    Args:
        file: the pairs file.
        image_root: folder of the images; a CSV file of absolute paths needs none.
        size: height and width of the images, pixels; others are resized.

    Raises:
        ValueError: see :func:`pair_files`; or not one pair has both images.
    """
    pairs = pair_files(file, image_root)
    read = _load(pairs, lambda path: decode_image(path, size), lambda path: path.stem, str(file))
    read.people = sorted({path.parent.name for pair in pairs for path in pair[:2]})
    read.num_people = len(read.people)
    return read


def pair_files(file: str | Path, image_root: str | Path | None = None) -> list[PairFiles]:
    """The image files that a pairs file names, there or not, and which pairs show one person.

    The first line tells the kind of file:

    - ``N`` (LFW View 1): N pairs of one person, then N of two. Ten-fold evaluation cuts the list
      into contiguous folds, so these are :func:`interleaved`.
    - ``folds N`` (LFW View 2): folds times as many. These lie in balanced folds and keep their
      order.
    - ``a,b,same``, or a line of that form: a CSV file, each line naming two images, which start
      from ``image_root`` if they are not absolute, and 1 or true for one person, 0 or false for
      two. These keep their order, for they may lie in folds; a warning says if the kinds are not
      mixed at all.

    The lines of LFW's files are ``name i j`` (images i and j of one person) and ``name1 i name2
    j``, separated by tabs or blanks; the images are ``<image_root>/<name>/<name>_<4 digits>.jpg``,
    or another suffix of ``IMAGE_SUFFIXES``.

    Args:
        file: the pairs file.
        image_root: folder of the images; a CSV file of absolute paths needs none.

    Raises:
        ValueError: the file or ``image_root`` is absent, a line is malformed, or the number of
            pairs is not the promised one.

    References:
        Huang et al., Labeled Faces in the Wild, UMass Amherst technical report 07-49, 2007.
    """
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"no pairs file {file}")
    text = file.read_text(encoding="utf-8-sig", errors="surrogateescape")
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if not lines:
        raise ValueError(f"{file} is empty")
    if image_root is not None and not Path(image_root).is_dir():
        raise ValueError(f"no folder {image_root}; expected the images in {file}")
    root = Path(image_root or "")
    table = "," in lines[0][1]
    pairs = _parse_csv(file, text, root) if table else _parse_lfw(file, lines, root)
    if image_root is None and not all(path.is_absolute() for pair in pairs for path in pair[:2]):
        raise ValueError(f"image_root must be the folder of the images in {file}, got None")
    return pairs


def _parse_csv(file: Path, text: str, root: Path) -> list[PairFiles]:
    pairs: list[PairFiles] = []
    rows = csv.reader(io.StringIO(text, newline=""), skipinitialspace=True, strict=True)
    try:
        for row in rows:
            header = not pairs and [field.strip().lower() for field in row] == ["a", "b", "same"]
            if header or not any(field.strip() for field in row):
                continue
            truth = _TRUTH.get(row[-1].strip().lower())
            if len(row) != 3 or truth is None or not (row[0] and row[1]):
                got = ",".join(row)[:80]
                raise ValueError(f"{file}:{rows.line_num}: expected 'a,b,same', got {got!r}")
            pairs.append(PairFiles(root / row[0], root / row[1], truth))
    except csv.Error as error:
        raise ValueError(f"{file}:{rows.line_num}: {error}") from error
    if not pairs:
        raise ValueError(f"{file} holds no pairs")
    if np.diff([pair.same for pair in pairs]).sum() == 1:
        logger.warning(
            "%s lists its pairs of one person apart from those of two; ten-fold accuracy takes"
            " contiguous tenths as folds and needs them mixed",
            file,
        )
    return pairs


def _parse_lfw(file: Path, lines: list[tuple[int, str]], root: Path) -> list[PairFiles]:
    (number, header), *rows = lines
    counts = header.split()
    if not (1 <= len(counts) <= 2 and all(c.isdecimal() and int(c) > 0 for c in counts)):
        expected = "'N', 'folds N' or 'a,b,same'"
        raise ValueError(f"{file}:{number}: expected {expected}, got {header[:80]!r}")
    promised = 2 * math.prod(map(int, counts))
    if len(rows) != promised:
        raise ValueError(f"{file} promises {promised} pairs in its first line, got {len(rows)}")
    pairs = []
    for number, row in rows:
        fields = row.strip().split("\t") if "\t" in row else row.split()
        same = len(fields) == 3
        if same:
            fields.insert(2, fields[0])
        if len(fields) != 4 or not (fields[1].isdecimal() and fields[3].isdecimal()):
            expected = "'name i j' or 'name1 i name2 j'"
            raise ValueError(f"{file}:{number}: expected {expected}, got {row[:80]!r}")
        a, i, b, j = fields
        pairs.append(PairFiles(_find(root, a, int(i)), _find(root, b, int(j)), same))
    balanced_folds = len(counts) == 2
    return pairs if balanced_folds else [pairs[i] for i in interleaved([p.same for p in pairs])]


def _find(image_root: Path, name: str, number: int) -> Path:
    """The image's path; with the usual suffix if there is no such image."""
    stem = f"{name}_{number:04d}"
    paths = [image_root / name / (stem + suffix) for suffix in IMAGE_SUFFIXES]
    return next((path for path in paths if path.is_file()), paths[0])


def held_out_pairs(dataset: FaceDataset, num_pairs: int, seed: int = 0) -> VerificationPairs:
    """Draw distinct pairs of a data set's images, half of one person and half of two, interleaved.

    Pairs of one person are spread over the people: nobody gives a further pair before everyone
    who can has given as many. Pairs of two people are uniform over all such pairs of images. If
    there are not enough pairs of a kind, there are as many of each as there are of the rarer one.

    Args:
        dataset: people that are not trained on.
        num_pairs: even, at least 2.
        seed: at least 0; decides the sample.

    Raises:
        ValueError: ``num_pairs`` is odd or below 2, nobody has two images, there is but one
            person, or no pair can be read.
    """
    counts = np.bincount(dataset.labels)
    if not (counts > 1).any():
        raise ValueError(f"pairs of one person need two images of someone in {dataset}")
    if (counts > 0).sum() < 2:
        raise ValueError(f"pairs of two people need two people in {dataset}, got 1")
    pairs = sample_pairs(dataset.labels, num_pairs, seed)
    read = _read_alternating(dataset, pairs[0::2], pairs[1::2], once=True)
    read.num_people = int((counts > 0).sum())
    return read


def sample_pairs(labels: NDArray[np.integer], num_pairs: int, seed: int = 0) -> NDArray[np.int64]:
    """The sample of :func:`held_out_pairs`, as image indices.

    Args:
        labels: (N,) who each image shows; somebody has two images, and there are two people.
        num_pairs: even, at least 2.
        seed: at least 0.

    Returns:
        (P, 2): of one person in even rows, of two in odd rows.

    Raises:
        ValueError: ``num_pairs`` is odd or below 2.
    """
    if num_pairs < 2 or num_pairs % 2:
        raise ValueError(f"num_pairs must be even and at least 2, got {num_pairs}")
    counts = np.bincount(labels)
    num_same = int((counts * (counts - 1) // 2).sum())
    num_different = int((counts.sum() ** 2 - (counts**2).sum()) // 2)
    wanted = min(num_pairs // 2, num_same, num_different)
    rng = np.random.default_rng(seed)
    same = _sample_same(counts, wanted, rng)
    different = _sample_different(counts, wanted, rng)
    by_person = labels.argsort(kind="stable")  # the sample counts person by person
    return by_person[np.stack([same, different], axis=1).reshape(-1, 2)]


def synthetic_pairs(
    num_pairs: int,
    num_identities: int,
    images_per_identity: int,
    seed: int = 0,
    first_identity: int = 1_000_000,
    once: bool = False,
) -> VerificationPairs:
    """Verification pairs of invented people: even pairs show one person, odd pairs two.

    No pair comes twice. Both kinds are uniform over all their pairs of images.

    Args:
        num_pairs: number of pairs P, a multiple of 20, so that each of ten contiguous folds holds
            both kinds in equal numbers.
        num_identities: number of people they are sampled from, at least 2.
        images_per_identity: photographs of each, at least 2.
        seed: names the population and decides the sample, in [0, 2**32).
        first_identity: number of the first person; keep the people apart from the training set's.
        once: hold each image once, and an ``index``.

    Raises:
        ValueError: an argument is outside its range, or there are too few different pairs.
    """
    n, k = num_identities, images_per_identity
    check_range("num_identities", n, 2, 2**32)
    check_range("images_per_identity", k, 2, 2**32 - 1)
    faces = SyntheticFaces(n, k, seed, first_identity)
    of_one, of_two = k * (k - 1) // 2, k * k  # pairs within one person, between two people
    limit = 2 * min(n * of_one, n * (n - 1) // 2 * of_two)
    if num_pairs % 20 or not 20 <= num_pairs <= limit:
        raise ValueError(
            f"num_pairs must be a multiple of 20, at least 20 and at most {limit} "
            f"for {n} identities of {k} images, got {num_pairs}"
        )
    rng = np.random.default_rng(seed)
    person, number = np.divmod(rng.choice(n * of_one, num_pairs // 2, replace=False), of_one)
    same = k * person[:, None] + _unordered_pair(number)
    number = rng.choice(n * (n - 1) // 2 * of_two, num_pairs // 2, replace=False)
    people, number = np.divmod(number, of_two)
    different = k * _unordered_pair(people) + np.stack(np.divmod(number, k), axis=1)
    read = _read_alternating(faces, same, different, once)
    read.num_people = num_identities
    return read


def _unordered_pair(number: NDArray[np.int64]) -> NDArray[np.int64]:
    """(P, 2) pairs i < j, each by its number j (j - 1) / 2 + i."""
    j = ((1 + np.sqrt(1 + 8 * number)) / 2).astype(np.int64)
    return np.stack([number - j * (j - 1) // 2, j], axis=1)


def _sample_same(
    counts: NDArray[np.int64], wanted: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """(wanted, 2) distinct image indices i < j of one person each, spread over the people."""
    available = counts * (counts - 1) // 2
    each = 1
    while np.minimum(available, each).sum() < wanted:
        each += 1
    starts = counts.cumsum() - counts
    sampled = []
    for person in np.flatnonzero(available):
        number = rng.choice(available[person], min(each, available[person]), replace=False)
        sampled.append(starts[person] + _unordered_pair(number))
    whole = np.concatenate([pairs[: each - 1] for pairs in sampled])
    last = rng.permutation(np.concatenate([pairs[each - 1 :] for pairs in sampled]))
    return rng.permutation(np.concatenate([whole, last[: wanted - len(whole)]]))


def _sample_different(
    counts: NDArray[np.int64], wanted: int, rng: np.random.Generator
) -> NDArray[np.int64]:
    """(wanted, 2) distinct image indices i < j of two people each, uniform."""
    starts, total = counts.cumsum() - counts, counts.sum()
    weights = counts * (total - counts)  # ordered pairs whose first image is this person's
    pairs = np.empty((0, 2), np.int64)
    while len(pairs) < wanted:
        person = rng.choice(len(counts), 2 * wanted, p=weights / weights.sum())
        i = starts[person] + rng.integers(counts[person])
        j = rng.integers(total - counts[person])
        j += counts[person] * (j >= starts[person])  # skip the person's own images
        sampled = np.sort(np.stack([i, j], axis=1), axis=1)
        pairs = np.unique(np.concatenate([pairs, sampled]), axis=0)
    return rng.permutation(pairs)[:wanted]


def _planes(pixels: NDArray[np.uint8]) -> Tensor:
    """(3, H, W) from (H, W, 3)."""
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


def _read_alternating(
    dataset: FaceDataset,
    same: NDArray[np.int64],
    different: NDArray[np.int64],
    once: bool = False,
) -> VerificationPairs:
    """Images of pairs of one person and of two, (P / 2, 2) indices each, in turns."""
    indices = np.stack([same, different], axis=1).reshape(-1, 2).tolist()
    return _load(
        [(i, j, k % 2 == 0) for k, (i, j) in enumerate(indices)],
        lambda index: _planes(dataset.read(index)),
        lambda index: Path(dataset.name(index)).stem,
        str(dataset),
        once,
    )


def _load(
    pairs: Sequence[tuple[Any, Any, bool]],
    read: Callable[[Any], Tensor],
    name: Callable[[Any], str],
    source: str,
    once: bool = False,
) -> VerificationPairs:
    """Read both images of each pair, or each image once; a pair of which ``read`` raises ValueError
    is missing."""
    images: list[Tensor] = []
    same, missing, index, names = [], [], [], list[str]()
    places: dict[Any, int] = {}

    def place(image: Any) -> int:
        if image not in places:
            images.append(read(image))
            names.append(name(image))
            places[image] = len(images) - 1
        return places[image]

    for first, second, truth in pairs:
        try:
            if once:
                index.append((place(first), place(second)))
            else:
                images += read(first), read(second)
                names += name(first), name(second)
            same.append(truth)
        except ValueError as error:
            missing.append(f"{name(first)} and {name(second)}: {error}")
    total = len(pairs)
    if not same:
        raise ValueError(f"none of the {total} pairs of {source} can be read: {missing[0]}")
    if missing:
        left_out = len(missing), total, source, abridged(missing, 3)
        logger.warning("left out %d of the %d pairs of %s: %s", *left_out)
    at = torch.tensor(index) if once else None
    return VerificationPairs(torch.stack(images), torch.tensor(same), missing, at, names)
