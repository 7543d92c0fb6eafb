"""Small trees of identities whose pixels say which image they are."""

from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image


@pytest.fixture
def tree(tmp_path: Path) -> Callable[..., Path]:
    """``tree(ann=3, bob=2)`` writes ann_0001.png ... into folders and returns their root.

    Image j (from 1) of the k-th person (from 0, by name) is everywhere RGB (k, j, 7).
    """

    def write(size: int = 8, **counts: int) -> Path:
        for k, name in enumerate(sorted(counts)):
            folder = tmp_path / "faces" / name
            folder.mkdir(parents=True)
            for j in range(1, counts[name] + 1):
                Image.new("RGB", (size, size), (k, j, 7)).save(folder / f"{name}_{j:04d}.png")
        return tmp_path / "faces"

    return write
