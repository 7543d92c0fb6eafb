"""The angle of a cosine equals arccos inside [-1, 1] and stays finite at and beyond its edges."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastface_lightning.margins.angle import angle


@settings(max_examples=40, deadline=None)
@given(st.floats(-1, 1))
def test_equals_arccos(cos: float) -> None:
    # math.acos is within one rounding; near the edge both inherit sqrt(eps) from 1 - cos.
    assert angle(torch.tensor(cos, dtype=torch.float64)).item() == pytest.approx(
        math.acos(cos), abs=1e-12
    )


def test_gradient_is_that_of_arccos() -> None:
    cos = torch.linspace(-0.999, 0.999, 101, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(angle, cos)
    (gradient,) = torch.autograd.grad(angle(cos).sum(), cos)
    torch.testing.assert_close(gradient, -1 / torch.sqrt(1 - cos**2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_at_and_beyond_the_edges(dtype: torch.dtype) -> None:
    one = torch.ones((), dtype=dtype)
    short, beyond = torch.nextafter(one, -one), torch.nextafter(one, 2 * one)
    cos = torch.stack([-beyond, -one, -short, short, one, beyond]).requires_grad_()
    theta = angle(cos)
    theta.sum().backward()
    assert cos.grad is not None and cos.grad.isfinite().all()
    assert cos.grad[[0, 1, 4, 5]].abs().max() < 0.01
    edges = torch.tensor([math.pi, math.pi, 0, 0], dtype=dtype)
    torch.testing.assert_close(theta[[0, 1, 4, 5]], edges, atol=0.01, rtol=0)
    assert (theta.diff() <= 0).all()


def test_float32_derivative_stays_below_3000() -> None:
    cos = torch.nextafter(torch.tensor(1.0), torch.tensor(0.0)).requires_grad_()
    angle(cos).backward()
    assert cos.grad is not None and -3000 < cos.grad < -2800


def test_nan_stays_nan() -> None:
    assert angle(torch.tensor(math.nan)).isnan()
