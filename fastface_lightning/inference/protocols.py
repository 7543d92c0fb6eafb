"""What a model is evaluated on: sets of pairs, templates, identities, each by its protocol."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from ..data import (
    FaceDataset,
    ImageFiles,
    ShardDataset,
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
    rates_at_far,
    roc_auc,
    template_embeddings,
    template_scores,
    verification_accuracy,
    verification_tar,
)
from .embedding_file import files_digest

RANKS, FPIRS = (1, 5), (0.01, 0.1)


class Outcome(NamedTuple):
    """What a set shows of a model.

    Attributes:
        results: plain data, as in evaluation.json.
        scores: cosines of the pairs compared, (P,) float; empty where the set has no pairs.
        same: whether each pair shows one person, (P,) bool.
    """

    results: dict[str, Any]
    scores: Tensor = torch.empty(0)
    same: Tensor = torch.empty(0, dtype=torch.bool)


class Protocol(ABC):
    """A set of images, and what their embeddings are worth.

    Attributes:
        name: of the set.
        images: item i is image i, (3, 112, 112) uint8 RGB, and whether it could be read.
        count: number of images.
        people: names of the people it shows, as far as it tells.
        num_people: how many there are; None where that is not known.
    """

    name: str
    images: Dataset[tuple[Tensor, bool]]
    count: int
    people: Sequence[str] = ()
    num_people: int | None = None

    @abstractmethod
    def digest(self) -> str:
        """Differs where the images do."""

    @abstractmethod
    def evaluate(self, features: Tensor) -> Outcome:
        """What the set shows of a model by its features, (count, D) float32, embeddings of any
        length; a row of NaN stands for an image that could not be read."""


class Pairs(Protocol):
    """Pairs of images, as LFW, CFP-FP and AgeDB-30: ten-fold accuracy and rates."""

    def __init__(self, name: str, pairs: VerificationPairs) -> None:
        self.name, self.pairs, self.count = name, pairs, len(pairs.images)
        self.people, self.num_people = pairs.people, pairs.num_people
        readable = torch.ones(self.count, dtype=torch.bool)  # others are left out with their pairs
        self.images = TensorDataset(pairs.images, readable)  # type: ignore[assignment]

    def digest(self) -> str:
        return hashlib.sha256(self.pairs.images.numpy().data).hexdigest()

    def evaluate(self, features: Tensor) -> Outcome:
        units, same, index = F.normalize(features), self.pairs.same, self.pairs.pairs()
        a, b = units[index[:, 0]], units[index[:, 1]]
        scores = (a * b).sum(1)
        folds = verification_accuracy(a, b, same)
        rates, tar_folds = _rates(scores, same), None
        if "1e-03" in rates["tar"]:
            with suppress(ValueError):  # a fold holds pairs of one kind alone
                tar_folds = verification_tar(a, b, same)._asdict()
        results = {
            "protocol": "pairs",
            "pairs": len(same),
            "missing": self.pairs.missing,
            "accuracy": folds.accuracy,
            "std": folds.std,
            "thresholds": folds.thresholds.tolist(),
            **rates,
            "tar_folds": tar_folds,
        }
        return Outcome(results, scores, same)


class Templates(Protocol):
    """IJB-B or IJB-C: templates of many images, compared 1:1 and, where listed, searched 1:N."""

    images: ImageFiles

    def __init__(self, root: Path) -> None:
        self.data = read_ijb(root)
        if not (root / "loose_crop").is_dir():
            raise ValueError(f"no folder {root / 'loose_crop'}, which must hold the images")
        self.name, self.count = self.data.name, len(self.data.images)
        self.images = ImageFiles(self.data.images, self.data.points)

    def digest(self) -> str:
        return files_digest(self.data.images, self.data.points)

    def evaluate(self, features: Tensor) -> Outcome:
        data, readable = self.data, features[:, 0].isfinite()
        weighted = features * torch.from_numpy(data.scores).float()[:, None]
        templates, media = torch.from_numpy(data.templates), torch.from_numpy(data.media)
        if not readable.all():  # else a copy of IJB-C's features, 1 GB, is spared
            weighted, templates, media = weighted[readable], templates[readable], media[readable]
        embeddings = template_embeddings(weighted, templates, media)
        del weighted
        ids = templates.unique().numpy()
        rows, has_images = _rows_of(ids, data.pairs)
        usable = has_images.all(1)
        same = torch.from_numpy(data.same[usable])
        scores = template_scores(embeddings, torch.from_numpy(rows[usable]))
        results = {
            "protocol": "templates",
            "templates": len(ids),
            "pairs": len(scores),
            "pairs_without_images": int((~usable).sum()),
            "missing": _missing(self.images, readable),
            **_rates(scores, same),
            "identification": self._search(embeddings, ids),
        }
        return Outcome(results, scores, same)

    def _search(self, embeddings: Tensor, ids: NDArray[np.int64]) -> list[dict[str, Any]]:
        """Search each gallery for the probes; templates without images are left out."""
        if self.data.probes is None:
            return []
        searches = []
        for gallery in self.data.galleries:
            sides: list[Tensor] = []
            for side in (self.data.probes, gallery):
                rows, has_images = _rows_of(ids, side.templates)
                sides += [embeddings[rows[has_images]], torch.from_numpy(side.subjects[has_images])]
            searches.append(_identified(*sides))
        return searches


class Identities(Protocol):
    """Faces of identities, searched 1:N.

    Of each identity with several images the first is enrolled in the gallery, the others are
    probes; the images of identities with a single one are probes without a mate.
    """

    images: ImageFiles

    def __init__(self, path: Path) -> None:
        self.path, self.faces = path, open_faces(path)
        self.name, self.count, self.people = _name(path), len(self.faces), self.faces.identities
        self.images = _Faces(self.faces)

    def digest(self) -> str:
        archives = [self.path, *sorted(self.path.glob("*.rec"))]
        if isinstance(self.faces, ShardDataset):
            archives += self.faces.shards
        names = [self.faces.name(i) for i in range(self.count)]
        return files_digest([*map(str, archives), *names], self.faces.labels)

    def evaluate(self, features: Tensor) -> Outcome:
        readable = features[:, 0].isfinite()
        units = F.normalize(features[readable])
        labels = torch.from_numpy(self.faces.labels.astype(np.int64))[readable]
        order = labels.argsort(stable=True)
        first = torch.ones(len(labels), dtype=torch.bool)
        first[order[1:]] = labels[order][1:] != labels[order][:-1]
        enrolled = first & (labels.bincount()[labels] > 1)
        if not enrolled.any():
            raise ValueError(f"a search needs somebody with 2 images, got none in {self.faces}")
        search = _identified(units[~enrolled], labels[~enrolled], units[enrolled], labels[enrolled])
        results = {
            "protocol": "identities",
            "images": int(readable.sum()),
            "missing": _missing(self.images, readable),
            "identification": [search],
        }
        return Outcome(results)


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


def worst_pairs(outcome: Outcome, count: int) -> list[int]:
    """Pairs most mistaken: half of one person and least alike, half of two and most alike."""
    order, same = outcome.scores.argsort(), outcome.same
    least_alike = order[same[order]][: count // 2]
    order = order.flip(0)
    most_alike = order[~same[order]][: count // 2]
    return [*least_alike.tolist(), *most_alike.tolist()]


def _name(path: Path) -> str:
    return path.resolve().stem.replace(".", "_")


def _missing(images: ImageFiles, readable: Tensor) -> list[str]:
    return [images.why(int(i)) for i in (~readable).nonzero()]


def _rates(scores: Tensor, same: Tensor) -> dict[str, Any]:
    """:func:`rates_at_far`, equal error rate and area, None where all pairs are of one kind."""
    both = bool(same.any()) and not same.all()
    return {
        **rates_at_far(scores, same),
        "eer": equal_error_rate(scores, same) if both else None,
        "auc": roc_auc(scores, same) if both else None,
    }


def _identified(
    probes: Tensor, probe_ids: Tensor, gallery: Tensor, gallery_ids: Tensor
) -> dict[str, Any]:
    result = identification(probes, probe_ids, gallery, gallery_ids, RANKS, FPIRS)
    tpir = None if result.tpir is None else dict(zip(map(str, FPIRS), result.tpir, strict=True))
    return {
        "gallery": len(gallery),
        "mated": result.mated,
        "unmated": result.unmated,
        "rank": dict(zip(map(str, RANKS), result.rank, strict=True)),
        "tpir": tpir,
    }


def _rows_of(
    ids: NDArray[np.int64], templates: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Row of each template among the ascending ``ids``, and whether it is one of them."""
    rows = np.searchsorted(ids, templates).clip(max=len(ids) - 1)
    return rows, ids[rows] == templates


class _Faces(ImageFiles):
    """Images of a data set; one that cannot be read is named, where training takes another."""

    def __init__(self, faces: FaceDataset) -> None:
        self.faces, self.size = faces, faces.size

    def __len__(self) -> int:
        return len(self.faces)

    def _read(self, index: int) -> Tensor:
        return torch.from_numpy(self.faces.read(index)).permute(2, 0, 1)
