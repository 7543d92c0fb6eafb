"""ArcFace's two gradients, and Combined as the family that holds ArcFace and CosFace."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastface_lightning.margins import ArcFace, Combined, CosFace, Margin


def apply(margin: Margin, cos_y: Tensor) -> Tensor:
    return margin(cos_y, torch.full_like(cos_y, 20), torch.zeros(len(cos_y), dtype=torch.int64))


def test_arcface_gradient_in_closed_form() -> None:
    """d cos(theta + m) / d cos(theta) = sin(theta + m) / sin(theta), negative beyond pi - m."""
    theta = torch.linspace(0.01, 3.13, 60, dtype=torch.float64)
    cos_y = theta.cos().requires_grad_()
    (gradient,) = torch.autograd.grad(apply(ArcFace(0.5), cos_y).sum(), cos_y)
    torch.testing.assert_close(gradient, torch.sin(theta + 0.5) / torch.sin(theta))
    assert ((gradient < 0) == (theta > math.pi - 0.5)).all()


def test_straight_through_changes_the_gradient_and_not_the_value() -> None:
    cos_y = torch.linspace(-1, 1, 201, dtype=torch.float64)
    exact, straight = ArcFace(0.5), ArcFace(0.5, straight_through=True)
    torch.testing.assert_close(apply(straight, cos_y), apply(exact, cos_y), atol=1e-15, rtol=0)


def test_combined_holds_arcface_and_cosface() -> None:
    cos_y = torch.linspace(-1, 1, 201, dtype=torch.float64)
    torch.testing.assert_close(apply(Combined(1, 0.5, 0), cos_y), apply(ArcFace(0.5), cos_y))
    torch.testing.assert_close(apply(Combined(1, 0, 0.4), cos_y), apply(CosFace(0.4), cos_y))


@settings(max_examples=40, deadline=None)
@given(
    cos=st.floats(-1, 1),
    m1=st.floats(1, 2),
    m2=st.floats(0, 1),
    m3=st.floats(0, 1, exclude_min=True),
)
def test_combined_lowers_the_target(cos: float, m1: float, m2: float, m3: float) -> None:
    """Up to the angle where m1 theta + m2 reaches pi, cos_y' is never above cos_y."""
    cos_y = torch.tensor([cos], dtype=torch.float64)
    if m1 * math.acos(cos) + m2 <= math.pi:
        assert apply(Combined(m1, m2, m3), cos_y) <= cos_y + 1e-12
