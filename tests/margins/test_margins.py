"""Each margin's formula, gradient, range and hooks, against scalar twins in float64."""

import copy
import math
import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fastface_lightning.margins import ArcFace, Combined, CosFace, Margin, Softmax

MARGINS: list[tuple[Margin, Callable[[float], float]]] = [
    (Softmax(), lambda cos: cos),
    (CosFace(), lambda cos: cos - 0.4),
    (CosFace(0.35), lambda cos: cos - 0.35),
    (ArcFace(), lambda cos: math.cos(math.acos(cos) + 0.5)),
    (ArcFace(0.3, straight_through=True), lambda cos: math.cos(math.acos(cos) + 0.3)),
    (Combined(), lambda cos: cos - 0.4),
    (Combined(0.9, 0.4, 0.15), lambda cos: math.cos(0.9 * math.acos(cos) + 0.4) - 0.15),
    (Combined(1.35, 0.0, 0.0), lambda cos: math.cos(1.35 * math.acos(cos))),
]
margins = pytest.mark.parametrize(("margin", "twin"), MARGINS, ids=[repr(m) for m, _ in MARGINS])


def apply(margin: Margin, cos_y: Tensor) -> Tensor:
    """Call a margin that looks at neither norm nor label."""
    return margin(cos_y, torch.full_like(cos_y, 20), torch.zeros(len(cos_y), dtype=torch.int64))


@margins
@given(cosines=st.lists(st.floats(-1, 1), min_size=1, max_size=20))
def test_formula(margin: Margin, twin: Callable[[float], float], cosines: list[float]) -> None:
    got = apply(margin, torch.tensor(cosines, dtype=torch.float64))
    expected = torch.tensor([twin(cos) for cos in cosines], dtype=torch.float64)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


@margins
def test_float32_agrees_with_float64(margin: Margin, twin: Callable[[float], float]) -> None:
    cos_y = torch.linspace(-1, 1, 1001)
    got = apply(margin, cos_y)
    assert got.dtype == torch.float32 and got.shape == cos_y.shape
    expected = torch.tensor([twin(cos) for cos in cos_y.tolist()])
    torch.testing.assert_close(got, expected, atol=1e-6, rtol=0)


@margins
def test_gradient_is_exact_unless_straight_through(
    margin: Margin, twin: Callable[[float], float]
) -> None:
    del twin
    cos_y = torch.linspace(-0.99, 0.99, 51, dtype=torch.float64, requires_grad=True)
    if getattr(margin, "straight_through", False):
        (gradient,) = torch.autograd.grad(apply(margin, cos_y).sum(), cos_y)
        assert (gradient == 1).all()
    else:
        assert torch.autograd.gradcheck(lambda cos: apply(margin, cos), cos_y)


@margins
def test_finite_at_the_edges(margin: Margin, twin: Callable[[float], float]) -> None:
    """Rounding may carry a float32 cosine past 1; value and gradient stay finite."""
    cos_y = torch.tensor([-1 - 1e-6, -1.0, 1.0, 1 + 1e-6], requires_grad=True)
    cos_y_prime = apply(margin, cos_y)
    cos_y_prime.sum().backward()
    expected = torch.tensor([twin(cos) for cos in [-1.0, -1.0, 1.0, 1.0]])
    torch.testing.assert_close(cos_y_prime, expected, atol=3e-6, rtol=0)
    assert cos_y.grad is not None and cos_y.grad.isfinite().all()


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


@given(
    cos=st.floats(-1, 1),
    m1=st.floats(1, 2),
    m2=st.floats(0, 1),
    m3=st.floats(0, 1, exclude_min=True),
)
def test_a_margin_lowers_the_target(cos: float, m1: float, m2: float, m3: float) -> None:
    """Up to the angle where m1 theta + m2 reaches pi, cos_y' is never above cos_y."""
    cos_y = torch.tensor([cos], dtype=torch.float64)
    if m1 * math.acos(cos) + m2 <= math.pi:
        assert apply(Combined(m1, m2, m3), cos_y) <= cos_y + 1e-12


@margins
def test_default_hooks_do_nothing(margin: Margin, twin: Callable[[float], float]) -> None:
    del twin
    cos, cos_y = torch.rand(3, 5), torch.rand(3)
    assert margin.negatives(cos, cos_y, cos_y - 0.4) is cos
    assert torch.equal(margin.penalty(torch.tensor([0.0, 3.0])), torch.zeros(2))


@margins
def test_no_parameters_and_no_state(margin: Margin, twin: Callable[[float], float]) -> None:
    del twin
    assert not list(margin.parameters()) and not margin.state_dict()
    cos_y = torch.linspace(-1, 1, 11)
    assert torch.equal(apply(copy.deepcopy(margin), cos_y), apply(margin, cos_y))


def test_base_class_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        Margin()  # type: ignore[abstract]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CosFace(-0.1), "m must lie in [0, 2), got -0.1"),
        (lambda: CosFace(2), "m must lie in [0, 2), got 2"),
        (lambda: CosFace(math.nan), "m must lie in [0, 2), got nan"),
        (lambda: ArcFace(4), "m must lie in [0, pi), got 4"),
        (lambda: ArcFace(-0.5), "m must lie in [0, pi), got -0.5"),
        (lambda: ArcFace(math.pi), "m must lie in [0, pi), got 3.14"),
        (lambda: Combined(m1=0), "m1 must be positive and finite, got 0"),
        (lambda: Combined(m1=math.inf), "m1 must be positive and finite, got inf"),
        (lambda: Combined(m2=-1), "m2 must lie in [0, pi), got -1"),
        (lambda: Combined(m3=2.5), "m3 must lie in [0, 2), got 2.5"),
    ],
)
def test_refuses_margins_out_of_range(build: Callable[[], Margin], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        build()


def test_repr_names_the_margin() -> None:
    assert repr(ArcFace(0.3)) == "ArcFace(m=0.3, straight_through=False)"
    assert repr(CosFace()) == "CosFace(m=0.4)"
    assert repr(Combined()) == "Combined(m1=1.0, m2=0.0, m3=0.4)"
