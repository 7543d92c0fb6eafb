"""The first run on a GPU, in under ten minutes: ``python benchmarks/gpu.py``.

First every classifier beside its twin in float64 on the CPU. Then what a training step of the
recipes takes, network by network and class layer by class layer, its memory beside the plan's, and
what the loader, the trainer and the schedule's callback add. Without a GPU, or with ``--small``,
all of it at a size that takes seconds: its figures say nothing, but that it runs.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import logging
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from common import report
from hydra import compose, initialize_config_dir
from lightning.pytorch import Callback, LightningModule, Trainer
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils.data import DataLoader

from fastface_lightning import FastFaceCallback
from fastface_lightning.backbones import normalise
from fastface_lightning.classifiers import (
    Classifier,
    MomentumClassifier,
    PartialClassifier,
    chunk_that_fits,
)
from fastface_lightning.cli import find_recipes
from fastface_lightning.data import EpochSampler, FaceLoader, RecordDataset, SyntheticFaces
from fastface_lightning.data.formats.recordio_writer import InsightFaceWriter
from fastface_lightning.training.build import (
    build_classifier,
    build_module,
    build_optimizer,
    instantiate,
)
from fastface_lightning.training.devices import loss_scaling, resolve_device
from fastface_lightning.training.environment import memory_of
from fastface_lightning.training.plan import (
    AUTOCAST,
    CUDA_RESERVE,
    HEADROOM,
    PartPlan,
    combined,
    peak,
    plan_backbone,
    plan_classifier,
)

CONF = Path(__file__).resolve().parents[1] / "conf"
RECIPE = "webface12m_r100"  # the paper's; all steps are its, with another network or class layer
MS1MV3, WEBFACE12M, WEBFACE42M = 93_431, 617_970, 2_059_906  # identities
CLASSIFIERS = ("full", "chunked", "partial", "dynamic_pool", "attfc")
SECONDS = 480  # after which nothing new is begun
GIB = 2**30
NETWORKS: dict[tuple[str, int], PartPlan] = {}  # planned so far, by name and images


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--small", action="store_true", help="seconds, as where there is no GPU")
    small, begun = parser.parse_args().small or not torch.cuda.is_available(), time.perf_counter()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    sizes = [60] if small else [WEBFACE12M, MS1MV3, WEBFACE42M]
    networks = ["tiny"] if small else ["r100", "r50", "r18"]
    cases = [(network, "chunked", size) for network in networks for size in sizes]
    others = ["chunked classifier.products=bfloat16", "partial", "dynamic_pool", "attfc"]
    if not small:
        others += ["chunked classifier.compile=true", "chunked classifier.chunk=16384"]
    cases += [(networks[-1], other, sizes[0]) for other in others]

    errors = {name: apart(name, device, small) for name in CLASSIFIERS}
    print("gradients beside float64's:", {k: f"{error:.1e}" for k, error in errors.items()})
    rows: list[dict[str, Any]] = []
    left_out: dict[str, str] = {}
    for case in cases:
        if time.perf_counter() - begun > SECONDS:
            left_out[str(case)] = "no time left"
            continue
        try:
            row = dict(zip(("network", "classifier", "identities"), case, strict=True))
            rows.append(row | measured(composed(*case[:2], device, small), case[2], device))
            print(case, f"{rows[-1]['ms a step']:.1f} ms", flush=True)
        except (MemoryError, torch.cuda.OutOfMemoryError) as error:
            left_out[str(case)] = str(error).partition("\n")[0]
        gc.collect()
        torch.cuda.empty_cache()
    cfg = composed(*cases[0][:2], device, small)
    tiny = composed("tiny", "chunked", device, True)
    facts = overheads(tiny, device, 5 if small else 200)
    with tempfile.TemporaryDirectory() as folder:
        loaded = loader_speed(cfg, Path(folder), device, repeats=1 if small else 20)
    facts |= {"loader_images_per_second": loaded, "loader_workers": cfg.data.num_workers}
    if str(cases[0]) not in left_out:  # the recipe itself
        speed = rows[0]["images/s"]
        milliseconds = facts["callback_ms_a_step"]
        facts["callback_percent_of_a_step"] = 100 * milliseconds / rows[0]["ms a step"]
        facts["loader_times_the_step"] = loaded / speed
        images = cfg.data.num_images * cfg.trainer.max_epochs
        facts["hours_of_the_recipe"] = images / speed / 3600
    report(
        "gpu_small" if small else "gpu",
        f"Training steps of {RECIPE}, batch {cfg.data.batch_size}, {cfg.trainer.precision}",
        rows,
        device,
        gradients_apart_from_float64=errors,
        left_out=left_out,
        **facts,
        seconds=time.perf_counter() - begun,
    )


def composed(model: str, classifier: str, device: torch.device, small: bool) -> DictConfig:
    """The recipe's config with another network or class layer, resolved for the device."""
    chosen = [f"+paper={RECIPE}", f"model={model}", *f"classifier={classifier}".split()]
    if small:
        chosen += ["data.batch_size=4", "data.num_workers=1", "classifier.scale=16"]
    find_recipes(CONF)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", chosen)
    resolve_device(cfg)
    torch.backends.cudnn.benchmark = cfg.trainer.benchmark  # as the trainer sets it
    if cfg.classifier.get("chunk", 0) is None:  # as the first batch would, so that the plan knows
        cfg.classifier.chunk = chunk_that_fits(
            cfg.data.batch_size, cfg.model.embedding_size, device
        )
    return cfg


