"""How fast faces come, and how fast a run starts: ``python benchmarks/loader.py``.

The usual way ends at flipped, normalised floats; this project's at uint8, which the device flips
and normalises.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg
import torch
from common import medians, report
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from fastface_lightning.data import (
    EpochSampler,
    FaceDataset,
    FaceLoader,
    IdentityFolder,
    RecordDataset,
    ShardDataset,
    SyntheticFaces,
)
from fastface_lightning.data.formats.recordio_writer import InsightFaceWriter
from fastface_lightning.data.formats.tar import write_shards

BATCH = 128
ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=6400, help="images a turn")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--identities", type=int, default=100_000, help="of ten empty files each")
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--side", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.start:
        return started(arguments.start, arguments.side)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        rows = speed(Path(folder), arguments.images, arguments.repeats)
        starts = start(Path(folder) / "tree", arguments.identities)
    walk, kept = starts["walk (ImageFolder)"], starts["kept index"]
    report(
        "loader",
        "112x112 JPEGs, batches of 128, one core",
        rows,
        start=starts,
        start_images=10 * arguments.identities,
        start_speedup=walk["seconds"] / kept["seconds"],
        start_memory=kept["megabytes"] / walk["megabytes"],
        data_versions={name: version(name) for name in ("simplejpeg", "pillow", "torchvision")},
    )
    return None


def speed(folder: Path, count: int, repeats: int) -> list[dict[str, Any]]:
    """Images a second of each way, on one core, the files in memory."""
    cores = os.sched_getaffinity(0)
    root = photographs(folder)
    faces = IdentityFolder(root)
    packed = folder / "train.rec"
    with InsightFaceWriter(packed) as writer:
        for i in range(len(faces)):
            writer.write_image(int(faces.labels[i]), faces.encoded(i))
    shards = folder / "shards"
    shards.mkdir()
    write_shards(shards, lambda first: samples(faces, first))
    usual = ImageFolder(
        str(root),
        transforms.Compose(
            [
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize([0.5] * 3, [0.5] * 3),
            ]
        ),
    )
    encoded = [bytes(faces.encoded(i)) for i in range(min(count, len(faces)))]
    loaders = {
        "usual": DataLoader(usual, BATCH, shuffle=True, drop_last=True),
        "folder": loader(faces),
        "record": loader(RecordDataset(packed)),
        "shards": loader(ShardDataset(shards)),
    }
    sides = {name: lambda way=way: serve(way, count) for name, way in loaders.items()}
    os.sched_setaffinity(0, {min(cores)})
    taken = medians({**sides, "bare decoder": lambda: decode(encoded, count)}, repeats)
    os.sched_setaffinity(0, cores)
    per_second = {name: count / seconds for name, seconds in taken.items()}
    sizes = {"usual": 4 * 3 * 112 * 112, "bare decoder": 3 * 112 * 112}
    return [
        {
            "way": name,
            "images/s": value,
            "times the usual": value / per_second["usual"],
            "of the bare decoder": value / per_second["bare decoder"],
            "bytes an image": sizes.get(name) or batch_bytes(loaders[name]),
        }
        for name, value in per_second.items()
    ]


def photographs(folder: Path) -> Path:
    """A copy of LFW where it is, so that its index stays here, else synthetic faces."""
    shared = os.environ.get("FASTFACE_SHARED_DATA", ROOT.parent / "shared" / "data")
    images = Path(shared) / "lfw112" / "images"
    copy = folder / "images"
    if images.is_dir():
        return Path(shutil.copytree(images, copy))
    faces = SyntheticFaces(500, 10)
    for i in range(len(faces)):
        file = copy / faces.identities[int(faces.labels[i])] / faces.file_name(i)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes(faces.encoded(i)))
    return copy


def samples(faces: FaceDataset, first: int) -> Iterator[tuple[bytes, str]]:
    for i in range(first, len(faces)):
        yield bytes(faces.encoded(i)), faces.identities[int(faces.labels[i])]


def loader(faces: FaceDataset) -> FaceLoader:
    return FaceLoader(faces, BATCH, EpochSampler(faces, 0, 1, 0))


def serve(loader: Any, count: int) -> None:
    """Take so many images, over as many epochs as that needs."""
    taken = 0
    while taken < count:
        for images, _ in loader:
            taken += len(images)
            if taken >= count:
                break


def decode(encoded: list[bytes], count: int) -> None:
    for start in range(0, count, BATCH):
        out = np.empty((BATCH, 112, 112, 3), np.uint8)
        for place in range(BATCH):
            simplejpeg.decode_jpeg(encoded[(start + place) % len(encoded)], buffer=out[place])


def batch_bytes(loader: Any) -> int:
    images, _ = next(iter(loader))
    return images.nbytes // len(images)


def start(tree: Path, identities: int) -> dict[str, dict[str, float]]:
    """Seconds and memory to know a million images, each side in processes of its own."""
    for identity in range(identities):
        (tree / f"id_{identity:07d}").mkdir(parents=True)
        for image in range(10):
            (tree / f"id_{identity:07d}" / f"{image}.jpg").touch()
    measured: dict[str, list[tuple[float, float]]] = {}
    for side in ("walk (ImageFolder)", "first start", *3 * ["walk (ImageFolder)", "kept index"]):
        command = [sys.executable, __file__, "--start", str(tree), "--side", side]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        measured.setdefault(side, []).append(tuple(json.loads(done.stdout)))
    return {
        side: {"seconds": statistics.median(s), "megabytes": statistics.median(m)}
        for side, (s, m) in ((side, zip(*runs, strict=True)) for side, runs in measured.items())
    }


def started(tree: Path, side: str) -> None:
    """In a process of its own: how long it takes, and by how much the peak of memory grows."""
    before = resident()
    begun = time.perf_counter()
    images = ImageFolder(str(tree)) if side.startswith("walk") else IdentityFolder(tree)
    seconds = time.perf_counter() - begun
    assert len(images) % 10 == 0
    print(json.dumps([seconds, (resident() - before) / 2**20]))


def resident() -> int:
    """Bytes: the most that this process has held."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


if __name__ == "__main__":
    main()
