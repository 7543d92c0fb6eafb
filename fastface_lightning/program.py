"""A command-line program: Hydra's config in, bad input answered in one sentence."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.errors import HydraException, InstantiationException
from hydra.plugins.search_path_plugin import SearchPathPlugin
from hydra.types import RunMode
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

Task = Callable[[DictConfig], Any]
BAD_INPUT = (
    ValueError,
    OSError,  # absent files, full disks, places where one may not write
    ModuleNotFoundError,
    MisconfigurationException,
    HydraException,
    OmegaConfBaseException,
)


def program(config_path: Path, config_name: str) -> Callable[[Task], Callable[[], None]]:
    """Make a function of a config a program.

    ``key=value`` overrides the config, ``--help`` explains it, ``-m`` sweeps. Bad input ends the
    program with one sentence on stderr and exit code 2; ``HYDRA_FULL_ERROR=1`` shows the traceback
    instead.

    Args:
        config_path: folder of configs, absolute.
        config_name: the program's own config in it.
    """

    def decorate(task: Task) -> Callable[[], None]:
        traceback_wanted = "HYDRA_FULL_ERROR" in os.environ

        @functools.wraps(task)
        def job(config: DictConfig) -> Any:
            if not traceback_wanted:  # the processes it starts must not take this for a wish
                os.environ.pop("HYDRA_FULL_ERROR", None)
            try:
                return task(config)
            except Exception as error:
                # A sweep goes on with its other jobs, and Hydra raises the error at its end.
                if traceback_wanted or HydraConfig.get().mode == RunMode.MULTIRUN:
                    raise
                stop(error)
            finally:
                os.environ["HYDRA_FULL_ERROR"] = "1"

        @functools.wraps(task)
        def main() -> None:
            find_recipes(config_path)
            os.environ["HYDRA_FULL_ERROR"] = "1"  # else Hydra prints a traceback of its own
            run = hydra.main(str(config_path), config_name, version_base="1.3")
            try:
                run(job)()
            except Exception as error:
                if traceback_wanted:
                    raise
                stop(error)

        return main

    return decorate


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
    """Refuse words where a program itself needs a number.

    Raises:
        ValueError: one of ``keys`` is set to something else.
    """
    for key in keys:
        value = OmegaConf.select(config, key)
        if value is not None and not isinstance(value, (int, float)):
            raise ValueError(f"{key} must be a number, got {value!r}")


def stop(error: Exception) -> NoReturn:
    """End the program for bad input; any other error is a fault of the program and is raised."""
    cause: BaseException = error
    while isinstance(cause, InstantiationException) and cause.__cause__ is not None:
        cause = cause.__cause__
    # A setting that the object built from it does not know shows as TypeError.
    if not isinstance(cause, BAD_INPUT) and not (
        cause is not error and isinstance(cause, TypeError)
    ):
        raise error
    text = str(cause).split("\n    full_key:")[0].split("\nConfig search path:")[0]
    text = text.rpartition("\nValueError: ")[2]  # what a loader's worker died of
    print(f"error: {' '.join(text.split())}", file=sys.stderr)
    sys.exit(2)
