"""Programs run in the test's own process, and in others that need not import everything anew."""

import atexit
import importlib.util
import io
import logging
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
# A run of train.py in seconds: 4 steps an epoch.
SMALL = [
    *("data.num_identities=8", "data.images_per_identity=4", "data.batch_size=8"),
    *("data.verify_identities=6", "data.verify_pairs=20", "trainer.enable_progress_bar=false"),
]


# What takes a program seconds to import.
PRELOAD = [
    *("torch.distributed", "lightning.pytorch", "torchmetrics", "timm", "pytest"),
    *("fastface_lightning.training.module", "fastface_lightning.training.run_folder"),
]


def apart(words: list[str], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """``python WORDS`` in a folder, in a session of its own and with one torch thread: forked from
    a process that has imported :data:`PRELOAD` and done nothing else.

    It finds the modules that Python would find: not those of the tests, but for a PYTHONPATH.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    environment = {**os.environ, **variables}
    environment.pop("HYDRA_FULL_ERROR", None)
    with tempfile.TemporaryDirectory() as said:
        process = context.Process(target=_become, args=(words, folder, environment, said))
        process.start()
        try:
            process.join()
        except BaseException:  # as by Ctrl-C
            process.kill()
            raise
        out, err = (Path(said, name).read_text() for name in ("1", "2"))
    assert process.exitcode is not None
    return subprocess.CompletedProcess(words, process.exitcode, out, err)


def _become(words: list[str], folder: Path, environment: dict[str, str], said: str) -> None:
    multiprocessing.set_start_method(None, force=True)  # not a fork server in its turn
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for number in (1, 2):
        os.dup2(os.open(Path(said, str(number)), os.O_WRONLY | os.O_CREAT), number)
    streams = (io.FileIO(number, "w", closefd=False) for number in (1, 2))
    sys.stdout, sys.stderr = (io.TextIOWrapper(each, line_buffering=True) for each in streams)
    torch.set_num_threads(1)
    sys.argv = [str(Path(folder, words[0])), *words[1:]]
    given = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    others = [path for path in sys.path if not Path(path).resolve().is_relative_to(TESTS)]
    sys.path[:] = [str(Path(sys.argv[0]).parent), *given, *others]
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()


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
