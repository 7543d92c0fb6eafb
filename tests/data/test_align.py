"""Landmarks land on ArcFace's places, by the best similarity there is, half pixels included."""

import os
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastface_lightning.data.align import (
    ARCFACE_POINTS,
    align_face,
    read_landmarks,
    similarity_transform,
)


def moved(points: np.ndarray, scale: float, angle: float, x: float, y: float) -> np.ndarray:
    c, s = np.cos(angle), np.sin(angle)
    return points @ (scale * np.array([[c, -s], [s, c]])).T + [x, y]


def umeyama(points: np.ndarray, target: np.ndarray) -> np.ndarray:
    """The paper's solution, by singular values."""
    p, q = points - points.mean(0), target - target.mean(0)
    u, d, vt = np.linalg.svd(q.T @ p / 5)
    sign = np.diag([1, np.sign(np.linalg.det(u) * np.linalg.det(vt))])
    rotation = u @ sign @ vt
    scale = np.trace(np.diag(d) @ sign) / p.var(0).sum()
    turn = scale * rotation
    return np.column_stack([turn, target.mean(0) - turn @ points.mean(0)])


@given(st.integers(0, 2**32 - 1), st.floats(0.05, 20), st.sampled_from([112, 224]))
def test_it_is_umeyamas(seed: int, scale: float, size: int) -> None:
    rng = np.random.default_rng(seed)
    points = moved(ARCFACE_POINTS + rng.normal(0, 6, (5, 2)), scale, rng.uniform(-3, 3), 40, -7)
    expected = umeyama(points, ARCFACE_POINTS * size / 112)
    np.testing.assert_allclose(similarity_transform(points, size), expected, rtol=1e-8, atol=1e-8)


def test_it_never_mirrors() -> None:
    mirrored = ARCFACE_POINTS * [-1, 1] + [112, 0]
    assert np.linalg.det(similarity_transform(mirrored)[:, :2]) > 0


def test_faces_in_a_batch_do_not_mix() -> None:
    rng = np.random.default_rng(3)
    faces = np.stack(
        [moved(ARCFACE_POINTS + rng.normal(0, 4, (5, 2)), k + 1, k, 9, 7) for k in range(6)]
    )
    expected = np.stack([similarity_transform(points) for points in faces])
    assert expected.shape == (6, 2, 3)
    np.testing.assert_allclose(similarity_transform(faces), expected, atol=1e-12)
    assert similarity_transform(faces[:0]).shape == (0, 2, 3)


def bilinear(image: np.ndarray, matrix: np.ndarray, size: int) -> np.ndarray:
    """Each pixel of the crop looks up its place in the image, which lies in endless black."""
    height, width = image.shape[:2]

    def pixel(i: int, j: int) -> np.ndarray:
        inside = 0 <= i < height and 0 <= j < width
        return image[i, j].astype(float) if inside else np.zeros(3)

    out = np.empty((size, size, 3))
    back = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))
    for v in range(size):
        for u in range(size):
            x, y, _ = back @ [u, v, 1]
            i, j = int(np.floor(y)), int(np.floor(x))
            b, a = y - i, x - j
            upper = (1 - a) * pixel(i, j) + a * pixel(i, j + 1)
            lower = (1 - a) * pixel(i + 1, j) + a * pixel(i + 1, j + 1)
            out[v, u] = (1 - b) * upper + b * lower
    return out


@pytest.mark.parametrize(
    ("scale", "angle", "x", "y", "size"),
    [
        (0.8, 0.3, 50, 10, 112),  # within the image
        (1.9, -0.5, -40, 30, 56),  # beyond all its borders
        (0.31, 3.0, 160, 140, 72),  # upside down at a corner, enlarged
        (1.0, 0.0, 1000, -70, 16),  # elsewhere
    ],
)
def test_pixels_are_bilinear_between_pixel_centres(
    scale: float, angle: float, x: float, y: float, size: int
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (150, 170, 3), dtype=np.uint8)
    points = moved(ARCFACE_POINTS, scale, angle, x, y)
    expected = bilinear(image, similarity_transform(points, size), size)
    got = align_face(image, points, size)
    assert got.shape == (size, size, 3) and got.dtype == np.uint8
    assert np.abs(got - expected).max() <= 0.5 + 1e-3
    assert expected.any() == (x < 1000)


def test_an_aligned_face_stays_as_it_is(shared_data: Path) -> None:
    file = shared_data / "lfw112" / "images" / "Aaron_Peirsol" / "Aaron_Peirsol_0001.jpg"
    face = np.asarray(Image.open(file))
    assert np.array_equal(align_face(face, ARCFACE_POINTS), face)


