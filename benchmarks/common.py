"""What every benchmark shares: medians of paired timings, a table, and a JSON with its hardware."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastface_lightning.training.environment import device_name, memory_of, processor_name

RESULTS = Path(__file__).resolve().parent / "results"


def all_pairs(embeddings: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sameness of the n (n - 1) / 2 pairs of (n, D) unit embeddings, (n,) labels."""
    i, j = torch.triu_indices(len(labels), len(labels), 1, device=labels.device)
    return (embeddings @ embeddings.T)[i, j], labels[i] == labels[j]


def medians(sides: dict[str, Callable[[], None]], repeats: int = 7) -> dict[str, float]:
    """Median seconds of each side; the sides take turns, after one turn of warm-up."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, run in sides.items():
            start = time.perf_counter()
            run()
            if turn:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(taken) for name, taken in times.items()}


def report(
    name: str,
    title: str,
    rows: list[dict[str, Any]],
    device: torch.device | None = None,
    /,
    **facts: Any,
) -> None:
    """Print ``rows`` as a table and write them to ``benchmarks/results/<name>.json``."""
    if device is not None:
        title = f"{title}: {device_name(device)}"
    show(title, rows, **facts)
    write(name, device, title=title, rows=rows, **facts)


def show(title: str, rows: list[dict[str, Any]], **facts: Any) -> None:
    """Print ``rows``, of the same columns, as a table, and what there is to say of them."""
    table = Table(title=title, title_justify="left")
    for column in rows[0]:
        table.add_column(column)
    for row in rows:
        table.add_row(*map(_shown, row.values()))
    console = Console(width=120)
    console.print(table)
    for fact, value in facts.items():
        console.print(f"{fact}: {value}")


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def write(name: str, device: torch.device | None = None, /, **content: Any) -> None:
    """Write ``benchmarks/results/<name>.json``: the content, and the machine it is from, with its
    ``device`` where that is not the processor alone."""
    RESULTS.mkdir(exist_ok=True)
    packages = ("torch", "lightning", "numpy")
    written = {
        **content,
        "processor": processor_name(),
        "logical_cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": {package: version(package) for package in packages},
    }
    if device is not None:
        written["device"] = device_name(device)
        written["device_gib"] = memory_of(device) / 2**30
        written["cuda"] = torch.version.cuda if device.type == "cuda" else None
    (RESULTS / f"{name}.json").write_text(json.dumps(written, indent=2) + "\n")
