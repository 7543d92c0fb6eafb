"""SGD and AdamW: torch's updates, without a copy, and row by row for sparse gradients."""

import io
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastface_lightning.optim import SGD, AdamW
from fastface_lightning.training.plan import MemoryMeter

DECAY = {"weight_decay": 0.1}
SETTINGS: list[tuple[Any, dict[str, Any]]] = [
    (SGD, DECAY),
    (SGD, {**DECAY, "momentum": 0.9}),
    (SGD, {**DECAY, "momentum": 0.9, "nesterov": True}),
    (AdamW, {}),
    (AdamW, {**DECAY, "betas": (0.0, 0.99), "eps": 1e-3}),
]
TORCHS = {SGD: torch.optim.SGD, AdamW: torch.optim.AdamW}
each = pytest.mark.parametrize(("kind", "options"), SETTINGS, ids=str)


def parameters(seed: int = 0) -> list[nn.Parameter]:
    torch.manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in ((7, 3), (4,), ())]


@each
def test_equals_torchs(kind: Any, options: dict[str, Any]) -> None:
    """Ten steps, one with a parameter without a gradient, and a change of the learning rate."""
    ours, theirs = parameters(), parameters()
    one, two = kind(ours, lr=0.1, **options), TORCHS[kind](theirs, lr=0.1, **options)
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
@given(seed=st.integers(0, 2**31), steps=st.integers(1, 12), repeated=st.booleans())
def test_sparse_rows(
    kind: Any, options: dict[str, Any], seed: int, steps: int, repeated: bool
) -> None:
    """As if each row were a parameter of its own, which takes a step only when it is named.

    Repeated rows add up first, a dense gradient names all, and a state goes through a file.
    """
    torch.manual_seed(seed)
    p = nn.Parameter(torch.randn(6, 3, dtype=torch.float64))
    rows = [nn.Parameter(row.clone()) for row in p.detach()]
    ours = kind([p], lr=0.1, **options)
    theirs = [TORCHS[kind]([row], lr=0.1, **options) for row in rows]
    for step in range(steps):
        index = torch.randint(6, (4,)) if repeated else torch.randperm(6)[:4]
        values = torch.randn(4, 3, dtype=torch.float64)
        p.grad = torch.sparse_coo_tensor(index[None], values, p.shape, check_invariants=False)
        dense = p.grad.to_dense()
        if step % 5 == 3:
            p.grad, index = dense, torch.arange(6)
        with mock.patch("fastface_lightning.optim.BLOCK", 2):  # more than one block
            ours.step()
        for j in index.unique().tolist():
            rows[j].grad = dense[j]
            theirs[j].step()
        if step == steps // 2:
            file = io.BytesIO()
            torch.save(ours.state_dict(), file)
            file.seek(0)
            ours = kind([p], lr=9.0)
            ours.load_state_dict(torch.load(file, weights_only=True))
    torch.testing.assert_close(p.detach(), torch.stack([row.detach() for row in rows]))
    if kind is AdamW:
        counts = [
            optimizer.state[row].get("step", 0) for optimizer, row in zip(theirs, rows, strict=True)
        ]
        assert ours.state[p]["step"].tolist() == counts


@each
def test_rows_after_dense_steps_go_on_with_their_count(kind: Any, options: dict[str, Any]) -> None:
    p, q = (nn.Parameter(torch.ones(4, 2, dtype=torch.float64)) for _ in range(2))
    optimizers = kind([p], lr=0.1, **options), TORCHS[kind]([q], lr=0.1, **options)
    for sparse in (False, True, True):
        q.grad = torch.randn_like(q)
        p.grad = q.grad.to_sparse(1) if sparse else q.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(p, q)


def test_a_count_of_steps_is_no_weight() -> None:
    """A state is cast to its parameter's dtype when it is loaded, where 257 would be 256."""
    p = nn.Parameter(torch.ones(3, 2, dtype=torch.bfloat16))
    optimizer = AdamW([p])
    for _ in range(257):
        p.grad = torch.ones_like(p).to_sparse(1)
        optimizer.step()
    again = AdamW([p])
    again.load_state_dict(optimizer.state_dict())
    assert again.state[p]["step"].tolist() == [257] * 3


