"""The 1:1 protocol of templates against loops over templates, medias, images and pairs."""

import math
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import on_two_ranks
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastface_lightning.evaluation import tar_at_far
from fastface_lightning.evaluation.templates import (
    TemplateVerification,
    template_embeddings,
    template_scores,
)


def twin(features: Tensor, templates: Tensor, media: Tensor) -> np.ndarray:
    """The protocol as one would say it: every template, every media, every image."""
    rows = []
    for t in sorted(set(templates.tolist())):
        total = np.zeros(features.shape[1])
        for m in {m for s, m in zip(templates.tolist(), media.tolist(), strict=True) if s == t}:
            images = [
                features[i].double().numpy()
                for i in range(len(features))
                if templates[i] == t and media[i] == m
            ]
            total += sum(images) / len(images)
        rows.append(total / math.sqrt(sum(x * x for x in total)))
    return np.stack(rows)


def scores_twin(embeddings: Tensor, pairs: Tensor) -> Tensor:
    rows = embeddings.double()
    scores = [float((rows[a] * rows[b]).sum()) for a, b in pairs.tolist()]
    return torch.tensor(scores, dtype=torch.float64)


def some_images(n: int = 60, seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Features, templates and media of n images; numbers with gaps, and medias that recur."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(n, 8, generator=generator, dtype=torch.float64).to(dtype)
    templates = 3 * torch.randint(12, (n,), generator=generator) + 5
    media = 1000 * torch.randint(4, (n,), generator=generator) - 7
    return [features, templates, media]


def some_pairs(templates: Tensor) -> tuple[Tensor, Tensor]:
    """Every pair of two templates in no order, with labels; no two of them tie by symmetry."""
    pairs = torch.combinations(templates.unique())
    pairs = pairs[torch.randperm(len(pairs), generator=torch.Generator().manual_seed(0))]
    return pairs, torch.arange(len(pairs)) % 3 == 0


@settings(deadline=None, max_examples=50)
@given(n=st.integers(1, 40), seed=st.integers(0, 2**31))
def test_embeddings_equal_the_loops(n: int, seed: int) -> None:
    images = some_images(n, seed)
    np.testing.assert_allclose(template_embeddings(*images).numpy(), twin(*images), atol=1e-12)


def test_float32_embeddings_equal_the_loops_in_float64() -> None:
    images = some_images(300, dtype=torch.float32)
    found = template_embeddings(*images)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), twin(*images), atol=1e-6)


def test_a_long_video_counts_as_much_as_a_photograph() -> None:
    features = torch.tensor([[1.0, 0.0]] + [[0.0, 1.0]] * 99)
    media = torch.tensor([1] + [2] * 99)
    found = template_embeddings(features, torch.zeros(100, dtype=torch.int64), media)
    torch.testing.assert_close(found, torch.tensor([[0.5, 0.5]]).sqrt())


def test_a_media_shared_by_templates_is_one_of_each() -> None:
    """One video may show two people: its number joins nothing across templates."""
    templates, media = torch.tensor([1, 1, 2, 2]), torch.tensor([9, 9, 9, 9])
    features = torch.tensor([[3.0, 0.0], [5.0, 0.0], [0.0, 1.0], [0.0, 7.0]])
    assert torch.equal(template_embeddings(features, templates, media), torch.eye(2))


def test_rows_ascend_with_the_template_number() -> None:
    templates = torch.tensor([50, -3, 700])
    found = template_embeddings(torch.eye(3), templates, torch.zeros(3, dtype=torch.int64))
    assert templates.unique().tolist() == [-3, 50, 700]
    assert torch.equal(found, torch.eye(3)[[1, 0, 2]])


@given(seed=st.integers(0, 2**31))
def test_a_common_length_cancels(seed: int) -> None:
    features, templates, media = some_images(seed=seed)
    found = template_embeddings(features, templates, media)
    torch.testing.assert_close(template_embeddings(1e3 * features, templates, media), found)
    torch.testing.assert_close(found.norm(dim=1), torch.ones(len(found), dtype=torch.float64))


