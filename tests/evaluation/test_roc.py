"""The ROC and what is read off it, against counting pair by pair and against scikit-learn."""

import math
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics as sklearn_metrics
from torch import Tensor

from fastface_lightning.evaluation import (
    equal_error_rate,
    operating_points,
    rates_at_far,
    roc_auc,
    roc_curve,
    tar_at_far,
    thresholds_of,
)


def twin_roc(scores: list[float], same: list[bool]) -> list[tuple[float, float, float]]:
    """(FAR, TAR, threshold) at infinity and at every score, counting every pair each time."""
    impostor = [s for s, y in zip(scores, same, strict=True) if not y]
    genuine = [s for s, y in zip(scores, same, strict=True) if y]
    return [
        (
            sum(s >= threshold for s in impostor) / len(impostor),
            sum(s >= threshold for s in genuine) / len(genuine),
            threshold,
        )
        for threshold in [math.inf, *sorted(set(scores), reverse=True)]
    ]


def twin_tar_at_far(scores: list[float], same: list[bool], far: float) -> float:
    """The benchmark's way: the ROC from its far end, the first point of least distance in FAR."""
    flipped = twin_roc(scores, same)[::-1]
    nearest = min(range(len(flipped)), key=lambda i: (abs(flipped[i][0] - far), i))
    return flipped[nearest][1]


def twin_equal_error_rate(scores: list[float], same: list[bool]) -> float:
    """Walk along the ROC to the segment on which FAR overtakes FRR."""
    for (far, tar, _), (next_far, next_tar, _) in pairwise(twin_roc(scores, same)):
        frr, next_frr = 1 - tar, 1 - next_tar
        if next_far >= next_frr:
            part = (frr - far) / ((frr - far) + (next_far - next_frr))
            return far + part * (next_far - far)
    raise AssertionError("FAR ends at 1, where FRR is 0")


SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "spread": lambda noise, sign: noise + sign / 2,
    "quantised": lambda noise, sign: (4 * noise + sign).round() / 8,
    "tied": lambda noise, sign: (noise + sign).round(),
    "signed zeros": lambda noise, sign: (noise / 2).round(),
    "equal": lambda noise, sign: torch.full_like(noise, 0.3),
    "separated": lambda noise, sign: (noise.abs() + 0.1) * sign,
    "reversed": lambda noise, sign: (noise.abs() + 0.1) * -sign,
    "apart by one rounding": lambda noise, sign: 1 + noise.round() * 2**-23,
    "huge": lambda noise, sign: (noise + sign) * 1e30,
}


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Scores of one of the shapes and labels of 2 to 40 pairs, both kinds occurring."""
    size = draw(st.integers(0, 38))
    labels = [True, False, *draw(st.lists(st.booleans(), min_size=size, max_size=size))]
    same = torch.tensor(draw(st.permutations(labels)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    noise = torch.randn(len(same), generator=generator, dtype=torch.float64)
    scores = SHAPES[draw(st.sampled_from(sorted(SHAPES)))](noise, torch.where(same, 1.0, -1.0))
    return scores.to(draw(st.sampled_from([torch.float32, torch.float64]))), same


@given(pairs=pairs())
def test_curve_areas_and_error_rate(pairs: tuple[Tensor, Tensor]) -> None:
    scores, same = (x.numpy() for x in pairs)
    expected = sklearn_metrics.roc_curve(same, scores, drop_intermediate=False)
    for ours, theirs in zip(roc_curve(*pairs), expected, strict=True):
        np.testing.assert_array_equal(ours.numpy(), theirs)
    area = sklearn_metrics.roc_auc_score(same, scores)
    assert roc_auc(*pairs) == pytest.approx(area, abs=1e-12)
    error_rate = twin_equal_error_rate(*(x.tolist() for x in pairs))
    assert equal_error_rate(*pairs) == pytest.approx(error_rate, abs=1e-12)


@given(pairs=pairs(), far=st.floats(0, 1), data=st.data())
def test_tar_at_far_equals_the_loops(
    pairs: tuple[Tensor, Tensor], far: float, data: st.DataObject
) -> None:
    """Also at the FARs of the points and half-way between them, where two are equally near."""
    negatives = int((~pairs[1]).sum())
    on_grid = data.draw(st.integers(0, 2 * negatives)) / (2 * negatives)
    wanted = [far, on_grid, 0.0, 1.0]
    expected = [twin_tar_at_far(*(x.tolist() for x in pairs), value) for value in wanted]
    assert tar_at_far(*pairs, wanted) == expected
    assert tar_at_far(*pairs, far) == expected[0]


@given(pairs=pairs(), far=st.floats(0, 1))
def test_the_threshold_of_a_point_gives_its_rates(pairs: tuple[Tensor, Tensor], far: float) -> None:
    """Also after a detour through JSON's float64."""
    scores, same = pairs
    point = operating_points(scores, same, [far])[0]
    accepted = scores.double() >= point.threshold
    assert accepted[~same].double().mean().item() == point.far
    assert accepted[same].double().mean().item() == point.tar
    assert point.threshold in [math.inf, *scores.tolist()]


