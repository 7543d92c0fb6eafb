"""Train a face recogniser: ``python train.py model=r100 data=webface12m``; ``--help`` says more."""

from __future__ import annotations

import functools
import json
import logging
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import Callback, LearningRateMonitor
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch import nn

from fastface_lightning import FastFaceCallback
from fastface_lightning.classifiers import Classifier, MomentumClassifier, chunk_that_fits
from fastface_lightning.cli import check_numbers, program, torch_schedule
from fastface_lightning.data import ARCFACE_POINTS, FaceDataModule
from fastface_lightning.data.datasets.sample import sample_of
from fastface_lightning.data.formats.names import write_names
from fastface_lightning.files import write_text
from fastface_lightning.report.figures import print_plan, print_summary
from fastface_lightning.report.image_grid import plot_faces
from fastface_lightning.schedule import PlateauSchedule
from fastface_lightning.training.module import FaceModule, check_sparse, moves_rows
from fastface_lightning.training.plan import (
    CARD_RESERVE,
    UNPLANNED,
    peak,
    plan_backbone,
    plan_classifier,
    together,
)
from fastface_lightning.training.run_record import (
    OneRun,
    ResumableCSVLogger,
    RunRecord,
    device_name,
    memory_of,
)
from fastface_lightning.training.seeding import SeededBatches

log = logging.getLogger(__name__)
HERE = Path(__file__).resolve().parent
# 30 hours for the 4,772 PFLOP of the paper's r100 on WebFace12M, five epochs on one RTX 4090.
PAPER_FLOPS_PER_SECOND = 44.2e12

NUMBERS = (
    *("seed", "plan", "data.batch_size", "data.num_workers", "optimizer.lr", "classifier.lr"),
    *("checkpoint.every_n_steps", "verify.every_n_steps", "verify.every_n_epochs"),
    *("trainer.max_steps", "trainer.max_epochs", "trainer.accumulate_grad_batches"),
)


@program(config_path=HERE / "conf", config_name="train")
def main(cfg: DictConfig) -> float | None:
    """Train, verify and leave a record in the run folder; returns the verification accuracy."""
    folder = Path(HydraConfig.get().runtime.output_dir)
    cfg, overrides = with_earlier_overrides(cfg, folder)
    check_numbers(cfg, *NUMBERS)
    checkpoint = checkpoint_to_resume(cfg, folder)
    resolve_device(cfg)
    if cfg.plan is not False and cfg.plan is not None:  # 0 is a mistake, not a no
        plan_run(cfg, folder)
        return None
    config: Any = OmegaConf.to_container(cfg, resolve=True)
    record = RunRecord(folder, config)
    seed_everything(cfg.seed, workers=True, verbose=False)

    data: FaceDataModule = instantiate(cfg.data)
    data.setup("fit")
    # torch's schedulers are built with the optimizer, once the run's length is known.
    schedule = None if cfg.schedule.get("_partial_") else instantiate(cfg.schedule)
    module = build_module(cfg, data, schedule)
    feed(data, module.classifier)
    if cfg.weights and checkpoint is None:
        module.start_from(cfg.weights, cfg.classifier.reinit)
    resume_step = check_checkpoint(checkpoint, module) if checkpoint else 0
    data.train_dataloader()  # refuses a batch that is too large before anything slow
    settings_before = settings_of(folder)
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        save_settings(folder, OmegaConf.to_yaml(cfg, resolve=True), OmegaConf.to_yaml(overrides))
        write_names(folder / "identities.txt", data.train_set.identities)
        if checkpoint is None:
            plot_faces(folder / "samples.png", *sample_of(data.train_set), ARCFACE_POINTS)
    record.train_set = data.train_set
    trainer = build_trainer(cfg, folder, schedule, record, resume_step)

    if not data.verify_names:
        log.info("this data has no verification pairs: the run is not verified")
    elif checkpoint is None:
        log.info("verifying the untrained network")
        trainer.validate(module, data, verbose=False)
        record.untrained = dict(record.accuracy)
    try:
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    except Exception:
        if checkpoint and trainer.global_step <= resume_step:  # refused: the run stays as it was
            save_settings(folder, *settings_before)
        raise
    if data.verify_names and record.verified_step != trainer.global_step:
        trainer.validate(module, data, verbose=False)
    results = record.write(trainer)
    if trainer.is_global_zero:
        print_summary(results, folder)
    accuracies = [found["accuracy"] for found in results["verification"].values()]
    return sum(accuracies) / len(accuracies) if accuracies else None