def test_a_long_feature_weighs_more_in_its_template() -> None:
    features, templates = torch.tensor([[3.0, 0.0], [0.0, 4.0]]), torch.tensor([8, 8])
    found = template_embeddings(features, templates, media=torch.tensor([1, 2]))
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.8]]))


def test_tiny_features_keep_their_direction() -> None:
    """Squares of 1e-30 are zero in float32, so lengths are taken in float64."""
    features, one = torch.tensor([[3e-30, 4e-30]]), torch.ones(1, dtype=torch.int64)
    found = template_embeddings(features, one, one)
    torch.testing.assert_close(found, torch.tensor([[0.6, 0.8]]))


def test_features_in_a_memory_mapped_file(tmp_path: Path) -> None:
    features, templates, media = some_images(dtype=torch.float32)
    mapped = np.lib.format.open_memmap(
        tmp_path / "features.npy", mode="w+", dtype=np.float32, shape=tuple(features.shape)
    )
    mapped[:] = features.numpy()
    found = template_embeddings(torch.from_numpy(mapped), templates, media)
    assert torch.equal(found, template_embeddings(features, templates, media))


class Largest(TorchDispatchMode):
    """Remembers the most bytes of any memory that an operation adds to that of its inputs."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in given:
                self.bytes = max(self.bytes, tensor.untyped_storage().nbytes())
        return result


def test_embeddings_need_no_copy_of_the_features() -> None:
    features = torch.randn(5000, 256)
    templates, media = torch.arange(5000) // 100, torch.arange(5000) // 4
    with Largest() as largest:
        template_embeddings(features, templates, media)
    assert largest.bytes <= features.nbytes / 50


IMAGES = {
    "features": torch.eye(6),
    "templates": torch.tensor([1, 1, 2, 2, 4, 4]),
    "media": torch.tensor([1, 1, 1, 2, 3, 3]),
}


def changed(features: Tensor, row: int, value: Any) -> Tensor:
    features = features.clone()
    features[row] = value
    return features


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": torch.eye(6)[0]}, "features must be (n, D) float32 or float64, got (6,)"),
        ({"features": torch.eye(6).half()}, "float32 or float64, got (6, 6) torch.float16"),
        ({"features": torch.eye(6).long()}, "float32 or float64, got (6, 6) torch.int64"),
        ({"features": torch.eye(6)[:5]}, "must be of the same images, got 5 and 6"),
        ({"templates": torch.arange(5)}, "templates and media must be of the same images, got 5"),
        ({"media": torch.arange(7)}, "templates and media must be of the same images, got 6 and 7"),
        ({"media": torch.arange(6.0)}, "media must be (n,) int64, one for each of n > 0 images"),
        ({"templates": torch.ones(6, 1).long()}, "templates must be (n,) int64"),
        ({"templates": torch.arange(0)}, "one for each of n > 0 images, got (0,) torch.int64"),
        (
            {"features": changed(torch.eye(6), 4, math.nan)},
            "features must be finite, got NaN or infinity in row 4",
        ),
        (
            {"features": changed(torch.eye(6), 1, -math.inf)},
            "features must be finite, got NaN or infinity in row 1",
        ),
        (
            {"features": changed(torch.eye(6), slice(2, 4), 0)},
            "must have a finite sum other than zero, got length 0.0 for template 2",
        ),
        (
            {"features": torch.full((6, 6), 3e38)},
            "must have a finite sum other than zero, got length inf for template 2",
        ),
    ],
)
def test_embeddings_refuse_bad_input(change: dict[str, Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        template_embeddings(**{**IMAGES, **change})


@settings(deadline=None, max_examples=50)
@given(
    total=st.integers(1, 12), count=st.integers(0, 60), block=st.integers(1, 200), data=st.data()
)
def test_scores_equal_the_loops(total: int, count: int, block: int, data: st.DataObject) -> None:
    embeddings = torch.randn(total, 5, dtype=torch.float64)
    row = st.integers(0, total - 1)
    drawn = data.draw(st.lists(st.tuples(row, row), min_size=count, max_size=count))
    pairs = torch.tensor(drawn, dtype=torch.int64).view(-1, 2)
    for listed in (pairs, torch.tensor(sorted(drawn), dtype=torch.int64).view(-1, 2)):
        found = template_scores(embeddings, listed, block)
        torch.testing.assert_close(found, scores_twin(embeddings, listed), rtol=0, atol=1e-12)


def test_float32_scores() -> None:
    embeddings = torch.nn.functional.normalize(torch.randn(200, 512))
    pairs = torch.randint(200, (2000, 2))
    found = template_scores(embeddings, pairs)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), scores_twin(embeddings, pairs), rtol=0, atol=1e-6)


def test_scores_hold_no_more_than_a_block() -> None:
    embeddings, pairs = torch.randn(50, 512), torch.randint(50, (100_000, 2))
    with Largest() as largest:
        template_scores(embeddings, pairs, block=1000)
    assert largest.bytes <= 100_000 * 8  # a number a pair, not 512


UNIT = torch.eye(3)
PAIR = torch.tensor([[0, 1]])


@pytest.mark.parametrize(
    ("embeddings", "pairs", "message"),
    [
        (UNIT, torch.tensor([[0, 3]]), "pairs must lie in [0, 3), got 3"),
        (UNIT, torch.tensor([[0, 1], [-1, 1]]), "pairs must lie in [0, 3), got -1"),
        (UNIT, torch.tensor([0, 1]), "pairs must be (P, 2) int64, got (2,) torch.int64"),
        (UNIT, PAIR.int(), "pairs must be (P, 2) int64, got (1, 2) torch.int32"),
        (UNIT, torch.tensor([[0, 1, 2]]), "pairs must be (P, 2) int64, got (1, 3) torch.int64"),
        (UNIT[0], PAIR, "embeddings must be (T, D) float, got (3,) torch.float32"),
        (UNIT.long(), PAIR, "embeddings must be (T, D) float, got (3, 3) torch.int64"),
        (changed(UNIT, 2, math.nan), PAIR, "embeddings must be finite, got NaN or infinity in row"),
        (UNIT[:0], PAIR, "pairs must lie in [0, 0), got 1"),
    ],
)
def test_scores_refuse_bad_input(embeddings: Tensor, pairs: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        template_scores(embeddings, pairs)


FAR = (0.01, 0.1, 0.5)


def expected(features: Tensor, templates: Tensor, media: Tensor) -> list[float]:
    """The protocol's result from the loops, with the ROC of the scores."""
    pairs, same = some_pairs(templates)
    rows = torch.searchsorted(templates.unique(), pairs)
    scores = scores_twin(torch.from_numpy(twin(features, templates, media)), rows)
    return tar_at_far(scores, same, FAR)


