"""What holds for every margin: its formula, gradient, range, dtypes, hooks and state.

Each margin has a scalar twin in float64, cosine and norm to target cosine, written with nothing but
``math``. Margins that learn from the batches or draw are here in eval mode; what they do in
training stands in their own files.
"""

import copy
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import TypeVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastface_lightning.margins import (
    AdaFace,
    ArcFace,
    Combined,
    CosFace,
    CurricularFace,
    ElasticFace,
    MagFace,
    Margin,
    Softmax,
)
from fastface_lightning.margins.base import angle

Twin = Callable[[float, float], float]
AnyMargin = TypeVar("AnyMargin", bound=Margin)


def combined(m1: float, m2: float, m3: float) -> Twin:
    return lambda cos, norm: math.cos(m1 * math.acos(cos) + m2) - m3


def clip(value: float, low: float, high: float) -> float:
    return min(max(value, low), high)


def adaface(m: float, h: float, mean: float, std: float) -> Twin:
    def twin(cos: float, norm: float) -> float:
        z = clip((clip(norm, 0.001, 100) - mean) / (std + 0.001) * h, -1, 1)
        theta = math.acos(clip(cos, -0.999, 0.999))
        return math.cos(clip(theta - m * z, 0.001, math.pi - 0.001)) - (m + m * z)

    return twin


def magface(l_a: float, u_a: float, l_m: float, u_m: float) -> Twin:
    def twin(cos: float, norm: float) -> float:
        m = l_m + (u_m - l_m) * (clip(norm, l_a, u_a) - l_a) / (u_a - l_a)
        return math.cos(math.acos(cos) + m) if cos > 0 else cos

    return twin


def curricularface(m: float) -> Twin:
    arcface, fallback = combined(1, m, 0), combined(1, 0, m * math.sin(m))
    return lambda cos, norm: (arcface if math.acos(cos) < math.pi - m else fallback)(cos, norm)


def trained(margin: AnyMargin, **statistics: float) -> AnyMargin:
    """The margin in eval mode, its running statistics as though it had trained."""
    for name, value in statistics.items():
        getattr(margin, name).fill_(value)
    return margin.eval()


MARGINS: list[tuple[Margin, Twin]] = [
    (Softmax(), lambda cos, norm: cos),
    (CosFace(), combined(1, 0, 0.4)),
    (CosFace(0.35), combined(1, 0, 0.35)),
    (ArcFace(), combined(1, 0.5, 0)),
    (ArcFace(0.3, straight_through=True), combined(1, 0.3, 0)),
    (Combined(), combined(1, 0, 0.4)),
    (Combined(0.9, 0.4, 0.15), combined(0.9, 0.4, 0.15)),
    (Combined(1.35, 0.0, 0.0), combined(1.35, 0, 0)),  # sphereface
    (AdaFace().eval(), adaface(0.4, 0.333, 20, 100)),
    (trained(AdaFace(0.5, 0.7), mean=18, std=4), adaface(0.5, 0.7, 18, 4)),
    (MagFace(), magface(10, 110, 0.45, 0.8)),
    (MagFace(5, 40, 0.2, 1.5, 0), magface(5, 40, 0.2, 1.5)),
    (CurricularFace().eval(), curricularface(0.5)),
    (trained(CurricularFace(0.3), t=0.6), curricularface(0.3)),
    (ElasticFace().eval(), combined(1, 0.5, 0)),
    (ElasticFace(0.35, 0.1, "cos").eval(), combined(1, 0, 0.35)),
]
margins = pytest.mark.parametrize(("margin", "twin"), MARGINS, ids=[repr(m) for m, _ in MARGINS])
alone = pytest.mark.parametrize("margin", [margin for margin, _ in MARGINS], ids=repr)


def apply(margin: Margin, cos_y: Tensor, norm: Tensor | None = None) -> Tensor:
    """Call a margin, by default with norms of 20; no margin looks at the label."""
    norm = torch.full_like(cos_y, 20) if norm is None else norm
    return margin(cos_y, norm, torch.zeros(len(cos_y), dtype=torch.int64))


