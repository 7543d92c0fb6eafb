"""Shared fixtures: one torch thread a worker, and the reference data where it is present."""

import os
from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with LFW View 1, the authors' training log and format fixtures.

    Looked for beside the checkout (`../shared/data`) or where FASTFACE_SHARED_DATA points.
    """
    root = Path(__file__).resolve().parents[1]
    folder = Path(os.environ.get("FASTFACE_SHARED_DATA", root.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"reference data is absent: no folder {folder}")
    return folder