def metric_of(templates: Tensor, media: Tensor) -> TemplateVerification:
    return TemplateVerification(templates, media, *some_pairs(templates), FAR)


@settings(deadline=None, max_examples=20)
@given(
    n=st.integers(8, 50), ranks=st.integers(1, 4), batch=st.integers(1, 9), seed=st.integers(0, 99)
)
def test_ranks_merged_in_any_order(n: int, ranks: int, batch: int, seed: int) -> None:
    """Interleaved and padded as by a DistributedSampler, then shuffled: the loops' result."""
    features, templates, media = some_images(n, seed)
    padded = torch.arange(math.ceil(n / ranks) * ranks) % n
    metrics = [metric_of(templates, media) for _ in range(ranks)]
    for rank, metric in enumerate(metrics):
        mine = padded[rank::ranks]
        for index in mine[torch.randperm(len(mine))].split(batch):
            metric.update(features[index], index)
    first = metrics.pop()
    for other in metrics:
        first.merge_state(other)
    assert first.compute().tolist() == pytest.approx(expected(features, templates, media))


def test_order_of_batches_changes_no_bit() -> None:
    features, templates, media = some_images(dtype=torch.float32)
    scores = []
    for order in (torch.arange(60), torch.arange(59, -1, -1)):
        metric = metric_of(templates, media)
        for index in order.split(7):
            metric.update(features[index], index)
        metric.compute()
        assert metric.scores is not None
        scores.append(metric.scores)
    assert torch.equal(*scores)


