"""The order of the training images is a pure function of seed and epoch, and a run knows its place.

A checkpoint holds how many batches of which epoch are done. With the order a pure function, that
is all a resumed run needs to go on with the next image, without fetching those before it.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from .dataset import FaceDataset, collate


def epoch_order(num_samples: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Random permutation of ``range(num_samples)`` that (seed, epoch) alone decides.

    Seed and epoch are hashed together, so that epoch 1 of seed 0 is not epoch 0 of seed 1.

    Raises:
        ValueError: ``seed`` or ``epoch`` is negative.
    """
    if seed < 0:
        raise ValueError(f"seed must be at least 0, got {seed}")
    if epoch < 0:
        raise ValueError(f"epoch must be at least 0, got {epoch}")
    return np.random.default_rng([seed, epoch]).permutation(num_samples)


class EpochSampler(DistributedSampler[Any]):
    """Serve :func:`epoch_order`; of several ranks, each takes every ``num_replicas``-th sample.

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
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        seed: int = 0,
        num_replicas: int | None = None,
        rank: int | None = None,
    ) -> None:
        running = dist.is_available() and dist.is_initialized()
        if num_replicas is None:
            num_replicas = dist.get_world_size() if running else 1
        if rank is None:
            rank = dist.get_rank() if running else 0
        super().__init__(dataset, num_replicas, rank, seed=seed, drop_last=True)
        self.start = 0

    def __iter__(self) -> Iterator[int]:
        order = epoch_order(len(self.dataset), self.seed, self.epoch)  # type: ignore[arg-type]
        return map(int, order[self.rank :: self.num_replicas][self.start : self.num_samples])


class FaceLoader(DataLoader[Any]):
    """Shuffled batches of a :class:`FaceDataset`, resumable at any of them.

    Batches are (images (B, 3, H, W) uint8 RGB, labels (B,) int64), all of ``batch_size``; the
    images' memory is (B, H, W, 3), as they were decoded. Lightning keeps :meth:`state_dict` in its
    checkpoints.

    torchdata's StatefulDataLoader (0.11) is not used: under Lightning, which makes a loader's
    iterator before it sets the epoch, it goes on with the images of epoch 0 in any other one, and
    after a checkpoint at an epoch's end it leaves the next one out; and its checkpoints demand the
    same number of workers. Here two numbers say it all.

    Args:
        dataset: the training set.
        batch_size: images a batch and rank.
        sampler: decides the order.
        num_workers: processes that decode; 0 decodes in the main process.

    Raises:
        ValueError: the training set does not fill one batch.
    """

    sampler: EpochSampler

    def __init__(
        self, dataset: FaceDataset, batch_size: int, sampler: EpochSampler, num_workers: int = 0
    ) -> None:
        if batch_size > len(sampler):
            ranks = f" of each of {sampler.num_replicas} ranks" if sampler.num_replicas > 1 else ""
            raise ValueError(
                f"batch_size {batch_size} is larger than the {len(sampler)} training images{ranks}"
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
        )
        self._epoch = self._batches = 0
        self._resume: dict[str, int] | None = None

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

    def state_dict(self) -> dict[str, int]:
        """The position: batches served of an epoch, and what they are counted in."""
        return {"epoch": self._epoch, "batches": self._batches, **self._units()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go on at a position, once, if the next iteration is of its epoch.

        Raises:
            ValueError: it lies within an epoch of another order.
        """
        if state_dict["batches"] % state_dict["batches_per_epoch"]:
            for name, own in self._units().items():
                if state_dict[name] != own:
                    raise ValueError(
                        f"{name} must be {state_dict[name]}, as in the run whose checkpoint lies"
                        f" within an epoch, got {own}"
                    )
        self._resume = state_dict
        self._epoch, self._batches = state_dict["epoch"], state_dict["batches"]
        self.sampler.set_epoch(state_dict["epoch"])

    def _units(self) -> dict[str, int]:
        return {
            "batch_size": self.batch_size or 1,
            "ranks": self.sampler.num_replicas,
            "images": len(self.sampler.dataset),  # type: ignore[arg-type]
            "seed": self.sampler.seed,
            "batches_per_epoch": len(self),
        }
