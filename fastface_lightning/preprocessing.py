"""What every network takes: aligned faces, RGB 112x112, as floats in [-1, 1]."""

from torch import Tensor

IMAGE_SHAPE = (3, 112, 112)


def normalise(images: Tensor) -> Tensor:
    """Images uint8 (N, 3, H, W) in [0, 255] as float32 in [-1, 1]."""
    # Decoders write (N, H, W, 3); a network whose weights are not so ordered would turn to it.
    return images.contiguous().float().div_(127.5).sub_(1)
