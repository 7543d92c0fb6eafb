"""The dynamic class pool against a plain transcription of the paper's release, and its promises."""

import copy
import random
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import HardNegatives
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import on_two_ranks
from torch import Tensor, nn
from torch.nn import functional as F

from fastface_lightning.classifiers import DynamicClassPool
from fastface_lightning.margins import (
    AdaFace,
    ArcFace,
    Combined,
    CosFace,
    CurricularFace,
    ElasticFace,
    MagFace,
    Margin,
    Softmax,
)

D, PIXELS = 16, 12
Batch = dict[str, tuple[Tensor, Tensor]]


class Plain:
    """F2C one identity, one image and one row at a time; the pool is copied to be rolled back."""

    def __init__(self, pool: DynamicClassPool, gallery: nn.Module) -> None:
        self.margin, self.scale, self.k = copy.deepcopy(pool.margin), pool.scale, pool.hardest
        self.queue, self.gallery = pool.queue.clone(), copy.deepcopy(gallery)
        self.slots: OrderedDict[int, int] = OrderedDict()  # least recently written first
        self.next_row = [0] * pool.pool_size

    def step(self, probe: nn.Module, batch: Batch) -> Tensor:
        (pairs, of_pairs), (images, labels) = batch["identity"], batch["instance"]
        half = len(images) // 2
        x = [*pairs[0::2], *images[:half]], [*of_pairs[0::2].tolist(), *labels[:half].tolist()]
        y = [*pairs[1::2], *images[half:]], [*of_pairs[1::2].tolist(), *labels[half:].tolist()]
        kept = self.queue.clone(), OrderedDict(self.slots), list(self.next_row)
        first = self.half(probe, x, y)
        self.queue, self.slots, self.next_row = kept
        return first + self.half(probe, y, x)

    def half(self, probe: nn.Module, seen: Any, written: Any) -> Tensor:
        self.queue, present = self.queue.clone(), set()
        with torch.no_grad():
            features = F.normalize(self.gallery(torch.stack(written[0])))
        for feature, identity in zip(features, written[1], strict=True):
            if identity in self.slots:
                slot = self.slots[identity]
                present.add(slot)
                row = self.next_row[slot]
            else:
                if len(self.slots) < len(self.next_row):
                    slot = len(self.slots)
                else:
                    _, slot = self.slots.popitem(last=False)
                row = 0
            self.slots[identity] = slot
            self.slots.move_to_end(identity)
            self.next_row[slot] = 1 - row
            self.queue[row, slot] = feature
        second = self.queue[0].clone()
        for slot in present:
            second[slot] = self.queue[1, slot]
        embeddings = probe(torch.stack(seen[0]))
        return self.loss(embeddings, seen[1], [self.queue[0], second])

    def loss(self, embeddings: Tensor, labels: list[int], centres: list[Tensor]) -> Tensor:
        inside = [i for i, label in enumerate(labels) if label in self.slots]
        x = F.normalize(embeddings)
        losses, hard = [], []
        own = torch.tensor([self.slots[labels[i]] for i in inside])
        target = torch.cat([(x[inside] * w[own]).sum(1) for w in centres])
        norm = embeddings[inside].norm(dim=1).repeat(2)
        label = torch.tensor([labels[i] for i in inside]).repeat(2)
        after = self.margin(target, norm, label)
        costs = self.margin.penalty(norm)
        for row, w in enumerate(centres):
            for place, i in enumerate(inside):
                n = row * len(inside) + place
                cos = (w @ x[i])[None]
                logits = self.margin.negatives(cos, target[n : n + 1], after[n : n + 1])[0]
                others = torch.cat([logits[: own[place]], logits[own[place] + 1 :]])
                all_logits = self.scale * torch.cat([after[n : n + 1], others])
                losses.append(-all_logits.log_softmax(0)[0] + costs[n])
            for i in range(len(labels)):
                if i not in inside:
                    hard.append((w @ x[i]).sort(descending=True).values[: self.k].clamp(min=0))
        total = 2 * torch.stack(losses).mean()
        return total + 2 * torch.stack(hard).mean() if hard else total


def faces(identities: int, count: int, generator: torch.Generator) -> Tensor:
    return torch.randn(identities, count, PIXELS, dtype=torch.float64, generator=generator)


def make_batch(images: Tensor, batch_size: int, generator: torch.Generator) -> Batch:
    """Different identities with two images each, and images drawn at random; some repeat."""
    identities, count = images.shape[:2]
    ids = torch.randperm(identities, generator=generator)[:batch_size]
    if batch_size > 2 and random.random() < 0.3:
        ids[0] = ids[1]
    pairs = torch.stack([images[ids, 0], images[ids, 1]], 1).flatten(0, 1)
    some = torch.randint(identities, (batch_size + 1,), generator=generator)
    of_them = torch.randint(count, (len(some),), generator=generator)
    return {
        "identity": (pairs, ids.repeat_interleave(2)),
        "instance": (images[some, of_them], some),
    }


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(PIXELS, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, D))


