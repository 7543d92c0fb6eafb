"""What a pool in the place of the class centres saves, and costs, in three parts.

    python benchmarks/dynamic_pool.py layer                 the class layer: time and memory
    python benchmarks/dynamic_pool.py slots                 the slots' bookkeeping beside a step
    python benchmarks/dynamic_pool.py accuracy [--lfw DIR]  training runs at 32 pixels
    python benchmarks/dynamic_pool.py report                tables, JSON and figure of what there is

Every row is kept as soon as it is there: a part that was stopped goes on where it was. Delete
``results/dynamic_pool.json`` to begin anew.
"""

from __future__ import annotations

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import torch
from classifiers import resident
from common import RESULTS, all_pairs, medians, show, write
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.utilities import CombinedLoader
from torch import nn

from fastface_lightning.backbones import build_backbone
from fastface_lightning.backbones.iresnet import iresnet_tiny
from fastface_lightning.classifiers import (
    AttentionClassifier,
    ChunkedClassifier,
    Classifier,
    DynamicClassPool,
    FullClassifier,
    MomentumClassifier,
    PartialClassifier,
)
from fastface_lightning.classifiers.slots import Slots
from fastface_lightning.data import (
    EpochSampler,
    FaceLoader,
    GroupSampler,
    IdentityFolder,
    SyntheticFaces,
)
from fastface_lightning.data.datamodule import read_people
from fastface_lightning.data.datasets.in_memory import InMemoryDataset, downsampled
from fastface_lightning.evaluation import tar_at_far
from fastface_lightning.margins import CosFace
from fastface_lightning.optim import SGD
from fastface_lightning.training.environment import memory_of
from fastface_lightning.training.module import FaceModule
from fastface_lightning.training.plan import PartPlan, plan_classifier

ROOT = Path(__file__).resolve().parents[1]
FILE = RESULTS / "dynamic_pool.json"
Row = dict[str, Any]

# The class layer: 126 images a step are 42 identities x 2 and 42 further images.
IMAGES, IDENTITIES, SIZE = 126, 42, 512
# 93,431 are MS1MV3's identities, 205,990 WebFace4M's, 617,970 and 2,059,906 those of 12M and 42M.
CLASSES = [10_000, 30_000, 93_431, 205_990, 617_970, 2_059_906]
MEASURED = CLASSES[-2:]  # where a process of its own tells the memory, too
FIXED, SMALL = "dynamic pool 10,000 slots", "dynamic pool 1 %"
HEADS: dict[str, Callable[[int], Classifier]] = {
    "full": lambda n: FullClassifier(n, SIZE),
    "chunked": lambda n: ChunkedClassifier(n, SIZE),
    "partial 0.1": lambda n: PartialClassifier(n, SIZE),
    "dynamic pool 10 %": lambda n: DynamicClassPool(n, SIZE, pool_size=0.1),
    SMALL: lambda n: DynamicClassPool(n, SIZE, pool_size=0.01),
    FIXED: lambda n: DynamicClassPool(n, SIZE, pool_size=min(10_000, n)),
    "AttFC 30 %": lambda n: AttentionClassifier(n, SIZE),
}
MEMORY_SHARE = 0.75  # share of the machine's memory that may be filled
TIMED_SECONDS = 0.3  # seconds that are timed at once, of steps that are shorter

POOLS = [1_000, 20_599, 205_990]

# Training: 78 images a step are 26 identities x 2 and 26 further images; they write 39 at once.
PIXELS, WIDTH = 32, 128
PEOPLE, HELD_OUT, EACH = 4_000, 200, 6
MARGIN: dict[str, Any] = {"margin": CosFace(0.3), "scale": 32.0}
WAYS: dict[str, tuple[Callable[[int], Classifier], int]] = {
    "full": (lambda n: FullClassifier(n, WIDTH, **MARGIN), 78),
    "partial 0.1": (lambda n: PartialClassifier(n, WIDTH, **MARGIN), 78),
    "dynamic pool 10 %": (lambda n: DynamicClassPool(n, WIDTH, **MARGIN, pool_size=0.1), 26),
    "dynamic pool 1 %": (lambda n: DynamicClassPool(n, WIDTH, **MARGIN, pool_size=0.01), 26),
    # Its own momentum, 0.999, leaves a run of 2,000 steps too much of the first, random weights.
    "AttFC 30 %": (lambda n: AttentionClassifier(n, WIDTH, **MARGIN, momentum=0.99), 78),
}
PILOT = 1_000  # the seed of the runs that choose a learning rate; those that count begin at 0


