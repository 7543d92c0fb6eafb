"""Searching a gallery against loops over probes, identities and entries."""

import math
import re
from fractions import Fraction
from typing import Any

import pytest
import torch
from allocation import LargestAllocation
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from fastface_lightning.evaluation import IdentificationResult, identification

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


@pytest.mark.parametrize("each", [1, 2])
def test_holds_no_more_than_a_block(each: int) -> None:
    probes, gallery = torch.randn(2000, 4), torch.randn(1000, 4)
    with LargestAllocation() as largest:
        identification(
            probes, torch.arange(2000), gallery, torch.arange(1000) // each, block=20_000
        )
    assert largest.bytes <= 4 * 20_000


UNIT, IDS = torch.eye(4), torch.arange(4)
GOOD: dict[str, Any] = {"probes": UNIT, "probe_ids": IDS, "gallery": UNIT, "gallery_ids": IDS}


def broken(row: int, value: float) -> Tensor:
    embeddings = UNIT.clone()
    embeddings[row, 2] = value
    return embeddings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"probes": UNIT[0]}, "probes must be (n, D) float"),
        ({"gallery": UNIT.long()}, "gallery must be (n, D) float"),
        ({"gallery": UNIT[:, :3]}, "share one width and dtype, got 4 torch.float32 and 3"),
        ({"probes": UNIT.double()}, "got 4 torch.float64 and 4 torch.float32"),
        ({"probe_ids": IDS[:3]}, "probe_ids must be (4,) int64"),
        ({"gallery_ids": IDS.float()}, "gallery_ids must be (4,) int64"),
        ({"probes": broken(2, math.nan)}, "probes must be finite, got NaN or infinity in row 2"),
        ({"gallery": broken(1, math.inf)}, "gallery must be finite, got NaN or infinity in row 1"),
        ({"probe_ids": IDS + 4}, "must be in the gallery, got none of 4"),
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
