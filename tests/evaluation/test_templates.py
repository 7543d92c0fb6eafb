"""The 1:1 protocol of templates against loops over templates, medias, images and pairs."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from allocation import LargestAllocation
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastface_lightning.evaluation import template_embeddings, template_scores


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


def test_embeddings_need_no_copy_of_the_features() -> None:
    features = torch.randn(5000, 256)
    templates, media = torch.arange(5000) // 100, torch.arange(5000) // 4
    with LargestAllocation() as largest:
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
        ({"features": torch.eye(6)[0]}, "features must be (n, D)"),
        ({"features": torch.eye(6).half()}, "float32 or float64"),
        ({"features": torch.eye(6)[:5]}, "templates must be (5,) int64"),
        ({"features": torch.eye(6)[:0]}, "at least one image"),
        ({"media": torch.arange(7)}, "media must be (6,) int64"),
        ({"media": torch.arange(6.0)}, "media must be (6,) int64"),
        ({"templates": torch.ones(6, 1).long()}, "templates must be (6,) int64"),
        ({"features": changed(torch.eye(6), 4, math.nan)}, "NaN or infinity in row 4"),
        ({"features": changed(torch.eye(6), 1, -math.inf)}, "NaN or infinity in row 1"),
        ({"features": changed(torch.eye(6), slice(2, 4), 0)}, "length 0.0 for template 2"),
        ({"features": torch.full((6, 6), 3e38)}, "length inf for template 2"),
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
    sampled = data.draw(st.lists(st.tuples(row, row), min_size=count, max_size=count))
    pairs = torch.tensor(sampled, dtype=torch.int64).view(-1, 2)
    for listed in (pairs, torch.tensor(sorted(sampled), dtype=torch.int64).view(-1, 2)):
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
    with LargestAllocation() as largest:
        template_scores(embeddings, pairs, block=1000)
    assert largest.bytes <= 100_000 * 8  # a number a pair, not 512


UNIT = torch.eye(3)
PAIR = torch.tensor([[0, 1]])


@pytest.mark.parametrize(
    ("embeddings", "pairs", "message"),
    [
        (UNIT, torch.tensor([[0, 3]]), "pairs must lie in [0, 3), got 3"),
        (UNIT, torch.tensor([[0, 1], [-1, 1]]), "pairs must lie in [0, 3), got -1"),
        (UNIT, torch.tensor([0, 1]), "pairs must be (P, 2) int64"),
        (UNIT, PAIR.int(), "pairs must be (P, 2) int64"),
        (UNIT[0], PAIR, "embeddings must be (n, D) float"),
        (UNIT.long(), PAIR, "embeddings must be (n, D) float"),
        (changed(UNIT, 2, math.nan), PAIR, "NaN or infinity in row 2"),
        (UNIT[:0], PAIR, "pairs must lie in [0, 0), got 1"),
    ],
)
def test_scores_refuse_bad_input(embeddings: Tensor, pairs: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        template_scores(embeddings, pairs)