def follow_steps(margin: Margin, steps: int, identities: int = 60, pool_size: int = 23) -> None:
    """Train the probe net under the pool, and ask the plain twin for the same losses."""
    generator = torch.Generator().manual_seed(0)
    random.seed(0)
    probe = network().double()
    pool = DynamicClassPool(identities, D, margin, scale=16.0, pool_size=pool_size).double()
    pool.follow(probe)
    plain = Plain(pool, probe)
    images = faces(identities, 4, generator)
    outside = 0.0
    for step in range(steps):
        batch = make_batch(images, random.randint(2, 9), generator)
        pool.update_momentum_encoder(probe)
        with torch.no_grad():
            for slow, fast in zip(plain.gallery.parameters(), probe.parameters(), strict=True):
                slow.copy_(0.99 * slow + 0.01 * fast)
        probe.zero_grad()
        # Batch norms of the probe net see every batch twice here; its training mode reads none.
        expected = plain.step(probe, batch)
        expected.backward()
        wanted = [p.grad.clone() for p in probe.parameters() if p.grad is not None]
        probe.zero_grad()
        loss = pool.training_loss(probe, batch)
        loss.backward()
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
        for p, grad in zip(probe.parameters(), wanted, strict=True):
            torch.testing.assert_close(p.grad, grad, rtol=0, atol=1e-10)
        torch.testing.assert_close(pool.queue, plain.queue, rtol=0, atol=1e-10)
        state = [[i, s, plain.next_row[s]] for i, s in plain.slots.items()]
        assert pool.slots.to_tensor().T.tolist()[: len(state)] == state
        with torch.no_grad():
            for p in probe.parameters():
                p -= 0.01 * p.grad if step % 50 else 0 * p
        outside += 1 - pool.in_pool
    assert 0.02 < outside / steps < 0.9  # both kinds of images were there


@pytest.mark.slow
def test_a_thousand_steps_as_the_transcription() -> None:
    follow_steps(CosFace(0.4), 1000)


@pytest.mark.parametrize(
    "margin",
    [
        Softmax(),
        ArcFace(),
        Combined(0.9, 0.4, 0.15),
        AdaFace(),
        MagFace(l_a=2.0, u_a=12.0),
        CurricularFace(),
        HardNegatives(),
    ],
    ids=lambda margin: type(margin).__name__,
)
def test_every_margin_as_the_transcription(margin: Margin) -> None:
    follow_steps(margin, 20)


def test_a_drawn_margin_is_drawn_for_each_row() -> None:
    generator = torch.Generator().manual_seed(0)
    pool, probe = DynamicClassPool(60, D, ElasticFace(), pool_size=23).double(), network().double()
    batch = make_batch(faces(60, 4, generator), 6, generator)
    torch.manual_seed(5)
    first = copy.deepcopy(pool).training_loss(probe, batch)
    torch.manual_seed(5)
    assert torch.equal(first, copy.deepcopy(pool).training_loss(probe, batch))
    assert not torch.equal(first, pool.training_loss(probe, batch))


