"""The contact sheet shows every face as it is, in its row, whatever it is called."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from fastface_lightning.data.align import ARCFACE_POINTS
from fastface_lightning.data.datasets.synthetic_faces import draw_face
from fastface_lightning.report.image_grid import (
    _mean_face,
    contact_sheet,
    pick_images,
    readable,
)

Face = NDArray[np.uint8]
TICK = [225, 40, 40]


def noise(count: int, size: int = 112) -> list[Face]:
    rng = np.random.default_rng(count)
    return list(rng.integers(0, 256, (count, 3, size, size), np.uint8))


def places(sheet: Image.Image, face: Face) -> list[tuple[int, int]]:
    """Where (top, left) a sheet shows all pixels of a face, unchanged."""
    pixels, wanted = np.asarray(sheet), face.transpose(1, 2, 0)
    size = len(wanted)
    corners = (pixels == wanted[0, 0]).all(-1)
    return [
        (y, x)
        for y, x in np.argwhere(corners).tolist()
        if np.array_equal(pixels[y : y + size, x : x + size], wanted)
    ]


def in_row(sheet: Image.Image, face: Face) -> tuple[int, int]:
    """Its place among the rows, which are below the sample of channels."""
    return max(places(sheet, face))


def test_every_face_is_there_pixel_by_pixel_in_the_row_of_its_label() -> None:
    faces, labels = noise(9), [7, 3, 7, 7, 3, 5, 3, 3, 3]
    sheet = contact_sheet(faces, labels, [f"person {k}" for k in labels], columns=5)
    at = [in_row(sheet, face) for face in faces]
    tops = {k: {y for (y, _), of in zip(at, labels, strict=True) if of == k} for k in (7, 3, 5)}
    assert all(len(rows) == 1 for rows in tops.values())
    assert min(tops[7]) + 112 < min(tops[3]) and min(tops[3]) + 112 < min(tops[5])
    for k in tops:
        lefts = [x for (_, x), of in zip(at, labels, strict=True) if of == k]
        assert all(b - a >= 112 for a, b in pairwise(lefts))
    assert (
        len({min(x for (_, x), of in zip(at, labels, strict=True) if of == k) for k in tops}) == 1
    )


def test_more_images_than_columns_go_on_below_before_the_next_identity() -> None:
    faces = noise(6)
    sheet = contact_sheet(faces, [0, 0, 0, 0, 0, 1], ["a"] * 6, columns=2)
    at = [in_row(sheet, face) for face in faces]
    (y0, x0), (y1, x1) = at[0], at[3]
    assert [y for y, _ in at[:5]] == [y0, y0, y1, y1, at[4][0]] and y0 < y1 < at[4][0] < at[5][0]
    assert [x for _, x in at] == [x0, x1, x0, x1, x0, x0]


def test_first_faces_of_the_rows_are_shown_as_given_above_red_and_blue_swapped() -> None:
    faces = noise(12)
    sheet = contact_sheet(faces, [i // 2 for i in range(12)], ["a"] * 12)
    for i, face in enumerate(faces):
        given, swapped = sorted(places(sheet, face))[:-1], places(sheet, face[::-1])
        assert len(given) == len(swapped) == (i in (0, 2, 4, 6))
        if given:
            assert given[0][1] == swapped[0][1] and given[0][0] + 112 < swapped[0][0]


@pytest.mark.parametrize("size", [112, 96, 224])
def test_ticks_stand_beside_each_face_at_the_height_of_its_eyes(size: int) -> None:
    faces = noise(3, size)
    sheet = contact_sheet(faces, [0, 0, 1], ["a"] * 3)
    pixels = np.asarray(sheet)
    for face in faces:
        y, x = in_row(sheet, face)
        for beside in (pixels[y : y + size, x - 4], pixels[y : y + size, x + size + 3]):
            (ticked,) = np.flatnonzero((beside == TICK).all(-1))
            assert abs(ticked - 51.6 * size / 112) <= 1


@pytest.mark.parametrize("size", [112, 56, 128])
def test_crosses_on_the_mean_face_open_on_arcfaces_points(size: int) -> None:
    black = [np.zeros((3, size, size), np.uint8)]
    large = np.asarray(_mean_face(black))
    scale = len(large) / size
    white = np.argwhere((large == 255).all(-1))[:, ::-1]
    for point in ARCFACE_POINTS:
        middle = (point * size / 112 + 0.5) * scale - 0.5
        arms = white[np.abs(white - middle).max(1) < 20]
        assert len(arms) > 30
        np.testing.assert_allclose(arms.mean(0), middle, atol=0.6)
        assert (np.abs(arms - middle).max(1) > 5).all()
    assert len(white) < 300


def test_the_mean_is_of_all_faces() -> None:
    values = [10, 20, 90]
    plain = [np.full((3, 112, 112), v, np.uint8) for v in values]
    large = np.asarray(_mean_face(plain))
    assert large.shape == (336, 336, 3)
    assert (large[:100] == 40).all()


def test_drawn_faces_have_their_dark_eyes_under_the_crosses() -> None:
    mean = np.mean([draw_face(1, i, 0) for i in range(60)], (0, 1))
    for x, y in ARCFACE_POINTS[:2]:
        eye = mean[round(y) - 2 : round(y) + 3, round(x) - 2 : round(x) + 3].mean()
        cheek = mean[round(y) + 14 : round(y) + 19, round(x) - 2 : round(x) + 3].mean()
        assert eye < cheek - 10


HOSTILE = [
    "",
    " ",
    "\x00",
    "\x1b[31m",
    "two\nlines\r\n\u2028",
    "os \udce9\udcff",
    "\ud800",
    "x" * 100_000,
    "W " * 5_000,
    "\U0001f600" * 3_000,
    "z" + "\u0301" * 500,
    "\u202egnorts\u202c",
    "李小龍",
    "ไทย",
    "عمر الشريف",
    "Иван Петров",
    "\ufdfd\uffff\U0010ffff",
    "%s {} <b>&",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_no_name_breaks_the_sheet_or_reaches_a_face(name: str) -> None:
    faces = noise(4)
    sheet = contact_sheet(faces, [0, 0, 1, 2**31], [name] * 4, title=name, columns=2)
    plain = contact_sheet(faces, [0, 0, 1, 2**31], ["a"] * 4, columns=2)
    assert sheet.width == plain.width
    for face in faces:
        assert len(places(sheet, face)) == len(places(plain, face))


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(exclude_categories=()), max_size=60))
def test_any_name_is_made_readable(name: str) -> None:
    shown = readable(name)
    assert shown.isprintable()
    shown.encode()  # no surrogate is left
    contact_sheet(noise(1, 8), [0], [name])


def test_readable_escapes_as_python_does_and_abridges() -> None:
    assert readable("Zoë Žižek, Иван") == "Zoë Žižek, Иван"
    assert readable("a\nb\u202ec\udce9") == r"a\nb\u202ec\udce9"
    assert readable("李") == r"\u674e"
    assert readable("x" * 101) == "x" * 100 + "…"


@pytest.mark.parametrize(
    ("one", "other"), [("李小龍", "李小狼"), ("a\udce9", "a\udcea"), ("a\nb", "a b"), ("é", "è")]
)
def test_different_names_look_different(one: str, other: str) -> None:
    sheets = [np.asarray(contact_sheet(noise(1), [0], [name])) for name in (one, other)]
    assert not np.array_equal(*sheets)


def test_a_row_lists_every_name_in_it() -> None:
    faces = noise(2)
    one = contact_sheet(faces, [0, 0], ["Ann, Bob", "Ann, Bob"])
    both = contact_sheet(faces, [0, 0], ["Ann", "Bob"])
    assert np.array_equal(np.asarray(one), np.asarray(both))


def test_one_image_as_a_tensor_of_any_layout() -> None:
    (face,) = noise(1)
    wide = torch.from_numpy(np.ascontiguousarray(face.transpose(1, 2, 0))).permute(2, 0, 1)
    for image in (torch.from_numpy(face), wide):
        sheet = contact_sheet([image], torch.tensor([4]), ["a"])
        assert sheet.mode == "RGB" and len(places(sheet, face)) == 2


def test_the_title_and_the_numbers_are_on_it() -> None:
    faces, labels = noise(3), [0, 0, 1]
    heads = [
        np.asarray(contact_sheet(f, k, ["a"] * len(f), title=t))[:60]
        for f, k, t in (
            (faces, labels, "LFW"),
            (faces, labels, "LFV"),
            (faces[:2], labels[:2], "LFW"),
            (faces, [0, 0, 0], "LFW"),
        )
    ]
    widths = min(head.shape[1] for head in heads)
    assert len({head[:, : min(widths, 500)].tobytes() for head in heads}) == 4


@pytest.mark.parametrize("size", [1, 7, 400])
def test_any_size_of_image(size: int) -> None:
    faces = noise(2, size)
    sheet = contact_sheet(faces, [0, 1], ["a", "b"])
    assert all(places(sheet, face) for face in faces)


BLANK = np.zeros((3, 8, 8), np.uint8)


@pytest.mark.parametrize(
    ("images", "labels", "names", "columns", "message"),
    [
        ([], [], [], 6, "must show at least 1 image, got 0"),
        ([BLANK], [0, 1], ["a"], 6, "equally many, got 1, 2 and 1"),
        ([BLANK], [0], [], 6, "equally many, got 1, 1 and 0"),
        ([BLANK], [0], ["a"], 0, "columns must be at least 1, got 0"),
        ([BLANK, noise(1)[0]], [0, 1], ["a", "b"], 6, "must have one shape"),
        ([BLANK.astype(float)], [0], ["a"], 6, r"must be uint8 \(3, S, S\), got float64"),
        ([BLANK.transpose(1, 2, 0)], [0], ["a"], 6, r"must be uint8 \(3, S, S\)"),
        ([BLANK[:, :, :0]], [0], ["a"], 6, r"must be uint8 \(3, S, S\)"),
        ([BLANK[:, :, :5]], [0], ["a"], 6, "must be square, got 8 x 5 pixels"),
    ],
)
def test_what_cannot_be_shown_is_refused(
    images: list[Face], labels: list[int], names: list[str], columns: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        contact_sheet(images, labels, names, columns=columns)


class TestPickImages:
    @given(
        labels=st.lists(st.integers(0, 12), max_size=60),
        identities=st.integers(1, 8),
        images=st.integers(1, 5),
    )
    def test_how_many_and_in_which_order(
        self, labels: list[int], identities: int, images: int
    ) -> None:
        picked = pick_images(np.array(labels, np.int32), identities, images)
        assert len(set(picked)) == len(picked)
        assert picked == sorted(picked, key=lambda i: (labels[i], i))
        shown = {labels[i] for i in picked}
        assert len(shown) == min(identities, len(set(labels)))
        for k in shown:
            assert sum(labels[i] == k for i in picked) == min(images, labels.count(k))
        several = {k for k in labels if labels.count(k) > 1}
        assert len(shown & several) == min(identities, len(several))

    def test_evenly_from_first_to_last(self) -> None:
        labels = np.repeat(np.arange(101), 21)
        picked = np.array(pick_images(labels, 5, 3))
        assert labels[picked[::3]].tolist() == [0, 25, 50, 75, 100]
        assert (picked % 21).tolist() == [0, 10, 20] * 5

    @pytest.mark.parametrize(("identities", "images"), [(0, 3), (3, 0)])
    def test_at_least_one_of_each(self, identities: int, images: int) -> None:
        with pytest.raises(ValueError, match=f"at least 1, got {identities} and {images}"):
            pick_images([0, 1], identities, images)


def test_lfw_is_shown(shared_data: Path) -> None:
    folder = shared_data / "lfw112" / "images"
    names = ["Aaron_Peirsol", "Diana_Krall"]
    files = [file for name in names for file in sorted((folder / name).glob("*.jpg"))]
    faces = [np.asarray(Image.open(file)).transpose(2, 0, 1) for file in files]
    called = [file.parent.name for file in files]
    sheet = contact_sheet(faces, [names.index(name) for name in called], called, "LFW")
    assert all(places(sheet, face) for face in faces)
    mean = np.mean(faces, (0, 1))
    eyes = [mean[50:54, round(x) - 2 : round(x) + 3].mean() for x, _ in ARCFACE_POINTS[:2]]
    assert max(eyes) < mean[60:70, 30:80].mean()
