"""ElasticFace samples its margins from N(m, std), one a sample, repeatably, in training only."""

import pytest
import torch

from fastface_lightning.margins import ElasticFace


def step(margin: ElasticFace, cos_y: torch.Tensor, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)
    return margin(cos_y, torch.full_like(cos_y, 20), torch.zeros(len(cos_y), dtype=torch.int64))


def test_margins_of_the_cosine_are_normal() -> None:
    cos_y = torch.zeros(20_000, dtype=torch.float64)
    sampled = -step(ElasticFace(0.35, 0.05, "cos"), cos_y)
    assert sampled.mean().item() == pytest.approx(0.35, abs=0.002)
    assert sampled.std().item() == pytest.approx(0.05, rel=0.03)
    inside = ((sampled - 0.35).abs() < 0.05).double().mean().item()
    assert inside == pytest.approx(0.6827, abs=0.015)
    assert len(sampled.unique()) == len(sampled)


def test_margins_of_the_angle_are_the_same_draws() -> None:
    """cos(theta + m_i) and its gradient, m_i read off the other kind with the same seed."""
    theta = torch.linspace(0.1, 3.0, 200, dtype=torch.float64)
    cos_y = theta.cos().requires_grad_()
    sampled = (cos_y - step(ElasticFace(0.5, 0.05, "cos"), cos_y)).detach()
    got = step(ElasticFace(0.5, 0.05), cos_y)
    torch.testing.assert_close(got, torch.cos(theta + sampled))
    (gradient,) = torch.autograd.grad(got.sum(), cos_y)
    torch.testing.assert_close(gradient, torch.sin(theta + sampled) / torch.sin(theta))


@pytest.mark.parametrize("kind", ["arc", "cos"])
def test_the_seed_repeats_the_draw_and_each_forward_has_its_own(kind: str) -> None:
    margin, cos_y = ElasticFace(0.3, kind=kind), torch.linspace(-0.5, 0.9, 9)  # type: ignore[arg-type]
    first = step(margin, cos_y)
    assert torch.equal(step(margin, cos_y), first)
    assert not torch.equal(step(margin, cos_y, seed=1), first)
    again = margin(cos_y, cos_y, torch.zeros(9, dtype=torch.int64))
    assert (again != step(margin, cos_y, seed=1)).all()
