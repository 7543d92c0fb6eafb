"""The ROC of pair scores: every trade between accepting impostors and accepting the right person.

A pair is accepted if its score is at least the threshold. The false accept rate (FAR) is the share
of pairs of two persons that are accepted, the true accept rate (TAR) that of pairs of one person.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import check_column, check_finite, check_fraction
from .row_metric import RowMetric

FARS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


class ROC(NamedTuple):
    """The points of a receiver operating characteristic, thresholds falling.

    Attributes:
        far: false accept rate at each threshold, (m,) float64 on the CPU, from 0 to 1.
        tar: true accept rate at each threshold, like ``far``.
        thresholds: infinity, which accepts nothing, then every score that occurs, like ``far``.
    """

    far: Tensor
    tar: Tensor
    thresholds: Tensor


def roc_curve(scores: Tensor, same: Tensor) -> ROC:
    r"""All points of the ROC, by one sort of the scores.

    .. math::

        \mathrm{FAR}(t) = \frac{|\{i : s_i \ge t, \neg\text{same}_i\}|}
                               {|\{i : \neg\text{same}_i\}|}, \qquad
        \mathrm{TAR}(t) = \frac{|\{i : s_i \ge t, \text{same}_i\}|}{|\{i : \text{same}_i\}|}

    at :math:`t = \infty` and at every score :math:`s_i`. Equal scores pass together, so they make
    one point. No point is dropped for lying on a straight line between its neighbours.

    Args:
        scores: likeness of each pair, (n,) float of any range, finite; compared as they are.
        same: whether a pair shows one person, (n,) bool; both kinds must occur.

    Returns:
        The m points, m being one more than the number of different scores.

    Raises:
        ValueError: shapes or dtypes that do not fit, a score that is not finite, or pairs of one
            kind alone.

    Example:
        >>> scores = torch.tensor([0.9, 0.7, 0.7, 0.1])
        >>> roc = roc_curve(scores, torch.tensor([True, True, False, False]))
        >>> roc.far.tolist(), roc.tar.tolist()
        ([0.0, 0.0, 0.5, 1.0], [0.0, 0.5, 1.0, 1.0])
    """
    false, true, values = _accepted(scores, same)
    thresholds = F.pad(values.double(), (1, 0), value=torch.inf)
    return ROC(false / false[-1].double(), true / true[-1].double(), thresholds)


class OperatingPoint(NamedTuple):
    """A point of the ROC.

    Attributes:
        far: false accept rate, a fraction.
        tar: true accept rate, a fraction.
        threshold: the lowest score accepted there, so that ``score >= threshold`` gives both rates;
            infinity where none is.
    """

    far: float
    tar: float
    threshold: float


def operating_points(scores: Tensor, same: Tensor, far: Sequence[float]) -> list[OperatingPoint]:
    """The ROC point nearest in FAR to each of ``far``, as IJB-B and IJB-C report it.

    Of points with equal FAR the one with the largest TAR counts. Where two FARs are equally near,
    one below and one above, the one above counts. With N pairs of two persons FARs are multiples of
    1/N (fewer, if scores tie): a ``far`` below 1/(2N) is answered at FAR 0, with the share of pairs
    of one person that score above every pair of two.

    All points count. scikit-learn's ``roc_curve`` drops those on straight lines unless told not to,
    and the nearest that is left may have another FAR, and another TAR.

    Args:
        scores: see :func:`roc_curve`.
        same: see :func:`roc_curve`.
        far: wanted false accept rates, fractions in [0, 1].

    Returns:
        A point for each of ``far``, in their order.

    Raises:
        ValueError: in the cases of :func:`roc_curve`, or a ``far`` outside [0, 1].

    References:
        Whitelam et al., IARPA Janus Benchmark-B Face Dataset, 2017; Maze et al., IARPA Janus
        Benchmark - C, 2018: 1:1 verification.

    Example:
        >>> scores = torch.tensor([0.875, 0.75, 0.5, 0.25])
        >>> operating_points(scores, torch.tensor([True, False, True, False]), [0.4])
        [OperatingPoint(far=0.5, tar=1.0, threshold=0.5)]
    """
    for value in far:
        check_fraction(value, "far")
    _check_pairs(scores, same)
    scores, same = scores.detach().cpu(), same.cpu()
    values = scores.to(torch.promote_types(scores.dtype, torch.float32)).numpy()
    genuine, impostor = np.sort(values[same.numpy()]), np.sort(values[~same.numpy()])
    n = len(impostor)
    points = []
    for value in far:
        limit = impostor[max(0, n - 1 - int(value * n))]  # what is above it is accepted
        low, high = np.searchsorted(impostor, limit), np.searchsorted(impostor, limit, "right")
        below, above = (n - high) / n, (n - low) / n  # the two FARs around the wanted one
        if value - below >= above - value:  # equal scores pass too: the next lower is the limit
            below, high, limit = above, low, impostor[low - 1] if low else -np.inf
        accepted = np.searchsorted(genuine, limit, "right")
        tar = (len(genuine) - accepted) / len(genuine)
        lowest = min([*impostor[high : high + 1], *genuine[accepted : accepted + 1], np.inf])
        points.append(OperatingPoint(float(below), float(tar), float(lowest)))
    return points


@overload
def tar_at_far(scores: Tensor, same: Tensor, far: float) -> float: ...
@overload
def tar_at_far(scores: Tensor, same: Tensor, far: Sequence[float]) -> list[float]: ...
def tar_at_far(scores: Tensor, same: Tensor, far: float | Sequence[float]) -> float | list[float]:
    """TAR of :func:`operating_points`, a fraction: one for one ``far``, a list for several.

    Example:
        >>> scores = torch.tensor([0.9, 0.7, 0.6, 0.1])
        >>> same = torch.tensor([True, False, True, False])
        >>> tar_at_far(scores, same, [0.1, 0.4])
        [0.5, 1.0]
    """
    tar = [point.tar for point in operating_points(scores, same, _several(far))]
    return tar[0] if isinstance(far, float | int) else tar


def rates_at_far(scores: Tensor, same: Tensor) -> dict[str, Any]:
    """TAR, and the threshold to use, at each FAR of 1e-6, 1e-5 … 1e-1 that so many pairs can show.

    Args:
        scores: see :func:`roc_curve`.
        same: see :func:`roc_curve`; here all may be of one kind.

    Returns:
        Plain data: ``impostors``, the number N of pairs of two persons; and by the name of each FAR
        of at least 1/N, ``"1e-03"``: ``tar``; ``cosine_thresholds``, the least score that is
        accepted there, None where none is; ``far``, the share of the N that reach it, which is the
        nearest to the wanted one that scores allow. All three are empty where pairs are of one
        kind.
    """
    impostors = int((~same).sum())
    fars = [far for far in FARS if far * impostors >= 1 and impostors < len(same)]
    points = operating_points(scores, same, fars) if fars else []
    named = dict(zip((f"{far:.0e}" for far in fars), points, strict=True))
    return {
        "impostors": impostors,
        "tar": {name: point.tar for name, point in named.items()},
        "far": {name: point.far for name, point in named.items()},
        "cosine_thresholds": {
            name: None if math.isinf(point.threshold) else point.threshold
            for name, point in named.items()
        },
    }


def thresholds_of(
    sets: Mapping[str, Mapping[str, Any]], mirror: bool, precision: str
) -> dict[str, Any]:
    """What a model file keeps of an evaluation on pairs, so that its user knows from which cosine
    on two images are taken for one person.

    Args:
        sets: by the name of each set, a mapping that has what :func:`rates_at_far` gives,
            ``accuracy``, ``people``, how many the set shows (None: not known), and
            ``trained_people``, how many of them were trained on: then it has no thresholds for
            others.
        mirror: whether the embeddings were those of an image plus its mirror image; others have
            other thresholds.
        precision: of the embeddings, such as ``float32``.

    Returns:
        By the name of each set that has thresholds: ``mirror``, ``precision``, ``accuracy``,
        ``people``, ``impostors``, ``far`` and ``cosine_thresholds``.
    """
    kept = ("accuracy", "people", "impostors", "far", "cosine_thresholds")
    return {
        name: {"mirror": mirror, "precision": precision, **{key: rates[key] for key in kept}}
        for name, rates in sets.items()
        if rates.get("cosine_thresholds") and not rates["trained_people"]
    }


def equal_error_rate(scores: Tensor, same: Tensor) -> float:
    r"""The error rate where as many impostors are accepted as right persons rejected.

    .. math::

        \mathrm{EER} = \mathrm{FAR}(t) \quad\text{where}\quad
        \mathrm{FAR}(t) = 1 - \mathrm{TAR}(t)

    on the ROC of :func:`roc_curve`, its neighbouring points joined by straight lines: 0 if the
    scores separate the two kinds, 0.5 if all are equal.

    Example:
        >>> scores = torch.tensor([0.9, 0.7, 0.6, 0.1])
        >>> equal_error_rate(scores, torch.tensor([True, False, True, False]))
        0.5
    """
    far, tar, _ = roc_curve(scores, same)
    excess = far + tar - 1  # FAR - FRR: rises at every point, from -1 to 1
    after = int(torch.searchsorted(excess, 0.0))
    low, high = excess[after - 1], excess[after]
    return torch.lerp(far[after - 1], far[after], low / (low - high)).item()


def roc_auc(scores: Tensor, same: Tensor) -> float:
    r"""Area under the ROC: how often a pair of one person scores above a pair of two.

    .. math::

        \mathrm{AUC} = \frac{1}{P N} \sum_{\text{same}_i} \sum_{\neg\text{same}_j}
            [s_i > s_j] + \tfrac{1}{2} [s_i = s_j]

    for P pairs of one person and N of two, counted in integers as trapezoids under the ROC: 1 if
    the scores separate the two kinds, 0.5 if all are equal. Takes and refuses what
    :func:`roc_curve` does.

    References:
        Hanley and McNeil, The Meaning and Use of the Area under a Receiver Operating
        Characteristic (ROC) Curve, 1982.

    Example:
        >>> scores = torch.tensor([0.9, 0.7, 0.6, 0.1])
        >>> roc_auc(scores, torch.tensor([True, False, True, False]))
        0.75
    """
    false, true, _ = _accepted(scores, same)
    doubled = int((false.diff() * (true[1:] + true[:-1])).sum())
    return doubled / (2 * int(false[-1]) * int(true[-1]))


def _accepted(scores: Tensor, same: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of two persons and of one accepted at infinity and at every score, falling: each
    (m,) int64, on the CPU; and the m - 1 different scores."""
    _check_pairs(scores, same)
    values, place = scores.detach().cpu().unique(return_inverse=True)
    same = same.cpu()
    false, true = (place[side].bincount(minlength=len(values)).flip(0) for side in (~same, same))
    return F.pad(false.cumsum(0), (1, 0)), F.pad(true.cumsum(0), (1, 0)), values.flip(0)


