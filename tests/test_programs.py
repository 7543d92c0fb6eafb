"""The programs as a user meets them: what a run leaves, how it resumes, what bad input gets."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from programs import ROOT, Run, load

from fastface_lightning.data import encode_jpeg, write_verification_bin
from fastface_lightning.data.datasets.synthetic_faces import draw_face

SMALL = [
    "data.num_identities=8",
    "data.images_per_identity=4",
    "data.verify_identities=6",
    "data.verify_pairs=20",
    "data.batch_size=8",
    "trainer.enable_progress_bar=false",
]


def small(*more: str) -> list[str]:
    return [*SMALL, *more]


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    """A tiny tree in the web-face sets' layout: six people, four noisy images each."""
    rng = np.random.default_rng(0)
    for person in range(6):
        folder = tmp_path / "faces" / f"person_{person}"
        folder.mkdir(parents=True)
        for image in range(4):
            pixels = rng.integers(0, 256, (112, 112, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{image}.jpg")
    return tmp_path / "faces"


def test_a_run_leaves_what_the_readme_promises(run: Run) -> None:
    ended = run(*small("trainer.max_epochs=2", "trainer.log_every_n_steps=1"))
    assert ended.code == 0, ended.err
    results = json.loads((ended.folder / "results.json").read_text())
    assert results["steps"] == 8 and results["images"] == 64
    verified = results["verification"]["synthetic"]
    assert 0 <= verified["accuracy"] <= 1 and 0 <= verified["untrained_accuracy"] <= 1
    assert results["images_per_second"] > 0 and results["wall_seconds"] > 0
    assert results["peak_memory_bytes"] > 1e7 and results["final_loss"] > 0
    assert {"step", "train/loss", "fastface/lr_scale", "lr-SGD"} <= set(rows(ended.folder)[0])
    assert [float(r["step"]) for r in rows(ended.folder) if r["train/loss"]] == list(range(8))
    checkpoint = torch.load(ended.folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 8
    assert (ended.folder / "schedule.png").stat().st_size > 10_000
    assert "FastFace" in (ended.folder / "config.yaml").read_text()
    assert "verification synthetic" in ended.out and "untrained" in ended.out

    page = (ended.folder / "report.html").read_text()
    assert "Verification over time" in page and "data:image/jpeg;base64" in page
    assert set(json.loads((ended.folder / "roc.json").read_text())["synthetic"]) == {"far", "tar"}


def test_verifies_every_so_many_steps_and_keeps_the_best(run: Run, tmp_path: Path) -> None:
    """On two sets, whose mean says which checkpoint is the best; also with accumulation."""
    same = [i % 2 > 0 for i in range(20)]
    encoded = [encode_jpeg(draw_face(1, i // 2, i).transpose(1, 2, 0)) for i in range(40)]
    write_verification_bin(tmp_path / "lfw.bin", encoded, same)
    ended = run(
        *small("trainer.max_epochs=2", "trainer.accumulate_grad_batches=2"),
        *("data.batch_size=4", f"data.verify=[{tmp_path}/lfw.bin]", "verify.every_n_steps=3"),
    )
    assert ended.code == 0, ended.err
    found = [row for row in rows(ended.folder) if row["verify/accuracy"]]
    # Untrained, then after steps 3 and 6 (logged as the steps just taken), and where the run ends.
    assert [float(row["step"]) for row in found] == [0, 2, 5, 8]
    for row in found:
        both = [float(row[f"verify/{name}/accuracy"]) for name in ("synthetic", "lfw")]
        assert float(row["verify/accuracy"]) == pytest.approx(sum(both) / 2)
    trained = [float(row["verify/accuracy"]) for row in found[1:]]
    best = json.loads((ended.folder / "results.json").read_text())["best"]
    assert best["accuracy"] == pytest.approx(max(trained))
    assert best["step"] == [3, 6, 8][trained.index(max(trained))]
    checkpoint = torch.load(ended.folder / "checkpoints" / "best.ckpt", weights_only=True)
    assert checkpoint["global_step"] == best["step"]
    assert checkpoint["run"]["config"]["data"]["batch_size"] == 4
    mean = sum(checkpoint["run"]["verification"].values()) / 2
    assert mean == pytest.approx(best["accuracy"])


def test_verifies_at_the_end_also_when_steps_end_the_run(run: Run) -> None:
    results = run(*small("trainer.max_steps=2")).folder / "results.json"
    assert "synthetic" in json.loads(results.read_text())["verification"]


def test_a_run_folder_is_never_overwritten(run: Run) -> None:
    assert run(*small("trainer.max_steps=1")).code == 0
    again = run(*small("trainer.max_steps=1"))
    assert again.code == 2
    assert "error: the run folder must be new" in again.err and "resume=auto" in again.err


def test_resume_goes_on_with_its_metrics_and_its_schedule(run: Run) -> None:
    """Rows before the checkpoint stay, and steps, images and time add up."""
    steps = ["trainer.log_every_n_steps=1", "checkpoint.every_n_steps=1", "trainer.max_epochs=2"]
    first = run(*small("trainer.max_steps=5", *steps))
    with (first.folder / "metrics.csv").open("a") as file:  # a row past the checkpoint
        file.write(rows_line(first.folder, step=7))
    # The schedule was bound to five steps; the resumed run keeps it.
    second = run(*small("resume=auto", "trainer.max_steps=8", *steps))
    assert second.code == 0, second.err
    results = json.loads((second.folder / "results.json").read_text())
    assert results["steps"] == 8 and results["images"] == 64
    assert results["verification"]["synthetic"]["untrained_accuracy"] is not None
    assert [float(r["step"]) for r in rows(second.folder) if r["train/loss"]] == list(range(8))


def rows_line(folder: Path, step: int) -> str:
    names = (folder / "metrics.csv").read_text().splitlines()[0].split(",")
    values = {"step": str(step), "train/loss": "1.0", "epoch": "0"}
    return ",".join(values.get(name, "") for name in names) + "\n"


def test_the_last_weights_are_saved_wherever_the_run_ends(run: Run) -> None:
    """Between two periodic checkpoints too: what the results speak of is in last.ckpt."""
    first = run(*small("checkpoint.every_n_steps=5", "trainer.max_epochs=3", "trainer.max_steps=7"))
    checkpoint = torch.load(first.folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 7
    second = run(*small("resume=auto", "trainer.max_epochs=3", "trainer.max_steps=9"))
    assert second.code == 0, second.err
    assert json.loads((second.folder / "results.json").read_text())["steps"] == 9
    every = "checkpoint.every_n_steps=5"
    run(*small(every, "trainer.max_epochs=2"), folder="epochs")  # 8 steps
    third = run(*small(every, "trainer.max_epochs=3", "resume=auto"), folder="epochs")
    assert json.loads((third.folder / "results.json").read_text())["steps"] == 12
    assert [r["step"] for r in rows(third.folder) if r["train/loss"]] == ["9"]  # every tenth step


def test_resuming_a_finished_run_keeps_its_results(run: Run) -> None:
    first = run(*small("trainer.max_epochs=1"))
    before = json.loads((first.folder / "results.json").read_text())
    after = run(*small("trainer.max_epochs=1", "resume=auto")).folder / "results.json"
    kept = ("steps", "images", "final_loss", "verification", "lr_changes", "final_lr")
    now = json.loads(after.read_text())
    assert {key: now[key] for key in kept} == {key: before[key] for key in kept}


def test_a_checkpoint_of_another_network_is_refused(run: Run) -> None:
    assert run(*small("trainer.max_steps=1")).code == 0
    ended = run(*small("trainer.max_steps=2", "resume=auto", "model.embedding_size=64"))
    assert ended.code == 2 and "must be of the same network and data" in ended.err


def test_torch_schedules_leave_their_changes_too(run: Run) -> None:
    steps = ["trainer.max_epochs=10", "trainer.log_every_n_steps=1"]
    ended = run(*small("schedule=multistep", *steps))
    changes = json.loads((ended.folder / "results.json").read_text())["lr_changes"]
    assert [change["step"] for change in changes] == [19, 29, 35]
    assert [change["factor"] for change in changes] == pytest.approx([0.1] * 3)
    assert any(row["lr-SGD"] for row in rows(ended.folder))


def test_the_resolved_config_is_kept(run: Run) -> None:
    ended = run(*small("seed=3", "trainer.max_steps=1", "schedule=multistep"))
    text = (ended.folder / "config.yaml").read_text()
    assert "${" not in text and "0.5 of the run" in text


def test_devices_decide_what_is_left_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """bf16 where the card has it, else the paper's float16 with its loss scaler; CPU: float32."""
    train = load(ROOT / "train.py")

    def resolved(cuda: bool, bf16: bool, accelerator: str = "auto", plan: Any = False) -> Any:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: bf16)
        monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
        trainer = {"accelerator": accelerator, "precision": "auto", "benchmark": None}
        trainer["gradient_clip_val"] = 5.0
        optimizer, model = {"fused": "auto"}, {"channels_last": "auto"}
        cfg = OmegaConf.create(
            {"trainer": trainer, "optimizer": optimizer, "model": model, "plan": plan}
        )
        train.resolve_device(cfg)
        return cfg, train.loss_scaling(cfg)

    cfg, plugins = resolved(cuda=False, bf16=False)
    assert (cfg.trainer.precision, cfg.model.channels_last, plugins) == ("32-true", False, {})
    cfg, plugins = resolved(cuda=True, bf16=True)
    assert (cfg.trainer.precision, cfg.trainer.benchmark, plugins) == ("bf16-mixed", True, {})
    assert cfg.model.channels_last and cfg.optimizer.fused
    cfg, plugins = resolved(cuda=True, bf16=False)
    assert cfg.trainer.precision == "16-mixed" and plugins["precision"] is None
    assert not cfg.optimizer.fused  # FACTS 7: its gradients could not be clipped
    assert plugins["plugins"].scaler.get_growth_interval() == 100
    cfg, plugins = resolved(cuda=True, bf16=True, accelerator="cpu")
    assert (cfg.trainer.precision, plugins) == ("32-true", {})
    cfg, _ = resolved(cuda=False, bf16=False, plan=24)  # for a card that is elsewhere
    assert (cfg.trainer.precision, cfg.model.channels_last) == ("bf16-mixed", True)
    cfg, _ = resolved(cuda=False, bf16=False, plan=True)
    assert cfg.trainer.precision == "32-true"


@pytest.mark.slow
def test_two_processes_train_as_one_program(tmp_path: Path) -> None:
    """DDP on gloo through the program itself: one summary, the images of both."""
    command = [sys.executable, str(ROOT / "train.py"), f"hydra.run.dir={tmp_path / 'run'}"]
    command += [*SMALL, "trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    command += ["trainer.max_steps=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("HYDRA_FULL_ERROR", None)
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["images"] == 32 and "synthetic" in results["verification"]
    assert done.stdout.count("verification synthetic") == 1


def test_resume_keeps_what_the_run_was_started_with(run: Run) -> None:
    """`hydra.run.dir=RUN resume=auto` alone goes on with RUN; what it adds goes over that."""
    run(*small("trainer.max_epochs=1", "optimizer.lr=0.05"))
    ended = run("resume=auto", "trainer.max_epochs=2")
    assert ended.code == 0, ended.err
    assert json.loads((ended.folder / "results.json").read_text())["steps"] == 8
    config = OmegaConf.load(ended.folder / "config.yaml")
    assert (config.optimizer.lr, config.data.num_identities, config.trainer.max_epochs) == (
        0.05,
        8,
        2,
    )


def test_resume_auto_starts_anew_where_there_is_nothing(run: Run) -> None:
    assert run(*small("resume=auto", "trainer.max_steps=1")).code == 0


def test_resume_from_any_checkpoint_into_another_folder(run: Run) -> None:
    first = run(*small("trainer.max_steps=2"))
    file = first.folder / "checkpoints" / "last.ckpt"
    second = run(*small(f"resume={file}", "trainer.max_steps=3"), folder="other")
    assert second.code == 0, second.err
    assert json.loads((second.folder / "results.json").read_text())["steps"] == 3


@pytest.mark.parametrize(
    ("first", "then", "message"),
    [
        ("fastface", "mhlr", "written by another schedule (FastFace) than MHLR()"),
        ("cosine", "fastface", "must come from"),
        ("fastface", "cosine", "written with no torch scheduler for a run with CosineAnnealingLR"),
        ("cosine", "multistep", "written with CosineAnnealingLR for a run with MultiStepLR"),
    ],
)
def test_a_checkpoint_of_another_schedule_is_refused(
    run: Run, first: str, then: str, message: str
) -> None:
    assert run(*small(f"schedule={first}", "trainer.max_steps=1")).code == 0
    ended = run(*small(f"schedule={then}", "trainer.max_steps=2", "resume=auto"))
    assert ended.code == 2, ended.out
    assert message in ended.err and ended.err.count("error:") == 1
    assert "Traceback" not in ended.err


BAD_INPUT = [
    (["foo=1"], "Could not override 'foo'"),
    (["schedule=nonsense"], "Could not find 'schedule/nonsense' Available options"),
    (["schedule.ema_window=0"], "ema_window must be at least 1 step, got 0"),
    (["schedule.threshold=-1"], "threshold must be at least 0 and finite, got -1"),
    (["schedule.patience=1.5"], "patience must be a whole number of steps or a share"),
    (["schedule=mhlr", "schedule.haar_window=1"], "haar_window must be at least 2 steps, got 1"),
    (["data=folder"], "data.root"),
    (["data=folder", "data.root=nowhere"], "nothing at nowhere; expected nowhere/<identity>"),
    (
        ["data=webface12m", "model=r100"],
        "webface12m: nothing at data/webface12m; expected data/webface12m/<identity>/<image>.jpg, "
        "a .rec or .zip files with 617,970 identities and 12,720,066 images",
    ),
    (["data=lfw", "data.root=nowhere"], "lfw: no nowhere"),
    (["resume=nowhere.ckpt"], "resume must be 'auto' or a checkpoint file, got nowhere.ckpt"),
    (["model=timm", "model.name=convnxt_tiny"], "convnext_tiny"),
    (["margin.m=5"], "m must lie in [0, 2), got 5"),
    (["trainer.max_epochs=-1"], "needs the length of the run"),
    (["optimizer.lr=abc"], "optimizer.lr must be a number, got 'abc'"),
    (["seed=abc"], "seed must be a number, got 'abc'"),
    (["schedule.threshold=abc"], "threshold must be a number, got 'abc'"),
    ([f"resume={ROOT / 'README.md'}"], "resume must be a checkpoint of train.py, got"),
    (["+trainer.gradient_clip_algorithm=value"], "gradient_clip_val must be a norm"),
    (["trainer.gradient_clip_val=-1"], "gradient_clip_val must be a norm of at least 0"),
    (["data.batch_size=33"], "batch_size 33 is larger than the 32 training images"),
    (["data.batch_size=1"], "a training batch must hold at least 2 images for BatchNorm, got 1"),
    (["classifier.chunk=0"], "chunk must be at least 1 class, got 0"),
    (["classifier=partial", "classifier.rate=0"], "rate must lie in (0, 1], got 0"),
    (["classifier=partial", "classifier.rate=1.5"], "rate must lie in (0, 1], got 1.5"),
    (["classifier.products=float16"], "products must be float32 or bfloat16, got 'float16'"),
    (["classifier.lr=-1"], "classifier_lr must be at least 0 and finite, got -1"),
    (["classifier=partial", "optimizer=adamw"], "(optimizer=sgd), got AdamW"),
    (["weights=nowhere.pth"], "weights must be a file, got nowhere.pth"),
    ([f"weights={ROOT / 'README.md'}"], "weights must be a file of tensors"),
    (["model.freeze=[layer9]"], "freeze must name parts of the backbone, got 'layer9'"),
    (["classifier.lr=fast"], "classifier.lr must be a number, got 'fast'"),
    (["classifier.reinit=true"], "classifier.reinit=true needs weights=FILE"),
    ([f"resume={ROOT / 'README.md'}", "weights=x"], "starts from weights or goes on from resume"),
    (["plan=24GB"], "plan must be a number, got '24GB'"),
    (["plan=0"], "plan must be true or a card's memory in GiB, got 0"),
    (["plan=inf"], "plan must be true or a card's memory in GiB, got inf"),
    (["plan=24", "trainer=ddp", "trainer.devices=4"], "a plan is of one device"),
    (["plan=24", "classifier=partial", "optimizer=adamw"], "(optimizer=sgd), got AdamW"),
    (["plan=-3"], "plan must be true or a card's memory in GiB, got -3"),
    (["plan=true", "trainer.max_epochs=null"], "a plan needs the length of the run"),
    (["plan=true", "trainer.precision=64-true"], "precision must be one of 32-true, bf16-mixed"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD_INPUT, ids=lambda x: str(x)[:40])
def test_bad_input_gets_one_sentence(run: Run, arguments: list[str], message: str) -> None:
    own_data = any(argument.startswith("data=") for argument in arguments)
    base = ["trainer.enable_progress_bar=false"] if own_data else small()
    ended = run(*base, *arguments)
    assert ended.code == 2
    assert message in ended.err
    last = ended.err.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "Traceback" not in ended.err


def test_a_fault_of_the_program_keeps_its_traceback(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("fastface_lightning.data.FaceDataModule.setup", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        run(*small("trainer.max_steps=1"))


def test_folder_with_held_out_people(run: Run, faces: Path) -> None:
    ended = run(
        "trainer.enable_progress_bar=false",
        "data=folder",
        f"data.root={faces}",
        "data.held_out=0.5",
        "data.verify_pairs=10",
        "data.batch_size=4",
        "data.num_workers=0",
        "trainer.max_epochs=1",
    )
    assert ended.code == 0, ended.err
    results = json.loads((ended.folder / "results.json").read_text())
    assert "held_out" in results["verification"]


def test_bad_files_are_named_and_skipped(run: Run, faces: Path) -> None:
    """A truncated JPEG costs a warning with its name; more than data.max_bad stop the run."""
    victim = faces / "person_1" / "2.jpg"
    victim.write_bytes(victim.read_bytes()[:500])
    base = [
        "trainer.enable_progress_bar=false",
        "data=folder",
        f"data.root={faces}",
        "data.held_out=0",
    ]
    base += ["data.batch_size=4", "data.num_workers=0", "trainer.max_epochs=1"]
    ended = run(*base)
    assert ended.code == 0, ended.err
    assert str(victim) in ended.out + ended.err
    assert json.loads((ended.folder / "results.json").read_text())["bad_images"] == [str(victim)]
    Image.new("RGB", (112, 112)).save(victim)
    ended = run("resume=auto", "trainer.max_epochs=2")
    assert json.loads((ended.folder / "results.json").read_text())["bad_images"] == [str(victim)]
    victim.write_bytes(victim.read_bytes()[:500])
    stopped = run(*base, "data.max_bad=0", folder="other")
    assert stopped.code == 2
    assert "max_bad" in stopped.err and str(victim) in stopped.err


@pytest.mark.slow
def test_the_paper_run_trains_on_a_tree_in_its_layout(run: Run, faces: Path) -> None:
    """r100 on WebFace12M's layout, two steps."""
    ended = run(
        "trainer.enable_progress_bar=false",
        "model=r100",
        "data=webface12m",
        f"data.root={faces}",
        "data.batch_size=4",
        "data.num_workers=0",
        "trainer.max_steps=2",
    )
    assert ended.code == 0, ended.err
    assert json.loads((ended.folder / "results.json").read_text())["steps"] == 2
    assert "expected 617,970 identities" in ended.out + ended.err


def test_lfw_view_1(run: Run, shared_data: Path) -> None:
    ended = run(
        "trainer.enable_progress_bar=false",
        "data=lfw",
        f"data.root={shared_data / 'lfw112'}",
        "data.num_workers=0",
        "data.batch_size=8",
        "trainer.max_steps=2",
        "trainer.limit_val_batches=2",
    )
    assert ended.code == 0, ended.err
    assert "Betsy_Coffin" in ended.out + ended.err


def test_sweep_runs_every_combination(run: Run, tmp_path: Path) -> None:
    sweep = tmp_path / "sweep"
    ended = run(
        "-m",
        f"hydra.sweep.dir={sweep}",
        "schedule.ema_window=10,20",
        "schedule.haar_window=10,20",
        *small("trainer.max_steps=2"),
    )
    assert ended.code == 0, ended.err
    assert len(list(sweep.glob("*/results.json"))) == 4


def test_fine_tuning_on_other_identities(run: Run) -> None:
    """Frozen stages stay to the bit, new centres come, and each part has its learning rate."""
    first = run(*small("trainer.max_steps=2"))
    file = first.folder / "checkpoints" / "last.ckpt"
    more = ["data.num_identities=11", "trainer.max_steps=2", "trainer.log_every_n_steps=1"]
    refused = run(*small(*more, f"weights={file}"), folder="refused")
    assert refused.code == 2
    assert "weights must hold (11, 128) class centres, got (8, 128)" in refused.err
    more += ["classifier.reinit=true", "classifier.lr=0.1", "model.freeze=[conv1,bn1,layer1]"]
    ended = run(*small(*more, f"weights={file}"), folder="fine")
    assert ended.code == 0, ended.err
    before, after = (
        torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
        for folder in (first.folder, ended.folder)
    )
    assert after["classifier.weight"].shape == (11, 128)
    for name, tensor in before.items():
        if name.startswith(("backbone.conv1.", "backbone.bn1.", "backbone.layer1.")):
            assert torch.equal(after[name], tensor), name
    assert not torch.equal(after["backbone.fc.weight"], before["backbone.fc.weight"])
    rates = next(row for row in rows(ended.folder) if row["lr-SGD/pg1"])
    found = [float(rates["lr-SGD/pg1"]), float(rates["lr-SGD/pg2"])]
    assert found == pytest.approx([0.02, 0.1], rel=1e-6)
    # The run goes on without the file that it started from.
    file.unlink()
    again = run("resume=auto", "trainer.max_steps=3", folder="fine")
    assert again.code == 0, again.err


def test_onecycle_keeps_the_classifiers_own_learning_rate(run: Run) -> None:
    steps = ["trainer.max_steps=3", "trainer.log_every_n_steps=1"]
    ended = run(*small("schedule=onecycle", "classifier.lr=0.1", *steps))
    assert ended.code == 0, ended.err
    for row in rows(ended.folder):
        if row["lr-SGD/pg1"]:
            assert float(row["lr-SGD/pg2"]) == pytest.approx(5 * float(row["lr-SGD/pg1"]), rel=1e-3)


@pytest.mark.parametrize("classifier", ["full", "chunked", "partial"])
def test_every_classifier_trains_and_resumes(run: Run, classifier: str) -> None:
    first = run(*small(f"classifier={classifier}", "trainer.max_steps=2"))
    assert first.code == 0, first.err
    second = run("resume=auto", "trainer.max_steps=3")
    assert second.code == 0, second.err
    assert json.loads((second.folder / "results.json").read_text())["steps"] == 3


@pytest.mark.parametrize(
    ("margin", "name", "start"), [("adaface", "std", 100.0), ("curricularface", "t", 0.0)]
)
def test_margins_with_a_memory_resume(run: Run, margin: str, name: str, start: float) -> None:
    """One step after a checkpoint that holds 50, the statistic is still near 50."""
    first = run(*small(f"margin={margin}", "trainer.max_steps=2"))
    assert first.code == 0, first.err
    file, key = first.folder / "checkpoints" / "last.ckpt", f"classifier.margin.{name}"
    checkpoint = torch.load(file, weights_only=True)
    assert 0 < abs(checkpoint["state_dict"][key] - start) < 5
    checkpoint["state_dict"][key].fill_(50.0)
    torch.save(checkpoint, file)
    second = run("resume=auto", "trainer.max_steps=3")
    assert second.code == 0, second.err
    held = torch.load(file, weights_only=True)["state_dict"][key]
    assert 49 < held < 51 and held != 50


def test_resume_with_another_memory_format(run: Run) -> None:
    """The momentum goes with the weights: what channels_last says changes nothing of note."""
    ends = {}
    for channels_last in ("true", "false"):
        steps = ["checkpoint.every_n_steps=1", "trainer.max_epochs=2"]
        run(*small("trainer.max_steps=3", *steps), folder=channels_last)
        again = [f"model.channels_last={channels_last}", "trainer.max_steps=5", "resume=auto"]
        ended = run(*small(*again, *steps), folder=channels_last)
        assert ended.code == 0, ended.err
        file = ended.folder / "checkpoints" / "last.ckpt"
        ends[channels_last] = torch.load(file, weights_only=True)["state_dict"]
    for key, value in ends["true"].items():
        torch.testing.assert_close(ends["false"][key], value, rtol=0.01, atol=0.01)


def test_resume_names_a_learning_rate_that_was_not_there(run: Run) -> None:
    assert run(*small("trainer.max_steps=1")).code == 0
    ended = run("resume=auto", "trainer.max_steps=2", "classifier.lr=0.1")
    assert ended.code == 2
    assert (
        "classifier.lr must be set as in the run of the checkpoint, where it was null" in ended.err
    )


@pytest.mark.slow
def test_plan_of_the_papers_run_without_its_data(run: Run) -> None:
    """FACTS: 617,970 identities, r100 with 65.16 M parameters; 30 hours on a card of 24 GB."""
    ended = run("model=r100", "data=webface12m", "plan=24")
    assert ended.code == 0, ended.err
    plan = json.loads((ended.folder / "plan.json").read_text())
    assert plan["num_classes"] == 617_970 and plan["batches"] == 496_875
    assert plan["precision"] == "bf16-mixed" and plan["classifier"] == "chunked"
    assert plan["backbone"]["gradients"] == pytest.approx(4 * 65.16e6, rel=1e-3)
    for kind in ("chunked", "full", "partial"):
        head = plan["heads"][kind]
        assert head["weights"] == head["states"] == 617_970 * 512 * 4
    # By hand: three times 12.09 G multiply-adds an image, and four products of the last layer.
    product = 2 * 128 * 617_970 * 512
    assert plan["flops"] / 496_875 == pytest.approx(128 * 6 * 12.09e9 + 4 * product, rel=0.01)
    assert plan["heads"]["chunked"]["fits"]
    assert list(plan["heads"]) == ["chunked", "attfc", "dcp", "full", "partial"]
    # A tenth of the identities with two features each, and the gallery net; three times the images.
    pool, network = plan["heads"]["dcp"], plan["backbone"]["weights"]
    assert pool["weights"] == pytest.approx(2 * 61_797 * 512 * 4 + network, rel=1e-6)
    assert (pool["gradients"], pool["states"], pool["images"]) == (0, 0, 3 * 128)
    assert "classifier=partial" in ended.out and not (ended.folder / "checkpoints").exists()
    smaller = run("model=r100", "data=webface12m", "plan=13.5", folder="smaller")
    heads = json.loads((smaller.folder / "plan.json").read_text())["heads"]
    assert {name: head["fits"] for name, head in heads.items()} == {
        "chunked": False,
        "attfc": True,
        "dcp": False,
        "full": False,
        "partial": True,
    }
    assert "classifier=attfc or classifier=partial would fit" in smaller.out


def test_plan_of_a_chunk_that_is_too_large(run: Run) -> None:
    ended = run("data=webface4m", "plan=3.4", "classifier.chunk=205990", "data.batch_size=512")
    assert ended.code == 0, ended.err
    heads = json.loads((ended.folder / "plan.json").read_text())["heads"]
    assert not heads["chunked"]["fits"] and heads["chunked classifier.chunk=null"]["fits"]
    assert "classifier=chunked classifier.chunk=null or classifier=" in ended.out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto", "resnet18"])
def test_plan_of_timm_models(run: Run, name: str) -> None:
    ended = run("model=timm", f"model.name={name}", "plan=8")
    assert ended.code == 0, ended.err
    plan = json.loads((ended.folder / "plan.json").read_text())["backbone"]
    assert 0 < plan["gradients"] <= plan["weights"] and plan["activations"] > 2**26


def test_plan_of_a_sample_smaller_than_the_batch(run: Run) -> None:
    ended = run("classifier=partial", "classifier.rate=0.001", "data=ms1mv3", "plan=24")
    assert ended.code == 0, ended.err


def test_plan_counts_accumulated_gradients(run: Run) -> None:
    peaks = {}
    for batches in (1, 4):
        arguments = ["data=webface4m", "plan=24", f"trainer.accumulate_grad_batches={batches}"]
        ended = run(*arguments, folder=f"of_{batches}")
        peaks[batches] = json.loads((ended.folder / "plan.json").read_text())["heads"]
    for kind in ("full", "chunked"):
        more = peaks[4][kind]["peak"] - peaks[1][kind]["peak"]
        assert more >= 205_990 * 128 * 4 - 2**24


def test_plan_of_the_default_run(run: Run) -> None:
    ended = run("plan=true", "trainer=cpu")
    assert ended.code == 0, ended.err
    plan = json.loads((ended.folder / "plan.json").read_text())
    assert (plan["num_classes"], plan["batches"], plan["reserve"]) == (500, 624, 0)
    assert "fits" in ended.out and "does not" not in ended.out


def test_help_is_for_people(run: Run) -> None:
    ended = run("--help")
    assert ended.code == 0
    assert "Choose a part" in ended.out and "schedule: constant, cosine, fastface" in ended.out


def test_replay_of_a_csv(run: Run, tmp_path: Path) -> None:
    log = tmp_path / "loss.csv"
    log.write_text("loss\n" + "\n".join(str(5 - min(t, 400) / 100) for t in range(2000)))
    ended = run(
        f"log={log}",
        "schedule=mhlr",
        "schedule.haar_window=40",
        "lr=0.1",
        program="recipes/replay.py",
    )
    assert ended.code == 0, ended.err
    found = json.loads((ended.folder / "replay.json").read_text())
    assert found["total_steps"] == 2000
    assert found["changes"][0] == {"step": 516, "factor": 0.5, "lr": 0.05}
    assert (ended.folder / "replay.png").stat().st_size > 10_000
    assert "516" in ended.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "log"),
        (["log=nowhere"], "log must be an existing file, got nowhere"),
        (["log=nowhere", "total_steps=many"], "total_steps must be a whole number, got many"),
        (["log=nowhere", "lr=high"], "lr must be a number, got 'high'"),
        (
            ["log=nowhere", "schedule=cosine"],
            "schedule must be fastface or mhlr",
        ),
    ],
)
def test_replay_refuses_bad_input(run: Run, arguments: list[str], message: str) -> None:
    ended = run(*arguments, program="recipes/replay.py")
    assert ended.code == 2 and message in ended.err and "Traceback" not in ended.err
