"""A program's contract: bad input in one sentence, a sweep that says what came of every job."""

import json
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from programs import ROOT, Run

from fastface_lightning.cli import as_typed, confirm, with_earlier_settings, with_files

TOY = """
import functools, json, os
from pathlib import Path
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from fastface_lightning.cli import program

@program(config_path=Path(__file__).parent / "conf", config_name="toy")
def main(cfg):
    folder = Path(HydraConfig.get().runtime.output_dir)
    if cfg.what == "fault":
        raise RuntimeError("out of\\n memory")
    if cfg.what == "stop":
        raise KeyboardInterrupt
    if os.environ.get("KILL") == str(cfg.seed):
        os.kill(os.getpid(), 9)
    if cfg.what == "bad":
        raise ValueError("what must be good, got bad")
    if cfg.what == "partial":
        functools.partial(Path(__file__).with_suffix, milestones=[1])()
    if (folder / "results.json").exists():
        raise ValueError("the run folder must be new")
    verification = {"lfw": {"accuracy": float(cfg.seed) / 10}}
    (folder / "results.json").write_text(json.dumps({"verification": verification}))

if __name__ == "__main__":
    main()
"""


@pytest.fixture
def toy(tmp_path: Path) -> str:
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "toy.yaml").write_text("what: good\nseed: 1\nnone: null\n")
    (tmp_path / "toy.py").write_text(TOY)
    return str(tmp_path / "toy.py")


def jobs_of(sweep: Path) -> list[dict[str, Any]]:
    return json.loads((sweep / "sweep.json").read_text())


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("what=bad", "what must be good, got bad"),
        ("nothing=1", "Could not override 'nothing'"),
        ("seed=${nothing}", "nothing"),
        ("what=partial", "unexpected keyword argument 'milestones'"),
    ],
)
def test_bad_input_gets_one_sentence_and_exit_code_2(
    run: Run, toy: str, argument: str, words: str
) -> None:
    ended = run(argument, program=toy)
    assert ended.code == 2 and words in ended.err
    (line,) = ended.err.strip().splitlines()
    assert line.startswith("error: ")
    assert not list(ended.folder.parent.rglob("sweep.json"))


def test_what_is_no_bad_input_is_raised(run: Run, toy: str) -> None:
    with pytest.raises(RuntimeError, match="memory"):
        run("what=fault", program=toy)


