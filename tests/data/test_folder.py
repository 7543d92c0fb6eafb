"""An identity folder's labels and images, and its patience with files that are broken."""

import logging
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from fastface_lightning.data import IdentityFolder, decode_image, identity_names

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
    image, label = dataset[0]
    assert image.dtype == torch.uint8 and image.shape == (3, 8, 8) and type(label) is int
    assert dataset.path(4) == dataset.root / "bob" / "bob_0002.png"
    assert dataset.bad_images() == dataset.missing == []


def test_indices_count_from_the_end_too_and_have_bounds(tree: Tree) -> None:
    dataset = IdentityFolder(tree(ann=1, bob=2), size=8)
    assert torch.equal(dataset[-1][0], dataset[2][0])
    with pytest.raises(IndexError):
        dataset[3]


def test_images_are_resized(tree: Tree) -> None:
    assert IdentityFolder(tree(ann=1, size=20))[0][0].shape == (3, 112, 112)


def test_any_case_of_the_suffixes_counts_and_nothing_else(tree: Tree) -> None:
    root = tree(ann=1)
    for name in ("b.JPG", "c.Jpeg", "d.PNG", "e.webp", "f.BMP"):
        Image.new("RGB", (8, 8)).save(root / "ann" / name)
    for name in (".hidden.jpg", "notes.txt", "jpg"):
        (root / "ann" / name).write_text("")
    (root / "ann" / "folder.jpg").mkdir()
    (root / ".cache").mkdir()
    (root / "list.txt").write_text("")
    dataset = IdentityFolder(root, size=8)
    assert identity_names(root) == ["ann"]
    assert [dataset.path(i).name for i in range(len(dataset))] == [
        "ann_0001.png", "b.JPG", "c.Jpeg", "d.PNG", "e.webp", "f.BMP"
    ]  # fmt: skip


def test_file_names_of_any_script_are_kept(tree: Tree) -> None:
    root = tree(ann=1)
    Image.new("RGB", (8, 8)).save(root / "ann" / "ümit 陈.png")
    dataset = IdentityFolder(root, size=8)
    assert dataset.path(1).name == "ümit 陈.png" and dataset[1]


def test_identities_restrict_and_absent_ones_are_reported(tree: Tree, caplog) -> None:
    root = tree(ann=1, bob=2, cem=1)
    (root / "empty").mkdir()
    dataset = IdentityFolder(root, size=8, identities=["dan", "cem", "ann", "empty", "ann"])
    assert dataset.identities == ["ann", "cem"]
    assert read(dataset) == [(0, 1, 0), (2, 1, 1)]
    assert dataset.missing == ["dan", "empty"]
    assert "2 of the 4 identities" in caplog.text and "dan, empty" in caplog.text


def test_empty_folders_are_left_out_with_one_warning(tree: Tree, caplog) -> None:
    root = tree(zoe=1)
    for k in range(12):
        (root / f"empty{k:02d}").mkdir()
    dataset = IdentityFolder(root, size=8)
    assert dataset.identities == ["zoe"] and dataset.missing == []
    assert len(caplog.records) == 1
    assert caplog.messages[0].startswith("12 of the 13 identities")
    assert caplog.messages[0].endswith("empty09 and 2 more")


def test_min_images_leaves_out_the_rarer(tree: Tree) -> None:
    assert IdentityFolder(tree(ann=3, bob=2, cem=1), min_images=2).identities == ["ann", "bob"]


