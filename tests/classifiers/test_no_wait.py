"""A training step with any classifier has nothing that a GPU's host would wait for."""

import copy
import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from cases import MARGINS
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from waits import HostWaits

from fastface_lightning.classifiers import (
    AttentionClassifier,
    ChunkedClassifier,
    Classifier,
    DynamicClassPool,
    FullClassifier,
    MomentumClassifier,
    PartialClassifier,
)
from fastface_lightning.margins import CosFace, Margin
from fastface_lightning.optim import SGD, AdamW

CLASSES, SIZE = 40, 8
KINDS: dict[str, Any] = {
    "full": FullClassifier,
    "chunked": lambda *a: ChunkedClassifier(*a, chunk=16),
    "bfloat16": lambda *a: ChunkedClassifier(*a, chunk=16, products="bfloat16"),
    "partial": lambda *a: PartialClassifier(*a, rate=0.5, chunk=8),
    "pool": lambda *a: DynamicClassPool(*a, pool_size=20),
    "attention": AttentionClassifier,
}
OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: SGD(p, lr=0.1, momentum=0.9, weight_decay=5e-4),
    "adamw": AdamW,
    "sgd, a tensor's rate": lambda p: SGD(p, lr=torch.tensor(0.1), nesterov=True, momentum=0.9),
    "adamw, a tensor's rate": lambda p: AdamW(p, lr=torch.tensor(1e-3)),
}


def partial() -> PartialClassifier:
    torch.manual_seed(0)
    return PartialClassifier(CLASSES, SIZE, rate=0.5, chunk=8).double()


