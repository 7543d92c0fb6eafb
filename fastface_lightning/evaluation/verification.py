"""Ten-fold verification: choose a threshold on nine folds of pairs, score it on the tenth."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import check_column, check_finite, check_fraction
from .row_metric import RowMetric


class VerificationResult(NamedTuple):
    """Of :func:`verification_accuracy`.

    Attributes:
        accuracy: mean over the folds, a fraction in [0, 1].
        std: population standard deviation over the folds, a fraction.
        thresholds: the squared distance chosen for each fold, (folds,) float64 on the CPU.
    """

    accuracy: float
    std: float
    thresholds: Tensor


def verification_accuracy(
    a: Tensor, b: Tensor, same: Tensor, folds: int = 10
) -> VerificationResult:
    r"""Accuracy of deciding "same person" by the distance between two embeddings.

    .. math::

        d_i = \|a_i - b_i\|^2, \qquad
        t_k = \arg\max_{t} \sum_{i \notin F_k} [(d_i < t) = \text{same}_i], \qquad
        A_k = \frac{1}{|F_k|} \sum_{i \in F_k} [(d_i < t_k) = \text{same}_i]

    where :math:`F_1, \dots, F_K` are consecutive runs of pairs, the first (n mod K) of them one
    pair longer than the others, and t runs over 0, 0.01, ..., 3.99; among equally good thresholds
    the lowest is taken. The folds follow the order of the pairs, which is part of the protocol.

    Args:
        a: unit embeddings of the first images, (n, D) float; distances are taken in their dtype.
        b: unit embeddings of the second images, like ``a``.
        same: whether a pair shows one person, (n,) bool.
        folds: number of folds K, at least 2 and at most n.

    Returns:
        Mean and population standard deviation of :math:`A_k`, and :math:`t_k`.

    Raises:
        ValueError: shapes or dtypes that do not fit, an embedding that is not finite, or fewer
            pairs than folds.

    References:
        Huang et al., Labeled Faces in the Wild, 2007, View 2.

    Example:
        >>> a = torch.eye(4)
        >>> b = a[[0, 1, 3, 2]]
        >>> verification_accuracy(a, b, torch.tensor([True, True, False, False]), folds=2).accuracy
        0.5
    """
    return _cross_validate(_squared_distance(a, b, same), same, folds)


class VerificationTAR(NamedTuple):
    """Of :func:`verification_tar`.

    Attributes:
        tar: true accept rate, mean over the folds, a fraction in [0, 1].
        std: population standard deviation of it over the folds, a fraction.
        far: false accept rate that the chosen thresholds came to, mean over the folds, a fraction.
    """

    tar: float
    std: float
    far: float


def verification_tar(
    a: Tensor, b: Tensor, same: Tensor, far: float = 1e-3, folds: int = 10
) -> VerificationTAR:
    r"""True accept rate on each fold, at the threshold whose FAR on the other folds is ``far``.

    .. math::

        \mathrm{FAR}_k(t) = \frac{|\{i \notin F_k : d_i < t, \neg\text{same}_i\}|}
                               {|\{i \notin F_k : \neg\text{same}_i\}|}, \qquad
        t_k = \mathrm{FAR}_k^{-1}(\mathrm{far})

    with distances :math:`d_i` and folds :math:`F_k` as in :func:`verification_accuracy`. FAR is
    known at t = 0, 0.001, ..., 3.999 and linear between neighbours. It is a staircase: where it
    stays at ``far`` over several thresholds the highest of them is taken, and where it steps over
    ``far`` the threshold lies within that one step of 0.001. If it never reaches ``far``,
    :math:`t_k = 0`, which accepts nothing.

    Args:
        a: see :func:`verification_accuracy`.
        b: see :func:`verification_accuracy`.
        same: whether a pair shows one person, (n,) bool; every fold must hold pairs of both kinds.
        far: wanted false accept rate, a fraction in [0, 1].
        folds: number of folds K, at least 2 and at most n.

    Returns:
        Of the true accept rates on :math:`F_k` the mean and the population standard deviation, and
        the mean false accept rate there.

    Raises:
        ValueError: in the cases of :func:`verification_accuracy`, a ``far`` outside [0, 1], or a
            fold without pairs of one kind, which has no such rate.

    References:
        Schroff et al., FaceNet: A Unified Embedding for Face Recognition and Clustering, 2015,
        section 4 (VAL and FAR).

    Example:
        >>> a = torch.eye(4)
        >>> b = a[[0, 0, 2, 2]]
        >>> verification_tar(a, b, torch.tensor([True, False, True, False]), far=0, folds=2)
        VerificationTAR(tar=1.0, std=0.0, far=0.0)
    """
    check_fraction(far, "far")
    distance, same, fold = _in_folds(_squared_distance(a, b, same), same, folds)
    positives = fold[same].bincount(minlength=folds)
    negatives = fold[~same].bincount(minlength=folds)
    one_sided = ((positives == 0) | (negatives == 0)).nonzero()
    if len(one_sided) > 0:
        k = int(one_sided[0])
        raise ValueError(
            "every fold must hold pairs of one person and of two, "
            f"got {int(positives[k])} and {int(negatives[k])} in fold {k + 1} of {folds}"
        )

    thresholds = torch.arange(4000, dtype=torch.float64) * 0.001
    mistaken = _count_below(thresholds, distance[~same], fold[~same], folds)
    training_far = (mistaken.sum(0) - mistaken) / (negatives.sum() - negatives)[:, None].double()
    accept = distance < _thresholds_at(far, training_far, thresholds)[fold]
    tar = fold[accept & same].bincount(minlength=folds) / positives.double()
    false = fold[accept & ~same].bincount(minlength=folds) / negatives.double()
    return VerificationTAR(tar.mean().item(), tar.std(correction=0).item(), false.mean().item())


class VerificationAccuracy(RowMetric):
    """:func:`verification_accuracy` of pairs that arrive in batches, on one process or many.

    The folds follow the order of the pairs, see :class:`RowMetric`. Only one distance a pair is
    kept. ``compute()`` gives the mean accuracy and leaves the rest in ``result``::

        self.log("lfw", metric.compute())
        self.log("lfw_std", metric.result.std)

    Args:
        folds: number of folds, at least 2.
        kwargs: passed on to :class:`torchmetrics.Metric`.

    Attributes:
        result: the :class:`VerificationResult` of the last ``compute()``, None before.

    Raises:
        ValueError: in the cases of :class:`RowMetric` and of :func:`verification_accuracy`.
    """

    higher_is_better = True
    columns = ("distance", "same")
    result: VerificationResult | None = None

    def __init__(self, folds: int = 10, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check_folds(folds)
        self.folds = folds

    def update(self, a: Tensor, b: Tensor, same: Tensor, index: Tensor | None = None) -> None:
        """Add n pairs.

        Args:
            a: see :func:`verification_accuracy`.
            b: see :func:`verification_accuracy`.
            same: whether a pair shows one person, (n,) bool.
            index: number of each pair in the whole set, (n,) int64, at least 0.
        """
        self.keep(index, _squared_distance(a, b, same), same)

    def compute(self) -> Tensor:
        """Return the mean accuracy over the folds, a scalar."""
        distance, same = self.rows()
        self.result = _cross_validate(distance, same, self.folds)
        return torch.tensor(self.result.accuracy, device=self.device)


def _squared_distance(a: Tensor, b: Tensor, same: Tensor) -> Tensor:
    """Return the squared distance of each pair, (n,) in the dtype of ``a``."""
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(f"a and b must both be (n, D), got {tuple(a.shape)} and {tuple(b.shape)}")
    if not a.is_floating_point() or a.dtype != b.dtype:
        raise ValueError(f"a and b must share one float dtype, got {a.dtype} and {b.dtype}")
    check_column(same, "same", len(a), torch.bool)
    return (a - b).square().sum(1)


def _check_folds(folds: int) -> None:
    if folds < 2:
        raise ValueError(f"folds must be at least 2, got {folds}")


def _in_folds(distance: Tensor, same: Tensor, folds: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return distances in float64, labels and the fold of each pair, all (n,) on the CPU."""
    _check_folds(folds)
    n = len(distance)
    if n < folds:
        raise ValueError(f"pairs must be as many as folds, got {n} pairs for {folds} folds")
    check_finite(distance, "embeddings")
    size = torch.full((folds,), n // folds)
    size[: n % folds] += 1
    return distance.detach().cpu().double(), same.cpu(), torch.arange(folds).repeat_interleave(size)


def _count_below(thresholds: Tensor, distance: Tensor, fold: Tensor, folds: int) -> Tensor:
    """Count the pairs of each fold closer than each of T thresholds, (folds, T) int64."""
    width = len(thresholds) + 1  # the last bin holds the pairs that no threshold reaches
    first = torch.searchsorted(thresholds, distance, right=True)
    histogram = (fold * width + first).bincount(minlength=folds * width)
    return histogram.view(folds, width).cumsum(1)[:, :-1]


def _thresholds_at(far: float, rates: Tensor, thresholds: Tensor) -> Tensor:
    """Invert the FAR of each fold, (folds, T) at T thresholds, linearly: -> (folds,)."""
    below = (rates <= far).sum(1, keepdim=True) - 1  # never -1: the FAR at threshold 0 is 0
    above = (below + 1).clamp(max=len(thresholds) - 1)
    low, high = rates.gather(1, below), rates.gather(1, above)
    part = torch.where(low < high, (far - low) / (high - low), 0)
    threshold = torch.lerp(thresholds[below], thresholds[above], part)
    return threshold.where(rates[:, -1:] >= far, 0).squeeze(1)


def _cross_validate(distance: Tensor, same: Tensor, folds: int) -> VerificationResult:
    """Choose and score thresholds on squared distances."""
    distance, same, fold = _in_folds(distance, same, folds)
    thresholds = torch.arange(400, dtype=torch.float64) * 0.01
    different = fold[~same].bincount(minlength=folds)
    accepted = _count_below(thresholds, distance[same], fold[same], folds)
    mistaken = _count_below(thresholds, distance[~same], fold[~same], folds)
    correct = accepted + different[:, None] - mistaken  # (folds, thresholds)

    best = (correct.sum(0) - correct).argmax(1)  # of the other folds; argmax is the first of ties
    accuracy = correct[torch.arange(folds), best] / fold.bincount().double()
    return VerificationResult(
        accuracy.mean().item(), accuracy.std(correction=0).item(), thresholds[best]
    )
