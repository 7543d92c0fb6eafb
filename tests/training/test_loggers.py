"""Loggers beside metrics.csv: they get settings, metrics, figures, and a resume goes on there."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from programs import SMALL, Ended, Run
from test_resume import train

from fastface_lightning.training.loggers import ending_loggers, log_settings

EVERY = "trainer.log_every_n_steps=1"


@pytest.mark.program
def test_tensorboard_gets_settings_and_figures(run: Run) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    ended = run(*SMALL, "logger=tensorboard", "trainer.max_steps=2", EVERY)
    assert ended.code == 0, ended.err
    assert (ended.folder / "metrics.csv").is_file()
    events = EventAccumulator(str(ended.folder / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [0, 1]
    assert {"samples", "schedule"} <= {*events.Tags()["images"]}
    assert "num_identities: 8" in (ended.folder / "tensorboard" / "hparams.yaml").read_text()


@pytest.mark.program
def test_a_resume_goes_on_in_its_run_at_wandb(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")  # Lightning sets it for good; here for this test
    offline = ["logger=wandb", "logger.wandb.offline=true", EVERY]

    def check(ended: Ended, parts: int) -> str:
        assert ended.code == 0, ended.err
        name = json.loads((ended.folder / "loggers.json").read_text())["wandb"]
        files = sorted(ended.folder.glob(f"wandb/offline-run-*/run-{name}.wandb"))
        assert len(files) == len(list(ended.folder.glob("wandb/offline-run-*"))) == parts
        told = {b"num_identities", b"train/loss", b"verify/"}
        for _ in range(100):  # wandb's own process may write a little later
            told = {text for text in told if text not in files[-1].read_bytes()}
            time.sleep(0.1 if told else 0)
        assert not told
        images = [file.name for file in files[-1].parent.glob("files/media/images/*.png")]
        for figure in ("samples", "schedule"):
            assert any(image.startswith(f"{figure}_") for image in images)
        return name

    name = check(run(*SMALL, *offline, "trainer.max_steps=2"), 1)
    other = check(run(*SMALL, *offline, "trainer.max_steps=1", folder="other"), 1)
    assert other != name  # though in the same process, as the runs of a sweep
    assert check(run("resume=auto", "optimizer.lr=0.01", "trainer.max_steps=4"), 2) == name


def mlflow_run(folder: Path) -> tuple[Any, Any]:
    """A client of the run folder's database, and the only run in it."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{folder}/mlflow.db")
    experiment = client.get_experiment_by_name("fastface")
    assert experiment is not None
    (only,) = client.search_runs([experiment.experiment_id])
    return client, only


@pytest.mark.program
def test_a_resume_goes_on_in_its_run_at_mlflow(run: Run) -> None:
    """Also where it changes settings, which are parameters of MLflow's that never change."""
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    schedule = ["schedule=fastface", "averaging=none"]
    ended = run(*SMALL, *schedule, "logger=mlflow", "trainer.max_steps=2", EVERY)
    assert ended.code == 0, ended.err
    ended = run("resume=auto", "schedule.patience=3", "optimizer.lr=0.01", "trainer.max_steps=4")
    assert ended.code == 0, ended.err
    client, only = mlflow_run(ended.folder)
    name = only.info.run_id
    assert name == json.loads((ended.folder / "loggers.json").read_text())["mlflow"]
    assert [each.step for each in client.get_metric_history(name, "train/loss")] == [0, 1, 2, 3]
    assert only.data.params["optimizer/lr"] == "0.02"
    assert only.data.params["data/num_identities"] == "8"
    artifacts = {each.path for each in client.list_artifacts(name)}
    assert {"samples.png", "schedule.png"} <= artifacts
    assert only.info.status == "FINISHED"


@pytest.mark.program
def test_mlflow_may_come_with_a_resume(run: Run) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    assert run(*SMALL, "trainer.max_steps=2", EVERY).code == 0
    ended = run("resume=auto", "logger=mlflow", "trainer.max_steps=4")
    assert ended.code == 0, ended.err
    _, only = mlflow_run(ended.folder)
    assert only.data.params["data/num_identities"] == "8"


@pytest.mark.program
def test_of_two_ranks_one_logs(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    pytest.importorskip("sqlalchemy")
    ranks = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "data.batch_size=4"]
    assert (
        train(tmp_path / "run", *SMALL, *ranks, "logger=mlflow", "trainer.max_steps=2", EVERY) == 0
    )
    client, only = mlflow_run(tmp_path / "run")
    history = client.get_metric_history(only.info.run_id, "train/loss")
    assert [each.step for each in history] == [0, 1]


@pytest.mark.program
@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("wandb", ["lightning.pytorch.loggers.wandb._WANDB_AVAILABLE"]),
        ("mlflow", ["lightning.pytorch.loggers.mlflow._MLFLOW_AVAILABLE"]),
        (
            "tensorboard",
            [
                "lightning.fabric.loggers.tensorboard._TENSORBOARD_AVAILABLE",
                "lightning.fabric.loggers.tensorboard._TENSORBOARDX_AVAILABLE",
            ],
        ),
    ],
)
def test_an_absent_extra_is_named(
    run: Run, monkeypatch: pytest.MonkeyPatch, name: str, flags: list[str]
) -> None:
    for flag in flags:
        monkeypatch.setattr(flag, False)
    ended = run(*SMALL, f"logger={name}", "trainer.max_steps=1")
    assert ended.code == 2 and "Traceback" not in ended.err
    assert f"pip install -e '.[{name}]'" in ended.err


@pytest.mark.program
def test_settings_that_mlflow_refuses_get_a_sentence(run: Run) -> None:
    pytest.importorskip("mlflow")
    ended = run(*SMALL, "logger=mlflow", "logger.mlflow.tracking_uri=nowhere://x")
    assert ended.code == 2 and "Traceback" not in ended.err
    assert "error: logger=mlflow cannot begin: " in ended.err


def test_a_logger_that_cannot_begin_is_named(tmp_path: Path) -> None:
    class Closed(DummyLogger):
        def log_hyperparams(self, *_: Any, **__: Any) -> None:
            raise RuntimeError("no key")

    loggers = [CSVLogger(tmp_path), Closed()]
    config = {"logger": {"csv": {}, "closed": {"id": None}}}
    with pytest.raises(ValueError, match=r"logger=closed .*no key"):
        log_settings(loggers, tmp_path, config, resumed=False)
    assert not (tmp_path / "loggers.json").exists()


def test_errors_of_wandb_itself_are_a_sentence() -> None:
    refused = type("UsageError", (Exception,), {"__module__": "wandb.errors.errors"})
    with pytest.raises(ValueError, match="logger=wandb failed: no key"), ending_loggers():
        raise refused("no key")
    with pytest.raises(KeyError), ending_loggers():
        raise KeyError
