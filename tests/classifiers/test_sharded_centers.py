"""Centres split over processes: every step is that of one process with all images."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from cases import MARGINS, batch, counterpart
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

from fastface_lightning.classifiers import ChunkedClassifier, PartialClassifier
from fastface_lightning.classifiers.shards import Shard
from fastface_lightning.margins import AdaFace, CosFace, CurricularFace, Margin
from fastface_lightning.optim import SGD, AdamW, RowSparse

SIZE, IMAGES = 5, 3  # of an embedding; of a process in a step
EXACT = {"rtol": 0, "atol": 1e-11}
pytestmark = pytest.mark.slow


def classifier(margin: Margin, num_classes: int, **settings: object) -> ChunkedClassifier:
    torch.manual_seed(0)
    made = ChunkedClassifier(num_classes, SIZE, copy.deepcopy(margin), 16.0, chunk=2, **settings)
    return made.double()


def step(made: ChunkedClassifier, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Loss, and gradient of the embeddings; that of the centres is added up."""
    x = x.clone().requires_grad_()
    loss = made(x, labels)
    loss.backward()
    assert x.grad is not None
    return loss.detach(), x.grad


def check_a_step(rank: int, ranks: int, num_classes: int, device: torch.device) -> None:
    """Loss, gradients and statistics, of every margin, with and without the filter."""
    own = slice(rank * IMAGES, (rank + 1) * IMAGES)
    for margin, threshold in itertools.product(MARGINS, (None, 0.2)):
        shard = classifier(margin, num_classes, interclass_filter=threshold).to(device)
        one = copy.deepcopy(shard)
        shard.shard_centers()
        for seed in range(2):  # the second step has statistics
            x, labels = (part.to(device) for part in batch(ranks * IMAGES, num_classes, SIZE, seed))
            sampled = torch.randn_like(x[:, 0])  # by a margin
            with patch.object(torch, "randn_like", lambda _, sampled=sampled: sampled):
                expected, grad = step(one, x, labels)
            other = torch.full_like(sampled, rank)  # what it samples of others' images is not used
            other[own] = sampled[own]
            with patch.object(torch, "randn_like", lambda _, other=other: other):
                loss, own_grad = step(shard, x[own], labels[own])
            dist.all_reduce(loss)  # DDP takes the mean of the gradients of each mean loss
            torch.testing.assert_close(loss / ranks, expected, **EXACT)
            torch.testing.assert_close(own_grad / ranks, grad[own], **EXACT)
        assert shard.split and shard.weight.grad is not None and one.weight.grad is not None
        rows = slice(shard.split.start, shard.split.end)
        torch.testing.assert_close(shard.weight.grad, one.weight.grad[rows], **EXACT)
        for value, wanted in zip(shard.buffers(), one.buffers(), strict=True):
            torch.testing.assert_close(value, wanted, **EXACT)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("num_classes", [13, 3], ids=lambda c: f"C={c}")
def test_a_step_is_that_of_one_process(ranks: int, num_classes: int, tmp_path: Path) -> None:
    on_ranks(
        lambda rank: check_a_step(rank, ranks, num_classes, torch.device("cpu")), tmp_path, ranks
    )


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="torch finds fewer than two CUDA devices")
def test_a_step_of_two_gpus(tmp_path: Path) -> None:
    def check(rank: int) -> None:
        torch.cuda.set_device(rank)
        check_a_step(rank, 2, 13, torch.device("cuda", rank))

    on_ranks(check, tmp_path, 2, "nccl")


