"""Searching a gallery against loops over probes, identities and entries."""

import math
import pickle
import re
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import on_two_ranks
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastface_lightning.evaluation.identification import (
    Identification,
    IdentificationResult,
    identification,
)

RANKS, FPIR = (1, 2, 5), (0.0, 0.1, 0.25, 1.0)


def twin(
    probes: Tensor, probe_ids: Tensor, gallery: Tensor, gallery_ids: Tensor
) -> IdentificationResult:
    """The protocol as one would say it: every probe against every entry of every identity."""
    enrolled = set(gallery_ids.tolist())
    own, place, best = [], [], []
    for probe, y in zip(probes.double(), probe_ids.tolist(), strict=True):
        score = {
            j: max(
                float((probe * entry).sum())
                for entry, owner in zip(gallery.double(), gallery_ids.tolist(), strict=True)
                if owner == j
            )
            for j in enrolled
        }
        if y in enrolled:
            own.append(score[y])
            place.append(1 + sum(score[j] >= score[y] for j in enrolled if j != y))
        else:
            best.append(max(score.values()))
    rank = [sum(p <= r for p in place) / len(place) for r in RANKS]
    if not best:
        return IdentificationResult(rank, None, len(own), 0)

    def hits(rate: float) -> float:
        """At the threshold that lets most probes in: an unmated score or below all of them."""
        allowed = Fraction(str(rate)) * len(best)
        threshold = min(t for t in [*best, -math.inf] if sum(u > t for u in best) <= allowed)
        return sum(p == 1 and s > threshold for s, p in zip(own, place, strict=True)) / len(own)

    return IdentificationResult(rank, [hits(rate) for rate in FPIR], len(own), len(best))


def some_faces(
    probes: int, entries: int, identities: int, seed: int = 0, whole: bool = False
) -> tuple[Tensor, ...]:
    """Noisy faces; about a third of the probes are strangers, and numbers have gaps.

    ``whole``: coordinates of -1, 0 and 1, whose products are exact and often tie.
    """
    generator = torch.Generator().manual_seed(seed)
    faces = torch.randn(2 * identities, 6, generator=generator, dtype=torch.float64)
    enrolled = torch.randint(identities, (entries,), generator=generator)
    searched = torch.randint(math.ceil(1.5 * identities), (probes,), generator=generator)
    searched[0] = enrolled[0]

    def images(ids: Tensor) -> Tensor:
        noise = torch.randn(len(ids), 6, generator=generator, dtype=torch.float64)
        shown = F.normalize(faces[ids] + noise)
        return (2 * shown).round().clamp(-1, 1) if whole else shown

    return images(searched), 10 * searched - 4, images(enrolled), 10 * enrolled - 4


@settings(deadline=None, max_examples=80)
@given(
    probes=st.integers(1, 30),
    entries=st.integers(1, 15),
    identities=st.integers(1, 10),
    block=st.integers(1, 300),
    seed=st.integers(0, 2**31),
    whole=st.booleans(),
)
def test_equals_the_loops_whatever_the_block(
    probes: int, entries: int, identities: int, block: int, seed: int, whole: bool
) -> None:
    faces = some_faces(probes, entries, identities, seed, whole)
    assert identification(*faces, RANKS, FPIR, block) == twin(*faces)


def test_one_entry_an_identity_in_float32() -> None:
    gallery = F.normalize(torch.randn(40, 64))
    ids = torch.randperm(40)
    probe_ids = torch.cat([ids, torch.arange(100, 120)])
    probes = F.normalize(torch.cat([gallery, torch.zeros(20, 64)]) + 0.2 * torch.randn(60, 64))
    assert identification(probes, probe_ids, gallery, ids, RANKS, FPIR) == twin(
        probes, probe_ids, gallery, ids
    )


def at(*cosines: float) -> Tensor:
    """Unit vectors in the plane with these first coordinates, exact for the first one."""
    x = torch.tensor(cosines, dtype=torch.float64)
    return torch.stack([x, (1 - x * x).sqrt()], 1)


