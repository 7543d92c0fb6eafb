"""Find the faces in photographs and align them: ``python recipes/align.py --help``."""

from __future__ import annotations

import errno
import json
import os
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from fastface_lightning.cli import check_numbers, program

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fastface_lightning.data import FaceDetector
    from fastface_lightning.data.align import Landmarks

CONF = Path(__file__).resolve().parents[1] / "conf"
LANDMARKS, LEFT_OUT = "landmarks.txt", "left_out.txt"
SHOWN = 48  # photographs on the sheet of what was left out


@program(config_path=CONF, config_name="align")
def main(cfg: DictConfig) -> int:
    """Align what is not aligned yet, leave align.json; returns the number of images left out."""
    check(cfg)

    from fastface_lightning.data import FaceDetector, find_images
    from fastface_lightning.training.run_folder import in_use

    detector = FaceDetector(cfg.side, cfg.threshold)
    root, target = Path(cfg.images), Path(cfg.target)
    names = find_images(root)
    if root.resolve() in target.resolve().parents:  # its crops would be taken for photographs
        raise ValueError(f"target must lie outside of images={root}, got {target}")
    started = time.perf_counter()
    with in_use(target):
        begin(cfg, target)
        left_out = align(cfg, names, detector)
    return report(cfg, names, left_out, time.perf_counter() - started)


def check(cfg: DictConfig) -> None:
    """Refuse what cannot be done, before anything is read."""
    from fastface_lightning.schedule.plateau import check_count

    if cfg.faces not in ("main", "all"):
        raise ValueError(f"faces must be main or all, got {cfg.faces}")
    for key, least in (("quality", 1), ("side", 32), ("num_workers", 0)):
        check_count(key, cfg[key], least)
    if cfg.quality > 100:
        raise ValueError(f"quality must lie in [1, 100], got {cfg.quality}")
    for key in ("min_face", "threshold"):
        if cfg[key] is None:
            raise ValueError(f"{key} must be a number, got null")
    check_numbers(cfg, {"min_face": 0, "threshold": 0})


def begin(cfg: DictConfig, target: Path) -> None:
    """Refuse a target of something else, and cut off what a killed run left half written."""
    from fastface_lightning.files import write_text

    keys = ("images", "faces", "min_face", "side", "threshold", "quality")
    settings = {key: cfg[key] for key in keys} | {"images": os.path.realpath(cfg.images)}
    stamp = target / "align.json"
    if not stamp.exists():
        if any(not file.name.startswith(".") for file in target.iterdir()):
            raise ValueError(f"target must be new, or an empty folder, but {target} exists")
        write_text(stamp, json.dumps(settings) + "\n")
    before = json.loads(stamp.read_text())
    for key, value in settings.items():
        if before.get(key) != value:
            raise ValueError(
                f"{target} was begun with {key}={before.get(key)}, got {value}: give another target"
            )
    for name in (LANDMARKS, LEFT_OUT):
        with (target / name).open("a+b") as file:
            file.seek(0)
            whole, _, torn = file.read().rpartition(b"\n")
            lines = [*whole.split(b"\n"), b""] if whole else []
            of_torn = torn.partition(b"\t")[0] + b"\t"
            while torn and lines[-2:-1] and lines[-2].startswith(of_torn):  # of all its faces
                del lines[-2]
            # What could not be read or written then may be now.
            again = b"unreadable", b"unwritable"
            lines = [text for text in lines if not text.partition(b"\t")[2].startswith(again)]
            file.truncate(0)
            file.write(b"\n".join(lines))


