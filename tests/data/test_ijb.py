"""IJB's lists are read as they are written, and a list that contradicts another is refused."""

import re
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from ijb import make_ijb
from numpy.testing import assert_array_equal
from PIL import Image

from fastface_lightning.data import ARCFACE_POINTS, ImageFiles, is_ijb, read_ijb

LARGE = 10**18 - 1
POINTS = "1.5 2 3 4 5 6 7 8 9 -10.25"
LISTS = {
    "face_tid_mid.txt": f"1.jpg 7 70\n2.jpg 7 71\n3.jpg 5 50\n4.jpg {LARGE} -{LARGE}\n",
    "name_5pts_score.txt": "".join(f"{i}.jpg {POINTS} 0.{i}\n" for i in (1, 2, 3, 4)),
    "template_pair_label.txt": f"7 5 1\n7 {LARGE} 0\n",
    "1N_gallery_G1.csv": "TEMPLATE_ID,SUBJECT_ID,FILENAME\n7,700,img/1.png\n7,700,img/2.png\n",
    "1N_gallery_G2.csv": f"TEMPLATE_ID,SUBJECT_ID,FILENAME\n{LARGE},900,img/4.png\n",
    "1N_probe_mixed.csv": f"TEMPLATE_ID,SUBJECT_ID,FILENAME\n{LARGE},900,a b\n5,700,\n",
}

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """``write({list: text})`` writes a folder with some lists replaced, or left out if None."""

    def write(changed: dict[str, str | None] | None = None, name: str = "ijbc") -> Path:
        (tmp_path / "meta").mkdir(exist_ok=True)
        for file, text in {**LISTS, **(changed or {})}.items():
            if text is not None:
                (tmp_path / "meta" / f"{name}_{file}").write_bytes(text.encode())
        return tmp_path

    return write


def test_a_folder_by_hand(write: Write) -> None:
    root = write()
    data = read_ijb(root)
    assert data.name == "ijbc"
    assert data.images == [f"{root}/loose_crop/{i}.jpg" for i in (1, 2, 3, 4)]
    assert data.points.dtype == np.float64 and data.points.shape == (4, 5, 2)
    assert_array_equal(data.points[3], [[1.5, 2], [3, 4], [5, 6], [7, 8], [9, -10.25]])
    assert data.scores.dtype == np.float64 and data.scores.tolist() == [0.1, 0.2, 0.3, 0.4]
    for array, expected in (
        (data.templates, [7, 7, 5, LARGE]),
        (data.media, [70, 71, 50, -LARGE]),
        (data.pairs, [[7, 5], [7, LARGE]]),
        (data.galleries[0].templates, [7]),
        (data.galleries[0].subjects, [700]),
        (data.galleries[1].templates, [LARGE]),
        (data.galleries[1].subjects, [900]),
        (data.probes.templates, [5, LARGE]),
        (data.probes.subjects, [700, 900]),
    ):
        assert array.dtype == np.int64 and array.tolist() == expected
    assert data.same.dtype == np.bool_ and data.same.tolist() == [True, False]
    assert len(data.galleries) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace("\n", "\r\n"),
        lambda text: "\ufeff" + text,
        lambda text: text.replace(" ", "\t") + "\n \n",
    ],
    ids=["windows", "byte order mark", "tabs and blank lines"],
)
def test_white_space_does_not_matter(write: Write, change: Callable[[str], str]) -> None:
    plain = read_ijb(write())
    same = read_ijb(write({file: change(text) for file, text in LISTS.items()}))
    assert repr(same) == repr(plain)


