"""A run's folder holds what it takes to go on: its settings, its overrides, its checkpoints."""

from __future__ import annotations

import fcntl
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig
from torch import Tensor

from ..data import People
from ..files import write_text
from .module import FaceModule

log = logging.getLogger(__name__)
SETTINGS = ("config.yaml", "overrides.yaml")  # what a run was composed to, and of


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Within it no other program can enter the run folder; of ranks the first holds it.

    Raises:
        ValueError: another one has it.
    """
    if getattr(rank_zero_only, "rank", 0):
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        try:
            fcntl.flock(
                lock, fcntl.LOCK_EX | fcntl.LOCK_NB
            )  # of a process that dies it is released
        except BlockingIOError as error:
            raise ValueError(f"the run folder must be of one run, got {folder}, in use") from error
        except OSError as error:
            log.warning("the disk cannot lock %s against a second run: %s", folder, error)
        else:
            for part in (folder / "checkpoints").glob(".*.part.ckpt"):  # of a run that was killed
                part.unlink()
        yield


def read_settings(folder: Path) -> list[str]:
    """The texts of a run's settings files; empty where there are none."""
    return [(folder / name).read_text() if (folder / name).is_file() else "" for name in SETTINGS]


@rank_zero_only
def write_settings(folder: Path, *texts: str) -> None:
    """Write what :func:`read_settings` reads; other ranks of a resumed run may read meanwhile."""
    for name, text in zip(SETTINGS, texts, strict=True):
        write_text(folder / name, text)


def checkpoint_to_resume(cfg: DictConfig, folder: Path) -> Path | None:
    """The checkpoint to go on from, if any.

    Raises:
        ValueError: ``resume`` is no file, or the folder holds another run, which is never
            overwritten.
    """
    last = folder / "checkpoints" / "last.ckpt"
    if cfg.classifier.reinit and not cfg.weights:
        raise ValueError("classifier.reinit=true needs weights=FILE, whose backbone it takes")
    if cfg.resume == "auto":
        return last if last.exists() else None
    checkpoint = None if cfg.resume is None else Path(cfg.resume)
    if checkpoint is not None and not checkpoint.is_file():
        raise ValueError(f"resume must be 'auto' or a checkpoint file, got {checkpoint}")
    leavings = [last, folder / "metrics.csv", folder / "results.json"]
    earlier = next((file.name for file in leavings if file.exists()), None)
    if earlier and not (checkpoint and last.exists() and checkpoint.samefile(last)):
        raise ValueError(
            f"the run folder must be new, got {folder} with {earlier} in it: resume=auto goes on "
            f"with it, another hydra.run.dir starts anew"
        )
    return checkpoint


class Checkpoint(NamedTuple):
    """What a resume asks of a checkpoint: what the run was composed of, optimizer steps done,
    weights, people."""

    config: dict[str, Any]
    step: int
    weights: dict[str, Tensor]
    people: People


def read_checkpoint(file: Path) -> Checkpoint:
    """A checkpoint to go on from; its tensors stay in the file.

    Raises:
        ValueError: it is none of train.py.
    """
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        saved["optimizer"]["groups"]  # which FaceModule compares
        step, weights, people = (
            saved["global_step"],
            saved["state_dict"],
            People.in_checkpoint(saved),
        )
    except (RuntimeError, LookupError, TypeError, EOFError, UnpicklingError) as error:
        raise ValueError(
            f"resume must be a checkpoint of train.py, got {file}: weights=FILE takes its network"
        ) from error
    if people is None:
        raise ValueError(
            f"resume must be a checkpoint that names the people of its run, got {file}: "
            f"weights=FILE takes its network"
        )
    return Checkpoint(saved.get("run", {}).get("config", {}), step, weights, people)


def changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What a resume sets otherwise than the run it goes on with, a phrase each; of the optimizer
    the module says it.

    Raises:
        ValueError: a setting that only a start heeds.
    """
    old, new = _leaves(before), _leaves(now)
    changed = [key for key in old | new if old.get(key) != new.get(key)] if before else []
    for key in sorted({"weights", "classifier.reinit"}.intersection(changed)):
        raise ValueError(
            f"{key} is for the start of a run, got {new.get(key)} for one that goes on"
        )
    own = [key for key in changed if not key.startswith(("optimizer.", "classifier.lr", "resume"))]
    return [f"{key} is {new.get(key)}, was {old.get(key)}" for key in own]


def _leaves(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested mappings, by their keys with dots between."""
    leaves: dict[str, Any] = {}
    for key, value in config.items():
        inside = isinstance(value, Mapping) and value
        leaves |= _leaves(value, f"{prefix}{key}.") if inside else {f"{prefix}{key}": value}
    return leaves


def check_checkpoint(saved: Checkpoint, module: FaceModule, people: People) -> None:
    """Refuse a checkpoint of other people or another network.

    Raises:
        ValueError: names what differs.
    """
    people.check_same(saved.people)
    weights = saved.weights
    for name, tensor in module.state_dict().items():
        if name not in weights or weights[name].shape != tensor.shape:
            shape = tuple(weights[name].shape) if name in weights else "nothing"
            raise ValueError(
                f"the checkpoint must be of the same network and data: {name} must be "
                f"{tuple(tensor.shape)}, got {shape}; weights=FILE classifier.reinit=true starts "
                f"from its backbone alone"
            )
