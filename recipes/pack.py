"""Pack faces into a record file, unpack, check, show them: ``python recipes/pack.py --help``."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader, Dataset

from fastface_lightning.cli import program
from fastface_lightning.data import (
    FaceDataModule,
    FaceDataset,
    align_face,
    decode_into,
    decode_original,
    encode_jpeg,
    is_packable,
    pair_files,
    read_landmarks,
    write_verification_bin,
)
from fastface_lightning.data.formats.names import write_names
from fastface_lightning.data.formats.recordio import InsightFaceWriter
from fastface_lightning.data.formats.tar import write_shards
from fastface_lightning.files import file_stamp, reason
from fastface_lightning.report.image_grid import sheet_of

CONF = Path(__file__).resolve().parents[1] / "conf"
Prepared = tuple[int, bytes, str]  # place in the pack's order, JPEG or nothing, why there is none


@program(config_path=CONF, config_name="pack")
def main(cfg: DictConfig) -> int:
    """Do what is asked for, leave pack.json; returns the number of bad images."""
    check(cfg)
    folder = Path(HydraConfig.get().runtime.output_dir)
    if cfg.validate and "max_bad" in cfg.data:
        cfg.data.max_bad = sys.maxsize  # all of them are to be listed
    data: FaceDataModule = instantiate(cfg.data)
    started = time.perf_counter()
    found: dict[str, Any] = {"target": cfg.target}
    if cfg.pairs is not None:
        found |= pack_pairs(cfg, data)
    else:
        faces = data.faces()
        found |= {"source": str(faces), "identities": faces.num_classes, "images": len(faces)}
        if cfg.sheet:
            sheet_of(faces).save(folder / "sheet.png")
        if cfg.validate:
            found["bad"] = validate(faces, cfg.data.num_workers)
        if cfg.target is not None:
            found |= pack(cfg, faces)
    found["seconds"] = time.perf_counter() - started
    report(found, folder)
    if cfg.validate and found["bad"]:
        sys.exit(1)
    return len(found.get("bad", []))


def check(cfg: DictConfig) -> None:
    """Refuse what cannot be done, before anything is read."""
    if not (cfg.target or cfg.validate or cfg.sheet):
        raise ValueError(
            "nothing to do: give target=FILE.rec, target=FOLDER, pairs=PAIRS target=FILE.bin,"
            " validate=true or sheet=true"
        )
    if not 1 <= cfg.quality <= 100:
        raise ValueError(f"quality must lie in [1, 100], got {cfg.quality}")
    if cfg.size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {cfg.size}")
    if cfg.validate and cfg.target:
        raise ValueError("validate=true reads and target=… writes: give one of them")
    suffix = Path(cfg.target or "").suffix
    if suffix not in ("", ".rec", ".bin"):
        raise ValueError(f"target must be FILE.rec, FILE.bin or a folder, got {cfg.target}")
    formats = {"": ("folder", "shards"), ".rec": ("records",)}.get(suffix, ())
    if cfg.format is not None and cfg.format not in formats:
        raise ValueError(
            "format must be records with target=FILE.rec, folder or shards with target=DIR, got"
            f" {cfg.format} with {cfg.target}"
        )
    if suffix == ".bin" and cfg.pairs is None:
        raise ValueError(f"a .bin is made of a pairs file: give pairs=PAIRS with {cfg.target}")
    if suffix != ".bin" and cfg.pairs is not None:
        raise ValueError(f"pairs={cfg.pairs} need a target=FILE.bin, got target={cfg.target}")


def report(found: dict[str, Any], folder: Path) -> None:
    """Print what was done and write it down."""
    console = Console(highlight=False, soft_wrap=True)
    bad = found.get("bad")
    for key in ("source", "identities", "images", "target", "packed", "seconds"):
        value = found.get(key)
        if value is not None:
            shown = f"{value:,}" if isinstance(value, int) else value
            console.print(f"  {key:12}{f'{value:.1f}' if isinstance(value, float) else shown}")
    if bad is not None:
        console.print(f"  {'left out' if 'packed' in found else 'bad images':12}{len(bad):,}")
        for line in bad[:20]:
            console.print(f"    {line}", markup=False)
        if bad:
            file = folder / "bad_images.txt"
            file.write_text("".join(f"{line}\n" for line in bad), encoding="utf-8")
            console.print(f"    all are in {file}")
    (folder / "pack.json").write_text(json.dumps(found, indent=2) + "\n")
    console.print(f"  {'files':12}{folder}")


class Validated(Dataset[str]):
    """Why image i cannot be read; nothing if it can."""

    def __init__(self, faces: FaceDataset) -> None:
        self.faces = faces
        self.out = np.empty((faces.size, faces.size, 3), np.uint8)

    def __len__(self) -> int:
        return len(self.faces)

    def __getitem__(self, index: int) -> str:
        try:
            self.faces.read_into(index, self.out)
        except ValueError as error:
            return str(error)
        return ""


def validate(faces: FaceDataset, num_workers: int) -> list[str]:
    """Read and decode every image; returns why some cannot be."""
    damaged = list(getattr(faces, "damaged", []))
    loader = DataLoader(Validated(faces), 64, num_workers=num_workers, collate_fn=list)
    batches = track(loader, "validating", transient=True)
    return damaged + [why for batch in batches for why in batch if why]


class Preparation(Dataset[Prepared]):
    """Images as a pack holds them: JPEGs of one size, in the order of their identities."""

    def __init__(self, faces: FaceDataset, cfg: DictConfig) -> None:
        self.faces, self.size, self.quality = faces, cfg.size, cfg.quality
        labels = faces.labels
        ascending = (np.diff(labels) >= 0).all()
        self.order = None if ascending else labels.argsort(kind="stable")
        self.points = None if cfg.landmarks is None else points_by_name(cfg.landmarks)

    def __len__(self) -> int:
        return len(self.faces)

    def source(self, place: int) -> int:
        """Index in the data set of the image at a place in the order."""
        return place if self.order is None else int(self.order[place])

    def __getitem__(self, place: int) -> Prepared:
        index = self.source(place)
        try:
            return place, self._prepared(index), ""
        except ValueError as error:
            name, why = self.faces.name(index), str(error)
            return place, b"", why if name in why else f"cannot pack image {name}: {why}"

    def _prepared(self, index: int) -> bytes:
        data = self.faces.encoded(index)
        if self.points is not None:
            points = self.points.get(tail(self.faces.name(index)))
            if points is None:
                raise ValueError("the list of landmarks does not name it")
            return encode_jpeg(align_face(decode_original(data), points, self.size), self.quality)
        return packable(data, self.size, self.quality)


def packable(data: bytes | memoryview, size: int, quality: int) -> bytes:
    """The bytes themselves if every reader sees them alike, else a JPEG of their picture."""
    if is_packable(data, size):
        return bytes(data)
    out = np.empty((size, size, 3), np.uint8)
    decode_into(data, out)
    return encode_jpeg(out, quality)


def points_by_name(file: str) -> dict[str, np.ndarray]:
    """Landmarks (5, 2) by the last two parts of their image's path."""
    found: dict[str, np.ndarray] = {}
    for face in read_landmarks(file):
        name = tail(face.name)
        if name in found:
            raise ValueError(f"{file} must name {name} once, by its folder and file")
        found[name] = face.points.astype(np.float32)
    return found


