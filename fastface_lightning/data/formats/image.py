"""An image file becomes uint8 RGB pixels, whatever the file's own format, mode, depth and size."""

import os
import re
import struct
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from ...files import reason

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# Only these decoders may see a file: others (EPS, for one) run far more than a decoder.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")

_segment = struct.Struct(">HH").unpack_from  # marker, length without the marker
_frame = struct.Struct(">BHHB").unpack_from  # bits a sample, height, width, components
_SOI, _SOS, _APP1 = 0xFFD8, 0xFFDA, 0xFFE1
_HUFFMAN_FRAMES = range(0xFFC0, 0xFFC3)  # baseline, extended and progressive
_HARMLESS = frozenset([0xFFC4, 0xFFDB, 0xFFDD, 0xFFFE, *range(0xFFE0, 0xFFF0)])  # tables, text
# Exif's orientation (tag 0x0112 in either byte order), unless it is one SHORT of value 1, and
# XMP's, by name.
_MAY_TURN = re.compile(
    rb"\x12\x01(?!\x03\0\x01\0\0\0\x01\0)|\x01\x12(?!\0\x03\0\0\0\x01\0\x01)|Orientation"
)


def decode_image(source: str | os.PathLike[str] | bytes | BinaryIO, size: int = 112) -> Tensor:
    """Decode one image and bring it to a square of ``size`` pixels: see :func:`decode_into`.

    Args:
        source: path of a JPEG, PNG, WebP or BMP file, its content, or the file itself, opened for
            bytes.
        size: height and width of the result, pixels.

    Returns:
        (3, size, size) uint8, RGB in [0, 255], contiguous.

    Raises:
        ValueError: ``size`` is below 1, or the file is absent, truncated, not such an image, or
            larger than Pillow's limit against decompression bombs.
    """
    if size < 1:
        raise ValueError(f"size must be at least 1 pixel, got {size}")
    pixels = np.empty((size, size, 3), np.uint8)
    name = f"of {len(source)} bytes" if isinstance(source, bytes) else str(source)
    try:
        if isinstance(source, str | os.PathLike):
            source = Path(source).read_bytes()
        decode_into(source if isinstance(source, bytes) else source.read(), pixels)
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read image {name}: {reason(error)}") from error
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def decode_into(data: bytes | memoryview | NDArray[np.uint8], out: NDArray[np.uint8]) -> None:
    """Decode one image into a square that is already there, such as its place in a batch.

    simplejpeg decodes upright colour or grey JPEGs of exactly the size of ``out``, such as those of
    a pack of aligned faces, in little more than half of Pillow's time and to the same pixels.
    Pillow decodes all else, also JPEGs that simplejpeg refuses for a flaw that Pillow forgives.

    Orientation is applied; grey, CMYK, palette and 16-bit images become 8-bit RGB, and
    transparency is dropped. An image of another size is resized (bilinear, antialiased) without
    keeping its aspect ratio, since aligned faces are square.

    Args:
        data: content of a JPEG, PNG, WebP or BMP file.
        out: (size, size, 3) uint8, C-contiguous; becomes RGB in [0, 255].

    Raises:
        ValueError: ``out`` is no such array, or ``data`` is truncated, not such an image, or
            announces more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``. The message is the bare
            reason, for the caller to name the image; ``out`` may hold part of the picture.
    """
    size = len(out)
    if out.shape != (size, size, 3) or out.dtype != np.uint8 or not out.flags.carray or not size:
        raise ValueError(
            "out must be a writable, C-contiguous (size, size, 3) uint8 array, "
            f"got {out.dtype} {out.shape}"
        )
    view = _flat(data)
    if not _decode_upright_jpeg(view, out):
        rgb = _open(view)
        if rgb.size != (size, size):
            rgb = rgb.resize((size, size), Image.Resampling.BILINEAR)
        out[...] = np.asarray(rgb)


