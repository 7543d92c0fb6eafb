"""A batch of faces is mirrored, cropped, coarsened and recoloured on the device it trains on.

Every image has its own parameters, and one that is not chosen has those that change nothing: so
the whole batch goes through the same few operations, and the host never waits to learn which
images were chosen. RandAugment's operations are too many for that: parts of a batch have theirs.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_SCALE = (0.2, 1.0)  # share of the area that a crop keeps
_RATIO = (3 / 4, 4 / 3)  # its width by its height
_TRIES = 10  # windows sampled until one fits: all miss once in a hundred million
_SIDE = (0.2, 1.0)  # share of the side that a coarse image has
_JITTER = 0.5  # factors lie in 1 -/+ this
_PARTS = 8  # of a batch, each with RandAugment's operations of its own


@dataclass(frozen=True)
class Augment:
    """Change some images of a batch, each kind of change with its own probability.

    Args:
        flip: probability in [0, 1] that an image is mirrored left to right.
        crop: that all but a random window of it is black; :func:`crop_some`.
        low_resolution: that it is made small and large again; :func:`coarsen_some`.
        photometric: that brightness, contrast and saturation change; :func:`recolor_some`.
        rand_augment: RandAugment's operations an image, at least 0; :func:`randomly_augmented`.

    The changes come in that order. Random numbers are those of torch's default generator on the
    images' device: one ``torch.rand`` a batch and kind, whose size depends on the batch's alone,
    and none for a kind of probability 0; RandAugment's are those of the host.

    References:
        FastFace (arXiv 2404.11118) flips only. The other three are AdaFace's (Kim, Jain and Liu,
        CVPR 2022, arXiv 2204.00964, and the released program), each with probability
        0.2 there.

    Example:
        >>> augment = Augment(crop=0.2, low_resolution=0.2, photometric=0.2)
        >>> augment(torch.zeros(8, 3, 112, 112, dtype=torch.uint8)).shape
        torch.Size([8, 3, 112, 112])

    Raises:
        ValueError: a probability lies outside [0, 1], or a negative number of operations.
    """

    flip: float = 0.5
    crop: float = 0.0
    low_resolution: float = 0.0
    photometric: float = 0.0
    rand_augment: int = 0

    def __post_init__(self) -> None:
        for name in ("flip", "crop", "low_resolution", "photometric"):
            p = getattr(self, name)
            if not 0 <= p <= 1:
                raise ValueError(f"{name} must be a probability in [0, 1], got {p}")
        ops = self.rand_augment
        if not isinstance(ops, int) or isinstance(ops, bool) or ops < 0:
            raise ValueError(f"rand_augment must be a number of operations, 0 or more, got {ops}")

    def __call__(self, images: Tensor) -> Tensor:
        """A changed copy of (N, 3, H, W) uint8 RGB images, on their device, in their layout.

        Raises:
            ValueError: the images have another type or shape.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            got = f"{images.dtype} {tuple(images.shape)}"
            raise ValueError(f"images must be uint8 (N, 3, H, W), got {got}")
        if self.flip:
            images = flip_some(images, self.flip)
        if self.crop:
            images = crop_some(images, self.crop)
        if self.low_resolution:
            images = coarsen_some(images, self.low_resolution)
        if self.photometric:
            images = recolor_some(images, self.photometric)
        if self.rand_augment:
            images = randomly_augmented(images, self.rand_augment)
        return images


def flip_some(images: Tensor, p: float = 0.5) -> Tensor:
    """Mirror each image (N, 3, H, W) left to right with probability p."""
    mirrored = torch.rand(len(images), 1, 1, 1, device=images.device) < p
    return torch.where(mirrored, images.flip(-1), images)