def test_errors_are_one_sentence(tree: Tree, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^no folder .*gone; expected .*gone/<identity>/<image>"):
        IdentityFolder(tmp_path / "gone")
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "flat" / "face.png")
    with pytest.raises(ValueError, match=r"flat holds no folders; expected .*/<identity>/"):
        IdentityFolder(tmp_path / "flat")
    (tmp_path / "bare" / "ann").mkdir(parents=True)
    with pytest.raises(ValueError, match=r"none of the 1 identities sought in .*bare has an image"):
        IdentityFolder(tmp_path / "bare")
    root = tree(ann=2)
    with pytest.raises(ValueError, match="none of the 2 identities sought"):
        IdentityFolder(root, identities=["x", "y"])
    with pytest.raises(ValueError, match=r"no identity in .* has min_images = 3 images"):
        IdentityFolder(root, min_images=3)


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ({"size": 0}, "size must be at least 1 pixel, got 0"),
        ({"min_images": 0}, "min_images must be at least 1, got 0"),
        ({"max_bad": -1}, "max_bad must be at least 0 images, got -1"),
    ],
)
def test_arguments_are_checked(argument: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IdentityFolder("anywhere", **argument)


def test_a_bad_image_is_named_once_and_replaced_by_the_next(tree: Tree, caplog) -> None:
    root = tree(ann=3, bob=2)
    bad = [break_file(root / "ann" / "ann_0003.png"), break_file(root / "bob" / "bob_0002.png")]
    dataset = IdentityFolder(root, size=8)
    for _ in range(2):
        assert read(dataset) == [(0, 1, 0), (0, 2, 0), (1, 1, 1), (1, 1, 1), (0, 1, 0)]
    assert dataset.bad_images() == bad and dataset.bad.tolist() == [0, 0, 1, 0, 1]
    assert len(caplog.records) == 2
    assert all(file in line for file, line in zip(bad, caplog.messages, strict=True))


def test_more_bad_images_than_allowed_end_the_run(tree: Tree) -> None:
    root = tree(ann=5)
    for j in (1, 2, 3):
        last = break_file(root / "ann" / f"ann_000{j}.png")
    dataset = IdentityFolder(root, size=8, max_bad=2)
    message = rf"at most max_bad = 2 images may be unreadable, got 3, .* {last}: ."
    with pytest.raises(ValueError, match=message):
        dataset[0]


def test_a_folder_of_bad_images_only_raises(tree: Tree) -> None:
    root = tree(ann=2)
    for file in root.rglob("*.png"):
        break_file(file)
    with pytest.raises(ValueError, match=r"none of the 2 images in .* can be read"):
        IdentityFolder(root, size=8)[0]


def test_a_file_deleted_after_the_scan_is_a_bad_one(tree: Tree) -> None:
    root = tree(ann=2)
    dataset = IdentityFolder(root, size=8)
    (root / "ann" / "ann_0001.png").unlink()
    assert read(dataset)[0] == (0, 2, 0)


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


def test_a_worker_ends_the_run_too(tree: Tree) -> None:
    root = tree(ann=4)
    break_file(root / "ann" / "ann_0002.png")
    batches = iter(DataLoader(IdentityFolder(root, size=8, max_bad=0), 2, num_workers=1))
    with pytest.raises(ValueError, match="at most max_bad = 0 images may be unreadable, got 1"):
        list(batches)
    batches._shutdown_workers()  # left to the garbage collector, it waits five seconds


def test_it_pickles_small(tree: Tree) -> None:
    """What goes to a spawned worker are arrays, not an object a file."""
    dataset = IdentityFolder(tree(ann=30, bob=30), size=8)
    dataset.bad = torch.zeros(0)
    assert len(pickle.dumps(dataset)) < 60 * 40 + 1500


def test_lfw_training_people(shared_data: Path, caplog) -> None:
    """LFW View 1 trains on 4,038 people with 9,525 images, all there and all 112 x 112 RGB."""
    caplog.set_level(logging.WARNING)
    lines = (shared_data / "lfw112" / "peopleDevTrain.txt").read_text().splitlines()[1:]
    names = [line.split()[0] for line in lines]
    dataset = IdentityFolder(shared_data / "lfw112" / "images", identities=names)
    assert dataset.num_classes == 4038 and dataset.missing == [] and not caplog.records
    assert len(dataset) == sum(int(line.split()[1]) for line in lines) == 9525
    image, label = dataset[4000]
    assert torch.equal(image, decode_image(dataset.path(4000)))
    assert dataset.path(4000).parent.name == names[label] == sorted(names)[label]