def double(margin: AnyMargin) -> AnyMargin:
    return copy.deepcopy(margin).double()


@margins
@settings(max_examples=20, deadline=None)
@given(samples=st.lists(st.tuples(st.floats(-1, 1), st.floats(0, 200)), min_size=1, max_size=20))
def test_formula(margin: Margin, twin: Twin, samples: list[tuple[float, float]]) -> None:
    cos_y, norm = torch.tensor(samples, dtype=torch.float64).T
    expected = torch.tensor([twin(*sample) for sample in samples], dtype=torch.float64)
    got = apply(double(margin), cos_y, norm)
    torch.testing.assert_close(got, expected, atol=1e-12, rtol=0)


@margins
def test_gradient_is_exact_unless_straight_through(margin: Margin, twin: Twin) -> None:
    """Against central differences of the twin; only MagFace lets a gradient reach the norm."""
    samples = [(-0.99 + 1.98 * i / 49, 1 + (37 * i) % 130) for i in range(50)]
    cos_y, norm = torch.tensor(samples, dtype=torch.float64).T.requires_grad_()
    got = torch.autograd.grad(
        apply(double(margin), cos_y, norm).sum(), (cos_y, norm), materialize_grads=True
    )
    step = 1e-6
    by_cos = [(twin(c + step, a) - twin(c - step, a)) / (2 * step) for c, a in samples]
    by_norm = [(twin(c, a + step) - twin(c, a - step)) / (2 * step) for c, a in samples]
    if getattr(margin, "straight_through", False):
        by_cos = [1.0] * 50
    if not isinstance(margin, MagFace):
        by_norm = [0.0] * 50
    expected = torch.tensor([by_cos, by_norm], dtype=torch.float64)
    torch.testing.assert_close(torch.stack(got), expected, atol=1e-8, rtol=1e-6)


