"""The order of the training images is a pure function of seed and epoch, and a run knows its place.

So how many batches of which epoch are done is all that a checkpoint must hold for a run to go on
with the next image, without fetching those before it.
"""

import signal
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from .datasets.base import FaceDataset, collate

BLOCK = 2**16  # groups sampled at a time, where their first images are given
WORKER_SECONDS = 20  # that a worker lives on after SIGTERM
GROUPS = 0x67726F75  # no other seed of the project ends in this word, nor in a padding zero


def epoch_permutation(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Random permutation of ``range(num_samples)`` that (seed, epoch), both at least 0, decide.

    Seed and epoch are hashed together, so that epoch 1 of seed 0 is not epoch 0 of seed 1.
    """
    return np.random.default_rng([seed, epoch]).permutation(num_samples)


class EpochSampler(DistributedSampler[Any]):
    """Serve :func:`epoch_permutation`; each of several ranks takes every ``num_replicas``-th of it.

    The samples that do not divide evenly are left out, others in every epoch, so that all ranks
    take equally many steps and no sample is seen twice. Being a DistributedSampler, Lightning
    calls its ``set_epoch`` at the start of an epoch and keeps it under any strategy.

    Args:
        dataset: what is sampled; only its length matters.
        seed: at least 0; equal on all ranks.
        num_replicas: number of ranks; None asks torch.distributed, 1 where that does not run.
        rank: in [0, num_replicas); None asks torch.distributed.

    Attributes:
        start: samples of this rank that the next iteration leaves out at the beginning.
        size: samples that belong together and are never parted.
        by: what is in random order.
    """

    size = 1
    by = "images"

    def __init__(
        self,
        dataset: Dataset[Any],
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            num_replicas = 1 if num_replicas is None else num_replicas
            rank = 0 if rank is None else rank
        super().__init__(dataset, num_replicas, rank, seed=seed, drop_last=True)
        self.start = 0

    def __iter__(self) -> Iterator[int]:
        whole = epoch_permutation(len(self.dataset), self.seed, self.epoch)  # type: ignore[arg-type]
        return map(int, whole[self.rank :: self.num_replicas][self.start : self.num_samples])


class GroupSampler(EpochSampler):
    """Serve groups of ``size`` images of one identity, flat: one group after the other.

    An epoch has as many groups as the data set has images, so that a loader of groups is as long
    as one of as many images a batch. Ranks share groups as they share images.

    The images of a group are different ones as long as its identity has so many, and sampled from
    all of its images beyond that: an identity's only image is served ``size`` times.

    Groups are sampled a pass or :data:`BLOCK` at a time, each from a generator of its own, so that
    no place in an epoch needs those before it.

    Args:
        dataset: what is sampled; only its labels matter, in any order.
        size: images of a group, at least 2.
        by: ``"identities"``: all identities in random order, in another one when they are through,
            and so on; every image of a group is sampled. ``"images"``: all images in
            :func:`epoch_permutation`, each the first of a group whose others are sampled.
        seed, num_replicas, rank: see :class:`EpochSampler`.

    Attributes:
        start: a multiple of ``size``; see :class:`EpochSampler`.
        counts: (C,) int64, the number of each identity's images.

    Raises:
        ValueError: ``size`` is below 2, ``by`` is neither, or there are not two identities.

    References:
        Wang et al., An Efficient Training Approach for Very Large Scale Face Recognition, CVPR 2022
        (arXiv 2105.10375): the identity loader, two images by identities. AttFC: Attention
        Fully-Connected Layer for Large-Scale Face Recognition with One GPU, 2025 (arXiv
        2503.06839): a query and its keys, by images.

    Example:
        >>> pairs = GroupSampler(faces, 2, "identities")
        >>> loader = FaceLoader(faces, 2 * 128, pairs)  # 128 identities a batch
    """

    def __init__(
        self,
        dataset: FaceDataset,
        size: int,
        by: Literal["identities", "images"],
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        if size < 2:
            raise ValueError(f"size must be at least 2 images of one identity, got {size}")
        if by not in ("identities", "images"):
            raise ValueError(f"by must be identities or images, got {by!r}")
        super().__init__(dataset, seed, num_replicas, rank)
        self.size, self.by = size, by
        self.num_samples *= size
        self._labels = dataset.labels  # (N,)
        self.counts = np.bincount(self._labels)
        self._present = np.flatnonzero(self.counts)
        count = len(self._present)
        if count < 2:
            raise ValueError(f"the identity loader needs at least 2 identities, got {count}")
        # The images of identity c, ascending, are sorted[begins[c] : begins[c] + counts[c]].
        self._sorted = np.argsort(self._labels, kind="stable")
        self._begins = self.counts.cumsum() - self.counts

    def __iter__(self) -> Iterator[int]:
        return self._serve(self.epoch, self.start // self.size)

    def _serve(self, epoch: int, start: int) -> Iterator[int]:
        """Images of this rank's groups, from the ``start``-th on."""
        firsts = None
        if self.by == "images":
            firsts = epoch_permutation(len(self._labels), self.seed, epoch)
        length = len(self._present) if firsts is None else BLOCK
        end = self.num_samples // self.size * self.num_replicas
        group = self.rank + start * self.num_replicas  # among those of all ranks
        while group < end:
            number, skipped = divmod(group, length)
            rng = np.random.default_rng([self.seed, epoch, number, GROUPS])
            if firsts is None:
                identities = rng.permutation(self._present)
                begun = np.empty((0, length), np.int64)
            else:
                begun = firsts[None, number * length : (number + 1) * length]
                identities = self._labels[begun[0]]
            block = self._fill(rng, identities, begun)
            of_rank = block[skipped : end - number * length : self.num_replicas]
            group += len(of_rank) * self.num_replicas
            yield from map(int, of_rank.ravel())

    def _fill(
        self, rng: np.random.Generator, identities: NDArray[Any], groups: NDArray[np.int64]
    ) -> NDArray[np.int64]:
        """(G, size) images of the identities, (G,), whose first n images are groups (n, G)."""
        begins, counts = self._begins[identities], self.counts[identities]
        for n in range(len(groups), self.size):
            fresh = counts > n  # the identity has images that its group has not
            place = begins + rng.integers(np.where(fresh, counts - n, counts))
            for taken in np.sort(groups, axis=0):  # a place among those not taken: count on
                place += fresh & (self._sorted[place] >= taken)
            groups = np.vstack([groups, self._sorted[place]])
        return groups.T


def ignore_signals(_: int) -> None:
    """What ends a program is its main process's business: its workers end with it, in silence, or
    some seconds after they were told to, should it not end them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(WORKER_SECONDS))


class FaceLoader(DataLoader[Any]):
    """Shuffled batches of a :class:`FaceDataset`, resumable at any of them.

    Batches are (images (B, 3, H, W) uint8 RGB, labels (B,) int64), all of ``batch_size``; the
    images' memory is (B, H, W, 3), as they were decoded. Groups of a :class:`GroupSampler` lie one
    after the other, so an unreadable image's replacement keeps its own label. Lightning keeps
    :meth:`state_dict` in its checkpoints. (torchdata's StatefulDataLoader 0.11 resumes with epoch
    0's images in any epoch, as Lightning sets the epoch once the iterator is made.)

    Args:
        dataset: the training set.
        batch_size: images a batch and rank, a multiple of the sampler's ``size``.
        sampler: decides the order.
        num_workers: processes that decode; 0 decodes in the main process.

    Raises:
        ValueError: the training set does not fill one batch, or a batch parts a group.
    """

    sampler: EpochSampler

    def __init__(
        self, dataset: FaceDataset, batch_size: int, sampler: EpochSampler, num_workers: int = 0
    ) -> None:
        size = sampler.size
        if batch_size % size:
            raise ValueError(f"batch_size must be a multiple of {size} images, got {batch_size}")
        if batch_size > len(sampler):
            what = "training images" if size == 1 else f"groups of {size} training images"
            raise ValueError(
                f"batch_size {batch_size // size} is larger than the {len(sampler) // size} {what}"
                f" of each of {sampler.num_replicas} ranks"
            )
        super().__init__(
            dataset,
            batch_size,
            sampler=sampler,
            num_workers=num_workers,
            collate_fn=collate,
            drop_last=True,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=num_workers > 0,
            worker_init_fn=ignore_signals,
        )
        self._epoch = self._batches = 0
        self._resume: dict[str, Any] | None = None

    def __iter__(self) -> Any:
        # A generator starts at its first batch: Lightning makes the iterator, then sets the epoch.
        resume, self._resume = self._resume, None
        self._epoch, self._batches = self.sampler.epoch, 0
        if resume and resume["epoch"] == self._epoch:
            self._batches = resume["batches"]
        self.sampler.start = self._batches * (self.batch_size or 1)
        for batch in super().__iter__():
            self._batches += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """The position: batches served of an epoch, and what they are counted in."""
        size = self.sampler.size
        return {
            "epoch": self._epoch,
            "batches": self._batches,
            "order": f"{size} of {self.sampler.by}",
            "batch_size": (self.batch_size or 1) // size,
            "ranks": self.sampler.num_replicas,
            "images": len(self.sampler.dataset),  # type: ignore[arg-type]
            "seed": self.sampler.seed,
            "batches_per_epoch": len(self),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on at a position, once, if the next iteration is of its epoch.

        Raises:
            ValueError: it lies within an epoch of another order.
        """
        if state_dict["batches"] % state_dict["batches_per_epoch"]:
            for name, value in self.state_dict().items():
                if name not in ("epoch", "batches") and state_dict[name] != value:
                    raise ValueError(
                        f"{name} must be {state_dict[name]}, as in the run whose checkpoint lies"
                        f" within an epoch, got {value}"
                    )
        self._resume = state_dict
        self._epoch, self._batches = state_dict["epoch"], state_dict["batches"]
        self.sampler.set_epoch(state_dict["epoch"])
