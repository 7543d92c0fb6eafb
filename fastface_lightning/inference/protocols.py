"""What a model is evaluated on: sets of pairs, templates, identities, each by its protocol."""

from __future__ import annotations

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from ..data import (
    FaceDataset,
    ImageFiles,
    VerificationPairs,
    is_ijb,
    open_faces,
    read_ijb,
    read_verification,
)
from ..data.formats.tar import is_shard
from ..evaluation import (
    equal_error_rate,
    identification,
    roc_auc,
    tar_at_far,
    template_embeddings,
    template_scores,
    verification_accuracy,
    verification_tar,
)
from ..files import printable

FARS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
RANKS, FPIRS = (1, 5), (0.01, 0.1)


class Protocol(ABC):
    """A set of images, and what their embeddings are worth by its protocol.

    Attributes:
        name: of the set.
        images: item i is image i, (3, 112, 112) uint8 RGB, and whether it could be read.
        count: how many there are.
        scores: after ``evaluate``, the cosines of the pairs compared, (P,) float; None if there are
            none.
        same: whether each pair shows one person, (P,) bool.
    """

    images: Dataset[tuple[Tensor, bool]]
    count: int
    scores: Tensor | None = None
    same: Tensor | None = None

    def __init__(self, name: str) -> None:
        self.name = name

    @abstractmethod
    def digest(self) -> str:
        """Differs where the images do."""

    @abstractmethod
    def evaluate(self, features: Tensor) -> dict[str, Any]:
        """Plain data on what the set shows.

        Args:
            features: (count, D) float32, the embedding of each image, of any length; a row of NaN
                stands for an image that could not be read.
        """

    def _rates(self, fars: Sequence[float]) -> dict[str, Any]:
        """True accept rates and the like; none where all pairs are of one kind."""
        assert self.scores is not None and self.same is not None
        if self.same.all() or not self.same.any():
            return {"tar": {}, "eer": None, "auc": None}
        tars = tar_at_far(self.scores, self.same, fars)
        return {
            "tar": {f"{far:.0e}": tar for far, tar in zip(fars, tars, strict=True)},
            "eer": equal_error_rate(self.scores, self.same),
            "auc": roc_auc(self.scores, self.same),
        }