@given(st.data())
@settings(max_examples=30, deadline=None)
def test_a_saved_pool_goes_on_as_if_it_had_not_been(data: st.DataObject) -> None:
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    images = faces(30, 3, generator)
    batches = [make_batch(images, 5, generator) for _ in range(data.draw(st.integers(2, 12)))]
    probe, pool = network().double(), DynamicClassPool(30, D, pool_size=13).double()
    pool.follow(probe)
    stop = data.draw(st.integers(1, len(batches) - 1))
    for batch in batches[:stop]:
        pool.training_loss(probe, batch)
    other = DynamicClassPool(30, D, pool_size=13).double()
    other.follow(network().double())
    other.load_state_dict(copy.deepcopy(pool.state_dict()))
    twin = copy.deepcopy(probe)
    for batch in batches[stop:]:
        assert torch.equal(pool.training_loss(probe, batch), other.training_loss(twin, batch))
    for mine, its in zip(pool.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(mine, its)


def test_a_checkpoint_is_plain_tensors(tmp_path: Path) -> None:
    pool = DynamicClassPool(30, D, pool_size=13)
    pool.follow(network())
    torch.save(pool.state_dict(), tmp_path / "pool.pt")
    loaded = torch.load(tmp_path / "pool.pt", weights_only=True)
    assert all(isinstance(value, Tensor) for value in loaded.values())


def test_the_gallery_net_follows_parameters_and_batch_statistics() -> None:
    probe = network()
    pool = DynamicClassPool(30, D, pool_size=13, momentum=0.9)
    pool.follow(probe)
    with torch.no_grad():
        for p in (*probe.parameters(), probe[1].running_mean, probe[1].running_var):
            p += 1
    before = copy.deepcopy(pool.momentum_encoder)
    pool.update_momentum_encoder(probe)
    assert isinstance(before, nn.Sequential) and pool.momentum_encoder is not None
    for name, value in pool.momentum_encoder.state_dict().items():
        if value.is_floating_point():
            moved = 0.9 * before.state_dict()[name] + 0.1 * probe.state_dict()[name]
            torch.testing.assert_close(value, moved)
    assert not any(p.requires_grad for p in pool.parameters())


def test_no_gradient_reaches_gallery_net_or_pool() -> None:
    generator = torch.Generator().manual_seed(0)
    probe, pool = network().double(), DynamicClassPool(60, D, pool_size=23).double()
    loss = pool.training_loss(probe, make_batch(faces(60, 4, generator), 6, generator))
    loss.backward()
    assert all(p.grad is not None for p in probe.parameters())
    assert all(p.grad is None for p in pool.parameters()) and not pool.queue.requires_grad


def test_the_loss_is_float32_under_autocast() -> None:
    generator = torch.Generator().manual_seed(0)
    probe, pool = network(), DynamicClassPool(60, D, pool_size=23)
    batch = make_batch(faces(60, 4, generator).float(), 6, generator)
    batch = {name: (images.float(), labels) for name, (images, labels) in batch.items()}
    with torch.autocast("cpu", torch.bfloat16):
        loss = pool.training_loss(probe, batch)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in probe.parameters())


def test_a_scaled_gradient_of_half_precision_embeddings_is_not_lost() -> None:
    """A loss scaler's factor comes before the rounding to float16, not after."""
    torch.manual_seed(0)
    pool = DynamicClassPool(60, D, Softmax(), scale=16.0, pool_size=23)
    ids = torch.arange(4).repeat_interleave(2)
    features = F.one_hot(ids, D).float() + 0.02 * torch.randn(8, D)  # well fitted: a small loss
    grads = []
    for dtype in (torch.float16, torch.float32):
        x = features.half().to(dtype).requires_grad_()
        batch = {"identity": (x, ids), "instance": (x[:2], ids[:2])}
        (65536 * copy.deepcopy(pool).training_loss(nn.Identity(), batch)).backward()
        assert x.grad is not None
        grads.append(x.grad.float())
    assert (grads[0] == 0).float().mean() < 0.1
    torch.testing.assert_close(*grads, rtol=2e-2, atol=1e-2 * grads[1].abs().max().item())


def test_labels_of_any_tensor_class_are_looked_at() -> None:
    class Labels(Tensor):
        pass

    generator = torch.Generator().manual_seed(0)
    batch = make_batch(faces(60, 4, generator), 6, generator)
    own = {name: (images, labels.as_subclass(Labels)) for name, (images, labels) in batch.items()}
    pools = [DynamicClassPool(60, D, pool_size=23).double() for _ in range(2)]
    probe = network().double()
    losses = [pool.training_loss(probe, b) for pool, b in zip(pools, (batch, own), strict=True)]
    assert losses[0].item() == losses[1].item()
    assert torch.equal(pools[0].slots.to_tensor(), pools[1].slots.to_tensor())


def test_the_filter_holds_outside_the_pool_too() -> None:
    """A stranger much like somebody in the pool, perhaps the same person, is left alone."""
    ids, strangers = torch.tensor([0, 0]), torch.tensor([50, 51])
    images = torch.eye(D)[[0, 0]]
    x = (torch.eye(D)[[0, 0]] + 0.5 * torch.eye(D)[[1, 2]]).requires_grad_()  # cosine 0.89
    batch = {"identity": (images, ids), "instance": (x, strangers)}
    towards = []
    for threshold in (None, 0.4):
        pool = DynamicClassPool(60, D, pool_size=23, interclass_filter=threshold)
        x.grad = None
        pool.training_loss(nn.Identity(), batch).backward()
        assert x.grad is not None and pool.in_pool == 0.5
        towards.append(x.grad[:, 0])
    assert (towards[0] > 0.02).all()  # away from the person in the pool
    assert (towards[1] < towards[0] / 2).all()


def test_the_share_in_the_pool_is_that_of_both_halves() -> None:
    pool = DynamicClassPool(60, D, pool_size=23)
    ids = torch.arange(4).repeat_interleave(2)
    x = torch.randn(8, D, requires_grad=True)
    batch = {"identity": (x, ids), "instance": (x, torch.tensor([30, 31, 32, 33, 0, 1, 2, 3]))}
    pool.training_loss(nn.Identity(), batch)
    assert pool.in_pool == pytest.approx((4 / 8 + 8 / 8) / 2)


