"""Embed all images in a folder: ``python recipes/embed.py --help``."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from fastface_lightning.cli import check_numbers, program

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

CONF = Path(__file__).resolve().parents[1] / "conf"


@program(config_path=CONF, config_name="embed")
def main(cfg: DictConfig) -> int:
    """Write the embeddings and the list, leave embed.json; returns the number of bad images."""
    root, target = Path(cfg.images), Path(cfg.target)
    if target.suffix != ".npy":
        raise ValueError(f"target must be FILE.npy, got {target}")
    listed = target.with_suffix(".txt")
    if cfg.landmarks is not None and listed.resolve() == Path(cfg.landmarks).resolve():
        raise ValueError(f"target must have another name, its list would replace {cfg.landmarks}")
    check_numbers(cfg, {"batch_size": 1, "num_workers": 0})

    import numpy as np

    from fastface_lightning.data import ImageFiles, find_images
    from fastface_lightning.data.formats.names import write_names
    from fastface_lightning.inference.embedder import load_embedder
    from fastface_lightning.inference.embedding_file import (
        embed_to_file,
        embedding_key,
        files_digest,
    )

    embedder = load_embedder(
        cfg.checkpoint,
        cfg.network,
        cfg.device,
        mirror=cfg.mirror,
        batch_size=cfg.batch_size,
        range=cfg.range,
        channels=cfg.channels,
        precision=cfg.precision,
    )
    names = find_images(root)
    points = None if cfg.landmarks is None else landmarks_of(names, cfg.landmarks)
    files = ImageFiles([str(root / name) for name in names], points)
    key = embedding_key(embedder, files_digest(files.paths, *[] if points is None else [points]))
    rows = embed_to_file(target, key, files, len(files), embedder, embedder, cfg.num_workers)
    write_names(listed, names)
    bad = [files.why(int(i)) for i in np.flatnonzero(np.isnan(rows[:, 0]))]
    folder = Path(HydraConfig.get().runtime.output_dir)
    written = {"target": str(target), "images": len(names), "bad": bad, "model": embedder.about}
    (folder / "embed.json").write_text(json.dumps(written, indent=2) + "\n")
    print(f"{target}: {rows.shape[0]:,} embeddings of {rows.shape[1]}")
    for line in bad[:20]:
        print(f"  {line}")
    if bad:
        print(f"{len(bad):,} images could not be read; their rows are NaN, see embed.json")
    return len(bad)


def landmarks_of(names: Sequence[str], file: str) -> NDArray[np.float64]:
    """(n, 5, 2) landmarks of the images of these names; NaN of those that the list lacks."""
    import numpy as np

    from fastface_lightning.data import read_landmarks

    listed: dict[str, NDArray[np.float64]] = {}
    for face in read_landmarks(file):
        if face.name in listed:
            raise ValueError(f"landmarks must list an image once, got {face.name} twice in {file}")
        listed[face.name] = face.points
    if not any(name in listed for name in names):
        raise ValueError(f"landmarks must list the images, got none of {names[0]} in {file}")
    return np.stack([listed.get(name, np.full((5, 2), np.nan)) for name in names])


if __name__ == "__main__":
    main()
