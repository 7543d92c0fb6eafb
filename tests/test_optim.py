"""SGD: torch's update, without a copy of the weights, and row by row for sparse gradients."""

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastface_lightning.optim import SGD
from fastface_lightning.training.plan import MemoryMeter

SETTINGS: list[dict[str, Any]] = [
    {"weight_decay": 0.1},
    {"momentum": 0.9, "weight_decay": 0.1},
    {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True},
]
each = pytest.mark.parametrize("options", SETTINGS, ids=str)


def parameters(seed: int = 0) -> list[nn.Parameter]:
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((7, 3), (4,), ())]


@each
def test_equals_torchs(options: dict[str, Any]) -> None:
    """Ten steps, one with a parameter without a gradient, and a change of the learning rate."""
    ours, theirs = parameters(), parameters()
    one, two = SGD(ours, lr=0.1, **options), torch.optim.SGD(theirs, lr=0.1, **options)
    for step in range(10):
        for a, b in zip(ours, theirs, strict=True):
            b.grad = None if step == 4 and b.ndim == 1 else torch.randn_like(b)
            a.grad = None if b.grad is None else b.grad.clone()
        for optimizer in (one, two):
            optimizer.param_groups[0]["lr"] = 0.1 if step < 5 else 0.01
            optimizer.step()
    torch.testing.assert_close(list(ours), list(theirs))


@each
@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**31), steps=st.integers(1, 6), repeated=st.booleans())
def test_sparse_rows(options: dict[str, Any], seed: int, steps: int, repeated: bool) -> None:
    """As a dense SGD that is called for these rows alone; repeated rows add up first."""
    torch.manual_seed(seed)
    p = nn.Parameter(torch.randn(6, 3, dtype=torch.float64))
    rows = [nn.Parameter(row.clone()) for row in p.detach()]
    ours = SGD([p], lr=0.1, **options)
    theirs = [torch.optim.SGD([row], lr=0.1, **options) for row in rows]
    for _ in range(steps):
        index = torch.randint(6, (4,)) if repeated else torch.randperm(6)[:4]
        values = torch.randn(4, 3, dtype=torch.float64)
        p.grad = torch.sparse_coo_tensor(index[None], values, p.shape, check_invariants=False)
        dense = p.grad.to_dense()
        with mock.patch("fastface_lightning.optim.BLOCK", 2):  # more than one block
            ours.step()
        for j in index.unique().tolist():
            rows[j].grad = dense[j]
            theirs[j].step()
    torch.testing.assert_close(p.detach(), torch.stack([row.detach() for row in rows]))


@each
def test_no_copy_of_the_weights(options: dict[str, Any]) -> None:
    p = nn.Parameter(torch.ones(1000, 100))

    def temporaries(kind: type) -> int:
        optimizer = kind([p], lr=0.1, **options)
        p.grad = torch.ones_like(p)
        optimizer.step()  # the momentum is made
        with MemoryMeter() as meter:
            optimizer.step()
        return meter.peak

    assert temporaries(SGD) == 0
    assert temporaries(torch.optim.SGD) >= p.nbytes  # which this test would catch


def test_a_loss_scaler_unscales_before_it_steps() -> None:
    """So gradients can be clipped in between; a step that overflowed is left out."""
    p, q = (nn.Parameter(torch.ones(3, 2)) for _ in range(2))
    optimizer = SGD([p, q], lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024)
    for bad in (False, True):
        optimizer.zero_grad()
        index = torch.tensor([[0, 2]])
        q_values = torch.full((2, 2), torch.inf if bad else 3 * 1024.0)
        q.grad = torch.sparse_coo_tensor(index, q_values, (3, 2), check_invariants=False)
        scaler.scale((2 * p).sum()).backward()
        scaler.unscale_(optimizer)
        assert p.grad is not None and (p.grad == 2).all()
        scaler.step(optimizer)
        scaler.update()
    torch.testing.assert_close(p.detach(), torch.full((3, 2), 0.8))
    torch.testing.assert_close(q.detach(), torch.tensor([[0.7, 0.7], [1, 1], [0.7, 0.7]]))


@pytest.mark.parametrize("source", [SGD, torch.optim.SGD])
def test_its_state_is_torchs(source: type) -> None:
    """A run goes on, also one that torch's SGD began."""
    options = {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}
    through, first = parameters(), parameters()
    grads = [[torch.randn_like(p) for p in through] for _ in range(6)]

    def run(optimizer: Any, params: list[nn.Parameter], part: slice) -> None:
        for step in grads[part]:
            for p, grad in zip(params, step, strict=True):
                p.grad = grad.clone()
            optimizer.step()

    run(SGD(through, **options), through, slice(None))
    optimizer = source(first, **options)
    run(optimizer, first, slice(0, 3))
    again = SGD(first, lr=1.0)
    again.load_state_dict(optimizer.state_dict())
    run(again, first, slice(3, None))
    torch.testing.assert_close(list(first), list(through))


def test_a_state_of_another_memory_format_is_taken_element_by_element() -> None:
    """A run with channels_last goes on without it, or the other way round."""
    torch.manual_seed(0)
    start, grads = torch.randn(6, 4, 3, 3), torch.randn(2, 6, 4, 3, 3)

    def run(kind: type, channels_last: bool) -> Tensor:
        p = nn.Parameter(start.clone())
        first = SGD([p], lr=0.1, momentum=0.9)
        p.grad = grads[0].clone()
        first.step()
        data = p.data.to(memory_format=torch.channels_last) if channels_last else p.data
        again = nn.Parameter(data)
        second = kind([again], lr=0.1)
        second.load_state_dict(first.state_dict())
        again.grad = torch.empty_like(again).copy_(grads[1])
        second.step()
        return again.detach()

    torch.testing.assert_close(run(SGD, True), run(torch.optim.SGD, False))
