"""What took long to find out about a data set is kept beside it, and trusted while it is true."""

import hashlib
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ...files import file_stamp, printable, replacing

logger = logging.getLogger(__name__)

Arrays = dict[str, NDArray[Any]]
SUFFIX = ".index"
FORMAT = "fastface_lightning 2"


def cached(
    source: Path,
    build: Callable[[], Arrays],
    fresh: Callable[[Arrays], bool],
    rebuild: bool = False,
) -> Arrays:
    """Arrays that describe ``source``, from their file if that is fresh, else built and kept.

    The file is ``<source>.index`` beside it or, where that cannot be written, one in
    ``$XDG_CACHE_HOME/fastface_lightning``. Where neither can be, warnings say why, and the arrays
    are built anew at the next start. Nothing half-written ever has the file's name.

    Args:
        source: file or folder that the arrays describe.
        build: makes the arrays.
        fresh: whether the arrays of a file still describe ``source``.
        rebuild: build them whatever the file holds.

    Returns:
        The arrays; those of a file are memory-mapped, not read.
    """
    places = _places(source)
    for place in places if not rebuild else ():
        kept = _load(place)
        with suppress(KeyError):  # arrays that describe a data set of another kind
            if kept is not None and fresh(kept):
                return kept
    arrays = build()
    for place in places:
        try:
            with replacing(place) as part:
                save_file(arrays, part, metadata={"format": FORMAT})
                part.chmod(0o644)  # safetensors writes for the owner's eyes alone
        except (OSError, SafetensorError) as error:
            what = printable(f"{source} as {place}: {error}")
            logger.warning("cannot keep the index of %s", what)
        else:
            return _load(place) or arrays
    return arrays


def cached_while(
    files: Sequence[Path], source: Path, build: Callable[[], Arrays], rebuild: bool = False
) -> Arrays:
    """What :func:`cached` returns, fresh while none of the files is rewritten, added or gone."""
    stamp = np.array(file_stamp(*files), np.int64)
    return cached(
        source,
        lambda: {**build(), "stamp": stamp},
        lambda kept: np.array_equal(kept["stamp"], stamp),
        rebuild,
    )


def _places(source: Path) -> list[Path]:
    source = source.resolve()
    home = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    digest = hashlib.sha256(os.fsencode(source)).hexdigest()[:16]
    name = f"{printable(source.name)}-{digest}{SUFFIX}"
    places = [source.with_name(source.name + SUFFIX), home / "fastface_lightning" / name]
    # safetensors opens no file whose path is not UTF-8.
    return [place for place in places if printable(str(place)) == str(place)]


def _load(file: Path) -> Arrays | None:
    """The arrays in a file; None if there is no such file, or it is damaged or of another kind."""
    try:
        with safe_open(file, framework="pt") as opened:  # torch's are maps, numpy's are copies
            if (opened.metadata() or {}).get("format") != FORMAT:
                return None
            return {name: opened.get_tensor(name).numpy() for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError):
        return None
