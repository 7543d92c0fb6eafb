"""One picture shows whether a data set's faces are aligned, in RGB, and labelled right."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..data.align import ARCFACE_POINTS
from ..data.datasets.base import FaceDataset

Colour = tuple[int, int, int]
_PAPER: Colour = (255, 255, 255)
_INK: Colour = (20, 20, 20)
_FAINT: Colour = (100, 100, 100)
_TICK: Colour = (225, 40, 40)
_MEAN_SIDE = 336  # pixels, about
_CAPTION_WIDTH = 168
_MARGIN = 7  # around each face, where the ticks are
_SWAPPED = 4  # faces shown with red and blue swapped


def contact_sheet(
    images: Sequence[Tensor | NDArray[np.uint8]],
    labels: Sequence[int],
    names: Sequence[str],
    title: str = "",
    columns: int = 6,
) -> Image.Image:
    """Faces in one row an identity, under their mean and a sample with red and blue swapped.

    Args:
        images: N of (3, S, S) uint8, RGB in [0, 255], all of one size; shown pixel by pixel.
        labels: N integers; a row for each that occurs, in order of first occurrence.
        names: N names, of each image's identity. Any string will do: what cannot be shown is
            escaped as in Python, and what is too long is cut. A row lists all names in it.
        title: what the data set is and how much it holds.
        columns: faces side by side; more of one identity go on below.

    Returns:
        An RGB picture, 964 pixels wide for 6 columns of 112 pixels.

    Raises:
        ValueError: no image, unequal numbers of images, labels and names, an image of another type
            or shape, or no column.
    """
    faces = [_pixels(image) for image in images]
    if not faces:
        raise ValueError("a contact sheet must show at least 1 image, got 0")
    if not len(faces) == len(labels) == len(names):
        raise ValueError(
            "images, labels and names must be equally many,"
            f" got {len(faces)}, {len(labels)} and {len(names)}"
        )
    if len({face.shape for face in faces}) > 1:
        raise ValueError(f"images must have one shape, got {sorted({f.shape for f in faces})}")
    if columns < 1:
        raise ValueError(f"columns must be at least 1, got {columns}")
    rows: dict[int, list[int]] = {}
    for i, label in enumerate(labels):
        rows.setdefault(int(label), []).append(i)
    sample = [faces[row[0]] for row in rows.values()][:_SWAPPED]
    blocks = [_beside([_alignment(faces), _channels(sample)], 28)]
    blocks += _people(faces, names, rows, columns, blocks[0].width)
    width = max(block.width for block in blocks)
    size = faces[0].shape[1]
    shown = f"Shown here: {_count(len(faces), 'image')} of {_count(len(rows), 'identity')},"
    head = [
        _text(readable(title, 300) or "Contact sheet", width, 22),
        _text(f"{shown} {size} x {size} pixels each.", width, 14, _FAINT),
    ]
    return _framed(_below([*head, *blocks], 10), 16)


def pairs_sheet(
    pairs: Sequence[Tensor], same: Sequence[bool], captions: Sequence[str], title: str = ""
) -> Image.Image:
    """Pairs of faces side by side, those of one person above those of two.

    Args:
        pairs: N of (2, 3, S, S) uint8, RGB in [0, 255], all of one size.
        same: whether each shows one person.
        captions: a line below each.
        title: of the picture.

    Returns:
        An RGB picture, four pairs wide.

    Raises:
        ValueError: unequal numbers of pairs, truths and captions, or an image of another type.
    """
    if not len(pairs) == len(same) == len(captions):
        raise ValueError(
            "pairs, truths and captions must be equally many,"
            f" got {len(pairs)}, {len(same)} and {len(captions)}"
        )
    blocks = []
    for kind, heading in ((True, "One person"), (False, "Two people")):
        cells = []
        for pair, truth, caption in zip(pairs, same, captions, strict=True):
            if truth == kind:
                faces = _beside([_picture(_pixels(face)) for face in pair], 2)
                cells.append(_below([faces, _text(caption, faces.width, 13, _FAINT)], 2))
        rows = [_beside(cells[i : i + 4], 14) for i in range(0, len(cells), 4)]
        if rows:
            blocks += [_text(heading, max(row.width for row in rows), 16), *rows]
    width = max((block.width for block in blocks), default=400)
    return _framed(_below([_text(readable(title, 300), width, 18), *blocks], 10), 16)


def sheet_of(faces: FaceDataset) -> Image.Image:
    """A :func:`contact_sheet` of a few images of a few identities of a data set."""
    samples = [faces[i] for i in pick_images(faces.labels)]
    labels = [label for _, label in samples]
    title = f"{faces}: {len(faces):,} images of {faces.num_classes:,} identities"
    names = [faces.identities[label] for label in labels]
    return contact_sheet([image for image, _ in samples], labels, names, title)


def pick_images(labels: ArrayLike, identities: int = 10, images: int = 6) -> list[int]:
    """Indices of a few images of a few identities, evenly spread over a data set.

    Identities with one image say nothing about labels: they come only where there are too few
    others.

    Args:
        labels: (N,) integers from 0, each image's label.
        identities: how many at most.
        images: of each, how many at most.

    Returns:
        Indices into ``labels``, ascending by label, then by index.

    Raises:
        ValueError: either number is below 1.
    """
    if identities < 1 or images < 1:
        raise ValueError(f"identities and images must be at least 1, got {identities} and {images}")
    labels = np.asarray(labels, np.int64)
    counts = np.bincount(labels)
    several, single = np.flatnonzero(counts > 1), np.flatnonzero(counts == 1)
    taken = _spread(several, identities)
    taken = np.sort(np.concatenate([taken, _spread(single, identities - len(taken))]))
    return [int(i) for k in taken for i in _spread(np.flatnonzero(labels == k), images)]


def _spread(items: NDArray[Any], count: int) -> NDArray[Any]:
    """At most ``count`` items, evenly spaced from the first to the last."""
    count = min(count, len(items))
    return items[np.linspace(0, len(items) - 1, count).round().astype(int)] if count else items[:0]


def _pixels(image: Tensor | NDArray[np.uint8]) -> NDArray[np.uint8]:
    array = image.numpy(force=True) if isinstance(image, Tensor) else np.asarray(image)
    if array.dtype != np.uint8 or array.ndim != 3 or len(array) != 3 or not array.size:
        raise ValueError(f"images must be uint8 (3, S, S), got {array.dtype} {array.shape}")
    if array.shape[1] != array.shape[2]:
        raise ValueError(f"images must be square, got {array.shape[1]} x {array.shape[2]} pixels")
    return array


def _picture(face: NDArray[np.uint8]) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(face.transpose(1, 2, 0)))


def _alignment(faces: list[NDArray[np.uint8]]) -> Image.Image:
    mean = _mean_face(faces)
    note = (
        "Eyes, nose and the corners of the mouth must lie in the middle of the crosses. Blur"
        " without features means faces at different places; a sharp face off the crosses means"
        " another alignment than ArcFace's."
    )
    heading = _text("1  Aligned?  Mean of the faces below", mean.width, 16)
    return _below([heading, mean, _text(note, mean.width, 13, _FAINT)], 6)


def _mean_face(faces: list[NDArray[np.uint8]]) -> Image.Image:
    """The mean of all faces, enlarged, with crosses open at the five points."""
    total = np.zeros(faces[0].shape)
    for face in faces:
        total += face
    mean = _picture((total / len(faces)).round().astype(np.uint8))
    zoom = max(round(_MEAN_SIDE / mean.width), 1)
    large = mean.resize((mean.width * zoom, mean.width * zoom), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(large)
    for point in ARCFACE_POINTS:
        x, y = (round((c * mean.width / 112 + 0.5) * zoom - 0.5) for c in point)
        for dx, dy in ((1, 0), (-1, 0), (0, 1), (0, -1)):
            arm = (x + 6 * dx, y + 6 * dy, x + 16 * dx, y + 16 * dy)
            draw.line(arm, _INK, 3)
            draw.line(arm, _PAPER, 1)
    return large


def _channels(faces: list[NDArray[np.uint8]]) -> Image.Image:
    given = _beside([_picture(face) for face in faces], 8)
    swapped = _beside([_picture(face[::-1]) for face in faces], 8)
    width = max(given.width, _MEAN_SIDE)
    note = (
        "If the lower row looks natural, the channels are swapped: BGR where RGB is due. If both"
        " look alike, the images are grey."
    )
    return _below(
        [
            _text("2  Red, green, blue?", width, 16),
            _text("As given: skin must look natural.", width, 13, _FAINT),
            given,
            _text("Red and blue swapped: skin must look blue.", width, 13, _FAINT),
            swapped,
            _text(note, width, 13, _FAINT),
        ],
        6,
    )


def _people(
    faces: list[NDArray[np.uint8]],
    names: Sequence[str],
    rows: dict[int, list[int]],
    columns: int,
    width: int,
) -> list[Image.Image]:
    """A heading ``width`` pixels wide, and a row for each identity."""
    lines = []
    for label, row in rows.items():
        called = ", ".join(dict.fromkeys(str(names[i]) for i in row))
        caption = _below(
            [
                Image.new("RGB", (1, _MARGIN - 2), _PAPER),
                _text(f"label {label}", _CAPTION_WIDTH, 15),
                _text(readable(called), _CAPTION_WIDTH, 13, _FAINT, limit=4),
            ],
            2,
        )
        chunks = [row[i : i + columns] for i in range(0, len(row), columns)]
        grid = _below([_beside([_ticked(faces[i]) for i in c], 0) for c in chunks], 0)
        lines.append(_beside([caption, grid], 8))
    heading = _text("3  Labels?  Every row must show one person and nobody else", width, 16)
    note = "Red ticks beside a face: the height at which its eyes must lie."
    return [_below([heading, _text(note, width, 13, _FAINT)], 2), _below(lines, 0)]


def _ticked(face: NDArray[np.uint8]) -> Image.Image:
    """A face in its margin, with ticks at the height of the eyes."""
    framed = _framed(_picture(face), _MARGIN)
    draw = ImageDraw.Draw(framed)
    eyes = (ARCFACE_POINTS[0][1] + ARCFACE_POINTS[1][1]) / 2
    y = _MARGIN + round(eyes * face.shape[1] / 112)
    for x in (1, framed.width - _MARGIN + 1):
        draw.line((x, y, x + _MARGIN - 3, y), _TICK)
    return framed


def _count(number: int, noun: str) -> str:
    plural = noun[:-1] + "ies" if noun.endswith("y") else noun + "s"
    return f"{number} {noun if number == 1 else plural}"


def readable(name: str, limit: int = 100) -> str:
    """The first ``limit`` characters, escaped as Python does where the font has no shape for them.

    That is so for control characters, marks of writing direction, undecodable bytes of a file name
    (``\\udc..``), and scripts the font lacks.
    """
    shown = (
        c if c.isprintable() and _has_shape(c) else c.encode("unicode_escape").decode("ascii")
        for c in name[:limit]
    )
    return "".join(shown) + ("…" if len(name) > limit else "")


@lru_cache(maxsize=4096)
def _has_shape(character: str) -> bool:
    font = _font(13)
    # U+FFFF is no character and has no shape in any font.
    return bytes(font.getmask(character)) != bytes(font.getmask("\uffff"))


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.FreeTypeFont:
    """DejaVu Sans, which has Greek, Cyrillic and Arabic where Pillow's own font has not."""
    import matplotlib  # for its font alone, which not every system has

    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    return ImageFont.truetype(folder / "DejaVuSans.ttf", size)


