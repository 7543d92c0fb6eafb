"""Metrics over batches and processes give what their functions give of the whole set at once."""

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import on_ranks
from torch import Tensor
from torch.nn.functional import normalize

from fastface_lightning.evaluation import (
    Identification,
    ROCCurve,
    TARAtFAR,
    VerificationAccuracy,
    identification,
    roc_curve,
    tar_at_far,
    verification_accuracy,
)

FARS, RANKS, FPIR = [0.0, 0.03, 0.2, 0.9], (1, 2, 5), (0.0, 0.1, 0.25, 1.0)


def pairs_of(n: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(n)
    a, other = torch.randn(2, n, 8, generator=generator, dtype=torch.float64)
    same = torch.arange(n) % 3 == 0
    return normalize(a), normalize(torch.where(same[:, None], a + 1.2 * other, other)), same


def scores_of(n: int) -> tuple[Tensor, ...]:
    a, b, same = pairs_of(n)
    return (a * b).sum(1).mul(8).round() / 8, same  # with ties


def faces_of(n: int) -> tuple[Tensor, ...]:
    """A quarter is the gallery, and some of the probes are strangers."""
    embeddings, _, _ = pairs_of(n)
    row = torch.arange(n)
    is_gallery = row % 4 == 0
    ids = torch.where((row % 5 == 1) & ~is_gallery, 1000, row // 4 % (n // 8))
    return embeddings, ids, is_gallery


def accuracy_values(metric: Any) -> list[float]:
    accuracy = metric.compute().item()
    assert accuracy == pytest.approx(metric.result.accuracy, abs=1e-6)
    return [*metric.result[:2], *metric.result.thresholds.tolist()]


def identification_values(metric: Any) -> list[float]:
    rates = metric.compute()
    assert list(rates)[:4] == ["rank_1", "rank_2", "rank_5", "tpir_0.0"]
    assert [rate.item() for rate in rates.values()] == pytest.approx(
        metric.result.rank + metric.result.tpir
    )
    return metric.result.rank + metric.result.tpir


class Case(NamedTuple):
    """A metric, rows for it, and plain numbers: what it computes, and what its function gives."""

    metric: Callable[[], Any]
    rows: Callable[[int], tuple[Tensor, ...]]
    computed: Callable[[Any], list[float]]
    expected: Callable[..., list[float]]


def whole_accuracy(a: Tensor, b: Tensor, same: Tensor) -> list[float]:
    result = verification_accuracy(a, b, same)
    return [*result[:2], *result.thresholds.tolist()]


def whole_search(embeddings: Tensor, ids: Tensor, is_gallery: Tensor) -> list[float]:
    probes, gallery = ((embeddings[side], ids[side]) for side in (~is_gallery, is_gallery))
    result = identification(*probes, *gallery, RANKS, FPIR)
    assert result.tpir is not None
    return result.rank + result.tpir


CASES = {
    "accuracy": Case(VerificationAccuracy, pairs_of, accuracy_values, whole_accuracy),
    "tar": Case(
        lambda: TARAtFAR(FARS),
        scores_of,
        lambda metric: metric.compute().tolist(),
        lambda scores, same: tar_at_far(scores, same, FARS),
    ),
    "curve": Case(
        ROCCurve,
        scores_of,
        lambda metric: torch.cat(metric.compute()).tolist(),
        lambda scores, same: torch.cat(roc_curve(scores, same)).tolist(),
    ),
    "search": Case(
        lambda: Identification(RANKS, FPIR), faces_of, identification_values, whole_search
    ),
}
by_name = pytest.mark.parametrize("name", CASES)


def check(case: Case, metric: Any, rows: tuple[Tensor, ...]) -> None:
    assert case.computed(metric) == pytest.approx(case.expected(*rows), abs=1e-6)


@by_name
@settings(deadline=None, max_examples=8)
@given(n=st.integers(20, 60), ranks=st.integers(1, 4), batch=st.integers(1, 9), data=st.data())
def test_ranks_merged_in_any_order(
    name: str, n: int, ranks: int, batch: int, data: st.DataObject
) -> None:
    """Interleaved and padded as by a DistributedSampler, then shuffled."""
    case = CASES[name]
    rows = case.rows(n)
    padded = torch.arange(math.ceil(n / ranks) * ranks) % n
    metrics = [case.metric() for _ in range(ranks)]
    for rank, metric in enumerate(metrics):
        share = padded[rank::ranks]
        for index in share[torch.randperm(len(share))].split(batch):
            metric.update(*(column[index] for column in rows), index)
    first, *others = data.draw(st.permutations(metrics))
    for other in others:
        first.merge_state(other)
    check(case, first, rows)


@pytest.mark.slow
def test_two_processes_give_both_the_result_of_one(tmp_path: Path) -> None:
    def on_rank(rank: int) -> None:
        """Rank 1 comes in other batches, with repetitions; rank 0 ends with an empty one."""
        for case in CASES.values():
            rows, metric = case.rows(55), case.metric()
            share = torch.cat([torch.arange(55)[rank::2], torch.arange(9 * rank)])
            for index in [*share.split(7 - rank), *([] if rank else [torch.arange(0)])]:
                metric.update(*(column[index] for column in rows), index)
            check(case, metric, rows)

    on_ranks(on_rank, tmp_path)


@by_name
def test_reset_forgets_and_pickling_keeps(name: str) -> None:
    case = CASES[name]
    metric = case.metric()
    metric.update(*case.rows(90))
    metric.compute()
    metric.reset()
    assert metric.result is None
    first, *others = rows = case.rows(40)
    metric.update(first.clone().requires_grad_(), *others)
    kept = [tensor for state in metric.metric_state.values() for tensor in state]
    assert not any(tensor.requires_grad for tensor in kept)
    check(case, pickle.loads(pickle.dumps(metric)), rows)


@by_name
def test_a_refused_update_leaves_no_trace(name: str) -> None:
    case = CASES[name]
    *others, last = case.rows(40)
    metric = case.metric()
    for refused in ((last, torch.arange(39)), (last.long(),), (last[:39],)):
        with pytest.raises(ValueError, match="must be"):
            metric.update(*others, *refused)
    assert not any(metric.metric_state.values())


@by_name
def test_refuses_an_index_for_some_updates_only(name: str) -> None:
    case = CASES[name]
    metric = case.metric()
    metric.update(*case.rows(40))
    metric.update(*case.rows(40), torch.arange(40))
    with pytest.raises(ValueError, match="for 40 of 80 rows"):
        metric.compute()