SETTINGS = ("config.yaml", "overrides.yaml")


def settings_of(folder: Path) -> list[str]:
    """What a run was composed of, and the overrides that it was started with, as text."""
    return [(folder / name).read_text() if (folder / name).is_file() else "" for name in SETTINGS]


@rank_zero_only
def save_settings(folder: Path, *texts: str) -> None:
    """Write what :func:`settings_of` reads, and at a resume other ranks do, at any moment."""
    for name, text in zip(SETTINGS, texts, strict=True):
        write_text(folder / name, text)


def with_earlier_overrides(cfg: DictConfig, folder: Path) -> tuple[DictConfig, list[str]]:
    """What the run was started with, and over it what this command says.

    Returns:
        The config, and the overrides it is composed of.
    """
    overrides = list(HydraConfig.get().overrides.task)
    earlier = folder / "overrides.yaml"
    if cfg.resume == "auto" and earlier.exists():
        both = [*OmegaConf.load(earlier), *overrides]
        overrides = list({text.partition("=")[0]: text for text in both}.values())
        cfg = compose("train", overrides)
    return cfg, [text for text in overrides if not text.startswith("resume=")]


def build_module(
    cfg: DictConfig, data: FaceDataModule, schedule: PlateauSchedule | None
) -> FaceModule:
    """The network, its classifier and its optimizer; a torch schedule comes with the optimizer."""
    return FaceModule(
        instantiate(cfg.model),
        build_classifier(cfg, data.num_classes),
        instantiate(cfg.optimizer),
        functools.partial(torch_schedule, cfg) if schedule is None else None,
        data.verify_names,
        cfg.classifier.lr,
        instantiate(cfg.augment),
    )


def feed(data: FaceDataModule, classifier: nn.Module) -> None:
    """Let the data come in the batches that a classifier trains on."""
    data.batches = getattr(classifier, "batches", "images")
    if isinstance(classifier, MomentumClassifier):
        classifier.check_batch_size(data.batch_size)  # at least: of one rank
        log.info("%s of %s", type(classifier).__name__, classifier.extra_repr())
        data.keys = getattr(classifier, "keys", data.keys)


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


def plan_run(cfg: DictConfig, folder: Path) -> None:
    """Print what the run will hold and compute, with every kind of classifier; train nothing."""
    if not 0 < cfg.plan < float("inf"):
        raise ValueError(f"plan must be true or a card's memory in GiB, got {cfg.plan}")
    if cfg.trainer.strategy not in ("auto", "single_device") or cfg.trainer.devices not in (1, "1"):
        raise ValueError(
            f"a plan is of one device, got trainer.strategy={cfg.trainer.strategy} and "
            f"trainer.devices={cfg.trainer.devices}"
        )
    num_classes, num_images = data_size(cfg)
    device = torch.device("cuda" if uses_cuda(cfg) or cfg.plan is not True else "cpu")
    capacity = memory_of(device) if cfg.plan is True else int(cfg.plan * 2**30)
    reserve = CARD_RESERVE if device.type == "cuda" else 0
    batch, make = cfg.data.batch_size, instantiate(cfg.optimizer)
    # Where a tensor's numbers lie does not change what is held; what a compiler saves is unknown.
    off = {"channels_last": False, "compile": False, "pretrained": False}
    model = {**cfg.model, **{key: value for key, value in off.items() if key in cfg.model}}
    heads = {}
    kinds = classifier_kinds(cfg)
    for kind, classifier in kinds.items():
        if "chunk" in classifier and classifier.chunk is None:
            classifier.chunk = chunk_that_fits(batch, cfg.model.embedding_size, device)
        build = functools.partial(build_classifier, cfg, num_classes, classifier)
        try:
            heads[kind] = plan_classifier(build, make, batch, cfg.model.embedding_size, num_classes)
        except ValueError as error:  # too few identities, or too large a batch
            if not heads:
                raise
            log.info("classifier=%s cannot be planned: %s", kind, error)
    this = next(iter(heads))
    own = heads[this].images
    backbone = plan_backbone(lambda: instantiate(model), make, own, cfg.trainer.precision)
    outcomes = {}
    for kind, alone in heads.items():
        network, head = together(backbone, alone)
        most = peak(network, head, cfg.trainer.accumulate_grad_batches) + reserve
        outcomes[kind] = {
            **head._asdict(),
            "chunk": kinds[kind].get("chunk"),
            "peak": most,
            "fits": UNPLANNED * most <= capacity,
        }
    batches = planned_batches(cfg, num_images)
    flops = (backbone.flops + outcomes[this]["flops"]) * batches
    plan = {
        "model": cfg.model.name,
        "num_classes": num_classes,
        "batch_size": batch,
        "precision": cfg.trainer.precision,
        "classifier": this,
        "backbone": backbone._asdict(),
        "heads": outcomes,
        "device": device_name(device) if cfg.plan is True else "a card",
        "capacity": capacity,
        "reserve": reserve,
        "batches": batches,
        "flops": flops,
        "hours": flops / PAPER_FLOPS_PER_SECOND / 3600,
    }
    (folder / "plan.json").write_text(json.dumps(plan, indent=2) + "\n")
    print_plan(plan)