def test_an_identity_competes_once_with_its_best_entry() -> None:
    """Three entries of another identity score higher than the own one, and it is second."""
    gallery, ids = at(0.9, 0.8, 0.7, 0.6), torch.tensor([5, 5, 5, 3])
    result = identification(at(1.0), torch.tensor([3]), gallery, ids, ranks=(1, 2, 3))
    assert result == IdentificationResult([0.0, 1.0, 1.0], None, 1, 0)
    result = identification(at(1.0), torch.tensor([5]), gallery, ids, ranks=(1,))
    assert result.rank == [1.0]  # its worse entries do not stand in its own way


def test_an_equal_score_comes_before_the_own() -> None:
    gallery = at(0.5, 0.5, 0.25)
    found = [
        identification(at(1.0), torch.tensor([y]), gallery, torch.arange(3), ranks=(1, 2, 3)).rank
        for y in range(3)
    ]
    assert found == [[0.0, 1.0, 1.0], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0]]


def test_embeddings_that_are_all_alike_find_nothing() -> None:
    same = F.normalize(torch.randn(1, 512)).expand(300, 512)
    ids = torch.arange(300)
    result = identification(same, ids, same[:200], ids[:200], ranks=(1, 5, 200), fpir=(0.1, 1.0))
    assert result == IdentificationResult([0.0, 0.0, 1.0], [0.0, 0.0], 200, 100)


def search_among(strangers: list[float], own: list[float], fpir: list[float]) -> list[float]:
    """Hit rates of mated probes with these scores, strangers scoring as said.

    Scores are exact: the gallery's entry is (1, 0), alone, and so the best for everybody.
    """
    probes = at(*own, *strangers)
    ids = torch.tensor([0] * len(own) + [1] * len(strangers))
    gallery = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    result = identification(probes, ids, gallery, torch.tensor([0]), fpir=fpir)
    assert result.tpir is not None
    return result.tpir


def test_threshold_lies_just_above_the_first_stranger_too_many() -> None:
    strangers = [0.1, 0.2, 0.3, 0.4]
    own = [0.15, 0.25, 0.35, 0.45]
    assert search_among(strangers, own, [0, 0.24, 0.25, 0.5, 0.75, 1]) == [
        0.25,
        0.25,
        0.5,
        0.75,
        1.0,
        1.0,
    ]
    assert search_among(strangers, [0.05] * 4, [0.75, 1]) == [0.0, 1.0]


def test_strangers_that_tie_pass_together_or_not_at_all() -> None:
    """Letting one of the two at 0.4 in would let both in, half of them all."""
    strangers = [0.1, 0.4, 0.4, 0.2]
    assert search_among(strangers, [0.4, 0.5], [0.25, 0.49]) == [0.5, 0.5]
    assert search_among(strangers, [0.4, 0.5, 0.3], [0.5]) == [1.0]


def test_a_rate_is_the_decimal_it_is_written_as() -> None:
    """0.29 of 100 strangers are 29, though 0.29 * 100 is 28.999... in floats."""
    strangers = [i / 128 for i in range(100)]
    own = [(i + 0.5) / 128 for i in range(100)]
    assert search_among(strangers, own, [0.28, 0.29, 0.3]) == [0.29, 0.3, 0.31]


def test_a_hit_must_be_first_and_above_the_threshold() -> None:
    gallery, ids = torch.eye(2, dtype=torch.float64), torch.tensor([0, 1])
    probes = torch.tensor([[0.9, 0.1], [0.9, 0.95], [0.3, 0.1], [0.5, 0.4]], dtype=torch.float64)
    result = identification(probes, torch.tensor([0, 0, 0, 7]), gallery, ids, fpir=(0, 1))
    assert result.tpir == [1 / 3, 2 / 3]