def crop_some(images: Tensor, p: float) -> Tensor:
    """Blacken, with probability p, all but a random window of each image (N, 3, H, W) uint8.

    The window is that of a random resized crop: a share of the area uniform in (0.2, 1), an aspect
    ratio log-uniform in (3/4, 4/3), a place uniform among those it fits. As in AdaFace it stays
    where it is and as large as it is, so the face keeps its alignment; nothing is resized.
    """
    height, width = images.shape[2:]
    sampled = torch.rand(3 + 2 * _TRIES, len(images), device=images.device)
    chosen, (y, x), (scale, aspect) = sampled[0] < p, sampled[1:3], sampled[3:].view(2, _TRIES, -1)
    area = height * width * _between(_SCALE, scale)
    ratio = _between((math.log(_RATIO[0]), math.log(_RATIO[1])), aspect).exp()
    tall, wide = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
    fits = (tall >= 1) & (tall <= height) & (wide >= 1) & (wide <= width)
    first = fits.int().argmax(0, keepdim=True)
    cropped = chosen & fits.any(0)
    tall = torch.where(cropped, tall.gather(0, first)[0], height)
    wide = torch.where(cropped, wide.gather(0, first)[0], width)
    top, left = (y * (height - tall + 1)).floor(), (x * (width - wide + 1)).floor()
    rows, columns = _interval(top, tall, height), _interval(left, wide, width)
    return images * (rows[:, None, :, None] & columns[:, None, None, :])


def coarsen_some(images: Tensor, p: float) -> Tensor:
    """Make each image (N, 3, H, W) uint8 small and large again, with probability p.

    The small side is int(ratio x side), at least 1, the ratio uniform in (0.2, 1). Each way has
    one of OpenCV's five interpolations, as AdaFace samples them, with equal odds; see
    :func:`resizing_matrix`. Shrinking is thus antialiased by the area rule alone. The small image
    is not rounded to bytes between.

    Resizing is linear and separable: with the product R of an enlarging and a shrinking matrix,
    a channel X becomes :math:`R_H X R_W^T`.
    """
    chosen, ratio, down, up = torch.rand(4, len(images), device=images.device)
    ratio = torch.where(chosen < p, _between(_SIDE, ratio), 1)
    down, up = ((kind * len(INTERPOLATIONS)).long() for kind in (down, up))
    # bfloat16's 8 bits would blur the pixels; the 11 of TF32, where allowed, err by a grey level.
    with torch.autocast(images.device.type, enabled=False):
        tall, wide = (_resizing(length, ratio, down, up) for length in images.shape[2:])
        return _to_bytes(tall[:, None] @ images.float() @ wide[:, None].mT, images)


def recolor_some(images: Tensor, p: float) -> Tensor:
    """Change brightness, contrast and saturation of each image (N, 3, H, W) with probability p.

    Each of the three is a blend f X + (1 - f) Y, clamped to [0, 255], with f uniform in
    (0.5, 1.5): Y is black for brightness, the mean grey of the image for contrast, each pixel's
    own grey for saturation, with grey = 0.299 R + 0.587 G + 0.114 B. Their order is random; the
    hue stays. Values are rounded once, at the end.
    """
    sampled = torch.rand(7, len(images), 1, 1, 1, device=images.device)
    chosen, order = sampled[0] < p, sampled[1:4].argsort(0)
    factors = torch.where(chosen, _between((1 - _JITTER, 1 + _JITTER), sampled[4:]), 1)
    pixels = images.float()
    for kind, f in zip(order, factors, strict=True):
        red, green, blue = pixels.split(1, dim=1)
        gray = 0.299 * red + 0.587 * green + 0.114 * blue
        gray = torch.where(kind == 1, gray.mean((2, 3), keepdim=True), gray)
        other = torch.where(kind == 0, 0, gray)
        pixels = (f * pixels + (1 - f) * other).clamp_(0, 255)
    return _to_bytes(pixels, images)


def randomly_augmented(images: Tensor, operations: int) -> Tensor:
    """RandAugment of images (N, 3, H, W) uint8, by torchvision: eight parts of the batch, each with
    its own random ``operations``.

    An operation is one of 14, with equal odds: identity, shear, translation and rotation (by
    nearest pixels, black outside), brightness, colour, contrast, sharpness, posterize, solarize,
    autocontrast and equalize, at torchvision's magnitude of 9 of 30.

    References:
        Cubuk et al., RandAugment, 2019 (arXiv 1909.13719).
    """
    from torchvision.transforms.v2 import RandAugment

    augment, augmented = RandAugment(operations), torch.empty_like(images)
    # bfloat16's 8 bits would move the pixels: positions are computed by a product of matrices.
    with torch.autocast(images.device.type, enabled=False):
        for part, to in zip(images.chunk(_PARTS), augmented.chunk(_PARTS), strict=True):
            to.copy_(augment(part))
    return augmented


