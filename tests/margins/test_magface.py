"""MagFace's margin over the norm, its penalty, and the balance of the two."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastface_lightning.margins import MagFace


def cos_prime(cos: float, norms: torch.Tensor, margin: MagFace | None = None) -> torch.Tensor:
    cos_y = torch.full_like(norms, cos)
    return (margin or MagFace())(cos_y, norms, torch.zeros(len(norms), dtype=torch.int64))


@settings(max_examples=40, deadline=None)
@given(st.floats(0.1, 200).filter(lambda norm: norm not in (10, 110)))
def test_penalty(norm: float) -> None:
    a = torch.tensor([norm], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(MagFace().penalty(a).sum(), a)
    held = min(max(norm, 10), 110)
    assert MagFace().penalty(a).item() == pytest.approx(35 * (held / 110**2 + 1 / held), rel=1e-12)
    expected = 35 * (1 / 110**2 - 1 / norm**2) if 10 < norm < 110 else 0
    assert slope.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_penalty_is_least_and_flat_at_the_upper_norm() -> None:
    norms = torch.linspace(1, 200, 400, dtype=torch.float64)
    penalty = MagFace().penalty(norms)
    assert (penalty.diff() <= 0).all()
    at_top = MagFace().penalty(torch.tensor([110.0], dtype=torch.float64)).item()
    assert penalty.min().item() == pytest.approx(at_top) == pytest.approx(35 * 2 / 110)


def test_no_weight_no_penalty() -> None:
    assert not MagFace(lambda_g=0).penalty(torch.tensor([0.0, 30.0])).any()


def test_margin_is_linear_between_the_norms_and_constant_outside() -> None:
    norms = torch.tensor([0.0, 10.0, 35.0, 60.0, 110.0, 500.0], dtype=torch.float64)
    margin = torch.acos(cos_prime(0.6, norms)) - torch.acos(torch.tensor(0.6, dtype=torch.float64))
    expected = torch.tensor([0.45, 0.45, 0.5375, 0.625, 0.8, 0.8], dtype=torch.float64)
    torch.testing.assert_close(margin, expected)


def test_no_margin_at_and_beyond_90_degrees() -> None:
    norms = torch.tensor([10.0, 60.0, 110.0])
    for cos in (0.0, -0.3, -1.0):
        assert torch.equal(cos_prime(cos, norms), torch.full((3,), cos))


def test_only_a_sample_near_its_centre_can_afford_to_be_long() -> None:
    """Least total loss over the norm: a higher norm for the better of two samples."""
    norms = torch.linspace(10, 110, 1001, dtype=torch.float64)
    best = []
    for cos in (0.6, 0.95):
        target = 64 * cos_prime(cos, norms)
        loss = torch.log1p(torch.exp(64 * 0.4 - target)) + MagFace().penalty(norms)
        best.append(norms[loss.argmin()].item())
    assert best[0] < best[1]


def test_float16_penalty_is_finite() -> None:
    penalty = MagFace().penalty(torch.tensor([0.0, 22.0, 60000.0], dtype=torch.float16))
    assert penalty.dtype == torch.float16 and penalty.isfinite().all()
