"""Pack faces into a record file, unpack, check, show them: ``python recipes/pack.py --help``."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from omegaconf import DictConfig

from fastface_lightning.cli import program

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike

    from fastface_lightning.data import FaceDataModule, FaceDataset

CONF = Path(__file__).resolve().parents[1] / "conf"
SHARD = 10_000  # images in a tar shard


@program(config_path=CONF, config_name="pack")
def main(cfg: DictConfig) -> int:
    """Do what is asked for, leave pack.json; returns the number of bad images."""
    check(cfg)
    folder = Path(HydraConfig.get().runtime.output_dir)
    if cfg.validate and "max_bad" in cfg.data:
        cfg.data.max_bad = sys.maxsize  # all of them are to be listed
    data: FaceDataModule = instantiate(cfg.data)
    started = time.perf_counter()
    result: dict[str, Any] = {"target": cfg.target}
    if cfg.pairs is not None:
        result |= pack_pairs(cfg, data)
    else:
        faces = data.faces()
        result |= {"source": str(faces), "identities": faces.num_classes, "images": len(faces)}
        if cfg.sheet:
            from fastface_lightning.data import ARCFACE_POINTS
            from fastface_lightning.data.datasets.sample import sample_of
            from fastface_lightning.report.image_grid import plot_faces

            plot_faces(folder / "sheet.png", *sample_of(faces), ARCFACE_POINTS)
        if cfg.validate:
            every = range(len(faces))
            why = in_order(partial(unreadable, faces), every, cfg.data.num_workers, "validating")
            result["bad"] = [*faces.damaged, *filter(None, why)]
        if cfg.target is not None:
            result |= pack(cfg, faces)
    result["seconds"] = round(time.perf_counter() - started, 1)
    report(result, folder)
    if cfg.validate and result["bad"]:
        sys.exit(1)
    return len(result.get("bad", []))


def check(cfg: DictConfig) -> None:
    """Refuse what cannot be done, before anything is read."""
    if not (cfg.target or cfg.validate or cfg.sheet):
        raise ValueError("nothing to do: give target=FILE, validate=true or sheet=true")
    if not 1 <= cfg.quality <= 100:
        raise ValueError(f"quality must lie in [1, 100], got {cfg.quality}")
    if cfg.size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {cfg.size}")
    if cfg.validate and cfg.target:
        raise ValueError("validate=true reads and target=… writes: give one of them")
    suffix = Path(cfg.target or "").suffix
    formats = {"": ("folder", "shards"), ".rec": ("records",), ".bin": ()}
    if suffix not in formats:
        raise ValueError(f"target must be FILE.rec, FILE.bin or a folder, got {cfg.target}")
    if (suffix == ".bin") != (cfg.pairs is not None):
        raise ValueError(
            f"target=FILE.bin goes with pairs=PAIRS, got target={cfg.target} and pairs={cfg.pairs}"
        )
    if cfg.format not in (None, *formats[suffix]):
        raise ValueError(
            "format must be records with target=FILE.rec, folder or shards with target=DIR, got"
            f" {cfg.format} with {cfg.target}"
        )


def report(result: dict[str, Any], folder: Path) -> None:
    """Print what was done and write it down."""
    for key in ("source", "identities", "images", "target", "packed", "seconds"):
        if result.get(key) is not None:
            value = result[key]
            print(f"  {key:12}{f'{value:,}' if isinstance(value, int) else value}")
    if "bad" in result:
        bad, file = result["bad"], folder / "bad_images.txt"
        print(f"  {'left out' if 'packed' in result else 'bad images':12}{len(bad):,}")
        print("".join(f"    {line}\n" for line in bad[:20]), end="")
        if bad:
            file.write_text("".join(f"{line}\n" for line in bad), encoding="utf-8")
            print(f"    all are in {file}")
    (folder / "pack.json").write_text(json.dumps(result, indent=2) + "\n")
    print(f"  {'files':12}{folder}")


def each(function: Callable[[int], Any], batch: list[int]) -> list[Any]:
    return [function(i) for i in batch]


def in_order(
    function: Callable[[int], Any], indices: range, num_workers: int, what: str
) -> Iterator[Any]:
    """``function(i)`` of all indices, whichever process worked it out, behind a progress bar."""
    from rich.progress import track
    from torch.utils.data import DataLoader

    data: Any = indices
    loader = DataLoader(data, 32, num_workers=num_workers, collate_fn=partial(each, function))
    for batch in track(loader, what, transient=True):
        yield from batch


def unreadable(faces: FaceDataset, index: int) -> str:
    """Why image ``index`` cannot be read; nothing if it can."""
    try:
        faces.read(index)
    except ValueError as error:
        return str(error)
    return ""


class Preparation:
    """Images as a pack holds them: JPEGs of one size, by ascending label."""

    def __init__(self, faces: FaceDataset, cfg: DictConfig) -> None:
        self.faces, self.size, self.quality = faces, cfg.size, cfg.quality
        self.num_workers = cfg.data.num_workers
        self.order = faces.labels.argsort(kind="stable")
        self.points = None if cfg.landmarks is None else points_by_name(cfg.landmarks)
        self.bad: list[str] = []  # why images are left out

    def begin(self, start: int, there: ArrayLike = ()) -> Iterator[tuple[int, int, bytes]]:
        """Place in the order, index in the data set and JPEG of all images from ``start`` on.

        The JPEG of one that cannot be read is empty. Those before ``start`` that are not ``there``
        were left out by an earlier run.
        """
        import numpy as np

        for place in np.setdiff1d(np.arange(start), np.asarray(there, np.int64)).tolist():
            self.leave_out(self.at(place)[1] or "it could not be read when this pack was begun")
        what = f"packing from image {start:,}" if start else "packing"
        places = range(start, len(self.faces))
        prepared = in_order(self.at, places, self.num_workers, what)
        for place, (jpeg, why) in zip(places, prepared, strict=True):
            if why:
                self.leave_out(why)
            yield place, int(self.order[place]), jpeg
        if len(self.bad) == len(self.faces):
            raise ValueError(f"none of the {len(self.faces)} images in {self.faces} can be read")

    def leave_out(self, why: str) -> None:
        """Note why an image is left out; more than ``max_bad`` of them end the run."""
        self.bad.append(why)
        if len(self.bad) > self.faces.max_bad:
            raise ValueError(
                f"at most data.max_bad = {self.faces.max_bad} images may be unreadable, got"
                f" {len(self.bad)}, the last because: {why}; the same command with another"
                " data.max_bad goes on"
            )

    def at(self, place: int) -> tuple[bytes, str]:
        """The JPEG at a place in the order, or nothing and why there is none."""
        from fastface_lightning.data import align_face, decode_original, encode_jpeg

        index = int(self.order[place])
        name = self.faces.name(index)
        try:
            data = self.faces.encoded(index)
            if self.points is None:
                return packable(data, self.size, self.quality), ""
            if tail(name) not in self.points:
                raise ValueError("the list of landmarks does not name it")
            face = align_face(decode_original(data), self.points[tail(name)], self.size)
            return encode_jpeg(face, self.quality), ""
        except ValueError as error:
            why = str(error)
            return b"", why if name in why else f"cannot pack image {name}: {why}"


def packable(data: bytes | memoryview, size: int, quality: int) -> bytes:
    """The bytes themselves if every reader sees them alike, else a JPEG of their picture."""
    import numpy as np

    from fastface_lightning.data import decode_into, encode_jpeg, is_packable

    if is_packable(data, size):
        return bytes(data)
    out = np.empty((size, size, 3), np.uint8)
    decode_into(data, out)
    return encode_jpeg(out, quality)


def points_by_name(file: str) -> dict[str, np.ndarray]:
    """Landmarks (5, 2) by the last two parts of their image's path."""
    from fastface_lightning.data import read_landmarks

    points: dict[str, np.ndarray] = {}
    for face in read_landmarks(file):
        name = tail(face.name)
        if name in points:
            raise ValueError(f"{file} must name {name} once, by its folder and file")
        points[name] = face.points
    return points


