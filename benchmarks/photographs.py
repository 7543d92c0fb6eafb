"""Photographs made of faces that are aligned already, so that it is known where the faces are."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastface_lightning.data import ARCFACE_POINTS


def frame(width: int, height: int) -> Image.Image:
    """An empty photograph."""
    return Image.new("RGB", (width, height), (90, 110, 130))


def paste(
    photo: Image.Image,
    face: NDArray[np.uint8],
    middle: tuple[float, float],
    scale: float,
    degrees: float = 0,
) -> NDArray[np.float64]:
    """Put an aligned face, (112, 112, 3), into a photograph.

    Returns:
        (2, 3), the matrix from the face's pixels to the photograph's.
    """
    turn = np.deg2rad(degrees)
    matrix = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    shift = np.array(middle) - matrix @ [55.5, 55.5]
    back = np.linalg.inv(matrix)
    start = -back @ shift - back @ [0.5, 0.5] + 0.5  # Pillow counts from a pixel's corner
    how = photo.size, Image.Transform.AFFINE, (*back[0], start[0], *back[1], start[1])
    image, mask = Image.fromarray(face), Image.new("L", (112, 112), 255)
    photo.paste(image.transform(*how, Image.Resampling.BICUBIC), (0, 0), mask.transform(*how))
    return np.column_stack([matrix, shift])


def landmarks(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """(5, 2): where a face that was pasted so has its landmarks, as far as alignment knows."""
    return ARCFACE_POINTS @ matrix[:, :2].T + matrix[:, 2]
