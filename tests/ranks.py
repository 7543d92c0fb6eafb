"""A check that two processes make together."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import cloudpickle
import torch.distributed as dist
from torch.multiprocessing import start_processes


def on_two_ranks(check: Callable[[int], None], folder: Path, backend: str = "gloo") -> None:
    """Call ``check(rank)`` on ranks 0 and 1; raises what it raises on either.

    Args:
        check: of any kind, a closure as well.
        folder: an empty one, where they meet.
        backend: that connects them: ``gloo``, or ``nccl`` for two GPUs.
    """
    # Not forked from this process, whose autograd may have threads that a fork has not.
    multiprocessing.set_forkserver_preload(["torch.distributed", "lightning.pytorch"])
    given = cloudpickle.dumps(check), folder, backend
    start_processes(_run, given, nprocs=2, start_method="forkserver")
    assert {file.name for file in folder.glob("rank*")} == {"rank0", "rank1"}


def _run(rank: int, check: bytes, folder: Path, backend: str) -> None:
    dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    cloudpickle.loads(check)(rank)
    (folder / f"rank{rank}").touch()
    dist.destroy_process_group()