def tail(path: str) -> str:
    return "/".join(Path(path).parts[-2:])


def pack(cfg: DictConfig, faces: FaceDataset) -> dict[str, Any]:
    """Pack all images into ``target``; returns their number and why some were left out.

    ``<target>.part.json`` says what a pack that is not complete is made of, so that no other
    source goes on with it.
    """
    from fastface_lightning.files import write_text

    target = Path(cfg.target)
    images = Preparation(faces, cfg)
    source = {
        "source": str(faces),
        "images": len(faces),
        "identities": faces.num_classes,
        "content": digest(faces, cfg),
        **{key: cfg[key] for key in ("format", "size", "quality", "landmarks")},
    }
    stamp = target.with_name(target.name + ".part.json")
    if stamp.exists():
        if json.loads(stamp.read_text()) != source:
            raise ValueError(
                f"{target} was begun from another source or with other settings: delete {stamp} and"
                " the parts beside it to start anew"
            )
    elif target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ValueError(f"target must be new, or an empty folder, but {target} exists")
    else:
        write_text(stamp, json.dumps(source) + "\n")
    if target.suffix == ".rec":
        write_records(images, target)
    elif cfg.format == "shards":
        write_tar_shards(images, target)
    else:
        write_files(images, target)
    stamp.unlink()
    return {"packed": len(faces) - len(images.bad), "bad": images.bad}