@pytest.mark.parametrize(
    ("points", "message"),
    [
        (np.ones((5, 2)), "landmarks must lie apart, got [[1.0, 1.0], "),
        (np.full((5, 2), 1e6) + 1e-5 * ARCFACE_POINTS, "landmarks must lie apart"),
        (np.full((5, 2), np.nan), "landmarks must be finite"),
        (ARCFACE_POINTS * 1e200, "landmarks must be finite"),
        (np.ones((4, 2)), "got (4, 2)"),
        (np.stack([ARCFACE_POINTS, np.full((5, 2), 3.0), np.ones((5, 2))]), "got [[3.0, 3.0], "),
    ],
)
def test_points_are_checked(points: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        similarity_transform(points)


def test_points_that_fit_nothing_are_refused() -> None:
    """The mirror image of a shape can fit no better at any turn than a single point does."""
    q = (ARCFACE_POINTS - ARCFACE_POINTS.mean(0)) @ [1, 1j]
    # With p = r + c conj(q) and r at right angles to it, sum(conj(p) q) vanishes for this r.
    p = np.array([1, -1, 0, 0, 0], complex)
    p -= (p.conj() * q).sum().conj() / (np.abs(q) ** 2).sum() * q
    with pytest.raises(ValueError, match=r"^landmarks must resemble a face's, got "):
        similarity_transform(np.stack([p.real, p.imag], axis=1) * 20)


def test_the_image_and_the_size_are_checked(tmp_path: Path) -> None:
    image = np.zeros((9, 9, 3), np.uint8)
    for wrong in (image.astype(float), image[..., 0]):
        with pytest.raises(ValueError, match="image must be"):
            align_face(wrong, ARCFACE_POINTS)
    with pytest.raises(ValueError, match=r"got \(1, 5, 2\)"):
        align_face(image, ARCFACE_POINTS[None])
    with pytest.raises(ValueError, match="size must be at least 1"):
        align_face(image, ARCFACE_POINTS, size=0)
    with pytest.raises(ValueError, match="no list of landmarks"):
        list(read_landmarks(tmp_path / "gone"))


def as_fields(points: np.ndarray) -> str:
    return " ".join(map(str, points.ravel()))


def as_columns(points: np.ndarray) -> str:
    return "\t".join(map(str, points.T.ravel()))


FACES = np.random.default_rng(5).uniform(-3, 400, (3, 5, 2)).round(3)


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("a.jpg {0}\n\n  b/2.jpg\t{1}  \nc.jpg {2}", [None, None, None]),
        ("a.jpg {0} 0.97\r\nb/2.jpg {1} 1\r\nc.jpg {2} -1e-3\r\n", [0.97, 1.0, -0.001]),
        (
            "\ufeff0\ta.jpg\t3\t1\t2\t3\t4\t{3}\n0\tb/2.jpg\t3\t1\t2\t3\t4\t{4}\nc.jpg {2}\n",
            3 * [None],
        ),
    ],
    ids=["plain", "scores", "InsightFace"],
)
def test_lists_of_every_kind(text: str, scores: list[float | None], tmp_path: Path) -> None:
    file = tmp_path / "points.txt"
    numbers = [*map(as_fields, FACES), *map(as_columns, FACES)]
    file.write_text(text.format(*numbers), encoding="utf-8", newline="")
    faces = list(read_landmarks(file))
    assert [face.name for face in faces] == ["a.jpg", "b/2.jpg", "c.jpg"]
    assert [face.score for face in faces] == scores
    assert all(np.array_equal(f.points, points) for f, points in zip(faces, FACES, strict=True))


def test_names_hold_blanks_and_any_bytes(tmp_path: Path) -> None:
    file = tmp_path / "points.txt"
    line = f"\tann lee/1 a.jpg\t3\t1\t2\t3\t4\t{as_columns(FACES[0])}\n"
    fields = as_fields(FACES[1]).replace(" ", "\t")
    file.write_bytes(b"0" + line.encode() + b"jos\xe9 b.jpg\t" + fields.encode())
    first, second = read_landmarks(file)
    assert first.name == "ann lee/1 a.jpg" and np.array_equal(first.points, FACES[0])
    assert os.fsencode(second.name) == b"jos\xe9 b.jpg" and np.array_equal(second.points, FACES[1])


@pytest.mark.parametrize(
    "line",
    [
        "2.jpg 1 2 three",
        "a.jpg" + " 1" * 9 + " one",
        "a.jpg" + " 1" * 9 + " nan",
        "a.jpg" + " 1" * 10 + " nan",
        "1\ta.jpg\t7" + "\t5" * 14,  # aligned already
        "x" * 500,
    ],
)
def test_a_bad_line_is_named(line: str, tmp_path: Path) -> None:
    file = tmp_path / "points.txt"
    file.write_text(f"1.jpg {as_fields(FACES[0])}\n\n{line}\n", encoding="utf-8")
    faces = read_landmarks(file)
    assert next(faces).name == "1.jpg"
    with pytest.raises(ValueError, match=r"points\.txt:3: ") as error:
        next(faces)
    assert len(str(error.value)) < 250 + len(str(tmp_path))
