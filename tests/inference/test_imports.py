"""An ONNX model is a function without what trains it: what loading one imports."""

import subprocess
import sys
from pathlib import Path

import pytest
from models import FLOATS, onnx_file
from programs import ROOT

HEAVY = {"lightning", "torchmetrics", "timm", "torchvision", "hydra", "matplotlib"}
OWN = {f"fastface_lightning.{part}" for part in ("classifiers", "training", "report")}


def modules_after(statements: str) -> set[str]:
    """What a fresh interpreter has imported after ``statements``."""
    program = f"import sys\n{statements}\nprint(*sys.modules)"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.split())


def test_an_onnx_embeds_without_what_trains_a_model(tmp_path: Path) -> None:
    file = onnx_file(tmp_path / "model.onnx", [FLOATS])
    modules = modules_after(
        "import torch\nfrom fastface_lightning import load_embedder\n"
        f"embed = load_embedder({str(file)!r})\n"
        "assert embed(torch.zeros(2, 3, 112, 112, dtype=torch.uint8)).shape == (2, 3)"
    )
    assert "onnxruntime" in modules
    assert not modules & (HEAVY | OWN)


@pytest.mark.slow
def test_weights_embed_without_lightning() -> None:
    modules = modules_after("import fastface_lightning.inference.torch_embedder")
    assert not modules & (OWN | {"lightning", "torchmetrics", "hydra"})


@pytest.mark.slow
@pytest.mark.parametrize("program", ["evaluate", "export", "embed"])
def test_a_program_imports_its_work_when_it_runs(program: str) -> None:
    """So that --help is quick: at first it loads no more than every program does."""
    modules = modules_after(f"sys.path.insert(0, 'recipes')\nimport {program}")
    added = modules - modules_after("import fastface_lightning.cli")
    assert not added & (HEAVY | OWN | {"torch", "rich", "fastface_lightning.inference"})
