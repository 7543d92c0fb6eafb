"""Ten-fold verification: choose a threshold on nine folds of pairs, score it on the tenth."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

_UNNUMBERED = -1


class VerificationResult(NamedTuple):
    """What cross-validated verification finds.

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
    the lowest is taken. The result is the mean and the population standard deviation of
    :math:`A_k`. The folds follow the order of the pairs, which is part of the protocol.

    Args:
        a: unit embeddings of the first images, (n, D) float; distances are taken in their dtype.
        b: unit embeddings of the second images, like ``a``.
        same: whether a pair shows one person, (n,) bool.
        folds: number of folds K, at least 2 and at most n.

    Returns:
        Mean accuracy, its standard deviation, and the threshold of each fold.

    Raises:
        ValueError: if shapes or dtypes do not fit, an embedding is not finite, or there are fewer
            pairs than folds.

    References:
        Huang et al., Labeled Faces in the Wild, 2007, View 2.

    Example:
        >>> a = torch.eye(4)
        >>> b = a[[0, 1, 3, 2]]
        >>> verification_accuracy(a, b, torch.tensor([True, True, False, False]), folds=2).accuracy
        0.5
    """
    distance = _squared_distance(a, b, same)
    return _cross_validate(distance, same, folds)


class VerificationAccuracy(Metric):
    """:func:`verification_accuracy` of pairs that arrive in batches, on one process or many.

    The folds follow the order of the pairs. On one process that is the order of the updates; where
    a sampler spreads the pairs over processes, give each pair's number as ``index``: the pairs are
    then sorted by it, and the repetitions by which a distributed sampler fills its last batch are
    dropped. Only one distance a pair is kept.

    ``compute()`` gives the mean accuracy and leaves the rest in ``result``::

        self.log("lfw", metric.compute())
        self.log("lfw_std", metric.result.std)

    Args:
        folds: number of folds, at least 2.
        kwargs: passed on to :class:`torchmetrics.Metric`.

    Attributes:
        result: the :class:`VerificationResult` of the last ``compute()``, None before.

    Raises:
        ValueError: from ``compute()`` in the cases of :func:`verification_accuracy`, or if only
            some updates had an ``index``.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    distance: list[Tensor]
    same: list[Tensor]
    index: list[Tensor]

    def __init__(self, folds: int = 10, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        _check_folds(folds)
        self.folds = folds
        self.result: VerificationResult | None = None
        self.add_state("distance", [], dist_reduce_fx="cat")
        self.add_state("same", [], dist_reduce_fx="cat")
        self.add_state("index", [], dist_reduce_fx="cat")

    def update(self, a: Tensor, b: Tensor, same: Tensor, index: Tensor | None = None) -> None:
        """Add n pairs: ``a``, ``b`` (n, D) unit embeddings, ``same`` (n,) bool.

        Args:
            a: unit embeddings of the first images, (n, D) float.
            b: unit embeddings of the second images, like ``a``.
            same: whether a pair shows one person, (n,) bool.
            index: number of each pair in the whole set, (n,) int64, at least 0.
        """
        self.distance.append(_squared_distance(a, b, same))
        self.same.append(same)
        if index is None:
            index = torch.full_like(same, _UNNUMBERED, dtype=torch.int64)
        elif index.shape != same.shape or index.dtype != torch.int64:
            raise ValueError(
                f"index must be ({len(same)},) int64, got {tuple(index.shape)} {index.dtype}"
            )
        self.index.append(index)

    def compute(self) -> Tensor:
        """Return the mean accuracy over the folds, a scalar."""
        order = _protocol_order(dim_zero_cat(self.index))
        distance, same = dim_zero_cat(self.distance)[order], dim_zero_cat(self.same)[order]
        self.result = _cross_validate(distance, same, self.folds)
        return torch.tensor(self.result.accuracy, device=self.device)

    def reset(self) -> None:
        super().reset()
        self.result = None


def _check_folds(folds: int) -> None:
    if folds < 2:
        raise ValueError(f"folds must be at least 2, got {folds}")


def _squared_distance(a: Tensor, b: Tensor, same: Tensor) -> Tensor:
    """Return the squared distance of each pair, (n,) in the dtype of ``a``."""
    if a.ndim != 2 or a.shape != b.shape:
        raise ValueError(f"a and b must both be (n, D), got {tuple(a.shape)} and {tuple(b.shape)}")
    if not a.is_floating_point() or a.dtype != b.dtype:
        raise ValueError(f"a and b must share one float dtype, got {a.dtype} and {b.dtype}")
    if same.shape != a.shape[:1] or same.dtype != torch.bool:
        raise ValueError(
            f"same must be ({len(a)},) bool, one for each pair, "
            f"got {tuple(same.shape)} {same.dtype}"
        )
    return (a - b).square().sum(1)


def _protocol_order(index: Tensor) -> Tensor:
    """Return where each pair stands, in order of its number and once only: (n,) -> (unique,)."""
    numbered = int((index != _UNNUMBERED).sum())
    if numbered == 0:
        return torch.arange(len(index), device=index.device)
    if numbered < len(index):
        raise ValueError(
            "index must come with every update or with none, "
            f"got it for {numbered} of {len(index)} pairs"
        )
    index, order = index.sort(stable=True)
    is_new = torch.ones_like(index, dtype=torch.bool)
    is_new[1:] = index[1:] != index[:-1]
    return order[is_new]


def _cross_validate(distance: Tensor, same: Tensor, folds: int) -> VerificationResult:
    """Choose and score thresholds on squared distances, in O(n log T + K T) for T thresholds."""
    _check_folds(folds)
    n = len(distance)
    if n < folds:
        raise ValueError(
            f"pairs must be at least as many as folds, got {n} pairs for {folds} folds"
        )
    distance, same = distance.detach().cpu().double(), same.cpu()
    broken = (~distance.isfinite()).nonzero()
    if len(broken) > 0:
        raise ValueError(f"embeddings must be finite, got NaN or infinity in pair {int(broken[0])}")

    thresholds = torch.arange(400, dtype=torch.float64) * 0.01
    size = torch.full((folds,), n // folds)
    size[: n % folds] += 1
    fold = torch.arange(folds).repeat_interleave(size)

    # Threshold 0 calls every pair different. The first threshold above a pair's distance calls it
    # the same: one more right decision if it shows one person, one fewer if not.
    first = torch.searchsorted(thresholds, distance, right=True)
    change = torch.zeros(folds, len(thresholds) + 1, dtype=torch.int64)
    change.index_put_((fold, first), torch.where(same, 1, -1), accumulate=True)
    different = torch.zeros(folds, dtype=torch.int64).index_add_(0, fold, (~same).long())
    correct = different[:, None] + change.cumsum(1)[:, :-1]  # (folds, thresholds)

    best = (correct.sum(0) - correct).argmax(1)  # of the other folds; argmax is the first of ties
    accuracy = correct[torch.arange(folds), best].double() / size
    return VerificationResult(
        accuracy.mean().item(), accuracy.std(correction=0).item(), thresholds[best]
    )
