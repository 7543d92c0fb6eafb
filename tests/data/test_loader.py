"""The order is a permutation, decided by (seed, epoch) alone, and shared fairly among ranks."""

from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pixels import Pixels

from fastface_lightning.data import (
    EpochSampler,
    FaceLoader,
    GroupSampler,
    epoch_permutation,
)
from fastface_lightning.data import loader as loader_module

SEEDS = st.integers(0, 2**63)
FEW = settings(deadline=None, max_examples=30)
EPOCHS = st.integers(0, 10_000)


@given(SEEDS, EPOCHS)
def test_epochs_and_seeds_differ(seed: int, epoch: int) -> None:
    """The next epoch, the next seed, and what seed + epoch would confuse, are other orders."""
    orders = [
        tuple(epoch_permutation(100, s, e))
        for s, e in [(seed, epoch), (seed, epoch + 1), (seed + 1, epoch), (seed + 1, epoch + 1)]
    ]
    assert len(set(orders)) == 4


@given(st.integers(1, 200), st.integers(1, 7), SEEDS, EPOCHS)
@FEW
def test_ranks_share_the_epoch(num_samples: int, replicas: int, seed: int, epoch: int) -> None:
    """Ranks are disjoint, equally long, and together serve all but the indivisible rest."""
    parts = []
    for rank in range(replicas):
        sampler = EpochSampler(range(num_samples), seed, replicas, rank)
        sampler.set_epoch(epoch)
        parts.append(list(sampler))
        assert len(parts[-1]) == len(sampler) == num_samples // replicas
        assert all(type(i) is int for i in parts[-1])
    whole = epoch_permutation(num_samples, seed, epoch)
    assert sorted(whole) == list(range(num_samples))
    served = list(chain(*parts))
    assert len(set(served)) == len(served) and set(served) == set(whole[: len(served)])


# Groups of one identity.


LABELS = st.lists(st.integers(0, 12), min_size=2, max_size=60).filter(lambda x: len(set(x)) > 1)
GROUPS = st.fixed_dictionaries(
    {"size": st.integers(2, 5), "by": st.sampled_from(["identities", "images"]), "seed": SEEDS}
)


def groups_of(labels: Any, epoch: int = 0, start: int = 0, **options: Any) -> list[tuple[int, ...]]:
    """The groups that a sampler serves, from the ``start``-th on."""
    sampler = GroupSampler(Pixels(labels), **options)
    sampler.set_epoch(epoch)
    sampler.start = start * sampler.size
    images = list(sampler)
    assert all(type(i) is int for i in images)
    assert len(images) == len(sampler) - sampler.start
    return list(zip(*[iter(images)] * sampler.size, strict=True))


@pytest.fixture(autouse=True, scope="module")
def _small_blocks() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader_module, "BLOCK", 7)  # so that small sets have several
        yield


def plain_groups(labels: list[int], size: int, by: str, seed: int, epoch: int) -> list[list[int]]:
    """All groups of an epoch, one pass and one image after the other."""
    members: dict[int, list[int]] = {}
    for image, label in enumerate(labels):
        members.setdefault(label, []).append(image)
    found: list[list[int]] = []
    block, number = loader_module.BLOCK, 0
    firsts = epoch_permutation(len(labels), seed, epoch).tolist()
    while len(found) < len(labels):
        rng = np.random.default_rng([seed, epoch, number, loader_module.GROUPS])
        if by == "identities":
            groups: list[list[int]] = [[] for _ in members]
            identities = rng.permutation(sorted(members)).tolist()
        else:
            groups = [[image] for image in firsts[number * block :][:block]]
            identities = [labels[image] for (image,) in groups]
        while len(groups[0]) < size:
            for group, identity in zip(groups, identities, strict=True):
                left = [i for i in members[identity] if i not in group] or members[identity]
                group.append(left[rng.integers(len(left))])
        found += groups
        number += 1
    return [tuple(group) for group in found[: len(labels)]]


@given(LABELS, GROUPS, EPOCHS)
@FEW
def test_groups_are_those_of_the_plain_twin(labels: Any, options: Any, epoch: int) -> None:
    assert groups_of(labels, epoch, **options) == plain_groups(labels, epoch=epoch, **options)


