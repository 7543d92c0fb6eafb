"""A small folder of IJB's layout, complete down to the lists for identification."""

from pathlib import Path

import numpy as np

from fastface_lightning.data import ARCFACE_POINTS, encode_jpeg
from fastface_lightning.data.datasets.synthetic_faces import draw_face

_EACH = 6  # synthetic images a person


def make_ijb(
    root: Path, name: str = "ijbc", people: int = 6, seed: int = 0, images: np.ndarray | None = None
) -> Path:
    """Write a folder that ``read_ijb`` reads, and give it back.

    Half of a person's images become a template of the gallery, the last one a probe by itself, the
    others another probe. Two images in a row share a medium. Every template of the gallery makes a
    pair with every probe. An image is an aligned face somewhere in a larger noisy picture, with
    ArcFace's points moved along, so that aligning gives back the face (but for JPEG's losses).

    Args:
        root: the folder, which need not be there.
        name: "ijbb" or "ijbc".
        people: how many to draw; the first half are in the first gallery, the others in the second.
        seed: decides faces, ids, order, places and scores.
        images: (people, each, 3, 112, 112) uint8 RGB, at least 3 of each of at least 2 people, to
            take instead of synthetic ones.
    """
    rng = np.random.default_rng(seed)
    if images is None:
        images = np.array(
            [[draw_face(seed, person, k) for k in range(_EACH)] for person in range(people)]
        )
    people, each = images.shape[:2]
    half = each // 2
    part = np.array([0] * half + [1] * (each - 1 - half) + [2])  # of each image of a person
    templates = rng.permutation(3 * people).reshape(people, 3) + 1  # one in the gallery, two probes
    subjects = rng.permutation(people) + 100
    order = rng.permutation(people * each)
    faces, points, rows = [], [], {}
    (root / "loose_crop").mkdir(parents=True)
    for number, (person, k) in enumerate(zip(*divmod(order, each), strict=True), 1):
        template = templates[person, part[k]]
        medium = 1000 * template + (k - np.flatnonzero(part == part[k])[0]) // 2
        x, y = rng.integers(0, 33, 2)
        crop = rng.integers(0, 256, (112 + 32, 112 + 40, 3), dtype=np.uint8)
        crop[y : y + 112, x : x + 112] = images[person, k].transpose(1, 2, 0)
        (root / "loose_crop" / f"{number}.jpg").write_bytes(encode_jpeg(crop, quality=98))
        faces.append(f"{number}.jpg {template} {medium}")
        numbers = [*np.add(ARCFACE_POINTS, (x, y)).ravel(), rng.uniform(0.5, 1)]
        points.append(" ".join([f"{number}.jpg", *(f"{value:.4f}" for value in numbers)]))
        row = f"{template},{subjects[person]},img/{number}.png,{number},{x},{y},112,112"
        rows.setdefault((person, min(part[k], 1)), []).append(row)
    pairs = [
        f"{templates[i, 0]} {templates[j, probe]} {int(i == j)}"
        for i in range(people)
        for j in range(people)
        for probe in (1, 2)
    ]
    meta, middle = root / "meta", people // 2
    meta.mkdir()
    _write(meta / f"{name}_face_tid_mid.txt", faces)
    _write(meta / f"{name}_name_5pts_score.txt", points)
    _write(
        meta / f"{name}_template_pair_label.txt", [pairs[i] for i in rng.permutation(len(pairs))]
    )
    header = "TEMPLATE_ID,SUBJECT_ID,FILENAME,SIGHTING_ID,FACE_X,FACE_Y,FACE_WIDTH,FACE_HEIGHT"
    letter = "S" if name == "ijbb" else "G"
    for file, group, kind in (
        (f"{name}_1N_gallery_{letter}1.csv", range(middle), 0),
        (f"{name}_1N_gallery_{letter}2.csv", range(middle, people), 0),
        (f"{name}_1N_probe_mixed.csv", range(people), 1),
    ):
        _write(meta / file, [header, *(row for person in group for row in rows[person, kind])])
    return root


def _write(file: Path, lines: list[str]) -> None:
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
