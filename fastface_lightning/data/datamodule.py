"""A data module gives a trainer what it needs of a data set: training batches and pairs to verify.

Training batches are (images (B, 3, H, W) uint8 RGB, labels (B,) int64), or several such by name for
a classifier that compares images of one identity. Verification batches are (a (B, 3, H, W) uint8, b
likewise, same (B,) bool, index (B,) int64): the pairs (a, b) with their places in the set, by which
a metric can drop the repeats that a distributed sampler pads with. Of pairs held out and synthetic
ones, whose images recur, they are (images (B, 3, H, W) uint8, places (B,) int64), each image once,
of :class:`PairImages`.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import CombinedLoader
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset

from .datasets.base import FaceDataset, abridged
from .datasets.folder import FaceList, IdentityFolder
from .datasets.records import RecordDataset
from .datasets.shards import ShardDataset, holds_shards
from .datasets.synthetic import SyntheticFaces
from .formats.names import read_names
from .formats.tar import is_shard
from .loader import EpochSampler, FaceLoader, GroupSampler
from .pairs import (
    PairImages,
    VerificationPairs,
    held_out_pairs,
    read_pairs,
    read_verification,
    synthetic_pairs,
)
from .people import People, as_compared, common, is_held_out

logger = logging.getLogger(__name__)
LISTS = (".txt", ".csv", ".lst")  # files that name people or images, in lower case


class FaceDataModule(LightningDataModule, ABC):
    """Training set and verification sets as loaders; a subclass says what they are.

    Args:
        batch_size: B, images a training step and rank; pairs a verification step, images of people
            held out and of synthetic ones.
        num_workers: processes that decode training images; 0 decodes in the main process. Dual
            loaders share them as they share the images: a third for instances, at least one each.
        seed: at least 0; with the epoch it decides the order of the training images.
        verify: further verification sets: ``.bin`` files, or pairs files, which
            :func:`read_verification` reads. A bare name, ``lfw``, is ``lfw.bin`` beside the data.
            A set is named as its file without the suffix.
        verify_root: folder of the pairs files' images; None is the data's own.
        batches: what a training batch is, (images, labels) or a dictionary of such:

            - ``images``: B random images.
            - ``dual``, for F2C: ``instance``, B random images, and ``identity``, B random
              identities with two images each (2B, one identity after the other).
            - ``keys``, for AttFC: ``identity``, B random images, each followed by ``keys`` others
              of its identity (B (1 + keys)).

            :class:`GroupSampler` says which images these are.
        keys: at least 1; see ``batches``.

    Attributes:
        batches, keys: as given; a program may set them before it asks for the loader.
        earlier: names of people that the network has been trained on before, for a program to set
            before ``setup``: nobody of them is verified on as held out.
        verify_people: names of those to verify on as held out, for an evaluation to set before
            ``setup``; None: those whom the data module chooses.
        train_set: from ``setup`` on, the training set.
        people: from ``setup`` on, who is trained on and who is held out. A trainer's checkpoints
            keep them, and go on with the same people alone.
        num_classes: from ``setup`` on, the number of its identities.
        sets: from ``setup`` on, the verification sets by name.
        verify_names: from ``setup`` on, those names, in the order of the loaders.
    """

    home: Path | None = None  # folder of the data

    def __init__(
        self,
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
        verify: Sequence[str | Path] = (),
        verify_root: str | Path | None = None,
        batches: str = "images",
        keys: int = 2,
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1 image, got {batch_size}")
        for name, value in (("num_workers", num_workers), ("seed", seed)):
            if value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        if isinstance(verify, (str, Path)):
            raise ValueError(f"verify must be a list, as [lfw,cfp_fp], got {str(verify)!r}")
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.verify, self.verify_root = list(verify), verify_root
        self.batches, self.keys = batches, keys
        self.earlier: Sequence[str] = ()
        self.verify_people: Sequence[str] | None = None
        self._held_out: Sequence[str] = ()
        self._state: dict[str, Tensor] = {}
        self._warned = False

    def faces(self) -> FaceDataset:
        """All that the data set has to train on, before any of it is held out."""
        return self.build()[0]

    @abstractmethod
    def build(self) -> tuple[FaceDataset, dict[str, VerificationPairs]]:
        """The training set, and the verification sets that come with it, by name."""

    def setup(self, stage: str | None = None) -> None:
        """Build the sets, once, whatever the stage."""
        if hasattr(self, "sets"):
            return
        files = [self._find(name) for name in self.verify]  # before what takes long
        self.train_set, sets = self.build()
        for file in files:
            name = file.stem.replace(".", "_")
            if name in sets:
                raise ValueError(f"verification sets must have different names, got {name} twice")
            sets[name] = read_verification(file, self.verify_root or self.home)
        self.num_classes = self.train_set.num_classes
        self.people = People(self.train_set.identities, self._held_out, self.earlier)
        for name, pairs in sets.items():
            if stage == "fit" and pairs.people:  # to look at millions of names takes seconds
                pairs.trained_people = self.people.warn_of_trained(name, pairs.people)
        self.sets, self.verify_names = sets, list(sets)

    def counts(self) -> dict[str, int]:
        """How many ``identities`` and ``images`` are trained on, how many identities have a
        ``single`` image, and how many are held out, ``held_out``, with the images verified on."""
        images = np.bincount(self.train_set.labels)
        held_out = self.sets.get("held_out")
        return {
            "identities": self.num_classes,
            "images": len(self.train_set),
            "single": int((images == 1).sum()),
            "held_out": len(self.people.held_out),
            "held_out_images": 0 if held_out is None else len(held_out.images),
        }

    def state_dict(self) -> dict[str, Tensor]:
        if not self._state:  # of millions of people it takes seconds
            self._state = self.people.state_dict()
        return self._state

    def load_state_dict(self, state_dict: Mapping[str, Tensor]) -> None:
        self.people.check_same(People.of(state_dict))

    def _find(self, name: str | Path) -> Path:
        """File of a verification set."""
        places = [Path(name)]
        if self.home is not None:
            places += [self.home / name, self.home / f"{name}.bin"]
        for place in places:
            if place.is_file():
                return place
        sought = " and ".join(map(str, places))
        raise ValueError(f"verify must name .bin or pairs files, got {name}; looked for {sought}")

    def train_dataloader(self) -> FaceLoader | CombinedLoader:
        """Shuffled batches, all of one size; see :class:`FaceLoader` for order and resuming.

        Raises:
            ValueError: there are not enough images for one batch, or identities for groups.
        """
        if self.batches not in ("images", "dual", "keys"):
            raise ValueError(f"batches must be images, dual or keys, got {self.batches}")
        if self.keys < 1:
            raise ValueError(f"keys must be at least 1 image, got {self.keys}")
        images = EpochSampler(self.train_set, self.seed)
        if self.batches == "images":
            return self._loader(images, self.num_workers)
        if self.batches == "keys":
            groups = GroupSampler(self.train_set, 1 + self.keys, "images", self.seed)
            loaders = {"identity": self._loader(groups, self.num_workers)}
        else:
            groups = GroupSampler(self.train_set, 2, "identities", self.seed)
            third = min(self.num_workers, max(1, round(self.num_workers / 3)))
            loaders = {
                "instance": self._loader(images, third),
                "identity": self._loader(groups, max(third, self.num_workers - third)),
            }
        single, total = int((groups.counts == 1).sum()), int((groups.counts > 0).sum())
        if single and not self._warned:
            level = logging.WARNING if 2 * single > total else logging.INFO
            message = (
                "%d of the %d identities have a single image, which is served %d times in a row"
            )
            logger.log(level, message, single, total, groups.size)
            self._warned = True
        return CombinedLoader(loaders, "min_size")

    def _loader(self, sampler: EpochSampler, num_workers: int) -> FaceLoader:
        return FaceLoader(self.train_set, self.batch_size * sampler.size, sampler, num_workers)

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        if not isinstance(batch, dict):
            return super().transfer_batch_to_device(batch, device, dataloader_idx)
        # Classifiers look at these labels on the host: it would have to wait for a GPU's.
        return {
            name: (images.to(device, non_blocking=True), labels)
            for name, (images, labels) in batch.items()
        }

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """One loader a verification set, in order; without workers, as the pairs are in memory."""
        loaders = []
        for pairs in self.sets.values():
            dataset: Dataset[Any]
            if pairs.index is None:
                a, b, places = pairs.images[0::2], pairs.images[1::2], torch.arange(len(pairs.same))
                dataset = TensorDataset(a, b, pairs.same, places)
            else:
                dataset = PairImages(pairs)
            pin_memory = torch.cuda.is_available()
            loaders.append(DataLoader(dataset, self.batch_size, pin_memory=pin_memory))
        return loaders


class SyntheticData(FaceDataModule):
    """Synthetic faces, for a first try without data; verification set ``synthetic``.

    Args:
        num_identities: identities to train on.
        images_per_identity: images of each identity.
        verify_identities: further identities, which only the verification pairs show.
        verify_pairs: number of verification pairs, a multiple of 20; 0 makes none.
        batch_size, num_workers, seed, verify, verify_root, batches, keys: see
            :class:`FaceDataModule`. The faces are the same for every seed, so that runs with
            different seeds compare.
    """

    def __init__(
        self,
        num_identities: int = 1000,
        images_per_identity: int = 20,
        verify_identities: int = 200,
        verify_pairs: int = 1000,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.num_identities, self.images_per_identity = num_identities, images_per_identity
        self.verify_identities, self.verify_pairs = verify_identities, verify_pairs

    def faces(self) -> FaceDataset:
        return SyntheticFaces(self.num_identities, self.images_per_identity)

    def build(self) -> tuple[FaceDataset, dict[str, VerificationPairs]]:
        if not self.verify_pairs:
            return self.faces(), {}
        people, images = self.verify_identities, self.images_per_identity
        pairs = synthetic_pairs(self.verify_pairs, people, images, 0, self.num_identities, True)
        return self.faces(), {"synthetic": pairs}


class FaceData(FaceDataModule):
    """Faces on disk, verified on people held out or on other sets.

    Args:
        root: where they are: a folder of ``<identity>/<image>``, a RecordIO file ``.rec`` or a
            folder with ``train.rec``, a tar shard or a folder of them (:class:`ShardDataset`).
        list: a file that lists images in the folder ``root`` with their identities, instead; see
            :class:`FaceList`.
        held_out: who is not trained on but verified on, as the set ``held_out``: about this share
            of the identities, in [0, 1), chosen by their names (:func:`is_held_out`); or a file or
            folder. A text file names them, one a line, or lists images of other people as ``list``
            does; a folder or an archive holds their images as ``root`` does. Whoever is in
            ``root`` too is left out there.
        verify_pairs: number of pairs sampled from them, even.
        min_images: identities with fewer images are not trained on.
        max_bad: images that may prove unreadable before the run stops.
        reindex: index the data anew, whatever their kept index says.
        name: the data set's name, for messages.
        num_identities, num_images: what the whole data set should hold; a warning says if it does
            not.
        batch_size, num_workers, seed, verify, verify_root, batches, keys: see
            :class:`FaceDataModule`.
    """

    def __init__(
        self,
        root: str | Path,
        list: str | Path | None = None,
        held_out: float | str | Path = 0.0,
        verify_pairs: int = 3000,
        min_images: int = 1,
        max_bad: int = 100,
        reindex: bool = False,
        name: str = "folder",
        num_identities: int | None = None,
        num_images: int | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        if not str(root):  # the folder that one happens to be in
            raise ValueError("data.root must be the path of the faces, got an empty one")
        is_share = type(held_out) in (int, float) and 0 <= held_out < 1  # type: ignore[operator]
        if not is_share and not isinstance(held_out, (str, Path)):
            raise ValueError(f"held_out must lie in [0, 1) or be a path, got {held_out}")
        self.root, self.list, self.held_out = Path(root), list, held_out
        self.home = self.root.parent if self.root.is_file() else self.root
        self.verify_pairs, self.min_images = verify_pairs, min_images
        self.max_bad, self.reindex, self.name = max_bad, reindex, name
        self.num_identities, self.num_images = num_identities, num_images

    def faces(self) -> FaceDataset:
        """All faces, whose numbers are compared with what they should be."""
        if not self.root.exists():
            layouts = "folders <identity>/<image>.jpg, a .rec or .tar shards"
            raise ValueError(f"{self.name}: nothing at {self.root}; expected {layouts}")
        faces = open_faces(self.root, self.list, self.max_bad, self.reindex)
        _compare_counts(str(self.name), self.root, faces, self.num_identities, self.num_images)
        return faces

    def build(self) -> tuple[FaceDataset, dict[str, VerificationPairs]]:
        faces = self.faces()
        if not self.held_out:  # the names of millions would take seconds
            return faces.restricted(min_images=self.min_images), {}
        source, names = self._choose(faces)
        apart = set(map(as_compared, names))
        kept = [name for name in faces.identities if as_compared(name) not in apart]
        if self.verify_people is None:
            if not kept:
                raise ValueError(f"held_out must leave somebody to train on, got {self.held_out}")
            if source is not faces and len(kept) < faces.num_classes:
                count = faces.num_classes - len(kept)
                logger.info("%d of the people in %s are in %s too: held out", count, source, faces)
        train_set = faces.restricted(kept or None, self.min_images)
        seen = common(names, self.earlier)
        if seen:
            sentence = "%d of the %d people held out have been trained on before: not verified on"
            logger.warning(sentence + ": %s", len(seen), len(names), abridged(seen))
        gone = set(seen)
        self._held_out = [name for name in names if name not in gone]
        if not names:
            return train_set, {}
        if len(self._held_out) < 2:
            raise ValueError(
                f"held_out must leave 2 people to verify on whom weights have not seen, got "
                f"{len(self._held_out)} of {len(names)}: held_out=FILE names others, 0 nobody"
            )
        people = source.restricted(self._held_out)
        return train_set, {"held_out": held_out_pairs(people, self.verify_pairs)}

    def _choose(self, faces: FaceDataset) -> tuple[FaceDataset, Sequence[str]]:
        """Who is held out: the data set with their images, and their names."""
        if not isinstance(self.held_out, (str, Path)):
            share = self.held_out
            if self.verify_people is not None:
                return faces, self.verify_people
            names = [name for name in faces.identities if is_held_out(name, share)]
            if not 2 <= len(names) < faces.num_classes:
                raise ValueError(
                    f"held_out must leave 1 identity to train on and 2 to verify on, got {share}, "
                    f"which by their names is {len(names)} of {faces.num_classes}: give another "
                    f"share, data.held_out=0.3, or data.held_out=FILE that names them"
                )
            return faces, names
        file = Path(self.held_out)
        if self.verify_people is not None:
            apart = file.exists() and file.suffix.lower() not in LISTS
            return open_faces(file) if apart else faces, self.verify_people
        if not file.exists():
            raise ValueError(f"held_out must be a share or a path that is there, got {file}")
        others: FaceDataset
        if file.suffix.lower() not in LISTS:
            others = open_faces(file, None, self.max_bad, self.reindex)
            return others, others.identities
        lines = dict.fromkeys(line.strip() for line in read_names(file) if line.strip())
        named = [name for name in faces.identities if name in lines]
        if not named:
            others = FaceList(file, self.home, max_bad=self.max_bad, reindex=self.reindex)
            return others, others.identities
        if len(named) < len(lines):
            unknown = abridged([*(lines.keys() - set(named))])
            raise ValueError(f"held_out must name people in {faces}, got {unknown} in {file}")
        return faces, named


def open_faces(
    root: Path, list: str | Path | None = None, max_bad: int = 100, reindex: bool = False
) -> FaceDataset:
    """The faces at ``root``, in whichever of the layouts that :class:`FaceData` names."""
    layout: type[ShardDataset | RecordDataset | IdentityFolder]
    if list is not None:
        return FaceList(list, root, max_bad=max_bad, reindex=reindex)
    if not root.is_dir():
        if root.suffix.lower() == ".zip":
            raise ValueError(f"zip archives are not read, got {root}: unpack it into a folder")
        layout = ShardDataset if is_shard(root.name) else RecordDataset
    elif (root / "train.rec").is_file():
        root, layout = root / "train.rec", RecordDataset
    else:
        layout = ShardDataset if holds_shards(root) else IdentityFolder
    return layout(root, max_bad=max_bad, reindex=reindex)


class LFWData(FaceDataModule):
    """LFW View 1: trains on its development people and verifies on its test pairs, ``lfw_view1``.

    Args:
        root: folder with ``images/<name>/<name>_0001.jpg``, aligned, and the benchmark's files
            ``peopleDevTrain.txt`` and ``pairsDevTest.txt``, which share no person.
        max_bad: images that may prove unreadable before the run stops.
        reindex: index the images anew, whatever their kept index says.
        batch_size, num_workers, seed, verify, verify_root, batches, keys: see
            :class:`FaceDataModule`.

    References:
        Huang et al., Labeled Faces in the Wild, UMass Amherst technical report 07-49, 2007.
    """

    def __init__(
        self, root: str | Path, max_bad: int = 100, reindex: bool = False, **common: Any
    ) -> None:
        super().__init__(**common)
        self.root, self.max_bad, self.reindex = Path(root), max_bad, reindex
        self.home = self.root / "images"

    def faces(self) -> FaceDataset:
        """The development people, whose numbers are compared with their list's."""
        for part in ("images", "peopleDevTrain.txt"):
            if not (self.root / part).exists():
                raise ValueError(f"lfw: no {self.root / part}")
        people, images = read_people(self.root / "peopleDevTrain.txt"), self.root / "images"
        faces = IdentityFolder(
            images, identities=people, max_bad=self.max_bad, reindex=self.reindex
        )
        _compare_counts("lfw", images, faces, len(people), sum(people.values()))
        return faces

    def build(self) -> tuple[FaceDataset, dict[str, VerificationPairs]]:
        faces = self.faces()
        return faces, {"lfw_view1": read_pairs(self.root / "pairsDevTest.txt", self.home)}


def _compare_counts(
    name: str, root: Path, faces: FaceDataset, num_identities: int | None, num_images: int | None
) -> None:
    """Warn if the faces are not as many as they should be; None is any number."""
    people, images = faces.num_classes, len(faces)
    wanted = num_identities or people, num_images or images
    expected, counted = (
        f"{c:,} identities and {n:,} images" for c, n in (wanted, (people, images))
    )
    if counted != expected:
        logger.warning("%s: expected %s in %s, got %s", name, expected, root, counted)


def read_people(file: Path) -> dict[str, int]:
    """How many images each person in an LFW people file has.

    Its lines are the number of people, then ``name number_of_images`` for each.
    """
    first, *lines = file.read_text(encoding="utf-8").split("\n")
    rows = [line.split() for line in lines if line.strip()]
    if first.strip() != str(len(rows)):
        raise ValueError(f"{file}:1: expected {len(rows)}, the people listed, got {first!r}")
    for row in rows:
        if len(row) != 2 or not row[1].isdecimal():
            raise ValueError(f"{file}: expected 'name number_of_images', got {' '.join(row)!r}")
    return {name: int(count) for name, count in rows}