def main() -> None:
    """Run a part, or report on what has been run."""
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = parser.add_subparsers(dest="part", required=True, metavar="PART")
    layer = parts.add_parser("layer", help="time and memory of the class layer alone")
    layer.add_argument("--classes", type=int, nargs="+", default=CLASSES, metavar="C")
    layer.add_argument("--repeats", type=int, default=5)
    layer.add_argument("--memory", nargs=2, metavar=("WAY", "CLASSES"), help=argparse.SUPPRESS)
    slots = parts.add_parser("slots", help="the slots' bookkeeping beside a training step")
    slots.add_argument("--repeats", type=int, default=7)
    accuracy = parts.add_parser("accuracy", help="training runs, judged on people not trained on")
    accuracy.add_argument(
        "--lfw", type=Path, metavar="DIR", help="LFW View 1, aligned; else synthetic faces"
    )
    accuracy.add_argument("--steps", type=int, default=1200, help="optimizer steps of a run")
    accuracy.add_argument("--seeds", type=int, default=3, help="runs of each way")
    accuracy.add_argument(
        *("--rates", "--lr"),
        type=float,
        nargs="+",
        default=[0.0005, 0.002, 0.006, 0.02],
        help="learning rates; of several a pilot run of each way takes the best",
    )
    accuracy.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each")
    parts.add_parser("report", help="tables, JSON and figure of the rows that are kept")
    arguments = parser.parse_args()
    if arguments.part == "layer" and arguments.memory:
        print_memory(arguments.memory[0], int(arguments.memory[1]))
    elif arguments.part == "layer":
        run_layer(arguments.classes, arguments.repeats)
    elif arguments.part == "slots":
        run_slots(arguments.repeats)
    elif arguments.part == "accuracy":
        run_accuracy(arguments)
    else:
        write_report()


def kept() -> dict[str, Any]:
    """What has been written so far."""
    return json.loads(FILE.read_text()) if FILE.is_file() else {}


def rows_of(part: str) -> list[Row]:
    """The rows of a part that are there."""
    return kept().get(part, [])


def keep(part: str, row: Row) -> None:
    """Write a row to the others of its part."""
    print(part, row, flush=True)
    write("dynamic_pool", **{**kept(), part: [*rows_of(part), row]})


# ------------------------------------------------------------------------------------- layer


def run_layer(classes: Iterable[int], repeats: int) -> None:
    """Seconds a step and memory of every way and size that has no row yet."""
    memory = MEMORY_SHARE * memory_of(torch.device("cpu"))
    for num_classes in classes:
        done = {row["way"] for row in rows_of("layer") if row["identities"] == num_classes}
        plans = {way: planned(way, num_classes) for way in HEADS if way not in done}
        fitting = [way for way, plan in plans.items() if held(plan) + above(plan) <= memory]
        for way in plans.keys() - fitting:
            keep("layer", layer_row(way, num_classes, plans[way], None, None))
        for ways in groups({way: plans[way] for way in fitting}, memory):
            taken = seconds_a_step(ways, num_classes, repeats)
            for way in ways:
                measured = measure_memory(way, num_classes) if num_classes in MEASURED else None
                keep("layer", layer_row(way, num_classes, plans[way], taken[way], measured))


