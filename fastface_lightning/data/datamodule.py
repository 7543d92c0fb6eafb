"""A data module gives a trainer what it needs of a data set: training batches and pairs to verify.

Training batches are (images (B, 3, H, W) uint8 RGB, labels (B,) int64). Verification batches are
(a (B, 3, H, W) uint8, b likewise, same (B,) bool, index (B,) int64): the pairs (a, b) with their
places in the set, by which a metric can drop the repeats that a distributed sampler pads with.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, TensorDataset

from .folder import IdentityFolder, identity_names
from .order import EpochSampler
from .synthetic import SyntheticFaces, synthetic_pairs
from .verification import (
    VerificationPairs,
    held_out_pairs,
    read_pairs,
)

logger = logging.getLogger(__name__)


class FaceDataModule(LightningDataModule, ABC):
    """Training set and verification sets as loaders; a subclass says in ``build`` what they are.

    Args:
        batch_size: images a training step and rank; pairs a verification step.
        num_workers: processes that decode training images; 0 decodes in the main process.
        seed: at least 0; with the epoch it decides the order of the training images.

    Attributes:
        train_set: from ``setup`` on, the training set.
        num_classes: from ``setup`` on, the number of its identities.
        verify: from ``setup`` on, the verification sets by name.
        verify_names: from ``setup`` on, those names, in the order of the loaders.
    """

    train_set: Dataset[Any]
    num_classes: int
    verify: dict[str, VerificationPairs]
    verify_names: list[str]

    def __init__(self, batch_size: int = 128, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1 image, got {batch_size}")
        if num_workers < 0:
            raise ValueError(f"num_workers must be at least 0, got {num_workers}")
        if seed < 0:
            raise ValueError(f"seed must be at least 0, got {seed}")
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self._built = False

    @abstractmethod
    def build(self) -> tuple[Dataset[Any], dict[str, VerificationPairs]]:
        """The training set, which has ``num_classes``, and the verification sets by name."""

    def setup(self, stage: str | None = None) -> None:
        """Build the sets, once, whatever the stage."""
        if self._built:
            return
        self.train_set, self.verify = self.build()
        self.num_classes = self.train_set.num_classes  # type: ignore[attr-defined]
        self.verify_names = list(self.verify)
        self._built = True

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled batches, all of ``batch_size``; see :class:`EpochSampler` for the order.

        Raises:
            ValueError: there are not enough images for one batch.
        """
        sampler = EpochSampler(self.train_set, self.seed)
        if self.batch_size > len(sampler):
            ranks = f" of each of {sampler.num_replicas} ranks" if sampler.num_replicas > 1 else ""
            raise ValueError(
                f"batch_size {self.batch_size} is larger than"
                f" the {len(sampler)} training images{ranks}"
            )
        return DataLoader(
            self.train_set,
            self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            drop_last=True,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )

    def val_dataloader(self) -> list[DataLoader[Any]]:
        """One loader a verification set, in order; without workers, as the pairs are in memory."""
        return [
            DataLoader(
                TensorDataset(
                    pairs.images[0::2],
                    pairs.images[1::2],
                    pairs.same,
                    torch.arange(len(pairs.same)),
                ),
                self.batch_size,
                pin_memory=torch.cuda.is_available(),
            )
            for pairs in self.verify.values()
        ]


