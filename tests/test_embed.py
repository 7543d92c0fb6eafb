"""recipes/embed.py: a folder to rows and the list of their files."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ijb import make_ijb
from models import network, noise, save_checkpoint
from PIL import Image
from programs import Run

from fastface_lightning.inference.embedder import load_embedder

PROGRAM = "recipes/embed.py"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A checkpoint, and a folder of three images at two depths."""
    save_checkpoint(tmp_path / "best.ckpt", network())
    (tmp_path / "faces" / "deep" / "er").mkdir(parents=True)
    for image, name in zip(noise(3), ("b.png", "a.png", "deep/er/c.png"), strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / "faces" / name)
    return tmp_path


def test_rows_are_those_of_the_list(run: Run, place: Path) -> None:
    (place / "faces" / "broken.jpg").write_bytes(b"no image")
    ended = run("checkpoint=best.ckpt", "images=faces", "target=out/e.npy", program=PROGRAM)
    assert ended.code == 0, ended.err
    rows, names = np.load(place / "out" / "e.npy"), (place / "out" / "e.txt").read_text()
    assert names.split() == ["a.png", "b.png", "broken.jpg", "deep/er/c.png"]
    wanted = load_embedder(place / "best.ckpt")(noise(3)[[1, 0, 2]])
    assert np.allclose(rows[[0, 1, 3]], wanted, atol=1e-6)
    assert np.isnan(rows[2]).all()
    written = json.loads((ended.folder / "embed.json").read_text())
    assert written["images"] == 4 and "broken.jpg" in written["bad"][0]
    assert "broken.jpg" in ended.out


@pytest.mark.program
def test_photographs_are_aligned_by_their_landmarks(run: Run, place: Path) -> None:
    root = make_ijb(place / "IJBC", people=2)
    lists = root / "meta" / "ijbc_name_5pts_score.txt"
    arguments = ("checkpoint=best.ckpt", f"images={root}/loose_crop", f"landmarks={lists}")
    ended = run(*arguments, "target=e.npy", program=PROGRAM)
    assert ended.code == 0, ended.err
    whole = run(*arguments[:2], "target=whole.npy", program=PROGRAM, folder="whole")
    assert whole.code == 0
    aligned, resized = np.load(place / "e.npy"), np.load(place / "whole.npy")
    assert aligned.shape == resized.shape == (12, 16)
    assert (aligned * resized).sum(1).max() < 0.9999
    rows = lists.read_text().splitlines()
    lists.write_text("\n".join(rows[1:]))  # an image whose landmarks are not known is named
    ended = run(*arguments, "target=fewer.npy", program=PROGRAM)
    fewer = np.load(place / "fewer.npy")
    assert ended.code == 0 and np.isnan(fewer).all(1).sum() == 1 and "not known" in ended.out
    np.testing.assert_allclose(fewer[~np.isnan(fewer[:, 0])], np.delete(aligned, 0, 0), atol=1e-6)
    lists.write_text("\n".join([*rows, rows[0]]))
    assert "twice" in run(*arguments, "target=twice.npy", program=PROGRAM).err


@pytest.mark.program
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["images=faces", "target=e.txt"], "target must be FILE.npy, got e.txt"),
        (["images=empty", "target=e.npy"], "empty holds no image"),
        (["images=faces", "target=e.npy", "landmarks=some.txt"], "got none of"),
        (["images=faces", "target=some.npy", "landmarks=some.txt"], "would replace some.txt"),
        (["images=faces", "target=e.npy", "batch_size=0"], "batch_size must be at least 1"),
    ],
)
def test_bad_input(run: Run, place: Path, arguments: list[str], message: str) -> None:
    (place / "empty").mkdir()
    (place / "some.txt").write_text("z.png " + " ".join(map(str, range(10))) + "\n")
    ended = run("checkpoint=best.ckpt", *arguments, program=PROGRAM)
    assert ended.code == 2 and message in ended.err and ended.err.count("\n") == 1
    assert not (place / "e.npy").exists()


@pytest.mark.program
def test_a_model_of_another_kind_embeds_too(run: Run, place: Path) -> None:
    torch.save(network().state_dict(), place / "backbone.pth")
    for file in ("backbone.pth", "best.ckpt"):
        ended = run(
            f"checkpoint={file}",
            "images=faces",
            f"target={file}.npy",
            program=PROGRAM,
            folder=f"run_{file}",
        )
        assert ended.code == 0, ended.err
    assert np.array_equal(np.load(place / "backbone.pth.npy"), np.load(place / "best.ckpt.npy"))