def layer_row(
    way: str, num_classes: int, plan: PartPlan, seconds: float | None, measured: int | None
) -> Row:
    """A way at a size; no seconds where it does not fit this machine."""
    return {
        "identities": num_classes,
        "way": way,
        "s/step": seconds,
        "GB held": held(plan) / 1e9,
        "GB above": above(plan) / 1e9,
        "GB measured": None if measured is None else measured / 1e9,
        "threads": torch.get_num_threads(),
    }


def groups(plans: dict[str, PartPlan], memory: float) -> list[list[str]]:
    """The ways that take turns: all of them, or if memory would not hold them one at a time."""
    if not plans:
        return []
    most = sum(map(held, plans.values())) + max(map(above, plans.values()))
    return [list(plans)] if most <= memory else [[way] for way in plans]


def planned(way: str, num_classes: int) -> PartPlan:
    """What a way holds, computed."""
    build = functools.partial(HEADS[way], num_classes)
    batch = IDENTITIES if way.startswith("dynamic pool") else IMAGES
    return plan_classifier(build, make_optimizer, batch, SIZE, num_classes)


def held(plan: PartPlan) -> int:
    """Bytes of weights or pool, gradient and momentum."""
    return plan.weights + plan.gradients + plan.states


def above(plan: PartPlan) -> int:
    """Bytes above these at the peak."""
    return max(plan.work, plan.update)


def make_optimizer(parameters: Iterable[nn.Parameter]) -> SGD:
    """Every part's optimizer."""
    return SGD(parameters, lr=0.02, momentum=0.9, weight_decay=5e-4)


def step_of(way: str, num_classes: int) -> Callable[[], None]:
    """Forward, backward and update of one way, ready to run: other identities at every step."""
    torch.manual_seed(0)
    head = HEADS[way](num_classes)
    if isinstance(head, MomentumClassifier):
        return momentum_step(head)
    optimizer = make_optimizer(head.parameters())
    embeddings = torch.randn(IMAGES, SIZE, requires_grad=True)

    def run() -> None:
        head(embeddings, torch.randint(num_classes, (IMAGES,))).backward()
        optimizer.step()
        optimizer.zero_grad()
        embeddings.grad = None

    return run


def momentum_step(head: MomentumClassifier) -> Callable[[], None]:
    """A step without networks: embeddings come in the images' place, and stay as they are."""
    if isinstance(head, DynamicClassPool):
        fill(head.slots)
    sample = head.sample_batch(IDENTITIES if head.batches == "dual" else IMAGES)
    embeddings = {
        name: torch.randn(len(labels), SIZE, requires_grad=True)
        for name, (_, labels) in sample.items()
    }

    def run() -> None:
        ids = torch.randint(head.num_classes, (IMAGES,))
        batch = {name: (x, ids[sample[name][1]]) for name, x in embeddings.items()}
        head.training_loss(nn.Identity(), batch).backward()
        for x in embeddings.values():
            x.grad = None

    return run


def fill(slots: Slots) -> None:
    """Give every slot to an identity, as it is for nearly all of a run."""
    slots.commit(slots.plan(range(slots.size)))


def seconds_a_step(ways: list[str], num_classes: int, repeats: int) -> dict[str, float]:
    """Median seconds of a step of each way; the ways take turns of some steps each."""
    steps = {way: step_of(way, num_classes) for way in ways}
    counts = {}
    for way, step in steps.items():
        step()
        start = time.perf_counter()
        step()
        counts[way] = max(1, round(TIMED_SECONDS / (time.perf_counter() - start)))

    def turn(way: str) -> None:
        for _ in range(counts[way]):
            steps[way]()

    taken = medians({way: functools.partial(turn, way) for way in ways}, repeats)
    return {way: taken[way] / counts[way] for way in ways}


