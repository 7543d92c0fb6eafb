"""AdaFace's running statistics of the norm, and the margins it moves between."""

import math
import statistics
import warnings

import pytest
import torch
from torch import Tensor

from fastface_lightning.margins import AdaFace, ArcFace, CosFace

LABELS = torch.zeros(5, dtype=torch.int64)
COS = torch.linspace(-0.9, 0.9, 5)


def step(margin: AdaFace, norms: list[float]) -> Tensor:
    return margin(COS[: len(norms)], torch.tensor(norms), LABELS[: len(norms)])


def state(margin: AdaFace) -> list[float]:
    return [margin.mean.item(), margin.std.item()]


def test_statistics_start_at_20_and_100_and_follow_the_batches() -> None:
    margin = AdaFace()
    mean, std = 20.0, 100.0
    assert state(margin) == [mean, std]
    for norms in ([10.0, 12.0, 17.0], [30.0, 5.0], [21.0, 22.0, 23.0, 40.0]):
        step(margin, norms)
        mean = 0.99 * mean + 0.01 * statistics.mean(norms)
        std = 0.99 * std + 0.01 * statistics.stdev(norms)
        assert state(margin) == pytest.approx([mean, std], rel=1e-6)


def test_statistics_take_in_the_batch_before_they_are_used() -> None:
    """With alpha = 1 the batch is measured against itself."""
    norms = [10.0, 12.0, 17.0, 25.0, 11.0]
    got = step(AdaFace(alpha=1), norms)
    mean, std = statistics.mean(norms), statistics.stdev(norms)
    for cos, norm, prime in zip(COS.tolist(), norms, got.tolist(), strict=True):
        z = (norm - mean) / (std + 1e-3) * 0.333
        expected = math.cos(math.acos(cos) - 0.4 * z) - (0.4 + 0.4 * z)
        assert prime == pytest.approx(expected, abs=1e-6)


def test_norms_outside_0_001_and_100_count_as_these() -> None:
    margin = AdaFace(alpha=1)
    step(margin, [0.0, 1000.0, math.inf])
    assert state(margin) == pytest.approx(
        [statistics.mean([0.001, 100, 100]), statistics.stdev([0.001, 100, 100])]
    )


def test_one_sample_moves_the_mean_and_leaves_the_deviation() -> None:
    margin = AdaFace()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert step(margin, [30.0]).isfinite().all()
    assert state(margin) == pytest.approx([20.1, 100])


def test_nan_norm_does_not_reach_the_statistics() -> None:
    margin = AdaFace()
    got = step(margin, [10.0, math.nan, 12.0])
    assert state(margin) == [20, 100]
    assert got.isnan().tolist() == [False, True, False]


def test_half_precision_norms_feed_float32_statistics() -> None:
    margin = AdaFace(alpha=1)
    norm = torch.tensor([10.0, 12.0, 17.0, 25.0, 11.0])
    margin(COS.half(), norm.half(), LABELS)
    assert margin.mean.dtype == torch.float32
    torch.testing.assert_close(margin.mean, norm.mean(), atol=0.01, rtol=0)
    torch.testing.assert_close(margin.std, norm.std(), atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("norm", "limit"), [(0.0, ArcFace(0.4)), (20.0, CosFace(0.4))], ids=["poor", "average"]
)
def test_limits_are_arcface_and_cosface(norm: float, limit: ArcFace | CosFace) -> None:
    """With a deviation so small that z is -1 below the mean; 0 on it."""
    margin = AdaFace().eval()
    margin.std.fill_(1e-3)
    norms = torch.full((5,), norm)
    torch.testing.assert_close(margin(COS, norms, LABELS), limit(COS, norms, LABELS))


def test_a_good_image_has_the_angle_back_and_the_cosine_twice() -> None:
    margin = AdaFace().eval()
    margin.std.fill_(1e-3)
    got = margin(COS, torch.full((5,), 90.0), LABELS)
    torch.testing.assert_close(got, torch.cos(torch.acos(COS) - 0.4) - 0.8)


def test_h_zero_is_cosface() -> None:
    norms = torch.tensor([1.0, 5.0, 20.0, 60.0, 99.0])
    got = AdaFace(0.3, h=0)(COS, norms, LABELS)
    torch.testing.assert_close(got, CosFace(0.3)(COS, norms, LABELS))