def tail(path: str) -> str:
    return "/".join(Path(path).parts[-2:])


class Progress:
    """What a pack that is not complete is made of, in ``<target>.part.json``.

    The first line says what of, so that no other source goes on with it; then comes a line for
    each bad image, with its place.
    """

    def __init__(self, target: Path, source: dict[str, Any]) -> None:
        self.file = target.with_name(target.name + ".part.json")
        self.bad: list[tuple[int, str]] = []
        self.started = self.file.exists()
        if not self.started:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            new = self.file.with_suffix(".new")
            new.write_text(json.dumps(source) + "\n")
            os.replace(new, self.file)
            return
        first, *bad = self.file.read_text().splitlines()
        with self.file.open("a") as lines:  # after a line torn by the end of the run
            lines.write("\n")
        if json.loads(first) != source:
            raise ValueError(
                f"{target} was begun from another source or with other settings, {first}: delete"
                f" {self.file} and the parts beside it to start anew"
            )
        for line in bad:
            try:
                self.bad.append(tuple(json.loads(line)))
            except json.JSONDecodeError:  # torn, or empty
                continue

    def add(self, place: int, why: str, most: int) -> None:
        """Keep a bad image; more than ``most`` of them end the run."""
        self.bad.append((place, why))
        with self.file.open("a") as lines:
            lines.write(json.dumps([place, why]) + "\n")
        if len(self.bad) > most:
            raise ValueError(
                f"at most data.max_bad = {most} images may be unreadable, got {len(self.bad)},"
                f" the last because: {why}; the same command with another data.max_bad goes on"
            )


def pack(cfg: DictConfig, faces: FaceDataset) -> dict[str, Any]:
    """Pack all images into ``target``; returns their number and the bad ones."""
    target = Path(cfg.target)
    images = Preparation(faces, cfg)
    source = {
        "source": str(faces),
        "images": len(faces),
        "identities": faces.num_classes,
        "content": digest(faces, cfg),
        **{key: cfg[key] for key in ("format", "size", "quality", "landmarks")},
    }
    to_folder = write_tar_shards if cfg.format == "shards" else write_files
    write = write_records if target.suffix == ".rec" else to_folder
    if target.suffix == ".rec" and target.exists():
        raise ValueError(f"a record file must be new, but {target} exists")
    begun = target.with_name(target.name + ".part.json").exists()
    if write is not write_records and not begun and target.is_dir() and any(target.iterdir()):
        raise ValueError(f"a folder to unpack into must be new or empty, got {target}")
    progress = Progress(target, source)
    packed = write(images, target, progress, cfg.data.num_workers)
    progress.file.unlink()
    return {"packed": packed, "bad": [why for _, why in progress.bad]}


