"""FastFaceCallback in two processes: ranks with different losses decide as one, on their mean."""

import json
import math
import os
from pathlib import Path

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from scripted import LR, LearningRates, Scripted, batches, by_hand, quiet_trainer, stairs

from fastface_lightning import FastFace, FastFaceCallback, replay

STEPS = 120
SCHEDULE = FastFace(ema_window=4, haar_window=4, threshold=0.02, patience=8, arm_after=0)


def loss_of_rank(step: int, rank: int) -> float:
    """Each wave hides the plateaus; the mean of the two ranks is the stairs, exactly."""
    wave = math.floor(1024 * math.sin(step / 5)) / 1024
    return stairs(step) + (wave if rank else -wave)


class OneRank(Scripted):
    def __init__(self) -> None:
        super().__init__(self.loss_here)

    def loss_here(self, step: int, micro: int) -> float:
        return loss_of_rank(step, self.global_rank)


class Report(Callback):
    """Each process writes what it decided and the rates it trained with."""

    def __init__(self, folder: Path, callback: FastFaceCallback, rates: LearningRates) -> None:
        self.folder, self.callback, self.rates = folder, callback, rates

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        seen = {"state": self.callback.state_dict(), "rates": self.rates.first_group}
        (self.folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(seen))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="starts its processes by fork")
@pytest.mark.parametrize("read_every", [1, 8])
@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated")
def test_ranks_decide_on_their_mean_loss(tmp_path: Path, read_every: int) -> None:
    mean = [stairs(step) for step in range(STEPS)]
    changes = replay(mean, SCHEDULE, STEPS, LR)
    assert len(changes) >= 4
    for rank in (0, 1):
        alone = [loss_of_rank(step, rank) for step in range(STEPS)]
        assert replay(alone, SCHEDULE, STEPS, LR) != changes

    callback, rates = FastFaceCallback(SCHEDULE, read_every=read_every), LearningRates()
    trainer = quiet_trainer(
        tmp_path,
        [callback, rates, Report(tmp_path, callback, rates)],
        strategy="ddp_fork",
        devices=2,
        max_epochs=1,
        use_distributed_sampler=False,
    )
    trainer.fit(OneRank(), batches(STEPS))

    one, other = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert one == other
    expected = by_hand(mean, SCHEDULE.bind(STEPS), read_every)
    assert one["rates"] == {str(step): expected[step] for step in range(STEPS)}
    assert one["state"]["changes"] == [list(made) for made in changes]
