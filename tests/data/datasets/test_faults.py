"""What a folder of millions of faces holds besides good ones: each fault is named, and survived."""

import io
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader, default_collate

from fastface_lightning.data import EpochSampler, FaceLoader, IdentityFolder
from fastface_lightning.data.datasets.base import collate

Tree = Callable[..., Path]

RAMP = np.add.outer(np.arange(112), np.arange(112)).astype(np.uint8)
PHOTO = Image.fromarray(np.stack([RAMP, RAMP.T[::-1], 255 - RAMP], axis=-1))


def encoded(image: Image.Image, format: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def replaced(file: Path, content: bytes) -> None:
    file.unlink()
    file.write_bytes(content)


FAULTS: dict[str, Callable[[Path], object]] = {
    "truncated": lambda f: replaced(f, encoded(PHOTO, "JPEG")[:1000]),
    "empty": lambda f: replaced(f, b""),
    "text": lambda f: replaced(f, b"<html>404 not found</html>"),
    "gone": lambda f: f.unlink(),
    "folder": lambda f: (f.unlink(), f.mkdir()),
    "circular link": lambda f: (f.unlink(), f.symlink_to(f.name)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_counted_and_replaced(tree: Tree, caplog, fault: str) -> None:
    root = tree(ann=3)
    dataset = IdentityFolder(root, size=8, max_bad=1)
    file = root / "ann" / "ann_0002.png"
    FAULTS[fault](file)
    for _ in range(2):
        assert [int(dataset[i][0][1, 0, 0]) for i in range(3)] == [1, 3, 3]
    (message,) = caplog.messages
    assert f"cannot read image {file}: " in message
    assert len(message) < len(str(file)) + 200 and "\n" not in message
    assert dataset.bad.tolist() == [0, 1, 0] and dataset.bad_images() == [str(file)]
    FAULTS[fault](dataset.path(2))
    with pytest.raises(ValueError, match="max_bad = 1"):
        dataset[2]


def test_what_is_no_file_at_the_start_is_no_image(tree: Tree) -> None:
    root = tree(ann=1)
    (root / "ann" / "folder.jpg").mkdir()
    (root / "ann" / "link.jpg").symlink_to("nowhere")
    os.mkfifo(root / "ann" / "pipe.jpg")
    assert len(IdentityFolder(root, size=8)) == 1


def test_links_are_followed(tree: Tree) -> None:
    root = tree(ann=2)
    (root.parent / "away").mkdir()
    (root / "ann" / "ann_0001.png").rename(root.parent / "away" / "x.png")
    (root / "ann" / "ann_0001.png").symlink_to("../../away/x.png")
    (root / "bob").symlink_to(root.parent / "away")
    dataset = IdentityFolder(root, size=8)
    assert dataset.identities == ["ann", "bob"]
    assert [int(dataset[i][0][1, 0, 0]) for i in range(3)] == [1, 2, 1]


def test_undecodable_names_are_served_and_told_in_letters_that_any_stream_takes(
    tree: Tree, caplog
) -> None:
    root = tree(ann=2)
    folder = os.fsencode(root) + b"/b\xffb"
    os.rename(root / "ann", folder)
    os.rename(folder + b"/ann_0001.png", folder + b"/\xfe.png")
    missing = [os.fsdecode(b"b\xffb"), os.fsdecode(b"no\xff")]
    for _ in range(2):  # walked, and from the index
        dataset = IdentityFolder(root, size=8, identities=missing, max_bad=1)
        assert dataset.identities == missing[:1] and dataset.path(1).is_file()
        assert [int(dataset[i][0][1, 0, 0]) for i in range(2)] == [2, 1]
    shutil.copy(__file__, dataset.path(1))
    assert dataset[1][0][1, 0, 0] == 2
    assert "no\\udcff" in caplog.text and "b\\udcffb/\\udcfe.png: not a" in caplog.text
    assert all(text.encode() for text in (*dataset.bad_images(), *caplog.messages))


@pytest.mark.parametrize("workers", [0, 2])
def test_training_goes_on_when_a_folder_vanishes(tree: Tree, workers: int) -> None:
    root = tree(ann=8, bob=8, cem=8)
    dataset = IdentityFolder(root, size=8, max_bad=8)
    loader = FaceLoader(dataset, 2, EpochSampler(dataset), num_workers=workers)
    batches = iter(loader)
    seen = [next(batches)]
    shutil.rmtree(root / "bob")
    seen += batches
    assert [len(images) for images, _ in seen] == [2] * 12
    assert dataset.bad.tolist() == [0] * 8 + [1] * 8 + [0] * 8


# Batches.


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("function", [collate, default_collate])
def test_a_batch_is_channels_last_bytes(tree: Tree, workers: int, function) -> None:
    dataset = IdentityFolder(tree(ann=3, bob=2))
    loader = DataLoader(dataset, 5, num_workers=workers, collate_fn=function)
    ((images, labels),) = loader
    assert images.dtype == torch.uint8 and images.shape == (5, 3, 112, 112)
    assert labels.dtype == torch.int64 and labels.tolist() == [0, 0, 0, 1, 1]
    assert images[:, 1, 50, 50].tolist() == [1, 2, 3, 1, 2]
    assert images.untyped_storage().nbytes() == 5 * 37_632
    assert images.is_shared() == (workers > 0)
    if function is collate:
        assert images.stride() == (37_632, 1, 336, 3)
