"""Two processes of batch B train as one of batch 2B, started whichever way."""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from programs import ROOT, SMALL
from ranks import on_ranks
from torch import Tensor, nn

from fastface_lightning import MHLR, FastFace, FastFaceCallback, replay
from fastface_lightning.classifiers import ChunkedClassifier
from fastface_lightning.data import SyntheticData, VerificationPairs
from fastface_lightning.data.augment import Augment
from fastface_lightning.schedule import PlateauSchedule, read_losses
from fastface_lightning.training.checkpoints import OneRun
from fastface_lightning.training.module import FaceModule
from fastface_lightning.training.seeding import SeededBatches

LR = 0.1
BATCH = 16  # images a step, of all ranks
EPOCHS = 15
STEPS = 12 * EPOCHS
WINDOWED = MHLR(variant="paper", haar_window=10, threshold=0.25, arm_after=0.2)
SCHEDULES = {"fastface": FastFace(max_decays=8), "mhlr": WINDOWED}


class Perceptron(nn.Sequential):
    """Without batch norm: its statistics are of a rank's own images, and those differ."""

    def __init__(self) -> None:
        reduce, activate = (nn.AvgPool2d(16), nn.Flatten()), (nn.LayerNorm(8), nn.GELU())
        super().__init__(*reduce, nn.Linear(147, 8), *activate, nn.Linear(8, 16))

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images.double())


class Watch(Callback):
    """Each rank writes the images, loss and learning rate of its batches, and what came of them."""

    def __init__(self, folder: Path, schedule: FastFaceCallback) -> None:
        self.folder, self.schedule = folder, schedule
        self.batches: list[tuple[int, list[int], float, float]] = []
        self.verified: dict[str, float] = {}

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.step, self.lr = trainer.global_step, trainer.optimizers[0].param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        prints = [zlib.crc32(image.numpy().tobytes()) for image in batch[0]]
        loss = outputs["loss"].item() * trainer.accumulate_grad_batches
        self.batches.append((self.step, prints, loss, self.lr))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        found = trainer.callback_metrics.items()
        self.verified = {key: value.item() for key, value in found if key.startswith("verify/")}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        record = {
            "batches": self.batches,
            "verified": self.verified,
            "changes": [list(made) for made in self.schedule.changes],
            "weights": pl_module.state_dict(),
        }
        torch.save(record, self.folder / f"rank{trainer.global_rank}.pt")


@pytest.fixture(scope="module")
def data() -> SyntheticData:
    """Made once; its pairs are of an odd number, so that one of two ranks is given one twice."""
    data = SyntheticData(12, 16, 12, 60)
    data.setup()
    pairs = data.sets["synthetic"]
    images = pairs.images[pairs.pairs().flatten()]
    data.sets["synthetic"] = VerificationPairs(images[:118], pairs.same[:59], [])
    index = torch.arange(38).view(19, 2)  # of images of which one is given twice, too
    index[::2] = index[::2].flip(1)
    recurring = VerificationPairs(images[:39], pairs.same[:19], [], index)
    data.sets["recurring"], data.verify_names = recurring, ["synthetic", "recurring"]
    return data


def train(
    data: SyntheticData, folder: Path, ranks: int, schedule: PlateauSchedule, accumulate: int
) -> list[Any]:
    """What each rank saw of a run in float64."""
    folder.mkdir()
    data.batch_size = BATCH // accumulate // ranks
    torch.manual_seed(0)
    module = FaceModule(
        Perceptron(),
        ChunkedClassifier(data.num_classes, 16, scale=16.0, chunk=5),
        functools.partial(torch.optim.SGD, lr=LR, momentum=0.9),
        verify_names=data.verify_names,
        augment=Augment(flip=0.0),  # each rank draws its own
    ).double()
    callback = FastFaceCallback(schedule)
    trainer = Trainer(
        callbacks=[SeededBatches(0), callback, Watch(folder, callback)],
        default_root_dir=folder,
        accelerator="cpu",
        devices=ranks,
        strategy="ddp_spawn" if ranks > 1 else "auto",
        max_epochs=EPOCHS,
        check_val_every_n_epoch=EPOCHS,
        accumulate_grad_batches=accumulate,
        gradient_clip_val=1.0,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(ranks)]