# Correct ------------------------------------------------------------------------------------------


def apart(name: str, device: torch.device, small: bool) -> float:
    """Norm of a difference by that of the gradient: of the embeddings, between a classifier in
    float32 without TF32 and its twin in float64 on the CPU.

    Raises:
        ValueError: it is more than rounding explains, or the losses differ by as much.
    """
    cfg = composed("tiny", name, device, small)
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    torch.manual_seed(0)
    num_classes, batch = (60, 4) if small else (10_000, 128)
    head = build_classifier(cfg, num_classes)
    if isinstance(head, PartialClassifier):
        classes = head.sample(torch.arange(batch))  # devices sample differently
        head.sample = lambda rows: classes.to(rows.device)  # type: ignore[method-assign]
    twin = copy.deepcopy(head).double()
    outcomes = []
    for one, place in ((head.to(device), device), (twin, torch.device("cpu"))):
        torch.manual_seed(1)
        labels = labels_of(one, batch)
        count = sum(map(len, labels.values()))
        x = 5 * torch.randn(count, one.embedding_size)
        x = x.to(place, torch.float64 if one is twin else torch.float32).requires_grad_()
        parts = dict(zip(labels, x.split([len(part) for part in labels.values()]), strict=True))
        loss = loss_of(one, nn.Identity(), parts, labels)
        (gradient,) = torch.autograd.grad(loss, x)
        outcomes.append((loss.detach().cpu().double(), gradient.cpu().double()))
    torch.set_float32_matmul_precision(precision)
    (loss, gradient), (loss_of_twin, expected) = outcomes
    error = float((gradient - expected).norm() / expected.norm())
    if not (error < 1e-3 and abs(loss - loss_of_twin) < 1e-3 * loss_of_twin):
        raise ValueError(
            f"{name} must agree with its twin in float64, got a gradient {error:.2g} apart and "
            f"losses {loss:.6g} and {loss_of_twin:.6g}"
        )
    return error


def labels_of(head: Any, batch_size: int) -> dict[str, Tensor]:
    """The labels of a step by the loader's name, on the host."""
    if isinstance(head, MomentumClassifier):
        return {name: labels for name, (_, labels) in head.sample_batch(batch_size).items()}
    return {"images": torch.arange(batch_size) % head.num_classes}