def digest(faces: FaceDataset, cfg: DictConfig) -> str:
    """What tells a source from another: its labels, a thousand of its images, where it lies, and
    its landmarks."""
    found = hashlib.sha256(faces.labels.tobytes())
    for i in np.linspace(0, len(faces) - 1, 1000).astype(int).tolist():
        found.update(faces.name(i).encode())
    found.update(os.fsencode(os.path.realpath(cfg.data.get("root", ""))))
    if cfg.landmarks is not None:
        found.update(str(file_stamp(cfg.landmarks)).encode())
    return found.hexdigest()


def prepared(images: Preparation, start: int, num_workers: int) -> Iterator[Prepared]:
    """Images from a place on, in order, whichever process prepared them."""
    rest: Any = range(start, len(images))
    loader = DataLoader(images, 32, sampler=rest, num_workers=num_workers, collate_fn=list)
    what = f"packing from image {start:,}" if start else "packing"
    for batch in track(loader, what, transient=True):
        yield from batch


def write_records(images: Preparation, target: Path, progress: Progress, num_workers: int) -> int:
    """A record file in InsightFace's layout, and the identities' names beside it."""
    faces = images.faces
    with InsightFaceWriter(target, resume=progress.started) as writer:
        start = 0 if writer.last_id2 is None else writer.last_id2 + 1
        progress.bad = [bad for bad in progress.bad if bad[0] < start]  # others are tried again
        for place, jpeg, why in prepared(images, start, num_workers):
            if why:
                progress.add(place, why, faces.max_bad)
            else:
                writer.write_image(int(faces.labels[images.source(place)]), jpeg, id2=place)
        if not len(writer):
            raise ValueError(f"none of the {len(faces)} images in {faces} can be read")
        write_names(target.with_suffix(".identities.txt"), faces.identities)
        return len(writer)


def write_files(images: Preparation, target: Path, progress: Progress, num_workers: int) -> int:
    """``<identity>/<image>.jpg`` in a folder; those that are there are taken to be done."""
    faces = images.faces
    count, progress.bad = 0, []
    for place, jpeg, why in prepared(images, 0, num_workers):
        index = images.source(place)
        identity = faces.identities[int(faces.labels[index])]
        if identity in ("", ".", "..") or "/" in identity or "\0" in identity:
            raise ValueError(f"an identity must be the name of a folder, got {identity!r}")
        if why:
            progress.add(place, why, faces.max_bad)
            continue
        file = target / identity / faces.file_name(index)
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            part = file.with_name(f".{file.name}.part")
            part.write_bytes(jpeg)
            os.replace(part, file)
        count += 1
    return count


def write_tar_shards(
    images: Preparation, target: Path, progress: Progress, num_workers: int
) -> int:
    """WebDataset's tar shards; those that are there are kept."""
    faces = images.faces

    def samples(start: int) -> Iterator[tuple[bytes, str] | None]:
        progress.bad = [bad for bad in progress.bad if bad[0] < start]  # others are tried again
        for place, jpeg, why in prepared(images, start, num_workers):
            if why:
                progress.add(place, why, faces.max_bad)
                yield None
            else:
                yield jpeg, faces.identities[int(faces.labels[images.source(place)])]

    write_shards(target, samples)
    if len(progress.bad) == len(images):
        raise ValueError(f"none of the {len(faces)} images in {faces} can be read")
    return len(images) - len(progress.bad)


def pack_pairs(cfg: DictConfig, data: FaceDataModule) -> dict[str, Any]:
    """A ``.bin`` of a pairs file; a pair with an unreadable image is left out and named."""
    root = data.verify_root or data.home
    images: list[bytes] = []
    same, bad = [], []
    pairs = pair_files(cfg.pairs, root)
    for pair in track(pairs, "packing pairs", transient=True):
        try:
            images += [
                packable(path.read_bytes(), cfg.size, cfg.quality)
                for path in (pair.first, pair.second)
            ]
        except (OSError, ValueError) as error:
            bad.append(f"{pair.first.stem} and {pair.second.stem}: {reason(error)}")
        else:
            same.append(pair.same)
    if not same:
        raise ValueError(f"none of the {len(pairs)} pairs of {cfg.pairs} can be read: {bad[0]}")
    write_verification_bin(cfg.target, images, same)
    return {"source": str(cfg.pairs), "packed": len(same), "bad": bad}


if __name__ == "__main__":
    main()
