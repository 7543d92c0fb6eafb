"""An image grid shows every face in its place, whatever it is called."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from fastface_lightning.data import ARCFACE_POINTS
from fastface_lightning.report.figures import readable
from fastface_lightning.report.image_grid import plot_faces, plot_pairs

Face = NDArray[np.uint8]


def flat_faces(count: int, size: int = 112) -> list[Face]:
    """Faces of one color each, told apart by it, and unlike any color of the rest."""
    colors = np.array([[200 - 10 * i, 60 + 7 * i, 130 + 5 * i] for i in range(count)], np.uint8)
    return [np.broadcast_to(color[:, None, None], (3, size, size)) for color in colors]


def blocks(picture: NDArray[np.uint8], face: Face) -> list[tuple[int, int]]:
    """Where (top, left) a picture shows a flat face, 112 pixels wide, with its edges."""
    match = (picture == face[:, 0, 0]).all(-1)
    windows = np.lib.stride_tricks.sliding_window_view(match, (112, 1))[..., 0].all(-1)
    starts = windows & np.roll(~windows, 1, axis=1)
    return [(y, x) for y, x in np.argwhere(starts).tolist() if windows[y, x : x + 112].all()]


def picture_of(file: Path, *arguments: object) -> NDArray[np.uint8]:
    plot_faces(file, *arguments)  # type: ignore[arg-type]
    return np.asarray(Image.open(file).convert("RGB"))


def test_every_face_is_in_the_row_of_its_label(tmp_path: Path) -> None:
    """Also more images than stand side by side; above them the first of each row, and swapped."""
    labels = [7, 3, 7, 7, 3, 5, 7, 7, 7, 7]
    faces = flat_faces(len(labels))
    names = [f"person {k}" for k in labels]
    picture = picture_of(tmp_path / "a.png", faces, labels, names, "LFW", ARCFACE_POINTS)
    places = [blocks(picture, face) for face in faces]
    assert [len(found) for found in places] == [2, 2, 1, 1, 1, 2, 1, 1, 1, 1]
    rows = {k: [max(at) for at, of in zip(places, labels, strict=True) if of == k] for k in labels}
    tops = {k: [y for y, _ in row] for k, row in rows.items()}
    assert len({*tops[7][:6]}) == 1 and tops[7][6] >= tops[7][0] + 112
    assert tops[7][6] + 112 <= tops[3][0] == tops[3][1] and tops[3][0] + 112 <= tops[5][0]
    lefts = [x for _, x in rows[7]]
    assert (np.diff(lefts[:6]) >= 112).all() and lefts[6] == lefts[0]
    for i in (0, 1, 5):
        ((y, x),) = blocks(picture, faces[i][::-1])
        above = min(places[i])
        assert above[1] == x and above[0] + 112 <= y < max(places[i])[0]


@pytest.mark.parametrize("size", [112, 56])
def test_circles_on_the_mean_face_are_around_the_points(tmp_path: Path, size: int) -> None:
    values = (10, 20, 90)
    plain = [np.full((3, size, size), v, np.uint8) for v in values]
    picture = picture_of(tmp_path / "a.png", plain, [0, 0, 1], ["a"] * 3, "LFW", ARCFACE_POINTS)
    mean = (picture == 40).all(-1)
    ys, xs = np.flatnonzero(mean.sum(1) > 250), np.flatnonzero(mean.sum(0) > 250)
    top, left = ys.min(), xs.min()
    assert ys.max() - top + 1 == xs.max() - left + 1 == 336
    large = picture[top : top + 336, left : left + 336]
    for point in ARCFACE_POINTS:
        middle = (point + 0.5) * 3 - 0.5
        x, y = middle.round().astype(int)
        assert (large[y - 6 : y + 7, x - 6 : x + 7] == 40).all()  # nothing hides the feature
        near = large[y - 20 : y + 21, x - 20 : x + 21]
        ring = np.argwhere((near > 200).all(-1)).mean(0) - 20
        np.testing.assert_allclose(ring, 0, atol=1.5)  # half a pixel of a face


HOSTILE = [
    "",
    "two\nlines\r\n\u2028\x00",
    "os \udce9\udcff",
    "W" * 3_000,
    "z" + "\u0301" * 500,
    "\u202egnorts\u202c",
    "李小龍 ไทย",
    "عمر الشريف",
    "$_{$ \\$ $\\frac$",
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", HOSTILE, ids=lambda name: ascii(name)[:20])
def test_no_name_breaks_a_picture_or_hides_a_face(tmp_path: Path, name: str) -> None:
    faces = flat_faces(4)
    labels = [0, 0, 1, 2**31]
    picture = picture_of(tmp_path / "a.png", faces, labels, [name] * 4, name, ARCFACE_POINTS)
    assert [len(blocks(picture, face)) for face in faces] == [2, 1, 2, 2]
    plot_pairs(tmp_path / "b.png", [np.stack(faces[:2])], [True], [name], name)


@settings(max_examples=50, deadline=None)
@given(st.text(st.characters(exclude_categories=()), max_size=60))
def test_any_name_is_made_readable(name: str) -> None:
    shown = readable(name)
    assert shown.isprintable()
    shown.encode()  # no surrogate is left


def test_readable_escapes_as_python_does_and_abridges() -> None:
    assert readable("Zoë Žižek, Иван") == "Zoë Žižek, Иван"
    assert readable("a\nb\u202ec\udce9") == r"a\nb\u202ec\udce9"
    assert readable("李") == r"\u674e"
    assert readable("x" * 101) == "x" * 100 + "…"
    assert readable("a$b$") == r"a\$b\$"  # as matplotlib takes a dollar for itself


def test_pairs_of_one_person_stand_above_those_of_two(tmp_path: Path) -> None:
    faces, same = flat_faces(12), [False, True, True, True, True, True]
    pairs = [torch.from_numpy(np.stack(faces[2 * i : 2 * i + 2])) for i in range(6)]
    plot_pairs(tmp_path / "pairs.png", pairs, same, [f"pair {i}" for i in range(6)], "LFW")
    picture = np.asarray(Image.open(tmp_path / "pairs.png").convert("RGB"))
    places = [place for face in faces for place in blocks(picture, face)]
    assert len(places) == 12
    for left, right in zip(places[::2], places[1::2], strict=True):
        assert left[0] == right[0] and left[1] + 112 <= right[1] < left[1] + 130
    tops = [y for y, _ in places[::2]]
    assert tops[1] == tops[2] == tops[3] == tops[4] < tops[5] < tops[0]


BLANK = np.zeros((3, 8, 8), np.uint8)


@pytest.mark.parametrize(
    ("images", "labels", "names"),
    [
        ([], [], []),
        ([BLANK], [0], []),
        ([BLANK, BLANK[:, :7, :7]], [0, 1], ["a", "b"]),
        ([BLANK.astype(float)], [0], ["a"]),
        ([BLANK.transpose(1, 2, 0)], [0], ["a"]),
    ],
)
def test_what_cannot_be_shown_is_refused(
    tmp_path: Path, images: list[Face], labels: list[int], names: list[str]
) -> None:
    with pytest.raises(ValueError, match="image"):
        plot_faces(tmp_path / "a.png", images, labels, names, "", ARCFACE_POINTS)
    assert not list(tmp_path.iterdir())
