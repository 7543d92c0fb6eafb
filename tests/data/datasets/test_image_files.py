"""Image files come in their order, whole or as zeros that say why."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fastface_lightning.data import (
    ARCFACE_POINTS,
    ImageFiles,
    align_face,
    decode_image,
    find_images,
)

Tree = Callable[..., Path]


@pytest.fixture
def noise(tmp_path: Path) -> list[Path]:
    """Six pictures, no two of a size or a format."""
    rng = np.random.default_rng(0)
    files = [tmp_path / f"{k}.{'png' if k % 2 else 'jpg'}" for k in range(6)]
    for k, file in enumerate(files):
        pixels = rng.integers(0, 256, (130 + k, 140 - k, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(file)
    return files


def test_whole_images_are_resized(noise: list[Path]) -> None:
    files = ImageFiles(noise, size=20)
    assert len(files) == 6
    for k, (image, readable) in enumerate(files):
        assert readable and image.dtype == torch.uint8 and image.shape == (3, 20, 20)
        assert torch.equal(image, decode_image(noise[k], 20))
    assert torch.equal(files[-1][0], files[5][0])


@pytest.mark.parametrize("size", [112, 30])
def test_each_image_is_aligned_by_its_own_points(noise: list[Path], size: int) -> None:
    rng = np.random.default_rng(1)
    points = ARCFACE_POINTS + rng.uniform(0, 20, (6, 1, 2)) + rng.normal(0, 3, (6, 5, 2))
    files = ImageFiles(map(str, noise), points, size)
    for k, (image, readable) in enumerate(files):
        expected = align_face(np.asarray(Image.open(noise[k])), points[k], size)
        assert readable and np.array_equal(image.permute(1, 2, 0), expected)


@pytest.mark.parametrize("aligned", [False, True])
def test_what_cannot_be_read_says_why(noise: list[Path], aligned: bool) -> None:
    noise[0].unlink()
    noise[1].write_bytes(b"")
    noise[2].write_bytes(noise[2].read_bytes()[:-2000])
    noise[3].unlink()
    noise[3].mkdir()
    noise[4].write_bytes(b"%!PS")
    points = np.tile(ARCFACE_POINTS, (8, 1, 1))
    points[7] = 3
    files = ImageFiles([*noise, "a\0b", noise[5]], points if aligned else None)
    reasons = {
        0: "No such file or directory",
        1: "it is empty",
        2: "image file is truncated",
        3: "Is a directory",
        4: "not a JPEG, PNG, WebP or BMP image",
        6: "null",
    }
    if aligned:
        reasons[7] = "landmarks must lie apart"
    for k, (image, readable) in enumerate(files):
        assert image.shape == (3, 112, 112) and image.dtype == torch.uint8
        assert readable == (k not in reasons) == bool(image.any())
        if readable:
            assert files.why(k) == ""
        else:
            assert "cannot read image " in files.why(k) and reasons[k] in files.why(k)


NUMBERS = st.floats(allow_nan=True, allow_infinity=True)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.lists(st.one_of(NUMBERS, st.floats(-300, 300)), min_size=10, max_size=10), st.binary())
def test_nothing_in_the_lists_or_files_raises(
    noise: list[Path], numbers: list[float], content: bytes
) -> None:
    noise[0].write_bytes(noise[2].read_bytes()[:100] + content)
    files = ImageFiles(noise[:2], np.array([numbers] * 2).reshape(2, 5, 2), size=16)
    for k, (image, readable) in enumerate(files):
        assert image.shape == (3, 16, 16)
        assert readable == (files.why(k) == "")


def test_names_in_any_bytes(noise: list[Path], tmp_path: Path) -> None:
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/jos\xe9 \n.png")
    os.rename(noise[1], odd)
    files = ImageFiles([odd, odd + "x"])
    assert files[0][1] and not files[1][1]
    assert files.why(1).encode().endswith(b"jos\\udce9 \\n.pngx: No such file or directory")


def test_images_are_found_at_any_depth(tmp_path: Path) -> None:
    found = ["b.JPG", "a/c/d.png", "a/e.jpeg", "a b/ü.WebP", "a.bmp"]
    others = ["a/notes.txt", "a/.hidden.jpg", ".git/x.jpg", "jpg", "a/d.png.txt"]
    for name in (*found, *others):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()
    assert find_images(tmp_path) == find_images(str(tmp_path)) == sorted(found)


def test_links_are_followed_but_not_in_circles(tree: Tree, tmp_path: Path) -> None:
    root = tree(ann=1, bob=1)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "1.jpg").touch()
    for name, target in {
        "cem": tmp_path / "elsewhere",
        "again": root / "ann",
        "ann/up": root,
        "ann/here": ".",
        "round": "round",
        "x.jpg": "bob/bob_0001.png",
        "y.jpg": "y.jpg",
        "z.jpg": "gone",
    }.items():
        (root / name).symlink_to(target)
    assert find_images(root) == [
        "again/ann_0001.png", "ann/ann_0001.png", "bob/bob_0001.png", "cem/1.jpg", "x.jpg"
    ]  # fmt: skip


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for name in ("gone", "file"):
        with pytest.raises(ValueError, match=f"no folder .*{name}"):
            find_images(tmp_path / name)
    with pytest.raises(ValueError, match="holds no image"):
        find_images(tmp_path)
    with pytest.raises(ValueError, match="points must be"):
        ImageFiles(["a", "b"], ARCFACE_POINTS[None])
    with pytest.raises(IndexError):
        ImageFiles(["a", "b"])[2]
