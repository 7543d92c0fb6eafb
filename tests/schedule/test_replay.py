"""Replaying a recorded loss: the authors' own run, and the files a curve is read from."""

import gzip
import math
import struct
from pathlib import Path

import pytest
from curves import training_curve

from fastface_lightning import MHLR, FastFace, replay
from fastface_lightning.schedule import Change, PlateauSchedule, read_losses
from fastface_lightning.schedule.replay import Recording

# The authors' log --------------------------------------------------------------------------------

TOTAL_STEPS = 202_320
FIRST_SEEN = [
    54280, 72870, 94820, 113110, 135870, 143870, 151870, 159870, 175830, 183830, 191830, 199830,
]  # fmt: skip


@pytest.fixture(scope="module")
def recording(shared_data: Path) -> Recording:
    """ResNet-100 on MS1MV3, as its authors logged it: loss and learning rate of every step."""
    return read_losses(shared_data / "traces" / "ms1mv3_r100_training.log.gz")


def logged_changes(lrs: list[float]) -> list[tuple[int, float]]:
    """(0-based step, factor) wherever the logged learning rate differs from the row before.

    A row stands for the 10 steps up to its own; only its last step is known to have the new rate.
    """
    return [
        (step + 9, lrs[step] / lrs[step - 1])
        for step in range(1, len(lrs))
        if lrs[step] != lrs[step - 1]
    ]


def test_mhlr_repeats_the_learning_rate_of_the_authors_run(recording: Recording) -> None:
    ours = replay(recording.losses, MHLR(variant="paper", haar_window=4000), TOTAL_STEPS, lr=0.02)
    logged = logged_changes(recording.lrs)
    assert [step + 1 for step, _ in logged] == FIRST_SEEN
    assert [change.factor for change in ours] == [0.5] * 7 + [4.0] + [0.5] * 3 + [4.0]
    # The log rounds its rates to six decimals, so its later factors are known to 1 % only.
    assert [change.factor for change in ours] == pytest.approx([f for _, f in logged], rel=0.01)
    assert [change.step for change in ours] == pytest.approx([step for step, _ in logged], abs=15)
    assert ours[0] == Change(step=54271, factor=0.5, lr=0.01)
    assert [change.lr for change in ours] == pytest.approx(
        [recording.lrs[change.step + 20] for change in ours], abs=5.1e-7
    )


def test_fastface_decays_the_authors_run_at_most_eight_times(recording: Recording) -> None:
    # Neither variant decays in the first quarter, where the loss rises and then falls fast.
    for schedule in (FastFace(), FastFace(variant="paper")):
        changes = replay(recording.losses, schedule, TOTAL_STEPS, lr=0.02)
        assert 1 <= len(changes) <= 8
        assert changes[0].step > TOTAL_STEPS / 4


# Replay is stepping ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule",
    [
        FastFace(),
        FastFace(variant="paper", ema_window=30, haar_window=30, threshold=1e-3),
        FastFace(variant="released", ema_window=30, haar_window=30, threshold=1e-3),
        MHLR(),
        MHLR(warmup_steps=50),
    ],
    ids=repr,
)
def test_replay_equals_stepping_by_hand(schedule: PlateauSchedule) -> None:
    losses = training_curve(2000, speed=60).losses
    losses[700] = math.nan
    bound = schedule.bind(2000)
    state, by_hand = bound.init(), []
    for step, loss in enumerate(losses):
        before, state = state, bound.update(state, loss)
        if state.scale != before.scale and step >= 50:
            by_hand.append((step, state.scale / before.scale, 0.1 * state.scale))
    assert by_hand
    assert replay(losses, schedule, 2000, lr=0.1) == by_hand
    assert replay(losses, bound, 2000, lr=0.1) == by_hand


def test_warmup_is_no_change() -> None:
    straight_fall = [10 - step / 200 for step in range(1000)]
    schedule = MHLR(warmup_steps=0.1, haar_window=20, threshold=0.01)
    assert replay(straight_fall, schedule, 1000, lr=0.1) == []


@pytest.mark.parametrize(("total_steps", "lr"), [(0, 0.1), (10, -0.1), (10, math.nan)])
def test_length_and_learning_rate_are_checked(total_steps: int, lr: float) -> None:
    with pytest.raises(ValueError, match="total_steps" if lr == 0.1 else "lr must"):
        replay([1.0], FastFace(), total_steps, lr)


