"""Embeddings of many images: killed anywhere, the file ends as if nothing had happened."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from fastface_lightning.inference import embedding_file
from fastface_lightning.inference.embedder import Embedder
from fastface_lightning.inference.embedding_file import embed_to_file, embedding_key, files_digest

Embed = Callable[[Tensor], Tensor]


class Numbered(Dataset[tuple[Tensor, bool]]):
    """Image i is full of the number i; those of ``bad`` cannot be read."""

    def __init__(self, bad: frozenset[int] = frozenset()) -> None:
        self.bad = bad

    def __getitem__(self, index: int) -> tuple[Tensor, bool]:
        return torch.full((3, 112, 112), index, dtype=torch.uint8), index not in self.bad


class Counting(Embedder):
    """Embeds an image as (its number, 1), and dies after so many images."""

    def __init__(self, batch_size: int = 4, dies_after: int | None = None) -> None:
        super().__init__(2, {}, torch.device("cpu"), False, batch_size)
        self.seen: list[int] = []
        self.dies_after = dies_after

    def _forward(self, images: Tensor) -> Tensor:
        if self.dies_after is not None and len(self.seen) + len(images) > self.dies_after:
            raise KeyboardInterrupt
        self.seen += images[:, 0, 0, 0].tolist()
        return torch.stack([images[:, 0, 0, 0].float(), torch.ones(len(images))], 1)

    @property
    def fingerprint(self) -> str:  # type: ignore[override]
        return "counting"


@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    count=st.integers(0, 30),
    kills=st.lists(st.tuples(st.integers(0, 30), st.integers(0, 20)), max_size=3),
    batch_size=st.integers(1, 7),
)
def test_killed_anywhere_it_goes_on(
    tmp_path_factory: pytest.TempPathFactory,
    count: int,
    kills: list[tuple[int, int]],
    batch_size: int,
) -> None:
    """Also where a kill left half a row, or half of the header."""
    file = tmp_path_factory.mktemp("rows") / "rows.npy"
    seen: list[int] = []
    for dies_after, torn in kills:
        embedder = Counting(batch_size, dies_after)
        part = file.with_name("rows.npy.abc.part")
        try:
            embed_to_file(file, "abc", Numbered(), count, embedder, embedder.features)
        except KeyboardInterrupt:
            size = part.stat().st_size
            with part.open("ab") as out:
                out.truncate(max(size - torn, 0))
            whole = max(size - torn - 128, 0) // 8
            seen = (seen + embedder.seen)[:whole]
        else:
            file.unlink()  # done before it could be killed
            seen = []
    embedder = Counting(batch_size)
    rows = embed_to_file(file, "abc", Numbered(), count, embedder, embedder.features)
    assert seen + embedder.seen == list(range(count))
    assert np.array_equal(np.load(file), [[i, 1] for i in range(count)] or np.zeros((0, 2)))
    assert np.array_equal(rows, np.load(file)) and rows.dtype == np.float32
    assert [each.name for each in file.parent.iterdir()] == ["rows.npy"]


def test_another_key_starts_anew(tmp_path: Path) -> None:
    dying, whole = Counting(dies_after=8), Counting()
    with pytest.raises(KeyboardInterrupt):
        embed_to_file(tmp_path / "a.npy", "one", Numbered(), 12, dying, dying.features)
    embed_to_file(tmp_path / "a.npy", "two", Numbered(), 12, whole, whole.features)
    assert whole.seen == list(range(12))


def test_images_that_cannot_be_read_are_rows_of_nan(tmp_path: Path) -> None:
    embedder = Counting()
    images = Numbered(frozenset([0, 5]))
    rows = embed_to_file(tmp_path / "a.npy", "k", images, 6, embedder, embedder)
    assert np.flatnonzero(np.isnan(rows).all(1)).tolist() == [0, 5]
    assert np.allclose(np.linalg.norm(rows[1:5], axis=1), 1)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_gpu_is_given_pinned_batches(
    tmp_path: Path, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pinned: list[bool] = []

    def loader(*given: Any, pin_memory: bool, **settings: Any) -> DataLoader[Any]:
        pinned.append(pin_memory)
        return DataLoader(*given, **settings)

    monkeypatch.setattr(embedding_file, "DataLoader", loader)
    embedder = Counting()
    embedder.device = torch.device(device)
    one = lambda images: torch.ones(len(images), 2)  # noqa: E731
    embed_to_file(tmp_path / "a.npy", "k", Numbered(), 3, embedder, one)
    assert pinned == [device == "cuda"]


def test_workers_keep_the_order(tmp_path: Path) -> None:
    embedder = Counting()
    rows = embed_to_file(tmp_path / "a.npy", "k", Numbered(), 11, embedder, embedder.features, 2)
    assert rows[:, 0].tolist() == list(range(11))


def test_a_file_is_kept_or_replaced(tmp_path: Path) -> None:
    for keep, seen in ((False, 3), (True, 0)):
        embedder = Counting()
        rows = embed_to_file(
            tmp_path / "a.npy", "k", Numbered(), 3, embedder, embedder.features, keep=keep
        )
        assert (len(embedder.seen), rows[:, 0].tolist()) == (seen, [0, 1, 2])


def test_embeddings_that_are_none_are_refused(tmp_path: Path) -> None:
    embedder = Counting()
    nan: Embed = lambda images: torch.full((len(images), 2), torch.inf)  # noqa: E731
    with pytest.raises(ValueError, match="finite embeddings, got inf"):
        embed_to_file(tmp_path / "a.npy", "k", Numbered(), 3, embedder, nan)
    assert not (tmp_path / "a.npy").exists()


def test_an_image_that_could_not_be_read_is_tried_again(tmp_path: Path) -> None:
    embedder = Counting()
    file = tmp_path / "a.npy"
    for bad, nan in (({1, 4}, [1, 4]), ({1}, [1]), (set(), [])):
        images = Numbered(frozenset(bad))
        rows = embed_to_file(file, "k", images, 6, embedder, embedder.features, keep=True)
        assert np.flatnonzero(np.isnan(rows[:, 0])).tolist() == nan
    assert np.load(file)[:, 0].tolist() == list(range(6))
    assert sorted(embedder.seen) == [0, 1, 1, 2, 3, 4, 4, 5]  # whatever a bad image holds


def test_one_process_at_a_time_writes(tmp_path: Path) -> None:
    class Meeting(Counting):
        def _forward(self, images: Tensor) -> Tensor:
            other = Counting()
            with pytest.raises(ValueError, match="one process at a time"):
                embed_to_file(tmp_path / "a.npy", "k", Numbered(), 9, other, other.features)
            return super()._forward(images)

    embedder = Meeting()
    rows = embed_to_file(tmp_path / "a.npy", "k", Numbered(), 9, embedder, embedder.features)
    assert rows[:, 0].tolist() == list(range(9))


def test_the_key_differs_where_the_images_do(tmp_path: Path) -> None:
    files = [tmp_path / "a.png", tmp_path / "b.png"]
    for file in files:
        file.write_bytes(b"image")
    names = [str(file) for file in files]
    points = np.zeros((2, 5, 2))
    digests = [files_digest(names), files_digest(names[::-1]), files_digest(names, points)]
    files[1].write_bytes(b"another")
    digests += [files_digest(names), files_digest(["a.rec:1", "a.rec:2"])]  # places, no files
    keys = {embedding_key(Counting(), digest) for digest in digests}
    assert len(keys) == 5 and all(len(key) == 16 for key in keys)