def _check_pairs(scores: Tensor, same: Tensor) -> None:
    _check_scores(scores, same)
    check_finite(scores, "scores")
    n, positives = len(scores), int(same.count_nonzero())
    if positives in (0, n):
        raise ValueError(
            "pairs must show both one person and two, "
            f"got {positives} pairs of one and {n - positives} of two"
        )


def _check_scores(scores: Tensor, same: Tensor) -> None:
    if scores.ndim != 1 or not scores.is_floating_point():
        raise ValueError(f"scores must be (n,) float, got {tuple(scores.shape)} {scores.dtype}")
    check_column(same, "same", len(scores), torch.bool)


def _several(far: float | Sequence[float]) -> Sequence[float]:
    return [far] if isinstance(far, float | int) else far


class PairScores(RowMetric):
    """Scores of pairs that arrive in batches, in any order, on one process or many."""

    columns = ("scores", "same")

    def update(self, scores: Tensor, same: Tensor, index: Tensor | None = None) -> None:
        """Add n pairs.

        Args:
            scores: see :func:`roc_curve`.
            same: see :func:`roc_curve`; here all may be of one kind.
            index: number of each pair in the whole set, (n,) int64, at least 0.
        """
        _check_scores(scores, same)
        self.keep(index, scores, same)


class TARAtFAR(PairScores):
    """:func:`tar_at_far` of pairs that arrive in batches, see :class:`RowMetric`.

    ``compute()`` gives a scalar, or (k,) for k values of ``far``.

    Args:
        far: wanted false accept rate, a fraction in [0, 1], or several.
        kwargs: passed on to :class:`torchmetrics.Metric`.

    Raises:
        ValueError: in the cases of :class:`RowMetric` and of :func:`operating_points`.

    Example:
        >>> metric = TARAtFAR(far=[0.1, 0.4])
        >>> metric.update(torch.tensor([0.9, 0.7]), torch.tensor([True, False]))
        >>> metric.update(torch.tensor([0.6, 0.1]), torch.tensor([True, False]))
        >>> metric.compute()
        tensor([0.5000, 1.0000])
    """

    higher_is_better = True

    def __init__(self, far: float | Sequence[float] = 1e-4, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for value in _several(far):
            check_fraction(value, "far")
        self.far = far

    def compute(self) -> Tensor:
        """Return the true accept rate at each wanted ``far``, a scalar or (k,)."""
        scores, same = self.rows()
        return torch.tensor(tar_at_far(scores, same, self.far), device=self.device)


class ROCCurve(PairScores):
    """:func:`roc_curve` of pairs that arrive in batches, see :class:`RowMetric`.

    Attributes:
        rates: :func:`rates_at_far` of the pairs of the last ``compute()``, empty before.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rates: dict[str, Any] = {}

    def compute(self) -> ROC:
        """Return all points of the ROC."""
        scores, same = self.rows()
        self.rates = rates_at_far(scores, same)
        return roc_curve(scores, same)
