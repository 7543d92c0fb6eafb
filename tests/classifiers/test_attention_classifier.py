"""AttFC against a plain transcription of its release, and its promises."""

import copy
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from cases import HardNegatives
from ranks import on_two_ranks
from torch import Tensor, nn
from torch.nn import functional as F

from fastface_lightning.classifiers import AttentionClassifier
from fastface_lightning.margins import (
    AdaFace,
    ArcFace,
    Combined,
    CosFace,
    CurricularFace,
    MagFace,
    Margin,
    Softmax,
)

D, PIXELS, B = 16, 12, 6
Batch = dict[str, tuple[Tensor, Tensor]]


class Plain:
    """AttFC one image at a time, the container a deque of centres with labels."""

    def __init__(self, attfc: AttentionClassifier, encoder: nn.Module) -> None:
        self.margin, self.scale, self.keys = copy.deepcopy(attfc.margin), attfc.scale, attfc.keys
        # The oldest first: random directions that belong to nobody.
        self.queue = deque((centre, -1) for centre in attfc.queue.clone())
        self.encoder = copy.deepcopy(encoder)

    def step(self, probe: nn.Module, batch: Batch) -> Tensor:
        images, labels = batch["identity"]
        queries = probe(images[0 :: self.keys + 1])
        x = F.normalize(queries)
        own = labels[0 :: self.keys + 1].tolist()
        keys = [i for i in range(len(images)) if i % (self.keys + 1)]
        with torch.no_grad():
            features = self.encoder(images[keys])
            centres = []
            for i, query in enumerate(x):
                of_query = features[i * self.keys : (i + 1) * self.keys]
                weights = [torch.exp(query @ (f / f.norm())) for f in of_query]
                mean = sum(w * f for w, f in zip(weights, of_query, strict=True)) / sum(weights)
                centres.append(mean / mean.norm())
        target = torch.stack([q @ c for q, c in zip(x, centres, strict=True)])
        norm = queries.norm(dim=1)
        after = self.margin(target, norm, torch.tensor(own))
        costs = self.margin.penalty(norm)
        losses = []
        for i, label in enumerate(own):
            cos = torch.stack([x[i] @ c for c, of in self.queue if of != label])[None]
            negatives = self.margin.negatives(cos, target[i : i + 1], after[i : i + 1])[0]
            logits = self.scale * torch.cat([after[i : i + 1], negatives])
            losses.append(-logits.log_softmax(0)[0] + costs[i])
        for centre, label in zip(centres, own, strict=True):
            self.queue.popleft()
            self.queue.append((centre, label))
        return torch.stack(losses).mean()


def make_batch(identities: int, keys: int, generator: torch.Generator) -> Batch:
    labels = torch.randint(identities, (B,), generator=generator)
    images = torch.randn(B * (keys + 1), PIXELS, dtype=torch.float64, generator=generator)
    return {"identity": (images, labels.repeat_interleave(keys + 1))}


def network() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(PIXELS, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, D))


def follow_steps(margin: Margin, steps: int, keys: int = 2) -> None:
    generator = torch.Generator().manual_seed(0)
    probe = network().double()
    attfc = AttentionClassifier(40, D, margin, scale=16.0, queue_size=15, keys=keys).double()
    attfc.follow(probe)
    plain = Plain(attfc, probe)
    for _ in range(steps):
        batch = make_batch(40, keys, generator)
        attfc.update_momentum_encoder(probe)
        with torch.no_grad():
            for slow, fast in zip(plain.encoder.parameters(), probe.parameters(), strict=True):
                slow.copy_(0.999 * slow + 0.001 * fast)
        probe.zero_grad()
        expected = plain.step(probe, batch)
        expected.backward()
        wanted = [p.grad.clone() for p in probe.parameters() if p.grad is not None]
        probe.zero_grad()
        loss = attfc.training_loss(probe, batch)
        loss.backward()
        torch.testing.assert_close(loss, expected, rtol=0, atol=1e-10)
        for p, grad in zip(probe.parameters(), wanted, strict=True):
            torch.testing.assert_close(p.grad, grad, rtol=0, atol=1e-10)
        at = int(attfc.position)
        centres = torch.cat([attfc.queue[at:], attfc.queue[:at]])
        torch.testing.assert_close(centres, torch.stack([c for c, _ in plain.queue]))
        labels = torch.cat([attfc.queue_labels[at:], attfc.queue_labels[:at]])
        assert labels.tolist() == [label for _, label in plain.queue]
        with torch.no_grad():
            for p in probe.parameters():
                p -= 0.01 * p.grad