def test_two_ranks_write_the_same_pool(tmp_path: Path) -> None:
    def check(rank: int) -> None:
        generator = torch.Generator().manual_seed(rank)
        images = faces(60, 4, torch.Generator().manual_seed(9))
        probe = nn.Linear(PIXELS, D).double()
        nn.init.eye_(probe.weight)
        pool = DynamicClassPool(60, D, pool_size=40).double()
        for _ in range(5):
            pool.training_loss(probe, make_batch(images, 6, generator))
        states = [torch.empty_like(pool.queue) for _ in range(2)]
        dist.all_gather(states, pool.queue)
        assert torch.equal(*states)
        slots = [torch.empty_like(pool.slots.to_tensor()) for _ in range(2)]
        dist.all_gather(slots, pool.slots.to_tensor())
        assert torch.equal(*slots)
        assert len(set(slots[0][0].tolist())) > 15  # identities of both

    on_two_ranks(check, tmp_path)


@pytest.mark.parametrize(
    ("settings", "slots"),
    [
        ({}, 600),
        ({"pool_size": 700}, 700),
        ({"pool_size": 0.01}, 60),
        ({"pool_size": 1.0}, 6000),
        ({"pool_size": 1}, 1),
    ],
)
def test_slots(settings: dict[str, float], slots: int) -> None:
    pool = DynamicClassPool(6000, D, **settings)
    assert pool.pool_size == slots and pool.queue.shape == (2, slots, D)


def test_the_default_pool_of_few_identities_holds_them_all() -> None:
    assert DynamicClassPool(100, D).pool_size == 100
    assert DynamicClassPool(2000, D).pool_size == 512


@pytest.mark.parametrize(("slots", "k"), [(2, 2), (5000, 3), (20_000, 4), (90_000, 10)])
def test_hardest(slots: int, k: int) -> None:
    assert DynamicClassPool(100_000, 2, pool_size=slots).hardest == k


class Learned(CosFace):
    def __init__(self) -> None:
        super().__init__()
        self.by = nn.Parameter(torch.zeros(1))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DynamicClassPool(9, D, pool_size=10), "at most the 9 identities, got 10"),
        (lambda: DynamicClassPool(9, D, pool_size=0), r"at least 1, or a share .* got 0"),
        (lambda: DynamicClassPool(9, D, pool_size=0.01), r"in \(0, 1\] that makes one, got 0.01"),
        (lambda: DynamicClassPool(9, D, pool_size=2.5), r"number of slots, .* got 2.5"),
        (lambda: DynamicClassPool(9, D, pool_size=-0.5), r"number of slots, .* got -0.5"),
        (lambda: DynamicClassPool(9, D, pool_size=True), r"number of slots, .* got True"),
        (lambda: DynamicClassPool(9, D, momentum=1.0), r"a number in \[0, 1\), got 1.0"),
        (lambda: DynamicClassPool(9, D, momentum="no"), r"a number in \[0, 1\), got no"),
        (lambda: DynamicClassPool(9, D, pool_size=float("inf")), r"number of slots, .* got inf"),
        (lambda: DynamicClassPool(9, D, pool_size=float("nan")), r"number of slots, .* got nan"),
        (lambda: DynamicClassPool(9, D, Learned()), r"nothing to learn \(Softmax, ArcFace, .*Curr"),
    ],
)
def test_bad_arguments(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_a_pool_smaller_than_the_identities_of_a_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    batch = make_batch(faces(60, 4, generator), 6, generator)
    pool = DynamicClassPool(60, D, pool_size=8).double()
    before = pool.queue.clone()
    with pytest.raises(ValueError, match=r"pool_size must be at least the 10 identities .* got 8"):
        pool.training_loss(network().double(), batch)
    assert torch.equal(pool.queue, before)


def test_batches_of_another_kind() -> None:
    pool = DynamicClassPool(60, D)
    with pytest.raises(ValueError, match=r"a dict of instance and identity, .* got tuple"):
        pool.training_loss(network(), (torch.zeros(2, PIXELS), torch.zeros(2)))
    with pytest.raises(ValueError, match="got identity"):
        pool.training_loss(network(), {"identity": (torch.zeros(2, PIXELS), torch.zeros(2))})
    ids = torch.tensor([60, 60])
    with pytest.raises(ValueError, match=r"must lie in \[0, 60\), got 60"):
        pool.training_loss(
            network(), dict.fromkeys(("identity", "instance"), (torch.zeros(2, PIXELS), ids))
        )
