"""Photographs made up of synthetic faces at known places."""

import numpy as np
from numpy.typing import NDArray
from photographs import frame, landmarks, paste
from PIL import Image

from fastface_lightning.data.datasets.synthetic_faces import draw_face

__all__ = ["FOUND", "frame", "place"]
# Synthetic people whom a detector of real faces takes for such.
FOUND = (2, 3, 7, 0, 1, 6, 9, 10, 11, 13, 18, 21, 22, 23, 24, 25, 26, 29, 31, 32)


def place(
    photo: Image.Image,
    person: int,
    middle: tuple[float, float],
    scale: float,
    degrees: float = 0,
    image: int = 0,
) -> NDArray[np.float64]:
    """Put a synthetic face into a photograph; returns its landmarks, (5, 2)."""
    face = draw_face(1, person, image).transpose(1, 2, 0)
    return landmarks(paste(photo, face, middle, scale, degrees))
