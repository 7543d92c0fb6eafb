"""FastFaceCallback in two processes: ranks with different losses decide as one, on their mean."""

import math
import os
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint
from ranks import on_ranks
from scripted import LR, LearningRates, Scripted, batches, by_hand, quiet_trainer, stairs

from fastface_lightning import FastFace, FastFaceCallback, replay

STEPS = 120
SCHEDULE = FastFace(ema_window=4, haar_window=4, threshold=0.02, patience=8, arm_after=0)


def loss_of_rank(step: int, rank: int) -> float:
    """Each wave hides the plateaus; the mean of the two ranks is the stairs, exactly."""
    wave = math.floor(1024 * math.sin(step / 5)) / 1024
    return stairs(step) + (wave if rank else -wave)


class OneRank(Scripted):
    """Its user looks at the callback's state on rank 0 alone, as many do."""

    def __init__(self) -> None:
        super().__init__(self.loss_here)

    def on_train_batch_end(self, *args: Any) -> None:
        (callback,) = (c for c in self.trainer.callbacks if isinstance(c, FastFaceCallback))
        if self.global_rank == 0:
            assert callback.state_dict()["state"]["step"] <= self.trainer.global_step

    def loss_here(self, step: int, micro: int) -> float:
        return loss_of_rank(step, self.global_rank)


@pytest.mark.slow
@pytest.mark.parametrize("read_every", [1, 8])
@pytest.mark.filterwarnings("ignore:.*LeafSpec.* is deprecated")
def test_ranks_decide_on_their_mean_loss(tmp_path: Path, read_every: int) -> None:
    mean = [stairs(step) for step in range(STEPS)]
    changes = replay(mean, SCHEDULE, STEPS, LR)
    assert len(changes) >= 4
    for rank in (0, 1):
        alone = [loss_of_rank(step, rank) for step in range(STEPS)]
        assert replay(alone, SCHEDULE, STEPS, LR) != changes

    def check(rank: int) -> None:
        os.environ["LOCAL_RANK"] = str(rank)
        callback, rates = FastFaceCallback(SCHEDULE, read_every=read_every), LearningRates()
        trainer = quiet_trainer(
            tmp_path,
            [callback, rates],
            strategy="ddp",
            devices=2,
            max_epochs=1,
            use_distributed_sampler=False,
        )
        trainer.fit(OneRank(), batches(STEPS))
        expected = by_hand(mean, SCHEDULE.bind(STEPS), read_every)
        assert rates.first_group == {step: expected[step] for step in range(STEPS)}
        assert [list(made) for made in callback.changes] == [list(made) for made in changes]

        # Saved in the middle of a block, losses of both ranks that nobody has read included.
        kept = FastFaceCallback(SCHEDULE, read_every=read_every)
        settings = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": False}
        every = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=59, save_top_k=-1)
        quiet_trainer(tmp_path, [kept, every], max_epochs=1, **settings).fit(
            OneRank(), batches(STEPS)
        )
        resumed = FastFaceCallback(SCHEDULE, read_every=read_every)
        quiet_trainer(tmp_path, [resumed], max_epochs=1, **settings).fit(
            OneRank(), batches(STEPS), ckpt_path=tmp_path / "step=59.ckpt"
        )
        assert resumed.state_dict() == kept.state_dict() == callback.state_dict()

    (tmp_path / "meet").mkdir()
    on_ranks(check, tmp_path / "meet")
