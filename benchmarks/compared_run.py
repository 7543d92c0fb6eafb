"""One run of the comparison: a small network trained in some way, judged on unseen people."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import math
import time
import warnings
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from rivals import ScheduleFree
from torch import Tensor, nn
from torch.nn import functional as F

from fastface_lightning import FastFaceCallback, WeightAverage
from fastface_lightning.backbones import normalise
from fastface_lightning.backbones.iresnet import iresnet_tiny
from fastface_lightning.classifiers import FullClassifier
from fastface_lightning.data import (
    EpochSampler,
    FaceLoader,
    IdentityFolder,
    SyntheticFaces,
    is_held_out,
)
from fastface_lightning.data.datamodule import read_people
from fastface_lightning.data.datasets.in_memory import InMemoryDataset, downsampled
from fastface_lightning.data.pairs import sample_pairs
from fastface_lightning.evaluation import tar_at_far, verification_accuracy
from fastface_lightning.margins import CosFace
from fastface_lightning.optim import SGD
from fastface_lightning.schedule.fixed import FixedSchedule
from fastface_lightning.training.environment import processor_name
from fastface_lightning.training.module import FaceModule

PIXELS, EMBEDDING = 32, 128
TUNING_SHARE = 1 / 3  # of the unseen people, by whom learning rates and windows are chosen
MOST = 10  # images of an unseen person: of all pairs of LFW's, two people would make up half
PAIRS = 6_000
FIGURES = ("accuracy", "tar", "tar_1e-3")
JUDGED, LOSSES = 6, 7  # points of a curve in E epochs; of the loss, in one
RAW = "raw"
Row = dict[str, Any]


class Run(NamedTuple):
    """A training run, by what its row begins with."""

    way: str
    lr: float
    seed: int


class Faces(NamedTuple):
    """People to train on, others by whom settings are chosen, and others to report on."""

    seen: InMemoryDataset
    tuning: InMemoryDataset
    unseen: InMemoryDataset


def synthetic_faces(identities: int, images: int, unseen: int) -> Faces:
    """Synthetic faces; the last people are not trained on, and have six images each."""
    seen = SyntheticFaces(identities, images, size=PIXELS)
    others = SyntheticFaces(unseen, 6, first_identity=identities, size=PIXELS)
    return split(seen, others)


def lfw(root: Path) -> Faces:
    """LFW View 1: those of its training people who have two images, and all of its test people."""
    train, test = (read_people(root / f"peopleDev{part}.txt") for part in ("Train", "Test"))
    return split(
        IdentityFolder(root / "images", identities=train, min_images=2),
        IdentityFolder(root / "images", identities=test),
    )


def split(seen: Any, others: Any) -> Faces:
    """All of them downsampled; by their names a third of the others are for tuning."""
    tuning = [name for name in others.identities if is_held_out(name, TUNING_SHARE)]
    rest = [name for name in others.identities if not is_held_out(name, TUNING_SHARE)]
    parts = (seen, *(first_images(others.restricted(names)) for names in (tuning, rest)))
    return Faces(*(downsampled(part, PIXELS) for part in parts))


def first_images(faces: Any) -> list[Any]:
    """At most ``MOST`` images of every person."""
    taken: Counter[int] = Counter()
    kept = []
    for index, label in enumerate(faces.labels.tolist()):
        taken[label] += 1
        if taken[label] <= MOST:
            kept.append(faces[index])
    return kept


# ------------------------------------------------------------------------------------- judging


class Judge:
    """What a network recognises of people it was not trained on.

    Args:
        faces: all images of some people, of whom all pairs are compared for the TAR; the accuracy
            is of ``PAIRS`` pairs, half of one person, in ten folds.
    """

    def __init__(self, faces: InMemoryDataset) -> None:
        self.images = faces.images
        labels = torch.from_numpy(faces.labels).long()
        i, j = torch.triu_indices(len(labels), len(labels), 1)
        self.cells, self.same = i * len(labels) + j, labels[i] == labels[j]
        self.pairs = torch.from_numpy(sample_pairs(faces.labels, PAIRS))
        self.pair_same = labels[self.pairs[:, 0]] == labels[self.pairs[:, 1]]

    @torch.no_grad()
    def __call__(self, backbone: nn.Module) -> list[float]:
        """Accuracy, TAR at FAR 1e-2 and at 1e-3; of a network that diverged, of chance."""
        training = backbone.training
        backbone.eval()
        embeddings = torch.cat([embed(backbone, part) for part in self.images.split(128)])
        backbone.train(training)
        if not embeddings.isfinite().all():
            return [0.5, 0.0, 0.0]
        scores = (embeddings @ embeddings.T).flatten()[self.cells]
        a, b = (embeddings[side] for side in self.pairs.T)
        accuracy = verification_accuracy(a, b, self.pair_same).accuracy
        return [accuracy, *tar_at_far(scores, self.same, [1e-2, 1e-3])]


def embed(backbone: nn.Module, images: Tensor) -> Tensor:
    """Unit embeddings of an image and its mirror image, summed."""
    both = backbone(normalise(images)) + backbone(normalise(images.flip(-1)))
    return F.normalize(both)


class Curves(Callback):
    """Loss and figures over the images seen.

    Args:
        faces: people to judge by.
        averages: of the backbone, by name; they are kept and judged like the weights.
        other: a copy of the module, in which an average is judged.
        free: judges the mean weights of Schedule-Free in the place of the last ones.
        epochs: E, in which there are ``JUDGED`` points.
        steps: optimizer steps of an epoch, in which there are ``LOSSES``.
        last: the run's own last step.

    Attributes:
        loss: images seen, and the mean loss since the point before.
        points: images seen, and by the name of the weights the figures, those of the tuning people
            as ``tuning_...``.
    """

    def __init__(
        self,
        faces: Faces,
        averages: dict[str, WeightAverage],
        other: Any,
        free: ScheduleFree | None,
        epochs: int,
        steps: int,
        last: int,
    ) -> None:
        self.judges = Judge(faces.unseen), Judge(faces.tuning)
        self.averages, self.other, self.free = averages, other, free
        self.epochs, self.steps, self.last = epochs, steps, last
        self.losses: list[Tensor] = []
        self.loss: list[tuple[int, float]] = []
        self.points: list[tuple[int, dict[str, dict[str, float]]]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for average in self.averages.values():  # the trainer itself takes one alone
            average.on_train_start(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        self.losses.append(outputs["loss"])
        for average in self.averages.values():
            average.on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._due(step, LOSSES, self.steps):
            mean = torch.stack(self.losses).mean().item()
            self.loss.append((step * len(batch[1]), round(mean, 4)))
            self.losses.clear()
        if self._due(step, JUDGED, self.epochs * self.steps) or step == self.last:
            with self.free.averaged(trainer, pl_module) if self.free else contextlib.nullcontext():
                figures = {RAW: self._judge(pl_module)}
            for name, average in self.averages.items():
                average.copy_to(self.other)
                figures[name] = self._judge(self.other)
            self.points.append((step * len(batch[1]), figures))

    def _judge(self, module: Any) -> dict[str, float]:
        figures = {}
        for prefix, judge in zip(("", "tuning_"), self.judges, strict=True):
            for name, value in zip(FIGURES, judge(module.backbone), strict=True):
                figures[prefix + name] = round(value, 5)
        return figures

    def _due(self, step: int, points: int, steps: int) -> bool:
        """Whether the next of so many equal parts of ``steps`` is through."""
        return step * points // steps > (step - 1) * points // steps


# ----------------------------------------------------------------------------------------- run


def train(
    run: Run,
    way: dict[str, Any],
    times: float,
    epochs: int,
    batch_size: int,
    averages: dict[str, dict[str, Any]],
    file: Path,
) -> Row:
    """Make a run, on one thread.

    Args:
        run: which.
        way: config of its schedule.
        times: its epochs over E.
        epochs: E.
        batch_size: images a step.
        averages: settings of the averages to hold, by name.
        file: the faces.
    """
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    faces = Faces(*(InMemoryDataset(*part) for part in torch.load(file)))
    seed_everything(run.seed, verbose=False)
    built = instantiate(way)
    sampler = EpochSampler(faces.seen, run.seed)
    loader = FaceLoader(faces.seen, batch_size, sampler)  # type: ignore[arg-type]
    last = len(loader) * round(epochs * times)
    optimizer: Any = functools.partial(SGD, lr=run.lr, momentum=0.9, weight_decay=5e-4)
    if free := built if isinstance(built, ScheduleFree) else None:
        optimizer = functools.partial(free.optimizer, lr=run.lr, steps=last)
        averages = {}  # its weights are a mean already
    module = FaceModule(
        iresnet_tiny(num_classes=EMBEDDING, img_size=PIXELS).to(memory_format=torch.channels_last),
        FullClassifier(faces.seen.num_classes, EMBEDDING, margin=CosFace(0.3), scale=32.0),
        optimizer,
        built if isinstance(built, FixedSchedule) else None,
    )
    held = {name: WeightAverage(**{"module": "backbone"} | each) for name, each in averages.items()}
    other = copy.deepcopy(module)
    curves = Curves(faces, held, other, free, epochs, len(loader), last)
    watching: list[Any] = []
    if isinstance(built, Callback):
        watching = [built]
    elif not isinstance(built, FixedSchedule):
        # A rate that is far too high ends with a network that recognises nobody, not an error.
        watching = [FastFaceCallback(instantiate(way, max_nonfinite=math.inf))]
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=round(epochs * times),
        callbacks=[*watching, curves],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    trainer.fit(module, loader)
    return {
        **run._asdict(),
        "steps": trainer.global_step,
        "seconds": round(time.perf_counter() - start, 1),
        "processor": processor_name(),
        "torch": torch.__version__,
        "changes": [change[:2] for each in watching for change in getattr(each, "changes", [])],
        "loss": curves.loss,
        "points": curves.points,
    }