def by_step(*ranks: Any) -> Iterator[tuple[list[int], float, set[float]]]:
    """Images, mean loss and learning rates of each optimizer step, over all ranks."""
    batches = [batch for rank in ranks for batch in rank["batches"]]
    for step in range(1 + max(step for step, *_ in batches)):
        _, prints, losses, rates = zip(*(b for b in batches if b[0] == step), strict=True)
        yield sorted(chain(*prints)), sum(losses) / len(losses), set(rates)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts its processes by fork")
@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated", "ignore:.*num_workers")
def test_two_ranks_train_as_one_process(data: SyntheticData, tmp_path: Path, name: str) -> None:
    """In float64 a step differs by the order of its sums, 1e-16 of them, the whole run by 1e-14."""
    schedule = SCHEDULES[name]
    (one,) = train(data, tmp_path / "one", 1, schedule, accumulate=1)
    assert len(one["changes"]) >= 3
    expected = list(by_step(one))
    assert len(expected) == STEPS and len(expected[0][0]) == BATCH

    for accumulate in (1, 2):
        two = train(data, tmp_path / str(accumulate), 2, schedule, accumulate)
        for (images, loss, rates), (own_images, own_loss, own_rates) in zip(
            by_step(*two), expected, strict=True
        ):
            assert images == own_images
            assert loss == pytest.approx(own_loss, rel=1e-12)
            assert rates == own_rates and len(rates) == 1

        assert one["changes"] == two[0]["changes"] == two[1]["changes"]
        for rank in two:  # one that saw its own loss alone would decide otherwise
            alone = [loss for _, loss, _ in by_step(rank)]
            assert [list(made) for made in replay(alone, schedule, STEPS, LR)] != one["changes"]

        assert set(one["verified"]) > {"verify/synthetic/accuracy", "verify/synthetic/std"}
        assert two[0]["verified"] == two[1]["verified"] == pytest.approx(one["verified"], abs=1e-6)
        for key, weights in one["weights"].items():
            if not two[1]["weights"][key].is_meta:  # rank 0 has all centres
                assert torch.equal(two[0]["weights"][key], two[1]["weights"][key])
            torch.testing.assert_close(two[0]["weights"][key], weights, rtol=1e-12, atol=1e-12)


# The program, started three ways ---------------------------------------------------------------

