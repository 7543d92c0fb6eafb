"""recipes/pack.py as its user meets it: in, out again, killed and resumed, checked, looked at."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from programs import ROOT, Run

from fastface_lightning.data import (
    ARCFACE_POINTS,
    IdentityFolder,
    RecordDataset,
    ShardDataset,
    read_pairs,
    read_verification_bin,
)

PROGRAM = "recipes/pack.py"
QUIET = ["data.num_workers=0"]


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    """Six people: 112x112 JPEGs, but for one PNG, one of 60x90 and one that is broken."""
    rng = np.random.default_rng(0)
    root = tmp_path / "faces"
    for person in range(6):
        (root / f"person_{person}").mkdir(parents=True)
        for image in range(4):
            pixels = rng.integers(0, 256, (14, 14, 3), dtype=np.uint8).repeat(8, 0).repeat(8, 1)
            Image.fromarray(pixels).save(root / f"person_{person}" / f"{image}.jpg", quality=90)
    Image.fromarray(pixels).save(root / "person_1" / "9.png")
    Image.fromarray(pixels[:90, :60]).save(root / "person_2" / "9.jpg")
    (root / "person_3" / "2.jpg").write_bytes((root / "person_3" / "1.jpg").read_bytes()[:700])
    return root


def test_a_folder_goes_into_a_record_file_and_out_again(run: Run, faces: Path) -> None:
    packed = faces.parent / "packs" / "train.rec"
    ended = run(f"data.root={faces}", f"target={packed}", *QUIET, program=PROGRAM)
    assert ended.code == 0, ended.err
    found = json.loads((ended.folder / "pack.json").read_text())
    assert (found["images"], found["identities"], found["packed"]) == (26, 6, 25)
    assert len(found["bad"]) == 1 and "person_3/2.jpg" in found["bad"][0]
    assert "person_3/2.jpg" in ended.out
    assert sorted(file.name for file in packed.parent.iterdir()) == [
        "train.identities.txt", "train.idx", "train.rec"
    ]  # fmt: skip
    names = (packed.parent / "train.identities.txt").read_text().split()
    source, records = IdentityFolder(faces), RecordDataset(packed)
    assert names == source.identities and len(records) == 25 and records.num_classes == 6
    kept = [i for i in range(26) if source.name(i) != str(faces / "person_3" / "2.jpg")]
    for i, k in enumerate(kept):
        image, label = records[i]
        assert label == source.labels[k]
        if source.name(k).endswith("9.png"):
            assert (image.int() - source[k][0].int()).abs().float().mean() < 6  # encoded anew
        elif not source.name(k).endswith("9.jpg"):
            assert records.encoded(i) == Path(source.name(k)).read_bytes()

    out = faces.parent / "out"
    ended = run(
        "data=record", f"data.root={packed}", f"target={out}", *QUIET, program=PROGRAM, folder="two"
    )
    assert ended.code == 0, ended.err
    again = IdentityFolder(out)
    assert len(again) == 25 and again.identities == names
    assert [again.encoded(i) for i in range(25)] == [bytes(records.encoded(i)) for i in range(25)]


def test_a_folder_goes_into_shards_and_from_there_into_a_record_file(run: Run, faces: Path) -> None:
    shards, packed = faces.parent / "shards", faces.parent / "train.rec"
    command = f"data.root={faces}", f"target={shards}", "format=shards", *QUIET
    ended = run(*command, program=PROGRAM)
    assert ended.code == 0, ended.err
    found = json.loads((ended.folder / "pack.json").read_text())
    assert found["packed"] == 25 and len(found["bad"]) == 1
    ended = run(f"data.root={shards}", f"target={packed}", *QUIET, program=PROGRAM, folder="two")
    assert ended.code == 0, ended.err
    source, again = ShardDataset(shards), RecordDataset(packed)
    assert len(source) == len(again) == 25 and source.identities == again.identities
    assert [bytes(source.encoded(i)) for i in range(25)] == [
        bytes(again.encoded(i)) for i in range(25)
    ]


def test_shards_killed_at_their_end_go_on(
    run: Run, faces: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = faces.parent / "shards"
    command = f"data.root={faces}", f"target={target}", "format=shards", *QUIET

    remove = Path.unlink

    def killed(file: Path, missing_ok: bool = False) -> None:
        if file.name == "shards.part.json":
            raise OSError("killed")
        remove(file, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        assert run(*command, program=PROGRAM).code == 2
    whole = (target / "000000.tar").read_bytes()
    (target / ".000001.ab12cd34.part.tar").write_bytes(b"half")
    assert run(*command, program=PROGRAM, folder="two").code == 0
    assert (target / "000000.tar").read_bytes() == whole and len(ShardDataset(target)) == 25


@pytest.mark.program
def test_what_was_killed_goes_on(run: Run, tmp_path: Path) -> None:
    """Killed at a random moment, the same command ends with the same bytes."""
    whole, killed = tmp_path / "whole.rec", tmp_path / "killed.rec"
    data = ["data=synthetic", "data.num_identities=60", "data.images_per_identity=10"]
    command = [sys.executable, str(ROOT / PROGRAM), *data, f"target={killed}", *QUIET]
    child = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    part = tmp_path / "killed.rec.part"
    while child.poll() is None and not (part.exists() and part.stat().st_size > 100_000):
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.communicate()
    assert not killed.exists() and part.exists()
    with part.open("ab") as file:
        file.write(b"torn")

    ended = run(*data, f"target={killed}", "quality=90", *QUIET, program=PROGRAM)
    assert ended.code == 2 and "other settings" in ended.err
    for target, folder in ((killed, "b"), (whole, "c")):
        ended = run(*data, f"target={target}", *QUIET, program=PROGRAM, folder=folder)
        assert ended.code == 0, ended.err
    assert killed.read_bytes() == whole.read_bytes() and len(RecordDataset(killed)) == 600
    assert (tmp_path / "killed.idx").read_bytes() == (tmp_path / "whole.idx").read_bytes()
    assert not list(tmp_path.glob("*part*"))
    ended = run(*data, f"target={whole}", *QUIET, program=PROGRAM, folder="d")
    assert ended.code == 2 and "must be new" in ended.err


@pytest.mark.program
def test_validation_lists_the_bad_ones(run: Run, faces: Path) -> None:
    ended = run(f"data.root={faces}", "validate=true", "data.max_bad=0", program=PROGRAM)
    assert ended.code == 1
    (line,) = (ended.folder / "bad_images.txt").read_text().splitlines()
    assert line.startswith(f"cannot read image {faces}/person_3/2.jpg: ") and line in ended.out
    (faces / "person_3" / "2.jpg").unlink()
    assert run(f"data.root={faces}", "validate=true", program=PROGRAM, folder="b").code == 0


@pytest.mark.program
def test_a_sheet_of_faces(run: Run, faces: Path) -> None:
    ended = run(f"data.root={faces}", "sheet=true", program=PROGRAM)
    assert ended.code == 0, ended.err
    with Image.open(ended.folder / "sheet.png") as sheet:
        assert sheet.width > 800 and sheet.height > 800


@pytest.mark.program
def test_a_verification_set_of_a_pairs_file(run: Run, faces: Path) -> None:
    pairs = faces.parent / "pairs.csv"
    pairs.write_text(
        "person_0/0.jpg,person_0/1.jpg,1\nperson_1/9.png,person_2/9.jpg,0\n"
        "person_3/2.jpg,person_3/1.jpg,1\nperson_4/0.jpg,person_5/1.jpg,0\n"
    )
    target = faces.parent / "mine.bin"
    ended = run(f"data.root={faces}", f"pairs={pairs}", f"target={target}", program=PROGRAM)
    assert ended.code == 0, ended.err
    packed, read = read_verification_bin(target), read_pairs(pairs, faces)
    assert packed.same.tolist() == read.same.tolist() == [True, False, False]
    for k in (0, 1, 4, 5):
        assert torch.equal(packed.images[k], read.images[k])
    assert "2 and 1: " in ended.out


@pytest.mark.program
def test_loose_photographs_are_aligned(run: Run, tmp_path: Path) -> None:
    """White dots at the landmarks of a photograph land on the template."""
    points = ARCFACE_POINTS * 2.5 + [40, 90]
    v, u = np.mgrid[:400, :400]
    dots = sum(np.exp(-((u - x) ** 2 + (v - y) ** 2) / 50) for x, y in points)
    (tmp_path / "loose" / "ann").mkdir(parents=True)
    pixels = np.repeat((255 * dots).clip(0, 255).astype(np.uint8)[..., None], 3, 2)
    for name in ("1.png", "2.png"):
        Image.fromarray(pixels).save(tmp_path / "loose" / "ann" / name)
    landmarks = tmp_path / "points.txt"
    landmarks.write_text(f"ann/1.png {' '.join(map(str, points.ravel()))}\n")
    target = tmp_path / "aligned"
    settings = [f"data.root={tmp_path / 'loose'}", f"landmarks={landmarks}", f"target={target}"]
    ended = run(*settings, *QUIET, program=PROGRAM)
    assert ended.code == 0, ended.err
    assert "ann/2.png: the list of landmarks does not name it" in ended.out.replace("\n", "")
    with Image.open(target / "ann" / "1.png.jpg") as aligned:
        face = np.asarray(aligned.convert("L")).astype(int)
    assert face.shape == (112, 112)
    for x, y in ARCFACE_POINTS.round().astype(int):
        assert face[y, x] > 200
    assert face[5:20, 5:20].max() < 20


@pytest.mark.program
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.root=faces"], "nothing to do"),
        (["data.root=faces", "target=a.rec", "quality=0"], "quality must lie in [1, 100], got 0"),
        (["data.root=faces", "target=a.bin"], "target=a.bin and pairs=None"),
        (["data.root=faces", "target=a.rec", "format=shards"], "shards with a.rec"),
        (["data=synthetic", "target=a.rec", "landmarks=gone"], "no list of landmarks gone"),
    ],
)
def test_bad_input_gets_one_sentence(run: Run, arguments: list[str], message: str) -> None:
    ended = run(*arguments, program=PROGRAM)
    assert ended.code == 2 and message in ended.err, ended.err
    assert "Traceback" not in ended.err and not list(ended.folder.parent.glob("*.part*"))


@pytest.mark.program
def test_more_bad_images_than_allowed_stop_it_and_nothing_is_lost(run: Run, faces: Path) -> None:
    for image in range(3):
        (faces / "person_4" / f"{image}.jpg").write_bytes(b"nothing")
    packed = faces.parent / "train.rec"
    settings = [f"data.root={faces}", f"target={packed}", *QUIET]
    ended = run(*settings, "data.max_bad=2", program=PROGRAM)
    assert ended.code == 2 and "at most data.max_bad = 2 images" in ended.err
    assert not packed.exists()
    ended = run(*settings, program=PROGRAM, folder="b")
    assert ended.code == 0 and len(RecordDataset(packed)) == 22
    bad = json.loads((ended.folder / "pack.json").read_text())["bad"]
    assert len(bad) == 4 and len(set(bad)) == 4 and any("person_3/2.jpg" in line for line in bad)


@pytest.mark.program
def test_labels_stay_in_order_through_a_record_file(run: Run, tmp_path: Path) -> None:
    """And who is in which image, where there are no names: folders are sorted as text."""
    data = ["data=synthetic", "data.num_identities=12", "data.images_per_identity=1"]
    assert run(*data, "target=a.rec", *QUIET, program=PROGRAM).code == 0
    for out in ("named", "numbered"):
        settings = ["data=record", "data.root=a.rec", f"target={out}"]
        assert run(*settings, *QUIET, program=PROGRAM, folder=f"to {out}").code == 0
        records, files = RecordDataset(tmp_path / "a.rec"), IdentityFolder(tmp_path / out)
        sides = [
            {faces.identities[faces.labels[i]]: bytes(faces.encoded(i)) for i in range(12)}
            for faces in (records, files)
        ]
        assert sides[0] == sides[1]
        assert out == "numbered" or list(sides[0]) == list(sides[1])
        (tmp_path / "a.identities.txt").unlink(missing_ok=True)


@pytest.mark.program
def test_another_source_does_not_go_on(run: Run, faces: Path) -> None:
    """Equal in names and numbers, but elsewhere."""
    other = faces.parent / "other"
    shutil.copytree(faces, other)
    lines = [f"{f.relative_to(faces)},{f.parent.name}\n" for f in sorted(faces.rglob("*.jpg"))]
    (faces.parent / "list.csv").write_text("".join(lines))
    settings = [f"data.list={faces.parent / 'list.csv'}", "data.max_bad=0", "target=a.rec", *QUIET]
    assert run(f"data.root={faces}", *settings, program=PROGRAM).code == 2
    ended = run(f"data.root={other}", *settings, program=PROGRAM, folder="b")
    assert ended.code == 2 and "begun from another source" in ended.err