@given(pairs=pairs())
def test_rates_are_those_that_so_many_pairs_can_show(pairs: tuple[Tensor, Tensor]) -> None:
    scores, same = pairs
    impostors = int((~same).sum())
    rates = rates_at_far(scores, same)
    shown = [far for far in (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1) if far * impostors >= 1]
    assert rates["impostors"] == impostors
    assert [float(far) for far in rates["tar"]] == shown
    assert list(rates["tar"].values()) == tar_at_far(scores, same, shown)
    for far, threshold in rates["cosine_thresholds"].items():
        accepted = scores.double() >= (math.inf if threshold is None else threshold)
        assert accepted[same].double().mean().item() == rates["tar"][far]
        # The rate that it really has, of which the wanted one is but the name.
        assert accepted[~same].double().mean().item() == rates["far"][far]
    known = {"accuracy": 0.9, "people": 8, "trained_people": 0}
    sets = {
        "lfw": {**known, **rates},
        "seen": {**known, **rates, "trained_people": 1},
        "of one kind": {**known, **rates_at_far(scores, same | True)},
    }
    told = thresholds_of(sets, True, "float32")
    assert told.keys() == ({"lfw"} if shown else set())
    for kept in told.values():
        more = {"mirror": True, "precision": "float32", "accuracy": 0.9, "people": 8}
        assert kept == more | {key: rates[key] for key in ("impostors", "far", "cosine_thresholds")}


@given(pairs=pairs())
def test_scores_are_compared_in_their_own_dtype(pairs: tuple[Tensor, Tensor]) -> None:
    """Widening float32 to float64 keeps every order and every tie."""
    scores, same = pairs
    for narrow in (scores.half(), scores.bfloat16(), scores.float()):
        if narrow.isfinite().all():
            both = zip(roc_curve(narrow, same), roc_curve(narrow.double(), same), strict=True)
            assert all(torch.equal(ours, wide) for ours, wide in both)


def test_separated_equal_and_reversed_scores_are_exact() -> None:
    """A thousand points of 1/700 and 1/300 add up to 1 without a rounding error."""
    scores, same = torch.arange(1000.0), torch.arange(1000) >= 300
    assert (roc_auc(scores, same), equal_error_rate(scores, same)) == (1.0, 0.0)
    assert tar_at_far(scores, same, [0, 1e-4, 1]) == [1.0, 1.0, 1.0]
    assert (roc_auc(-scores, same), equal_error_rate(-scores, same)) == (0.0, 1.0)
    assert tar_at_far(-scores, same, [0, 0.99, 1]) == [0.0, 0.0, 1.0]
    equal = torch.zeros(1000)
    assert (roc_auc(equal, same), equal_error_rate(equal, same)) == (0.5, 0.5)
    assert roc_curve(equal, same).thresholds.tolist() == [math.inf, 0.0]


SCORES, SAME = torch.arange(8.0), torch.arange(8) % 2 == 0


@pytest.mark.parametrize("function", [roc_curve, lambda *pairs: tar_at_far(*pairs, 0.1)])
@pytest.mark.parametrize(
    ("scores", "same", "message"),
    [
        (SCORES[:, None], SAME, "scores must be (n,) float, got (8, 1) torch.float32"),
        (SCORES.long(), SAME, "scores must be (n,) float, got (8,) torch.int64"),
        (SCORES[:7], SAME, "same must be (7,) bool"),
        (1 / (SCORES - 5), SAME, "NaN or infinity in row 5"),
        (SCORES, SAME | True, "got 8 pairs of one and 0 of two"),
        (SCORES[:0], SAME[:0], "got 0 pairs of one and 0 of two"),
    ],
)
def test_refuses_bad_pairs(
    function: Callable[..., Any], scores: Tensor, same: Tensor, message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        function(scores, same)


@pytest.mark.parametrize("far", [-1e-9, 1.0000001, math.nan])
def test_refuses_a_far_that_is_no_fraction(far: float) -> None:
    with pytest.raises(ValueError, match=re.escape("far must lie in [0, 1]")):
        tar_at_far(SCORES, SAME, [0.1, far])