def loss_of(
    head: Classifier, network: nn.Module, images: dict[str, Tensor], labels: dict[str, Tensor]
) -> Tensor:
    """The training loss of images (N, ...) and labels (N,), by the loader's name."""
    if isinstance(head, MomentumClassifier):
        return head.training_loss(network, {name: (images[name], labels[name]) for name in labels})
    return head(network(images["images"]), labels["images"].to(images["images"].device))


# Fast ---------------------------------------------------------------------------------------------


class Step:
    """A training step in Lightning's order, without Lightning, on a batch that is on the device.

    Args:
        cfg: a run's config.
        num_classes: identities.
        device: where.
    """

    def __init__(self, cfg: DictConfig, num_classes: int, device: torch.device) -> None:
        self.cfg, self.device = cfg, device
        data: Any = SimpleNamespace(
            num_classes=num_classes, verify_names=[], batch_size=cfg.data.batch_size
        )
        self.module = build_module(cfg, data, None).to(device)
        self.head: Any = self.module.classifier
        self.optimizer = self.module.build_optimizer()
        dtype = AUTOCAST[cfg.trainer.precision]
        self.autocast = functools.partial(
            torch.autocast, device.type, dtype or torch.bfloat16, enabled=dtype is not None
        )
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.labels = labels_of(self.head, cfg.data.batch_size)
        if not isinstance(self.head, MomentumClassifier):
            self.labels = {name: labels.to(device) for name, labels in self.labels.items()}
        self.images = {
            name: torch.randint(256, (len(labels), 3, 112, 112), dtype=torch.uint8).to(device)
            for name, labels in self.labels.items()
        }
        self.embeddings = {
            name: torch.randn(len(labels), cfg.model.embedding_size, device=device).requires_grad_()
            for name, labels in self.labels.items()
        }
        self.loss = torch.zeros(())

    def __call__(self) -> None:
        if isinstance(self.head, MomentumClassifier):
            self.head.update_momentum_encoder(self.module.backbone)
        with self.autocast():
            given = {k: normalise(self.module.augment(x)) for k, x in self.images.items()}
            self._descend(loss_of(self.head, self.module.backbone, given, self.labels))

    def class_layer(self) -> None:
        """What of it is the class layer's: loss, gradients of centres and embeddings, update."""
        with self.autocast():
            self.head.momentum_encoder = None  # none is at work
            for x in self.embeddings.values():
                x.grad = None
            self._descend(loss_of(self.head, nn.Identity(), self.embeddings, self.labels))

    def _descend(self, loss: Tensor) -> None:
        self.loss = loss.detach()
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        if not any(p.grad is not None for p in self.module.parameters()):
            return  # there are no centres
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(
            self.module.backbone.parameters(), self.cfg.trainer.gradient_clip_val
        )
        self.scaler.step(self.optimizer)
        self.scaler.update()


def seconds(run: Callable[[], None], device: torch.device) -> float:
    """Median of five blocks of ten calls, after a warm-up, the device having done all of them."""
    warm_up, blocks, calls = (5, 5, 10) if device.type == "cuda" else (1, 1, 1)
    taken = []
    for block in range(blocks + 1):
        count = calls if block else warm_up
        begun = time.perf_counter()
        for _ in range(count):
            run()
        wait_for(device)
        taken.append((time.perf_counter() - begun) / count)
    return statistics.median(taken[1:])


def wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measured(cfg: DictConfig, num_classes: int, device: torch.device) -> dict[str, Any]:
    """Time and memory of a step, and the memory that the plan of a run has for it.

    Raises:
        MemoryError: the plan says that it does not fit.
        ValueError: its loss, or the weights after it, are not finite.
    """
    planned, cuda = plan(cfg, num_classes), device.type == "cuda"
    if cuda and HEADROOM * (planned + CUDA_RESERVE) > (capacity := memory_of(device)):
        raise MemoryError(f"planned {planned / GIB:.1f} GiB of {capacity / GIB:.1f}")
    step = Step(cfg, num_classes, device)
    for _ in range(2):
        step()
    if cuda:  # cuDNN has tried its convolutions, some of which take more than those it has chosen
        torch.cuda.reset_peak_memory_stats(device)
    whole = seconds(step, device)
    held = torch.cuda.max_memory_allocated(device) / GIB if cuda else None
    if not all(x.isfinite().all() for x in (step.loss, *step.module.parameters())):
        raise ValueError(f"a step must be finite, got a loss of {step.loss}")
    layer = seconds(step.class_layer, device)
    return {
        "ms a step": 1000 * whole,
        "class layer, ms": 1000 * layer,
        "% of a step": 100 * layer / whole,
        "images/s": cfg.data.batch_size / whole,
        "GiB": held,
        "GiB, planned": planned / GIB,
    }


