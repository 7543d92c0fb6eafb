"""Train a face recogniser: ``python train.py model=r100 data=webface12m``; ``--help`` says more."""

from __future__ import annotations

import logging
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from fastface_lightning.cli import check_numbers, confirm, program

if TYPE_CHECKING:
    from fastface_lightning.training.interrupts import EndOnSignal

log = logging.getLogger(__name__)
CONF = Path(__file__).resolve().parent / "conf"
LEAST = {  # numbers, and how small they may be
    **dict.fromkeys(("seed", "data.num_workers", "averaging.window", "averaging.decay"), 0),
    **dict.fromkeys(("optimizer.lr", "optimizer.weight_decay", "optimizer.momentum"), 0),
    "optimizer.layer_decay": 0,
    **dict.fromkeys(("classifier.lr", "classifier.scale", "trainer.gradient_clip_val"), 0),
    **dict.fromkeys(("data.batch_size", "trainer.accumulate_grad_batches"), 1),
    **dict.fromkeys(("verify.every_n_steps", "verify.every_n_epochs"), 1),
    **dict.fromkeys(("checkpoint.every_n_steps", "averaging.every_n_steps"), 1),
    **dict.fromkeys(("trainer.max_steps", "trainer.max_epochs"), -1),
}


@program(config_path=CONF, config_name="train", resumes=True)
def main(cfg: DictConfig) -> float | None:
    """Train, verify and leave a record in the run folder; returns the verification accuracy."""
    # What takes seconds to import waits until there is something to do: --help comes at once.
    from fastface_lightning.training import run_folder
    from fastface_lightning.training.console import quiet_console
    from fastface_lightning.training.devices import resolve_device
    from fastface_lightning.training.interrupts import EndOnSignal
    from fastface_lightning.training.loggers import ending_loggers
    from fastface_lightning.training.plan import plan_run

    folder = Path(HydraConfig.get().runtime.output_dir)
    overrides = [text for text in HydraConfig.get().overrides.task if text[:7] != "resume="]
    check_numbers(cfg, LEAST)
    checkpoint = run_folder.checkpoint_to_resume(cfg, folder)
    if cfg.resume == "auto" and checkpoint is None:
        named = any(text.startswith(("data", "+paper=")) for text in overrides)
        if not named and not (folder / "overrides.yaml").is_file():  # it would not be that run
            raise ValueError(
                f"resume=auto finds no run in {folder}, and a new one must name its data: data=NAME"
            )
        confirm(f"resume=auto finds no checkpoint in {folder}: a new run begins there")
    resolve_device(cfg)
    if cfg.plan is not False and cfg.plan is not None:  # 0 is a mistake, not a no
        plan_run(cfg, folder)
        return None
    with quiet_console(), EndOnSignal() as signals, run_folder.in_use(folder), ending_loggers():
        accuracy = train(cfg, folder, checkpoint, overrides, signals)
    if signals.code:
        go_on = shlex.join([f"hydra.run.dir={folder}", "resume=auto"])
        log.info("go on: python %s %s", shlex.quote(sys.argv[0]), go_on)
        sys.exit(signals.code)
    return accuracy


