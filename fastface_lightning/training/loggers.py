"""What loggers are told of a run besides its metrics: settings and figures, where it goes on."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import (
    CSVLogger,
    Logger,
    MLFlowLogger,
    TensorBoardLogger,
    WandbLogger,
)
from PIL import Image

from ..files import reason, write_text

EXTRAS = ("tensorboard", "wandb", "mlflow")  # loggers that need one of their own name
RUN_ID = ("id", "run_id")  # what wandb's and MLflow's loggers call the run there
KEPT = "loggers.json"  # in a run folder: by logger the run there


def kept_ids(folder: Path) -> dict[str, str]:
    """By logger the run there that a run folder belongs to."""
    file = folder / KEPT
    return json.loads(file.read_text()) if file.is_file() else {}


def log_settings(
    loggers: Sequence[Logger], folder: Path, config: Mapping[str, Any], resumed: bool
) -> None:
    """Begin a run at its loggers with what it was composed of, and keep which run it is there.

    Args:
        loggers: of the first rank, in the order of ``config["logger"]``.
        folder: the run folder.
        config: plain data; its ``config.yaml`` is beside ``metrics.csv`` already.
        resumed: whether the run goes on. MLflow's parameters never change.

    Raises:
        ValueError: a logger cannot begin.
    """
    ids, kept = {}, kept_ids(folder)
    for (name, setting), logger in zip(config["logger"].items(), loggers, strict=True):
        try:
            goes_on = resumed and (name in kept or setting.get("run_id"))
            has_them = isinstance(logger, CSVLogger)
            if not (has_them or (goes_on and isinstance(logger, MLFlowLogger))):
                logger.log_hyperparams(dict(config))
            if any(key in setting for key in RUN_ID):
                ids[name] = logger.version
        except Exception as error:  # no login, no server, no such run: they share no base class
            raise ValueError(f"logger={name} cannot begin: {reason(error)}") from error
    if ids:
        write_text(folder / KEPT, json.dumps(ids) + "\n")


def log_figures(loggers: Sequence[Logger], folder: Path, step: int) -> None:
    """Give the images in a run folder to the loggers that take images."""
    for file in sorted(folder.glob("*.png")):
        for logger in loggers:
            if isinstance(logger, TensorBoardLogger):
                with Image.open(file) as image:
                    pixels = np.asarray(image.convert("RGB"))
                logger.experiment.add_image(file.stem, pixels, step, dataformats="HWC")
                logger.experiment.flush()
            elif isinstance(logger, WandbLogger):
                logger.log_image(file.stem, [str(file)], step)
            elif isinstance(logger, MLFlowLogger):
                logger.experiment.log_artifact(logger.run_id, str(file))


@contextmanager
def ending_loggers() -> Iterator[None]:
    """Within it wandb's and MLflow's errors become one sentence, and after it nothing goes on at
    wandb, where the next run of a sweep would be taken for this.

    Raises:
        ValueError: in the place of wandb's and MLflow's own errors: no login, no server.
    """
    code = 1
    try:
        yield
        code = 0
    except Exception as error:
        package = type(error).__module__.partition(".")[0]
        if package in ("wandb", "mlflow"):
            raise ValueError(f"logger={package} failed: {reason(error)}") from error
        raise
    finally:
        if wandb := sys.modules.get("wandb"):
            wandb.finish(code)
