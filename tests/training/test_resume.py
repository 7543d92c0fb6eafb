"""A run killed, or asked to end, goes on as if it had not been: same images, flips and weights."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from devices import ON_A_GPU
from PIL import Image
from programs import ROOT, apart

from fastface_lightning.training.seeding import batch_seed

PER_EPOCH = 6
CASES = {
    "in the main process": "data.num_workers=0",
    "two workers": "data.num_workers=2",
    "accumulated": "data.num_workers=2 trainer.accumulate_grad_batches=2",
    "a sample of classes": "classifier=partial classifier.rate=0.5 margin=elasticface",
    "a sample of classes by AdamW": "classifier=partial classifier.rate=0.5 optimizer=adamw",
    "two ranks": "trainer=ddp trainer.accelerator=cpu trainer.devices=2 data.batch_size=4",
    "a dynamic class pool": "classifier=dynamic_pool classifier.pool_size=7 data.batch_size=4 "
    "data.num_workers=2 trainer.accumulate_grad_batches=5",
    "a dynamic class pool on two ranks": "classifier=dynamic_pool classifier.pool_size=7 "
    "data.batch_size=2 trainer=ddp trainer.accelerator=cpu trainer.devices=2",
    "attention on two ranks": "classifier=attfc classifier.queue_size=9 data.batch_size=4 "
    "margin=curricularface trainer=ddp trainer.accelerator=cpu trainer.devices=2 "
    "trainer.accumulate_grad_batches=4",
    "by steps": "trainer.max_epochs=-1 trainer.max_steps=15",
    "watching the loss": "schedule=fastface averaging=none",
    "a fixed schedule": "schedule=cosine data.num_workers=2",
    "augmented": "augment.crop=0.5 augment.rand_augment=2",
    "averaged": "averaging=ema averaging.decay=0.8 averaging.every_n_steps=3",
}
# By deterministic kernels, as far as there are some.
ON_GPU = "trainer.accelerator=gpu trainer.benchmark=false +trainer.deterministic=warn"
GPU_CASES = {
    "a GPU": "data.num_workers=2",
    "a GPU in float16": "trainer.precision=16-mixed classifier=partial classifier.rate=0.5",
    "a GPU with a dynamic class pool": "classifier=dynamic_pool classifier.pool_size=10 "
    "data.batch_size=4 trainer.accumulate_grad_batches=2",
}
CASES |= {case: f"{ON_GPU} {words}" for case, words in GPU_CASES.items()}
MARKED = [pytest.param(case, marks=ON_A_GPU if case in GPU_CASES else ()) for case in CASES]


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten people, five noisy images each: 6 batches of 8 an epoch, two images left over."""
    root = tmp_path_factory.mktemp("data") / "faces"
    rng = np.random.default_rng(0)
    for person in range(10):
        (root / f"person_{person}").mkdir(parents=True)
        for image in range(5):
            pixels = rng.integers(0, 256, (112, 112, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / f"person_{person}" / f"{image}.jpg")
    (root / "person_3" / "2.jpg").write_bytes(b"not an image")
    return root


def train(folder: Path, *arguments: str) -> int:
    """Run train.py in a process group of its own; its exit code, negative if it was killed."""
    environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")}
    environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # deterministic products
    words = [str(ROOT / "train.py"), f"hydra.run.dir={folder}", *arguments]
    done = apart(words, folder.parent, **environment)
    if done.returncode not in (0, -9, 143) or "Traceback" in done.stderr:
        raise AssertionError(done.stderr[-3000:])
    return done.returncode


def settings(faces: Path, folder: Path, case: str) -> list[str]:
    return [
        *("data=folder", f"data.root={faces}", "data.held_out=0", "data.batch_size=8"),
        *("trainer.max_epochs=3", "trainer.enable_progress_bar=false"),
        "trainer.log_every_n_steps=1",  # by which ranks agree to end
        *("checkpoint.every_n_steps=2", "model.embedding_size=32", "classifier.scale=16"),
        "+callbacks.inputs._target_=watching.WriteInputs",
        f"+callbacks.inputs.folder={folder}",
        *CASES[case].split(),
    ]


def inputs(folder: Path) -> dict[str, Any]:
    """What each batch was, by rank, epoch and number; the last time if it was done twice."""
    found = {}
    for file in sorted(folder.glob("inputs-*.jsonl")):
        for at, *given in map(json.loads, file.read_text().splitlines()):
            found[f"{file.stem} {at}"] = given
    return found


def steps(folder: Path) -> int:
    return int(json.loads((folder / "results.json").read_text())["steps"])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    saved = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    raw = saved.get("current_model_state", {})
    return {**saved["state_dict"], **{f"raw {name}": value for name, value in raw.items()}}


@pytest.mark.program
@pytest.mark.parametrize("case", MARKED)
def test_a_killed_run_ends_as_an_uninterrupted_one(faces: Path, tmp_path: Path, case: str) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert train(whole, *settings(faces, whole, case)) == 0
    expected = inputs(whole)
    assert len({str(given) for given in expected.values()}) == len(expected) > 12

    kill_at = np.random.default_rng(sorted(CASES).index(case)).integers(2, 13, 2)
    kill = ["+callbacks.kill._target_=watching.KillAt", f"+callbacks.kill.batch={kill_at[0]}"]
    assert train(killed, *settings(faces, killed, case), *kill) == -9
    again = kill_at.max() + 1
    code = train(
        killed, "resume=auto", f"+callbacks.kill.batch={again}", "+callbacks.kill.signal=SIGTERM"
    )
    assert code == 143
    assert train(killed, "resume=auto", "+callbacks.kill.batch=null") == 0

    assert inputs(killed) == expected
    # A GPU has sums without a fixed order: each moves a float32 by 1e-7 of it, and 18 steps that.
    error = {"rtol": 1e-2, "atol": 1e-3} if case in GPU_CASES else {"rtol": 0, "atol": 0}
    losses, others = (np.fromfile(run / "losses.f32", "<f4") for run in (whole, killed))
    assert len(losses) == len(others) == steps(whole)
    np.testing.assert_allclose(others, losses, **error)
    found = weights(killed)
    for name, tensor in weights(whole).items():
        torch.testing.assert_close(found[name], tensor, **error, equal_nan=True, msg=name)


@pytest.mark.program
def test_going_on_within_an_epoch_needs_the_same_batches(faces: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    case = "in the main process"
    assert train(folder, *settings(faces, folder, case), "trainer.max_steps=8") == 0
    settings_of_run = (folder / "overrides.yaml").read_text()
    with pytest.raises(AssertionError, match="batch_size must be 8, as in the run whose"):
        train(folder, "resume=auto", "data.batch_size=4", "trainer.max_steps=20")
    assert (folder / "overrides.yaml").read_text() == settings_of_run  # and it can still go on
    assert train(folder, "resume=auto", "trainer.max_steps=9") == 0


def test_batch_seeds_differ() -> None:
    seeds = [batch_seed(s, e, b, r) for s in (0, 1) for e in (0, 1) for b in (0, 1) for r in (0, 1)]
    assert len(set(seeds)) == 16 and all(0 <= seed < 2**64 for seed in seeds)
