"""A check that several processes make together, connected by gloo."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import cloudpickle
import torch.distributed as dist
from torch.multiprocessing import start_processes


def on_ranks(check: Callable[[int], None], folder: Path, ranks: int = 2) -> None:
    """Call ``check(rank)`` on each rank; raises what it raises on any.

    Args:
        check: of any kind, a closure as well.
        folder: an empty one, where they meet.
        ranks: how many processes.
    """
    # Not forked from this process, whose autograd may have threads that a fork has not.
    multiprocessing.set_forkserver_preload(["torch.distributed", "lightning.pytorch"])
    arguments = (cloudpickle.dumps(check), folder, ranks)
    start_processes(_run, arguments, nprocs=ranks, start_method="forkserver")
    assert {file.name for file in folder.glob("rank*")} == {f"rank{rank}" for rank in range(ranks)}


def _run(rank: int, check: bytes, folder: Path, ranks: int) -> None:
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=ranks)
    cloudpickle.loads(check)(rank)
    (folder / f"rank{rank}").touch()
    dist.destroy_process_group()
