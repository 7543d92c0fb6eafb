"""Identification: whose face is it, among those enrolled in a gallery, and is it there at all?"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import check_column, check_embeddings, check_fraction
from .row_metric import RowMetric


class IdentificationResult(NamedTuple):
    """Of :func:`identification`.

    Attributes:
        rank: share of the mated probes found within each of ``ranks``, fractions in [0, 1].
        tpir: share of the mated probes found first and above the threshold of each of ``fpir``,
            fractions in [0, 1]; None where no probe is unmated, so that there is no threshold.
        mated: number of probes whose identity is in the gallery.
        unmated: number of probes whose identity is not.
    """

    rank: list[float]
    tpir: list[float] | None
    mated: int
    unmated: int


def identification(
    probes: Tensor,
    probe_ids: Tensor,
    gallery: Tensor,
    gallery_ids: Tensor,
    ranks: Sequence[int] = (1, 5),
    fpir: Sequence[float] = (0.01, 0.1),
    block: int = 2**22,
) -> IdentificationResult:
    r"""Rank rates of a closed-set search, and its hit rates where strangers come too.

    The score of a probe p and an identity j is the highest inner product of p with the entries of
    j, so that an identity competes once however many entries it has:

    .. math::

        s_j(p) = \max_{g \in G_j} \langle p, g \rangle, \qquad
        r(p) = |\{ j : s_j(p) \ge s_{y}(p) \}|

    A probe is mated if its identity y is in the gallery. r is the place of y among the identities,
    at worst: another identity with an equal score comes before it, so embeddings that are all
    alike find nothing. With the mated probes M and the unmated ones U,

    .. math::

        \text{rank}_R = \frac{|\{ p \in M : r(p) \le R \}|}{|M|}, \qquad
        \text{tpir}_f = \frac{|\{ p \in M : r(p) = 1,\ s_y(p) > u_{k+1} \}|}{|M|}

    where :math:`u_1 \ge u_2 \ge \dots` are the best scores of the unmated probes and k is the
    largest number of them whose share k / \|U\| is at most the false positive identification rate
    f; at k = \|U\| every score passes. A stranger raises an alarm by a score above
    :math:`u_{k+1}`, so at most the share f of them do, whatever the ties.

    Args:
        probes: unit embeddings to search for, (N, D) float; products are taken in their dtype.
        probe_ids: identity of each probe, (N,) int64.
        gallery: unit embeddings of the enrolled, (G, D), like ``probes``.
        gallery_ids: identity of each entry, (G,) int64; one or several entries an identity.
        ranks: places up to which a probe counts as found, at least 1.
        fpir: false positive identification rates, fractions in [0, 1].
        block: number of products held at a time; one probe at a time if the gallery is larger.

    Returns:
        Rank rates in the order of ``ranks``, hit rates in the order of ``fpir``, and the counts.

    Raises:
        ValueError: shapes, dtypes or ranges that do not fit, an embedding that is not finite, or
            no mated probe.

    References:
        Maze et al., IARPA Janus Benchmark - C: Face Dataset and Protocol, 2018, section 4.
        Grother et al., Face Recognition Vendor Test Part 2: Identification, NISTIR 8271.

    Example:
        >>> gallery = torch.eye(3)
        >>> probes = torch.tensor([[0.8, 0.6, 0.0], [0.8, 0.6, 0.0], [0.0, 0.6, 0.8]])
        >>> ids = torch.tensor([0, 1, 9])
        >>> identification(probes, ids, gallery, torch.tensor([0, 1, 2]), ranks=(1, 2), fpir=[1.0])
        IdentificationResult(rank=[0.5, 1.0], tpir=[0.5], mated=2, unmated=1)
    """
    _check_rates(ranks, fpir)
    check_embeddings(probes, "probes")
    check_embeddings(gallery, "gallery")
    check_column(probe_ids, "probe_ids", len(probes), torch.int64)
    check_column(gallery_ids, "gallery_ids", len(gallery), torch.int64)
    if probes.shape[1] != gallery.shape[1] or probes.dtype != gallery.dtype:
        raise ValueError(
            "probes and gallery must share one width and dtype, "
            f"got {probes.shape[1]} {probes.dtype} and {gallery.shape[1]} {gallery.dtype}"
        )
    is_mated = torch.isin(probe_ids, gallery_ids)
    if not is_mated.any():
        raise ValueError(f"at least one probe must be in the gallery, got none of {len(probes)}")

    # Sorted by identity, the entries of one are neighbours: their best is a segment's maximum.
    ids, entries = gallery_ids.unique(return_counts=True)
    gallery = gallery[gallery_ids.argsort()]
    at_once = max(1, block // len(gallery))

    def scores(rows: Tensor) -> Tensor:
        """Score of every identity with the probes in these rows, (identities, rows)."""
        products = gallery @ probes[rows].T
        if len(ids) == len(gallery):
            return products
        return torch.segment_reduce(products, "max", lengths=entries, axis=0)

    # The true score comes out of the product it is compared with, so equal scores are equal.
    true_scores, places = [], []
    for rows in is_mated.nonzero().squeeze(1).split(at_once):
        score = scores(rows)
        true_score = score.gather(0, torch.searchsorted(ids, probe_ids[rows])[None])
        true_scores.append(true_score.squeeze(0))
        places.append((score >= true_score).sum(0))
    best = [scores(rows).amax(0) for rows in (~is_mated).nonzero().squeeze(1).split(at_once)]

    place, strangers = torch.cat(places), torch.cat(best).sort(descending=True).values
    mated, unmated = len(place), len(strangers)
    rank = [(place <= r).double().mean().item() for r in ranks]
    if unmated == 0:
        return IdentificationResult(rank, None, mated, unmated)
    first = torch.cat(true_scores)[place == 1]
    thresholds = F.pad(strangers, (0, 1), value=-torch.inf)  # at k = |U| every score passes
    share = torch.arange(1, unmated + 1, dtype=torch.float64) / unmated
    allowed = [int((share <= f).sum()) for f in fpir]
    tpir = [int((first > thresholds[k]).sum()) / mated for k in allowed]
    return IdentificationResult(rank, tpir, mated, unmated)


def _check_rates(ranks: Sequence[int], fpir: Sequence[float]) -> None:
    for r in ranks:
        if r < 1:
            raise ValueError(f"ranks must be at least 1, got {r}")
    for f in fpir:
        check_fraction(f, "fpir")


class Identification(RowMetric):
    """:func:`identification` of embeddings that arrive in batches, on one process or many.

    The order of the rows does not matter; all embeddings are kept, see :class:`RowMetric`.
    ``compute()`` gives a dict of scalars, one a rank and one a rate, ready for ``self.log_dict``::

        {"rank_1": tensor(0.97), "rank_5": tensor(0.98), "tpir_0.01": tensor(0.94), ...}

    without the ``tpir`` where every probe is mated, and leaves the rest in ``result``.

    Args:
        ranks: see :func:`identification`.
        fpir: see :func:`identification`.
        kwargs: passed on to :class:`torchmetrics.Metric`.

    Attributes:
        result: the :class:`IdentificationResult` of the last ``compute()``, None before.

    Raises:
        ValueError: in the cases of :class:`RowMetric` and of :func:`identification`.

    Example:
        >>> metric = Identification(ranks=[1])
        >>> metric.update(torch.eye(3), torch.arange(3), torch.ones(3, dtype=torch.bool))
        >>> metric.update(torch.eye(3)[:2], torch.tensor([0, 2]), torch.zeros(2, dtype=torch.bool))
        >>> metric.compute()
        {'rank_1': tensor(0.5000)}
    """

    higher_is_better = True
    columns = ("embeddings", "ids", "is_gallery")
    result: IdentificationResult | None = None

    def __init__(
        self, ranks: Sequence[int] = (1, 5), fpir: Sequence[float] = (0.01, 0.1), **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        _check_rates(ranks, fpir)
        self.ranks, self.fpir = ranks, fpir

    def update(
        self, embeddings: Tensor, ids: Tensor, is_gallery: Tensor, index: Tensor | None = None
    ) -> None:
        """Add n rows.

        Args:
            embeddings: unit embeddings, (n, D) float.
            ids: identity of each row, (n,) int64.
            is_gallery: whether a row is enrolled, (n,) bool; the others are searched for.
            index: number of each row in the whole set, (n,) int64, at least 0.
        """
        check_embeddings(embeddings)
        check_column(ids, "ids", len(embeddings), torch.int64)
        check_column(is_gallery, "is_gallery", len(embeddings), torch.bool)
        self.keep(index, embeddings, ids, is_gallery)

    def compute(self) -> dict[str, Tensor]:
        """Return the rates by name, each a scalar."""
        embeddings, ids, is_gallery = self.rows()
        probes, gallery = ((embeddings[side], ids[side]) for side in (~is_gallery, is_gallery))
        self.result = identification(*probes, *gallery, self.ranks, self.fpir)
        rates = {f"rank_{r}": v for r, v in zip(self.ranks, self.result.rank, strict=True)}
        if self.result.tpir is not None:
            rates |= {f"tpir_{f}": v for f, v in zip(self.fpir, self.result.tpir, strict=True)}
        return {name: torch.tensor(rate, device=self.device) for name, rate in rates.items()}
