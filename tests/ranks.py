"""A check that several processes make together."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path

import cloudpickle
import torch.distributed as dist
from programs import PRELOAD
from torch.multiprocessing import start_processes


def on_ranks(
    check: Callable[[int], None], folder: Path, ranks: int = 2, backend: str = "gloo"
) -> None:
    """Call ``check(rank)`` on each rank; raises what it raises on any.

    Args:
        check: of any kind, a closure as well.
        folder: an empty one, where they meet.
        ranks: how many processes.
        backend: that connects them: ``gloo``, or ``nccl`` for GPUs.
    """
    # Not forked from this process, whose autograd may have threads that a fork has not.
    multiprocessing.set_forkserver_preload(PRELOAD)
    arguments = (cloudpickle.dumps(check), folder, ranks, backend)
    start_processes(_run, arguments, nprocs=ranks, start_method="forkserver")
    assert {file.name for file in folder.glob("rank*")} == {f"rank{rank}" for rank in range(ranks)}


def _run(rank: int, check: bytes, folder: Path, ranks: int, backend: str) -> None:
    meet = f"file://{folder}/meet"
    dist.init_process_group(backend, init_method=meet, rank=rank, world_size=ranks)
    cloudpickle.loads(check)(rank)
    (folder / f"rank{rank}").touch()
    dist.destroy_process_group()
