"""A check that two processes make together, connected by gloo."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import cloudpickle
import torch.distributed as dist
from torch.multiprocessing import start_processes


def on_two_ranks(check: Callable[[int], None], folder: Path) -> None:
    """Call ``check(rank)`` on ranks 0 and 1; raises what it raises on either.

    Args:
        check: of any kind, a closure as well.
        folder: an empty one, where they meet.
    """
    # Not forked from this process, whose autograd may have threads that a fork has not.
    multiprocessing.set_forkserver_preload(["torch.distributed", "lightning.pytorch"])
    start_processes(_run, (cloudpickle.dumps(check), folder), nprocs=2, start_method="forkserver")
    assert {file.name for file in folder.glob("rank*")} == {"rank0", "rank1"}


def _run(rank: int, check: bytes, folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    cloudpickle.loads(check)(rank)
    (folder / f"rank{rank}").touch()
    dist.destroy_process_group()
