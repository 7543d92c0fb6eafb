"""An identity folder's labels and images, and its patience with files that are broken."""

import logging
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from fastface_lightning.data import FaceList, IdentityFolder, identity_names
from fastface_lightning.data.datasets.sample import common_size

Tree = Callable[..., Path]


def read(dataset: IdentityFolder) -> list[tuple[int, int, int]]:
    """(person, image, label) of every item, from the tree's pixel code."""
    return [
        (int(x[0, 0, 0]), int(x[1, 0, 0]), y) for x, y in (dataset[i] for i in range(len(dataset)))
    ]


def break_file(file: Path) -> str:
    file.write_bytes(file.read_bytes()[:40])
    return str(file)


def test_labels_follow_sorted_names_and_images_follow_file_names(tree: Tree) -> None:
    dataset = IdentityFolder(tree(cem=1, ann=3, bob=2), size=8)
    assert dataset.identities == ["ann", "bob", "cem"] and dataset.num_classes == 3
    assert dataset.labels.tolist() == [0, 0, 0, 1, 1, 2]
    assert read(dataset) == [(0, 1, 0), (0, 2, 0), (0, 3, 0), (1, 1, 1), (1, 2, 1), (2, 1, 2)]
    image, label = dataset[-6]
    assert image.dtype == torch.uint8 and image.shape == (3, 8, 8) and type(label) is int
    assert dataset.path(4) == dataset.root / "bob" / "bob_0002.png"
    assert dataset.bad_images() == dataset.missing == []
    with pytest.raises(IndexError):
        dataset[6]


def test_any_case_of_the_suffixes_counts_and_nothing_else(tree: Tree) -> None:
    root = tree(ann=1)
    for name in ("b.JPG", "c.Jpeg", "d.PNG", "e.webp", "f.BMP", "ümit 陈.png"):
        Image.new("RGB", (20, 8)).save(root / "ann" / name)
    for name in (".hidden.jpg", "notes.txt", "jpg"):
        (root / "ann" / name).write_text("")
    (root / "ann" / "folder.jpg").mkdir()
    (root / "ann" / "loop.png").symlink_to("loop.png")
    (root / "loop").symlink_to("loop")
    (root / ".cache").mkdir()
    (root / "list.txt").write_text("")
    dataset = IdentityFolder(root)
    assert identity_names(root) == ["ann"]
    assert [dataset.path(i).name for i in range(len(dataset))] == [
        "ann_0001.png", "b.JPG", "c.Jpeg", "d.PNG", "e.webp", "f.BMP", "ümit 陈.png"
    ]  # fmt: skip
    assert dataset[6][0].shape == (3, 112, 112)


def test_identities_restrict_and_absent_ones_are_reported(tree: Tree, caplog) -> None:
    root = tree(ann=1, bob=2, cem=1)
    (root / "empty").mkdir()
    assert IdentityFolder(root, size=8).missing == []
    dataset = IdentityFolder(root, size=8, identities=["dan", "cem", "ann", "empty", "ann"])
    assert dataset.identities == ["ann", "cem"]
    assert read(dataset) == [(0, 1, 0), (2, 1, 1)]
    assert dataset.missing == ["dan", "empty"]
    empty, absent = caplog.messages
    assert empty.startswith("1 of the 4 identities") and empty.endswith("no image: empty")
    assert absent.startswith("2 of the 4 identities") and absent.endswith("dan, empty")


def test_what_cannot_be_served_is_refused(tree: Tree, tmp_path: Path) -> None:
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "flat" / "face.png")
    (tmp_path / "bare" / "ann").mkdir(parents=True)
    for name, rule in {"gone": "no folder", "flat": "no folders", "bare": "none of the 1"}.items():
        with pytest.raises(ValueError, match=rule):
            IdentityFolder(tmp_path / name)
    root = tree(ann=3, bob=2, cem=1)
    assert IdentityFolder(root, min_images=2).identities == ["ann", "bob"]
    with pytest.raises(ValueError, match="none of the 2 identities sought"):
        IdentityFolder(root, identities=["x", "y"])
    with pytest.raises(ValueError, match="min_images = 4"):
        IdentityFolder(root, min_images=4)
    for file in root.rglob("*.png"):
        break_file(file)
    with pytest.raises(ValueError, match="none of the 6 images"):
        IdentityFolder(root, size=8)[0]