def test_the_traceback_is_shown_on_demand(toy: str, tmp_path: Path) -> None:
    for argument in ("what=bad", "nothing=1"):
        done = subprocess.run(
            [sys.executable, toy, argument, f"hydra.run.dir={tmp_path / 'run'}"],
            env={"HYDRA_FULL_ERROR": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1 and "\nTraceback" in "\n" + done.stderr


@pytest.mark.parametrize(
    ("jobs", "code", "errors"),
    [
        ("good,bad,better", 2, [None, "what must be good, got bad", None]),
        ("fault,good", None, ["RuntimeError: out of memory", None]),
        ("good,stop,bad", 130, [None, "KeyboardInterrupt"]),
    ],
)
def test_what_ended_is_kept_however_a_sweep_ends(
    run: Run,
    toy: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    jobs: str,
    code: int | None,
    errors: list[str | None],
) -> None:
    sweep = tmp_path / "sweep"
    arguments = ["-m", f"what={jobs}", f"hydra.sweep.dir={sweep}"]
    if code:
        ended = run(*arguments, program=toy)
        out, said = ended.out, {2: "error: what must be good, got bad\n", 130: "interrupted\n"}
        assert ended.code == code and ended.err == said[code]
    else:
        with pytest.raises(RuntimeError):
            run(*arguments, program=toy)
        out, _ = capfd.readouterr()
    assert [job["error"] for job in jobs_of(sweep)] == errors
    assert f"Sweep of {len(errors)} jobs" in out
    for number, (what, error) in enumerate(zip(jobs.split(","), errors, strict=False)):
        assert error is None or f"failed: {number} what={what}: {error}\n" in out
    (log,) = (sweep / "0").glob("*.log")
    assert ("Traceback" in log.read_text()) == (code is None)


def test_a_sweep_goes_on_in_its_folder(run: Run, toy: str, tmp_path: Path) -> None:
    """A job that is refused keeps what it achieved, unless it was another job."""
    sweep = tmp_path / "sweep"

    def results(*arguments: str) -> list[tuple[float | None, bool]]:
        run("-m", *arguments, f"hydra.sweep.dir={sweep}", program=toy)
        return [(job["result"], bool(job["error"])) for job in jobs_of(sweep)]

    assert results("seed=1,2,x") == [(0.1, False), (0.2, False), (None, True)]
    assert results("seed=1,2,3") == [(0.1, False), (0.2, False), (0.3, False)]
    assert results("seed=1,7") == [(0.1, False), (None, True), (0.3, False)]


@pytest.mark.program
def test_a_killed_sweep_has_what_its_jobs_achieved_and_goes_on(
    run: Run, toy: str, tmp_path: Path
) -> None:
    sweep = tmp_path / "sweep"
    arguments = ["-m", "seed=4,5", f"hydra.sweep.dir={sweep}"]
    environment = {"PYTHONPATH": str(ROOT), "KILL": "5"}
    done = subprocess.run([sys.executable, toy, *arguments], env=environment, check=False)
    assert done.returncode == -9
    assert [job["result"] for job in jobs_of(sweep)] == [0.4]
    assert run(*arguments, program=toy).code == 2  # the first job is refused, and stands
    assert [job["result"] for job in jobs_of(sweep)] == [0.4, 0.5]


def test_only_the_first_of_the_ranks_writes(
    run: Run, toy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "1")
    ended = run("-m", "what=bad,good", f"hydra.sweep.dir={tmp_path / 'sweep'}", program=toy)
    assert ended.code == 2
    assert not list(tmp_path.rglob("sweep.json")) and not list(tmp_path.rglob("failure.txt"))


def test_another_option_at_a_resume_keeps_the_settings_that_it_has_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = ["trainer=cpu", "trainer.max_epochs=3", "trainer.precision=32-true"]
    before += ["optimizer.lr=0.02", "optimizer.nesterov=true", "seed=5"]
    OmegaConf.save(OmegaConf.create(before), tmp_path / "overrides.yaml")
    now = [f"hydra.run.dir={tmp_path}", "resume=auto", "trainer=ddp", "optimizer=adamw"]
    now += ["trainer.precision=bf16-mixed"]
    both = with_earlier_settings(now, ROOT / "conf", "train")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", both)
    assert (cfg.trainer.devices, cfg.trainer.max_epochs, cfg.seed) == ("auto", 3, 5)
    assert cfg.trainer.strategy._target_.endswith(".DDPStrategy")
    assert (cfg.trainer.precision, cfg.optimizer.lr) == ("bf16-mixed", 0.02)
    assert sorted(both) == sorted([*now, "trainer.max_epochs=3", "optimizer.lr=0.02", "seed=5"])
    said = capsys.readouterr().err
    assert "optimizer.nesterov=true" in said and "optimizer.lr" not in said


def test_a_resume_knows_what_its_runs_parts_know(tmp_path: Path) -> None:
    """Settings that the default parts do not have, and a file's run in another folder."""
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    OmegaConf.save(["data=folder", "data.root=faces", "seed=5"], folder.parent / "overrides.yaml")
    for resume in ("auto", f"{folder}/last.ckpt"):
        given = [f"resume={resume}", "data.min_images=2", f"hydra.run.dir={tmp_path}/run"]
        assert with_earlier_settings(given, ROOT / "conf", "train") == [
            *("data=folder", "data.root=faces", "seed=5"),
            *given,
        ]
    for given in (["resume=auto"], ["seed=3"], ["resume=elsewhere/last.ckpt"]):
        assert with_earlier_settings(given, ROOT / "conf", "train") == given
    sweep = ["-m", "resume=auto", f"hydra.run.dir={tmp_path}/run"]
    assert with_earlier_settings(sweep, ROOT / "conf", "train") == sweep


@pytest.mark.parametrize(
    "name",
    ["a b", "Zoë, (all)", "[x]", "a=b", "it's", "back\\slash", "end\\", "$HOME", "50%", "{a: 1}"],
)
def test_paths_may_be_typed_as_they_are(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.mkdir()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        typed = compose("train", ["data=folder", as_typed(f"data.root={path}")])
        new = compose("train", [as_typed(f"hydra.run.dir={path}/new")], return_hydra_config=True)
    assert typed.data.root == str(path) and new.hydra.run.dir == f"{path}/new"


def test_files_may_be_named_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = ["a b.jpg", "Zoë, (all).png", "[x]", "it's", "back\\slash\\", "$HOME", "{a: 1}"]
    (tmp_path / "x=y.jpg").touch()
    typed = with_files(["--cfg=job", *names, "x=y.jpg", "checkpoint=m.onnx"], "images")
    assert typed[:2] == ["--cfg=job", "checkpoint=m.onnx"] and len(typed) == 3
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        assert list(compose("verify", typed[1:]).images) == [*names, "x=y.jpg"]
    flagged = ["--config-dir", "D", "a.jpg"]
    assert with_files(flagged, "images") == ["--config-dir", "D", "images=['a.jpg']"]
    assert with_files(["-m", "far=1e-3"], "images") == ["-m", "far=1e-3"]


def test_a_folder_is_found_as_hydra_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "Anna's runs"
    folder.mkdir()
    OmegaConf.save(["seed=5"], folder / "overrides.yaml")
    monkeypatch.setenv("RUNS", str(folder))
    for run_dir in (as_typed(f"hydra.run.dir={folder}"), "hydra.run.dir=${oc.env:RUNS}"):
        given = ["--config-dir=D", run_dir, "resume=auto"]
        both = with_earlier_settings(given, ROOT / "conf", "train")
        assert both == ["--config-dir=D", "seed=5", run_dir, "resume=auto"]
    assert with_earlier_settings(["resume=a/b/c"], ROOT / "conf", "train") == ["resume=a/b/c"]
    assert "this command alone" in capsys.readouterr().err


def test_what_is_no_path_stays_as_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/ann")
    for name in ("1", "[a,b]"):
        (tmp_path / name).mkdir()
    for argument in (
        "seed=1",
        "verify=[a,c]",
        "-m",
        "+paper=x",
        "a='[a,b]'",
        "a=${seed}",
        "--cfg=job",
    ):
        assert as_typed(argument) == argument
    assert as_typed("data.root=~/faces") == "data.root=/home/ann/faces"


def test_what_is_added_where_it_is_heeded(run: Run, toy: str) -> None:
    for argument in (
        "++seed=3",
        "++none=3",
        "+new={_target_: builtins.dict}",
        "+new._target_=builtins.dict",
    ):
        assert run(argument, program=toy, folder=argument[-6:]).code == 0


@pytest.mark.parametrize(
    ("argument", "words"),
    [
        ("sed=2", "did you mean seed?"),
        ("+foo=2", "no setting is called foo"),
        ("+sead=2", "did you mean seed?"),
        ("what=a(b", "put quotes around the value"),
        ("+foo=null", "no setting is called foo"),
    ],
)
def test_what_is_mistyped_gets_a_hint(run: Run, toy: str, argument: str, words: str) -> None:
    ended = run(argument, program=toy)
    assert ended.code == 2 and words in ended.err


@pytest.mark.parametrize("answer", ["y", "n"])
def test_at_a_terminal_a_new_run_is_asked_for(monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda _: answer)
    with nullcontext() if answer == "y" else pytest.raises(ValueError, match="not confirmed"):
        confirm("a new run begins")