FACES, SCORES, PAIRS = "face_tid_mid.txt", "name_5pts_score.txt", "template_pair_label.txt"
G2, PROBES, HEADER = "1N_gallery_G2.csv", "1N_probe_mixed.csv", "TEMPLATE_ID,SUBJECT_ID\n"


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        (FACES, None, "{}"),
        (FACES, "\n", "{} lists no image"),
        (FACES, "1.jpg 7.0 70\n", "{}:1: "),
        (FACES, "1.jpg 7 70\n2.jpg 7 71\n", "the same images"),
        (FACES, "1.jpg 7 70\n2.jpg 7 71\n4.jpg 5 5\n3.jpg 9 9\n", "'3.jpg' for '4.jpg' in line 3"),
        (SCORES, f"1.jpg {POINTS} 0.5\n2.jpg {POINTS} high\n", "{}:2: "),
        (SCORES, "".join(f"{i}.jpg {POINTS}\n" for i in (1, 2, 3, 4)), "score"),
        (PAIRS, "", "{} lists no pair"),
        (PAIRS, "7 5 1\n\n7 9 0.5\n", "{}:3: "),
        (PAIRS, "7 5 1\n7 99999999999999999999 0\n", "{}:2: "),
        (PAIRS, "7 5 1\n7 9 2\n", "got [7 9 2]"),
        (PAIRS, "7 5 1\n7 8 0\n", "have images, got 8"),
        (G2, HEADER, "{} lists no template"),
        (G2, HEADER + "9,900\n9;900\n", "{}:3: "),
        (PROBES, HEADER + "9,900\n5,500\n9,901\n", "template 9 one subject"),
    ],
)
def test_a_list_that_is_wrong_is_refused(
    write: Write, file: str, text: str | None, message: str, recwarn: pytest.WarningsRecorder
) -> None:
    root = write({file: text})
    with pytest.raises(ValueError, match=re.escape(message.format(f"ijbc_{file}"))):
        read_ijb(root)
    assert not recwarn.list


def test_absent_folders_are_refused(tmp_path: Path) -> None:
    for root, absent in ((tmp_path / "gone", "gone"), (tmp_path, "meta")):
        with pytest.raises(ValueError, match=f"no folder .*{absent}"):
            read_ijb(root)
        assert not is_ijb(root)


def test_one_folder_holds_one_benchmark(write: Write, tmp_path: Path) -> None:
    (tmp_path / "meta").mkdir()
    with pytest.raises(ValueError, match="neither"):
        read_ijb(tmp_path)
    assert not is_ijb(tmp_path)
    assert is_ijb(write(name="ijbb"))
    (tmp_path / "meta" / "ijbc_template_pair_label.txt").write_text("1 2 0\n")
    with pytest.raises(ValueError, match="both"):
        read_ijb(tmp_path)


def test_the_images_in_the_lists_are_the_faces(shared_data: Path, tmp_path: Path) -> None:
    """Aligned by the lists, the crops of a folder made of LFW's faces are those faces."""
    folders = sorted((shared_data / "lfw112" / "images").iterdir())
    people = [files[:4] for files in map(sorted, (f.glob("*.jpg") for f in folders)) if files[3:]]
    faces = np.array([[np.asarray(Image.open(file)) for file in files] for files in people[:3]])
    data = read_ijb(make_ijb(tmp_path / "ijb", images=faces.transpose(0, 1, 4, 2, 3), seed=4))
    files = ImageFiles(data.images, data.points)
    assert len(files) == 12
    left = list(faces.reshape(12, 112, 112, 3).astype(int))
    for i, (crop, readable) in enumerate(files):
        assert readable
        x, y = (data.points[i, 0] - ARCFACE_POINTS[0]).round().astype(int)
        loose = np.asarray(Image.open(data.images[i]))
        assert_array_equal(crop.permute(1, 2, 0), loose[y : y + 112, x : x + 112])
        errors = [np.abs(crop.permute(1, 2, 0).numpy() - face).mean() for face in left]
        assert min(errors) < 2
        left.pop(int(np.argmin(errors)))


@pytest.mark.slow
def test_many_pairs_take_seconds_and_little_memory(write: Write) -> None:
    """A tenth of IJB-C's pairs, in a tenth of its gigabyte."""
    pairs = np.random.default_rng(0).choice([7, 5, LARGE], (1_565_849, 2))
    root = write({"template_pair_label.txt": "".join(f"{a} {b} 0\n" for a, b in pairs.tolist())})
    tracemalloc.start()
    data = read_ijb(root)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert_array_equal(data.pairs, pairs)
    assert not data.same.any() and peak < 100e6
