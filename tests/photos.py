"""Photographs made up of synthetic faces, turned and scaled, at known places."""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastface_lightning.data import ARCFACE_POINTS
from fastface_lightning.data.datasets.synthetic_faces import draw_face

FOUND = (2, 3, 7)  # synthetic people whom a detector of real faces takes for such


def frame(width: int, height: int) -> Image.Image:
    return Image.new("RGB", (width, height), (90, 110, 130))


def place(
    photo: Image.Image, person: int, middle: tuple[float, float], scale: float, degrees: float = 0
) -> NDArray[np.float64]:
    """Put a face into a photograph, its middle there; returns its landmarks, (5, 2)."""
    face = Image.fromarray(draw_face(1, person, 0).transpose(1, 2, 0))
    turn = np.deg2rad(degrees)
    matrix = scale * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    shift = np.array(middle) - matrix @ [55.5, 55.5]
    back = np.linalg.inv(matrix)
    start = -back @ shift - back @ [0.5, 0.5] + 0.5  # Pillow counts from a pixel's corner
    how = (photo.size, Image.Transform.AFFINE, (*back[0], start[0], *back[1], start[1]))
    mask = Image.new("L", face.size, 255).transform(*how)
    photo.paste(face.transform(*how, Image.Resampling.BICUBIC), (0, 0), mask)
    return ARCFACE_POINTS @ matrix.T + shift