def planned_batches(cfg: DictConfig, num_images: int) -> int:
    """Batches of the whole run, by its epochs or its optimizer steps, whichever end first."""
    epochs, steps = cfg.trainer.max_epochs, cfg.trainer.max_steps
    ends = []
    if epochs is not None and epochs >= 0:
        ends.append(num_images // cfg.data.batch_size * epochs)
    if steps >= 0:
        ends.append(steps * cfg.trainer.accumulate_grad_batches)
    if not ends:
        raise ValueError(
            f"a plan needs the length of the run, trainer.max_epochs or trainer.max_steps, "
            f"got {epochs} and {steps}"
        )
    return min(ends)


def data_size(cfg: DictConfig) -> tuple[int, int]:
    """Identities and images: of the data where they are, else what the config says of them."""
    if "images_per_identity" in cfg.data:  # drawn only when they are needed
        return cfg.data.num_identities, cfg.data.num_identities * cfg.data.images_per_identity
    if cfg.data.get("num_images") and not Path(cfg.data.root).exists():
        share = 1 - cfg.data.get("held_out", 0)
        return round(share * cfg.data.num_identities), round(share * cfg.data.num_images)
    data: FaceDataModule = instantiate(cfg.data)
    data.setup("fit")
    return data.num_classes, len(data.train_set)


def classifier_kinds(cfg: DictConfig) -> dict[str, Any]:
    """The run's own classifier first, then the other kinds that its optimizer can train."""
    this = HydraConfig.get().runtime.choices["classifier"]
    kinds: dict[str, Any] = {this: cfg.classifier}
    optimizer = instantiate(cfg.optimizer)([torch.nn.Parameter(torch.zeros(1))])
    check_sparse(cfg.classifier.get("rate", 1) < 1, optimizer)
    if cfg.classifier.get("chunk"):
        kinds[f"{this} classifier.chunk=null"] = OmegaConf.merge(cfg.classifier, {"chunk": None})
    for file in sorted((HERE / "conf" / "classifier").glob("*.yaml")):
        other = OmegaConf.load(file)
        other.scale = cfg.classifier.scale
        kinds.setdefault(file.stem, other)
    sparse = moves_rows(optimizer)
    return {
        kind: config
        for kind, config in kinds.items()
        if kind == this or sparse or "rate" not in config
    }


def build_trainer(
    cfg: DictConfig,
    folder: Path,
    schedule: PlateauSchedule | None,
    record: RunRecord,
    resume_step: int,
) -> Trainer:
    """The trainer with everything that watches the run."""
    callbacks: list[Callback] = [instantiate(callback) for callback in cfg.callbacks.values()]
    loggers = [instantiate(logger) for logger in cfg.logger.values()]
    verify = {"check_val_every_n_epoch": cfg.verify.every_n_epochs}
    if cfg.verify.every_n_steps is not None:
        batches = cfg.verify.every_n_steps * cfg.trainer.accumulate_grad_batches
        verify = {"check_val_every_n_epoch": None, "val_check_interval": batches}
    for logger in loggers:
        if isinstance(logger, ResumableCSVLogger):
            logger.resume_step = resume_step
    if schedule is not None:
        callbacks.append(FastFaceCallback(schedule))
    elif loggers:
        callbacks.append(LearningRateMonitor(logging_interval="step"))
    return instantiate(
        cfg.trainer,
        callbacks=[OneRun(folder, resume_step), SeededBatches(cfg.seed), *callbacks, record],
        logger=loggers or False,
        default_root_dir=str(folder),
        **verify,
        **loss_scaling(cfg),
    )


def uses_cuda(cfg: DictConfig) -> bool:
    """Whether the trainer will choose a CUDA device."""
    return torch.cuda.is_available() and cfg.trainer.accelerator in ("auto", "gpu", "cuda")


def resolve_device(cfg: DictConfig) -> None:
    """Replace the settings that say ``auto`` by what the device is good at."""
    # A plan for a card that is elsewhere is made here.
    cuda = uses_cuda(cfg) or (bool(cfg.plan) and cfg.plan is not True)
    if uses_cuda(cfg):
        torch.set_float32_matmul_precision("high")
    if cfg.model.channels_last == "auto":
        cfg.model.channels_last = cuda
    if cfg.trainer.precision == "auto":
        half = "bf16-mixed" if cfg.plan or torch.cuda.is_bf16_supported(False) else "16-mixed"
        cfg.trainer.precision = half if cuda else "32-true"
    if cfg.trainer.benchmark is None:
        cfg.trainer.benchmark = cuda
    if cfg.optimizer.get("fused") == "auto":
        clipped = cfg.trainer.precision == "16-mixed" and cfg.trainer.gradient_clip_val
        cfg.optimizer.fused = not clipped


def loss_scaling(cfg: DictConfig) -> dict[str, Any]:
    """The paper's loss scaler for float16: it grows every 100 steps, not every 2000."""
    if cfg.trainer.precision != "16-mixed" or not uses_cuda(cfg):
        return {}
    scaler = torch.amp.GradScaler("cuda", growth_interval=100)
    return {"plugins": MixedPrecision("16-mixed", "cuda", scaler), "precision": None}


def checkpoint_to_resume(cfg: DictConfig, folder: Path) -> Path | None:
    """The checkpoint to go on from, if any; another run in the folder is never overwritten."""
    last = folder / "checkpoints" / "last.ckpt"
    if cfg.classifier.reinit and not cfg.weights:
        raise ValueError("classifier.reinit=true needs weights=FILE, whose backbone it takes")
    if cfg.resume == "auto":
        return last if last.exists() else None
    if cfg.resume is not None and cfg.weights:
        raise ValueError(
            f"a run starts from weights or goes on from resume, got {cfg.weights} and {cfg.resume}"
        )
    checkpoint = None if cfg.resume is None else Path(cfg.resume)
    if checkpoint is not None and not checkpoint.is_file():
        raise ValueError(f"resume must be 'auto' or a checkpoint file, got {checkpoint}")
    held = [
        file for file in (last, folder / "metrics.csv", folder / "results.json") if file.exists()
    ]
    if held and not (checkpoint and last.exists() and checkpoint.samefile(last)):
        raise ValueError(
            f"the run folder must be new, got {folder} with {held[0].name} in it: resume=auto "
            f"goes on with it, another hydra.run.dir starts anew"
        )
    return checkpoint


def check_checkpoint(checkpoint: Path, module: FaceModule) -> int:
    """Optimizer steps done in a checkpoint of the same network.

    Raises:
        ValueError: it is no checkpoint, or another network's.
    """
    try:
        saved = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
        step, weights = saved["global_step"], saved["state_dict"]
    except (RuntimeError, KeyError, TypeError, EOFError, UnpicklingError) as error:
        raise ValueError(f"resume must be a checkpoint of train.py, got {checkpoint}") from error
    for name, tensor in module.state_dict().items():
        if name not in weights or weights[name].shape != tensor.shape:
            found = tuple(weights[name].shape) if name in weights else "nothing"
            raise ValueError(
                f"the checkpoint must be of the same network and data: {name} must be "
                f"{tuple(tensor.shape)}, got {found}; weights=FILE classifier.reinit=true starts "
                f"from its backbone alone"
            )
    groups = len(saved["optimizer_states"][0]["param_groups"])
    if groups != 1 + (module.classifier_lr is not None):
        raise ValueError(
            f"classifier.lr must be set as in the run of the checkpoint, where it was "
            f"{'null' if groups == 1 else 'a number'}, got {module.classifier_lr}"
        )
    return step


if __name__ == "__main__":
    main()
