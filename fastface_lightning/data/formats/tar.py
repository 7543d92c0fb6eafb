"""WebDataset's shards: plain tar files in which ``<key>.jpg`` stands beside ``<key>.cls``."""

import io
import shlex
import tarfile
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import IO, NamedTuple

from ...files import reason, replacing

_IMAGES, _CLASS = ("jpg", "jpeg", "png"), "cls"
_LONGEST_CLASS = 1024  # bytes


class Sample(NamedTuple):
    """An image in a shard.

    Attributes:
        name: the member's, as the shard has it.
        offset, size: where the image lies in the shard, bytes.
        identity: the text of its class, without blanks around it.
    """

    name: str
    offset: int
    size: int
    identity: str


def is_shard(file_name: str) -> bool:
    """Whether a file's name is that of a shard, or of a gzipped one; hidden files are none."""
    suffixes = (".tar", ".tar.gz", ".tgz")
    return file_name.lower().endswith(suffixes) and not file_name.startswith(".")


def read_shard(file: Path) -> tuple[list[Sample], list[str]]:
    """Find the images of a shard without reading them, in its order.

    A member's key is its name up to the first dot after the last slash. What follows says what it
    is: ``jpg``, ``jpeg`` or ``png``, in either case, an image; ``cls`` the name of its identity.
    Other members, hidden ones and folders are passed over.

    Returns:
        The samples, and a sentence for each key that makes none: the image or the class is absent,
        a link or a sparse file, or the class is empty, too long or not UTF-8.

    Raises:
        ValueError: the file is gzipped, cut short, damaged or no tar file, or a key has two images
            or two classes.
    """
    images: dict[str, tuple[str, int, int]] = {}
    classes: dict[str, str] = {}
    damaged: dict[str, str] = {}
    seen: set[tuple[str, bool]] = set()
    try:
        with file.open("rb") as opened:
            if opened.read(2) == b"\x1f\x8b":
                raise ValueError(
                    f"it is gzipped, and images are read in place: gunzip {shlex.quote(str(file))}"
                )
            opened.seek(0)
            with tarfile.open(fileobj=opened, mode="r:", errors="surrogateescape") as archive:
                while (member := archive.next()) is not None:
                    archive.members.clear()  # type: ignore[attr-defined]  # else it keeps them all
                    if member.size < 0:  # it would lead back, and so round in a circle
                        raise ValueError(f"{member.name} has a size of {member.size} bytes")
                    key, extension = _split(member.name)
                    if not key or extension not in (*_IMAGES, _CLASS) or member.isdir():
                        continue
                    if (key, extension == _CLASS) in seen:
                        raise ValueError(f"it holds {member.name} or another {key} twice")
                    seen.add((key, extension == _CLASS))
                    if not member.isreg() or member.issparse():
                        damaged[key] = "is a link or sparse"
                    elif extension == _CLASS:
                        try:
                            classes[key] = _identity(opened, member)
                        except ValueError as error:
                            damaged[key] = f"has a .cls that {error}"
                    else:
                        images[key] = member.name, member.offset_data, member.size
                end = archive.offset
            opened.seek(end)
            if opened.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise ValueError(f"it is cut short or damaged at byte {end}")
    except Exception as error:  # a hostile file makes tarfile overflow, recurse or ask for memory
        raise ValueError(f"cannot read shard {file}: {reason(error)}") from error
    for key in images.keys() ^ classes.keys():
        damaged.setdefault(key, "has no .cls" if key in images else "has no image")
    good = (key for key in images if key not in damaged)
    samples = [Sample(*images[key], classes[key]) for key in good]
    return samples, [f"{key} in {file} {why}" for key, why in sorted(damaged.items())]


def _split(name: str) -> tuple[str, str]:
    """Key and extension of a member; an empty key if it is hidden."""
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return stem and folder + slash + stem, extension.lower()


def _identity(opened: IO[bytes], member: tarfile.TarInfo) -> str:
    """The text of a class; ValueError says what is wrong with it."""
    if member.size > _LONGEST_CLASS:
        raise ValueError(f"must have at most {_LONGEST_CLASS} bytes, got {member.size}")
    opened.seek(member.offset_data)
    try:
        identity = opened.read(member.size).decode().strip()
    except UnicodeDecodeError as error:
        raise ValueError("is not UTF-8") from error
    if not identity:
        raise ValueError("is empty")
    return identity


def write_shards(
    target: Path,
    samples: Callable[[int], Iterable[tuple[bytes, str] | None]],
    images_per_shard: int = 10_000,
) -> None:
    """Write shards ``000000.tar`` and so on, each whole or not at all; those there are kept.

    Shard s holds the samples from number ``s * images_per_shard`` on, each under its number. The
    bytes depend on the samples alone, so a run that was interrupted ends as any other. One shard's
    images are held in memory.

    Args:
        target: folder of the shards.
        samples: ``samples(i)`` gives those from number i on: (JPEG, identity), or None for one that
            is left out, whose number stays unused.

    Raises:
        ValueError: an identity is no text that comes back.
    """
    shard = 0
    while (target / f"{shard:06d}.tar").exists():
        shard += 1
    remaining = iter(samples(shard * images_per_shard))
    while samples_of_shard := list(islice(remaining, images_per_shard)):
        with (
            replacing(target / f"{shard:06d}.tar") as part,
            tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as archive,
        ):
            for number, sample in enumerate(samples_of_shard, shard * images_per_shard):
                if sample is not None:
                    for suffix, content in (("jpg", sample[0]), (_CLASS, _encoded(sample[1]))):
                        member = tarfile.TarInfo(f"{number:08d}.{suffix}")  # no owner, time 0
                        member.size = len(content)
                        archive.addfile(member, io.BytesIO(content))
        shard += 1


def _encoded(identity: str) -> bytes:
    text = identity.encode(errors="replace")
    if text.decode().strip() != identity or not 0 < len(text) <= _LONGEST_CLASS:
        raise ValueError(
            f"an identity must be UTF-8 without blanks around it, of 1 to {_LONGEST_CLASS} bytes,"
            f" got {identity!r}"
        )
    return text
