"""A template is all that is known of one face: images and videos, merged into one embedding."""

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import check_column, check_embeddings, check_finite


def template_embeddings(features: Tensor, templates: Tensor, media: Tensor) -> Tensor:
    r"""Merge the features of each template, a video counting as much as a photograph.

    .. math::

        e_t = \frac{s_t}{\|s_t\|}, \qquad
        s_t = \sum_{m} \frac{1}{|I_{tm}|} \sum_{i \in I_{tm}} f_i

    where :math:`I_{tm}` are the images of template t that come from medium m: the mean over the
    frames of each medium, and the sum over the media. Features come as the protocol has them: not
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
        ValueError: shapes or dtypes that do not fit, no image, a feature that is not finite, or
            features of a template that sum to zero or beyond the range of their dtype.

    References:
        Whitelam et al., IARPA Janus Benchmark-B Face Dataset, 2017; Maze et al., IARPA Janus
        Benchmark - C: Face Dataset and Protocol, 2018.

    Example:
        >>> features = torch.tensor([[4.0, 0.0], [2.0, 0.0], [0.0, 4.0], [0.0, 1.0]])
        >>> template_embeddings(features, torch.tensor([7, 7, 7, 5]), torch.tensor([1, 1, 2, 1]))
        tensor([[0.0000, 1.0000],
                [0.6000, 0.8000]])
    """
    n = len(features)
    if features.ndim != 2 or n == 0 or features.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            "features must be (n, D) float32 or float64 of at least one image, "
            f"got {tuple(features.shape)} {features.dtype}"
        )
    check_column(templates, "templates", n, torch.int64)
    check_column(media, "media", n, torch.int64)

    ids, template = templates.unique(return_inverse=True)
    media_ids, medium = media.unique(return_inverse=True)
    group = template * len(media_ids) + medium  # the images of one medium in one template
    _, group, images = group.unique(return_inverse=True, return_counts=True)
    weight = images.to(features.dtype).reciprocal()[group]
    order = template.argsort(stable=True)
    count = template.bincount()
    start, weight = count.cumsum(0) - count, weight[order]
    sums = F.embedding_bag(order, features.detach(), start, mode="sum", per_sample_weights=weight)
    norm = torch.linalg.vector_norm(sums, dim=1, keepdim=True, dtype=torch.float64)
    broken = (~norm.isfinite() | (norm == 0)).nonzero()
    if len(broken) > 0:
        check_finite(features, "features")
        first = int(broken[0, 0])
        raise ValueError(
            "the features of a template must have a finite sum other than zero, "
            f"got length {norm[first].item()} for template {int(ids[first])}"
        )
    return sums / norm.to(sums.dtype)


def template_scores(embeddings: Tensor, pairs: Tensor, block: int = 2**24) -> Tensor:
    r"""Cosine of the two embeddings of each pair.

    .. math:: s_p = \langle e_{a_p}, e_{b_p} \rangle

    A list of pairs names each template many times: the sorted pairs of a group of first templates
    are picked out of one matrix product of the group with all that it is paired with, which costs
    less than to fetch two embeddings for every pair. Memory above the inputs: ``block`` products,
    at most one copy of ``embeddings``, and a few numbers a pair.

    Args:
        embeddings: unit embeddings, (T, D) float; products are taken in their dtype.
        pairs: two rows of ``embeddings`` each, (P, 2) int64 in [0, T).
        block: number of products held at a time; one first template at a time if T is larger.

    Returns:
        The scores, (P,) like ``embeddings``, equal for every ``block`` up to rounding.

    Raises:
        ValueError: shapes, dtypes or ranges that do not fit, or an embedding that is not finite.

    Example:
        Pairs of template numbers become pairs of rows by their place among the numbers:

        >>> templates = torch.tensor([7, 9, 4])
        >>> embeddings = template_embeddings(torch.eye(3), templates, torch.tensor([1, 2, 1]))
        >>> pairs = torch.searchsorted(templates.unique(), torch.tensor([[4, 7], [9, 9]]))
        >>> template_scores(embeddings, pairs)
        tensor([0., 1.])
    """
    check_embeddings(embeddings)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype != torch.int64:
        raise ValueError(f"pairs must be (P, 2) int64, got {tuple(pairs.shape)} {pairs.dtype}")
    if len(pairs) == 0:
        return embeddings.new_empty(0)
    low, high = pairs.aminmax()
    if low < 0 or high >= len(embeddings):
        raise ValueError(
            f"pairs must lie in [0, {len(embeddings)}), got {int(low if low < 0 else high)}"
        )

    total = len(embeddings)
    first, second = pairs.unbind(1)
    order = None
    if (first[1:] < first[:-1]).any():  # most lists are sorted, and spared the memory of it
        first, order = first.sort()
        second = second[order]
    counts = first.bincount(minlength=total)
    rows = counts.nonzero()[:, 0]
    counts = counts[rows]
    scores = embeddings.new_empty(len(pairs))
    group, start = max(1, block // total), 0
    for row, count in zip(rows.split(group), counts.split(group), strict=True):
        stop = start + int(count.sum())
        occurs = torch.zeros(total, dtype=torch.bool, device=pairs.device)
        occurs[second[start:stop]] = True
        products = embeddings[row] @ embeddings[occurs].T
        line = torch.arange(len(row), device=row.device) * products.shape[1]
        place = line.repeat_interleave(count)
        place += (occurs.cumsum(0) - 1)[second[start:stop]]
        torch.take(products, place, out=scores[start:stop])
        start = stop
    return scores if order is None else torch.empty_like(scores).index_copy_(0, order, scores)
