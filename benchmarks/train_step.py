"""What a training step and an epoch of train.py cost beside a plain PyTorch loop.

``python benchmarks/train_step.py [--lfw DIR]``: the same network from the same weights, the same
images, loss, clipping and update on both sides; about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import logging
import math
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from classifiers import Straightforward
from common import report
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from fastface_lightning import WeightAverage
from fastface_lightning.backbones import build_backbone, normalise
from fastface_lightning.data import IdentityFolder, SyntheticFaces
from fastface_lightning.training.build import build_module, build_trainer
from fastface_lightning.training.devices import resolve_device
from fastface_lightning.training.run_record import RunRecord

ROOT = Path(__file__).resolve().parents[1]

BATCH, CLIP, WORKERS, THREADS = 64, 5.0, 2, 2
SGD: dict[str, Any] = {"lr": 0.02, "momentum": 0.9, "weight_decay": 5e-4}
CENTRES = 10_000
MS1MV3 = 93_431  # its identities
COMMON = [
    *("trainer=cpu", "trainer.max_epochs=1", f"trainer.gradient_clip_val={CLIP}"),
    *("margin=arcface", "margin.straight_through=true", "data=folder", "data.held_out=0"),
    *(f"data.batch_size={BATCH}", f"data.num_workers={WORKERS}"),
    *(f"optimizer.{key}={value}" for key, value in SGD.items()),
]
FAST = ["model.channels_last=true"]
WAYS = {
    "train.py": [],  # as it is on a processor
    "train.py channels_last": FAST,
    "train.py bf16 channels_last": [*FAST, "trainer.precision=bf16-mixed"],
}
PLAIN = "plain"
Batch = tuple[Tensor, Tensor]
Side = Callable[[], float]  # trains, and returns the seconds that it took


class ReleasedRule:
    """The release's schedule, a few lines of Python: its filter of the loss and its count."""

    def __init__(self, optimizer: torch.optim.Optimizer, total_steps: int) -> None:
        self.optimizer, self.patience = optimizer, int(0.05 * total_steps)
        self.alpha = self.beta = 1e-3
        self.before, self.response, self.loss, self.count = 0.0, 0.0, math.nan, 0

    def step(self, loss: float) -> None:
        a, b = self.alpha, self.beta
        drop = 0.0 if math.isnan(self.loss) else self.loss - loss
        response = (2 - a - b) * self.response - (1 - a) * (1 - b) * self.before + a * b * drop
        self.before, self.response, self.loss = self.response, response, loss
        self.count = self.count + 1 if response < 5e-5 else 0
        if self.count > self.patience:
            self.count = 0
            for group in self.optimizer.param_groups:
                group["lr"] /= 2


