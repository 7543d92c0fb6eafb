"""Five landmarks take a face to the place in its 112x112 crop where every other face has it.

:class:`FaceDetector` finds them. So do others: `insightface`'s ``FaceAnalysis(...).get(image)``
gives faces whose ``kps`` are the five points in this order (its code is MIT's, its models are for
research only), `uniface` the same as ``landmarks``. Both want BGR images, as OpenCV reads them.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

# Where ArcFace's alignment puts eyes, nose and corners of the mouth, those on the image's left
# first: (x, y) in pixels of a 112 x 112 crop, (0, 0) being the centre of its first pixel.
ARCFACE_POINTS = np.array(
    [
        [38.2946, 51.6963],
        [73.5318, 51.5014],
        [56.0252, 71.7366],
        [41.5493, 92.3655],
        [70.7299, 92.2041],
    ]
)


class Landmarks(NamedTuple):
    """One face's landmarks in a list.

    Attributes:
        name: its image, as the list names it.
        points: (5, 2) float64, x and y in pixels of that image, in the order of ``ARCFACE_POINTS``.
        score: how sure the detector was of the face; None if the list does not say.
    """

    name: str
    points: NDArray[np.float64]
    score: float | None


def similarity_transform(points: ArrayLike, size: int = 112) -> NDArray[np.float64]:
    r"""The similarity that takes five landmarks nearest to ArcFace's, in the sense of

    .. math:: \min_{s, R, t} \sum_{k=1}^{5} \lVert q_k - (s R p_k + t) \rVert^2,

    with landmarks :math:`p_k`, template points :math:`q_k`, a scale s > 0, a rotation R and a
    shift t. In the plane, with p and q as complex numbers less their means, the best
    :math:`s R` is multiplication by :math:`\sum \bar p_k q_k / \sum |p_k|^2`, which cannot mirror.

    Args:
        points: (5, 2) or (N, 5, 2), x and y in pixels, in the order of ``ARCFACE_POINTS``.
        size: side of the crop, pixels. The template is multiplied by size / 112, as InsightFace
            does for the multiples of 112.

    Returns:
        (2, 3) or (N, 2, 3) float64, [sR | t]: ``matrix @ (x, y, 1)`` is the point's place in the
        crop, as ``cv2.warpAffine`` takes it.

    Raises:
        ValueError: ``size`` is below 1, or the points of a face are not five finite ones, lie in
            one place, or shrink to one under the best similarity.

    References:
        Umeyama, Least-squares estimation of transformation parameters between two point patterns,
        IEEE TPAMI 1991, of which this is the planar case without reflections.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    source = np.asarray(points, np.float64)
    if source.ndim not in (2, 3) or source.shape[-2:] != (5, 2):
        raise ValueError(f"landmarks must be (5, 2) or (N, 5, 2), got {source.shape}")
    # Below 1e9, far beyond any image, no square overflows.
    _require(np.abs(source).max((-2, -1)) < 1e9, "landmarks must be finite", source)
    p, q = source @ [1, 1j], ARCFACE_POINTS * (size / 112) @ [1, 1j]
    p_mean = p.mean(-1, keepdims=True)
    spread = (np.abs(p - p_mean) ** 2).sum(-1)
    _require(spread > 1e-6, "landmarks must lie apart", source)
    turn = ((p - p_mean).conj() * (q - q.mean())).sum(-1) / spread
    _require(np.abs(turn) ** 2 * spread > 1e-6, "landmarks must resemble a face's", source)
    shift = q.mean() - turn * p_mean[..., 0]
    rows = [[turn.real, -turn.imag, shift.real], [turn.imag, turn.real, shift.imag]]
    return np.moveaxis(np.array(rows), (0, 1), (-2, -1))


