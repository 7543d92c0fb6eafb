"""What is built and installed, what CI runs, and what CONTRIBUTING tells a newcomer to write."""

import re
import shutil
import subprocess
import sys
from email import message_from_bytes
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from fastface_lightning.cli import find_recipes

ROOT = Path(__file__).resolve().parents[1]


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=False
    )


def python(*arguments: str | Path, cwd: Path) -> str:
    """Standard output of Python, from an environment that does not name the checkout."""
    done = run("env", "-u", "PYTHONPATH", sys.executable, *arguments, cwd=cwd)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel's content alone, built without a network."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ("--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT)
    python("-m", "pip", "wheel", *build, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    target = folder / "target"
    python("-m", "pip", "install", "--no-deps", "--target", target, wheel, cwd=folder)
    return target


@pytest.mark.slow
def test_the_wheel_works_away_from_the_checkout(installed: Path, tmp_path: Path) -> None:
    package = installed / "fastface_lightning"
    sources = {
        file.relative_to(ROOT / package.name)
        for file in (ROOT / package.name).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert {Path("py.typed"), Path("report/page.html.jinja"), Path("report/style.css")} <= sources
    assert all((package / file).is_file() for file in sources)
    program = f"""
import sys
sys.path.insert(0, {str(installed)!r})
import fastface_lightning
from fastface_lightning import *
print(fastface_lightning.__file__, FastFaceCallback().schedule, sorted(globals()))
"""
    out = python("-c", program, cwd=tmp_path)
    assert out.startswith(str(package)) and "load_embedder" in out


@pytest.mark.slow
def test_type_checkers_see_our_names_and_no_others(installed: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import fastface_lightning\n"
        "reveal_type(fastface_lightning.FastFace())\n"
        "fastface_lightning.FastFase()\n"
    )
    settings = tmp_path / "mypy.ini"
    settings.write_text(
        f"[mypy]\nmypy_path = {installed}\nignore_missing_imports = true\nno_site_packages = true\n"
    )
    done = run(sys.executable, "-m", "mypy", "--config-file", settings, script, cwd=tmp_path)
    assert re.search(r'script.py:2: note: .*"fastface_lightning\.schedule\.fastface', done.stdout)
    assert re.search(r"script.py:3: error: .*\[attr-defined\]", done.stdout)


@pytest.mark.slow
def test_the_index_page_has_no_links_into_the_repository(installed: Path) -> None:
    (metadata,) = installed.glob("*.dist-info/METADATA")
    page = message_from_bytes(metadata.read_bytes()).get_payload()
    assert isinstance(page, str)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert page.splitlines()[0] == readme.splitlines()[0]
    assert not re.findall(r"\]\((?!https?://)[^)]*\)", page)


@pytest.mark.parametrize("fault", ["the heading is another", "the block is empty", "no block"])
def test_ci_fails_without_the_main_job(fault: str, tmp_path: Path) -> None:
    """It reads the job from the README first, before it installs or tests anything."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    start = readme.index("## Install and run")
    block = re.search(r"```bash\n(.+?)```", readme[start:], re.S)
    assert block and "python train.py" in block[1]
    changed = {
        "the heading is another": readme.replace("## Install and run", "## Start"),
        "the block is empty": readme.replace(block[1], ""),
        "no block": readme[:start] + "## Install and run\n\n## Next\n\n" + readme[start:],
    }[fault]
    assert changed != readme
    (tmp_path / "README.md").write_text(changed, encoding="utf-8")
    shutil.copytree(ROOT / ".ci", tmp_path / ".ci")
    done = run("bash", ".ci/run", cwd=tmp_path)
    assert done.returncode and not done.stdout
    assert not (tmp_path / ".venv").exists()


def test_ci_finds_the_main_job() -> None:
    done = run(sys.executable, ".ci/block.py", "README.md", "Install and run", cwd=ROOT)
    assert done.returncode == 0 and "python train.py" in done.stdout


def test_a_named_data_set_is_a_file(tmp_path: Path) -> None:
    """The file that CONTRIBUTING shows, where it says; its Python blocks run in test_readme."""
    conf = shutil.copytree(ROOT / "conf", tmp_path / "conf")
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = re.search(r"`conf/data/mine\.yaml`.*?```yaml\n(.*?)```", page, re.S)
    assert block
    (conf / "data" / "mine.yaml").write_text(block[1], encoding="utf-8")
    find_recipes(conf)
    with initialize_config_dir(str(conf), version_base="1.3"):
        data = instantiate(compose("train", ["data=mine"]).data)
    assert (data.name, data.held_out) == ("mine", 0.2)
