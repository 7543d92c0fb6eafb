"""Embeddings of many images, written to a ``.npy`` that goes on where it was killed."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable
from io import BytesIO
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from ..files import file_stamp
from .embedder import Embedder


def files_digest(files: Iterable[str], *arrays: NDArray[Any]) -> str:
    """Differs where one of the arrays does, or a file's name, size or time of change."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(array.tobytes())
    for file in files:
        digest.update(f"{file} {file_stamp(file)}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def embedding_key(embedder: Embedder, digest: str) -> str:
    """What stands for an embedder and the images of a digest, 16 hexadecimal digits."""
    return hashlib.sha256((embedder.fingerprint + digest).encode()).hexdigest()[:16]


def embed_to_file(
    file: Path,
    key: str,
    images: Dataset[tuple[Tensor, bool]],
    count: int,
    embedder: Embedder,
    embed: Callable[[Tensor], Tensor],
    num_workers: int = 0,
    keep: bool = False,
) -> NDArray[np.float32]:
    """Embed images into ``file``, from where an earlier, killed call with this key came to.

    Until it is done the file is called ``<file>.<key>.part``, to which rows are appended.

    Args:
        file: a ``.npy`` of (count, D) float32; one that is there is replaced, unless ``keep``.
        key: see :func:`embedding_key`.
        images: item i is image i, (3, 112, 112) uint8, and whether it could be read; the row of one
            that could not is NaN.
        count: how many there are.
        embedder: gives the batch size and D.
        embed: ``embedder`` itself, or its ``features``.
        num_workers: processes that read images.
        keep: trust a ``file`` that is there, whose images of rows of NaN are tried again.

    Returns:
        The rows, memory-mapped; what is written to them stays in memory.

    Raises:
        ValueError: the model gives NaN or infinity for an image, or another process is writing.
    """
    if keep and file.exists():
        _try_again(file, images, embed)
        return np.load(file, mmap_mode="c")
    part = file.with_name(f"{file.name}.{key}.part")
    part.parent.mkdir(parents=True, exist_ok=True)
    shape, width = (count, embedder.embedding_size), 4 * embedder.embedding_size
    described = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer := BytesIO(), described)
    header = buffer.getvalue()
    with part.open("ab") as out:
        _claim(part, out)
        done = min(max(out.tell() - len(header), 0) // width, count)
        if done:
            out.truncate(len(header) + done * width)
        else:
            out.truncate(0)
            out.write(header)
        loader: DataLoader[Any] = DataLoader(
            Subset(images, range(done, count)),
            embedder.batch_size,
            num_workers=num_workers,
            pin_memory=embedder.device.type == "cuda",
        )
        with Progress(transient=True) as progress:
            task = progress.add_task("embedding", total=count, completed=done)
            for batch, readable in loader if done < count else ():
                out.write(_rows(embed, batch, readable).tobytes())
                progress.advance(task, len(batch))
    os.replace(part, file)
    return np.load(file, mmap_mode="c")


def _claim(part: Path, out: IO[bytes]) -> None:
    """Refuse a file to which another process writes, or just did."""
    import fcntl  # not there on Windows

    try:
        fcntl.flock(out, fcntl.LOCK_EX | fcntl.LOCK_NB)
        mine = os.path.samestat(os.fstat(out.fileno()), part.stat())
    except (BlockingIOError, FileNotFoundError):
        mine = False
    if not mine:
        raise ValueError(f"one process at a time must write {part}, got another at it")


def _rows(embed: Callable[[Tensor], Tensor], batch: Tensor, readable: Tensor) -> NDArray[Any]:
    rows = embed(batch)
    if not rows.isfinite().all():
        first = rows[~rows.isfinite()][0].item()
        raise ValueError(f"a model must give finite embeddings, got {first}: has it been trained?")
    rows[~readable] = torch.nan
    return rows.numpy()


def _try_again(
    file: Path, images: Dataset[tuple[Tensor, bool]], embed: Callable[[Tensor], Tensor]
) -> None:
    """Embed what could not be read when the file was written, and can now."""
    unread = np.flatnonzero(np.isnan(np.load(file, mmap_mode="r")[:, 0]))
    if not len(unread):  # which a file that may only be read is as good for
        return
    rows = np.load(file, mmap_mode="r+")
    for i in unread:
        image, readable = images[int(i)]
        if readable:
            rows[i] = _rows(embed, image[None], torch.tensor([True]))[0]
    rows.flush()
