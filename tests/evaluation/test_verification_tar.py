"""TAR at a wanted FAR by folds, against loops over folds, thresholds and pairs."""

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
from torch.nn.functional import normalize

from fastface_lightning.evaluation import verification_tar


def twin(
    a: np.ndarray, b: np.ndarray, same: np.ndarray, wanted: float, folds: int
) -> tuple[float, float, float]:
    """The protocol as one would say it: every fold, every threshold, every pair."""
    thresholds = np.arange(0, 4, 0.001)
    distances = np.array([np.sum((p - q) ** 2) for p, q in zip(a, b, strict=True)])

    def rate(threshold: float, pairs: np.ndarray, kind: bool) -> float:
        accepted = [distances[i] < threshold for i in pairs if bool(same[i]) is kind]
        return sum(accepted) / len(accepted)

    tar, far = [], []
    for train, test in KFold(folds, shuffle=False).split(distances):
        training_far = [rate(threshold, train, False) for threshold in thresholds]
        chosen = 0.0
        if max(training_far) >= wanted:
            # Through every point of the staircase. numpy takes the last of equal abscissae when it
            # comes from the left and the first when it comes from the right, as SciPy's linear
            # spline did while it allowed equal abscissae.
            chosen = float(np.interp(wanted, training_far, thresholds))
        tar.append(rate(chosen, test, True))
        far.append(rate(chosen, test, False))
    return float(np.mean(tar)), float(np.std(tar)), float(np.mean(far))


def unit_pairs(n: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Embeddings of n pairs, of one person and of two in turn, neither kind far from the other."""
    generator = torch.Generator().manual_seed(seed)
    a, other = torch.randn(2, n, 6, generator=generator, dtype=torch.float64)
    same = torch.arange(n) % 2 == 0
    b = torch.where(same[:, None], a + 1.2 * other, other)
    a, b = (normalize(x).to(dtype) for x in (a, b))
    return a, b, same


def pairs_at(distances: list[float]) -> tuple[Tensor, Tensor]:
    """Pairs of points on a line at given squared distances, up to rounding."""
    b = torch.tensor(distances, dtype=torch.float64).sqrt()[:, None]
    return torch.zeros_like(b), b


@settings(deadline=None, max_examples=12)
@given(
    folds=st.integers(2, 4),
    extra=st.integers(0, 20),
    seed=st.integers(0, 2**31),
    far=st.sampled_from([0.0, 1e-3, 0.1, 0.25, 1 / 3, 0.5, 1.0]) | st.floats(0, 1),
)
def test_equals_the_loops(folds: int, extra: int, seed: int, far: float) -> None:
    a, b, same = unit_pairs(2 * folds + extra, seed)
    expected = twin(a.numpy(), b.numpy(), same.numpy(), far, folds)
    assert verification_tar(a, b, same, far, folds) == pytest.approx(expected, abs=1e-12)


def test_float32_distances_equal_the_loops() -> None:
    a, b, same = unit_pairs(83, dtype=torch.float32)
    expected = twin(a.numpy(), b.numpy(), same.numpy(), 1e-3, 10)
    assert verification_tar(a, b, same) == pytest.approx(expected, abs=1e-12)


def two_folds(probe: float) -> tuple[Tensor, Tensor, Tensor]:
    """The first fold trains on impostors at 0.5005, 1.0005, 1.5005, 2.0005 and is scored at
    ``probe``; the second trains on one impostor and holds pairs of one person at distance 0."""
    a, b = pairs_at([probe, 3.9, 3.95, 3.95, 3.95, 0.5005, 1.0005, 1.5005, 2.0005, 0])
    return a, b, torch.tensor([True] + [False] * 8 + [True])


@pytest.mark.parametrize(
    ("far", "threshold"),
    [
        (0.0, 0.5),  # FAR is 0 up to 0.500: the highest threshold of equal FARs
        (0.25, 1.0),  # 1/4 from 0.501 to 1.000: the highest again
        (0.125, 0.5005),  # half of the step at 0.500 .. 0.501
        (0.26, 1.00004),  # 4 % of the step at 1.000 .. 1.001
        (1.0, 3.999),  # never exceeded: the highest threshold there is
    ],
)
def test_threshold_by_linear_interpolation(far: float, threshold: float) -> None:
    for distance, accepted in ((threshold - 1e-6, True), (threshold + 1e-6, False)):
        tar = verification_tar(*two_folds(distance), far=far, folds=2).tar
        assert tar == (1.0 if accepted else 0.5)  # the second fold's pair is always accepted


def test_a_distance_equal_to_the_threshold_is_not_below_it() -> None:
    """Impostors at 0.25, a number of the grid that float64 holds exactly: FAR is still 0 there."""
    a, b = pairs_at([0.2495, 0.25] * 2)
    assert verification_tar(a, b, torch.tensor([True, False] * 2), 0.0, 2) == (1.0, 0.0, 0.0)
    assert verification_tar(a, a, torch.tensor([True, False] * 2), 0.0, 2) == (0.0, 0.0, 0.0)


def test_nothing_is_accepted_where_the_training_far_is_never_reached() -> None:
    """Every impostor lies beyond the last threshold 3.999, so threshold 0: not even distance 0."""
    a, b = pairs_at([0, 4, 0, 4])
    assert verification_tar(a, b, torch.tensor([True, False] * 2), folds=2) == (0.0, 0.0, 0.0)
    assert verification_tar(a, b, torch.tensor([True, False] * 2), 0.0, 2) == (1.0, 0.0, 0.0)


def test_means_over_folds_and_standard_deviation_of_the_population() -> None:
    """Threshold 1.0 for both folds: TARs 1 and 1/2, FARs 0 and 1/2."""
    a, b = pairs_at([0.5, 0.5, 1.0005, 1.0005, 0.5, 1.5, 0.9, 1.0005])
    same = torch.tensor([True, True, False, False, True, True, False, False])
    # The second fold's threshold is 1.0; the first's, trained on 0.9, 1.0005 at FAR 1/2, likewise.
    assert verification_tar(a, b, same, far=0.5, folds=2)[:2] == (0.75, 0.25)


def kinds(*same: int) -> Tensor:
    return torch.tensor(same, dtype=torch.bool)


GOOD = torch.eye(6)
SAME = kinds(1, 0, 1, 0, 1, 0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"far": 2}, "far must lie in [0, 1], got 2"),
        ({"far": math.nan}, "far must lie in [0, 1], got nan"),
        ({"folds": 7}, "got 6 pairs for 7 folds"),
        ({"a": GOOD[:5]}, "a and b must both be (n, D)"),
        ({"same": SAME.long()}, "same must be (6,) bool"),
        ({"a": GOOD / 0}, "NaN or infinity in row 0"),
        ({"same": kinds(1, 0, 1, 1, 0, 1)}, "got 2 and 0 in fold 2 of 3"),
        ({"same": kinds(1, 0, 1, 0, 0, 0)}, "got 0 and 2 in fold 3 of 3"),
        ({"a": GOOD[:0], "b": GOOD[:0], "same": SAME[:0]}, "got 0 pairs for 3 folds"),
    ],
)
def test_refuses_bad_input(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        verification_tar(**{"a": GOOD, "b": GOOD, "same": SAME, "folds": 3, **changed})
