"""CurricularFace's hard negatives, the statistic t that weighs them, and the target's fallback."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastface_lightning.margins import CurricularFace

cosines = st.floats(-1, 1)


def with_t(t: float, m: float = 0.5) -> CurricularFace:
    """In eval mode and float64, t as though it had trained."""
    margin = CurricularFace(m).double().eval()
    margin.t.fill_(t)
    return margin


def step(margin: CurricularFace, cos_y: Tensor) -> Tensor:
    return margin(cos_y, torch.full_like(cos_y, 20), torch.zeros(len(cos_y), dtype=torch.int64))


def twin(cos: float, cos_y: float, t: float, m: float) -> float:
    return cos * (t + cos) if cos > math.cos(math.acos(cos_y) + m) else cos


@settings(max_examples=40, deadline=None)
@given(
    rows=st.lists(st.tuples(cosines, cosines, cosines, cosines), min_size=1, max_size=6),
    t=cosines,
    m=st.floats(0, 1),
)
def test_negatives(rows: list[tuple[float, ...]], t: float, m: float) -> None:
    cos_y, *columns = torch.tensor(rows, dtype=torch.float64).T
    margin = with_t(t, m)
    got = margin.negatives(torch.stack(columns, dim=1), cos_y, step(margin, cos_y))
    for (own, *others), row in zip(rows, got.tolist(), strict=True):
        near = math.cos(math.acos(own) + m)
        for cos, value in zip(others, row, strict=True):
            if abs(cos - near) > 1e-12:  # a tie is decided by rounding
                assert value == pytest.approx(twin(cos, own, t, m), abs=1e-12)


def test_gradient_of_the_negatives() -> None:
    """t + 2 cos where hard, 1 elsewhere; none reaches the target's cosine."""
    cos_y = torch.tensor([0.7, 0.1], dtype=torch.float64, requires_grad=True)
    cos = torch.linspace(-0.9, 0.9, 12, dtype=torch.float64).repeat(2, 1).requires_grad_()
    margin = with_t(0.3)
    result = margin.negatives(cos, cos_y, step(margin, cos_y))
    by_cos, by_target = torch.autograd.grad(result.sum(), (cos, cos_y), materialize_grads=True)
    hard = cos > torch.cos(torch.acos(cos_y) + 0.5)[:, None]
    assert hard.any(dim=1).all() and not hard.all()
    torch.testing.assert_close(by_cos, torch.where(hard, 0.3 + 2 * cos, 1.0))
    assert not by_target.any()


def test_negatives_are_compared_with_the_angle_and_not_with_the_fallback() -> None:
    """At cos_y = -0.95 the target falls back to -1.19; cos(theta + m) is -0.98."""
    margin = with_t(0.4)
    cos_y = torch.tensor([-0.95], dtype=torch.float64)
    cos_y_prime = step(margin, cos_y)
    assert cos_y_prime.item() == pytest.approx(-0.95 - 0.5 * math.sin(0.5))
    cos = torch.tensor([[-0.995, -0.97]], dtype=torch.float64)
    got = margin.negatives(cos, cos_y, cos_y_prime)
    torch.testing.assert_close(got, torch.tensor([[-0.995, -0.97 * (0.4 - 0.97)]]).double())


def test_t_follows_the_mean_target_cosine() -> None:
    margin, expected = CurricularFace(), 0.0
    assert margin.t == 0
    for cos in ([0.1, 0.3], [0.9, 0.7, 0.8], [-0.5]):
        step(margin, torch.tensor(cos))
        expected = 0.99 * expected + 0.01 * sum(cos) / len(cos)
        assert margin.t.item() == pytest.approx(expected, rel=1e-6)
    step(margin, torch.tensor([0.5, math.nan]))
    assert margin.t.item() == pytest.approx(expected, rel=1e-6)


def test_t_takes_in_the_batch_before_it_is_used() -> None:
    margin = CurricularFace(alpha=1)
    cos_y = torch.tensor([0.2, 0.4])
    cos_y_prime = step(margin, cos_y)
    got = margin.negatives(torch.full((2, 1), 0.9), cos_y, cos_y_prime)
    torch.testing.assert_close(got, torch.full((2, 1), 0.9 * (0.3 + 0.9)))
