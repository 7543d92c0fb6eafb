"""What the README shows runs: its Python blocks as they are, its commands on stand-in data."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
# .ci/run runs the two blocks that set a machine up, as they stand there.
COMMANDS = [
    line
    for language, text in BLOCKS
    if language == "bash" and "pip install" not in text
    for line in text.splitlines()
]
SMALL = {
    "data=folder": "data.batch_size=4 data.num_workers=0 data.held_out=0.5 data.verify_pairs=20",
    "data=lfw": "data.batch_size=4 data.num_workers=0",
    "data=webface12m": "data.root=DIR data.batch_size=4 data.num_workers=0",
    "data=synthetic": "data.num_identities=8 data.images_per_identity=4 data.verify_identities=6 "
    "data.verify_pairs=20 data.batch_size=8",
}


def test_python_blocks_run() -> None:
    names: dict[str, object] = {}
    for language, text in BLOCKS:
        if language == "python":
            exec(compile(text, "README.md", "exec"), names)


def test_every_command_is_known() -> None:
    assert len(COMMANDS) == 6
    for command in COMMANDS:
        assert re.match(r"python (train|recipes/\w+)\.py ", command), command


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with DIR (identity folders), LFW (View 1's layout) and RUN (a finished run)."""
    home = tmp_path_factory.mktemp("readme")
    rng = np.random.default_rng(0)
    people = [f"Person_{letter}" for letter in "ABCDEFGHIJKLMNOPQRSTUVWX"]
    for person in people:
        for number in (1, 2):
            for folder in (home / "DIR" / person, home / "LFW" / "images" / person):
                folder.mkdir(parents=True, exist_ok=True)
                pixels = rng.integers(0, 256, (112, 112, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{person}_{number:04d}.jpg")
    train, test = people[:12], people[12:]
    lines = [str(len(train)), *(f"{name}\t2" for name in train)]
    (home / "LFW" / "peopleDevTrain.txt").write_text("\n".join(lines) + "\n")
    same = [f"{name}\t1\t2" for name in test]
    other = [f"{a}\t1\t{b}\t2" for a, b in zip(test, test[1:] + test[:1], strict=True)]
    (home / "LFW" / "pairsDevTest.txt").write_text("\n".join(["12", *same, *other]) + "\n")
    for part in ("conf", "recipes", "train.py"):
        source = ROOT / part
        (shutil.copytree if source.is_dir() else shutil.copy)(source, home / part)
    return home


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_commands_run(command: str, stand_in: Path) -> None:
    """As in the README, but two steps on a small stand-in."""
    words = shlex.split(command)[1:]
    if words[0] == "train.py":
        data = next((word for word in words if word.startswith("data=")), "data=synthetic")
        words += [*SMALL[data].split(), "trainer.max_steps=2", "trainer.log_every_n_steps=1"]
        words.append("trainer.enable_progress_bar=false")
    if "recipes/replay.py" in words:  # the commands before it made the run it reads
        (stand_in / "RUN").mkdir(exist_ok=True)
        (stand_in / "RUN" / "metrics.csv").write_text("step,train/loss\n0,5\n300,2\n")
    done = subprocess.run(
        [sys.executable, *words], cwd=stand_in, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