def test_a_bad_image_is_named_once_and_replaced_by_the_next(tree: Tree, caplog) -> None:
    root = tree(ann=3, bob=2)
    bad = [break_file(root / "ann" / "ann_0003.png"), break_file(root / "bob" / "bob_0002.png")]
    dataset = IdentityFolder(root, size=8)
    for _ in range(2):
        assert read(dataset) == [(0, 1, 0), (0, 2, 0), (1, 1, 1), (1, 1, 1), (0, 1, 0)]
    assert dataset.bad_images() == bad and dataset.bad.tolist() == [0, 0, 1, 0, 1]
    assert len(caplog.records) == 2
    assert all(file in line for file, line in zip(bad, caplog.messages, strict=True))


@pytest.mark.parametrize(
    ("context", "workers"), [("fork", 2), pytest.param("spawn", 1, marks=pytest.mark.slow)]
)
def test_workers_and_main_process_count_together(tree: Tree, context: str, workers: int) -> None:
    root = tree(ann=6)
    bad = [break_file(root / "ann" / "ann_0002.png"), break_file(root / "ann" / "ann_0005.png")]
    dataset = IdentityFolder(root, size=8)
    loader = DataLoader(dataset, 2, num_workers=workers, multiprocessing_context=context)
    images = torch.cat([x for x, _ in loader])
    assert images[:, 1, 0, 0].tolist() == [1, 3, 3, 4, 6, 6]
    assert dataset.bad_images() == bad


def test_the_size_that_most_images_have(tree: Tree) -> None:
    root = tree(ann=3, bob=2)
    Image.new("RGB", (40, 30)).save(root / "bob" / "bob_0002.png")
    break_file(root / "ann" / "ann_0001.png")
    assert common_size(IdentityFolder(root)) == (8, 8)


def test_restrictions_add_up(tree: Tree) -> None:
    """And count bad images together with what they were taken from, as a run does."""
    whole = IdentityFolder(tree(ann=1, bob=2, cem=3, dan=1), size=8)
    part = whole.restricted(["bob", "cem", "dan"]).restricted(min_images=2)
    assert part.identities == ["bob", "cem"]
    assert read(part) == [(1, 1, 0), (1, 2, 0), (2, 1, 1), (2, 2, 1), (2, 3, 1)]
    break_file(part.path(0))
    assert part[0][1] == 0 and part.bad.sum() == 1
    assert part.bad_images() == whole.bad_images() == [str(part.path(0))]
    assert whole.restricted(["ann"]).bad_images() == [] and len(whole) == 7


def test_a_packed_image_has_a_name_of_its_own(tree: Tree) -> None:
    root = tree(ann=1)
    for name in ("a.png", "a.png.jpg", "a.jpg"):
        Image.new("RGB", (8, 8)).save(root / "ann" / name)
    dataset = IdentityFolder(root, size=8)
    names = [dataset.file_name(i) for i in range(len(dataset))]
    assert names == ["a.jpg", "a.png.jpg", "a.png.jpg.jpg", "ann_0001.png.jpg"]


# Lists of files.


ROWS = ["bob/bob_0002.png", "bob"], ["ann/ann_0001.png", "ann"], ["bob/bob_0001.png", "bob"]
IMAGES = [(1, 2, 1), (0, 1, 0), (1, 1, 1)]


