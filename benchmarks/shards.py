"""Class centres split over processes beside DDP's copies: bytes over the wire, memory, checkpoint.

``python benchmarks/shards.py``: steps of the class layer alone, on gloo processes of this machine;
about ten minutes on two cores, 20 GB of memory and of disk.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import report, show
from torch import nn
from torch.multiprocessing import start_processes
from torch.nn.parallel import DistributedDataParallel

from fastface_lightning.classifiers import ChunkedClassifier, PartialClassifier
from fastface_lightning.optim import SGD
from fastface_lightning.training.checkpoints import StreamedCheckpoints

CLASSES = {"WebFace12M": 617_970, "WebFace42M": 2_059_906}
SIZE, BATCH, STEPS = 512, 128, 2  # of an embedding; images of a process; after another
MIB = 2**20
ROOM = 20 * 2**30  # bytes of memory that a row may take
ALONE, WAYS = ("one process", "partial 0.1"), ("DDP", "shards", "shards, partial 0.1")


def memory(name: str) -> int:
    """Bytes of this process by a name of Linux's: ``RssAnon``, ``RssFile``, ``VmHWM``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def wire() -> int:
    """Bytes that have passed through the loopback device."""
    lines = Path("/proc/net/dev").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.strip().startswith("lo:"))


@contextmanager
def watched(names: tuple[str, ...]) -> Iterator[dict[str, int]]:
    """How far figures of :func:`memory` rise within it, in bytes."""
    before, highest = {n: memory(n) for n in names}, dict.fromkeys(names, 0)
    ended: list[bool] = []

    def watch() -> None:
        while not ended:
            for name in names:
                highest[name] = max(highest[name], memory(name) - before[name])
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield highest
    finally:
        ended.append(True)
        thread.join()


def run(rank: int, ranks: int, way: str, num_classes: int, folder: Path, save: bool) -> None:
    """A process of a row: what rank 0 has measured it leaves in the folder."""
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    dist.init_process_group("gloo", init_method=meet, rank=rank, world_size=ranks)
    start = memory("RssAnon")
    kind: Any = PartialClassifier if "partial" in way else ChunkedClassifier
    with torch.device("meta"):  # to sample a table would take most of the time
        head = kind(num_classes, SIZE)
    if "shards" in way:
        head.shard_centers()
    head.to_empty(device="cpu")
    nn.init.constant_(head.weight, 0.01)
    net: Any = head
    if way == "DDP":
        net = DistributedDataParallel(head, gradient_as_bucket_view=True)
    optimizer = SGD(head.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    head.gather_states(optimizer)
    torch.manual_seed(rank)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here, with the centres made
    sent = []
    for _ in range(1 + STEPS):
        x, labels = (
            torch.randn(BATCH, SIZE, requires_grad=True),
            torch.randint(num_classes, (BATCH,)),
        )
        dist.barrier()
        before = wire()
        net(x, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        dist.barrier()
        sent.append(wire() - before)
    figures: dict[str, Any] = {
        "wire": statistics.median(sent[1:]) / ranks,
        "memory": memory("VmHWM") - memory("RssFile") - start,
    }
    if save:
        figures["checkpoint"] = saved(head, optimizer, rank, folder / "last.ckpt")
    if rank == 0:
        torch.save(figures, folder / "figures.pt")
    dist.destroy_process_group()


def saved(head: ChunkedClassifier, optimizer: SGD, rank: int, file: Path) -> dict[str, float]:
    """What a checkpoint takes of rank 0."""
    with watched(("RssAnon", "RssFile")) as rise:
        began = time.perf_counter()
        checkpoint = {"state_dict": head.state_dict(), "optimizer_states": [optimizer.state_dict()]}
        gathered = time.perf_counter() - began
        if rank == 0:
            StreamedCheckpoints().save_checkpoint(checkpoint, file)
    dist.barrier()
    return {**rise, "gather": gathered, "seconds": time.perf_counter() - began}


def measured(ranks: int, way: str, num_classes: int, save: bool = False) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        arguments = (ranks, way, num_classes, Path(folder), save)
        start_processes(run, arguments, nprocs=ranks, start_method="forkserver")
        figures: dict[str, Any] = torch.load(Path(folder) / "figures.pt")
        if save:
            figures["checkpoint"]["bytes"] = (Path(folder) / "last.ckpt").stat().st_size
        return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", type=int, help="of one table alone; nothing is written")
    given = parser.parse_args().classes
    multiprocessing.set_forkserver_preload(["shards"])
    rows, checkpoints = [], []
    for data, num_classes in ({"given": given} if given else CLASSES).items():
        table = num_classes * SIZE * 4
        for ranks in (1, 2, 4):
            for way in WAYS if ranks > 1 else ALONE:
                copies = ranks if way == "DDP" else 1
                row = {"data": data, "classes": num_classes, "ranks": ranks, "way": way}
                figures: dict[str, Any] = dict.fromkeys(("wire", "memory"))
                if 3 * table * copies <= ROOM:
                    figures = measured(ranks, way, num_classes, save=(ranks, way) == (2, "shards"))
                if "checkpoint" in figures:
                    kept = figures["checkpoint"]
                    sizes = {f"{k}, MiB": kept[k] / MIB for k in ("bytes", "RssAnon", "RssFile")}
                    seconds = {"gather, s": kept["gather"], "all, s": kept["seconds"]}
                    checkpoints.append({"classes": num_classes, "ranks": ranks} | sizes | seconds)
                for name in ("wire", "memory"):
                    value = figures[name]
                    row[f"{name}, MiB a rank"] = None if value is None else value / MIB
                rows.append(row)
                print(row, flush=True)
    facts = {
        "wire": f"bytes through the loopback device in a step, over ranks; {BATCH} images a rank",
        "memory": "highest anonymous memory of rank 0 in steps, above a process without centres",
        "-": f"would take more than {ROOM / 2**30:.0f} GiB here",
    }
    title = "Class centres of 512 numbers, SGD with momentum, on gloo processes of one thread"
    show("Checkpoint of rank 0: rise of its memory", checkpoints)
    if given:
        show(title, rows, **facts)
    else:
        report("shards", title, rows, checkpoints=checkpoints, **facts)


if __name__ == "__main__":
    main()