def align(cfg: DictConfig, names: list[str], detector: FaceDetector) -> dict[str, str]:
    """Write the crops that are not there, and the lists; returns what is left out, and why."""
    from rich.progress import track
    from torch.utils.data import DataLoader

    from fastface_lightning.data.photos import (
        Photos,
        as_it_is,
        can_be_listed,
        crop_files,
        ignore_interrupts,
    )
    from fastface_lightning.files import reason, replacing

    target, every = Path(cfg.target), cfg.faces == "all"
    listed, left_out = listed_in(target / LANDMARKS), left_out_in(target / LEFT_OUT)

    def written(name: str) -> float | None:
        """When the first crop of a photograph was; None if one is missing."""
        files = [target / file for file in crop_files(name, len(listed[name]), every)]
        return min(f.stat().st_mtime for f in files) if all(f.exists() for f in files) else None

    times = {name: written(name) for name in names if name in listed}
    if len(times) < len(listed):
        count = len(listed) - len(times)
        print(f"{count:,} photographs in {target / LANDMARKS} are gone: their crops stay")
    changed = [  # a photograph that is newer than its crops is another one
        name
        for name, when in times.items()
        if when is not None and (Path(cfg.images) / name).stat().st_mtime > when
    ]
    for name in changed:
        del listed[name]
    if changed:
        with replacing(target / LANDMARKS) as part:
            part.write_bytes(b"".join(line(*face) for faces in listed.values() for face in faces))
    todo = [n for n in names if n not in left_out and (n not in listed or times[n] is None)]
    known = {name: listed[name] for name in todo if name in listed}
    photos: Any = Photos(cfg.images, todo, detector, known, every, cfg.min_face, cfg.quality)
    workers = min(cfg.num_workers, len(todo))
    # Workers are started anew: OpenCV's threads do not outlive a fork.
    how: dict[str, Any] = {"collate_fn": as_it_is, "worker_init_fn": ignore_interrupts}
    start: dict[str, Any] = {"multiprocessing_context": "spawn"} if workers else {}
    loader = DataLoader(photos, None, num_workers=workers, **how, **start)
    with (
        (target / LANDMARKS).open("ab", 0) as landmarks,
        (target / LEFT_OUT).open("ab", 0) as without_crop,
    ):
        outcomes = track(loader, "aligning", transient=True)
        for name, (faces, crops, why) in zip(todo, outcomes, strict=True):
            try:
                for file, crop in zip(crop_files(name, len(crops), every), crops, strict=True):
                    with replacing(target / file) as part:
                        part.write_bytes(crop)
            except OSError as error:
                if error.errno != errno.ENAMETOOLONG:
                    raise
                why = f"unwritable: {reason(error)}"
            if why:
                left_out[name] = why
            if why and can_be_listed(name):
                without_crop.write(line(name, why))
            elif not why and name not in listed:
                landmarks.write(b"".join(line(*face) for face in faces))
    return left_out


def listed_in(file: Path) -> dict[str, list[Landmarks]]:
    """The faces of each photograph, by its name."""
    from fastface_lightning.data import read_landmarks

    listed: dict[str, list[Landmarks]] = {}
    for face in read_landmarks(file):
        listed.setdefault(face.name, []).append(face)
    return listed


def left_out_in(file: Path) -> dict[str, str]:
    """Photographs without a crop, and why."""
    lines = file.read_text(encoding="utf-8", errors="surrogateescape").split("\n")
    return {name: why for name, _, why in (text.partition("\t") for text in lines) if why}


def line(name: str, *fields: Any) -> bytes:
    """A line of a list; numbers with two decimals."""
    import numpy as np

    values = [value for field in fields for value in np.ravel(field).tolist()]
    texts = [value if isinstance(value, str) else f"{value:.2f}" for value in values]
    return os.fsencode("\t".join([name, *texts])) + b"\n"


def report(cfg: DictConfig, names: list[str], left_out: dict[str, str], seconds: float) -> int:
    """Write down, print and draw what came of it; returns how many images were left out."""
    from fastface_lightning.data import other_files
    from fastface_lightning.report.image_grid import plot_captioned

    folder = Path(HydraConfig.get().runtime.output_dir)
    without_crop = {name: left_out[name] for name in names if name in left_out}
    kinds = Counter(why.partition(":")[0] for why in without_crop.values())
    others = other_files(cfg.images)
    count = len(names) - len(without_crop)
    result = {"target": str(cfg.target), "images": len(names), "aligned": count}
    result |= {"left_out": dict(kinds), "other_files": dict(others), "seconds": round(seconds, 1)}
    (folder / "align.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"{cfg.target}: {count:,} of {len(names):,} images aligned, in {seconds:.0f} s")
    for kind, number in kinds.most_common():
        print(f"  {number:,} left out: {kind}")
    if others:
        print(f"  not looked at: {', '.join(f'{n:,} {kind}' for kind, n in others.most_common(5))}")
    shown = list(without_crop)
    shown = shown[:: max(len(shown) // SHOWN, 1)][:SHOWN]
    pictures = {
        name: picture
        for name in shown
        if (picture := thumbnail(Path(cfg.images) / name)) is not None
    }
    if pictures:
        plot_captioned(
            folder / "left_out.png",
            list(pictures.values()),
            [f"{Path(name).name}: {without_crop[name]}" for name in pictures],
            f"left out, {len(pictures)} of {len(without_crop)}",
        )
    if without_crop:
        print(
            f"  named in {Path(cfg.target) / LEFT_OUT}; align.json and left_out.png are in {folder}"
        )
    return len(without_crop)


def thumbnail(file: Path) -> NDArray[np.uint8] | None:
    """(3, 112, 112) of a whole photograph; None where it cannot be read."""
    import numpy as np
    from PIL import Image, ImageOps

    from fastface_lightning.data import decode_original

    try:
        photo = Image.fromarray(decode_original(file.read_bytes()))
    except (OSError, ValueError):
        return None
    return np.asarray(ImageOps.pad(photo, (112, 112))).transpose(2, 0, 1)


if __name__ == "__main__":
    main()