def plan(cfg: DictConfig, num_classes: int) -> int:
    """Bytes that the plan of a run has for a step, without a CUDA context."""
    build = functools.partial(build_classifier, cfg, num_classes)
    batch, size = cfg.data.batch_size, cfg.model.embedding_size
    head = plan_classifier(build, build_optimizer(cfg), batch, size, num_classes)
    known = cfg.model.name, head.images
    if known not in NETWORKS:
        model = {**cfg.model, "channels_last": False, "compile": False}
        NETWORKS[known] = plan_backbone(
            lambda: instantiate(model), build_optimizer(cfg), head.images, cfg.trainer.precision
        )
    return peak(*combined(NETWORKS[known], head))


# Around the step ----------------------------------------------------------------------------------


class Clock(Callback):
    """Seconds of a run's steps, the device having done all of them."""

    def on_train_start(self, trainer: Trainer, *_: Any) -> None:
        self.begun = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        wait_for(pl_module.device)
        self.seconds = time.perf_counter() - self.begun


def overheads(cfg: DictConfig, device: torch.device, steps: int) -> dict[str, float]:
    """Milliseconds a step that Lightning's trainer adds, and FastFaceCallback to that: medians of
    three turns, of a small network and batch, as they do not depend on these."""
    step = Step(cfg, 100, device)
    batch = step.images["images"], step.labels["images"]

    def fit(*callbacks: Callback) -> float:
        clock, scaling = Clock(), loss_scaling(cfg)
        trainer = instantiate(
            cfg.trainer,
            plugins=scaling or None,
            precision=None if scaling else cfg.trainer.precision,
            max_steps=steps,
            callbacks=[*callbacks, clock],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
        )
        loader: Any = DataLoader([batch] * steps, batch_size=None)  # type: ignore[arg-type]
        trainer.fit(step.module, loader)
        if not trainer.callback_metrics["train/loss"].isfinite():
            raise ValueError("a run of the trainer must end with a finite loss")
        return clock.seconds / steps

    ways: list[Callable[[], float]] = [
        lambda: seconds(step, device),
        fit,
        lambda: fit(FastFaceCallback(instantiate(cfg.schedule))),
    ]
    turns = [[1000 * way() for way in ways] for _ in range(4)]
    bare, trained, scheduled = (statistics.median(t) for t in zip(*turns[1:], strict=True))
    return {"trainer_ms_a_step": trained - bare, "callback_ms_a_step": scheduled - trained}


def loader_speed(cfg: DictConfig, folder: Path, device: torch.device, repeats: int) -> float:
    """Images a second of JPEGs in a ``.rec``, decoded and brought to the device."""
    packed, made = folder / "train.rec", SyntheticFaces(8 * repeats, 4)
    with InsightFaceWriter(packed) as writer:
        for i in range(repeats * len(made)):
            number = i % len(made)
            writer.write_image(int(made.labels[number]), made.encoded(number))
    faces, size = RecordDataset(packed), cfg.data.batch_size
    loader = FaceLoader(faces, size, EpochSampler(faces, 0, 1, 0), cfg.data.num_workers)
    first = len(loader) // 4  # by then the workers are at work
    for batch, (images, _) in enumerate(loader, start=1):
        images.to(device, non_blocking=True)
        if batch == first:
            begun = time.perf_counter()
    wait_for(device)
    return size * (len(loader) - first) / (time.perf_counter() - begun)


if __name__ == "__main__":
    main()