@pytest.mark.slow
def test_a_thousand_steps_as_the_transcription() -> None:
    follow_steps(ArcFace(0.5), 1000)


@pytest.mark.parametrize(
    "margin",
    [
        Softmax(),
        CosFace(),
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


@pytest.mark.parametrize("keys", [1, 3])
def test_other_numbers_of_keys(keys: int) -> None:
    follow_steps(CosFace(), 10, keys)


def test_a_key_of_another_identity_is_left_out() -> None:
    attfc = AttentionClassifier(40, D, queue_size=15).double()
    queries, features = torch.randn(3, D).double(), torch.randn(3, 2, D).double()
    same = torch.tensor([[True, True], [True, False], [False, False]])
    centres = attfc.centres(queries, features, same)
    torch.testing.assert_close(centres[1], F.normalize(features[1, 0], dim=0))
    whole = attfc.centres(queries, features, torch.ones_like(same))
    assert torch.equal(centres[[0, 2]], whole[[0, 2]])  # of none that fits, all


def test_the_gradient_passes_through_the_query_alone() -> None:
    attfc, probe = AttentionClassifier(40, D, queue_size=15).double(), network().double()
    generator = torch.Generator().manual_seed(0)
    attfc.training_loss(probe, make_batch(40, 2, generator)).backward()
    assert all(p.grad is not None for p in probe.parameters())
    assert all(p.grad is None for p in attfc.parameters()) and not attfc.queue.requires_grad


def test_a_saved_queue_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    probe, attfc = network().double(), AttentionClassifier(40, D, queue_size=15).double()
    for _ in range(4):
        attfc.training_loss(probe, make_batch(40, 2, generator))
    torch.save(attfc.state_dict(), tmp_path / "attfc.pt")
    other = AttentionClassifier(40, D, queue_size=15).double()
    other.follow(network().double())
    other.load_state_dict(torch.load(tmp_path / "attfc.pt", weights_only=True))
    twin = copy.deepcopy(probe)
    for _ in range(4):
        batch = make_batch(40, 2, generator)
        assert torch.equal(attfc.training_loss(probe, batch), other.training_loss(twin, batch))
    assert torch.equal(attfc.queue, other.queue)


def test_two_ranks_hold_the_same_queue(tmp_path: Path) -> None:
    def check(rank: int) -> None:
        generator = torch.Generator().manual_seed(rank)
        probe = nn.Linear(PIXELS, D).double()
        nn.init.eye_(probe.weight)
        attfc = AttentionClassifier(40, D, queue_size=15).double()
        for _ in range(3):
            attfc.training_loss(probe, make_batch(40, 2, generator))
        for tensor in (attfc.queue, attfc.queue_labels):
            states = [torch.empty_like(tensor) for _ in range(2)]
            dist.all_gather(states, tensor)
            assert torch.equal(*states)
        assert int(attfc.position) == 3 * 2 * B % 15

    on_two_ranks(check, tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: AttentionClassifier(9, D, queue_size=10),
            "queue_size must be at most the 9 ident",
        ),
        (lambda: AttentionClassifier(9, D, queue_size=0.1), r"in \(0, 1\] that makes one, got 0.1"),
        (lambda: AttentionClassifier(9, D, keys=0), "keys must be at least 1 image, got 0"),
        (lambda: AttentionClassifier(9, D, momentum=-0.1), r"number in \[0, 1\), got -0.1"),
        (lambda: AttentionClassifier(9, D, keys=2.5), r"keys must be at least 1 image, got 2.5"),
        (lambda: AttentionClassifier(9, D, keys="two"), r"keys must be at least 1 image, got two"),
    ],
)
def test_bad_arguments(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_batches() -> None:
    attfc, generator = AttentionClassifier(40, D, queue_size=5).double(), torch.Generator()
    with pytest.raises(
        ValueError, match=r"queue_size must be at least the 6 centres of a batch, got 5"
    ):
        attfc.training_loss(network().double(), make_batch(40, 2, generator))
    with pytest.raises(
        ValueError, match=r"a dict of identity, which a data module with batches=.keys. gives"
    ):
        attfc.training_loss(network().double(), (torch.zeros(2, PIXELS), torch.zeros(2)))