def on_rank(rank: int) -> None:
    """Rank 1 comes in other batches, with repetitions, and the result is one process's."""
    features, templates, media = some_images()
    metric = metric_of(templates, media)
    for index in torch.cat([torch.arange(60)[rank::2], torch.arange(9 * rank)]).split(7 - rank):
        metric.update(features[index], index)
    assert metric.compute().tolist() == pytest.approx(expected(features, templates, media))


def test_two_processes_give_both_the_result_of_one(tmp_path: Path) -> None:
    on_two_ranks(on_rank, tmp_path)


def test_an_image_never_seen_is_refused() -> None:
    features, templates, media = some_images()
    metric = metric_of(templates, media)
    metric.update(features[3:58], torch.arange(3, 58))
    metric.update(features[3:8], torch.arange(3, 8))
    message = "every image must be seen, got no features for 5 of 60"
    with pytest.raises(ValueError, match=message):
        metric.compute()


def test_a_broken_image_is_named_by_its_row_in_the_lists() -> None:
    features, templates, media = some_images()
    features[41] = math.nan
    metric = metric_of(templates, media)
    for index in torch.arange(59, -1, -1).split(7):
        metric.update(features[index], index)
    with pytest.raises(ValueError, match="features must be finite, got NaN or infinity in row 41"):
        metric.compute()


def test_reset_forgets_and_pickling_keeps() -> None:
    features, templates, media = some_images()
    metric = metric_of(templates, media)
    metric.update(-features.roll(1, 0), torch.arange(60))
    metric.compute()
    metric.reset()
    assert metric.scores is None
    metric.update(features.requires_grad_(), torch.arange(60))
    assert not metric.features[0].requires_grad
    metric = pickle.loads(pickle.dumps(metric))
    assert metric.compute().tolist() == pytest.approx(expected(*some_images()))


LISTS: dict[str, Any] = {
    "templates": IMAGES["templates"],
    "media": IMAGES["media"],
    "pairs": torch.tensor([[1, 2], [4, 1]]),
    "same": torch.tensor([True, False]),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"pairs": torch.tensor([[3, 2], [9, 3]])},
            "pairs must be of templates with images, got 2 without, the first being 3",
        ),
        ({"pairs": torch.tensor([[1, 2, 4]])}, "pairs must be (P, 2) int64, got (1, 3)"),
        ({"same": torch.tensor([True])}, "same must be (2,) bool, one for each pair, got (1,)"),
        ({"same": torch.tensor([True, True])}, "got 2 pairs of one and 0 of two"),
        (
            {"pairs": LISTS["pairs"][:0], "same": LISTS["same"][:0]},
            "pairs must show both one person and two, got 0 pairs of one and 0 of two",
        ),
        ({"media": torch.arange(5)}, "templates and media must be of the same images, got 6 and 5"),
        ({"far": (0.1, 1.1)}, "far must lie in [0, 1], got 1.1"),
    ],
)
def test_metric_refuses_bad_lists_before_any_image(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        TemplateVerification(**{**LISTS, **change})


@pytest.mark.parametrize(
    ("features", "index", "message"),
    [
        (torch.eye(6), torch.arange(5), "index must be (6,) int64, got (5,) torch.int64"),
        (torch.eye(6), torch.arange(6.0), "index must be (6,) int64, got (6,) torch.float32"),
        (torch.eye(6), torch.arange(1, 7), "index must lie in [0, 6), got 6"),
        (torch.eye(6), torch.arange(-1, 5), "index must lie in [0, 6), got -1"),
        (torch.eye(6).half(), torch.arange(6), "features must be (n, D) float32 or float64"),
    ],
)
def test_metric_refuses_bad_batches_and_keeps_nothing(
    features: Tensor, index: Tensor, message: str
) -> None:
    metric = TemplateVerification(**LISTS)
    with pytest.raises(ValueError, match=re.escape(message)):
        metric.update(features, index)
    assert metric.features == [] and metric.index == []
