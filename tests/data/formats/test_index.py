"""An index is built once, believed while it is true, and never half-written anywhere."""

import errno
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file

from fastface_lightning.data import IdentityFolder
from fastface_lightning.data.datasets import folder
from fastface_lightning.data.formats import index as cache
from fastface_lightning.data.formats.index import cached

Tree = Callable[..., Path]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where an index goes that cannot lie beside its data."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg" / "fastface_lightning"


@pytest.fixture
def no_walk(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Calling it forbids walks from then on."""

    def walk(root: Path) -> None:
        raise AssertionError(f"{root} is walked again")

    return lambda: monkeypatch.setattr(folder, "_walk", walk)


def images(root: Path, **options: bool) -> list[str]:
    dataset = IdentityFolder(root, size=8, **options)
    return [str(dataset.path(i).relative_to(root)) for i in range(len(dataset))]


def on_disk(root: Path) -> list[str]:
    return sorted(str(file.relative_to(root)) for file in root.rglob("*.png"))


def age(*folders: Path) -> None:
    """Make folders an hour older, so that the next change to them has another time."""
    for path in folders:
        old = path.stat().st_mtime_ns - 3600 * 10**9
        os.utime(path, ns=(old, old))


def leftovers(place: Path) -> list[Path]:
    return [*place.rglob("*.part"), *place.rglob(".*.part")]


def failing(error: BaseException) -> Callable[..., None]:
    """A save_file that writes a part and fails."""

    def save(_: cache.Arrays, file: Path, **__: object) -> None:
        file.write_bytes(b"the disk holds so much")
        raise error

    return save


def test_the_second_start_walks_nothing_and_maps_the_index(tree: Tree, no_walk) -> None:
    root = tree(ann=3, bob=2)
    first = IdentityFolder(root, size=8)
    index = root.with_name("faces.index")
    assert index.is_file() and not leftovers(root.parent)
    no_walk()
    second = IdentityFolder(root, size=8)
    assert second.identities == first.identities == ["ann", "bob"]
    assert second.labels.tolist() == [0, 0, 0, 1, 1]
    assert [second.path(i) for i in range(5)] == [first.path(i) for i in range(5)]


def test_the_index_serves_through_another_path_to_the_folder(tree: Tree, no_walk) -> None:
    root = tree(ann=1)
    IdentityFolder(root)
    no_walk()
    (root.parent / "link").symlink_to(root)
    assert images(root.parent / "link") == ["ann/ann_0001.png"]


@pytest.mark.parametrize(
    "change",
    [
        lambda root: shutil.copytree(root / "ann", root / "new"),
        lambda root: (root / "bob").rename(root / "zoe"),
        lambda root: shutil.copy(root / "ann" / "ann_0001.png", root / "bob" / "more.png"),
        lambda root: (root / "ann" / "ann_0001.png").rename(root / "ann" / "z.png"),
    ],
    ids=["folder added", "renamed", "image added", "image renamed"],
)
def test_a_change_makes_the_index_stale(tree: Tree, change: Callable[[Path], object]) -> None:
    root = tree(ann=2, bob=2)
    age(root / "ann", root / "bob", root)
    assert images(root) == on_disk(root)
    change(root)
    assert images(root) == on_disk(root)


def test_of_many_folders_a_sample_is_compared_and_reindex_sees_all(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder, "_SAMPLE", 2)  # the first and the last
    root = tree(ann=1, bob=1, cem=1)
    age(*root.iterdir(), root)
    before = images(root)
    (root / "bob" / "bob_0001.png").rename(root / "bob" / "z.png")
    assert images(root) == before != on_disk(root)
    assert images(root, reindex=True) == on_disk(root)
    assert images(root) == on_disk(root)


def test_a_change_during_the_walk_shows_at_the_next_start(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tree(ann=1)
    age(root / "ann", root)
    read = folder._image_names

    def change_after(path: str) -> list[str]:
        found = read(path)
        shutil.copy(f"{path}/ann_0001.png", f"{path}/late.png")
        return found

    monkeypatch.setattr(folder, "_image_names", change_after)
    assert images(root) == ["ann/ann_0001.png"]
    monkeypatch.setattr(folder, "_image_names", read)
    assert images(root) == ["ann/ann_0001.png", "ann/late.png"]


def test_an_index_that_is_none_is_rebuilt(tree: Tree, no_walk) -> None:
    root = tree(ann=2)
    want = images(root)
    file = root.with_name("faces.index")
    whole = file.read_bytes()
    for content in (b"", b"no index at all", whole[:-9], whole[:20], b"\xff" * 8 + whole[8:]):
        file.write_bytes(content)
        assert images(root) == want and file.read_bytes() == whole
    for name, metadata in (
        ("weight", None),
        ("x", {"format": cache.FORMAT}),
        ("stamp", {"format": "fastface_lightning 0"}),
    ):
        save_file({name: np.zeros(3)}, file, metadata)
        assert images(root) == want
    no_walk()
    assert images(root) == want


def test_an_index_that_cannot_lie_beside_its_data_lies_elsewhere(
    tree: Tree, no_walk, elsewhere: Path, caplog
) -> None:
    root = tree(ann=2)
    root.with_name("faces.index").mkdir()
    assert len(images(root)) == 2
    assert "cannot keep the index of" in caplog.text and not leftovers(root.parent)
    (kept,) = elsewhere.iterdir()
    assert kept.name.startswith("faces-") and kept.suffix == ".index"
    no_walk()
    assert len(images(root)) == 2


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("no space left")]
)
def test_a_full_disk_costs_a_warning_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog, error: Exception
) -> None:
    """Of a name, too, that no stream can print."""
    monkeypatch.setattr(cache, "save_file", failing(error))
    source = tmp_path / os.fsdecode(b"f\xff")
    arrays = cached(source, lambda: {"x": np.arange(3)}, lambda _: True)
    assert arrays["x"].tolist() == [0, 1, 2]
    assert "o space left" in caplog.text and "f\\udcff" in caplog.text
    assert not leftovers(tmp_path) and not list(tmp_path.rglob("*.index"))


def test_an_interrupted_write_leaves_the_old_index(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tree(ann=2)
    images(root)
    before = root.with_name("faces.index").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(cache, "save_file", failing(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            images(root, reindex=True)
    assert root.with_name("faces.index").read_bytes() == before and not leftovers(root.parent)
