"""AttFC against a plain transcription of its release, and its promises."""

import copy
from collections import deque
from pathlib import Path

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
from ranks import on_ranks
from torch import Tensor, nn
from torch.nn import functional as F

from fastface_lightning.classifiers import AttentionClassifier
from fastface_lightning.margins import ArcFace, ElasticFace, Margin

B = 6


class Plain:
    """AttFC one image at a time, the container a deque of centres with labels."""

    def __init__(self, attfc: AttentionClassifier, encoder: nn.Module) -> None:
        self.margin, self.scale, self.keys = copy.deepcopy(attfc.margin), attfc.scale, attfc.keys
        # The oldest first: random directions that belong to nobody.
        self.queue = deque((center, -1) for center in attfc.queue.clone())
        self.encoder = copy.deepcopy(encoder)

    def step(self, probe: nn.Module, batch: Batch) -> Tensor:
        images, labels = batch["identity"]
        queries = probe(images[0 :: self.keys + 1])
        x = F.normalize(queries)
        own = labels[0 :: self.keys + 1].tolist()
        keys = [i for i in range(len(images)) if i % (self.keys + 1)]
        with torch.no_grad():
            features = self.encoder(images[keys])
            centers = []
            for i, query in enumerate(x):
                of_query = features[i * self.keys : (i + 1) * self.keys]
                weights = [torch.exp(query @ (f / f.norm())) for f in of_query]
                mean = sum(w * f for w, f in zip(weights, of_query, strict=True)) / sum(weights)
                centers.append(mean / mean.norm())
        target = torch.stack([q @ c for q, c in zip(x, centers, strict=True)])
        norm = queries.norm(dim=1)
        after = self.margin(target, norm, torch.tensor(own))
        costs = self.margin.penalty(norm)
        losses = []
        for i, label in enumerate(own):
            cos = torch.stack([x[i] @ c for c, of in self.queue if of != label])[None]
            negatives = self.margin.negatives(cos, target[i : i + 1], after[i : i + 1])[0]
            logits = self.scale * torch.cat([after[i : i + 1], negatives])
            losses.append(-logits.log_softmax(0)[0] + costs[i])
        for center, label in zip(centers, own, strict=True):
            self.queue.popleft()
            self.queue.append((center, label))
        return torch.stack(losses).mean()


def make_batch(generator: torch.Generator, identities: int = 40, keys: int = 2) -> Batch:
    labels = torch.randint(identities, (B,), generator=generator)
    images = torch.randn(B * (keys + 1), PIXELS, dtype=torch.float64, generator=generator)
    return {"identity": (images, labels.repeat_interleave(keys + 1))}


def build(**settings: object) -> AttentionClassifier:
    return AttentionClassifier(40, SIZE, **{"queue_size": 15, **settings}).double()


def check_steps(margin: Margin, steps: int, keys: int = 2) -> None:
    generator = torch.Generator().manual_seed(0)
    probe, attfc = network(), build(margin=margin, scale=16.0, keys=keys)
    attfc.follow(probe)
    plain = Plain(attfc, probe)
    for _ in range(steps):
        batch = make_batch(generator, keys=keys)
        attfc.update_momentum_encoder(probe)
        follow(plain.encoder, probe, 0.999)
        expected = plain.step(probe, batch)
        assert_same_training(attfc.training_loss(probe, batch), expected, probe)
        at = int(attfc.position)
        centers = torch.cat([attfc.queue[at:], attfc.queue[:at]])
        torch.testing.assert_close(centers, torch.stack([c for c, _ in plain.queue]))
        labels = torch.cat([attfc.queue_labels[at:], attfc.queue_labels[:at]])
        assert labels.tolist() == [label for _, label in plain.queue]
        descend(probe)


@pytest.mark.slow
def test_a_thousand_steps_as_the_transcription() -> None:
    check_steps(ArcFace(0.5), 1000)


@pytest.mark.parametrize("margin", [m for m in MARGINS if not isinstance(m, ElasticFace)], ids=repr)
def test_every_margin_as_the_transcription(margin: Margin) -> None:
    check_steps(copy.deepcopy(margin), 8, keys=3)


def test_a_key_of_another_identity_is_left_out() -> None:
    queries, features = torch.randn(3, SIZE).double(), torch.randn(3, 2, SIZE).double()
    same = torch.tensor([[True, True], [True, False], [False, False]])
    centers = build().centers(queries, features, same)
    torch.testing.assert_close(centers[1], F.normalize(features[1, 0], dim=0))
    whole = build().centers(queries, features, torch.ones_like(same))
    assert torch.equal(centers[[0, 2]], whole[[0, 2]])  # of none that fits, all


def test_a_saved_queue_goes_on_as_if_it_had_not_been(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    probe, attfc, other = network(), build(), build()
    for _ in range(4):
        attfc.training_loss(probe, make_batch(generator))
    torch.save(attfc.state_dict(), tmp_path / "attfc.pt")
    other.follow(network())
    other.load_state_dict(torch.load(tmp_path / "attfc.pt", weights_only=True))
    twin = copy.deepcopy(probe)
    for _ in range(4):
        batch = make_batch(generator)
        assert torch.equal(attfc.training_loss(probe, batch), other.training_loss(twin, batch))
    assert torch.equal(attfc.queue, other.queue)


@pytest.mark.slow
def test_two_ranks_hold_the_same_queue(tmp_path: Path) -> None:
    def check(rank: int) -> None:
        generator = torch.Generator().manual_seed(rank)
        probe, attfc = nn.Linear(PIXELS, SIZE).double(), build()
        nn.init.eye_(probe.weight)
        for _ in range(3):
            attfc.training_loss(probe, make_batch(generator))
        for tensor in (attfc.queue, attfc.queue_labels):
            states = [torch.empty_like(tensor) for _ in range(2)]
            dist.all_gather(states, tensor)
            assert torch.equal(*states)
        assert int(attfc.position) == 3 * 2 * B % 15

    on_ranks(check, tmp_path)


@pytest.mark.parametrize(("name", "value"), [("queue_size", 41), ("keys", 0), ("keys", 2.5)])
def test_bad_arguments(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be"):
        build(**{name: value})


def test_a_queue_smaller_than_a_batch() -> None:
    with pytest.raises(ValueError, match=r"^queue_size must be at least the 6 .* got 5"):
        build(queue_size=5).training_loss(network(), make_batch(torch.Generator()))
