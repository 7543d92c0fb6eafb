"""Shared fixtures: one torch thread a worker, and the reference data where it is present."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from devices import device
from programs import run

__all__ = ["device", "run", "shared_data"]
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def launched() -> Iterator[None]:
    """Lightning's launchers leave to the next run what tells a process that it is a rank: one with
    two would wait for the other, at a port that may be taken by then."""
    yield
    for name in ("MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def shared_data() -> Iterator[Path]:
    """Folder with LFW View 1, the authors' training log and format fixtures.

    Looked for beside the checkout (`../shared/data`) or where FASTFACE_SHARED_DATA points.
    """
    root = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("FASTFACE_SHARED_DATA", root.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"reference data is absent: no folder {folder}")
    index = folder / "lfw112" / "images.index"
    kept = index.exists()
    yield folder
    if not kept:
        index.unlink(missing_ok=True)