@given(LABELS, GROUPS, st.integers(1, 4), EPOCHS, st.data())
@FEW
def test_ranks_share_the_groups_from_any_start(
    labels: Any, options: Any, replicas: int, epoch: int, data: st.DataObject
) -> None:
    whole = groups_of(labels, epoch, **options)
    each = len(whole) // replicas
    for rank in range(replicas):
        start = data.draw(st.integers(0, each))
        part = groups_of(labels, epoch, start, num_replicas=replicas, rank=rank, **options)
        assert part == whole[rank::replicas][start:each]


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0, 1], {"size": 1}, "size must be at least 2"),
        ([0, 1], {"by": "folder"}, "by must be identities or images"),
        ([3, 3], {}, "at least 2 identities, got 1"),
    ],
)
def test_what_makes_no_groups_is_refused(labels: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GroupSampler(Pixels(labels), **{"size": 2, "by": "identities", **options})


# The loader and its place.


def loader_of(
    count: int, batch: int, seed: int = 0, ranks: int = 1, rank: int = 0, epoch: int = 0
) -> FaceLoader:
    dataset = Pixels(range(count))
    loader = FaceLoader(dataset, batch, EpochSampler(dataset, seed, ranks, rank))
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
@FEW
def test_a_run_goes_on_at_any_batch(run: dict[str, int], data: st.DataObject) -> None:
    """Stopped once, and once more after going on, it serves what one run serves."""
    whole = loader_of(**run)
    want = served(whole)
    own = epoch_permutation(run["count"], run["seed"], run["epoch"])[run["rank"] :: run["ranks"]]
    assert list(chain(*want)) == own[: len(want) * run["batch"]].tolist()
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


def test_a_place_is_used_in_its_epoch_alone() -> None:
    loader = loader_of(10, 3)
    batches = iter(loader)
    served([next(batches), next(batches)])
    other = loader_of(10, 3)
    other.load_state_dict(loader.state_dict())
    other.sampler.set_epoch(1)
    assert served(other) == served(loader_of(10, 3, epoch=1))
    other.sampler.set_epoch(0)
    assert len(served(other)) == 3, "it comes back"
    served(batches)  # to the end of the epoch
    other.load_state_dict(loader.state_dict())
    assert served(other) == [] and served(other) == served(loader_of(10, 3))


def test_another_order_is_refused_within_an_epoch_only() -> None:
    loader = loader_of(20, 2)
    batches = iter(loader)
    next(batches)
    others = [
        loader_of(20, 3),
        loader_of(20, 2, ranks=2),
        loader_of(22, 2),
        loader_of(20, 2, seed=1),
    ]
    for other, key in zip(others, ("batch_size", "ranks", "images", "seed"), strict=True):
        with pytest.raises(ValueError, match=f"^{key} must be"):
            other.load_state_dict(loader.state_dict())
        assert len(served(other)) == len(other), "what is refused leaves a trace"
    of_groups = FaceLoader(loader.dataset, 4, GroupSampler(loader.dataset, 2, "images"))
    with pytest.raises(ValueError, match=r"order must be 1 of images.*got 2 of images$"):
        of_groups.load_state_dict(loader.state_dict())
    served(batches)
    for other in others:
        other.load_state_dict(loader.state_dict())
        other.sampler.set_epoch(1)
        assert len(served(other)) == len(other)


def test_what_replaces_a_broken_image_keeps_its_own_label() -> None:
    dataset = Pixels(np.arange(40) // 4)
    dataset.broken = 7  # the last of identity 1; image 8 is of identity 2
    for images, labels in FaceLoader(dataset, 10, GroupSampler(dataset, 2, "images")):
        assert torch.equal(labels, images[:, 0, 0, 0].long() // 4)


def test_batches_are_filled_and_hold_whole_groups() -> None:
    dataset = Pixels(np.arange(40) // 4)
    for batch, ranks, message in (
        (63, 2, "larger than the 20 groups of 3 training images of each of 2 ranks"),
        (7, 1, "a multiple of 3"),
    ):
        with pytest.raises(ValueError, match=message):
            FaceLoader(dataset, batch, GroupSampler(dataset, 3, "images", 0, ranks, 0))
    with pytest.raises(ValueError, match="batch_size 4 is larger than the 3 training images of"):
        loader_of(9, 4, ranks=3)
