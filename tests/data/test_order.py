"""The order is a permutation, decided by (seed, epoch) alone, and shared fairly among ranks."""

from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastface_lightning.data import EpochSampler, FaceDataset, FaceLoader, epoch_order

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


# The loader and its place.


class Numbered(FaceDataset):
    """Image i is of identity i, and its pixels are bytes of i."""

    def __init__(self, count: int) -> None:
        super().__init__(size=1, max_bad=0)
        self._hold([str(i) for i in range(count)], np.arange(count, dtype=np.int32))

    def _fetch(self, index: int) -> bytes:
        return bytes([index % 256])

    def name(self, index: int) -> str:
        return str(index)

    def read_into(self, index: int, out: np.ndarray) -> None:
        out[:] = self._fetch(index)[0]

    def __str__(self) -> str:
        return "numbers"


def loader_of(
    count: int,
    batch: int,
    seed: int = 0,
    ranks: int = 1,
    rank: int = 0,
    epoch: int = 0,
    **options: Any,
) -> FaceLoader:
    dataset = Numbered(count)
    loader = FaceLoader(dataset, batch, EpochSampler(dataset, seed, ranks, rank), **options)
    loader.sampler.set_epoch(epoch)
    return loader


def served(batches: Any) -> list[list[int]]:
    """The numbers of the images, batch by batch."""
    result = []
    for images, labels in batches:
        assert (images[:, 0, 0, 0].long() == labels % 256).all()
        result.append(labels.tolist())
    return result


@st.composite
def runs(draw: st.DrawFn) -> dict[str, int]:
    batch, ranks = draw(st.integers(1, 6)), draw(st.integers(1, 4))
    return {
        "count": draw(st.integers(batch * ranks, 60 + batch * ranks)),
        "batch": batch,
        "ranks": ranks,
        "rank": draw(st.integers(0, ranks - 1)),
        "seed": draw(st.integers(0, 2**40)),
        "epoch": draw(st.integers(0, 50)),
    }


@given(runs(), st.data())
@settings(deadline=None)
def test_a_run_goes_on_at_any_batch(run: dict[str, int], data: st.DataObject) -> None:
    """Stopped once, and once more after going on, it serves what one run serves."""
    whole = loader_of(**run)
    want = served(whole)
    order = epoch_order(run["count"], run["seed"], run["epoch"])[run["rank"] :: run["ranks"]]
    assert list(chain(*want)) == order[: len(want) * run["batch"]].tolist()
    assert len(want) == len(whole) == run["count"] // run["ranks"] // run["batch"]

    got: list[list[int]] = []
    state = None
    for stop in sorted(data.draw(st.lists(st.integers(0, len(want)), min_size=1, max_size=2))):
        loader = loader_of(**{**run, "epoch": 0})
        if state:
            loader.load_state_dict(state)
            assert loader.state_dict() == state, "a place that is not yet used is kept"
        loader.sampler.set_epoch(run["epoch"])
        batches = iter(loader)
        while len(got) < stop:
            got += served([next(batches)])
        if stop:
            state = loader.state_dict()
            assert state["epoch"] == run["epoch"] and state["batches"] == stop
    last = loader_of(**run)
    if state:
        last.load_state_dict(state)
    assert got + served(last) == want
    assert served(last) == want, "the place is used once"


def test_workers_go_on_too() -> None:
    want = served(loader_of(40, 3, epoch=2))
    loader = loader_of(40, 3, epoch=2, num_workers=2)
    batches = iter(loader)
    got = served([next(batches) for _ in range(4)])
    state = loader.state_dict()  # though workers are batches ahead
    batches.close()
    other = loader_of(40, 3, num_workers=2)
    other.load_state_dict(state)
    assert got + served(other) == want
    other.sampler.set_epoch(3)  # the workers stay for the next epoch
    assert served(other) == served(loader_of(40, 3, epoch=3))


def test_a_state_is_plain_data() -> None:
    loader = loader_of(10, 3)
    next(iter(loader))
    state = loader.state_dict()
    assert all(type(key) is str and type(value) is int for key, value in state.items())
    assert state == {
        "epoch": 0, "batches": 1, "batch_size": 3, "ranks": 1, "images": 10, "seed": 0,
        "batches_per_epoch": 3,
    }  # fmt: skip


def test_a_place_in_another_epoch_is_ignored() -> None:
    loader = loader_of(10, 2)
    batches = iter(loader)
    served([next(batches), next(batches)])
    other = loader_of(10, 2)
    other.load_state_dict(loader.state_dict())
    other.sampler.set_epoch(1)
    assert served(other) == served(loader_of(10, 2, epoch=1))
    other.sampler.set_epoch(0)
    assert len(served(other)) == 5, "and does not come back"


def test_a_finished_epoch_has_nothing_left() -> None:
    loader = loader_of(10, 3)
    served(loader)
    other = loader_of(10, 3)
    other.load_state_dict(loader.state_dict())
    assert served(other) == []
    other.sampler.set_epoch(1)
    assert served(other) == served(loader_of(10, 3, epoch=1))


def test_without_a_state_every_iteration_is_whole() -> None:
    loader = loader_of(10, 3)
    batches = iter(loader)
    next(batches)
    assert served(loader) == served(loader) == served(loader_of(10, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 3}, "batch_size must be 2, .*got 3"),
        ({"ranks": 2}, "ranks must be 1, .*got 2"),
        ({"count": 22}, "images must be 20, .*got 22"),
        ({"seed": 1}, "seed must be 0, .*got 1"),
    ],
)
def test_another_order_is_refused_within_an_epoch_only(
    change: dict[str, int], message: str
) -> None:
    run = {"count": 20, "batch": 2}
    loader = loader_of(**run)
    batches = iter(loader)
    next(batches)
    other = loader_of(**{**run, **change})
    with pytest.raises(ValueError, match=f"^{message.replace(', .*', ', as in the run .*')}$"):
        other.load_state_dict(loader.state_dict())
    assert len(served(other)) == len(other), "what is refused leaves no trace"
    served(batches)
    other.load_state_dict(loader.state_dict())
    other.sampler.set_epoch(1)
    assert len(served(other)) == len(other)


@given(runs())
@settings(deadline=None, max_examples=30)
def test_ranks_take_equally_many_steps_and_share_nothing(run: dict[str, int]) -> None:
    parts = [served(loader_of(**{**run, "rank": rank})) for rank in range(run["ranks"])]
    assert len({len(part) for part in parts}) == 1
    numbers = list(chain(*chain(*parts)))
    assert len(set(numbers)) == len(numbers)
    assert run["count"] - len(numbers) < run["batch"] * run["ranks"] + run["ranks"]


@pytest.mark.parametrize(
    ("count", "ranks", "message"),
    [
        (3, 1, "batch_size 4 is larger than the 3 training images"),
        (9, 3, "batch_size 4 is larger than the 3 training images of each of 3 ranks"),
    ],
)
def test_a_set_smaller_than_a_batch_is_refused(count: int, ranks: int, message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        loader_of(count, 4, ranks=ranks)


def test_batches_are_bytes_and_whole_numbers() -> None:
    images, labels = next(iter(loader_of(10, 4)))
    assert images.dtype == torch.uint8 and images.shape == (4, 3, 1, 1)
    assert labels.dtype == torch.int64 and labels.shape == (4,)