def digest(faces: FaceDataset, cfg: DictConfig) -> str:
    """What tells a source from another: its labels, a thousand of its images, where it lies, and
    its landmarks."""
    from fastface_lightning.files import file_stamp

    content = hashlib.sha256(faces.labels.tobytes())
    for i in range(0, len(faces), max(len(faces) // 1000, 1)):
        content.update(faces.name(i).encode())
    content.update(os.fsencode(os.path.realpath(cfg.data.get("root", ""))))
    if cfg.landmarks is not None:
        content.update(str(file_stamp(cfg.landmarks)).encode())
    return content.hexdigest()


def write_records(images: Preparation, target: Path) -> None:
    """A record file in InsightFace's layout, and the identities' names beside it.

    An image's place in the order is its id2, so a pack that was begun says where to go on.
    """
    from fastface_lightning.data.formats.names import write_names
    from fastface_lightning.data.formats.recordio_writer import InsightFaceWriter

    faces = images.faces
    with InsightFaceWriter(target, resume=True) as writer:
        start = int(writer.id2[-1]) + 1 if len(writer) else 0
        for place, index, jpeg in images.begin(start, writer.id2):
            if jpeg:
                writer.write_image(int(faces.labels[index]), jpeg, id2=place)
        write_names(target.with_suffix(".identities.txt"), faces.identities)


def write_files(images: Preparation, target: Path) -> None:
    """``<identity>/<image>.jpg`` in a folder; those that are there are taken to be done."""
    from fastface_lightning.files import replacing

    faces = images.faces
    for _, index, jpeg in images.begin(0):
        identity = faces.identities[int(faces.labels[index])]
        if identity in ("", ".", "..") or "/" in identity or "\0" in identity:
            raise ValueError(f"an identity must be the name of a folder, got {identity!r}")
        file = target / identity / faces.file_name(index)
        if jpeg and not file.exists():
            with replacing(file) as part:
                part.write_bytes(jpeg)


def write_tar_shards(images: Preparation, target: Path) -> None:
    """WebDataset's tar shards; those that are there are kept, and say what they hold."""
    from fastface_lightning.data.formats.tar import read_shard, write_shards

    faces = images.faces

    def samples(start: int) -> Iterator[tuple[bytes, str] | None]:
        shards = [read_shard(target / f"{k:06d}.tar")[0] for k in range(-(-start // SHARD))]
        places = [int(Path(sample.name).stem) for shard in shards for sample in shard]
        for _, index, jpeg in images.begin(min(start, len(faces)), places):
            yield (jpeg, faces.identities[int(faces.labels[index])]) if jpeg else None

    write_shards(target, samples, SHARD)


def pack_pairs(cfg: DictConfig, data: FaceDataModule) -> dict[str, Any]:
    """A ``.bin`` of a pairs file; a pair with an unreadable image is left out and named."""
    from rich.progress import track

    from fastface_lightning.data import pair_files, write_verification_bin
    from fastface_lightning.files import reason

    images: list[bytes] = []
    same, bad = [], []
    pairs = pair_files(cfg.pairs, data.verify_root or data.home)
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