PROGRAM = [
    *(*SMALL, "data.images_per_identity=20", "augment.flip=0"),
    *("model=timm", "model.name=test_convnext", "model.embedding_size=16"),
    "model.freeze=[neck.bn,neck.features]",  # its batch norms: statistics are of a rank's images
    *("trainer.max_epochs=2", "verify.every_n_epochs=2", "trainer.log_every_n_steps=1"),
    *("schedule=fastface", "averaging=none"),
    "schedule.max_decays=8",  # so short a run has none of its own
]
TWO = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "data.batch_size=8"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def start(words: list[str], cwd: Path, **variables: str) -> subprocess.Popen[str]:
    known = {name: value for name, value in os.environ.items() if name != "HYDRA_FULL_ERROR"}
    ours = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=cwd,
        env={**known, **ours, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def program(folder: Path, way: str, *words: str) -> tuple[list[int], str]:
    """Run train.py; exit codes of the processes started here, and what they said."""
    command = [str(ROOT / "train.py"), *PROGRAM, f"hydra.run.dir={folder}", *words]
    if way == "slurm":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        job = {"NTASKS": "2", "NTASKS_PER_NODE": "2", "NNODES": "1", "NODEID": "0", "JOB_ID": "1"}
        slurm = {f"SLURM_{name}": value for name, value in job.items()} | {"MASTER_PORT": port}
        started = [
            start(command, folder.parent, **slurm, SLURM_PROCID=rank, SLURM_LOCALID=rank)
            for rank in ("0", "1")
        ]
    else:
        started = [start([*(TORCHRUN if way == "torchrun" else []), *command], folder.parent)]
    said = "\n".join(process.communicate(timeout=120)[0] for process in started)
    return [process.returncode for process in started], said


def left(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A run's results and its weights."""
    results = json.loads((folder / "results.json").read_text())
    weights = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    return results, weights


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone") / "run"
    codes, said = program(folder, "alone", f"data.batch_size={BATCH}")
    assert codes == [0], said[-2000:]
    return folder


@pytest.mark.program
@pytest.mark.parametrize("way", ["launcher", "torchrun", "slurm"])
def test_the_program_trains_as_one_process(alone: Path, tmp_path: Path, way: str) -> None:
    codes, said = program(tmp_path / "run", way, *TWO)
    assert set(codes) == {0}, said[-2000:]
    assert said.count("verification synthetic") == 1
    results, weights = left(tmp_path / "run")
    own_results, own_weights = left(alone)
    for key in ("steps", "images", "lr_changes", "final_lr"):
        assert results[key] == own_results[key], key
    assert len(results["lr_changes"]) >= 3
    assert results["final_loss"] == pytest.approx(own_results["final_loss"], rel=1e-4)
    losses, _ = read_losses(tmp_path / "run" / "metrics.csv")  # of every step and of both ranks
    found = replay(losses, FastFace(max_decays=8), results["steps"], lr=results["final_lr"])
    assert [change[:2] for change in found] == [
        (made["step"], made["factor"]) for made in results["lr_changes"]
    ]
    for name, found in results["verification"].items():
        own = own_results["verification"][name]
        assert found.keys() == own.keys()
        for key, value in found.items():
            assert value == pytest.approx(own[key], abs=1e-6), key
    for key, tensor in own_weights.items():
        torch.testing.assert_close(weights[key], tensor, rtol=1e-3, atol=1e-4)


@pytest.mark.program
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds a process's children there")
def test_a_killed_rank_ends_the_run_and_one_process_more_or_less_goes_on(tmp_path: Path) -> None:
    """With half of each rank's centres sampled; at an epoch's end any number of processes goes on,
    within one as many, to the weights of a run that nothing has stopped."""
    words = [*TWO, "classifier=partial", "classifier.rate=0.5", "verify.every_n_epochs=6"]
    words += ["trainer.max_epochs=6", "checkpoint.every_n_steps=1"]
    folder = tmp_path / "run"
    run = start([str(ROOT / "train.py"), *PROGRAM, f"hydra.run.dir={folder}", *words], tmp_path)
    last = folder / "checkpoints" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not last.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    commands = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes() for pid in children}
    (rank,) = (pid for pid, command in commands.items() if b"train.py" in command)
    os.kill(rank, signal.SIGKILL)
    said = run.communicate(timeout=60)[0]
    assert run.returncode not in (0, None), said[-2000:]
    assert [file.name for file in last.parent.iterdir()] == ["last.ckpt"]
    step = torch.load(last, weights_only=True)["global_step"]

    codes, said = program(folder, "launcher", *words, "resume=auto")
    assert codes == [0], said[-2000:]
    codes, said = program(tmp_path / "whole", "launcher", *words)
    assert codes == [0], said[-2000:]
    steps = left(tmp_path / "whole")[0]["steps"]
    assert 0 < step < steps
    for key, tensor in left(tmp_path / "whole")[1].items():
        assert torch.equal(left(folder)[1][key], tensor), key

    codes, said = program(
        *(folder, "alone", *words, "resume=auto", "trainer=cpu", "trainer.devices=1"),
        *("trainer.max_epochs=7", "data.batch_size=16"),
    )
    assert codes == [0], said[-2000:]
    assert left(folder)[0]["steps"] == 7 * steps // 6


def test_ranks_of_different_runs_are_refused(tmp_path: Path) -> None:
    """Both of them, so that none waits for the other."""

    def check(rank: int) -> None:
        trainer, module = SimpleNamespace(world_size=2), LightningModule()
        OneRun(tmp_path, 3).setup(trainer, module, "fit")  # type: ignore[arg-type]
        for one in (OneRun(tmp_path / f"run{rank}", 3), OneRun(tmp_path, 3 * rank)):
            with pytest.raises(MisconfigurationException, match=r"one run folder .*, got .* and "):
                one.setup(trainer, module, "fit")  # type: ignore[arg-type]

    on_ranks(check, tmp_path)