class Largest(TorchDispatchMode):
    """Remembers the most numbers in any tensor that an operation returns."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


@pytest.mark.parametrize("each", [1, 2])
def test_holds_no_more_than_a_block(each: int) -> None:
    probes, gallery = torch.randn(2000, 4), torch.randn(1000, 4)
    with Largest() as largest:
        identification(
            probes, torch.arange(2000), gallery, torch.arange(1000) // each, block=20_000
        )
    assert largest.numbers <= 20_000


def test_large_galleries_are_searched_one_probe_at_a_time() -> None:
    faces = some_faces(20, 12, 8)
    assert identification(*faces, RANKS, FPIR, block=1) == twin(*faces)


def test_order_of_probes_and_entries_says_nothing() -> None:
    probes, probe_ids, gallery, gallery_ids = some_faces(60, 20, 15)
    p, g = torch.randperm(60), torch.randperm(20)
    assert identification(probes[p], probe_ids[p], gallery[g], gallery_ids[g]) == identification(
        probes, probe_ids, gallery, gallery_ids
    )


UNIT, IDS = torch.eye(4), torch.arange(4)
GOOD: dict[str, Any] = {"probes": UNIT, "probe_ids": IDS, "gallery": UNIT, "gallery_ids": IDS}


def broken(row: int, value: float) -> Tensor:
    embeddings = UNIT.clone()
    embeddings[row, 2] = value
    return embeddings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probes": UNIT[0]}, "probes must be (n, D) float, got (4,) torch.float32"),
        ({"gallery": UNIT.long()}, "gallery must be (n, D) float, got (4, 4) torch.int64"),
        ({"gallery": UNIT[:, :3]}, "share one width and dtype, got 4 torch.float32 and 3"),
        ({"probes": UNIT.double()}, "got 4 torch.float64 and 4 torch.float32"),
        ({"probe_ids": IDS[:3]}, "ids must be (4,) int64, one for each of probes, got (3,)"),
        ({"gallery_ids": IDS.float()}, "one for each of gallery, got (4,) torch.float32"),
        ({"probes": broken(2, math.nan)}, "probes must be finite, got NaN or infinity in row 2"),
        ({"gallery": broken(1, math.inf)}, "gallery must be finite, got NaN or infinity in row 1"),
        ({"probe_ids": IDS + 4}, "at least one probe must be in the gallery, got none of 4"),
        ({"probes": UNIT[:0], "probe_ids": IDS[:0]}, "must be in the gallery, got none of 0"),
        ({"gallery": UNIT[:0], "gallery_ids": IDS[:0]}, "must be in the gallery, got none of 4"),
        ({"ranks": (1, 0)}, "ranks must be at least 1, got 0"),
        ({"fpir": (0.1, -0.1)}, "fpir must lie in [0, 1], got -0.1"),
        ({"fpir": (math.nan,)}, "fpir must lie in [0, 1], got nan"),
    ],
)
def test_refuses_bad_input(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        identification(**{**GOOD, **change})


def rows_of(
    probes: Tensor, probe_ids: Tensor, gallery: Tensor, gallery_ids: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Probes and gallery as the rows of one set."""
    is_gallery = torch.arange(len(probes) + len(gallery)) >= len(probes)
    return torch.cat([probes, gallery]), torch.cat([probe_ids, gallery_ids]), is_gallery


def assert_result(metric: Identification, expected: IdentificationResult) -> None:
    found = metric.compute()
    assert metric.result == expected
    assert expected.tpir is not None
    rates = dict(zip([f"rank_{r}" for r in RANKS], expected.rank, strict=True))
    rates |= zip([f"tpir_{f}" for f in FPIR], expected.tpir, strict=True)
    assert {name: rate.item() for name, rate in found.items()} == pytest.approx(rates)
    assert all(rate.shape == () for rate in found.values())


@settings(deadline=None, max_examples=20)
@given(ranks=st.integers(1, 4), batch=st.integers(1, 9), seed=st.integers(0, 99))
def test_ranks_merged_in_any_order(ranks: int, batch: int, seed: int) -> None:
    """Interleaved and padded as by a DistributedSampler, then shuffled: the loops' result."""
    faces = some_faces(40, 15, 10, seed)
    rows = rows_of(*faces)
    padded = torch.arange(math.ceil(55 / ranks) * ranks) % 55
    metrics = [Identification(RANKS, FPIR) for _ in range(ranks)]
    for rank, metric in enumerate(metrics):
        mine = padded[rank::ranks]
        for index in mine[torch.randperm(len(mine))].split(batch):
            metric.update(*(x[index] for x in rows), index)
    first = metrics.pop()
    for other in metrics:
        first.merge_state(other)
    assert_result(first, twin(*faces))


