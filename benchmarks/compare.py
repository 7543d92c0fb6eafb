"""Which schedule recognises most at a quarter of the budget? ``benchmarks/compare.py --help``.

A small network at 32 x 32 pixels, its learning rate tuned for every schedule in the same way, is
judged on all pairs of images of people it was not trained on.
"""

from __future__ import annotations

import functools
import json
import logging
import math
import signal
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from multiprocessing import active_children, get_context
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from common import all_pairs
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastface_lightning import FastFaceCallback
from fastface_lightning.backbones.iresnet import iresnet_tiny
from fastface_lightning.classifiers import FullClassifier
from fastface_lightning.cli import program
from fastface_lightning.data import EpochSampler, FaceLoader, IdentityFolder, SyntheticFaces
from fastface_lightning.data.datamodule import read_people
from fastface_lightning.data.datasets.in_memory import InMemoryDataset, downsampled
from fastface_lightning.evaluation import roc_auc, tar_at_far
from fastface_lightning.files import write_text
from fastface_lightning.margins import CosFace
from fastface_lightning.optim import SGD
from fastface_lightning.schedule.fixed import FixedSchedule
from fastface_lightning.schedule.plateau import check_count
from fastface_lightning.training.environment import processor_name
from fastface_lightning.training.module import FaceModule

CONF = Path(__file__).resolve().parents[1] / "conf"
PIXELS, EMBEDDING = 32, 128
FARS = {"tar": 1e-2, "tar_1e-3": 1e-3}
BASELINE, TIMES = "baseline", 4
TUNING = 1_000  # the seed of the runs that choose a learning rate; those that count begin at 0
TARS, LOSSES = 6, 42  # points of a curve in E epochs
# Student's t: the 95 % interval of a mean of n values is T95[n] standard errors to each side; of
# more than ten it is taken as wide as of ten.
T95 = [math.nan, math.nan, 12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262]
Row = dict[str, Any]


class Run(NamedTuple):
    """A training run, by what its row begins with."""

    way: str
    lr: float
    seed: int


class Faces(NamedTuple):
    """People to train on, and others to recognise."""

    seen: InMemoryDataset
    unseen: InMemoryDataset


