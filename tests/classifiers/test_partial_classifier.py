"""PartialClassifier: which classes a step has, that it is the full loss over them, and no more."""

import copy

import pytest
import torch
from cases import MARGINS, batch, counterpart, outcome
from hypothesis import given, settings
from hypothesis import strategies as st

from fastface_lightning.classifiers import ChunkedClassifier, FullClassifier, PartialClassifier
from fastface_lightning.margins import ArcFace, CurricularFace, Margin
from fastface_lightning.optim import SGD

margins = pytest.mark.parametrize("margin", MARGINS, ids=repr)


def test_at_rate_one_it_is_the_full_classifier() -> None:
    x, labels = batch(8, 30, 5)
    full = FullClassifier(30, 5, CurricularFace(), interclass_filter=0.4).double()
    other = counterpart(PartialClassifier, full, rate=1.0, chunk=7)
    torch.testing.assert_close(
        outcome(other, x, labels), outcome(full, x, labels), rtol=1e-10, atol=1e-10
    )


@margins
def test_it_is_the_full_classifier_over_the_sampled_classes(
    margin: Margin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same margin on the same labels; the rows are only numbered anew."""
    x, labels = batch(6, 40, 5)
    partial = PartialClassifier(40, 5, copy.deepcopy(margin), rate=0.5, chunk=3).double()
    classes = partial.sample(labels)
    monkeypatch.setattr(partial, "sample", lambda _: classes)
    part = counterpart(ChunkedClassifier, partial)
    part.weight = torch.nn.Parameter(partial.weight.detach()[classes])
    rows = torch.searchsorted(classes, labels)
    # A margin sees the labels that the data have.
    monkeypatch.setattr(part, "candidates", lambda _: (part.weight, rows))
    loss, grad, grad_weight = outcome(partial, x, labels)
    assert grad_weight.is_sparse and grad_weight.shape == (40, 5)
    expected = torch.zeros(40, 5, dtype=torch.float64)
    want = outcome(part, x, labels)
    expected[classes] = want[2]
    torch.testing.assert_close((loss, grad), want[:2])
    torch.testing.assert_close(grad_weight.to_dense(), expected)


@settings(deadline=None, max_examples=40)
@given(
    num_classes=st.integers(1, 60),
    n=st.integers(1, 40),
    rate=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**31),
)
def test_sample(num_classes: int, n: int, rate: float, seed: int) -> None:
    """Every positive, no class twice, ascending, and floor(rate C) of them if all fit in."""
    _, labels = batch(n, num_classes, 2, seed)
    classes = PartialClassifier(num_classes, 2, rate=rate).sample(labels)
    assert classes.dtype == torch.int64 and (classes.diff() > 0).all()
    assert set(labels.tolist()) <= set(classes.tolist()) <= set(range(num_classes))
    assert len(classes) == max(int(rate * num_classes), min(n, num_classes))


def test_the_sample_is_uniform_and_by_torchs_generator() -> None:
    partial = PartialClassifier(100, 2, rate=0.2)
    labels = torch.tensor([3, 7])
    torch.manual_seed(0)
    first = partial.sample(labels)
    counts = torch.bincount(torch.cat([partial.sample(labels) for _ in range(3000)]), minlength=100)
    torch.manual_seed(0)
    assert torch.equal(partial.sample(labels), first)
    assert (counts[labels] == 3000).all()
    others = counts[[j for j in range(100) if j not in (3, 7)]]
    assert ((others - 3000 * 18 / 98).abs() < 5 * (3000 * 0.18) ** 0.5).all()


def test_only_sampled_rows_move_and_decay() -> None:
    """Gradient, momentum and weight decay: a twin with dense rows, ten steps long."""
    torch.manual_seed(0)
    partial = PartialClassifier(50, 4, ArcFace(), rate=0.3).double()
    optimizer = SGD(partial.parameters(), lr=0.1, momentum=0.9, weight_decay=0.05)
    weight, momentum = partial.weight.detach().clone(), torch.zeros(50, 4, dtype=torch.float64)
    x, labels = batch(6, 50, 4)
    for _ in range(10):
        optimizer.zero_grad()
        partial(x, labels).backward()
        grad = partial.weight.grad
        assert grad is not None
        rows = grad.coalesce().indices()[0]
        assert len(rows) == 15
        step = grad.to_dense()[rows] + 0.05 * weight[rows]
        momentum[rows] = 0.9 * momentum[rows] + step
        weight[rows] -= 0.1 * momentum[rows]
        optimizer.step()
        torch.testing.assert_close(partial.weight.detach(), weight)
    held = optimizer.state[partial.weight]["momentum_buffer"]
    torch.testing.assert_close(held, momentum)
    assert not held.all(1).all()  # some class was never sampled: neither its row nor its momentum
