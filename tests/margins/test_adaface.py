"""AdaFace's running statistics of the norm, and the margins it moves between."""

import math
import statistics
import warnings

import pytest
import torch
from torch import Tensor

from fastface_lightning.margins import AdaFace

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
    step(margin, [10.0, math.nan, 12.0])
    assert state(margin) == pytest.approx([mean, std], rel=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        step(margin, [1000.0])  # counts as 100, and has no deviation
    assert state(margin) == pytest.approx([0.99 * mean + 1, std], rel=1e-6)


def test_statistics_take_in_the_batch_before_they_are_used() -> None:
    """With alpha = 1 the batch is measured against itself."""
    norms = [10.0, 12.0, 17.0, 25.0, 11.0]
    got = step(AdaFace(alpha=1), norms)
    mean, std = statistics.mean(norms), statistics.stdev(norms)
    for cos, norm, prime in zip(COS.tolist(), norms, got.tolist(), strict=True):
        z = (norm - mean) / (std + 1e-3) * 0.333
        expected = math.cos(math.acos(cos) - 0.4 * z) - (0.4 + 0.4 * z)
        assert prime == pytest.approx(expected, abs=1e-6)