@program(config_path=CONF, config_name="compare")
def main(cfg: DictConfig) -> None:
    """Tune the learning rates, make the runs that count, and report."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a kill ends the workers too
    ways, grid = check(cfg)
    folder = Path(HydraConfig.get().runtime.output_dir)
    kept = Kept(folder / "compare.json", cfg)
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "faces.pt"
        faces = synthetic_faces(**cfg.synthetic) if cfg.root is None else lfw(Path(cfg.root))
        torch.save([(part.images, torch.from_numpy(part.labels)) for part in faces], file)
        job = functools.partial(train, epochs=cfg.epochs, batch_size=cfg.batch_size, file=file)
        if len(grid) > 1:
            kept.add([Run(way, lr, TUNING) for way, lr in product(ways, grid)], job, cfg.jobs)
        rates = {way: kept.best_rate(way, grid) for way in ways}
        runs = [Run(way, rates[way], seed) for seed, way in product(range(cfg.seeds), ways)]
        kept.add(runs, job, cfg.jobs)
    report(kept.counted(runs), list(cfg.rivals or []), folder)


def check(cfg: DictConfig) -> tuple[list[str], list[float]]:
    """The ways to compare, and the learning rates to choose from.

    Raises:
        ValueError: a setting is not what the program needs.
    """
    synthetic = (f"synthetic.{key}" for key in cfg.synthetic)
    for key in ("epochs", "batch_size", "seeds", "jobs", *synthetic):
        check_count(key, OmegaConf.select(cfg, key), 2 if key == "synthetic.unseen" else 1)
    for key, least in (("only", 1), ("rivals", 0)):
        ways = list(cfg.ways) if cfg[key] is None else cfg[key]
        if isinstance(ways, str) or len(ways) < least or not set(ways) <= set(cfg.ways):
            raise ValueError(f"{key} must be a list of some of {', '.join(cfg.ways)}, got {ways}")
    rates = cfg.rates if isinstance(cfg.rates, ListConfig) else []
    if not rates or not all(type(lr) in (int, float) and 0 < lr < math.inf for lr in rates):
        raise ValueError(f"rates must be a list of learning rates above 0, got {cfg.rates}")
    return list(dict.fromkeys(cfg.only or cfg.ways)), list(dict.fromkeys(rates))


def synthetic_faces(identities: int, images: int, unseen: int) -> Faces:
    """Synthetic faces; the last people are to be recognised, on six images each."""
    seen = SyntheticFaces(identities, images, size=PIXELS)
    others = SyntheticFaces(unseen, 6, first_identity=identities, size=PIXELS)
    return Faces(downsampled(seen, PIXELS), downsampled(others, PIXELS))


def lfw(root: Path) -> Faces:
    """LFW View 1: those of its training people who have two images, and all of its test people."""
    train, test = (read_people(root / f"peopleDev{part}.txt") for part in ("Train", "Test"))
    return Faces(
        downsampled(IdentityFolder(root / "images", identities=train, min_images=2), PIXELS),
        downsampled(IdentityFolder(root / "images", identities=test), PIXELS),
    )


# ---------------------------------------------------------------------------------------- runs


class Kept:
    """The runs in a file, each kept as soon as it is through.

    Args:
        file: made at the first run.
        cfg: what the runs are of; a file of other runs is not added to.

    Raises:
        ValueError: the file's runs had other data, epochs or schedules.
    """

    def __init__(self, file: Path, cfg: DictConfig) -> None:
        self.file = file
        self.settings: dict[str, Any] = {
            "faces": "lfw" if cfg.root is not None else OmegaConf.to_container(cfg.synthetic),
            "epochs": cfg.epochs,
            "batch_size": cfg.batch_size,
        }
        ways: Any = OmegaConf.to_container(cfg.ways, resolve=False)
        before = self._read()
        self.rows: list[Row] = before["runs"]
        self.ways: dict[str, Any] = before["ways"] | ways
        was = before.get("settings", self.settings) | {
            w: before["ways"].get(w, ways[w]) for w in ways
        }
        for name, value in (self.settings | ways).items():
            if was[name] != value:
                raise ValueError(
                    f"{file} has runs with {name}={was[name]}, got {value}: give another "
                    f"hydra.run.dir"
                )

    def add(self, runs: Sequence[Run], job: Callable[..., Row], jobs: int) -> None:
        """Make the runs that are not there, so many at a time, the longest first."""
        done = {Run(*(row[key] for key in Run._fields)) for row in self.rows}
        todo = sorted((run for run in runs if run not in done), key=lambda run: run.way != BASELINE)
        pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))
        try:
            started = [pool.submit(job, run, self.ways[run.way]) for run in todo]
            for number, done_job in enumerate(as_completed(started), 1):
                row = done_job.result()
                self._keep(row)
                print(
                    f"{number} of {len(todo)}: {row['way']}, lr {row['lr']:g}, seed {row['seed']}: "
                    f"TAR {row['tar']:.1%}, loss {row['loss']:.3f}, {row['seconds']:.0f} s",
                    flush=True,
                )
        except BaseException:  # also Ctrl-C: what is under way is made anew by the same command
            for worker in active_children():
                worker.kill()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _read(self) -> dict[str, Any]:
        return (
            json.loads(self.file.read_text()) if self.file.is_file() else {"runs": [], "ways": {}}
        )

    def _keep(self, row: Row) -> None:
        before = self._read()  # another program may have added to it
        self.rows = [*before["runs"], row]
        content = {"settings": self.settings, "ways": before["ways"] | self.ways}
        lines = ",\n".join(json.dumps(row) for row in self.rows)
        write_text(self.file, f'{json.dumps(content)[:-1]}, "runs": [\n{lines}\n]}}\n')

    def best_rate(self, way: str, grid: Sequence[float]) -> float:
        """The learning rate of a grid with which the tuning run of a way recognised most."""
        if len(grid) == 1:
            return grid[0]
        tar = {r["lr"]: r["tar"] for r in self.rows if r["way"] == way and r["seed"] == TUNING}
        return max(grid, key=lambda lr: tar[lr])

    def counted(self, runs: Sequence[Run]) -> dict[str, list[Row]]:
        """The rows of the runs that count, by way."""
        rows = {Run(*(row[key] for key in Run._fields)): row for row in self.rows}
        return {
            way: [rows[run] for run in runs if run.way == way]
            for way in dict.fromkeys(run.way for run in runs)
        }


def train(run: Run, schedule: dict[str, Any], epochs: int, batch_size: int, file: Path) -> Row:
    """Make a run, on one thread."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    faces = Faces(*(InMemoryDataset(*part) for part in torch.load(file)))
    seed_everything(run.seed, verbose=False)
    built = instantiate(schedule)
    fixed = isinstance(built, FixedSchedule)
    module = FaceModule(
        iresnet_tiny(num_classes=EMBEDDING, img_size=PIXELS).to(memory_format=torch.channels_last),
        FullClassifier(faces.seen.num_classes, EMBEDDING, margin=CosFace(0.3), scale=32.0),
        functools.partial(SGD, lr=run.lr, momentum=0.9, weight_decay=5e-4),
        built if fixed else None,
    )
    sampler = EpochSampler(faces.seen, run.seed)
    loader = FaceLoader(faces.seen, batch_size, sampler)  # type: ignore[arg-type]
    curves = Curves(faces.unseen, len(loader) * epochs)
    max_epochs = epochs * (TIMES if run.way == BASELINE else 1)
    # A rate that is far too high ends with a network that recognises nobody, not with an error.
    watching = [] if fixed else [FastFaceCallback(instantiate(schedule, max_nonfinite=math.inf))]
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=max_epochs,
        callbacks=[*watching, curves],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    trainer.fit(module, loader)
    seconds = time.perf_counter() - start
    scores, same = scores_of(module, faces.unseen)
    return {
        **run._asdict(),
        **dict(zip(FARS, tar_at_far(scores, same, list(FARS.values())), strict=True)),
        "auc": roc_auc(scores, same),
        "loss": curves.loss[-1][1],
        "steps": trainer.global_step,
        "seconds": round(seconds, 1),
        "processor": processor_name(),
        "torch": torch.__version__,
        "changes": [change[:2] for callback in watching for change in callback.changes],
        "loss_curve": curves.loss,
        "tar_curve": curves.tar,
    }


