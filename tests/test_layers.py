"""The parts stand alone: who imports whom, what is installed for it, and what importing costs."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fastface_lightning"
PROGRAMS = [ROOT / "train.py", *sorted((ROOT / "recipes").glob("*.py"))]
# Every part of the package, and all the others that it may import, inside functions as well.
MAY_IMPORT = {
    "files": "",
    "preprocessing": "",
    "schedule": "files",
    "margins": "files",
    "backbones": "files preprocessing",
    "data": "files",
    "evaluation": "files",
    "optim": "files",
    "report": "files schedule",
    "classifiers": "files margins optim preprocessing",
    "inference": "files preprocessing margins backbones data evaluation",
    "training": "files preprocessing schedule margins backbones data evaluation optim report"
    " classifiers",
    "cli": "files report",
    "__init__": "schedule inference training",
}
# What only the faces need: with torch, Lightning and the wheel alone none of it is there.
FACES_ALONE = "timm hydra omegaconf torchvision matplotlib simplejpeg PIL safetensors rich jinja2"


def imported_modules(nodes: Iterator[ast.AST], package: tuple[str, ...] = ()) -> Iterator[str]:
    """Absolute names of all that ``nodes``, from a module of ``package``, import."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from fastface_lightning import x` and `from .. import x` name a part or its content.
            if module == PACKAGE.name:
                yield from (f"{module}.{alias.name}" for alias in node.names)
            else:
                yield module


def all_imports(file: Path) -> set[str]:
    """Names that ``file`` imports anywhere: at its top, in functions, under TYPE_CHECKING."""
    package = file.relative_to(ROOT).parent.parts
    return set(imported_modules(ast.walk(ast.parse(file.read_text(encoding="utf-8"))), package))


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).with_suffix("").parts[0]


def test_imports_go_one_way() -> None:
    files = sorted(PACKAGE.rglob("*.py"))
    assert {part_of(file) for file in files} == set(MAY_IMPORT), "a part without a row, or none"
    wrong = [
        f"{file.relative_to(PACKAGE)} imports {name}"
        for file in files
        for name in sorted(all_imports(file))
        if name.split(".")[0] == PACKAGE.name
        and name.split(".")[1] not in {part_of(file), *MAY_IMPORT[part_of(file)].split()}
    ]
    assert not wrong, "\n".join(wrong)


def test_relative_imports_are_resolved() -> None:
    # The check above is worth nothing if it cannot read these.
    text = "def f():\n from ..files import a\n from .base import b\n from .. import optim\n"
    names = set(imported_modules(ast.walk(ast.parse(text)), ("fastface_lightning", "margins")))
    assert names == {f"fastface_lightning.{name}" for name in ("files", "margins.base", "optim")}


@pytest.mark.parametrize("file", [PACKAGE / "cli.py", *PROGRAMS], ids=lambda file: file.name)
def test_programs_start_with_hydra_alone(file: Path) -> None:
    """So that ``--help`` and a wrong key are answered before torch has loaded."""
    top = imported_modules(iter(ast.parse(file.read_text(encoding="utf-8")).body), (PACKAGE.name,))
    allowed = {*sys.stdlib_module_names, "hydra", "omegaconf", "fastface_lightning.cli"}
    heavy = [name for name in top if name not in allowed and name.split(".")[0] not in allowed]
    assert not heavy


def test_the_declared_dependencies_are_those_imported() -> None:
    project = pytest.importorskip("tomllib", reason="Python 3.11").loads(
        (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    )["project"]
    extras = project["optional-dependencies"]
    declared = {
        re.split(r"[^\w.-]", line)[0]
        for line in sum(map(extras.get, ("align", "export")), project["dependencies"])
    }
    modules = {
        name.split(".")[0]
        for file in [*PACKAGE.rglob("*.py"), *PROGRAMS]
        for name in all_imports(file)
    } - {*sys.stdlib_module_names, PACKAGE.name}
    distributions = packages_distributions()
    assert {distributions[name][0].lower().replace("_", "-") for name in modules} == declared


def fresh(program: str) -> str:
    """Standard output of ``program`` in an interpreter that has imported nothing yet."""
    command = [sys.executable, "-c", program]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def newly_imported(statements: str, first: str = "") -> set[str]:
    """Top-level modules that ``statements`` load in a fresh interpreter, ``first`` being loaded."""
    return set(
        fresh(
            f"import sys\n{first}\nbefore = set(sys.modules)\n{statements}\n"
            "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
        ).split()
    )


def test_schedules_alone_need_no_torch() -> None:
    loaded = newly_imported("from fastface_lightning import AutoWU, FastFace, MHLR, replay")
    assert loaded <= {*sys.stdlib_module_names, PACKAGE.name}


@pytest.mark.slow
def test_the_torch_scheduler_needs_no_lightning() -> None:
    loaded = newly_imported("from fastface_lightning import FastFaceLR")
    assert not loaded & {"lightning", "torchmetrics", *FACES_ALONE.split()}


def test_cli_loads_hydra_alone() -> None:
    loaded = newly_imported("import fastface_lightning.cli")
    assert not loaded & {"torch", "lightning", "numpy", *FACES_ALONE.split()} - {
        "hydra",
        "omegaconf",
    }


@pytest.mark.slow
def test_the_callback_needs_torch_and_lightning_alone() -> None:
    """Lightning takes some of the others where it finds them, so they are hidden after it; .ci/run
    tries an environment without them."""
    program = f"""
import sys, time
import lightning.pytorch as L
sys.modules.update(dict.fromkeys({FACES_ALONE.split()}))  # None: an import of it fails
start = time.perf_counter()
from fastface_lightning import MHLR, FastFace, FastFaceCallback, FastFaceLR, WeightAverage, replay
print(time.perf_counter() - start)
import torch
optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
scheduler = FastFaceLR(optimizer, total_steps=50)
callbacks = [FastFaceCallback(MHLR()), WeightAverage()]
L.Trainer(callbacks=callbacks, logger=False, enable_checkpointing=False)
assert replay([1.0] * 500, FastFace(), total_steps=500, lr=0.1)
"""
    assert float(fresh(program)) < 0.1, "seconds above `import lightning.pytorch`"