def _text(
    text: str, width: int, size: int, colour: Colour = _INK, limit: int | None = None
) -> Image.Image:
    """A paragraph ``width`` pixels wide, of ``limit`` lines at most, on paper of its own."""
    font, height = _font(size), size + 4
    lines = _lines(text, width, font)
    if limit is not None and len(lines) > limit:
        lines = [*lines[: limit - 1], lines[limit - 1][:-3] + "…"]
    paper = Image.new("RGB", (width, height * len(lines)), _PAPER)
    draw = ImageDraw.Draw(paper)
    for i, line in enumerate(lines):
        draw.text((0, i * height + size), line, colour, font, anchor="ls")
    return paper


def _lines(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """Break at the last space that fits, or inside a word that alone is too long."""
    lines = []
    while font.getlength(text) > width:
        over = next(k for k in range(len(text) + 1) if font.getlength(text[:k]) > width)
        space = text.rfind(" ", 0, over)
        end = space if space > 0 else max(over - 1, 1)
        lines.append(text[:end])
        text = text[end:].lstrip()
    return [*lines, text]


def _framed(picture: Image.Image, margin: int) -> Image.Image:
    paper = Image.new("RGB", (picture.width + 2 * margin, picture.height + 2 * margin), _PAPER)
    paper.paste(picture, (margin, margin))
    return paper


def _beside(pictures: Sequence[Image.Image], gap: int) -> Image.Image:
    width = sum(p.width for p in pictures) + gap * (len(pictures) - 1)
    paper = Image.new("RGB", (width, max(p.height for p in pictures)), _PAPER)
    x = 0
    for picture in pictures:
        paper.paste(picture, (x, 0))
        x += picture.width + gap
    return paper


def _below(pictures: Sequence[Image.Image], gap: int) -> Image.Image:
    height = sum(p.height for p in pictures) + gap * (len(pictures) - 1)
    paper = Image.new("RGB", (max(p.width for p in pictures), height), _PAPER)
    y = 0
    for picture in pictures:
        paper.paste(picture, (0, y))
        y += picture.height + gap
    return paper
