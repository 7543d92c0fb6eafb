"""The parts stand alone: who imports whom, and what importing costs."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastface_lightning

PACKAGE = Path(fastface_lightning.__file__).parent
PARTS = ("schedule", "margins", "backbones", "data", "evaluation")


def imported_modules(file: Path) -> Iterator[str]:
    """Absolute names of all that a file imports, inside functions and TYPE_CHECKING too."""
    package = ("fastface_lightning", *file.relative_to(PACKAGE).parent.parts)
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("part", PARTS)
def test_no_part_imports_another(part: str) -> None:
    files = sorted((PACKAGE / part).rglob("*.py"))
    assert files, f"no files in {part}"
    others = tuple(f"fastface_lightning.{other}" for other in PARTS if other != part)
    crossings = {
        f"{file.relative_to(PACKAGE)} imports {name}"
        for file in files
        for name in imported_modules(file)
        if name.startswith(others)
    }
    assert not crossings


def test_relative_imports_are_resolved() -> None:
    # The check above is worth nothing if it cannot read `from ..x import y`.
    assert "fastface_lightning.schedule.base.Progress" in set(
        imported_modules(PACKAGE / "schedule" / "callback.py")
    )


def newly_imported(statements: str, first: str = "") -> set[str]:
    """Top-level modules that ``statements`` load in a fresh interpreter, ``first`` being loaded."""
    program = (
        f"import sys\n{first}\nbefore = set(sys.modules)\n{statements}\n"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, cwd=PACKAGE.parent, capture_output=True, text=True, check=True, timeout=120
    )
    return set(done.stdout.split())


def test_schedules_alone_need_no_torch() -> None:
    loaded = newly_imported("from fastface_lightning import FastFace, MHLR, replay")
    assert not loaded & {"torch", "numpy", "lightning", "timm", "hydra", "torchvision"}


def test_the_torch_scheduler_needs_no_lightning() -> None:
    loaded = newly_imported("from fastface_lightning import FastFaceLR")
    assert not loaded & {"lightning", "torchmetrics", "timm", "hydra", "torchvision"}


def test_the_callback_needs_nothing_that_lightning_has_not_loaded() -> None:
    # Lightning itself loads torchmetrics, and that loads torchvision where it is installed.
    loaded = newly_imported(
        "from fastface_lightning import MHLR, FastFace, FastFaceCallback, FastFaceLR, replay",
        first="import lightning.pytorch",
    )
    assert not loaded & {"timm", "hydra", "omegaconf", "torchvision", "matplotlib"}