def decode_original(data: bytes | memoryview | NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Decode one image at its own size, as Pillow does for :func:`decode_into`.

    Returns:
        (H, W, 3) uint8, RGB in [0, 255].

    Raises:
        ValueError: see :func:`decode_into`.
    """
    return np.asarray(_open(_flat(data)))


def is_packable(data: bytes | memoryview | NDArray[np.uint8], size: int) -> bool:
    """Whether a pack may keep an image's bytes as they are, so that every reader sees it alike.

    They must be a flawless JPEG of ``size`` x ``size`` pixels, colour or grey, that no metadata
    turns: readers of packs differ in whether they heed Exif, resize, convert CMYK, or refuse what
    is broken. It is decoded to find out.
    """
    return _decode_upright_jpeg(_flat(data), np.empty((size, size, 3), np.uint8))


def encode_jpeg(pixels: NDArray[np.uint8], quality: int = 95) -> bytes:
    """Encode an image as a JPEG with colour at full resolution (4:4:4).

    InsightFace's packs are of quality 95 with colour at half resolution (4:2:0, OpenCV's default).
    On 112x112 pictures with full colour, quality 95 gives 43.2 dB in 4:4:4 and 38.9 dB in 4:2:0,
    for 9 % more bytes and a fifth more time to decode. Pillow encodes, since TurboJPEG takes a
    rougher cosine transform below quality 96, which costs 1 dB.

    Args:
        pixels: (H, W, 3) uint8, RGB in [0, 255].
        quality: libjpeg's, in [1, 100].

    Raises:
        ValueError: ``pixels`` is no such array, or ``quality`` is out of range.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3 or not pixels.size:
        raise ValueError(f"pixels must be (H, W, 3) uint8, got {pixels.dtype} {pixels.shape}")
    if not 1 <= quality <= 100:
        raise ValueError(f"quality must lie in [1, 100], got {quality}")
    image, file = Image.fromarray(pixels), BytesIO()
    try:
        image.save(file, "JPEG", optimize=True, quality=quality, subsampling="4:4:4")
    except OSError:  # for optimising, Pillow has room for a byte or two a pixel; noise takes more
        file = BytesIO()
        image.save(file, "JPEG", quality=quality, subsampling="4:4:4")
    return file.getvalue()


def _flat(data: bytes | memoryview | NDArray[np.uint8]) -> memoryview:
    """The bytes as one contiguous run, since simplejpeg heeds no strides."""
    view = memoryview(data)  # type: ignore[arg-type]  # an array is a buffer, if not to its stubs
    return view if view.c_contiguous and view.ndim == 1 else memoryview(view.tobytes())


def _decode_upright_jpeg(view: memoryview, out: NDArray[np.uint8]) -> bool:
    """Decode by simplejpeg if that gives the picture; otherwise ``out`` holds nothing of worth."""
    if not _is_upright_jpeg(view, len(out)):
        return False
    try:
        return simplejpeg.decode_jpeg(view, buffer=out, strict=True).shape == out.shape
    except ValueError:
        return False


def _is_upright_jpeg(view: memoryview, size: int) -> bool:
    """Whether the segments before the scan are those of an upright size x size RGB or grey JPEG.

    simplejpeg does not say, and leaks its handle where the buffer is too small.
    """
    frames = (8, size, size, 3), (8, size, size, 1)
    try:
        if _segment(view)[0] != _SOI:
            return False
        start, has_frame = 2, False
        while True:
            marker, length = _segment(view, start)
            if marker == _SOS:
                return has_frame
            if marker in _HUFFMAN_FRAMES:
                if _frame(view, start + 4) not in frames:
                    return False
                has_frame = True
            elif marker == _APP1:
                if _MAY_TURN.search(view[start : start + 2 + length]):
                    return False
            elif marker not in _HARMLESS:
                return False
            start += 2 + length
    except struct.error:  # the bytes end before the scan
        return False


def _open(view: memoryview) -> Image.Image:
    """The picture upright, in RGB and of its own size."""
    if not len(view):
        raise ValueError("it is empty")
    try:
        with Image.open(BytesIO(view), formats=_FORMATS) as image:
            limit, (width, height) = Image.MAX_IMAGE_PIXELS, image.size
            if limit is not None and width * height > limit:  # Pillow only warns up to twice that
                raise ValueError(
                    f"{width} x {height} pixels, against decompression bombs only {limit} are"
                    " allowed (PIL.Image.MAX_IMAGE_PIXELS)"
                )
            ImageOps.exif_transpose(image, in_place=True)
            if image.mode.startswith("I"):  # 16 bits a pixel, which Pillow clips, not scales
                return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
            if image.mode == "P":  # else Pillow warns about transparent palettes
                return image.convert("RGBA").convert("RGB")
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        start = bytes(view[:8])
        raise ValueError(
            f"not a JPEG, PNG, WebP or BMP image, or a broken one: it starts with {start!r}"
        ) from error
    except Exception as error:  # which of a dozen types a broken file raises is up to its decoder
        raise ValueError(reason(error)) from error
