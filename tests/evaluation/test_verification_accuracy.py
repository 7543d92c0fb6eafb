"""Ten-fold verification against loops over pairs, thresholds and sklearn's folds."""

import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.model_selection import KFold
from torch import Tensor

from fastface_lightning.evaluation import verification_accuracy


def twin(
    a: np.ndarray, b: np.ndarray, same: np.ndarray, folds: int
) -> tuple[float, float, list[float]]:
    """The protocol as one would say it: every fold, every threshold, every pair."""
    thresholds = np.arange(0, 4, 0.01)
    distances = [float(np.sum((p - q) ** 2)) for p, q in zip(a, b, strict=True)]
    accuracies, chosen = [], []
    for train, test in KFold(folds, shuffle=False).split(distances):

        def accuracy(threshold: float, pairs: np.ndarray) -> float:
            right = [(distances[i] < threshold) == bool(same[i]) for i in pairs]
            return sum(right) / len(right)

        best = max(thresholds, key=lambda threshold: accuracy(threshold, train))
        accuracies.append(accuracy(best, test))
        chosen.append(best)
    return float(np.mean(accuracies)), float(np.std(accuracies)), chosen


def unit_pairs(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Embeddings of n pairs; half of them show one person, a little changed in the second image."""
    generator = torch.Generator().manual_seed(seed)
    a, other = torch.randn(2, n, 8, generator=generator, dtype=torch.float64)
    same = torch.rand(n, generator=generator) < 0.5
    b = torch.where(same[:, None], a + 1.2 * other, other)
    a, b = (torch.nn.functional.normalize(x).to(dtype) for x in (a, b))
    return a, b, same


def pairs_at(distances: list[float]) -> tuple[Tensor, Tensor]:
    """Pairs of unit vectors at given squared distances, up to rounding."""
    theta = 2 * torch.asin(torch.tensor(distances, dtype=torch.float64).sqrt() / 2)
    b = torch.stack([theta.cos(), theta.sin()], 1)
    return torch.tensor([[1.0, 0.0]], dtype=torch.float64).expand_as(b), b


@settings(deadline=None, max_examples=25)
@given(folds=st.integers(2, 6), extra=st.integers(0, 25), seed=st.integers(0, 2**31))
def test_equals_the_loops(folds: int, extra: int, seed: int) -> None:
    a, b, same = unit_pairs(folds + extra, seed)
    accuracy, std, thresholds = twin(a.numpy(), b.numpy(), same.numpy(), folds)
    result = verification_accuracy(a, b, same, folds)
    assert result.accuracy == pytest.approx(accuracy, abs=1e-12)
    assert result.std == pytest.approx(std, abs=1e-12)
    assert result.thresholds.tolist() == thresholds


def test_float32_distances_equal_the_loops() -> None:
    """Embeddings are compared in their own dtype: distances of float32 in float32."""
    a, b, same = unit_pairs(83, dtype=torch.float32)
    accuracy, std, thresholds = twin(a.numpy(), b.numpy(), same.numpy(), 10)
    result = verification_accuracy(a, b, same)
    assert (result.accuracy, result.std) == pytest.approx((accuracy, std), abs=1e-12)
    assert result.thresholds.tolist() == thresholds


def test_first_of_equally_good_thresholds() -> None:
    """Every threshold in (0.305, 1.705] is perfect; the grid's first one is 0.31."""
    a, b = pairs_at([0.305, 1.705] * 10)
    result = verification_accuracy(a, b, torch.tensor([True, False] * 10))
    assert result.thresholds.tolist() == pytest.approx([0.31] * 10)


def test_a_distance_equal_to_the_threshold_is_not_below_it() -> None:
    """Equal images have distance 0, and threshold 0 calls them different."""
    a = torch.eye(4, dtype=torch.float64)
    result = verification_accuracy(a, a, torch.ones(4, dtype=torch.bool), folds=2)
    assert result.thresholds.tolist() == [0.01, 0.01]
    assert verification_accuracy(a, a, torch.zeros(4, dtype=torch.bool), folds=2).accuracy == 1.0
    # (1, 0) and (1, 0.5) lie 0.25 apart, a number of the grid that float64 holds exactly.
    a, b = torch.tensor([[1.0, 0.0]] * 4), torch.tensor([[1.0, 0.5]] * 4)
    result = verification_accuracy(a, b, torch.ones(4, dtype=torch.bool), folds=2)
    assert result.thresholds.tolist() == [0.26, 0.26]


def test_standard_deviation_is_that_of_the_population() -> None:
    """Folds that score 1 and 0.5 deviate by 0.25; the sample's estimate would be 0.354."""
    a, b = pairs_at([0.5, 1.5, 0.8, 1.0])
    result = verification_accuracy(a, b, torch.tensor([True, False, True, False]), folds=2)
    assert (result.accuracy, result.std) == (0.75, 0.25)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_embeddings(dtype: torch.dtype) -> None:
    a, b, same = unit_pairs(100)
    half = verification_accuracy(a.to(dtype), b.to(dtype), same)
    assert half.accuracy == pytest.approx(verification_accuracy(a, b, same).accuracy, abs=0.05)


def broken_pair(value: float) -> Tensor:
    a = torch.eye(12)
    a[7, 3] = value
    return a


GOOD = torch.eye(12)
SAME = torch.ones(12, dtype=torch.bool)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"folds": 13}, "got 12 pairs for 13 folds"),
        ({"folds": 1}, "folds must be at least 2, got 1"),
        ({"a": GOOD[:11]}, "a and b must both be (n, D)"),
        ({"a": GOOD[0], "b": GOOD[0]}, "a and b must both be (n, D)"),
        ({"a": GOOD.double()}, "a and b must share one float dtype"),
        ({"a": GOOD.long(), "b": GOOD.long()}, "a and b must share one float dtype"),
        ({"same": SAME[:11]}, "same must be (12,) bool"),
        ({"same": SAME.long()}, "same must be (12,) bool"),
        ({"a": broken_pair(math.nan)}, "NaN or infinity in row 7"),
        ({"b": broken_pair(math.inf)}, "NaN or infinity in row 7"),
    ],
)
def test_refuses_bad_input(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        verification_accuracy(**{"a": GOOD, "b": GOOD, "same": SAME, **changed})
