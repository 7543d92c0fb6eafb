"""A file has its name only when all of it is there, and names and errors fit on one line."""

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_UNPRINTABLE = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
METADATA_KEY = "fastface_lightning"  # in a model file: JSON of what is known of the model


@contextmanager
def replacing(file: Path) -> Iterator[Path]:
    """A new file to write beside ``file``, which takes its place once the block has ended well.

    Args:
        file: the name it shall have; one that is there stays until it is replaced. Its folder is
            made.

    Yields:
        Path with the suffix of ``file`` and a name that no other process uses; after an exception
        nothing is left of it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.stem[:40]}.{secrets.token_hex(4)}.part{file.suffix}")
    try:
        yield part
        os.replace(part, file)
    finally:
        part.unlink(missing_ok=True)


def write_text(file: Path, text: str) -> None:
    """Write a UTF-8 text file whole or not at all."""
    with replacing(file) as part:
        part.write_text(text, encoding="utf-8")


def file_stamp(*files: str | Path) -> list[int]:
    """What differs when one of the files is rewritten: of each its size in bytes and its time of
    change in nanoseconds, zeros where it cannot be seen."""
    stamp = []
    for file in files:
        try:
            status = os.stat(file)
        except OSError:
            stamp += [0, 0]
        else:
            stamp += [status.st_size, status.st_mtime_ns]
    return stamp


def printable(name: str) -> str:
    """A name that any stream takes, on one line: the file system's undecodable bytes, line breaks
    and other control characters are written as escapes."""
    return _UNPRINTABLE.sub(lambda found: ascii(found[0])[1:-1], name)


def reason(error: Exception) -> str:
    """Why a file cannot be read, in the words of the system or the decoder."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