class Plain:
    """A training program as the field writes it, in float32 or under bfloat16 autocast.

    Args:
        backbone: the network, NCHW.
        num_classes: centres.
        bfloat16: whether the network runs under autocast.
    """

    def __init__(self, backbone: nn.Module, num_classes: int, bfloat16: bool = False) -> None:
        self.backbone, self.head, self.bfloat16 = backbone, Straightforward(num_classes), bfloat16
        groups = [{"params": list(part.parameters())} for part in (self.backbone, self.head)]
        self.optimizer = torch.optim.SGD(groups, **SGD)
        self.schedule = ReleasedRule(self.optimizer, 100_000)

    def parameters(self) -> list[Tensor]:
        return [*self.backbone.parameters(), *self.head.parameters()]

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
            embeddings = self.backbone(images)
        return self.head(embeddings, labels)

    def train(self, batches: Iterable[Batch]) -> float:
        """Train on all batches of float images; seconds."""
        start = time.perf_counter()
        for images, labels in batches:
            loss = self.loss(images, labels)
            loss.backward()
            nn.utils.clip_grad_norm_(self.backbone.parameters(), CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad()
            self.schedule.step(loss.item())
        return time.perf_counter() - start


class Clock(Callback):
    """Seconds to the end of the last batch.

    Args:
        loading: from before the trainer starts the loading processes; else from the epoch's start.
    """

    seconds = 0.0

    def __init__(self, loading: bool) -> None:
        self.loading = loading

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start = time.perf_counter()

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.loading:
            self.start = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seconds = time.perf_counter() - self.start


class Program:
    """train.py, that can be run again and again: its parts are those that the program builds.

    Args:
        folder: run folder.
        root: images, a folder of identities or a ``.rec``.
        num_classes: centres, at least as many as there are identities at ``root``.
        overrides: as on the command line.
    """

    def __init__(self, folder: Path, root: Path, num_classes: int, overrides: list[str]) -> None:
        self.folder = folder
        overrides = [*COMMON, f"data.root={root}", *overrides, f"hydra.runtime.output_dir={folder}"]
        with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            self.cfg = compose("train", overrides, return_hydra_config=True)
        HydraConfig.instance().set_config(self.cfg)
        resolve_device(self.cfg)
        self.data = instantiate(self.cfg.data)
        self.data.setup("fit")
        self.data.num_classes = num_classes
        torch.manual_seed(0)  # all networks start from the same weights
        self.module = build_module(self.cfg, self.data, instantiate(self.cfg.schedule))
        self.optimizer = self.module.build_optimizer()
        self.module.optimizer = lambda _: self.optimizer  # its momentum stays from run to run

    def batch(self) -> Batch:
        """The first batch of its data."""
        return next(iter(self.data.train_dataloader()))

    def train(self, batches: list[Batch] | None = None) -> float:
        """An epoch of its own data, or of batches in memory, by the trainer; seconds."""
        record = RunRecord(self.folder, {"logger": {name: {} for name in self.cfg.logger}})
        schedule = instantiate(self.cfg.schedule)
        trainer = build_trainer(self.cfg, self.folder, schedule, record, 0)
        clock = Clock(loading=batches is None)
        trainer.callbacks.append(clock)  # type: ignore[attr-defined]
        with contextlib.redirect_stdout(io.StringIO()):  # the progress bar
            if batches is None:
                trainer.fit(self.module, self.data)
            else:
                loader: DataLoader[Any] = DataLoader(batches, batch_size=None)  # type: ignore[arg-type]
                trainer.fit(self.module, loader)
        return clock.seconds

    def train_bare(self, batches: Iterable[Batch]) -> float:
        """On batches in memory and in float32, without Lightning, logs and schedule; seconds."""
        module = self.module.train()
        start = time.perf_counter()
        for images, labels in batches:
            module.classifier(module(module.augment(images)), labels).backward()
            nn.utils.clip_grad_norm_(module.backbone.parameters(), CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad()
        return time.perf_counter() - start

    def plain(self, bfloat16: bool = False) -> Plain:
        """The plain program of the same network from the same weights."""
        backbone = build_backbone(self.cfg.model.name, self.cfg.model.embedding_size)
        backbone.load_state_dict(self.module.backbone.state_dict())
        plain = Plain(backbone, self.data.num_classes, bfloat16)
        plain.head.load_state_dict(self.module.classifier.state_dict())
        return plain


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--lfw", type=Path, help="folder of <identity>/<image>; else synthetic faces"
    )
    parser.add_argument("--images", type=int, default=320, help="images an epoch")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        root = pictures(folder / "images", arguments.lfw, arguments.images)
        make = partial(Program, folder / "run", root)
        rows, facts = [], {}
        for network, centres in (("r18", CENTRES), ("mbf", CENTRES), ("mbf", MS1MV3)):
            programs = {
                way: make(centres, [f"model={network}", *overrides])
                for way, overrides in WAYS.items()
            }
            apart = gradients_apart(programs["train.py"])
            facts[f"gradients_apart_{network}_{centres}"] = apart
            rows += table(network, centres, "step", step_sides(programs), BATCH, arguments.repeats)
            if centres == CENTRES:
                sides, images = epoch_sides(programs, root)
                rows += table(network, centres, "epoch", sides, images, arguments.repeats)
            del programs
        facts |= trainer_overhead(make(100, ["model=tiny"]))
        for network in ("r18", "mbf"):
            cost = averaging_cost(make(100, [f"model={network}"]).module)
            facts |= {f"averaging_{network}_{name}": value for name, value in cost.items()}
    overhead = facts["trainer_ms_a_step"]
    shares = {
        f"{row['network']}, {row['centres']:,} centres": 100 * overhead / row["ms a step"]
        for row in rows
        if row["way"] == "train.py"
    }
    report(
        "train_step",
        f"Training at batch {BATCH}, 112x112, {THREADS} threads, {WORKERS} loading processes",
        rows,
        **facts,
        trainer_percent_of_a_step=shares,
        images="LFW" if arguments.lfw else "synthetic",
        images_an_epoch=arguments.images,
    )


def pictures(folder: Path, source: Path | None, count: int) -> Path:
    """A folder of so many images by identity: of ``source``, else synthetic ones."""
    faces = SyntheticFaces(math.ceil(count / 8), 8) if source is None else IdentityFolder(source)
    for i in range(count):
        file = folder / faces.identities[int(faces.labels[i])] / faces.file_name(i)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(bytes(faces.encoded(i)))
    return folder


def floats(images: Tensor) -> Tensor:
    """What the usual loader would have given: float32 in [-1, 1], NCHW."""
    return (images / 127.5 - 1).contiguous()


def gradients_apart(program: Program) -> float:
    """Norm of the difference of both sides' gradients by that of the plain one's, in one layout.

    Another layout moves those of a fresh network by some thousandths, as float32 itself does.

    Raises:
        ValueError: it is above what rounding explains: the two do not do the same work.
    """
    images, labels = (part[:8] for part in program.batch())
    plain = program.plain()
    classifier: Any = program.module.classifier
    backbone: nn.Module = copy.deepcopy(program.module.backbone).to(
        memory_format=torch.contiguous_format
    )
    plain.loss(floats(images), labels).backward()
    classifier(backbone.train()(normalise(images)), labels).backward()
    pairs = [
        (p.grad.flatten(), q.grad.flatten())
        for p, q in zip(
            plain.parameters(), (*backbone.parameters(), classifier.weight), strict=True
        )
        if p.grad is not None and q.grad is not None
    ]
    usual, own = (torch.cat(side) for side in zip(*pairs, strict=True))
    program.optimizer.zero_grad()
    apart = float((own - usual).norm() / usual.norm())
    if not apart < 1e-4:
        raise ValueError(f"both sides must have the same gradients, got {apart:.2g} apart")
    return apart


def step_sides(programs: Mapping[str, Program]) -> dict[str, Side]:
    """A step of each side on a batch in memory, as its loader would have given it."""
    first = programs["train.py"]
    images, labels = first.batch()
    ready = [(floats(images), labels)]
    return {
        PLAIN: partial(first.plain().train, ready),
        f"{PLAIN} bf16": partial(first.plain(bfloat16=True).train, ready),
        **{way: partial(own.train, [(images, labels)]) for way, own in programs.items()},
    }


def epoch_sides(programs: Mapping[str, Program], root: Path) -> tuple[dict[str, Side], int]:
    """An epoch of each side, from the start of the loading processes to the last update; and its
    images. What the layout is worth shows in the steps, so train.py comes with the fast one."""
    usual = ImageFolder(
        str(root),
        transforms.Compose(
            [
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize([0.5] * 3, [0.5] * 3),
            ]
        ),
    )
    loader = DataLoader(usual, BATCH, shuffle=True, drop_last=True, num_workers=WORKERS)
    sides: dict[str, Side] = {PLAIN: partial(programs["train.py"].plain().train, loader)}
    sides |= {way: own.train for way, own in programs.items() if way != "train.py"}
    return sides, len(loader) * BATCH


def table(
    network: str, centres: int, what: str, sides: Mapping[str, Side], images: int, repeats: int
) -> list[dict[str, Any]]:
    """A row a side, with its speed beside the plain float32 loop's."""
    taken = medians(sides, repeats)
    return [
        {
            "network": network,
            "centres": centres,
            "what": what,
            "way": way,
            "ms a step": 1000 * seconds * BATCH / images,
            "images/s": images / seconds,
            "times plain": taken[PLAIN] / seconds,
        }
        for way, seconds in taken.items()
    ]


def medians(sides: Mapping[str, Side], repeats: int) -> dict[str, float]:
    """As ``common.medians``, of sides that hold the clock themselves."""
    turns = [{name: run() for name, run in sides.items()} for _ in range(repeats + 1)]
    return {name: statistics.median(turn[name] for turn in turns[1:]) for name in sides}


def trainer_overhead(program: Program, steps: int = 100, repeats: int = 7) -> dict[str, float]:
    """What the trainer with all its callbacks and logs adds to a step, whatever the network.

    Taken where it shows: steps of two images through a small network.
    """
    images, labels = program.batch()
    batches = [(images[:2], labels[:2])] * steps
    sides = {
        "trainer": partial(program.train, batches),
        "bare": partial(program.train_bare, batches),
    }
    taken = {name: 1000 * seconds / steps for name, seconds in medians(sides, repeats).items()}
    return {
        "trainer_ms_a_step": taken["trainer"] - taken["bare"],
        "bare_ms_a_small_step": taken["bare"],
    }


def averaging_cost(module: LightningModule, updates: int = 20) -> dict[str, float]:
    """Median milliseconds of an update of the backbone's average, and the megabytes it holds."""
    backbone: Any = module.backbone
    average, taken = WeightAverage(module="backbone"), []
    trainer: Any = SimpleNamespace(global_step=0)
    average.on_train_start(trainer, module)
    for step in range(1, updates + 2):
        trainer.global_step = step
        start = time.perf_counter()
        average.on_train_batch_end(trainer, module, None, None, 0)
        taken.append(1000 * (time.perf_counter() - start))
    held = sum(w.nbytes for w in (*backbone.parameters(), *backbone.buffers()))
    return {"ms_an_update": statistics.median(taken[1:]), "megabytes": held / 1e6}


if __name__ == "__main__":
    main()