@each
def test_no_copy_of_the_weights(kind: Any, options: dict[str, Any]) -> None:
    p = nn.Parameter(torch.ones(1000, 100))

    def temporaries(kind: Any) -> int:
        optimizer = kind([p], lr=0.1, **options)
        p.grad = torch.ones_like(p)
        optimizer.step()  # the states are made
        with MemoryMeter() as meter:
            optimizer.step()
        return meter.peak

    assert temporaries(kind) == 0
    if options:
        assert temporaries(TORCHS[kind]) >= p.nbytes  # which this test would catch


@each
def test_rows_take_two_blocks(kind: Any, options: dict[str, Any]) -> None:
    p = nn.Parameter(torch.ones(1000, 100))
    optimizer = kind([p], lr=0.1, **options)
    p.grad = torch.ones_like(p).to_sparse(1)
    optimizer.step()
    with mock.patch("fastface_lightning.optim.BLOCK", 100), MemoryMeter() as meter:
        optimizer.step()
    block = 100 * 100 * 4
    assert block <= meter.peak - meter.live <= 2.1 * block


@pytest.mark.parametrize(
    ("optimizer", "p_after", "q_after"),
    [(partial(SGD, momentum=0.9), 0.8, 0.7), (partial(AdamW, weight_decay=0), 0.9, 0.9)],
)
def test_a_loss_scaler_unscales_before_it_steps(
    optimizer: Any, p_after: float, q_after: float
) -> None:
    """So gradients can be clipped in between; a step that overflowed is left out."""
    p, q = (nn.Parameter(torch.ones(3, 2)) for _ in range(2))
    optimizer = optimizer([p, q], lr=0.1)
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
    torch.testing.assert_close(p.detach(), torch.full((3, 2), p_after))
    torch.testing.assert_close(q.detach(), torch.tensor([[q_after] * 2, [1, 1], [q_after] * 2]))


@pytest.mark.parametrize("kind", [SGD, AdamW])
@pytest.mark.parametrize("torchs", [False, True])
def test_its_state_is_torchs(kind: Any, torchs: bool) -> None:
    """A run goes on, also one that torch's optimizer began."""
    options = {"lr": 0.1, "weight_decay": 0.1, **({"momentum": 0.9} if kind is SGD else {})}
    through, first = parameters(), parameters()
    grads = [[torch.randn_like(p) for p in through] for _ in range(6)]

    def run(optimizer: Any, params: list[nn.Parameter], part: slice) -> None:
        for step in grads[part]:
            for p, grad in zip(params, step, strict=True):
                p.grad = grad.clone()
            optimizer.step()

    run(kind(through, **options), through, slice(None))
    optimizer = (TORCHS[kind] if torchs else kind)(first, **options)
    run(optimizer, first, slice(0, 3))
    again = kind(first, lr=1.0)
    again.load_state_dict(optimizer.state_dict())
    run(again, first, slice(3, None))
    torch.testing.assert_close(list(first), list(through))


@pytest.mark.parametrize("kind", [partial(SGD, momentum=0.9), AdamW])
def test_a_state_of_another_memory_format_is_taken_element_by_element(kind: Any) -> None:
    """A run with channels_last goes on without it, or the other way round."""
    torch.manual_seed(0)
    start, grads = torch.randn(6, 4, 3, 3), torch.randn(2, 6, 4, 3, 3)

    def run(then: Any, channels_last: bool) -> Tensor:
        p = nn.Parameter(start.clone())
        first = kind([p], lr=0.1)
        p.grad = grads[0].clone()
        first.step()
        data = p.data.to(memory_format=torch.channels_last) if channels_last else p.data
        again = nn.Parameter(data)
        second = then([again], lr=0.1)
        second.load_state_dict(first.state_dict())
        again.grad = torch.empty_like(again).copy_(grads[1])
        second.step()
        return again.detach()

    torchs = torch.optim.AdamW if kind is AdamW else torch.optim.SGD
    torch.testing.assert_close(run(kind, True), run(torchs, False))