def measure_memory(way: str, num_classes: int) -> int:
    """Bytes at most during steps, in a process of its own."""
    command = [sys.executable, __file__, "layer", "--memory", way, str(num_classes)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_memory(way: str, num_classes: int) -> None:
    """What ``measure_memory`` asks of its process."""
    for _ in range(2):
        step_of(way, 7_000)()  # libraries load
    before = resident("VmRSS")
    run = step_of(way, num_classes)
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, of making it, is forgotten
    for _ in range(3):
        run()
    print(resident("VmHWM") - before)


# ------------------------------------------------------------------------------------- slots


def run_slots(repeats: int) -> None:
    """Microseconds of the bookkeeping of a step beside the step itself, of a tenth in the pool."""
    for size in POOLS:
        if any(row["slots"] == size for row in rows_of("slots")):
            continue
        small, large = (1e6 * bookkeeping(size, batch) for batch in (IDENTITIES, 128))
        step = medians({"step": network_step(size)}, repeats)["step"]
        row = {
            "slots": size,
            "us, 63 writes": small,
            "us, 192 writes": large,
            "s/step, 63 writes": step,
            "% of it, 63 writes": small / step / 1e4,
            "% of it, 192 writes": large / step / 1e4,
            "threads": torch.get_num_threads(),
        }
        keep("slots", row)


def bookkeeping(size: int, batch: int) -> float:
    """Median seconds of what both halves of a step of ``batch`` identities do to the slots."""
    slots = Slots(size)
    fill(slots)
    times = []
    for _ in range(200):
        pairs, *others = torch.randint(10 * size, (2 * batch,)).split([batch, *2 * [batch // 2]])
        x, y = (torch.cat([pairs, other]).tolist() for other in others)
        start = time.perf_counter()
        slots.find(x, slots.plan(y))
        plan = slots.plan(x)
        slots.find(y, plan)
        slots.commit(plan)
        times.append(time.perf_counter() - start)
    return median(times)


def network_step(size: int) -> Callable[[], None]:
    """A training step of a small network, its gallery net and a pool of ``size`` slots."""
    torch.manual_seed(0)
    probe = build_backbone("iresnet_tiny", 128, channels_last=True).train()
    pool = DynamicClassPool(10 * size, 128, pool_size=size)
    fill(pool.slots)
    optimizer = make_optimizer(probe.parameters())
    images = {"identity": torch.randn(2 * IDENTITIES, 3, 112, 112)}
    images["instance"] = torch.randn(IDENTITIES, 3, 112, 112)

    def run() -> None:
        ids = torch.randint(pool.num_classes, (2 * IDENTITIES,))
        pairs, others = ids[:IDENTITIES].repeat_interleave(2), ids[IDENTITIES:]
        pool.update_momentum_encoder(probe)
        batch = {
            "identity": (images["identity"], pairs),
            "instance": (images["instance"], others),
        }
        pool.training_loss(probe, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


# ---------------------------------------------------------------------------------- accuracy


class Data(NamedTuple):
    """Faces to train on, and those of other people: some to choose by, the rest to report on."""

    training: InMemoryDataset
    choosing: InMemoryDataset
    others: InMemoryDataset


class Run(NamedTuple):
    """A training run, by what its row begins with."""

    data: str
    way: str
    steps: int
    lr: float
    seed: int


def run_accuracy(arguments: argparse.Namespace) -> None:
    """The runs that have no row yet: those that choose a learning rate, then those that count."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "faces.pt"
        data = synthetic_faces() if arguments.lfw is None else lfw(arguments.lfw.resolve())
        name = "synthetic" if arguments.lfw is None else "lfw"
        torch.save([(part.images, torch.from_numpy(part.labels)) for part in data], file)
        # A third of the steps will do to choose by.
        pilots = [
            Run(name, *x, PILOT) for x in product(WAYS, [arguments.steps // 3], arguments.rates)
        ]
        run_all(pilots if len(arguments.rates) > 1 else [], file, arguments.jobs)
        runs = [
            Run(name, way, arguments.steps, best_rate(pilots, way), seed)
            for seed, way in product(range(arguments.seeds), WAYS)
        ]
        run_all(runs, file, arguments.jobs)


def best_rate(pilots: list[Run], way: str) -> float:
    """The learning rate of the pilot run of a way that knew most people again; or the only one."""
    mine = {run: 0.0 for run in pilots if run.way == way}
    for row in rows_of("accuracy"):
        run = run_of(row)
        if run in mine:
            mine[run] = row["TAR, choosing"]
    return max(mine, key=lambda run: mine[run]).lr


def run_of(row: Row) -> Run:
    """The run that a row is of."""
    return Run(*(row[key] for key in Run._fields))


def synthetic_faces() -> Data:
    """Synthetic faces of 4,000 people, six of each."""
    print("making faces", flush=True)
    faces = downsampled(SyntheticFaces(PEOPLE + 2 * HELD_OUT, EACH), PIXELS)
    bounds = [PEOPLE, HELD_OUT, HELD_OUT]
    parts = zip(faces.images.split([EACH * n for n in bounds]), bounds, strict=True)
    return Data(
        *(InMemoryDataset(part, torch.arange(n).repeat_interleave(EACH)) for part, n in parts)
    )


def lfw(root: Path) -> Data:
    """LFW View 1: its development people to train on; of its test people every other to choose."""
    test = list(read_people(root / "peopleDevTest.txt"))
    parts = (list(read_people(root / "peopleDevTrain.txt")), test[0::2], test[1::2])
    folders = (IdentityFolder(root / "images", identities=part) for part in parts)
    return Data(*(downsampled(faces, PIXELS) for faces in folders))


def run_all(runs: list[Run], file: Path, jobs: int) -> None:
    """Run those that have no row, so many at a time."""
    done = {run_of(row) for row in rows_of("accuracy")}
    todo = [run for run in runs if run not in done]
    pool = ProcessPoolExecutor(jobs, mp_context=get_context("spawn"))
    try:
        for row in as_completed(pool.submit(accuracy_row, run, file) for run in todo):
            keep("accuracy", row.result())
    finally:
        pool.shutdown(cancel_futures=True)  # else after an error the others would still be run


def accuracy_row(run: Run, file: Path) -> Row:
    """Train on one thread, and recognise people who were not trained on."""
    torch.set_num_threads(1)
    data = Data(*(InMemoryDataset(*part) for part in torch.load(file)))
    seed_everything(run.seed, verbose=False)
    build, batch_size = WAYS[run.way]
    head = build(data.training.num_classes)
    net = iresnet_tiny(num_classes=WIDTH, stem_stride=1, img_size=PIXELS)
    module = FaceModule(
        net.to(memory_format=torch.channels_last),
        head,
        functools.partial(SGD, lr=run.lr, momentum=0.9, weight_decay=5e-4),
        torch.optim.lr_scheduler.CosineAnnealingLR,
    )
    trainer = Trainer(
        accelerator="cpu",
        max_steps=run.steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    start = time.perf_counter()
    trainer.fit(module, loader(data.training, head, batch_size, run.seed))
    seconds = time.perf_counter() - start
    choosing, others = (tar_of_all_pairs(module.eval(), part) for part in data[1:])
    return {
        **run._asdict(),
        "TAR, choosing": choosing,
        "TAR": others,
        "loss": trainer.callback_metrics["train/loss"].item(),
        "s/step": seconds / run.steps,
        "threads": 1,
    }


def loader(faces: Any, head: Classifier, batch_size: int, seed: int) -> Any:
    """Batches as :class:`fastface_lightning.data.FaceDataModule` makes them."""
    images = FaceLoader(faces, batch_size, EpochSampler(faces, seed))
    if head.batches == "images":
        return images
    if isinstance(head, AttentionClassifier):
        groups = GroupSampler(faces, 1 + head.keys, "images", seed)
        loaders = {"identity": FaceLoader(faces, groups.size * batch_size, groups)}
    else:
        groups = GroupSampler(faces, 2, "identities", seed)
        pairs = FaceLoader(faces, groups.size * batch_size, groups)
        loaders = {"instance": images, "identity": pairs}
    return CombinedLoader(loaders, "min_size")


@torch.no_grad()
def tar_of_all_pairs(module: FaceModule, faces: InMemoryDataset) -> float:
    """TAR at FAR 1e-2 over all pairs of images."""
    embeddings = torch.cat([module.embed(part) for part in faces.images.split(500)])
    scores, same = all_pairs(embeddings, torch.from_numpy(faces.labels))
    return tar_at_far(scores, same, 1e-2)


# ------------------------------------------------------------------------------------ report


def write_report() -> None:
    """Print what is kept as tables, write what follows from it, draw the figure."""
    layer, slots, accuracy = map(rows_of, ("layer", "slots", "accuracy"))
    facts: dict[str, Any] = {}
    if layer:
        facts["layer_facts"] = layer_facts(layer)
        title = f"Class layer and its update, {IMAGES} images, D = {SIZE}, float32"
        show(title, layer, **facts["layer_facts"])
        plot(layer, RESULTS / "dynamic_pool.png")
    if slots:
        facts["largest_share_of_slots_percent"] = max(row["% of it, 192 writes"] for row in slots)
        show("The slots' bookkeeping beside a step of iresnet_tiny, 126 images", slots)
    if accuracy:
        facts["accuracy_of_ways"] = summary(accuracy)
        if facts["accuracy_of_ways"]:
            title = "People not trained on, 78 images a step; TAR at FAR 1e-2, all pairs of images"
            show(title, facts["accuracy_of_ways"])
    write("dynamic_pool", **{**kept(), **facts})


def layer_facts(rows: list[Row]) -> dict[str, float]:
    """What the class layer was to show, of the sizes that are there."""
    most = max(row["identities"] for row in rows if row["way"] == SMALL)
    held_there = {row["way"]: row["GB held"] for row in rows if row["identities"] == most}
    fixed = [row["s/step"] for row in rows if row["way"] == FIXED]
    return {
        "identities": most,
        "held_by_dynamic_pool_1_percent_of_full": held_there[SMALL] / held_there["full"],
        "fixed_pool_slowest_to_fastest": max(fixed) / min(fixed),
    }


def summary(rows: list[Row]) -> list[Row]:
    """Mean and range over the seeds, of every way; without the runs that chose learning rates."""
    by_run: dict[Run, list[Row]] = {}
    for row in rows:
        if row["seed"] != PILOT:
            by_run.setdefault(run_of(row)._replace(seed=0), []).append(row)
    table = []
    ways = list(WAYS)
    for run in sorted(by_run, key=lambda run: (run.data, run.steps, ways.index(run.way))):
        seeds = by_run[run]
        line: Row = {"data": run.data, "way": run.way, "steps": run.steps, "lr": run.lr}
        line["seeds"] = len(seeds)
        values = [row["TAR"] for row in seeds]
        line |= {"TAR": mean(values), "TAR range": f"{min(values):.3f}-{max(values):.3f}"}
        table.append(line | {"s/step": mean(row["s/step"] for row in seeds)})
    return table


def plot(rows: list[Row], file: Path) -> None:
    """Time and memory over the number of identities, all axes logarithmic."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    time_axis, memory_axis = figure.subplots(1, 2)
    for way in HEADS:
        mine = sorted((r for r in rows if r["way"] == way), key=lambda row: row["identities"])
        timed = [row for row in mine if row["s/step"] is not None]
        time_axis.loglog(
            [r["identities"] for r in timed], [r["s/step"] for r in timed], "o-", label=way
        )
        memory = [row["GB held"] + row["GB above"] for row in mine]
        memory_axis.loglog([r["identities"] for r in mine], memory, "o-", label=way)
    time_axis.set_ylabel("seconds a step")
    memory_axis.set_ylabel("GB held and above it at the peak")
    for axis in (time_axis, memory_axis):
        axis.set_xlabel("identities")
        axis.grid(alpha=0.3, which="both")
    figure.legend(*time_axis.get_legend_handles_labels(), loc="outside right center", frameon=False)
    figure.suptitle(f"Class layer and its update, {IMAGES} images a step, D = {SIZE}, float32")
    figure.savefig(file, dpi=130)


if __name__ == "__main__":
    main()
