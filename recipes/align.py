"""Find the faces in photographs and align them: ``python recipes/align.py --help``."""

from __future__ import annotations

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

    from fastface_lightning.data.align import Landmarks

CONF = Path(__file__).resolve().parents[1] / "conf"
LANDMARKS, LEFT_OUT = "landmarks.txt", "left_out.txt"
SHOWN = 48  # photographs on the sheet of what was left out


@program(config_path=CONF, config_name="align")
def main(cfg: DictConfig) -> int:
    """Align what is not aligned yet, leave align.json; returns the number of images left out."""
    if cfg.faces not in ("main", "all"):
        raise ValueError(f"faces must be main or all, got {cfg.faces}")
    check_numbers(cfg, {"min_face": 0, "num_workers": 0, "quality": 1})

    from rich.progress import track
    from torch.utils.data import DataLoader

    from fastface_lightning.data import FaceDetector, find_images
    from fastface_lightning.data.photos import Photos, as_it_is
    from fastface_lightning.files import replacing

    detector = FaceDetector(cfg.side, cfg.threshold)
    root, target = Path(cfg.images), Path(cfg.target)
    names = find_images(root)
    if root.resolve() in target.resolve().parents:  # its crops would be taken for photographs
        raise ValueError(f"target must lie outside of images={root}, got {target}")
    begin(cfg, target)
    listed, left_out = listed_in(target / LANDMARKS), left_out_in(target / LEFT_OUT)
    photos = Photos(root, names, detector, listed, cfg.faces == "all", cfg.min_face, cfg.quality)
    left = [n for n in names if n not in left_out and not photos.is_done(n, target)]
    photos.names = left
    photos.listed = {name: listed[name] for name in left if name in listed}
    started = time.perf_counter()
    workers = min(cfg.num_workers, len(left))
    # Workers are started anew: OpenCV's threads do not outlive a fork.
    start: dict[str, Any] = {"multiprocessing_context": "spawn"} if workers else {}
    data: Any = photos
    loader = DataLoader(data, None, num_workers=workers, collate_fn=as_it_is, **start)
    with (target / LANDMARKS).open("ab", 0) as found, (target / LEFT_OUT).open("ab", 0) as lost:
        outcomes = track(loader, "aligning", transient=True)
        for name, (faces, crops, why) in zip(left, outcomes, strict=True):
            for file, crop in zip(photos.files(name, len(crops)), crops, strict=True):
                with replacing(target / file) as part:
                    part.write_bytes(crop)
            if why:
                left_out[name] = why
                lost.write(line(name, why))
            elif name not in listed:
                found.write(b"".join(line(name, *points, score) for _, points, score in faces))
    return report(cfg, names, left_out, len(left), time.perf_counter() - started)


def begin(cfg: DictConfig, target: Path) -> None:
    """Refuse a target of something else, and cut off what a killed run left half written."""
    from fastface_lightning.files import write_text

    keys = ("images", "faces", "min_face", "side", "threshold", "quality")
    settings = {key: cfg[key] for key in keys} | {"images": os.path.realpath(cfg.images)}
    stamp = target / "align.json"
    if not stamp.exists():
        if target.exists() and (not target.is_dir() or any(target.iterdir())):
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
            file.truncate(file.read().rfind(b"\n") + 1)


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

    texts = [
        each if isinstance(each, str) else f"{each:.2f}"
        for f in fields
        for each in np.ravel(f).tolist()
    ]
    return os.fsencode("\t".join([name.replace("\t", " ").replace("\n", " "), *texts])) + b"\n"


def report(
    cfg: DictConfig, names: list[str], left_out: dict[str, str], tried: int, seconds: float
) -> int:
    """Print what came of it, draw what was left out; returns how many images were."""
    import numpy as np
    from PIL import Image, ImageOps

    from fastface_lightning.data import decode_original
    from fastface_lightning.data.formats.image import IMAGE_SUFFIXES
    from fastface_lightning.report.image_grid import plot_captioned

    folder = Path(HydraConfig.get().runtime.output_dir)
    lost = {name: left_out[name] for name in names if name in left_out}
    kinds = Counter(why.partition(":")[0] for why in lost.values())
    result = {"target": str(cfg.target), "images": len(names), "aligned": len(names) - len(lost)}
    result |= {"left_out": dict(kinds), "tried": tried, "seconds": round(seconds, 1)}
    print(
        f"{cfg.target}: {result['aligned']:,} of {len(names):,} images aligned in {seconds:.0f} s"
    )
    for kind, count in kinds.most_common():
        print(f"  {count:,} left out: {kind}")

    def thumbnail(name: str) -> NDArray[np.uint8]:
        photo = decode_original((Path(cfg.images) / name).read_bytes())
        return np.asarray(ImageOps.pad(Image.fromarray(photo), (112, 112))).transpose(2, 0, 1)

    others = Counter(
        Path(name).suffix.lower() or name
        for _, _, files in os.walk(cfg.images)
        for name in files
        if not name.startswith(".") and not name.lower().endswith(IMAGE_SUFFIXES)
    )
    if others:
        result["other_files"] = dict(others)
        print(f"  not looked at: {', '.join(f'{n:,} {kind}' for kind, n in others.most_common(5))}")
    (folder / "align.json").write_text(json.dumps(result, indent=2) + "\n")
    shown = [name for name, why in lost.items() if not why.startswith("unreadable")]
    shown = shown[:: max(len(shown) // SHOWN, 1)][:SHOWN]
    if shown:
        plot_captioned(
            folder / "left_out.png",
            [thumbnail(name) for name in shown],
            [f"{Path(name).name}: {lost[name]}" for name in shown],
            f"left out, {len(shown)} of {len(lost)}",
        )
    if lost:
        print(
            f"  named in {Path(cfg.target) / LEFT_OUT}; align.json and left_out.png are in {folder}"
        )
    return len(lost)


if __name__ == "__main__":
    main()
