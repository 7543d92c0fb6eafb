"""Programs run in the test's own process."""

import importlib.util
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A run of train.py in seconds: 4 steps an epoch.
SMALL = [
    *("data.num_identities=8", "data.images_per_identity=4", "data.batch_size=8"),
    *("data.verify_identities=6", "data.verify_pairs=20", "trainer.enable_progress_bar=false"),
]


class Ended(NamedTuple):
    code: int
    out: str
    err: str
    folder: Path


Run = Callable[..., Ended]


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"program_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a program in this process, with a run folder of its own."""

    def run(*arguments: str, program: str = "train.py", folder: str = "run") -> Ended:
        monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
        monkeypatch.chdir(tmp_path)
        # Handlers of an earlier test's run write to a stream that its capture has closed.
        monkeypatch.setattr(logging, "raiseExceptions", False)
        run_dir = tmp_path / folder
        argv = [program, *arguments, f"hydra.run.dir={run_dir}"]
        monkeypatch.setattr(sys, "argv", argv)
        code = 0
        try:
            load(ROOT / program).main()
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capfd.readouterr()
        return Ended(code, out, err, run_dir)

    return run
