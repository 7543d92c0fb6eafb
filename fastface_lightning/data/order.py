"""The order of the training images is a pure function of the seed and the epoch."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch.utils.data import Dataset, DistributedSampler


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

    def __iter__(self) -> Iterator[int]:
        order = epoch_order(len(self.dataset), self.seed, self.epoch)  # type: ignore[arg-type]
        return map(int, order[self.rank :: self.num_replicas][: self.num_samples])