class Curves(Callback):
    """Loss and accuracy over the images seen.

    Args:
        unseen: people to recognise.
        steps: optimizer steps of E epochs, in which there are ``LOSSES`` and ``TARS`` points.

    Attributes:
        loss: images seen, and the mean loss since the point before.
        tar: images seen, and TAR at FAR 1e-2 over all pairs.
    """

    def __init__(self, unseen: InMemoryDataset, steps: int) -> None:
        self.unseen = unseen
        self.steps = steps
        self.losses: list[Tensor] = []
        self.loss: list[tuple[int, float]] = []
        self.tar: list[tuple[int, float]] = []

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.losses.append(outputs["loss"])
        images = trainer.global_step * len(batch[1])
        if self._due(trainer.global_step, LOSSES):
            self.loss.append((images, round(torch.stack(self.losses).mean().item(), 4)))
            self.losses.clear()
        if self._due(trainer.global_step, TARS):
            scores, same = scores_of(pl_module, self.unseen)
            self.tar.append((images, round(tar_at_far(scores, same, FARS["tar"]), 5)))

    def _due(self, step: int, points: int) -> bool:
        """Whether the next of so many equal parts of E is through."""
        return step * points // self.steps > (step - 1) * points // self.steps


@torch.no_grad()
def scores_of(module: Any, faces: InMemoryDataset) -> tuple[Tensor, Tensor]:
    """Scores and sameness of all pairs of images; the module goes on as it was.

    Of a network that diverged the scores are all 0: it recognises nobody.
    """
    training = module.training
    module.eval()
    embeddings = torch.cat([module.embed(part) for part in faces.images.split(500)])
    module.train(training)
    if not embeddings.isfinite().all():
        embeddings = torch.zeros_like(embeddings)
    return all_pairs(embeddings, torch.from_numpy(faces.labels))


# -------------------------------------------------------------------------------------- report


class Mean(NamedTuple):
    """A mean over seeds, and how far its 95 % interval reaches to each side; None of one seed."""

    value: float
    reach: float | None

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        n = len(values)
        if n == 1:
            return cls(values[0], None)
        return cls(mean(values), T95[min(n, len(T95) - 1)] * stdev(values) / math.sqrt(n))

    def percent(self) -> str:
        reach = "" if self.reach is None else f" ± {100 * self.reach:.1f}"
        return f"{100 * self.value:.1f}{reach}"