# Files -------------------------------------------------------------------------------------------

LOG = (
    "Training: 2023-12-28 00:21:17-rank_id: 0\n"
    "Training: Speed 1 samples/sec   Loss 4.5   LearningRate 0.020000   Epoch: 0   Global Step: 3\n"
    "[lfw][3]XNorm: 22.4\n"
    "Training: Speed 1 samples/sec   Loss 4.0   LearningRate 0.010000   Epoch: 0   Global Step: 5\n"
)
# Lightning's: a training row every n steps, 0-based, and a validation row without a loss.
METRICS = "epoch,lr-SGD,step,train/loss,val/accuracy\n0,0.1,1,3.0,\n0,,3,,0.9\n0,0.05,3,2.0,\n"


def write(path: Path, text: str) -> Path:
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


@pytest.mark.parametrize(
    ("name", "text", "losses", "lrs"),
    [
        ("training.log.gz", LOG, [4.5] * 3 + [4.0] * 2, [0.02] * 3 + [0.01] * 2),
        ("other.txt", "Loss 4.5   Global Step: 2", [4.5, 4.5], []),
        ("metrics.csv", METRICS, [3.0, 3.0, 2.0, 2.0], [0.1, 0.1, 0.05, 0.05]),
        ("metrics.csv.gz", "train_loss\n3.0\ninf\n1.0\n", [3.0, math.inf, 1.0], []),
        ("loss.csv", "loss,other\n1.0,5.0\n", [1.0], []),
    ],
)
def test_a_row_stands_for_the_steps_since_the_row_before(
    tmp_path: Path, name: str, text: str, losses: list[float], lrs: list[float]
) -> None:
    path = write(tmp_path / name, text)
    assert read_losses(path) == (losses, lrs)
    if "other" in text:
        assert read_losses(path, column="other").losses == [5.0]


def test_beside_the_metrics_of_a_run_lies_the_loss_of_every_step(tmp_path: Path) -> None:
    metrics = write(tmp_path / "metrics.csv", METRICS)
    for losses in ([], [4.0, 3.5, 3.0, math.inf, 2.0, 1.0], [4.0, 3.5, 3.0]):
        (tmp_path / "losses.f32").write_bytes(struct.pack(f"<{len(losses)}f", *losses) + b"tor")
        of_rows = [3.0, 3.0, 2.0, 2.0][len(losses) :]  # of a run that goes on
        lrs = [0.1, 0.1, 0.05, 0.05, 0.05, 0.05][: max(len(losses), 4)]
        expected = [*losses, *of_rows], lrs
        assert read_losses(metrics) == read_losses(tmp_path / "losses.f32") == expected
    metrics.write_text("step,lr-SGD,train/loss\n1,,3.0\n3,0.1,2.0\n")
    assert read_losses(metrics) == ([4.0, 3.5, 3.0, 2.0], [])
    metrics.write_text("step,verify/accuracy\n1,0.5\n")
    assert read_losses(tmp_path / "losses.f32") == ([4.0, 3.5, 3.0], [])
    metrics.unlink()
    assert read_losses(tmp_path / "losses.f32") == ([4.0, 3.5, 3.0], [])
    write(metrics, METRICS)
    assert read_losses(metrics, column="train/loss").losses == [3.0, 3.0, 2.0, 2.0]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", "step,accuracy\n1,2\n"),
        ("a.csv", "loss\n"),
        ("a.csv", "loss\nhigh\n"),
        ("a.csv", "loss,step\n1,\n"),
        ("a.csv", "loss,step\n1,1e999\n"),
        ("a.csv", f"loss,step\n1,{'9' * 30}\n"),
        ("a.log", ""),
        ("a.log", "Loss 4.5x   Global Step: 2"),
    ],
)
def test_a_file_without_a_loss_is_refused_by_name(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(ValueError, match=name):
        read_losses(write(tmp_path / name, text))


def test_a_file_that_cannot_be_read_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"log must be an existing file, got {tmp_path}"):
        read_losses(tmp_path)
    with pytest.raises(ValueError, match="mine"):
        read_losses(write(tmp_path / "a.csv", "loss,step\n1,2\n"), column="mine")
    (tmp_path / "a.log.gz").write_text(LOG)
    with pytest.raises(ValueError, match=r"a\.log\.gz"):
        read_losses(tmp_path / "a.log.gz")
