"""A command-line program: Hydra's config in, bad input answered in one sentence."""

from __future__ import annotations

import functools
import io
import logging
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, InstantiationException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

log = logging.getLogger(__name__)
Task = Callable[[DictConfig], Any]
BAD_INPUT = (
    ValueError,
    OSError,  # absent files, full disks, places where one may not write
    ModuleNotFoundError,
    HydraException,
    OmegaConfBaseException,
)
RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # Lightning's, in its order


def program(config_path: Path, config_name: str) -> Callable[[Task], Callable[[], None]]:
    """Make a function of a config a program.

    ``key=value`` overrides the config, ``--help`` explains it, ``-m`` sweeps. Bad input ends the
    program with one sentence on stderr and exit code 2; ``HYDRA_FULL_ERROR=1`` shows the traceback
    instead. A sweep goes on past jobs that fail, and leaves ``sweep.json`` and ``sweep.png``.

    Args:
        config_path: folder of configs, absolute.
        config_name: the program's own config in it.
    """

    def decorate(task: Task) -> Callable[[], None]:
        @functools.wraps(task)
        def main() -> None:
            find_recipes(config_path)
            stderr, hydra_stderr = sys.stderr, io.StringIO()
            sweeps: list[Path] = []  # the folder of the sweep, once a job of one has started

            @functools.wraps(task)
            def job(config: DictConfig) -> Any:
                with redirect_stderr(stderr):
                    if HydraConfig.get().mode != RunMode.MULTIRUN:
                        return task(config)
                    sweeps[:] = [Path(HydraConfig.get().sweep.dir)]
                    return sweep_job(task, config)

            error: Exception | None = None
            try:
                # Hydra prints an error in its own way and exits: what it prints is kept back.
                with redirect_stderr(hydra_stderr):
                    hydra.main(str(config_path), config_name, version_base="1.3")(job)()
            except SystemExit as end:
                if end.code != 1 or not isinstance(end.__context__, Exception):
                    raise
                error = end.__context__
            finally:
                if error is None:
                    stderr.write(hydra_stderr.getvalue())
                if sweeps and is_first_rank():  # also when jobs failed, or the sweep was stopped
                    from .report.sweep import report_sweep

                    report_sweep(sweeps[0])
            if error is not None:
                text = sentence(error)
                if text is None:  # a fault of the program
                    raise error
                print(f"error: {text}", file=sys.stderr)
                sys.exit(2)

        return main

    return decorate


def sweep_job(task: Task, config: DictConfig) -> Any:
    """Run a job of a sweep; why it failed is left in its folder, as ``failure.txt``."""
    failure = Path(HydraConfig.get().runtime.output_dir) / "failure.txt"
    if is_first_rank():
        failure.unlink(missing_ok=True)
    try:
        return task(config)
    except BaseException as error:
        answer = sentence(error)
        line = answer or " ".join(f"{type(error).__name__}: {error}".split()).rstrip(":")
        fault = answer is None and isinstance(error, Exception)
        log.error("this job failed: %s", line, exc_info=fault)
        if is_first_rank():
            failure.write_text(line + "\n", encoding="utf-8")
        raise
    finally:
        if is_first_rank():  # a sweep that is killed leaves what its jobs achieved so far
            from .report.sweep import record_jobs

            record_jobs(Path(HydraConfig.get().sweep.dir))


def is_first_rank() -> bool:
    """Whether this process is the only one or the first of those that train together."""
    return next((os.environ[key] for key in RANKS if key in os.environ), "0") == "0"


class Recipes(SearchPathPlugin):
    """Puts ``folder`` on Hydra's search path: its folders are groups, ``+paper=f2c_ms1m``.

    ``hydra.searchpath`` will not do: a config that includes another may not inherit it.
    """

    folder: Path

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        search_path.append("recipes", str(self.folder))


def find_recipes(config_path: Path) -> None:
    """Let commands name the recipes that lie beside a folder of configs, wherever one works."""
    Recipes.folder = config_path.parent / "recipes"
    Plugins.instance().register(Recipes)


def check_numbers(config: DictConfig, *keys: str) -> None:
    """Refuse words where a program itself needs a number."""
    for key in keys:
        value = OmegaConf.select(config, key)
        if value is not None and not isinstance(value, (int, float)):
            raise ValueError(f"{key} must be a number, got {value!r}")


def sentence(error: BaseException) -> str | None:
    """What to tell of bad input, in one line; None of any other error."""
    cause = error
    while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
        cause = cause.__cause__
    # A setting that the object built from it does not know shows as TypeError: at once, or when
    # what is built in two parts (_partial_) gets its last arguments.
    unknown = isinstance(cause, TypeError) and (
        cause is not error or "unexpected keyword argument" in str(cause)
    )
    # Known by its name, since nothing here loads Lightning.
    misconfigured = type(cause).__name__ == "MisconfigurationException"
    if not (isinstance(cause, BAD_INPUT) or unknown or misconfigured):
        return None
    text = str(cause).split("\n    full_key:")[0].split("\nConfig search path:")[0]
    text = text.rpartition("\nValueError: ")[2]  # what a loader's worker died of
    return " ".join(text.split())