def on_rank(rank: int) -> None:
    """Rank 1 comes in other batches, with repetitions; rank 0 alone ends with an empty one."""
    faces = some_faces(40, 15, 10)
    rows = rows_of(*faces)
    metric = Identification(RANKS, FPIR)
    for index in torch.cat([torch.arange(55)[rank::2], torch.arange(9 * rank)]).split(7 - rank):
        metric.update(*(x[index] for x in rows), index)
    if rank == 0:
        metric.update(*(x[:0] for x in rows), torch.arange(0))
    assert_result(metric, twin(*faces))


def test_two_processes_give_both_the_result_of_one(tmp_path: Path) -> None:
    on_two_ranks(on_rank, tmp_path)


def test_without_numbers_every_row_counts() -> None:
    faces = some_faces(40, 15, 10)
    probes, probe_ids, gallery, gallery_ids = faces
    metric = Identification(RANKS, FPIR)
    metric.update(gallery, gallery_ids, torch.ones(15, dtype=torch.bool))
    for batch in torch.arange(40).split(11):
        is_gallery = torch.zeros(len(batch), dtype=torch.bool)
        metric.update(probes[batch], probe_ids[batch], is_gallery)
    assert_result(metric, twin(*faces))


def test_without_strangers_there_is_no_tpir() -> None:
    metric = Identification()
    metric.update(UNIT, IDS, torch.ones(4, dtype=torch.bool))
    metric.update(UNIT[:2], IDS[[0, 2]], torch.zeros(2, dtype=torch.bool))
    assert {k: v.item() for k, v in metric.compute().items()} == {"rank_1": 0.5, "rank_5": 1.0}
    assert metric.result == IdentificationResult([0.5, 1.0], None, 2, 0)


def test_reset_forgets_and_pickling_keeps() -> None:
    faces = some_faces(40, 15, 10)
    embeddings, ids, is_gallery = rows_of(*faces)
    metric = Identification(RANKS, FPIR)
    metric.update(embeddings.flip(0), ids, is_gallery)
    metric.compute()
    metric.reset()
    assert metric.result is None
    metric.update(embeddings.requires_grad_(), ids, is_gallery)
    assert not metric.embeddings[0].requires_grad
    assert_result(pickle.loads(pickle.dumps(metric)), twin(*faces))


def test_metric_refuses_bad_settings() -> None:
    with pytest.raises(ValueError, match="ranks must be at least 1, got 0"):
        Identification(ranks=(0,))
    with pytest.raises(ValueError, match=re.escape("fpir must lie in [0, 1], got 2")):
        Identification(fpir=(2,))


ENROLLED = torch.ones(4, dtype=torch.bool)


@pytest.mark.parametrize(
    ("embeddings", "ids", "is_gallery", "index", "message"),
    [
        (UNIT[0], IDS, ENROLLED, IDS, "embeddings must be (n, D) float, got (4,)"),
        (broken(3, math.nan), IDS, ENROLLED, IDS, "embeddings must be finite, got NaN or infinity"),
        (UNIT, IDS[:2], ENROLLED, IDS, "ids must be (4,) int64, one for each of embeddings"),
        (UNIT, IDS, ENROLLED.long(), IDS, "is_gallery must be (4,) bool, one for each row, got"),
        (UNIT, IDS, ENROLLED[:3], IDS, "is_gallery must be (4,) bool, one for each row, got (3,)"),
        (UNIT, IDS, ENROLLED, IDS[:3], "index must be (4,) int64, got (3,) torch.int64"),
    ],
)
def test_metric_refuses_bad_batches_and_keeps_nothing(
    embeddings: Tensor, ids: Tensor, is_gallery: Tensor, index: Tensor, message: str
) -> None:
    metric = Identification()
    with pytest.raises(ValueError, match=re.escape(message)):
        metric.update(embeddings, ids, is_gallery, index)
    assert not any(metric.metric_state.values())


def test_refuses_an_index_for_some_updates_only() -> None:
    metric = Identification()
    metric.update(UNIT, IDS, ENROLLED)
    metric.update(UNIT, IDS, ~ENROLLED, torch.arange(4))
    with pytest.raises(ValueError, match="with every update or with none, got it for 4 of 8"):
        metric.compute()