class Pairs(Protocol):
    """Pairs of images, as LFW, CFP-FP and AgeDB-30: ten-fold accuracy and rates."""

    def __init__(self, name: str, pairs: VerificationPairs) -> None:
        super().__init__(name)
        self.pairs, self.count = pairs, len(pairs.images)
        self.images = _Given(pairs.images)

    def digest(self) -> str:
        return hashlib.sha256(self.pairs.images.numpy().data).hexdigest()

    def evaluate(self, features: Tensor) -> dict[str, Any]:
        units = F.normalize(features)
        a, b, self.same = units[0::2], units[1::2], self.pairs.same
        self.scores = (a * b).sum(1)
        folds = verification_accuracy(a, b, self.same)
        negatives = int((~self.same).sum())
        fars = [far for far in FARS if far * negatives >= 1]  # others no pair could show
        return {
            "protocol": "pairs",
            "pairs": len(self.same),
            "missing": self.pairs.missing,
            "accuracy": folds.accuracy,
            "std": folds.std,
            "thresholds": folds.thresholds.tolist(),
            **self._rates(fars),
            "tar_folds": _tar_folds(a, b, self.same),
        }

    def worst(self, count: int) -> list[int]:
        """Pairs most mistaken: half of one person and least alike, half of two and most alike."""
        assert self.scores is not None and self.same is not None
        order = self.scores.argsort()
        same = order[self.same[order]][: count // 2]
        other = order.flip(0)[~self.same[order.flip(0)]][: count // 2]
        return [*same.tolist(), *other.tolist()]


class Templates(Protocol):
    """IJB-B or IJB-C: templates of many images, compared 1:1 and, where listed, searched 1:N."""

    def __init__(self, root: Path) -> None:
        self.data = read_ijb(root)
        if not (root / "loose_crop").is_dir():
            raise ValueError(f"no folder {root / 'loose_crop'}, which must hold the images")
        super().__init__(self.data.name)
        self.files = ImageFiles(self.data.images, self.data.points)
        self.images, self.count = self.files, len(self.files)

    def digest(self) -> str:
        digest = hashlib.sha256(self.data.points.tobytes())
        for image in self.data.images:
            digest.update(stamp(image))
        return digest.hexdigest()

    def evaluate(self, features: Tensor) -> dict[str, Any]:
        data = self.data
        seen = features[:, 0].isfinite()
        weighted = features * torch.from_numpy(data.scores).float()[:, None]
        templates, media = torch.from_numpy(data.templates), torch.from_numpy(data.media)
        if not seen.all():  # else a copy of IJB-C's features, 1 GB, is spared
            weighted, templates, media = weighted[seen], templates[seen], media[seen]
        embeddings = template_embeddings(weighted, templates, media)
        del weighted
        known = templates.unique().numpy()
        rows, there = _places(known, data.pairs)
        usable = there.all(1)
        self.same = torch.from_numpy(data.same[usable])
        self.scores = template_scores(embeddings, torch.from_numpy(rows[usable]))
        return {
            "protocol": "templates",
            "templates": len(known),
            "pairs": len(self.scores),
            "pairs_without_images": int((~usable).sum()),
            "missing": [self.files.why(int(i)) for i in (~seen).nonzero()],
            **self._rates(FARS),
            "identification": self._search(embeddings, known),
        }

    def _search(self, embeddings: Tensor, known: NDArray[np.int64]) -> list[dict[str, Any]]:
        """Look for the probes in each gallery; templates without images are left out."""
        probes = self.data.probes
        if probes is None:
            return []
        found = []
        for gallery in self.data.galleries:
            sides = []
            for side in (probes, gallery):
                rows, there = _places(known, side.templates)
                sides += [embeddings[rows[there]], torch.from_numpy(side.subjects[there])]
            found.append(_identified(*sides))
        return found


class Identities(Protocol):
    """Faces of identities, searched 1:N.

    Of each identity with several images the first is the gallery, the others are looked for in it;
    identities with a single image are looked for though they are not there.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(_name(path))
        self.path, self.faces = path, open_faces(path)
        self.count = len(self.faces)
        self.images = _Read(self.faces)

    def digest(self) -> str:
        digest = hashlib.sha256(self.faces.labels.tobytes())
        packs = [self.path, *sorted(self.path.glob("*.rec")), *sorted(self.path.glob("*.tar"))]
        for pack in packs:
            digest.update(stamp(str(pack)))
        for i in range(self.count):
            digest.update(stamp(self.faces.name(i)))
        return digest.hexdigest()

    def evaluate(self, features: Tensor) -> dict[str, Any]:
        seen = features[:, 0].isfinite()
        units = F.normalize(features[seen])
        labels = torch.from_numpy(self.faces.labels.astype(np.int64))[seen]
        order = labels.argsort(stable=True)
        first = torch.ones(len(labels), dtype=torch.bool)
        first[order[1:]] = labels[order][1:] != labels[order][:-1]
        enrolled = first & (labels.bincount()[labels] > 1)
        if not enrolled.any():
            raise ValueError(f"a search needs somebody with 2 images, got none in {self.faces}")
        return {
            "protocol": "identities",
            "images": int(seen.sum()),
            "missing": [self._why(int(i)) for i in (~seen).nonzero()],
            "identification": [
                _identified(units[~enrolled], labels[~enrolled], units[enrolled], labels[enrolled])
            ],
        }

    def _why(self, index: int) -> str:
        try:
            self.faces.read_into(index, _pixels(self.faces.size))
        except ValueError as error:
            return printable(str(error))
        return ""


def open_protocol(path: str | Path, image_root: str | Path | None = None) -> Protocol:
    """The set at a path, by what is there.

    Args:
        path: a ``.bin`` or a pairs file; a folder of IJB-B or IJB-C; faces of identities in a
            folder, a ``.rec`` or tar shards.
        image_root: folder of a pairs file's images.

    Raises:
        ValueError: what is there cannot be read.
    """
    path = Path(path)
    if path.is_dir() and is_ijb(path):
        return Templates(path)
    if path.is_dir() or path.suffix == ".rec" or is_shard(path.name):
        return Identities(path)
    return Pairs(_name(path), read_verification(path, image_root))


def _name(path: Path) -> str:
    return path.resolve().stem.replace(".", "_")


def _identified(
    probes: Tensor, probe_ids: Tensor, gallery: Tensor, gallery_ids: Tensor
) -> dict[str, Any]:
    result = identification(probes, probe_ids, gallery, gallery_ids, RANKS, FPIRS)
    return {
        "gallery": len(gallery),
        "mated": result.mated,
        "unmated": result.unmated,
        "rank": dict(zip(map(str, RANKS), result.rank, strict=True)),
        "tpir": None
        if result.tpir is None
        else dict(zip(map(str, FPIRS), result.tpir, strict=True)),
    }


def _tar_folds(a: Tensor, b: Tensor, same: Tensor) -> dict[str, float] | None:
    """The fold version of TAR at FAR 1e-3; None where a fold holds pairs of one kind alone, all
    that can be wrong with what :func:`verification_accuracy` has taken."""
    try:
        return verification_tar(a, b, same)._asdict()
    except ValueError:
        return None


def _places(
    known: NDArray[np.int64], numbers: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Place of each number among the ascending ``known``, and whether it is one of them."""
    places = np.searchsorted(known, numbers).clip(max=len(known) - 1)
    return places, known[places] == numbers


def stamp(file: str) -> bytes:
    """What changes when a file is rewritten; of a place inside one, its name alone."""
    try:
        status = os.stat(file)
    except OSError:
        return file.encode(errors="surrogateescape")
    return f"{file} {status.st_size} {status.st_mtime_ns}\n".encode(errors="surrogateescape")


def _pixels(size: int) -> NDArray[np.uint8]:
    return np.zeros((size, size, 3), np.uint8)


class _Given(Dataset[tuple[Tensor, bool]]):
    """Images that are in memory."""

    def __init__(self, images: Tensor) -> None:
        self.given = images

    def __getitem__(self, index: int) -> tuple[Tensor, bool]:
        return self.given[index], True


class _Read(Dataset[tuple[Tensor, bool]]):
    """Images of a data set; one that cannot be read is told, where training would replace it."""

    def __init__(self, faces: FaceDataset) -> None:
        self.faces = faces

    def __getitem__(self, index: int) -> tuple[Tensor, bool]:
        out = _pixels(self.faces.size)
        try:
            self.faces.read_into(index, out)
        except ValueError:
            return torch.from_numpy(out).permute(2, 0, 1), False
        return torch.from_numpy(out).permute(2, 0, 1), True
