"""Where a run takes place: device and memory, the project's commit, versions."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

_QUIET: dict[str, Any] = {"capture_output": True, "text": True}


def peak_memory(device: torch.device) -> int:
    """Bytes: most allocated on a GPU so far; on a CPU the process's largest resident set."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if status.is_file():  # what getrusage tells may be the parent's
        found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text())
        if found:
            return int(found[1]) * 1024
    import resource  # not there on Windows

    # macOS counts bytes, others kilobytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_of(device: torch.device) -> int:
    """Bytes: all of a GPU's memory; on a CPU the system's."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def device_name(device: torch.device) -> str:
    """What a reader of a figure wants to know of the hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()}, {torch.get_num_threads()} threads"


def commit() -> str | None:
    """The project's commit, ``+`` after it where files differ from it; None outside a checkout."""
    here = Path(__file__).resolve()
    git = ["git", "-C", str(here.parent)]
    try:
        # Installed into some other project's folder, the commit would be that project's.
        subprocess.run([*git, "ls-files", "--error-unmatch", here.name], check=True, **_QUIET)
        head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, **_QUIET).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], check=False, **_QUIET)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+" if changed.returncode else "")


def environment(commit: str | None) -> dict[str, str]:
    """Where a run took place, by what a reader calls it."""
    memory = memory_of(torch.device("cpu")) / 2**30
    packages = ("torch", "lightning", "torchmetrics", "timm", "hydra-core", "numpy")
    return {
        "commit": commit or "unknown",
        "system": platform.platform(),
        "processor": f"{processor_name()}, {os.cpu_count()} logical cores, {memory:.0f} GiB",
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def processor_name() -> str:
    """The processor's name, as far as the system tells."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":")[1].strip()
    return platform.processor() or platform.machine()
