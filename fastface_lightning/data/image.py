"""An image file becomes a uint8 RGB tensor, whatever the file's own mode, depth and size."""

import os
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# Only these decoders may see a file: others (EPS, for one) run far more than a decoder.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")


def decode_image(source: str | os.PathLike[str] | BinaryIO, size: int = 112) -> Tensor:
    """Decode one image and bring it to a square of ``size`` pixels.

    EXIF orientation is applied; grey, CMYK, palette and 16-bit images become 8-bit RGB, and
    transparency is dropped. An image of another size is resized (bilinear, antialiased) without
    keeping its aspect ratio, since aligned faces are square.

    Args:
        source: path of a JPEG, PNG, WebP or BMP file, or the file itself, opened for bytes.
        size: height and width of the result, pixels.

    Returns:
        (3, size, size) uint8, RGB in [0, 255], contiguous.

    Raises:
        ValueError: the file is absent, truncated, not such an image, or larger than Pillow's
            limit against decompression bombs.
    """
    try:
        with Image.open(source, formats=_FORMATS) as image:
            ImageOps.exif_transpose(image, in_place=True)
            rgb = _to_rgb(image)
            if rgb.size != (size, size):
                rgb = rgb.resize((size, size), Image.Resampling.BILINEAR)
            return torch.from_numpy(np.asarray(rgb).transpose(2, 0, 1).copy())
    except Exception as error:  # which of a dozen types a broken file raises is up to its decoder
        raise ValueError(f"cannot read image {source}: {_reason(error)}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow would clip instead of scale
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode == "P":
        image = image.convert("RGBA")  # Pillow warns about transparent palettes otherwise
    return image.convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__
