"""From a run's config to its parts: classifier, module, trainer."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import hydra.utils
from hydra.errors import InstantiationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig
from torch.optim import Optimizer

from ..classifiers import AttentionClassifier, Classifier, MomentumClassifier
from ..data import FaceDataModule
from ..schedule.callback import FastFaceCallback
from ..schedule.fixed import FixedSchedule
from .checkpoints import OneRun, StreamedCheckpoints
from .console import ProgressBar
from .csv_logger import ResumableCSVLogger
from .devices import loss_scaling
from .interrupts import EndOnSignal
from .loggers import EXTRAS, RUN_ID, kept_ids
from .losses import StepLosses
from .module import FaceModule
from .run_record import RunRecord
from .seeding import SeededBatches

log = logging.getLogger(__name__)


def instantiate(config: Any, **settings: Any) -> Any:
    """Hydra's, whose objects get plain lists and dictionaries, as others' code expects them."""
    return hydra.utils.instantiate(config, _convert_="all", **settings)


def build_classifier(
    cfg: DictConfig, num_classes: int, classifier: DictConfig | None = None
) -> Classifier:
    """The run's classifier, or another in its place, from a config whose ``reinit`` and ``lr`` are
    the program's business."""
    config = cfg.classifier if classifier is None else classifier
    return instantiate(
        {key: value for key, value in config.items() if key not in ("reinit", "lr")},
        num_classes=num_classes,
        embedding_size=cfg.model.embedding_size,
        margin=instantiate(cfg.margin),
    )


def build_optimizer(cfg: DictConfig) -> Callable[[Any], Optimizer]:
    """What makes the run's optimizer of parameters, from a config whose ``no_decay`` and
    ``layer_decay`` are FaceModule's business."""
    own = ("no_decay", "layer_decay")
    return instantiate({key: value for key, value in cfg.optimizer.items() if key not in own})


def build_module(
    cfg: DictConfig, data: FaceDataModule, schedule: Any, earlier: Mapping[str, Any] | None = None
) -> FaceModule:
    """The network, its classifier and its optimizer; the data, set up, comes in the classifier's
    batches. A FixedSchedule, of what ``cfg.schedule`` may make, comes with the optimizer.

    A run that goes on has its own weights: with ``earlier``, the model's config in its checkpoint,
    no others are looked up, nor what the model's name stands for.
    """
    known: dict[str, Any] = {}
    if earlier is not None and cfg.model.get("pretrained"):
        known["pretrained"] = False
    if earlier and "architecture" in earlier and earlier["name"] == cfg.model.name:
        known["architecture"] = earlier["architecture"]
    # First: the random numbers of a run have their order.
    backbone = instantiate(cfg.model, **known)
    classifier = build_classifier(cfg, data.num_classes)
    module = FaceModule(
        backbone,
        classifier,
        build_optimizer(cfg),
        schedule if isinstance(schedule, FixedSchedule) else None,
        data.verify_names,
        cfg.classifier.lr,
        cfg.optimizer.get("no_decay", False),
        cfg.optimizer.get("layer_decay"),
        instantiate(cfg.augment),
    )
    if isinstance(classifier, Classifier):  # any other module trains on images and labels
        data.batches = classifier.batches
    if isinstance(classifier, AttentionClassifier):
        data.keys = classifier.keys
    if isinstance(classifier, MomentumClassifier):
        classifier.check_batch_size(data.batch_size)  # at least: of one rank
        log.info("%s of %s", type(classifier).__name__, classifier.extra_repr())
    return module


def build_loggers(cfg: DictConfig, folder: Path, resume_step: int) -> list[Logger]:
    """The run's loggers, which go on where a resumed run does.

    Raises:
        ModuleNotFoundError: the extra of a logger is not installed.
        ValueError: wandb or MLflow refuses its settings.
    """
    ids = kept_ids(folder) if resume_step else {}
    rank, loggers = getattr(rank_zero_only, "rank", 0), []
    for name, config in cfg.logger.items():
        keys = [key for key in RUN_ID if key in config]
        if keys and rank:
            continue  # it would log nothing, but MLflow's makes a database at once
        unset = [key for key in keys if config[key] is None]
        try:
            logger = instantiate(config, **{key: ids[name] for key in unset if name in ids})
        except InstantiationException as error:
            if name in EXTRAS and isinstance(error.__cause__, ModuleNotFoundError):
                text = f"logger={name} needs an extra: pip install -e '.[{name}]'"
                raise ModuleNotFoundError(text) from error
            if keys:  # errors of wandb's and MLflow's own
                raise ValueError(f"logger={name} cannot begin: {error.__cause__}") from error
            raise
        if isinstance(logger, ResumableCSVLogger):
            logger.resume_step = resume_step
        loggers.append(logger)
    return loggers


def build_trainer(
    cfg: DictConfig,
    folder: Path,
    schedule: Any,
    record: RunRecord,
    resume_step: int,
    signals: EndOnSignal | None = None,
) -> Trainer:
    """The trainer with everything that watches the run."""
    callbacks: list[Callback] = [instantiate(callback) for callback in cfg.callbacks.values()]
    loggers = build_loggers(cfg, folder, resume_step)
    if not isinstance(schedule, FixedSchedule):
        callbacks.append(FastFaceCallback(schedule))
    elif loggers:
        callbacks.append(LearningRateMonitor(logging_interval="step"))
    if cfg.averaging:
        callbacks.append(instantiate(cfg.averaging))
    if cfg.trainer.enable_progress_bar:
        callbacks.append(ProgressBar())
    verify = {"check_val_every_n_epoch": cfg.verify.every_n_epochs}
    if cfg.verify.every_n_steps is not None:
        batches = cfg.verify.every_n_steps * cfg.trainer.accumulate_grad_batches
        verify = {"check_val_every_n_epoch": None, "val_check_interval": batches}
    scaling = loss_scaling(cfg)
    return instantiate(
        cfg.trainer,
        plugins=[StreamedCheckpoints(), *scaling],
        precision=None if scaling else cfg.trainer.precision,
        callbacks=[
            *(OneRun(folder, resume_step), SeededBatches(cfg.seed), signals or EndOnSignal()),
            *(StepLosses(folder, cfg.max_nonfinite), *callbacks, record),
        ],
        logger=loggers or False,
        default_root_dir=str(folder),
        **verify,
    )