def train(
    cfg: DictConfig,
    folder: Path,
    checkpoint: Path | None,
    overrides: list[str],
    signals: EndOnSignal,
) -> float | None:
    """The run itself, from its data to its report."""
    from lightning.pytorch import seed_everything

    from fastface_lightning.backbones.weights import read_file
    from fastface_lightning.data import ARCFACE_POINTS, People
    from fastface_lightning.data.datasets.sample import common_size, sample_of
    from fastface_lightning.data.formats.names import write_names
    from fastface_lightning.preprocessing import IMAGE_SHAPE
    from fastface_lightning.report.figures import summary
    from fastface_lightning.report.image_grid import plot_faces
    from fastface_lightning.training import run_folder
    from fastface_lightning.training.build import build_module, build_trainer, instantiate
    from fastface_lightning.training.run_record import RunRecord

    config: Any = OmegaConf.to_container(cfg, resolve=True)
    record = RunRecord(folder, config, resumed=checkpoint is not None)
    seed_everything(cfg.seed, workers=True, verbose=False)

    data, schedule = instantiate(cfg.data), instantiate(cfg.schedule)
    saved = run_folder.read_checkpoint(checkpoint) if checkpoint else None
    if saved:
        data.earlier = saved.people.earlier
    elif cfg.weights and (known := People.in_checkpoint(read_file(cfg.weights))):
        data.earlier = [*known.trained, *known.earlier]
    data.setup("fit")
    say_counts(data.counts())
    module = build_module(cfg, data, schedule, saved.config.get("model", {}) if saved else None)
    if architecture := getattr(module.backbone, "architecture", None):
        config["model"]["architecture"] = architecture  # a checkpoint loads without its source
    module.build_optimizer()  # what it refuses is refused before anything slow
    if cfg.weights and checkpoint is None:
        module.start_from(cfg.weights, cfg.classifier.reinit, data.people.trained)
        parts = "backbone" if cfg.classifier.reinit else "backbone and class centres"
        log.info("the run starts with the %s of %s", parts, cfg.weights)
    if saved:
        run_folder.check_checkpoint(saved, module, data.people)
        if changed := run_folder.changed_settings(saved.config, config):
            log.info("from here on %s", "; ".join(changed))
    resume_step = saved.step if saved else 0
    data.train_dataloader()  # refuses a batch that is too large before anything slow
    trainer = build_trainer(cfg, folder, schedule, record, resume_step, signals)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if str(getattr(callback, "monitor", "")).startswith("verify/") and not data.verify_names:
            raise ValueError(
                f"{type(callback).__name__} watches {callback.monitor} and needs people to verify "
                f"on, data.held_out or data.verify, got none"
            )

    settings_before = run_folder.read_settings(folder)
    settings = OmegaConf.to_yaml(cfg, resolve=True), OmegaConf.to_yaml(overrides)
    run_folder.write_settings(folder, *settings)
    if trainer.is_global_zero:
        write_names(folder / "identities.txt", data.train_set.identities)
        if checkpoint is None:
            plot_faces(folder / "samples.png", *sample_of(data.train_set), ARCFACE_POINTS)
            height, width = common_size(data.train_set)
            if {height, width} - {0, *IMAGE_SHAPE[1:]}:
                text = "images are %d x %d and resized: are they aligned? See samples.png"
                log.warning(text, width, height)

    if not data.verify_names:
        log.info("this data has no verification pairs: the run is not verified")
    elif checkpoint is None:
        log.info("verifying the network before it is trained")
        trainer.validate(module, data, verbose=False)
    try:
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    except Exception:
        if checkpoint and trainer.global_step <= resume_step:  # refused: the run stays as it was
            run_folder.write_settings(folder, *settings_before)
        raise
    if data.verify_names and not signals.code:
        if record.verified_step != trainer.global_step:
            trainer.validate(module, data, verbose=False)
        record.verify_raw(trainer, module, data)
    results = record.write(trainer, bool(signals.code))
    if trainer.is_global_zero:
        how = "was interrupted" if signals.code else "has ended"
        if resume_step and trainer.global_step == resume_step and not signals.code:
            how = "had done all its steps, which trainer.max_epochs or max_steps prolong"
        log.info("the run %s\n%s", how, summary(results, folder))
    accuracies = [verified["accuracy"] for verified in results["verification"].values()]
    return sum(accuracies) / len(accuracies) if accuracies and None not in accuracies else None


def say_counts(counts: dict[str, int]) -> None:
    """What there is to train on and to verify on."""
    people, images, held_out = (counts[key] for key in ("identities", "images", "held_out"))
    said = f"{people:,} people, {images:,} images to train on"
    if held_out:
        said += f"; {held_out:,} people, {counts['held_out_images']:,} images held out to verify on"
    if counts["single"]:
        said += f"; {counts['single']:,} of those trained on have one image"
    log.info(said)


if __name__ == "__main__":
    main()
