"""train.py in full: how it resumes, verifies, fine-tunes, plans and meets bad images."""

import csv
import json
import math
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from omegaconf import OmegaConf
from PIL import Image
from programs import SMALL, Ended, Run
from safetensors.torch import load_file
from timm.models._hub import save_for_hf

from fastface_lightning.data import People, encode_jpeg, write_verification_bin
from fastface_lightning.data.datasets.synthetic_faces import draw_face
from fastface_lightning.inference.embedder import load_embedder
from fastface_lightning.training.run_folder import in_use

pytestmark = pytest.mark.program
QUIET = "trainer.enable_progress_bar=false"


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open(newline="") as lines:
        return list(csv.DictReader(lines))


def results_of(ended: Ended) -> dict[str, Any]:
    assert ended.code == 0, ended.err
    return json.loads((ended.folder / "results.json").read_text())


def saved(ended: Ended, name: str = "last.ckpt") -> dict[str, Any]:
    return torch.load(ended.folder / "checkpoints" / name, weights_only=True)


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


def test_verifies_every_so_many_steps_and_keeps_the_best(run: Run, tmp_path: Path) -> None:
    """On two sets, whose mean says which checkpoint is the best; also with accumulation."""
    same = [i % 2 > 0 for i in range(20)]
    encoded = [encode_jpeg(draw_face(1, i // 2, i).transpose(1, 2, 0)) for i in range(40)]
    write_verification_bin(tmp_path / "lfw.bin", encoded, same)
    ended = run(
        *SMALL,
        "trainer.max_epochs=2",
        "trainer.accumulate_grad_batches=2",
        *("data.batch_size=4", f"data.verify=[{tmp_path}/lfw.bin]", "verify.every_n_steps=3"),
    )
    best = results_of(ended)["best"]
    found = [row for row in rows(ended.folder) if row["verify/accuracy"]]
    # Untrained, then after steps 3 and 6 (logged as the steps just taken), and where the run ends.
    assert [float(row["step"]) for row in found] == [0, 2, 5, 8]
    for row in found:
        both = [float(row[f"verify/{name}/accuracy"]) for name in ("synthetic", "lfw")]
        assert float(row["verify/accuracy"]) == pytest.approx(sum(both) / 2)
    trained = [float(row["verify/accuracy"]) for row in found[1:]]
    assert best["accuracy"] == pytest.approx(max(trained))
    assert best["step"] == [3, 6, 8][trained.index(max(trained))]
    checkpoint = saved(ended, "best.ckpt")
    assert checkpoint["global_step"] == best["step"]
    assert checkpoint["run"]["config"]["data"]["batch_size"] == 4
    mean = sum(checkpoint["run"]["verification"].values()) / 2
    assert mean == pytest.approx(best["accuracy"])


def test_early_stop_ends_once_accuracy_stops_improving(run: Run, faces: Path) -> None:
    """After ``patience`` verifications; where there are none the run is refused beforehand."""
    stop = ["callbacks=early_stop", "schedule=constant", "averaging=power"]
    stop += ["+trainer.max_time={hours: 3}"]  # Lightning takes plain dictionaries alone
    ended = run(
        *SMALL,
        *stop,
        *("callbacks.early_stop.patience=2", "trainer.max_epochs=9", "optimizer.lr=1e-12"),
    )
    results = results_of(ended)
    assert results["steps"] == results["best"]["step"] + 2 * 4 < 9 * 4  # four steps an epoch
    again = results_of(run("resume=auto"))  # stays as it is
    assert (again["steps"], again["best"]) == (results["steps"], results["best"])
    longer = results_of(run("resume=auto", stop[0], "callbacks.early_stop.patience=3"))
    assert longer["steps"] == results["steps"] + 4
    folder = ["data=folder", f"data.root={faces}", "data.held_out=0", "data.num_workers=0"]
    refused = run(*folder, *stop, "data.batch_size=4", "model=tiny", folder="refused")
    assert refused.code == 2 and "verify/accuracy" in refused.err


def test_resume_goes_on_with_its_settings_its_metrics_and_its_schedule(run: Run) -> None:
    """`hydra.run.dir=RUN resume=auto` alone; what it adds goes over that. Rows before the
    checkpoint stay, and steps, images and time add up."""
    steps = ["trainer.log_every_n_steps=1", "checkpoint.every_n_steps=2", "trainer.max_epochs=2"]
    first = run(*SMALL, "resume=auto", "trainer.max_steps=5", "optimizer.lr=0.05", *steps)
    assert first.code == 0 and saved(first)["global_step"] == 5
    assert "finds no checkpoint" in first.out
    with (first.folder / "metrics.csv").open("a", newline="") as file:  # a row past the checkpoint
        row = {"step": "7", "train/loss": "1.0", "epoch": "0"}
        csv.DictWriter(file, list(rows(first.folder)[0])).writerow(row)
    second = run("resume=auto", "trainer.max_steps=8")  # the schedule stays bound to five steps
    results = results_of(second)
    assert results["steps"] == 8 and results["images"] == 64
    assert results["verification"]["synthetic"]["accuracy_before"] is not None
    assert [float(r["step"]) for r in rows(second.folder) if r["train/loss"]] == list(range(8))
    config = OmegaConf.load(second.folder / "config.yaml")
    assert (config.optimizer.lr, config.data.num_identities) == (0.05, 8)

    ended = run("resume=auto", "trainer.max_steps=8")  # a finished run stays as it is
    again = results_of(ended)
    assert "had done all its steps" in ended.out
    for key in ("steps", "images", "final_loss", "verification", "lr_changes", "final_lr"):
        assert again[key] == results[key]
    file = second.folder / "checkpoints" / "last.ckpt"
    more = ["trainer.max_steps=9", "trainer.max_epochs=3"]  # all else as beside the file
    third = run(f"resume={file}", *more, folder="other")
    assert results_of(third)["steps"] == 9


def test_a_resume_verified_on_fewer_sets_forgets_the_others(run: Run, tmp_path: Path) -> None:
    """Their figures, and above all their thresholds, are of other weights."""
    same = [i % 2 > 0 for i in range(40)]
    encoded = [encode_jpeg(draw_face(1, i // 2, i).transpose(1, 2, 0)) for i in range(80)]
    write_verification_bin(tmp_path / "lfw.bin", encoded, same)
    first = run(*SMALL, f"data.verify=[{tmp_path}/lfw.bin]", "trainer.max_epochs=1")
    assert set(saved(first)["run"]["thresholds"]) == {"lfw", "synthetic"}
    second = run("resume=auto", "data.verify=[]", "trainer.max_epochs=2")
    assert set(results_of(second)["verification"]) == {"synthetic"}
    for kept in ("thresholds", "verification"):
        assert set(saved(second)["run"][kept]) == {"synthetic"}


def test_people_trained_on_give_no_threshold(run: Run, faces: Path, tmp_path: Path) -> None:
    names = sorted(person.name for person in faces.iterdir())
    lines = [f"{name}/{i}.jpg,{name}/{i + 1}.jpg,1" for name in names for i in range(3)]
    lines += [f"{a}/0.jpg,{b}/1.jpg,0" for a in names for b in names if a < b]
    (tmp_path / "seen.csv").write_text("\n".join(["a,b,same", *lines]) + "\n")
    ended = run(
        *("data=folder", f"data.root={faces}", "data.held_out=0", "data.batch_size=8", QUIET),
        *(f"data.verify=[{tmp_path}/seen.csv]", "trainer.max_steps=2", "data.num_workers=0"),
    )
    verified = results_of(ended)["verification"]["seen"]
    assert verified["people"] == verified["trained_people"] == 6
    assert verified["cosine_thresholds"] and not saved(ended)["run"]["thresholds"]


def test_a_resume_of_nothing_names_its_data(run: Run) -> None:
    ended = run("resume=auto", "trainer.max_steps=1", QUIET)
    assert ended.code == 2 and "must name its data" in ended.err
    assert not (ended.folder / "checkpoints").exists()


def test_what_a_resume_sets_holds_from_then_on(run: Run) -> None:
    """Of an optimizer, whose state would bring back the old; of a torch schedule with its base."""
    each = ["trainer.log_every_n_steps=1", "schedule=cosine", "schedule.T_max=8"]
    first = run(*SMALL, *each, "optimizer.lr=0.04", "trainer.max_steps=4")
    rates = [float(row["lr-SGD"]) for row in rows(first.folder) if row["lr-SGD"]]
    new = ["optimizer.lr=0.02", "optimizer.weight_decay=0.001", "margin.m=0.2"]
    second = run("resume=auto", *new, "trainer.max_steps=8")
    after = [float(row["lr-SGD"]) for row in rows(second.folder) if row["lr-SGD"]]
    assert after[:4] == rates
    expected = [0.02 * (1 + math.cos(math.pi * step / 8)) / 2 for step in range(4, 8)]
    assert after[4:] == pytest.approx(expected, rel=1e-5)
    (group,) = saved(second)["optimizer_states"][0]["param_groups"]
    assert group["weight_decay"] == 0.001
    for said in ("margin.m is 0.2, was 0.4", "lr 0.02, was 0.04", "weight_decay 0.001, was 0.0005"):
        assert said in second.out
    for other, words in {
        "optimizer=adamw": "written with SGD for AdamW",
        "schedule.T_max=9": "T_max must be 8, got 9",
        "classifier.lr=0.1": "classifier.lr null or a number as it was",
        "weights=x": "weights is for the start of a run, got x",
    }.items():
        refused = run("resume=auto", other, "trainer.max_steps=9")
        assert refused.code == 2 and words in refused.err


def test_the_average_is_what_is_verified_saved_exported_and_started_from(run: Run) -> None:
    averaging = ["averaging=power", "averaging.window=0.9", "optimizer.lr=0.2"]
    ended = run(*SMALL, *averaging, "trainer.max_epochs=3")
    results, checkpoint = results_of(ended), saved(ended)
    verified = results["verification"]["synthetic"]
    assert results["averaging"] == ("WeightAverage(window=0.9, module='backbone', every_n_steps=1)")
    # Both figures, in the console, the log and the page.
    last = rows(ended.folder)[-1]
    assert float(last["verify_raw/synthetic/accuracy"]) == pytest.approx(verified["raw_accuracy"])
    raw = f"{verified['raw_accuracy']:.2%}"
    assert raw in ended.out and f"raw weights {raw}" in (ended.folder / "report.html").read_text()
    assert set(checkpoint["run"]["verification"].values()) == {verified["accuracy"]}

    averaged = {k: v for k, v in checkpoint["state_dict"].items() if k.startswith("backbone.")}
    raw_weights = checkpoint["current_model_state"]
    assert raw_weights.keys() == averaged.keys()
    assert not torch.equal(*(w["backbone.conv1.weight"] for w in (averaged, raw_weights)))
    file = str(ended.folder / "checkpoints" / "last.ckpt")
    embedded = load_embedder(file).network.state_dict()
    target = ended.folder / "model.safetensors"
    exported = run(
        f"checkpoint={file}", f"target={target}", program="recipes/export.py", folder="e"
    )
    assert exported.code == 0, exported.err
    written = load_file(target)
    evaluated = run(f"checkpoint={file}", program="recipes/evaluate.py", folder="evaluated")
    assert evaluated.code == 0, evaluated.err
    told = json.loads((evaluated.folder / "evaluation.json").read_text())["sets"]["synthetic"]
    assert told["accuracy"] == pytest.approx(verified["accuracy"], abs=1e-6)
    # The thresholds too, in results.json, the checkpoint and the exported file.
    assert told["impostors"] == verified["impostors"] == 10 and told["tar"] == verified["tar"]
    thresholds = checkpoint["run"]["thresholds"]["synthetic"]
    assert thresholds == load_embedder(target).about["thresholds"]["synthetic"]
    assert thresholds["mirror"] and list(thresholds["cosine_thresholds"]) == ["1e-01"]
    assert thresholds["people"] == 6 and thresholds["precision"] == "32-true"
    for known in (verified, thresholds):
        cosines = known["cosine_thresholds"]
        assert cosines == pytest.approx(told["cosine_thresholds"], abs=1e-5)
    started = run(*SMALL, f"weights={file}", "optimizer.lr=0", "trainer.max_steps=1", folder="next")
    assert started.code == 0, started.err
    begun = saved(started)["state_dict"]
    for key, value in averaged.items():
        name = key.removeprefix("backbone.")
        assert torch.equal(embedded[name], value) and torch.equal(written[name], value)
        assert torch.equal(begun[key], value) or "running" in key or "num_" in key

    # Without averaging the run goes on from the raw weights; its results say so.
    ended = run("resume=auto", "averaging=none", "trainer.max_epochs=4")
    assert results_of(ended)["averaging"] is None
    assert "raw_accuracy" not in results_of(ended)["verification"]["synthetic"]
    assert "current_model_state" not in saved(ended)


def test_a_run_begun_from_a_folder_needs_it_no_more(run: Run, tmp_path: Path) -> None:
    """Its checkpoint says what the folder's network is; weights come from the checkpoint alone."""
    repo = tmp_path / "repo"
    save_for_hf(timm.create_model("test_resnet", num_classes=5), repo, safe_serialization=True)
    model = ["model=timm", f"model.name=local-dir:{repo}", "model.embedding_size=32"]
    begun = run(*SMALL, *model, "model.pretrained=true", "trainer.max_steps=1")
    assert begun.code == 0, begun.err
    shutil.rmtree(repo)
    resumed = run("resume=auto", "trainer.max_steps=2")
    assert results_of(resumed)["steps"] == 2
    assert "from here on trainer.max_steps is 2, was 1\n" in resumed.out
    file = resumed.folder / "checkpoints" / "last.ckpt"
    target = tmp_path / "model.safetensors"
    for program, arguments in {"export": [f"target={target}"], "evaluate": []}.items():
        ended = run(f"checkpoint={file}", *arguments, program=f"recipes/{program}.py", folder="e")
        assert ended.code == 0, ended.err
    images = torch.zeros(2, 3, 112, 112, dtype=torch.uint8)
    assert torch.equal(load_embedder(file)(images), load_embedder(target)(images))
    refused = run(*SMALL, *model, folder="another")
    assert refused.code == 2 and "Traceback" not in refused.err
    assert f"got local-dir:{repo} with pretrained=False: " in refused.err


def test_a_refused_resume_leaves_the_run_as_it_was(run: Run) -> None:
    first = run(*SMALL, "schedule=cosine", "trainer.max_steps=1")
    settings = (first.folder / "overrides.yaml").read_text()
    ended = run("resume=auto", "schedule=multistep", "trainer.max_steps=2")
    assert ended.code == 2 and "CosineAnnealingLR for a run with MultiStepLR" in ended.err
    assert ended.err.count("error:") == 1 and "Traceback" not in ended.err
    assert (first.folder / "overrides.yaml").read_text() == settings


def signalled(run: Run, **settings: Any) -> Ended:
    given = {"_target_": "watching.KillAt", "batch": 3, "signal": "SIGINT", "group": False}
    return run(*SMALL, *(f"+callbacks.kill.{k}={v}" for k, v in {**given, **settings}.items()))


def test_a_first_signal_ends_a_run_well(run: Run) -> None:
    """After the step, with a checkpoint, results, a report and the command that goes on."""
    ended = signalled(run)
    assert ended.code == 130 and "Traceback" not in ended.err
    assert saved(ended)["global_step"] == 3
    results = json.loads((ended.folder / "results.json").read_text())
    assert (results["steps"], results["interrupted"], results["verified_step"]) == (3, True, 0)
    assert "was interrupted" in ended.out and " at step 0 " in ended.out
    assert (ended.folder / "report.html").is_file()
    (line,) = (line for line in ended.out.splitlines() if "go on: python " in line)
    arguments = shlex.split(line.partition("python ")[2])[1:]
    again = run(*arguments, "+callbacks.kill.batch=null", "trainer.max_epochs=1")
    assert again.code == 0, again.err
    assert results_of(again)["steps"] == 4


@pytest.mark.parametrize("settings", [{"times": 2}, {"batch": 1}])
def test_a_second_signal_or_one_before_the_first_step_ends_it_now(
    run: Run, settings: dict[str, Any]
) -> None:
    ended = signalled(run, signal="SIGTERM", **settings)
    assert ended.code == 143 and "Traceback" not in ended.err
    assert not list(ended.folder.glob("checkpoints/*"))


def test_losses_that_are_no_numbers_end_a_run_and_spoil_no_checkpoint(run: Run) -> None:
    rate = [
        "schedule=cosine",
        "max_nonfinite=2",
        "optimizer.lr=1e12",
        "trainer.gradient_clip_val=0",
    ]
    ended = run(*SMALL, *rate)
    assert ended.code == 2 and "max_nonfinite=2" in ended.err and "no checkpoint" in ended.err
    (log,) = (file.read_text() for file in ended.folder.glob("*.log"))
    assert "max_nonfinite=2" in log
    assert not list(ended.folder.glob("checkpoints/*"))
    good = run(*SMALL, "trainer.max_steps=4", folder="good")
    before = saved(good)
    spoilt = run("resume=auto", *rate[1:], "trainer.max_steps=40", folder="good")
    last = good.folder / "checkpoints" / "last.ckpt"
    assert spoilt.code == 2 and f"{last} is the last good checkpoint" in spoilt.err
    assert saved(spoilt)["global_step"] == before["global_step"] == 4
    short = run(*SMALL, *rate[:1], *rate[2:], "trainer.max_steps=3", folder="short")
    assert short.code == 2 and "must end with finite weights" in short.err


def test_the_log_holds_what_the_console_said_once(run: Run, faces: Path) -> None:
    given = [f"data.root={faces}", "data.held_out=0.5", "data.batch_size=4", "data.num_workers=0"]
    ended = run("data=folder", *given, "trainer.max_steps=2", QUIET)
    (log,) = (file.read_text() for file in ended.folder.glob("*.log"))  # named by the program
    people = "3 people, 12 images to train on; 3 people, 12 images held out to verify on"
    for said in (people, "verification held_out", "the window must be longer"):
        assert log.count(said) == ended.out.count(said) == 1
    assert "TPU" not in ended.out + ended.err and "treespec" not in ended.out + ended.err
    assert results_of(ended)["data"] == {
        "identities": 3,
        "images": 12,
        "single": 0,
        "held_out": 3,
        "held_out_images": 12,
    }


def test_two_runs_never_share_a_folder(run: Run, tmp_path: Path) -> None:
    with in_use(tmp_path / "run"):
        assert "in use" in run(*SMALL, "trainer.max_steps=1").err
    assert run(*SMALL, "trainer.max_steps=1").code == 0


def test_bad_files_are_named_and_skipped(run: Run, faces: Path) -> None:
    """A truncated JPEG costs a warning with its name; more than data.max_bad stop the run."""
    victim = faces / "person_1" / "2.jpg"
    victim.write_bytes(victim.read_bytes()[:500])
    base = ["data=folder", f"data.root={faces}", "data.held_out=0", QUIET]
    base += ["data.batch_size=4", "data.num_workers=0", "trainer.max_epochs=1"]
    ended = run(*base)
    assert results_of(ended)["bad_images"] == [str(victim)]
    assert str(victim) in ended.out + ended.err
    Image.new("RGB", (112, 112)).save(victim)
    assert results_of(run("resume=auto", "trainer.max_epochs=2"))["bad_images"] == [str(victim)]
    victim.write_bytes(victim.read_bytes()[:500])
    stopped = run(*base, "data.max_bad=0", folder="other")
    assert stopped.code == 2 and "max_bad" in stopped.err and str(victim) in stopped.err


def test_people_are_those_of_the_run_however_the_folder_changes(run: Run, faces: Path) -> None:
    """A resume refuses others and leaves all as it was, an evaluation judges on the run's own, and
    fine-tuning verifies on nobody whom the weights have seen."""
    base = ["data=folder", f"data.root={faces}", "data.batch_size=4", "data.num_workers=0", QUIET]
    first = run(*base, "data.held_out=0.5", "trainer.max_steps=2")
    names = first.folder / "identities.txt"
    trained = names.read_text()
    people = People.in_checkpoint(saved(first))
    assert people is not None and "\n".join([*people.trained, ""]) == trained
    accuracy = results_of(first)["verification"]["held_out"]["accuracy"]

    evaluate = (f"checkpoint={first.folder}/checkpoints/last.ckpt",)
    (faces / people.trained[0]).rename(faces / "a_new_name")
    shutil.copytree(faces / people.trained[1], faces / "one_more")
    ended = run(*evaluate, program="recipes/evaluate.py", folder="evaluated")
    assert ended.code == 0, ended.err
    sets = json.loads((ended.folder / "evaluation.json").read_text())["sets"]
    assert sets["held_out"]["accuracy"] == pytest.approx(accuracy)
    of_all = [*evaluate, f"verify=[{faces}]"]
    said = run(*of_all, program="recipes/evaluate.py", folder="all")
    assert f"such as {min(people.trained[1:])}" in said.out + said.err
    pairs = faces / "pairs.txt"
    same = "".join(f"{faces}/{name}/0.jpg,{faces}/{name}/1.jpg,1\n" for name in people.held_out)
    for name, warned in ((people.held_out[0], False), (people.trained[1], True)):
        other = f"{faces}/{name}/0.jpg,{faces}/{people.held_out[1]}/1.jpg,0\n"
        pairs.write_text((same + other) * 5)
        of_pairs = [*evaluate, f"verify=[{pairs}]"]
        said = run(*of_pairs, program="recipes/evaluate.py", folder=f"pairs_{warned}")
        assert said.code == 0 and ("such as" in said.out + said.err) is warned

    refused = run("resume=auto", "trainer.max_steps=4")
    assert refused.code == 2 and f"got 'a_new_name' for '{people.trained[0]}'" in refused.err
    assert names.read_text() == trained

    weights = [f"weights={first.folder}/checkpoints/last.ckpt", "classifier.reinit=true"]
    tuned = run(*base, *weights, "data.held_out=0.6", "trainer.max_steps=2", folder="tuned")
    assert tuned.code == 0, tuned.err
    after = People.in_checkpoint(saved(tuned))
    assert after is not None and set(people.held_out) <= set(after.held_out)
    assert not set(after.held_out) & set(people.trained) and after.earlier == people.trained
    last = f"resume={tuned.folder}/checkpoints/last.ckpt"
    again = run(last, "trainer.max_steps=3", folder="tuned")  # though it began from weights
    assert again.code == 0 and People.in_checkpoint(saved(again)) == after
    taken = run(*base, weights[0], "data.held_out=0.5", folder="centres")
    assert taken.code == 2 and "'a_new_name'" in taken.err


def test_fine_tuning_on_other_identities(run: Run) -> None:
    """Frozen stages stay to the bit, new centres come, and each part has its learning rate."""
    first = run(*SMALL, "trainer.max_steps=2")
    file = first.folder / "checkpoints" / "last.ckpt"
    more = ["data.num_identities=11", "trainer.max_steps=2", "trainer.log_every_n_steps=1"]
    more += ["classifier.reinit=true", "classifier.lr=0.1", "model.freeze=[conv1,bn1,layer1]"]
    ended = run(*SMALL, *more, f"weights={file}", folder="fine")
    assert ended.code == 0, ended.err
    before, after = saved(first)["state_dict"], saved(ended)["state_dict"]
    assert after["classifier.weight"].shape == (11, 128)
    for name, tensor in before.items():
        if name.startswith(("backbone.conv1.", "backbone.bn1.", "backbone.layer1.")):
            assert torch.equal(after[name], tensor), name
    assert not torch.equal(after["backbone.fc.weight"], before["backbone.fc.weight"])
    rates = next(row for row in rows(ended.folder) if row["lr-SGD/pg1"])
    found = [float(rates["lr-SGD/pg1"]), float(rates["lr-SGD/pg2"])]
    assert found == pytest.approx([0.02, 0.1], rel=1e-6)
    file.unlink()  # the run goes on without the file that it started from
    assert run("resume=auto", "trainer.max_steps=3", folder="fine").code == 0


def test_groups_of_parameters_resume_as_they_were(run: Run) -> None:
    """Each with its own rate, which follows a new ``optimizer.lr``; others are refused."""
    layers = ["optimizer=adamw", "optimizer.no_decay=true", "optimizer.layer_decay=0.5"]
    more = ["schedule=cosine", "schedule.T_max=4", "trainer.log_every_n_steps=1"]
    first = run(*SMALL, *layers, *more, "optimizer.lr=0.001", "trainer.max_steps=2")
    assert first.code == 0, first.err
    for other in ("optimizer.no_decay=false", "optimizer.layer_decay=null"):
        refused = run("resume=auto", other, "trainer.max_steps=4")
        assert refused.code == 2 and "optimizer.no_decay" in refused.err.splitlines()[-1]
    second = run("resume=auto", "optimizer.lr=0.002", "trainer.max_steps=4")
    assert second.out.count("lr 0.002, was 0.001") == 1 and "lr 0.001, was" not in second.out
    (*_, before, _, after, _) = [row for row in rows(second.folder) if row["lr-AdamW/pg1"]]
    rates = [key for key in before if key.startswith("lr-AdamW/") and float(before[key])]
    assert len({before[key] for key in rates}) > 4
    for key in rates:  # of steps 0 and 2 of the cosine
        assert float(after[key]) == pytest.approx(2 * 0.5 * float(before[key]))


# ------------------------------------------------------------------------------------- plans


def planned(run: Run, *arguments: str) -> tuple[dict[str, Any], str]:
    ended = run(*arguments, folder="_".join(arguments).replace("=", "_"))
    assert ended.code == 0, ended.err
    assert not (ended.folder / "checkpoints").exists()
    return json.loads((ended.folder / "plan.json").read_text()), ended.out


def test_plan_of_the_papers_run_without_its_data(run: Run) -> None:
    """FACTS: 617,970 identities, r100 with 65.16 M parameters; 30 hours on a GPU of 24 GB."""
    plan, said = planned(run, "model=r100", "data=webface12m", "plan=24", "averaging=none")
    assert plan["num_classes"] == 617_970 and plan["batches"] == 496_875
    assert plan["precision"] == "bf16-mixed" and plan["classifier"] == "chunked"
    assert plan["backbone"]["gradients"] == pytest.approx(4 * 65.16e6, rel=1e-3)
    for name in ("chunked", "full", "partial"):
        head = plan["heads"][name]
        assert head["weights"] == head["states"] == 617_970 * 512 * 4
    # By hand: three times 12.09 G multiply-adds an image, and four products of the last layer.
    product = 2 * 128 * 617_970 * 512
    assert plan["flops"] / 496_875 == pytest.approx(128 * 6 * 12.09e9 + 4 * product, rel=0.01)
    assert next(iter(plan["heads"])) == "chunked" and plan["heads"]["chunked"]["fits"]
    # A tenth of the identities with two features each, and the gallery net; three times the images.
    (pool,) = (head for head in plan["heads"].values() if head["encoded"] == head["images"])
    network = plan["backbone"]["weights"]
    assert pool["weights"] == pytest.approx(2 * 61_797 * 512 * 4 + network, rel=1e-6)
    assert (pool["gradients"], pool["states"], pool["images"]) == (0, 0, 3 * 128)
    assert "classifier=partial" in said and "averaged" not in said
    averaged, said = planned(run, "model=r100", "data=webface12m", "plan=24")
    more = {
        name: averaged["heads"][name]["peak"] - plan["heads"][name]["peak"]
        for name in plan["heads"]
    }
    assert "averaged" in said and set(more.values()) == {network} == {averaged["average"]}
    smaller, said = planned(run, "model=r100", "data=webface12m", "plan=13.5")
    assert {name for name, head in smaller["heads"].items() if head["fits"]} == {"attfc", "partial"}
    assert "classifier=attfc or classifier=partial would fit" in said


def test_plan_of_a_chunk_that_is_too_large(run: Run) -> None:
    plan, said = planned(
        run, "data=webface4m", "plan=3.4", "classifier.chunk=205990", "data.batch_size=512"
    )
    heads = plan["heads"]
    assert not heads["chunked"]["fits"] and heads["chunked classifier.chunk=null"]["fits"]
    assert "classifier=chunked classifier.chunk=null or classifier=" in said


def test_plan_of_eight_gpus(run: Run) -> None:
    """Each has an eighth of the centres, all images, and DDP's gradients of its network; where the
    centres are copied, the gradients of all of them."""
    run_of = ("model=r18", "data=webface12m", "plan=24", "averaging=none")
    eight = ("trainer=ddp", "trainer.devices=4", "trainer.num_nodes=2")
    one, _ = planned(run, *run_of)
    plan, said = planned(run, *run_of, *eight)
    head, rows = plan["heads"]["chunked"], math.ceil(617_970 / 8)
    assert head["weights"] == head["gradients"] == head["states"] == rows * 512 * 4
    assert head["flops"] == pytest.approx(one["heads"]["chunked"]["flops"], rel=0.01)
    assert (plan["ranks"], plan["batches"]) == (8, 62_105) and "one of 8" in said
    assert plan["backbone"] == one["backbone"]
    copies, _ = planned(run, *run_of, *eight, "classifier.shard=false")
    twice = plan["backbone"]["gradients"] + 617_970 * 512 * 4
    peaks = [each["heads"]["chunked"]["peak"] for each in (copies, one)]
    assert peaks[0] - peaks[1] == twice


def test_plan_of_a_timm_model(run: Run) -> None:
    groups = ["optimizer=adamw", "optimizer.no_decay=true", "optimizer.layer_decay=0.75"]
    backbone = planned(run, "model=timm", "model.name=convnext_atto", "plan=8", *groups)[0][
        "backbone"
    ]
    assert 0 < 2 * backbone["gradients"] <= backbone["states"] <= 2.1 * backbone["weights"]
    assert backbone["activations"] > 2**26


@pytest.mark.parametrize(
    "arguments",
    [
        ["plan=-3"],
        ["plan=24", "trainer=ddp"],
        ["plan=24", "trainer.devices=4"],
        ["plan=24", "classifier=partial", "optimizer._target_=torch.optim.AdamW"],
        ["plan=true", "trainer.max_epochs=null"],
        ["plan=true", "trainer.precision=64-true"],
    ],
)
def test_what_cannot_be_planned(run: Run, arguments: list[str]) -> None:
    ended = run(*SMALL, *arguments)
    assert ended.code == 2 and ended.err.splitlines()[-1].startswith("error: ")
