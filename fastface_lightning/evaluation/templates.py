"""A template is all that is known of one face: images and videos, merged into one embedding."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from .roc import tar_at_far
from .verification import check_far, check_same, protocol_order


def template_embeddings(features: Tensor, templates: Tensor, media: Tensor) -> Tensor:
    r"""Merge the features of each template, a video counting as much as a photograph.

    .. math::

        e_t = \frac{s_t}{\|s_t\|}, \qquad
        s_t = \sum_{m} \frac{1}{|I_{tm}|} \sum_{i \in I_{tm}} f_i

    where :math:`I_{tm}` are the images of template t that come from media m: the mean over the
    frames of each media, and the sum over the medias. Features come as the protocol has them: not
    normalised, their length telling the image's quality, and times the detector's score if wanted.

    One weighted sum a template, in the dtype of ``features`` and in the order of its images;
    float32 gives embeddings within 1e-7 of float64's on sets like IJB-C. Nothing of the size of
    ``features`` is allocated, so they may also be a memory-mapped file.

    Args:
        features: one feature an image, (n, D) float32 or float64.
        templates: template of each image, (n,) int64.
        media: media of each image, (n,) int64; numbers may recur in other templates.

    Returns:
        Unit embeddings, (T, D) like ``features``; row r belongs to template
        ``templates.unique()[r]``, so rows ascend with the template's number.

    Raises:
        ValueError: if shapes or dtypes do not fit, there is no image, a feature is not finite, or
            the features of a template sum to zero or beyond the range of their dtype.

    References:
        Whitelam et al., IARPA Janus Benchmark-B Face Dataset, 2017; Maze et al., IARPA Janus
        Benchmark - C: Face Dataset and Protocol, 2018.

    Example:
        >>> features = torch.tensor([[4.0, 0.0], [2.0, 0.0], [0.0, 4.0], [0.0, 1.0]])
        >>> template_embeddings(features, torch.tensor([7, 7, 7, 5]), torch.tensor([1, 1, 2, 1]))
        tensor([[0.0000, 1.0000],
                [0.6000, 0.8000]])
    """
    _check_features(features)
    _check_images(templates, media)
    if len(templates) != len(features):
        raise ValueError(
            "features and templates must be of the same images, "
            f"got {len(features)} and {len(templates)}"
        )
    return _merge(features, torch.arange(len(features), device=features.device), templates, media)


def template_scores(embeddings: Tensor, pairs: Tensor, block: int = 2**24) -> Tensor:
    r"""Cosine of the two embeddings of each pair.

    .. math:: s_p = \langle e_{a_p}, e_{b_p} \rangle

    A list of pairs names each template many times. Sorted, it is worked off in groups of first
    templates: one matrix product of a group with all that it is paired with, of which the scores
    wanted are picked. The products not wanted cost less than fetching two embeddings for every
    pair. Memory above the inputs: ``block`` products, at most one copy of ``embeddings``, and a few
    numbers a pair.

    Args:
        embeddings: unit embeddings, (T, D) float; products are taken in their dtype.
        pairs: two rows of ``embeddings`` each, (P, 2) int64 in [0, T).
        block: number of products held at a time; one first template at a time if T is larger.

    Returns:
        The scores, (P,) like ``embeddings``, equal for every ``block`` up to rounding.

    Raises:
        ValueError: if shapes, dtypes or ranges do not fit, or an embedding is not finite.

    Example:
        Pairs of template numbers become pairs of rows by their place among the numbers:

        >>> templates = torch.tensor([7, 9, 4])
        >>> embeddings = template_embeddings(torch.eye(3), templates, torch.tensor([1, 2, 1]))
        >>> pairs = torch.searchsorted(templates.unique(), torch.tensor([[4, 7], [9, 9]]))
        >>> template_scores(embeddings, pairs)
        tensor([0., 1.])
    """
    if embeddings.ndim != 2 or not embeddings.is_floating_point():
        raise ValueError(
            f"embeddings must be (T, D) float, got {tuple(embeddings.shape)} {embeddings.dtype}"
        )
    _check_finite(embeddings.isfinite().all(1), "embeddings")
    _check_pairs(pairs)
    if len(pairs) == 0:
        return embeddings.new_empty(0)
    low, high = pairs.aminmax()
    if low < 0 or high >= len(embeddings):
        raise ValueError(
            f"pairs must lie in [0, {len(embeddings)}), got {int(low if low < 0 else high)}"
        )

    key = pairs[:, 0] * len(embeddings) + pairs[:, 1]
    if (key[1:] >= key[:-1]).all():
        return _scores_in_order(embeddings, key, block)
    key, order = key.sort()
    scores = _scores_in_order(embeddings, key, block)
    return torch.empty_like(scores).index_copy_(0, order, scores)


class TemplateVerification(Metric):
    """TAR@FAR of template pairs, from features of images that come in batches, on any processes.

    The 1:1 protocol of IJB-B and IJB-C: :func:`template_embeddings`, :func:`template_scores`, then
    :func:`~fastface_lightning.evaluation.tar_at_far`. The protocol's lists are given once; the
    images' features then come in any order, each with its row in those lists. The repetitions by
    which a distributed sampler fills its last batch are dropped. All features are kept. Call
    ``update`` with each batch rather than the metric itself: a batch alone lacks most templates.

    ``compute()`` gives (k,) for k values of ``far``, a scalar for one, and leaves the score of each
    pair in ``scores``, for a figure of the whole ROC.

    Args:
        templates: template of each image, (n,) int64.
        media: media of each image, (n,) int64.
        pairs: two templates each, (P, 2) int64, all of them with images.
        same: whether a pair shows one person, (P,) bool; both kinds must occur.
        far: wanted false accept rates, fractions in [0, 1].
        kwargs: passed on to :class:`torchmetrics.Metric`.

    Attributes:
        scores: cosine of each pair at the last ``compute()``, (P,), None before.

    Raises:
        ValueError: if the lists do not fit, a pair's template has no image, or a ``far`` lies
            outside [0, 1]; from ``compute()`` if an image was never seen, or in the cases of
            :func:`template_embeddings`.

    Example:
        >>> metric = TemplateVerification(
        ...     templates=torch.tensor([1, 1, 2, 3]),
        ...     media=torch.tensor([10, 11, 10, 10]),
        ...     pairs=torch.tensor([[1, 2], [1, 3]]),
        ...     same=torch.tensor([True, False]),
        ...     far=[0.1, 1.0],
        ... )
        >>> metric.update(torch.eye(3)[[0, 0, 2]], index=torch.tensor([0, 2, 3]))
        >>> metric.update(torch.eye(3)[[1]], index=torch.tensor([1]))
        >>> metric.compute()
        tensor([1., 1.])
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    features: list[Tensor]
    index: list[Tensor]

    def __init__(
        self,
        templates: Tensor,
        media: Tensor,
        pairs: Tensor,
        same: Tensor,
        far: Sequence[float] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        _check_images(templates, media)
        _check_pairs(pairs)
        check_same(same, len(pairs))
        if same.all() or not same.any():
            raise ValueError(
                "pairs must show both one person and two, "
                f"got {int(same.sum())} pairs of one and {int((~same).sum())} of two"
            )
        for value in far:
            check_far(value)
        self.templates, self.media, self.same, self.far = templates, media, same, list(far)
        self.rows = _rows_of(pairs, templates.unique())
        self.scores: Tensor | None = None
        self.add_state("features", [], dist_reduce_fx="cat")
        self.add_state("index", [], dist_reduce_fx="cat")

    def update(self, features: Tensor, index: Tensor) -> None:
        """Add n images.

        Args:
            features: one feature an image, (n, D) float32 or float64.
            index: row of each image in the protocol's lists, (n,) int64.
        """
        _check_features(features)
        if index.shape != features.shape[:1] or index.dtype != torch.int64:
            raise ValueError(
                f"index must be ({len(features)},) int64, got {tuple(index.shape)} {index.dtype}"
            )
        outside = index[(index < 0) | (index >= len(self.templates))]
        if len(outside) > 0:
            raise ValueError(f"index must lie in [0, {len(self.templates)}), got {int(outside[0])}")
        self.features.append(features.detach())
        self.index.append(index)

    def compute(self) -> Tensor:
        """Return the true accept rate at each ``far``, (k,)."""
        features = dim_zero_cat(self.features)
        order = protocol_order(dim_zero_cat(self.index))
        unseen = len(self.templates) - len(order)
        if unseen > 0:
            raise ValueError(
                f"every image must be seen, got no features for {unseen} of {len(self.templates)}"
            )
        device = features.device
        embeddings = _merge(features, order, self.templates.to(device), self.media.to(device))
        self.scores = template_scores(embeddings, self.rows.to(device))
        return torch.tensor(tar_at_far(self.scores, self.same, self.far), device=self.device)

    def reset(self) -> None:
        super().reset()
        self.scores = None


def _merge(features: Tensor, rows: Tensor, templates: Tensor, media: Tensor) -> Tensor:
    """Return :func:`template_embeddings`, the feature of image i being ``features[rows[i]]``."""
    ids, template = templates.unique(return_inverse=True)
    kinds, medium = media.unique(return_inverse=True)
    group = template * len(kinds) + medium
    _, group, images = group.unique(return_inverse=True, return_counts=True)
    weight = images.to(features.dtype).reciprocal()[group]
    order = template.argsort(stable=True)
    count = template.bincount()
    sums = F.embedding_bag(
        rows[order],
        features.detach(),
        count.cumsum(0) - count,
        mode="sum",
        per_sample_weights=weight[order],
    )
    norm = torch.linalg.vector_norm(sums, dim=1, keepdim=True, dtype=torch.float64)
    broken = (~norm.isfinite() | (norm == 0)).nonzero()
    if len(broken) > 0:
        _check_finite(features.isfinite().all(1)[rows], "features")
        first = int(broken[0, 0])
        raise ValueError(
            "the features of a template must have a finite sum other than zero, "
            f"got length {norm[first].item()} for template {int(ids[first])}"
        )
    return sums / norm.to(sums.dtype)


def _scores_in_order(embeddings: Tensor, key: Tensor, block: int) -> Tensor:
    """Return the score of each pair (a, b), given as a T + b, (P,) ascending."""
    total = len(embeddings)
    rows, counts = (key // total).unique_consecutive(return_counts=True)
    scores = embeddings.new_empty(len(key))
    group, start = max(1, block // total), 0
    for row, count in zip(rows.split(group), counts.split(group), strict=True):
        stop = start + int(count.sum())
        partners, column = _compact(key[start:stop] % total, total)
        products = embeddings[row] @ embeddings[partners].T
        line = torch.arange(len(row), device=row.device).repeat_interleave(count)
        torch.take(products, line * len(partners) + column, out=scores[start:stop])
        start = stop
    return scores


def _compact(numbers: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Return the distinct of (m,) numbers in [0, n), ascending, and the place of each there."""
    occurs = torch.zeros(n, dtype=torch.bool, device=numbers.device)
    occurs[numbers] = True
    place = occurs.cumsum(0) - 1
    return occurs.nonzero().squeeze(1), place[numbers]


def _rows_of(pairs: Tensor, ids: Tensor) -> Tensor:
    """Return the place of each pair's templates among the ascending (T,) ids, (P, 2)."""
    rows = torch.searchsorted(ids, pairs).clamp_(max=len(ids) - 1)
    unknown = pairs[ids[rows] != pairs]
    if len(unknown) > 0:
        raise ValueError(
            "pairs must be of templates with images, "
            f"got {len(unknown.unique())} without, the first being {int(unknown[0])}"
        )
    return rows


def _check_features(features: Tensor) -> None:
    if features.ndim != 2 or features.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            "features must be (n, D) float32 or float64, "
            f"got {tuple(features.shape)} {features.dtype}"
        )


def _check_images(templates: Tensor, media: Tensor) -> None:
    for numbers, name in ((templates, "templates"), (media, "media")):
        if numbers.ndim != 1 or len(numbers) == 0 or numbers.dtype != torch.int64:
            raise ValueError(
                f"{name} must be (n,) int64, one for each of n > 0 images, "
                f"got {tuple(numbers.shape)} {numbers.dtype}"
            )
    if len(templates) != len(media):
        raise ValueError(
            f"templates and media must be of the same images, got {len(templates)} and {len(media)}"
        )


def _check_pairs(pairs: Tensor) -> None:
    if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype != torch.int64:
        raise ValueError(f"pairs must be (P, 2) int64, got {tuple(pairs.shape)} {pairs.dtype}")


def _check_finite(finite: Tensor, name: str) -> None:
    """Refuse (n,) rows that are not all finite, naming the first such row."""
    broken = (~finite).nonzero()
    if len(broken) > 0:
        raise ValueError(f"{name} must be finite, got NaN or infinity in row {int(broken[0])}")
