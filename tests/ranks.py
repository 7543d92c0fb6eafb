"""A check that two processes make together, connected by gloo."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch.distributed as dist
from torch.multiprocessing import start_processes


def on_two_ranks(check: Callable[[int], None], folder: Path) -> None:
    """Call ``check(rank)`` on ranks 0 and 1; raises what it raises on either.

    Args:
        check: of any kind, as the processes are forked.
        folder: an empty one, where they meet.
    """
    if not hasattr(os, "fork"):
        pytest.skip("starts its processes by fork")
    start_processes(_run, (check, folder), nprocs=2, start_method="fork")
    assert {file.name for file in folder.glob("rank*")} == {"rank0", "rank1"}


def _run(rank: int, check: Callable[[int], None], folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    check(rank)
    (folder / f"rank{rank}").touch()
    dist.destroy_process_group()
