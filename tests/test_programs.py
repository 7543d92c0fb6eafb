"""The programs as a user meets them, in small: what a run leaves, what bad input gets."""

import csv
import json
from pathlib import Path

import pytest
import torch
from programs import SMALL, Run


def test_a_run_leaves_what_the_readme_promises(run: Run) -> None:
    """Forty steps on synthetic faces, under MultiStepLR so that its changes show."""
    ended = run(
        *SMALL,
        *("schedule=multistep", "trainer.max_epochs=10", "trainer.log_every_n_steps=1"),
        "verify.every_n_epochs=10",
    )
    assert ended.code == 0, ended.err
    results = json.loads((ended.folder / "results.json").read_text())
    assert results["steps"] == 40 and results["images"] == 320
    verified = results["verification"]["synthetic"]
    assert 0 <= verified["accuracy"] <= 1 and 0 <= verified["accuracy_before"] <= 1
    assert results["images_per_second"] > 0 and results["wall_seconds"] > 0
    assert results["peak_memory_bytes"] > 1e7 and results["final_loss"] > 0
    assert [change["step"] for change in results["lr_changes"]] == [19, 29, 35]
    assert [change["factor"] for change in results["lr_changes"]] == pytest.approx([0.1] * 3)
    with (ended.folder / "metrics.csv").open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    assert [float(row["step"]) for row in rows if row["train/loss"]] == list(range(40))
    assert any(row["lr-SGD"] for row in rows)
    checkpoint = torch.load(ended.folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == checkpoint["run"]["steps"] == 40
    assert (ended.folder / "checkpoints" / "best.ckpt").is_file()
    assert (ended.folder / "schedule.png").stat().st_size > 10_000
    config = (ended.folder / "config.yaml").read_text()
    assert "MultiStepLR" in config and "${" not in config
    page = (ended.folder / "report.html").read_text()
    assert "Verification over time" in page and "data:image/jpeg;base64" in page
    assert set(json.loads((ended.folder / "roc.json").read_text())["synthetic"]) == {"far", "tar"}
    assert "verification synthetic" in ended.out and "before training" in ended.out


def test_help_is_for_people(run: Run) -> None:
    ended = run("--help")
    assert ended.code == 0
    assert "Choose a part" in ended.out and "schedule: autowu, constant, cosine" in ended.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["schedule=nonsense"], "schedule/nonsense"),  # of Hydra
        (["optimizer.lr=abc"], "optimizer.lr must be a number, got 'abc'"),  # of the program
        (
            ["schedule=fastface", "schedule.ema_window=0"],
            "ema_window must be at least 1 step, got 0",
        ),  # of a part
        (["data.batch_size=33"], "batch_size 33 is larger than the 32 training images"),
        (["plan=0"], "plan must be true or a GPU's memory in GiB, got 0"),
    ],
)
def test_bad_input_gets_one_sentence(run: Run, arguments: list[str], message: str) -> None:
    """In each case from another place; the other refusals are tested where they are made."""
    ended = run(*SMALL, *arguments)
    assert ended.code == 2
    assert message in ended.err and "Traceback" not in ended.err
    assert ended.err.strip().splitlines()[-1].startswith("error: ")


def test_replay_of_a_csv(run: Run, tmp_path: Path) -> None:
    log = tmp_path / "loss.csv"
    log.write_text("loss\n" + "\n".join(str(5 - min(t, 400) / 100) for t in range(2000)))
    settings = ["schedule=mhlr", "schedule.haar_window=40", "lr=0.1"]
    ended = run(f"log={log}", *settings, program="recipes/replay.py")
    assert ended.code == 0, ended.err
    found = json.loads((ended.folder / "replay.json").read_text())
    assert found["total_steps"] == 2000
    assert found["changes"][0] == {"step": 559, "factor": 0.5, "lr": 0.05}
    assert (ended.folder / "replay.png").stat().st_size > 10_000
    assert "559" in ended.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["log=nowhere"], "log must be an existing file, got nowhere"),
        (["log=nowhere", "total_steps=many"], "total_steps must be a whole number, got many"),
        (["log=nowhere", "schedule=cosine"], "schedule must be fastface"),
    ],
)
def test_replay_refuses_bad_input(run: Run, arguments: list[str], message: str) -> None:
    ended = run(*arguments, program="recipes/replay.py")
    assert ended.code == 2 and message in ended.err and "Traceback" not in ended.err
