"""The dynamic class pool against a plain transcription of the paper's release, and its promises."""

import copy
import math
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import (
    MARGINS,
    PIXELS,
    SIZE,
    Batch,
    assert_same_training,
    descend,
    follow,
    network,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import on_ranks
from torch import Tensor, nn
from torch.nn import functional as F

from fastface_lightning.classifiers import DynamicClassPool
from fastface_lightning.margins import CosFace, ElasticFace, Margin, Softmax


class Plain:
    """F2C one identity, one image and one row at a time; the pool is copied to be rolled back."""

    def __init__(self, pool: DynamicClassPool, gallery: nn.Module) -> None:
        self.margin, self.scale, self.k = copy.deepcopy(pool.margin), pool.scale, pool.num_hardest
        self.queue, self.gallery = pool.queue.clone(), copy.deepcopy(gallery)
        self.slots: OrderedDict[int, int] = OrderedDict()  # least recently written first
        self.next_row = [0] * pool.pool_size

    def step(self, probe: nn.Module, batch: Batch) -> Tensor:
        (pairs, of_pairs), (images, labels) = batch["identity"], batch["instance"]
        half = len(images) // 2
        x = [*pairs[0::2], *images[:half]], [*of_pairs[0::2].tolist(), *labels[:half].tolist()]
        y = [*pairs[1::2], *images[half:]], [*of_pairs[1::2].tolist(), *labels[half:].tolist()]
        before = self.queue.clone(), OrderedDict(self.slots), list(self.next_row)
        first = self.half(probe, x, y)
        self.queue, self.slots, self.next_row = before
        return first + self.half(probe, y, x)

    def half(self, probe: nn.Module, embedded: Any, written: Any) -> Tensor:
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
        embeddings = probe(torch.stack(embedded[0]))
        return self.loss(embeddings, embedded[1], [self.queue[0], second])

    def loss(self, embeddings: Tensor, labels: list[int], centers: list[Tensor]) -> Tensor:
        inside = [i for i, label in enumerate(labels) if label in self.slots]
        x = F.normalize(embeddings)
        losses, hard = [], []
        own = torch.tensor([self.slots[labels[i]] for i in inside])
        target = torch.cat([(x[inside] * w[own]).sum(1) for w in centers])
        norm = embeddings[inside].norm(dim=1).repeat(2)
        label = torch.tensor([labels[i] for i in inside]).repeat(2)
        after = self.margin(target, norm, label)
        costs = self.margin.penalty(norm)
        for row, w in enumerate(centers):
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


def make_batch(generator: torch.Generator, batch_size: int = 6, identities: int = 60) -> Batch:
    """Different identities with two images each, and as many images sampled at random and one."""
    images = torch.randn(identities, 4, PIXELS, dtype=torch.float64, generator=generator)
    ids = torch.randperm(identities, generator=generator)[:batch_size]
    if batch_size > 7:
        ids[0] = ids[1]  # one comes twice
    pairs = torch.stack([images[ids, 0], images[ids, 1]], 1).flatten(0, 1)
    others = torch.randint(identities, (batch_size + 1,), generator=generator)
    return {
        "identity": (pairs, ids.repeat_interleave(2)),
        "instance": (images[others, 2], others),
    }


def build(**settings: object) -> DynamicClassPool:
    return DynamicClassPool(60, SIZE, **{"pool_size": 23, **settings}).double()


def check_steps(margin: Margin, steps: int) -> None:
    """Train the probe net under the pool, and ask the plain twin for the same losses."""
    generator = torch.Generator().manual_seed(0)
    random.seed(0)
    probe, pool = network(), build(margin=margin, scale=16.0)
    pool.follow(probe)
    plain = Plain(pool, probe)
    outside = 0.0
    for _ in range(steps):
        batch = make_batch(generator, random.randint(2, 9))
        pool.update_momentum_encoder(probe)
        follow(plain.gallery, probe, 0.99)
        # Batch norms of the probe net see every batch twice here; its training mode reads none.
        expected = plain.step(probe, batch)
        assert_same_training(pool.training_loss(probe, batch), expected, probe)
        torch.testing.assert_close(pool.queue, plain.queue, rtol=0, atol=1e-10)
        state = [[i, s, plain.next_row[s]] for i, s in plain.slots.items()]
        assert pool.slots.to_tensor().T.tolist()[: len(state)] == state
        descend(probe)
        outside += 1 - pool.in_pool
    assert 0.02 < outside / steps < 0.9  # both kinds of images were there


@pytest.mark.slow
def test_a_thousand_steps_as_the_transcription() -> None:
    check_steps(CosFace(0.4), 1000)


@pytest.mark.parametrize("margin", [m for m in MARGINS if not isinstance(m, ElasticFace)], ids=repr)
def test_every_margin_as_the_transcription(margin: Margin) -> None:
    check_steps(copy.deepcopy(margin), 8)


@given(seed=st.integers(0, 99), before=st.integers(1, 6), after=st.integers(1, 6))
@settings(max_examples=8, deadline=None)
def test_a_saved_pool_goes_on_as_if_it_had_not_been(seed: int, before: int, after: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    probe, pool, other = network(), build(), build()
    for _ in range(before):
        pool.training_loss(probe, make_batch(generator))
    other.follow(network())
    other.load_state_dict(copy.deepcopy(pool.state_dict()))
    twin = copy.deepcopy(probe)
    for _ in range(after):
        batch = make_batch(generator)
        assert torch.equal(pool.training_loss(probe, batch), other.training_loss(twin, batch))
    for mine, its in zip(pool.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(mine, its)


def test_the_gallery_net_follows_parameters_and_batch_statistics() -> None:
    probe, pool = network(), build(momentum=0.9)
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


def test_the_loss_is_float32_under_autocast() -> None:
    probe, pool = network().float(), build().float()
    batch = make_batch(torch.Generator().manual_seed(0))
    batch = {name: (images.float(), labels) for name, (images, labels) in batch.items()}
    with torch.autocast("cpu", torch.bfloat16):
        loss = pool.training_loss(probe, batch)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in probe.parameters())


def test_a_scaled_gradient_of_half_precision_embeddings_is_not_lost() -> None:
    """A loss scaler's factor comes before the rounding to float16, not after."""
    torch.manual_seed(0)
    pool = build(margin=Softmax(), scale=16.0).float()
    ids = torch.arange(4).repeat_interleave(2)
    features = F.one_hot(ids, SIZE).float() + 0.02 * torch.randn(8, SIZE)  # well fitted
    grads = []
    for dtype in (torch.float16, torch.float32):
        x = features.half().to(dtype).requires_grad_()
        batch = {"identity": (x, ids), "instance": (x[:2], ids[:2])}
        (65536 * copy.deepcopy(pool).training_loss(nn.Identity(), batch)).backward()
        assert x.grad is not None
        grads.append(x.grad.float())
    assert (grads[0] == 0).float().mean() < 0.1
    torch.testing.assert_close(*grads, rtol=2e-2, atol=1e-2 * grads[1].abs().max().item())


def test_the_filter_holds_outside_the_pool_too() -> None:
    """A stranger much like somebody in the pool, perhaps the same person, is left alone."""
    ids, strangers = torch.tensor([0, 0]), torch.tensor([50, 51])
    images = torch.eye(SIZE)[[0, 0]]
    x = (torch.eye(SIZE)[[0, 0]] + 0.5 * torch.eye(SIZE)[[1, 2]]).requires_grad_()  # cosine 0.89
    batch = {"identity": (images, ids), "instance": (x, strangers)}
    towards = []
    for threshold in (None, 0.4):
        pool = build(interclass_filter=threshold).float()
        x.grad = None
        pool.training_loss(nn.Identity(), batch).backward()
        assert x.grad is not None and pool.in_pool == 0.5
        towards.append(x.grad[:, 0])
    assert (towards[0] > 0.02).all()  # away from the person in the pool
    assert (towards[1] < towards[0] / 2).all()


@pytest.mark.slow
def test_two_ranks_write_the_same_pool(tmp_path: Path) -> None:
    def check(rank: int) -> None:
        generator = torch.Generator().manual_seed(rank)
        probe, pool = nn.Linear(PIXELS, SIZE).double(), build(pool_size=40)
        nn.init.eye_(probe.weight)
        for _ in range(5):
            pool.training_loss(probe, make_batch(generator))
        for tensor in (pool.queue, pool.slots.to_tensor()):
            states = [torch.empty_like(tensor) for _ in range(2)]
            dist.all_gather(states, tensor)
            assert torch.equal(*states)
        assert len(set(states[0][0].tolist())) > 15  # identities of both

    on_ranks(check, tmp_path)


@pytest.mark.parametrize(
    ("identities", "pool_size", "slots"),
    [(6000, None, 600), (2000, None, 512), (100, None, 100), (100, 0.29, 29), (60, 1.0, 60)],
)
def test_number_of_slots(identities: int, pool_size: float | None, slots: int) -> None:
    pool = DynamicClassPool(identities, SIZE, pool_size=pool_size)
    assert pool.pool_size == slots and pool.queue.shape == (2, slots, SIZE)


@pytest.mark.parametrize(
    ("name", "value"),
    [*(("pool_size", value) for value in (61, 0, 0.01, 2.5, math.nan)), ("momentum", 1.0)],
)
def test_bad_arguments(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{name} must"):
        build(**{name: value})


def test_bad_batches() -> None:
    pool, batch = build(pool_size=8), make_batch(torch.Generator().manual_seed(0))
    before = pool.queue.clone()
    with pytest.raises(ValueError, match=r"^pool_size must be at least the 10 .* got 8"):
        pool.training_loss(network(), batch)
    with pytest.raises(ValueError, match="trains on a dict of instance and identity"):
        pool.training_loss(network(), {"identity": batch["identity"]})
    assert torch.equal(pool.queue, before)
