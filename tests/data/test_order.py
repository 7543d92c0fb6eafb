"""The order is a permutation, decided by (seed, epoch) alone, and shared fairly among ranks."""

from itertools import chain

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastface_lightning.data import EpochSampler, epoch_order

SEEDS = st.integers(0, 2**63)
EPOCHS = st.integers(0, 10_000)


@given(st.integers(0, 300), SEEDS, EPOCHS)
def test_an_epoch_is_a_permutation_and_pure(num_samples: int, seed: int, epoch: int) -> None:
    order = epoch_order(num_samples, seed, epoch)
    assert sorted(order) == list(range(num_samples))
    assert (order == epoch_order(num_samples, seed, epoch)).all()


@given(SEEDS, EPOCHS)
def test_epochs_and_seeds_differ(seed: int, epoch: int) -> None:
    """The next epoch, the next seed, and what seed + epoch would confuse, are other orders."""
    orders = [
        tuple(epoch_order(100, s, e))
        for s, e in [(seed, epoch), (seed, epoch + 1), (seed + 1, epoch), (seed + 1, epoch + 1)]
    ]
    assert len(set(orders)) == 4


@given(st.integers(1, 200), st.integers(1, 7), SEEDS, EPOCHS)
def test_ranks_share_the_epoch(num_samples: int, replicas: int, seed: int, epoch: int) -> None:
    """Ranks are disjoint, equally long, and together serve all but the indivisible rest."""
    parts = []
    for rank in range(replicas):
        sampler = EpochSampler(range(num_samples), seed, replicas, rank)
        sampler.set_epoch(epoch)
        parts.append(list(sampler))
        assert len(parts[-1]) == len(sampler) == num_samples // replicas
    served = list(chain(*parts))
    assert len(set(served)) == len(served)
    order = epoch_order(num_samples, seed, epoch)
    assert set(served) == set(order[: len(served)])


def test_a_sampler_yields_python_ints_in_the_order() -> None:
    sampler = EpochSampler(range(10), seed=3)
    sampler.set_epoch(2)
    assert list(sampler) == epoch_order(10, 3, 2).tolist()
    assert all(type(i) is int for i in sampler)


def test_an_iterator_keeps_its_epoch() -> None:
    """A prefetching loader may set the next epoch while the last one is being read."""
    sampler = EpochSampler(range(10))
    iterator = iter(sampler)
    sampler.set_epoch(1)
    assert list(iterator) == epoch_order(10, 0, 0).tolist()


@pytest.mark.parametrize(
    ("seed", "epoch", "message"),
    [(-1, 0, "seed must be at least 0, got -1"), (0, -1, "epoch must be at least 0, got -1")],
)
def test_negative_numbers_are_refused(seed: int, epoch: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        epoch_order(10, seed, epoch)


def test_a_rank_beyond_the_replicas_is_refused() -> None:
    with pytest.raises(ValueError, match="rank"):
        EpochSampler(range(10), num_replicas=2, rank=2)
