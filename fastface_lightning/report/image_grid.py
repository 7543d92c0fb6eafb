"""One picture shows whether a data set's faces are aligned, in RGB, and labelled right."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .figures import readable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CELL = 112  # pixels of the picture that a face is wide
MARGIN = 16
MEAN = 336  # pixels of the picture that the mean face is wide
SWAPPED = 4  # faces shown with red and blue swapped
WIDTH = 2 * MARGIN + 168 + 6 * (CELL + 14)


def plot_faces(
    path: str | Path,
    images: Sequence[ArrayLike],
    labels: Sequence[int],
    names: Sequence[str],
    title: str,
    points: ArrayLike,
) -> None:
    """Draw faces in one row an identity, under their mean and a sample with red and blue swapped.

    Args:
        path: image file to write.
        images: N of (3, S, S) uint8, RGB in [0, 255], all of one size.
        labels: N integers; rows for each that occurs, in order of first occurrence.
        names: N names, of each image's identity; any string. A row lists all names in it.
        title: what the data set is and how much it holds.
        points: (5, 2), x and y of the eyes, the nose and the corners of the mouth in an aligned
            face that is 112 pixels wide.

    Raises:
        ValueError: no image, unequal numbers of images, labels and names, or an image of another
            type or shape.
    """
    faces = pixels_of(images)
    check_counts("images, labels and names", images, labels, names)
    points = np.asarray(points, float)
    rows: dict[int, list[int]] = {}
    for i, label in enumerate(labels):
        rows.setdefault(int(label), []).append(i)
    axis = blank()
    y = write(axis, readable(title, 300), MARGIN, MARGIN, WIDTH - 2 * MARGIN, 20, "black")
    shown = f"Shown here: {len(faces)} images of {len(rows)} identities, {faces.shape[1]} pixels"
    top = write(axis, f"{shown} wide.", MARGIN, y + 4, WIDTH) + 12

    y = write(axis, "1  Aligned?  Mean of the faces below", MARGIN, top, MEAN, 16, "black") + 4
    show(axis, faces.mean(0).round().astype(np.uint8), MARGIN, y, MEAN)
    marks: Any = {"marker": "o", "s": 420, "facecolors": "none", "zorder": 4}
    x_marks, y_marks = ((points + 0.5) * MEAN / 112).T
    for color, width in (("black", 3), ("white", 1)):
        axis.scatter(MARGIN + x_marks, y + y_marks, edgecolors=color, linewidths=width, **marks)
    note = (
        "Eyes, nose and the corners of the mouth must lie within the circles. Blur without features"
        " means faces at different places; a sharp face beside the circles another alignment."
    )
    end = write(axis, note, MARGIN, y + MEAN + 4, MEAN)

    x, width = MARGIN + MEAN + 28, WIDTH - MEAN - 28 - 2 * MARGIN
    y = write(axis, "2  Red, green, blue?", x, top, width, 16, "black")
    sample = faces[[row[0] for row in rows.values()][:SWAPPED]]
    for heading, step in (
        ("As given: skin must look natural.", 1),
        ("Red and blue swapped: skin must look blue.", -1),
    ):
        y = write(axis, heading, x, y + 6, width) + 3
        for k, face in enumerate(sample):
            show(axis, face[..., ::step], x + k * (CELL + 8), y)
        y += CELL
    note = (
        "If the lower row looks natural, the channels are swapped: BGR where RGB is due. If both"
        " look alike, the images are gray."
    )
    y = max(end, write(axis, note, x, y + 4, width)) + 20

    heading = "3  Labels?  Every row must show one person and nobody else"
    y = write(axis, heading, MARGIN, y, WIDTH, 16, "black") + 3
    ticks = "Red ticks beside a face: the height at which its eyes must lie."
    y = write(axis, ticks, MARGIN, y, WIDTH) + 8
    for label, row in rows.items():
        name = readable(", ".join(dict.fromkeys(str(names[i]) for i in row)))
        write(axis, f"label {label}", MARGIN, y, 160, 15, "black")
        write(axis, name, MARGIN, y + 20, 160, lines=4)
        for k, i in enumerate(row):
            x, face_y = MARGIN + 175 + k % 6 * (CELL + 14), y + k // 6 * (CELL + 14)
            show(axis, faces[i], x, face_y)
            eyes = face_y + (points[:2, 1].mean() + 0.5) * CELL / 112
            axis.hlines([eyes, eyes], [x - 6, x + CELL + 2], [x - 2, x + CELL + 6], "tab:red")
        y += -(-len(row) // 6) * (CELL + 14)
    save(axis, path, WIDTH, y + MARGIN)


def plot_pairs(
    path: str | Path,
    pairs: Sequence[ArrayLike],
    same: Sequence[bool],
    captions: Sequence[str],
    title: str = "",
) -> None:
    """Draw pairs of faces, four in a row, those of one person above those of two.

    Args:
        path: image file to write.
        pairs: N of (2, 3, S, S) uint8, RGB in [0, 255], all of one size.
        same: N, whether each shows one person.
        captions: N, a line below each.
        title: of the picture.

    Raises:
        ValueError: unequal numbers of pairs, truths and captions, or an image of another type.
    """
    faces = pixels_of([face for pair in pairs for face in np.asarray(pair)])
    check_counts("image pairs, truths and captions", pairs, same, captions)
    axis, pair_width = blank(), 2 * CELL + 16
    y = write(axis, readable(title, 300), MARGIN, MARGIN, 4 * pair_width, 18, "black")
    for truth, heading in ((True, "One person"), (False, "Two people")):
        chosen = [i for i in range(len(pairs)) if bool(same[i]) == truth]
        if chosen:
            y = write(axis, heading, MARGIN, y + 8, 4 * pair_width, 16, "black") + 4
        for k, i in enumerate(chosen):
            x, face_y = MARGIN + k % 4 * pair_width, y + k // 4 * (CELL + 30)
            show(axis, faces[2 * i], x, face_y)
            show(axis, faces[2 * i + 1], x + CELL + 2, face_y)
            write(axis, readable(captions[i]), x, face_y + CELL + 2, 2 * CELL, lines=1)
        y += -(-len(chosen) // 4) * (CELL + 30)
    save(axis, path, 2 * MARGIN + 4 * pair_width - 14, y + MARGIN)


def plot_captioned(
    path: str | Path, images: Sequence[ArrayLike], captions: Sequence[str], title: str = ""
) -> None:
    """Draw images with a caption below each, six in a row.

    Args:
        path: image file to write.
        images: N of (3, S, S) uint8, RGB in [0, 255], all of one size.
        captions: N, three lines below each.
        title: of the picture.

    Raises:
        ValueError: unequal numbers of images and captions, or an image of another type.
    """
    pixels = pixels_of(images)
    check_counts("images and captions", images, captions)
    axis, wide = blank(), CELL + 56
    y = write(axis, readable(title, 300), MARGIN, MARGIN, 6 * wide, 18, "black") + 8
    for k, image in enumerate(pixels):
        x, image_y = MARGIN + k % 6 * wide, y + k // 6 * (CELL + 64)
        show(axis, image, x, image_y)
        write(axis, readable(captions[k], 120), x, image_y + CELL + 2, wide - 28, lines=3)
    save(axis, path, 2 * MARGIN + 6 * wide, y + -(-len(pixels) // 6) * (CELL + 64) + MARGIN)


def check_counts(what: str, *values: Sequence[Any]) -> None:
    """Refuse sequences of different lengths."""
    counts = [len(each) for each in values]
    if len(set(counts)) > 1:
        raise ValueError(f"{what} must be equally many, got {', '.join(map(str, counts))}")


def pixels_of(images: Sequence[ArrayLike]) -> NDArray[np.uint8]:
    """(N, S, S, 3) of N images (3, S, S) uint8."""
    if not len(images):
        raise ValueError("an image grid must show at least 1 image, got 0")
    arrays = [np.asarray(image) for image in images]
    size = arrays[0].shape[-1] if arrays[0].ndim else 0
    for array in arrays:
        if array.dtype != np.uint8 or array.shape != (3, size, size) or not size:
            raise ValueError(
                f"images must be uint8 (3, S, S) of one size, got {array.dtype} {array.shape}"
            )
    return np.stack(arrays).transpose(0, 2, 3, 1)


def blank() -> Axes:
    """An axis over a whole figure, in which x and y are pixels from the top left."""
    from matplotlib.figure import Figure

    axis = Figure().add_axes((0, 0, 1, 1))
    axis.axis("off")
    return axis


def show(axis: Axes, face: NDArray[np.uint8], x: float, y: float, width: int = CELL) -> None:
    """Place a face, (S, S, 3), over all text."""
    axis.imshow(face, extent=(x, x + width, y + width, y), aspect="auto", zorder=3)


def write(
    axis: Axes,
    text: str,
    x: float,
    y: float,
    width: float,
    size: int = 13,
    color: str = "0.4",
    lines: int | None = None,
) -> float:
    """Place a paragraph, about ``width`` wide; returns the y below it."""
    font: Any = {"family": "DejaVu Sans", "size": 0.72 * size, "color": color}
    for line in textwrap.wrap(text, int(1.8 * width / size), max_lines=lines, placeholder=" …"):
        axis.text(x, y, line, va="top", **font)
        y += 1.3 * size
    return y


def save(axis: Axes, path: str | Path, width: float, height: float) -> None:
    """Write the figure into an image file of that many pixels."""
    axis.set(xlim=(0, width), ylim=(height, 0))
    figure: Any = axis.figure
    figure.set_size_inches(width / 100, height / 100)
    figure.savefig(path, dpi=100)
