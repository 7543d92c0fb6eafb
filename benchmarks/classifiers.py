"""What a step of the last layer costs: ``python benchmarks/classifiers.py``.

Embeddings in, margin softmax, backward, SGD with momentum and weight decay: the straightforward way
against the classifiers of this project, in time (one process, taking turns) and in memory (a
process each).
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, medians, report
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from fastface_lightning.classifiers import ChunkedClassifier, FullClassifier, PartialClassifier
from fastface_lightning.margins import ArcFace
from fastface_lightning.optim import SGD

BATCH, SIZE, SCALE, MARGIN = 128, 512, 64.0, 0.5
# 93,431 are MS1MV3's identities, 205,990 WebFace4M's, 617,970 WebFace12M's.
CLASSES = [10_000, 30_000, 93_431, 205_990, 617_970]
PLAIN, WAYS = "straightforward", ["full", "chunked", "partial 0.1"]


class Straightforward(nn.Module):
    """How the field writes it: every cosine, the angle of every cosine, and back.

    The margin works on the whole matrix, in place and without a gradient, so that the gradient is
    that of the cosine itself; the product is bfloat16 where autocast says so, the logits float32.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_classes, SIZE).normal_(std=0.01))

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        logits = F.linear(F.normalize(embeddings), F.normalize(self.weight)).float()
        logits = logits.clamp(-1, 1)
        with torch.no_grad():
            logits.arccos_()
            logits[torch.arange(len(labels)), labels] += MARGIN
            logits.cos_()
        return F.cross_entropy(logits * SCALE, labels)


def step_of(way: str, num_classes: int, bfloat16: bool) -> Callable[[], None]:
    """Forward, backward and update of one way, ready to run."""
    torch.manual_seed(0)
    products = "bfloat16" if bfloat16 else "float32"
    margin = ArcFace(MARGIN, straight_through=True)
    build: dict[str, Callable[[], nn.Module]] = {
        PLAIN: lambda: Straightforward(num_classes),
        "full": lambda: FullClassifier(num_classes, SIZE, margin),
        "chunked": lambda: ChunkedClassifier(num_classes, SIZE, margin, products=products),
        "partial 0.1": lambda: PartialClassifier(num_classes, SIZE, margin, products=products),
    }
    head = build[way]()
    kind: Callable[..., Optimizer] = torch.optim.SGD if way == PLAIN else SGD
    optimizer = kind(head.parameters(), lr=0.02, momentum=0.9, weight_decay=5e-4)
    embeddings = torch.randn(BATCH, SIZE, requires_grad=True)
    labels = torch.randint(num_classes, (BATCH,))

    def run() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = head(embeddings, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        embeddings.grad = None

    return run


def resident(what: str) -> int:
    """Bytes of this process that are in memory now (VmRSS), or were at most (VmHWM)."""
    match = re.search(rf"{what}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match is not None
    return int(match[1]) * 1024


def measure_memory(way: str, num_classes: int, bfloat16: bool) -> int:
    """Bytes at most, in a process of its own, above weights, gradient and momentum."""
    command = [sys.executable, __file__, "--memory", way, str(num_classes), str(int(bfloat16))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    weights = num_classes * SIZE * 4
    gradient = weights // 10 if way == "partial 0.1" else weights
    return int(done.stdout) - 2 * weights - gradient


def print_memory(way: str, num_classes: int, bfloat16: bool) -> None:
    """What ``measure_memory`` asks of its process."""
    for _ in range(2):
        step_of(way, 100, bfloat16)()  # libraries load
    before = resident("VmRSS")
    run = step_of(way, num_classes, bfloat16)
    for _ in range(3):
        run()
    print(resident("VmHWM") - before)


def table(repeats: int) -> list[dict[str, Any]]:
    """Every way beside the straightforward one, at every size and in both precisions."""
    rows = []
    for num_classes in CLASSES:
        for bfloat16 in (False, True):
            usual = measure_memory(PLAIN, num_classes, bfloat16)
            for way in WAYS:
                if way == "full" and bfloat16:  # it has float32 only
                    continue
                # By twos: more at a time would fill the machine's memory.
                sides = {name: step_of(name, num_classes, bfloat16) for name in (PLAIN, way)}
                taken = medians(sides, repeats)
                del sides
                held = measure_memory(way, num_classes, bfloat16)
                rows.append(
                    {
                        "classes": num_classes,
                        "products": "bfloat16" if bfloat16 else "float32",
                        "way": way,
                        "s/step": taken[way],
                        "s/step, plain": taken[PLAIN],
                        "x time": taken[way] / taken[PLAIN],
                        "GB above": held / 1e9,
                        "GB above, plain": usual / 1e9,
                        "x memory": held / usual,
                    }
                )
    return rows


def plot(rows: list[dict[str, Any]], file: Path) -> None:
    """Time and memory over the number of classes, all axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    labels = {"s/step": "seconds a step", "GB above": "GB above weights, gradient and momentum"}
    for axis, (value, label) in zip(axes, labels.items(), strict=True):
        for way in (PLAIN, *WAYS):
            mine = [
                row
                for row in rows
                if row["way"] == ("full" if way == PLAIN else way) and row["products"] == "float32"
            ]
            column = f"{value}, plain" if way == PLAIN else value
            axis.loglog([r["classes"] for r in mine], [r[column] for r in mine], "o-", label=way)
        axis.set_xlabel("identities")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(frameon=False)
    figure.suptitle(f"Margin softmax and its update, batch {BATCH}, D = {SIZE}, float32")
    figure.savefig(file, dpi=130)


def main() -> None:
    """Print the table, write the JSON and the figure."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--memory", nargs=3, metavar=("WAY", "CLASSES", "BF16"))
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    if arguments.memory:
        way, num_classes, bfloat16 = arguments.memory
        print_memory(way, int(num_classes), bool(int(bfloat16)))
        return
    rows = table(arguments.repeats)
    largest = [r for r in rows if r["classes"] == CLASSES[-1] and r["way"] == "chunked"]
    report(
        "classifiers",
        f"Margin softmax and its update, batch {BATCH}, D = {SIZE}; memory above weights, gradient "
        "and momentum",
        rows,
        time_ratio_float32=largest[0]["x time"],
        time_ratio_bfloat16=largest[1]["x time"],
        memory_ratio_float32=largest[0]["x memory"],
    )
    plot(rows, RESULTS / "classifiers.png")


if __name__ == "__main__":
    main()