def report(rows_of: dict[str, list[Row]], rivals: list[str], folder: Path) -> None:
    """Print what the runs show, keep it as ``summary.json``, draw ``compare.png``."""
    lines = sorted(
        (line_of(way, rows_of, rivals) for way in rows_of), key=lambda line: -line["tar"].value
    )
    table = Table(title="People not trained on, all pairs, mean over seeds and 95 % interval (%)")
    for column in lines[0]:
        table.add_column(column)
    for line in lines:
        table.add_row(*(v.percent() if isinstance(v, Mean) else str(v) for v in line.values()))
    Console(width=150).print(table)
    write_text(folder / "summary.json", json.dumps(lines, indent=1) + "\n")
    draw(rows_of, folder / "compare.png")


def line_of(way: str, rows_of: dict[str, list[Row]], rivals: list[str]) -> Row:
    """What the runs of a way show, also above those of some others."""
    rows = rows_of[way]
    line: Row = {"way": way, "lr": rows[0]["lr"], "seeds": len(rows)}
    line |= {key: Mean.of([row[key] for row in rows]) for key in (*FARS, "auc")}
    for rival in rivals:
        line[f"tar - {rival}"] = difference(rows, rows_of.get(rival, []))
    line["loss"] = round(mean(row["loss"] for row in rows), 3)
    line["images"] = share_to_reach(rows, rows_of.get(BASELINE, []))
    first = [f"{row['changes'][0][0] / row['steps']:.2f}" for row in rows if row["changes"]]
    line["changes"] = " ".join(str(len(row["changes"])) for row in rows) if first else ""
    line["first at"] = " ".join(first)
    return line


def difference(rows: list[Row], others: list[Row]) -> Mean | None:
    """TAR above that of another way, seed by seed: equal seeds begin with the same weights."""
    theirs = {row["seed"]: row["tar"] for row in others}
    pairs = [(row["tar"], theirs[row["seed"]]) for row in rows if row["seed"] in theirs]
    return Mean.of([mine - other for mine, other in pairs]) if pairs else None


def share_to_reach(rows: list[Row], baseline: list[Row]) -> float | None:
    """Images until the mean TAR is within a point of where the baseline's ends, and stays there,
    over the baseline's images; None if it never is."""
    if not baseline:
        return None
    goal = mean(row["tar"] for row in baseline) - 0.01
    all_images = baseline[0]["tar_curve"][-1][0]
    curve = mean_curve(rows, "tar_curve")
    short = [i for i, (_, tar) in enumerate(curve) if tar < goal]
    first = short[-1] + 1 if short else 0
    return None if first == len(curve) else round(curve[first][0] / all_images, 3)


def mean_curve(rows: list[Row], key: str) -> list[tuple[int, float]]:
    """A curve's points, each the mean over the seeds."""
    return [
        (points[0][0], mean(value for _, value in points))
        for points in zip(*(row[key] for row in rows), strict=True)
    ]


def draw(rows_of: dict[str, list[Row]], path: Path) -> None:
    """Accuracy and loss over the images seen, and where every run ended."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(13, 4.6), layout="constrained")
    accuracy, loss, ends = figure.subplots(1, 3, width_ratios=(3, 3, 2))
    order = sorted(rows_of, key=lambda way: mean(row["tar"] for row in rows_of[way]))
    for place, way in enumerate(order):
        rows, color = rows_of[way], f"C{list(rows_of).index(way) % 10}"
        for axis, key, scale in ((accuracy, "tar_curve", 100), (loss, "loss_curve", 1)):
            images, values = zip(*mean_curve(rows, key), strict=True)
            axis.plot(
                [n / 1e6 for n in images], [scale * v for v in values], color=color, label=way
            )
        end = Mean.of([100 * row["tar"] for row in rows])
        ends.plot([100 * row["tar"] for row in rows], [place] * len(rows), ".", color="0.7")
        ends.errorbar(end.value, place, xerr=end.reach, fmt="o", color=color, capsize=3)
    accuracy.set(xlabel="images seen, millions", ylabel="TAR at FAR 1e-2, %")
    loss.set(xlabel="images seen, millions", ylabel="training loss")
    accuracy.legend(frameon=False)
    reached = [100 * row["tar"] for rows in rows_of.values() for row in rows]
    ends.set(yticks=range(len(order)), yticklabels=order, xlabel="TAR at the end, %")
    ends.set_xlim(min(reached) - 5, max(reached) + 5)  # an interval of two seeds may be far wider
    for axis in (accuracy, loss, ends):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