@pytest.mark.parametrize(
    ("name", "line", "head"),
    [
        ("list.CSV", "{0},{1}", "path,identity\n"),
        ("list.csv", '"{0}","{1}"', "path, identity\r\n"),
        ("list.csv", " {0} , {1} \n", "\ufeffpath,identity\n"),
        ("list.txt", "{0} {1}", ""),
        ("list.tsv", "{0}\t{1}\r", "path\tidentity\n"),
        ("list.lst", "7\t{1}\t{0}\n\n", "\n"),
        ("list.lst", "1\t{0}\t{1}", ""),
        ("list.lst", "0\t{0}\t{1}" + "\t0.5" * 14, ""),
        ("list.csv", "{1},{0}", "identity,path\n"),
    ],
)
def test_lists_of_each_kind_say_the_same(
    tree: Tree, name: str, line: str, head: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    file = tree(ann=1, bob=2) / name
    file.write_text(head + "".join(f"{line}\n" for line in [line.format(*row) for row in ROWS]))
    dataset = FaceList(file, size=8)
    assert list(dataset.identities) == ["ann", "bob"] and dataset.num_classes == 2
    assert dataset.labels.tolist() == [1, 0, 1] and read(dataset) == IMAGES
    assert dataset.path(0) == file.parent / "bob" / "bob_0002.png"
    assert caplog.messages == [
        f"{file}: its first image, 'bob/bob_0002.png', is taken to show 'bob'"
    ]


def test_paths_start_from_the_root_unless_absolute(tree: Tree, tmp_path: Path) -> None:
    root = tree(ann=2)
    (tmp_path / "lists").mkdir()
    file = tmp_path / "lists" / "train.csv"
    file.write_text(f"ann/ann_0001.png,ann\n{root}/ann/ann_0002.png,ann\n")
    assert read(FaceList(file, root, size=8)) == [(0, 1, 0), (0, 2, 0)]
    assert FaceList(file, size=8)[0][0][1, 0, 0] == 2, "the first is not below the list's folder"


def test_quotes_keep_commas_and_blanks_keep_the_last(tree: Tree) -> None:
    root = tree(ann=2)
    (root / "ann" / "ann_0001.png").rename(root / "a, b.png")
    (root / "ann" / "ann_0002.png").rename(root / os.fsdecode(b"\xff.png"))
    (root / "a.csv").write_bytes(b'Path,Identity\n"a, b.png","Doe, John"\n\xff.png,\xfe\n')
    (root / "a.txt").write_bytes(b"a, b.png 10\n\xff.png 9\n")
    for name, identities in {
        "a.csv": ["Doe, John", os.fsdecode(b"\xfe")],
        "a.txt": ["10", "9"],
    }.items():
        dataset = FaceList(root / name, size=8)
        assert list(dataset.identities) == identities and read(dataset) == [(0, 1, 0), (0, 2, 1)]


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("a.csv", "x.png,"),
        ("a.csv", "x.png,ann,more"),
        ("a.csv", "ann,x.png"),
        ("a.txt", "no_image.npy ann"),
        ("a.txt", "ann bob/1 x.jpg"),
        ("a.txt", "alone.png"),
        ("a.lst", "0\tann\tx.png\tmore"),
    ],
)
def test_a_malformed_line_is_named_and_nothing_kept(tree: Tree, name: str, line: str) -> None:
    file = tree(ann=1) / name
    file.write_text(f"ann/ann_0001.png{',' if name == 'a.csv' else ' '}ann\n{line}\n")
    with pytest.raises(ValueError, match=rf"{name}:2: expected the path of an image and"):
        FaceList(file)
    assert not list(file.parent.glob("*.index"))


def test_a_rewritten_list_is_read_anew(tree: Tree) -> None:
    file = tree(ann=2) / "a.csv"
    for count in (1, 2):
        file.write_text("".join(f"ann/ann_{k + 1:04d}.png,ann\n" for k in range(count)))
        assert len(FaceList(file)) == len(FaceList(file)) == count


def test_absent_and_empty_lists_are_refused(tree: Tree) -> None:
    root = tree(ann=1)
    with pytest.raises(ValueError, match="no list"):
        FaceList(root / "gone.csv")
    (root / "a.csv").write_text("path,identity\n\n")
    with pytest.raises(ValueError, match="lists no image"):
        FaceList(root / "a.csv")
    with pytest.raises(ValueError, match="no folder"):
        FaceList(root / "a.csv", root / "gone")
    (root / "a.csv").write_text('"ann/ann_0001.png,ann\n' + "x" * 200_000)
    with pytest.raises(ValueError, match="no CSV file"):
        FaceList(root / "a.csv")


def test_a_change_right_after_the_walk_is_seen(tree: Tree) -> None:
    """Also where the file system's clock has not moved on since the folder was made."""
    root = tree(ann=1)
    for count in range(2, 8):
        Image.new("RGB", (8, 8)).save(root / "ann" / f"{count}.png")
        assert len(IdentityFolder(root, size=8)) == count