@margins
@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16])
def test_every_dtype_is_kept_and_finite(
    margin: Margin, twin: Twin, autocast: torch.dtype | None
) -> None:
    """Cosines of any dtype, edges and one step beyond them; norms of the same or of float32."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        one = torch.ones(1, dtype=dtype)
        beyond = torch.nextafter(one, 2 * one)
        cos_y = torch.cat([-beyond, torch.linspace(-1, 1, 21).to(dtype), beyond]).requires_grad_()
        norm = torch.full((23,), 30.0, dtype=torch.float32 if autocast else dtype)
        with torch.autocast("cpu", dtype=autocast) if autocast else nullcontext():
            got = apply(margin, cos_y, norm)
            hard = margin.negatives(cos_y[:, None], cos_y, got)
            penalty = margin.penalty(norm)
            (got.sum() + hard.sum() + penalty.sum()).backward()
        assert (got.dtype, hard.dtype, penalty.dtype) == (dtype, dtype, norm.dtype)
        assert cos_y.grad is not None and cos_y.grad.isfinite().all()
        expected = torch.tensor([twin(clip(cos, -1, 1), 30) for cos in cos_y.tolist()])
        tolerance = max(16 * torch.finfo(dtype).eps, 1e-6)
        torch.testing.assert_close(got.float(), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_angle_is_finite_at_and_beyond_the_edges(dtype: torch.dtype) -> None:
    one = torch.ones((), dtype=dtype)
    short, beyond = torch.nextafter(one, -one), torch.nextafter(one, 2 * one)
    cos = torch.stack([-beyond, -one, -short, short, one, beyond]).requires_grad_()
    theta = angle(cos)
    theta.sum().backward()
    assert cos.grad is not None and cos.grad.isfinite().all()
    assert cos.grad[[0, 1, 4, 5]].abs().max() < 0.01
    edges = torch.tensor([math.pi, math.pi, 0, 0], dtype=dtype)
    torch.testing.assert_close(theta[[0, 1, 4, 5]], edges, atol=0.01, rtol=0)
    assert (theta.diff() <= 0).all() and angle(one * math.nan).isnan()


@settings(max_examples=40, deadline=None)
@given(st.floats(0.1, 200).filter(lambda norm: norm not in (10, 110)))
def test_magfaces_penalty(norm: float) -> None:
    a = torch.tensor([norm], dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(MagFace().penalty(a).sum(), a)
    held = min(max(norm, 10), 110)
    assert MagFace().penalty(a).item() == pytest.approx(35 * (held / 110**2 + 1 / held), rel=1e-12)
    expected = 35 * (1 / 110**2 - 1 / norm**2) if 10 < norm < 110 else 0
    assert slope.item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


@alone
def test_nothing_waits_for_the_device(margin: Margin) -> None:
    """A meta tensor has no values: reading one, or branching on one, would raise."""
    margin = copy.deepcopy(margin).to("meta").train()
    cos_y = torch.empty(4, device="meta", requires_grad=True)
    norm = torch.empty(4, device="meta", requires_grad=True)
    cos_y_prime = margin(cos_y, norm, torch.empty(4, dtype=torch.int64, device="meta"))
    hard = margin.negatives(torch.empty(4, 7, device="meta"), cos_y, cos_y_prime)
    penalty = margin.penalty(norm)
    assert (cos_y_prime.shape, hard.shape, penalty.shape) == ((4,), (4, 7), (4,))
    (cos_y_prime.sum() + penalty.sum()).backward()


@alone
def test_statistics_move_in_training_only_and_are_saved(margin: Margin) -> None:
    cos_y, norm = torch.linspace(-0.2, 0.9, 8), torch.linspace(3, 30, 8)
    before = copy.deepcopy(margin.state_dict())
    apply(margin, cos_y, norm)
    margin.negatives(cos_y[:, None], cos_y, cos_y)
    assert margin.state_dict() == before
    training = copy.deepcopy(margin).train()
    apply(training, cos_y, norm)
    after = copy.deepcopy(training.state_dict())
    assert all(after[name] != before[name] for name in before)
    training.negatives(cos_y[:, None], cos_y, cos_y)
    training.penalty(norm)
    assert training.state_dict() == after
    resumed = copy.deepcopy(margin)
    resumed.load_state_dict(after)
    assert torch.equal(apply(resumed, cos_y, norm), apply(training.eval(), cos_y, norm))


@alone
def test_several_forwards_may_share_a_backward(margin: Margin) -> None:
    """A statistic moves in place; no backward may need what it was."""
    training = copy.deepcopy(margin).train()
    cos_y = torch.rand(2, 6).requires_grad_()
    cos = torch.rand(6, 9).requires_grad_()
    total = torch.zeros(())
    for row in cos_y:
        cos_y_prime = apply(training, row)
        total = total + cos_y_prime.sum() + training.negatives(cos, row, cos_y_prime).sum()
    total.backward()


@alone
def test_the_classifier_may_write_into_the_negatives(margin: Margin) -> None:
    """As base.py says: in place, into what the last operation returned."""
    cos = (0.9 * torch.rand(4, 6, dtype=torch.float64) + 0.05).requires_grad_()
    own = torch.arange(4), torch.tensor([0, 5, 2, 2])
    margin = double(margin)

    def logits(in_place: bool) -> Tensor:
        raw = cos * 1  # a result as the classifier's own, not a leaf
        cos_y_prime = apply(margin, raw[own])
        changed = margin.negatives(raw, raw[own], cos_y_prime)
        changed = changed if in_place else changed.clone()
        changed[own] = cos_y_prime
        changed *= 3
        return changed

    weight = torch.randn(4, 6, dtype=torch.float64)
    got, expected = [
        torch.autograd.grad((weight * logits(in_place)).sum(), cos)[0] for in_place in (True, False)
    ]
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (CosFace, {"m": math.nan}),
        (ArcFace, {"m": math.pi}),
        (Combined, {"m1": 0}),
        (AdaFace, {"alpha": 0}),
        (MagFace, {"u_a": 10}),
        (CurricularFace, {"m": -1}),
        (ElasticFace, {"m": 2, "kind": "cos"}),
    ],
)
def test_refuses_arguments_out_of_range(kind: type[Margin], arguments: dict[str, object]) -> None:
    name, value = next(iter(arguments.items()))
    with pytest.raises(ValueError, match=rf"\b{name}\b.* must .*{value}"):
        kind(**arguments)