class SyntheticData(FaceDataModule):
    """Drawn faces, for a first try without data; verification set ``synthetic``.

    Args:
        num_identities: identities to train on.
        images_per_identity: images of each identity.
        verify_identities: further identities, which only the verification pairs show.
        verify_pairs: number of verification pairs, a multiple of 20; 0 verifies on nothing.
        batch_size, num_workers, seed: see :class:`FaceDataModule`. The faces are the same for
            every seed, so that runs with different seeds compare.
    """

    def __init__(
        self,
        num_identities: int = 1000,
        images_per_identity: int = 20,
        verify_identities: int = 200,
        verify_pairs: int = 1000,
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        self.num_identities, self.images_per_identity = num_identities, images_per_identity
        self.verify_identities, self.verify_pairs = verify_identities, verify_pairs

    def build(self) -> tuple[Dataset[Any], dict[str, VerificationPairs]]:
        train_set = SyntheticFaces(self.num_identities, self.images_per_identity)
        if not self.verify_pairs:
            return train_set, {}
        images, same = synthetic_pairs(
            self.verify_pairs,
            self.verify_identities,
            self.images_per_identity,
            seed=0,
            first_identity=self.num_identities,
        )
        return train_set, {"synthetic": VerificationPairs(images, same, [])}


class FolderData(FaceDataModule):
    """Images in ``<root>/<identity>/<image>``, verified on people held out or on a pairs file.

    Args:
        root: folder that holds the identity folders.
        held_out: share of the identities, in [0, 1), that is not trained on but verified on, as
            the set ``held_out``. Who that is depends on the names alone, so that runs with
            different seeds compare.
        verify_pairs: number of pairs drawn from them, even.
        pairs: an LFW-style pairs file, a verification set named as the file without its suffix.
        pairs_root: folder of its images; None is ``root``.
        min_images: identities with fewer images are not trained on.
        max_bad: images that may prove unreadable before the run stops.
        name: the data set's name, for messages.
        num_identities, num_images: what the whole data set should hold; a warning says if it does
            not.
        batch_size, num_workers, seed: see :class:`FaceDataModule`.
    """

    def __init__(
        self,
        root: str | Path,
        held_out: float = 0.0,
        verify_pairs: int = 3000,
        pairs: str | Path | None = None,
        pairs_root: str | Path | None = None,
        min_images: int = 1,
        max_bad: int = 100,
        name: str = "folder",
        num_identities: int | None = None,
        num_images: int | None = None,
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        if not 0 <= held_out < 1:
            raise ValueError(f"held_out must lie in [0, 1), got {held_out}")
        self.root, self.held_out, self.verify_pairs = Path(root), held_out, verify_pairs
        self.pairs = None if pairs is None else Path(pairs)
        self.pairs_root = self.root if pairs_root is None else Path(pairs_root)
        self.min_images, self.max_bad, self.name = min_images, max_bad, name
        self.num_identities, self.num_images = num_identities, num_images

    def build(self) -> tuple[Dataset[Any], dict[str, VerificationPairs]]:
        expected = _figures(self.num_identities, self.num_images)
        if not self.root.is_dir():
            raise ValueError(
                f"{self.name}: no folder {self.root}; expected"
                f" {self.root}/<identity>/<image>.jpg{expected and f' with {expected}'}"
            )
        kept, held_out = split_identities(identity_names(self.root), self.held_out)
        train_set = IdentityFolder(
            self.root, identities=kept, min_images=self.min_images, max_bad=self.max_bad
        )
        num_identities, num_images = train_set.num_classes, len(train_set)
        verify = {}
        if held_out:
            folder = IdentityFolder(self.root, identities=held_out)
            verify["held_out"] = held_out_pairs(folder, self.verify_pairs)
            num_identities += folder.num_classes
            num_images += len(folder)
        if self.pairs is not None:
            verify[self.pairs.stem.replace(".", "_")] = read_pairs(self.pairs, self.pairs_root)
        found = _figures(
            None if self.num_identities is None else num_identities,
            None if self.num_images is None else num_images,
        )
        if found != expected:
            logger.warning("%s: expected %s in %s, got %s", self.name, expected, self.root, found)
        return train_set, verify


class LFWData(FaceDataModule):
    """LFW View 1: trains on its development people and verifies on its test pairs, ``lfw_view1``.

    Args:
        root: folder with ``images/<name>/<name>_0001.jpg``, aligned, and the benchmark's files
            ``peopleDevTrain.txt`` and ``pairsDevTest.txt``, which share no person.
        max_bad: images that may prove unreadable before the run stops.
        batch_size, num_workers, seed: see :class:`FaceDataModule`.

    References:
        Huang et al., Labeled Faces in the Wild, UMass Amherst technical report 07-49, 2007.
    """

    def __init__(
        self,
        root: str | Path,
        max_bad: int = 100,
        batch_size: int = 128,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        self.root, self.max_bad = Path(root), max_bad

    def build(self) -> tuple[Dataset[Any], dict[str, VerificationPairs]]:
        images, people, pairs = (
            self.root / name for name in ("images", "peopleDevTrain.txt", "pairsDevTest.txt")
        )
        for path in (images, people, pairs):
            if not path.exists():
                raise ValueError(
                    f"lfw: no {path}; expected images/<name>/<name>_0001.jpg, peopleDevTrain.txt"
                    f" and pairsDevTest.txt in {self.root}"
                )
        train_set = IdentityFolder(images, identities=_read_people(people), max_bad=self.max_bad)
        return train_set, {"lfw_view1": read_pairs(pairs, images)}


def split_identities(names: Sequence[str], held_out: float) -> tuple[list[str], list[str]]:
    """Split names at random, but always alike, into (kept, held out), each in the given order.

    Args:
        names: distinct names.
        held_out: share to hold out, in [0, 1).

    Raises:
        ValueError: the share is above 0 and fewer than two would be held out, or none kept.
    """
    count = round(held_out * len(names))
    if held_out and not 2 <= count < len(names):
        raise ValueError(
            f"held_out must leave 1 identity to train on and 2 to verify on,"
            f" got {held_out} of {len(names)}"
        )
    order = np.random.default_rng(0).permutation(len(names))
    kept, taken = np.sort(order[count:]), np.sort(order[:count])
    return [names[i] for i in kept], [names[i] for i in taken]


def _figures(num_identities: int | None, num_images: int | None) -> str:
    figures = {"identities": num_identities, "images": num_images}
    return " and ".join(f"{count:,} {what}" for what, count in figures.items() if count is not None)


def _read_people(file: Path) -> list[str]:
    """Names in an LFW people file: their number, then lines ``name number_of_images``."""
    lines = file.read_text(encoding="utf-8").split("\n")
    names = [line.split()[0] for line in lines[1:] if line.strip()]
    if lines[0].strip() != str(len(names)):
        raise ValueError(f"{file}:1: expected {len(names)}, the people listed, got {lines[0]!r}")
    return names