@pytest.mark.parametrize("make", [SGD, AdamW], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("rate", [1.0, 0.4])
@pytest.mark.parametrize("num_classes", [13, 2])
def test_a_run_and_its_checkpoint(
    make: type[RowSparse], rate: float, num_classes: int, tmp_path: Path
) -> None:
    """Over steps of two micro-batches, weights and states as rank 0 saves them are those of one
    process, which goes on from either, and so does any number of processes."""
    ranks = 3

    def check(rank: int) -> None:
        torch.manual_seed(0)
        shard = PartialClassifier(num_classes, SIZE, AdaFace(), 16.0, chunk=2, rate=rate).double()
        one = counterpart(ChunkedClassifier, shard, chunk=3)
        shard.shard_centers()
        settings = {"lr": 0.02, "weight_decay": 0.1} | ({"momentum": 0.9} if make is SGD else {})
        optimizers = [make(each.parameters(), **settings) for each in (shard, one)]
        shard.gather_states(optimizers[0])
        for seed in range(10):
            for micro in range(2):
                x, labels = batch(ranks * IMAGES, num_classes, SIZE, 2 * seed + micro)
                own = slice(rank * IMAGES, (rank + 1) * IMAGES)
                torch.manual_seed(seed)
                rows = shard.split.rows(labels)
                sample = shard.sample(rows) if rate < 1 else torch.arange(len(shard.weight))
                samples: list[Tensor] = [torch.empty(0)] * ranks
                dist.all_gather_object(samples, sample + shard.split.start)
                classes = torch.cat(samples)
                shard.sample = lambda _, sample=sample: sample
                one.candidates = lambda labels, classes=classes: (
                    one.weight[classes],
                    torch.searchsorted(classes, labels),
                )
                step(shard, x[own], labels[own])
                step(one, x, labels)
                del shard.sample
            if rate < 1:  # of one process too, rows that no one sampled stay
                grad = one.weight.grad
                touched = grad.abs().sum(1).nonzero()[:, 0]
                one.weight.grad = torch.sparse_coo_tensor(touched[None], grad[touched], grad.shape)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        saved, states = shard.state_dict(), optimizers[0].state_dict()
        if rank == 0:
            torch.testing.assert_close(saved, one.state_dict(), **EXACT)
            torch.testing.assert_close(states, optimizers[1].state_dict(), **EXACT)
            torch.save({"weights": saved, "states": states}, tmp_path / "saved.pt")

    meet = tmp_path / "meet"
    meet.mkdir()
    on_ranks(check, meet, ranks)
    saved = torch.load(tmp_path / "saved.pt", mmap=True)
    for count in (1, 2, 5, 20):
        for rank in range(count):
            other = classifier(AdaFace(), num_classes)
            if count > 1:
                other.split = Shard(rank, count, num_classes)
                other.weight = nn.Parameter(other.split.part(other.weight.detach()))
            optimizer = make(other.parameters(), lr=0.02)
            other.gather_states(optimizer)
            other.load_state_dict(saved["weights"])
            optimizer.load_state_dict(saved["states"])
            rows = slice(num_classes * rank // count, num_classes * (rank + 1) // count)
            assert torch.equal(other.weight, saved["weights"]["weight"][rows])
            for key, value in saved["states"]["state"][0].items():
                wanted = value[rows] if value.ndim else value
                assert torch.equal(optimizer.state[other.weight][key], wanted), key
                held = optimizer.state[other.weight][key].untyped_storage().data_ptr()
                whole = count == 1 or not value.ndim
                assert whole or held != value.untyped_storage().data_ptr()


def test_samples_hold_the_batchs_own_classes(tmp_path: Path) -> None:
    def check(_: int) -> None:
        made = PartialClassifier(50, SIZE, rate=0.2)
        made.shard_centers()
        _, labels = batch(6, 50, SIZE)
        rows = made.split.rows(labels)
        counts = torch.zeros(25)
        for seed in range(200):
            torch.manual_seed(seed)
            sample = made.sample(rows)
            assert (sample.diff() > 0).all() and len(sample) == 6
            counts[sample] += 1
        wanted = set(rows[rows >= 0].tolist())
        assert wanted and set(rows.tolist()) - wanted == {-1}
        assert all((count == 200) == (row in wanted) for row, count in enumerate(counts.tolist()))

    on_ranks(check, tmp_path)


def test_batches_of_several_sizes_are_refused(tmp_path: Path) -> None:
    def check(rank: int) -> None:
        made = classifier(CosFace(), 7)
        made.shard_centers()
        with pytest.raises(ValueError, match=r"of one size, got \[2, 3\]"):
            made(*batch(2 + rank, 7, SIZE))
        assert made(*batch(2, 7, SIZE)).isfinite()

    on_ranks(check, tmp_path)


def test_what_is_not_whole_is_refused(tmp_path: Path) -> None:
    """Of seven centres, one that has four of them itself takes none that hold only four."""

    def check(rank: int) -> None:
        made = classifier(CosFace(), 7)
        made.shard_centers()
        before = made.weight.clone()
        with pytest.raises(RuntimeError, match=r"\(7, 5\), got \(3, 5\)|\(7, 5\), got \(4, 5\)"):
            made.load_state_dict({"weight": before + 1})
        assert torch.equal(made.weight, before)
        state = made.state_dict()
        if rank:
            with pytest.raises(RuntimeError, match="no data"):
                copy.deepcopy(made).load_state_dict(state)
        full = patch("os.posix_fallocate", side_effect=OSError("no space"))
        with full, pytest.raises(OSError, match="must have room"):  # on both, and neither waits
            made.state_dict()

    on_ranks(check, tmp_path)


def test_low_precision_embeddings_and_statistics(tmp_path: Path) -> None:
    """bfloat16 embeddings under autocast are gathered in float32."""

    def check(rank: int) -> None:
        for margin in (CurricularFace(), AdaFace()):
            shard = classifier(margin, 13).float()
            one = copy.deepcopy(shard)
            shard.shard_centers()
            x, labels = batch(2 * IMAGES, 13, SIZE)
            own = slice(rank * IMAGES, (rank + 1) * IMAGES)
            with torch.autocast("cpu", torch.bfloat16):
                expected, grad = step(one, x.bfloat16(), labels)
                loss, own_grad = step(shard, x[own].bfloat16(), labels[own])
            assert loss.dtype == torch.float32 and own_grad.dtype == torch.bfloat16
            dist.all_reduce(loss)
            torch.testing.assert_close(loss / 2, expected)
            torch.testing.assert_close(own_grad / 2, grad[own], rtol=1e-2, atol=1e-6)

    on_ranks(check, tmp_path)


def test_shard_is_auto_or_false() -> None:
    with pytest.raises(ValueError, match=r"shard must be auto or false, got True"):
        ChunkedClassifier(3, shard=True)  # type: ignore[arg-type]


def test_an_overflow_in_one_process_makes_all_skip_the_step(tmp_path: Path) -> None:
    """As the gradients of its centres are its own, the others would not see it."""

    def check(rank: int) -> None:
        made = classifier(CosFace(), 13).float()
        made.shard_centers()
        optimizer, scaler = SGD(made.parameters(), lr=0.1), ShardedGradScaler("cpu", 8.0)
        before = made.weight.detach().clone()
        for overflows in (True, False):
            x, labels = batch(IMAGES, 13, SIZE)
            scaler.scale(made(x.float(), labels)).backward()
            assert made.weight.grad is not None
            if overflows and rank == 1:
                made.weight.grad[0, 0] = torch.inf
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            assert torch.equal(made.weight, before) == overflows
            assert scaler.get_scale() == 4.0

    on_ranks(check, tmp_path)