def _between(bounds: tuple[float, float], sampled: Tensor) -> Tensor:
    return bounds[0] + (bounds[1] - bounds[0]) * sampled


def _interval(start: Tensor, length: Tensor, size: int) -> Tensor:
    """Which of the positions 0 ... size - 1 lie in each interval: (N, size) bool."""
    at = torch.arange(size, device=start.device)
    return (at >= start[:, None]) & (at < (start + length)[:, None])


def _to_bytes(pixels: Tensor, like: Tensor) -> Tensor:
    return torch.empty_like(like).copy_(pixels.round_().clamp_(0, 255))


def _smallest(length: int) -> int:
    """The smallest side that an image of this side is shrunk to."""
    return max(int(_SIDE[0] * length), 1)


def _resizing(length: int, ratio: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """To the small side and back: (N, L, L) float32 from ratios and kinds, (N,) each."""
    shrink, enlarge = resizing_tables(length, ratio.device)
    side = (ratio * length).long().clamp(_smallest(length), length) - _smallest(length)
    return enlarge[up, side] @ shrink[down, side]


def _linear(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.maximum(1 - np.abs(x), 0)


def _cubic(x: NDArray[np.float64], a: float = -0.75) -> NDArray[np.float64]:
    x = np.abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
    return np.where(x < 1, near, np.where(x < 2, far, 0))


def _lanczos(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.where(np.abs(x) < 4, np.sinc(x) * np.sinc(x / 4), 0)


INTERPOLATIONS = ("nearest", "area", "linear", "cubic", "lanczos")
_KERNELS = {"linear": _linear, "cubic": _cubic, "lanczos": _lanczos}  # of the distance in pixels


def resizing_matrix(kind: str, length: int, to: int) -> NDArray[np.float64]:
    """The matrix (to, length) that resizes a line of pixels, as OpenCV defines it.

    - ``nearest``: output pixel i is input pixel floor(i length / to).
    - ``area``: the mean over the input that the output pixel covers.
    - ``linear``, ``cubic`` (a = -0.75), ``lanczos`` (8 taps): the kernel between pixel centres,
      at the input's own scale (so without antialiasing), edges repeated, rows summing to 1.
    """
    step = length / to
    matrix = np.zeros((to, length))
    if kind == "nearest":
        matrix[np.arange(to), np.arange(to) * length // to] = 1
    elif kind == "area":
        start, pixel = np.arange(to)[:, None] * step, np.arange(length)
        overlap = np.minimum(start + step, pixel + 1) - np.maximum(start, pixel)
        matrix = np.maximum(overlap, 0) / step
    else:
        center = (np.arange(to)[:, None] + 0.5) * step - 0.5
        taps = np.floor(center) + np.arange(-3, 5)
        weights = _KERNELS[kind](center - taps)
        at = np.clip(taps, 0, length - 1).astype(int)
        np.add.at(matrix, (np.arange(to)[:, None], at), weights)
        matrix /= weights.sum(1, keepdims=True)
    return matrix


@lru_cache(maxsize=2)
def resizing_tables(length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """All matrices from ``length`` pixels to a smaller side, and all back.

    Returns:
        shrinking and enlarging, each (5, S, length, length) float32, by interpolation and by small
        side, from max(int(0.2 length), 1) to ``length``, which changes nothing. A small side's own
        rows, or columns, come first and zeros fill the rest. At 112 pixels the two take 46 MB.
    """
    first = _smallest(length)
    shape = len(INTERPOLATIONS), length - first + 1, length, length
    shrink, enlarge = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
    for k, kind in enumerate(INTERPOLATIONS):
        for side in range(first, length + 1):
            shrink[k, side - first, :side] = resizing_matrix(kind, length, side)
            enlarge[k, side - first, :, :side] = resizing_matrix(kind, side, length)
    return torch.from_numpy(shrink).to(device), torch.from_numpy(enlarge).to(device)