def align_face(image: NDArray[np.uint8], points: ArrayLike, size: int = 112) -> NDArray[np.uint8]:
    """Crop a face so that its landmarks lie where ArcFace's do: bilinear, black outside.

    Each pixel of the crop looks up its place between four pixels of the image, as
    ``cv2.warpAffine`` does, and like it without antialiasing: a large face is sampled, not
    averaged, which is what the field's models are trained and tested on.

    Args:
        image: (H, W, 3) uint8 RGB.
        points: (5, 2), the landmarks in it, (0, 0) being the centre of its first pixel; see
            :func:`similarity_transform`.
        size: side of the crop, pixels.

    Returns:
        (size, size, 3) uint8 RGB.

    Raises:
        ValueError: ``image`` is no such array; see :func:`similarity_transform` for the rest.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image must be (H, W, 3) uint8, got {image.dtype} {image.shape}")
    if np.shape(points) != (5, 2):
        raise ValueError(f"landmarks of one face must be (5, 2), got {np.shape(points)}")
    matrix = similarity_transform(points, size)
    turn = np.linalg.inv(matrix[:, :2])  # from the crop to the image, which is what Pillow wants
    start = -turn @ matrix[:, 2]
    corners = np.array([(0, 0), (0, 1), (1, 0), (1, 1)]) * (size - 1)
    frame = np.array(image.shape[1::-1])
    sought = corners @ turn.T + start
    low = np.floor(sought.min(0)).clip(0, frame).astype(np.int64)
    high = (np.floor(sought.max(0)) + 2).clip(0, frame).astype(np.int64)
    # What of the image is needed, framed in zeros: Pillow then fades to black over the last pixel
    # as OpenCV does, where it would otherwise repeat half of it.
    part = np.pad(image[low[1] : high[1], low[0] : high[0]], ((1, 1), (1, 1), (0, 0)))
    # Pillow puts (0, 0) at the corner of a first pixel, half a pixel from its centre.
    start = start - (low - 1) - turn @ [0.5, 0.5] + 0.5
    back = (*turn[0], start[0], *turn[1], start[1])
    kind, filter = Image.Transform.AFFINE, Image.Resampling.BILINEAR
    # In floats, since of bytes Pillow cuts fractions off, which darkens by half a grey level.
    crop = [
        np.asarray(Image.fromarray(channel).transform((size, size), kind, back, filter))
        for channel in part.astype(np.float32).transpose(2, 0, 1)
    ]
    return np.stack(crop, axis=-1).round().astype(np.uint8)


def _require(good: NDArray[np.bool_], rule: str, points: NDArray[np.float64]) -> None:
    """Name the rule and the first face whose landmarks break it; NaN breaks any."""
    if not good.all():
        raise ValueError(f"{rule}, got {points[~good].reshape(-1, 5, 2)[0].tolist()}")


def read_landmarks(file: str | Path) -> Iterator[Landmarks]:
    """Landmarks in a list, one line after the other, however long the list.

    A line is one of, with blanks or tabs between the fields (tabs if a name holds blanks):

    - ``name x1 y1 … x5 y5``, and a detector's score after it or not, as in IJB's meta files;
    - InsightFace's ``aligned path label``, four numbers of a box, ``x1 … x5 y1 … y5``, where
      aligned is 0: an image that is aligned already has no use for landmarks.

    Raises:
        ValueError: there is no such file, or a line is neither.
    """
    if not Path(file).is_file():
        raise ValueError(f"no list of landmarks {file}")
    with open(file, encoding="utf-8-sig", errors="surrogateescape") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield _parse(line.strip())
                except ValueError as error:
                    raise ValueError(f"{file}:{number}: {error}") from error


def _parse(line: str) -> Landmarks:
    fields = line.split("\t")
    if len(fields) not in (11, 12, 17):
        fields = line.split()
    if len(fields) == 17:
        if fields[0] != "0":
            raise ValueError(f"aligned must be 0, got {fields[0]!r}")
        return Landmarks(fields[1], _finite(fields[7:]).reshape(2, 5).T, None)
    if len(fields) in (11, 12):
        numbers = _finite(fields[1:])
        score = float(numbers[10]) if len(numbers) == 11 else None
        return Landmarks(fields[0], numbers[:10].reshape(5, 2), score)
    raise ValueError(f"expected 'name x1 y1 … x5 y5', got {line[:80]!r}")


def _finite(fields: list[str]) -> NDArray[np.float64]:
    try:
        numbers = np.array([float(field) for field in fields])
    except ValueError:
        numbers = np.array([np.nan])
    if not np.isfinite(numbers).all():
        raise ValueError(f"landmarks and scores must be finite, got {' '.join(fields)[:80]}")
    return numbers
