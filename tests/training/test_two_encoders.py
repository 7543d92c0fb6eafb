"""train.py with the classifiers that have a second encoder: F2C's pool and AttFC."""

import csv
import json

import pytest
import torch
from models import noise
from programs import SMALL, Run
from torch.nn import functional as F

from fastface_lightning.backbones import build_backbone
from fastface_lightning.inference.embedder import load_embedder

pytestmark = pytest.mark.program
MORE = [*SMALL, "data.num_identities=24", "data.images_per_identity=3"]
POOL = "classifier=dynamic_pool"
CASES = {
    "dynamic_pool": [POOL, "classifier.pool_size=14", "margin=arcface"],
    "dynamic_pool, bf16": [POOL, "trainer.precision=bf16-mixed", "model.channels_last=true"],
    "dynamic_pool, any timm model": [POOL, "model=timm", "model.name=test_resnet"],
    "dynamic_pool, other parts": [POOL, "schedule=cosine", "optimizer=adamw", "margin=adaface"],
    "attfc": ["classifier=attfc", "classifier.queue_size=10", "classifier.keys=1"],
    "attfc, accumulated": ["classifier=attfc", "classifier.queue_size=0.5"],
}


@pytest.mark.parametrize("case", CASES)
def test_a_run(run: Run, case: str) -> None:
    """What is saved, verified and exported is the network that was trained, not its follower."""
    accumulate = 2 if "accumulated" in case else 1
    ended = run(
        *MORE,
        *CASES[case],
        "trainer.max_epochs=1",
        "trainer.log_every_n_steps=1",
        f"trainer.accumulate_grad_batches={accumulate}",
    )
    assert ended.code == 0, ended.err
    results = json.loads((ended.folder / "results.json").read_text())
    batches = 24 * 3 // 8
    assert results["steps"] == -(-batches // accumulate)
    images_of_batch = 16 if "classifier.keys=1" in CASES[case] else 24
    assert results["images"] == batches * images_of_batch
    with (ended.folder / "metrics.csv").open(newline="") as lines:
        logged = list(csv.DictReader(lines))
    losses = [float(row["train/loss"]) for row in logged if row.get("train/loss")]
    assert len(losses) == batches // accumulate + (accumulate > 1) and all(
        0 < loss < 1000 for loss in losses
    )
    if "dynamic_pool" in case:
        shares = [float(row["train/in_pool"]) for row in logged if row["train/in_pool"]]
        assert all(0.5 < share <= 1 for share in shares)

    checkpoint = ended.folder / "checkpoints" / "last.ckpt"
    saved = torch.load(checkpoint, weights_only=True)["state_dict"]
    trained = {k.removeprefix("backbone."): v for k, v in saved.items() if "backbone." in k}
    follower = [k for k in saved if k.startswith("classifier.momentum_encoder.")]
    assert len(follower) == len(trained)
    name, size = ("test_resnet", 512) if "timm" in case else ("iresnet_tiny", 128)
    network = build_backbone(name, size).eval()
    network.load_state_dict(trained)
    images_seen = noise(3)
    with torch.no_grad():
        expected = F.normalize(network(images_seen.float() / 127.5 - 1))
    found = torch.as_tensor(load_embedder(checkpoint)(images_seen))
    torch.testing.assert_close(found.float(), expected, atol=2e-2, rtol=0)
