"""Do two images show one person, or who is it? ``python recipes/verify.py --help``."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from fastface_lightning.cli import check_numbers, program

if TYPE_CHECKING:
    from torch import Tensor

    from fastface_lightning.data import ImageFiles
    from fastface_lightning.inference.embedder import Embedder
    from fastface_lightning.inference.matching import Threshold
    from fastface_lightning.report.matches import Match

CONF = Path(__file__).resolve().parents[1] / "conf"
SHOWN = 200  # queries on the page


@program(config_path=CONF, config_name="verify", files="images")
def main(cfg: DictConfig) -> None:
    """Compare or search, print what came of it, leave verify.json and a page."""
    check(cfg)

    from fastface_lightning.inference.embedder import load_embedder
    from fastface_lightning.inference.matching import Threshold, find_threshold

    embedder = load_embedder(
        cfg.checkpoint,
        cfg.network,
        cfg.device,
        mirror=True,
        batch_size=cfg.batch_size,
        range=cfg.range,
        channels=cfg.channels,
    )
    if cfg.threshold is None:
        threshold = find_threshold(embedder.about, cfg.far, cfg.measured_on)
    else:
        threshold = Threshold(float(cfg.threshold), mirror=cfg.mirror is not False)
    embedder.mirror = threshold.mirror  # it holds for embeddings made as those were
    if cfg.images is None:
        search(cfg, embedder, threshold)
    else:
        compare(cfg, embedder, threshold)


def check(cfg: DictConfig) -> None:
    """Refuse what cannot be done, before anything takes long."""
    check_numbers(cfg, {"batch_size": 1, "min_face": 0, "far": 0, "threshold": -1})
    if cfg.threshold is not None and cfg.threshold > 1:
        raise ValueError(f"threshold must be a cosine in [-1, 1], got {cfg.threshold}")
    searched = [key for key in ("gallery", "query") if cfg[key] is not None]
    if cfg.images is None and len(searched) < 2:
        raise ValueError("two images must be given, or gallery=DIR and query=DIR, got less")
    if cfg.images is not None and (len(cfg.images) != 2 or searched):
        also = "".join(f" and {key}={cfg[key]}" for key in searched)
        raise ValueError(f"two images must be given, got {len(cfg.images)}{also}")
    if cfg.threshold is None and cfg.mirror is not None:
        raise ValueError(f"mirror goes with threshold=COSINE, got mirror={cfg.mirror} without one")
    chosen = [f"{key}={cfg[key]}" for key in ("far", "measured_on") if cfg[key] is not None]
    if cfg.threshold is not None and chosen:
        raise ValueError(
            f"threshold={cfg.threshold} takes the place of the model's own, among which "
            f"{chosen[0]} chooses: one of them must go"
        )


def compare(cfg: DictConfig, embedder: Embedder, threshold: Threshold) -> None:
    """Two images: one person or two?"""
    import torch

    from fastface_lightning.evaluation.checks import check_embeddings
    from fastface_lightning.files import printable
    from fastface_lightning.report.matches import Match

    files, _ = face_files(cfg, list(cfg.images))
    read = [files[number] for number in range(2)]
    for number, (_, readable) in enumerate(read):
        if not readable:
            raise ValueError(files.why(number))
    faces = torch.stack([face for face, _ in read])
    units = embedder(faces)
    check_embeddings(units)
    cosine = float(units[0] @ units[1])
    same = cosine >= threshold.cosine
    decision = "one person" if same else "two people"
    facts = [("decision", decision), ("cosine", f"{cosine:.4f}")]
    names = (printable(cfg.images[0]), printable(cfg.images[1]))
    match = Match(names, tuple(faces.numpy()), decision, cosine)
    leave(decision, threshold, facts, [match], {"images": names, "cosine": cosine, "same": same})


def search(cfg: DictConfig, embedder: Embedder, threshold: Threshold) -> None:
    """Who of the gallery is on each image of ``query``, or nobody of them?"""
    from fastface_lightning.data import other_files
    from fastface_lightning.files import printable, write_text
    from fastface_lightning.inference.matching import Gallery
    from fastface_lightning.report.matches import Match

    entry_names, entries, enrolled, entry_units = embedded(cfg, embedder, "gallery")
    names, queries, sought, units = embedded(cfg, embedder, "query")
    gallery = Gallery(entry_units, [person_of(entry_names[i]) for i in enrolled])
    people, cosines = (column.tolist() for column in gallery.search(units))
    nearest = [gallery.people[person] for person in people]
    known = [cosine >= threshold.cosine for cosine in cosines]
    table = [("image", "person", "cosine", "nearest", "left_out")]
    for row, i in enumerate(sought):
        person = nearest[row] if known[row] else ""
        table.append((names[i], person, f"{cosines[row]:.4f}", nearest[row], ""))
    left_out = sorted({*range(len(queries))} - {*sought})
    table += [(names[i], "", "", "", queries.why(i)) for i in left_out]
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerows([printable(field) for field in line] for line in table)
    folder = Path(HydraConfig.get().runtime.output_dir)
    write_text(folder / "matches.csv", text.getvalue())

    order = sorted(range(len(sought)), key=lambda row: abs(cosines[row] - threshold.cosine))
    matches = []
    for row in order[:SHOWN]:
        i, entry = sought[row], enrolled[gallery.nearest_entry(people[row], units[row])]
        both = printable(names[i]), printable(entry_names[entry])
        faces = queries[i][0].numpy(), entries[entry][0].numpy()
        decision = nearest[row] if known[row] else "unknown"
        matches.append(Match(both, faces, decision, cosines[row]))
    count, found = len(gallery.people), sum(known)
    title = f"{found:,} found, {len(known) - found:,} unknown"
    not_enrolled = {
        printable(entry_names[i]): entries.why(i)
        for i in sorted({*range(len(entries))} - {*enrolled})
    }
    facts = [
        ("enrolled", f"{count:,} people, {len(enrolled):,} images"),
        ("queries", f"{title}, {len(left_out):,} left out"),
    ]
    if not_enrolled:
        facts.append(("not enrolled", f"{len(not_enrolled):,} images, see verify.json"))
    if absent := sorted({person_of(name) for name in entry_names} - {*gallery.people}):
        facts.append(("without image", ", ".join(map(printable, absent))))
    if others := other_files(cfg.gallery) + other_files(cfg.query):
        kinds = ", ".join(f"{number:,} {kind}" for kind, number in others.most_common(5))
        facts.append(("not looked at", kinds))
    if len(order) > SHOWN:
        facts.append(("shown", f"the {SHOWN} nearest to the threshold"))
    if threshold.far is not None:
        share = 1 - (1 - threshold.far) ** count
        facts.append(("strangers", f"about {share:.1%} would be taken for somebody enrolled"))
    result = {"people": count, "enrolled": len(enrolled), "not_enrolled": not_enrolled}
    result |= {"found": found, "unknown": len(known) - found}
    leave(title, threshold, facts, matches, {**result, "left_out": len(left_out)})


def person_of(name: str) -> str:
    """Whom an enrolled image shows: by its folder, or its own name where it lies in none."""
    parts = Path(name).parts
    return parts[0] if len(parts) > 1 else Path(name).stem


def face_files(cfg: DictConfig, paths: list[str]) -> tuple[ImageFiles, str]:
    """The faces on images, aligned where the extra for it is there; and how that is done."""
    from fastface_lightning.data import FaceDetector, ImageFiles
    from fastface_lightning.data.photos import FaceFiles

    if cfg.aligned:
        return ImageFiles(paths), "aligned"
    try:
        detector = FaceDetector()
    except ModuleNotFoundError:
        detector = None
    return FaceFiles(paths, detector, cfg.min_face), f"{detector} {cfg.min_face}"


def embedded(
    cfg: DictConfig, embedder: Embedder, key: str
) -> tuple[list[str], ImageFiles, list[int], Tensor]:
    """The images in the folder ``key`` by name, as faces, the numbers of those that show one, and
    the unit embeddings of these."""
    import numpy as np
    import torch

    from fastface_lightning.data import find_images
    from fastface_lightning.inference.embedding_file import (
        embed_to_file,
        embedding_key,
        files_digest,
    )

    folder = Path(cfg[key])
    names = find_images(folder)
    files, how = face_files(cfg, [str(folder / name) for name in names])
    cache = Path(cfg.cache or HydraConfig.get().runtime.output_dir)
    stamp = embedding_key(embedder, files_digest(files.paths) + how)
    file = cache / f"{key}-{stamp}.npy"
    embeddings = embed_to_file(file, stamp, files, len(files), embedder, embedder, keep=True)
    shows = np.flatnonzero(~np.isnan(embeddings[:, 0]))
    if not len(shows):
        raise ValueError(f"an image must show a face, got none in {folder}: {files.why(0)}")
    return names, files, shows.tolist(), torch.from_numpy(embeddings[shows])


def leave(
    title: str,
    threshold: Threshold,
    facts: list[tuple[str, str]],
    matches: list[Match],
    result: dict[str, Any],
) -> None:
    """Print what came of it, and write it down."""
    from fastface_lightning.files import write_text
    from fastface_lightning.inference.matching import DEFAULT_FAR
    from fastface_lightning.report.matches import write_matches

    facts = [*facts, ("threshold", str(threshold))]
    if (threshold.far or 0) > 2 * DEFAULT_FAR:
        facts.append(
            (
                "caution",
                "strangers pass often; a lower far= needs a set of more pairs (docs/evaluation.md)",
            )
        )
    folder = Path(HydraConfig.get().runtime.output_dir)
    written = {**result, "threshold": threshold._asdict()}
    write_text(folder / "verify.json", json.dumps(written, indent=2) + "\n")
    write_matches(folder / "matches.html", title, facts, matches)
    for name, value in facts:
        print(f"  {name:14}{value}")
    print(f"  {'files':14}{folder}")


if __name__ == "__main__":
    main()