def batch(seed: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(6, SIZE, dtype=torch.float64), torch.randint(CLASSES, (6,))


CASES = [(kind, "sgd", margin) for kind in KINDS for margin in MARGINS]
CASES += [("partial", name, CosFace()) for name in OPTIMIZERS if name != "sgd"]


@contextmanager
def no_wait(device: torch.device) -> Iterator[None]:
    """An error where a GPU's host waits, or on the CPU would."""
    if device.type == "cpu":
        with HostWaits() as waits:
            yield
        assert waits.names == []
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("kind", "optimizer", "margin"), CASES, ids=str)
def test_a_step(
    kind: str,
    optimizer: str,
    margin: Margin,
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if device.type == "cpu":  # where labels are looked at; a GPU asserts by itself
        monkeypatch.setattr(Classifier, "_check", lambda *_: None)
    torch.manual_seed(0)
    head = KINDS[kind](CLASSES, SIZE, copy.deepcopy(margin), 16.0).to(device)
    probe = nn.Linear(SIZE, SIZE).to(device)
    steps = OPTIMIZERS[optimizer]([*probe.parameters(), *head.parameters()])
    images, labels = torch.randn(6, SIZE, device=device), torch.randint(CLASSES, (6,)).to(device)
    if isinstance(head, MomentumClassifier):
        head.follow(probe)
        parts = head.sample_batch(6).items()  # the labels lie on the host
        given = {k: (torch.randn(len(y), SIZE, device=device), y) for k, (_, y) in parts}
    for _ in range(2):  # the states are made, and then used
        with no_wait(device):
            steps.zero_grad()
            if isinstance(head, MomentumClassifier):
                head.update_momentum_encoder(probe)
                loss = head.training_loss(probe, given)
            else:
                loss = head(probe(images), labels)
            loss.backward()
            nn.utils.clip_grad_norm_(probe.parameters(), 1.0)
            steps.step()


@pytest.mark.parametrize("margin", MARGINS, ids=repr)
@pytest.mark.parametrize("kind", ["full", "chunked", "partial"])
def test_nothing_is_copied_between_host_and_gpu(kind: str, margin: Margin) -> None:
    """In the forward, of tensors without data that say they lie on a GPU."""
    margin = copy.deepcopy(margin)
    with FakeTensorMode(), torch.device("cuda"):
        for name, buffer in list(margin.named_buffers()):
            setattr(margin, name, torch.empty(buffer.shape))
        head = KINDS[kind](CLASSES, SIZE, margin)
        x, labels = torch.empty(6, SIZE, requires_grad=True), torch.zeros(6, dtype=torch.int64)
        with HostWaits() as waits:
            assert head(x, labels).device.type == "cuda"
        assert waits.names == []
        with HostWaits() as waits:
            x.cpu(), torch.ones(1, device="cpu").to("cuda")
        assert waits.names == ["_to_copy"] * 2


def test_what_waits_is_found() -> None:
    x, rows = torch.tensor([1.0, 0.0]), torch.tensor([[0, 0]])
    sparse = torch.sparse_coo_tensor(rows, x, (2,), check_invariants=False)
    counts = torch.tensor([1, 2])
    for wait in (
        x.sum().item,
        x.nonzero,
        x.unique,
        sparse.coalesce,
        lambda: x[x > 0],
        lambda: x.masked_select(x > 0),
        lambda: x.repeat_interleave(counts),
        lambda: torch.equal(x, x),
        lambda: x.index_put_((x > 0,), x[:1]),
    ):
        with HostWaits() as waits:
            wait()
        assert len(waits.names) >= 1
    with HostWaits() as waits:
        x[rows[0]], x.index_fill_(0, rows[0], 1), x.repeat_interleave(counts, output_size=3)
    assert waits.names == []


# The gradient of sampled rows, which is marked as sorted while it is that of one backward --------


def dense_twin(head: PartialClassifier, seeds: list[int]) -> Tensor:
    """The gradient of several batches added up, of a dense gradient each."""
    total = torch.zeros_like(head.weight)
    for seed in seeds:
        (grad,) = torch.autograd.grad(head(*batch(seed)), head.weight)
        total += grad.to_dense()
    return total


@pytest.mark.parametrize("seeds", [[1], [1, 2], [1, 1], [1, 2, 3]], ids=str)
def test_a_gradient_is_marked_as_sorted_only_if_it_is(seeds: list[int]) -> None:
    head = partial()
    expected = dense_twin(head, seeds)
    assert head.weight.grad is None
    for seed in seeds:
        head(*batch(seed)).backward()
    grad = head.weight.grad
    assert grad is not None and (grad.is_coalesced() or len(seeds) > 1)
    rows = grad.coalesce().indices()[0]
    assert (rows.diff() > 0).all()
    torch.testing.assert_close(grad.to_dense(), expected)
    dense = torch.zeros_like(expected)
    dense[rows] = grad.coalesce().values()  # what the optimizer takes for the gradient
    torch.testing.assert_close(dense, expected)


def test_two_losses_in_one_backward() -> None:
    head = partial()
    expected = dense_twin(head, [1, 2])
    torch.manual_seed(0)
    (head(*batch(1)) + head(*batch(2))).backward()
    grad = head.weight.grad
    assert grad is not None
    values = torch.zeros_like(expected).index_add_(0, grad._indices()[0], grad._values())
    torch.testing.assert_close(values, expected)
    if grad.is_coalesced():
        assert (grad.indices()[0].diff() > 0).all()


@pytest.mark.parametrize("way", ["copied", "saved", "loaded", "moved"])
def test_it_is_marked_in_a_classifier_that_came_some_other_way(way: str) -> None:
    head = partial()
    head(*batch(1)).backward()
    if way == "copied":
        head = copy.deepcopy(head)
    elif way == "saved":
        file = io.BytesIO()
        torch.save(head, file)
        file.seek(0)
        head = torch.load(file, weights_only=False)
    elif way == "loaded":
        head.load_state_dict(partial().state_dict(), assign=True)
    else:
        head.float().double()
    head.weight.grad = None
    head(*batch(2)).backward()
    assert head.weight.grad is not None and head.weight.grad.is_coalesced()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_steps_are_those_of_an_unmarked_gradient(
    optimizer: str, clip: float | None, accumulate: int
) -> None:
    """Also where the gradient is scaled and unscaled, clipped, or a sum of micro-batches."""
    marked, plain = partial(), partial()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    ours, theirs = (OPTIMIZERS[optimizer](head.parameters()) for head in (marked, plain))
    for step in range(6):
        for micro in range(accumulate):
            scaler.scale(marked(*batch(accumulate * step + micro))).backward()
            plain(*batch(accumulate * step + micro)).backward()
        assert plain.weight.grad is not None
        plain.weight.grad = plain.weight.grad.coalesce()
        scaler.unscale_(ours)
        for head in (marked, plain):
            if clip:
                nn.utils.clip_grad_norm_(head.parameters(), clip)
        scaler.step(ours)
        scaler.update()
        theirs.step()
        for each in (ours, theirs):
            each.zero_grad()
    torch.testing.assert_close(marked.weight, plain.weight, rtol=1e-12, atol=1e-12)
