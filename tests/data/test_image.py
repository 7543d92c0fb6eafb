"""What a file's pixels become, and that no file, however broken, does anything else than raise."""

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastface_lightning.data import decode_image

RAMP = np.add.outer(np.arange(16), np.arange(16)).astype(np.uint8) * 8
COLOUR = np.stack([RAMP, RAMP.T[::-1], 255 - RAMP], axis=-1)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> BytesIO:
    file = BytesIO()
    image.save(file, format, **options)
    file.seek(0)
    return file


@pytest.mark.parametrize("format", ["PNG", "BMP", "WEBP"])
def test_lossless_formats_give_the_pixels(format: str) -> None:
    options = {"lossless": True} if format == "WEBP" else {}
    tensor = decode_image(encoded(Image.fromarray(COLOUR), format, **options), size=16)
    assert tensor.dtype == torch.uint8 and tensor.shape == (3, 16, 16) and tensor.is_contiguous()
    assert np.array_equal(tensor.permute(1, 2, 0), COLOUR)


@pytest.mark.parametrize("mode", ["L", "LA"])
def test_grey_is_repeated_in_all_channels(mode: str) -> None:
    tensor = decode_image(encoded(Image.fromarray(RAMP).convert(mode)), size=16)
    assert np.array_equal(tensor, np.stack([RAMP] * 3))


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    deep = Image.fromarray(RAMP.astype(np.uint16) * 257)
    assert np.array_equal(decode_image(encoded(deep), size=16), np.stack([RAMP] * 3))


def test_one_bit_is_black_and_white() -> None:
    tensor = decode_image(encoded(Image.fromarray(RAMP > 100)), size=16)
    assert np.array_equal(tensor, np.stack([(RAMP > 100) * np.uint8(255)] * 3))


@pytest.mark.parametrize("transparency", [None, 0, bytes([0, 128] * 8)])
@pytest.mark.filterwarnings("error")
def test_palette_gives_its_colours_and_drops_transparency(transparency: object) -> None:
    palette = Image.fromarray(COLOUR).quantize(16)
    options = {} if transparency is None else {"transparency": transparency}
    tensor = decode_image(encoded(palette, **options), size=16)
    assert np.array_equal(tensor.permute(1, 2, 0), palette.convert("RGB"))


def test_transparent_pixels_show_their_colour() -> None:
    rgba = Image.fromarray(np.dstack([COLOUR, RAMP]))
    assert np.array_equal(decode_image(encoded(rgba), size=16).permute(1, 2, 0), COLOUR)


def test_cmyk_jpeg_is_nearly_its_rgb() -> None:
    file = encoded(Image.fromarray(COLOUR).convert("CMYK"), "JPEG", quality=100, subsampling=0)
    error = decode_image(file, size=16).permute(1, 2, 0).numpy().astype(int) - COLOUR
    assert np.abs(error).max() <= 8


@pytest.mark.parametrize(
    ("orientation", "upright"),
    [
        (1, COLOUR),
        (2, COLOUR[:, ::-1]),
        (3, COLOUR[::-1, ::-1]),
        (4, COLOUR[::-1]),
        (5, COLOUR.swapaxes(0, 1)),
        (6, np.rot90(COLOUR, -1)),
        (7, COLOUR[::-1, ::-1].swapaxes(0, 1)),
        (8, np.rot90(COLOUR)),
    ],
)
def test_exif_orientation_is_applied(orientation: int, upright: np.ndarray) -> None:
    exif = Image.Exif()
    exif[274] = orientation
    tensor = decode_image(encoded(Image.fromarray(COLOUR), exif=exif), size=16)
    assert np.array_equal(tensor.permute(1, 2, 0), upright)


def test_resizing_is_antialiased() -> None:
    """A one-pixel checkerboard shrinks to grey; without antialiasing it would alias."""
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    small = decode_image(encoded(Image.fromarray(board)), size=8)
    assert ((small > 110) & (small < 145)).all()


def test_other_aspect_ratios_become_square() -> None:
    assert decode_image(encoded(Image.new("RGB", (40, 20))), size=8).shape == (3, 8, 8)


def jpeg() -> bytes:
    return encoded(Image.fromarray(COLOUR), "JPEG").getvalue()


def png() -> bytes:
    return encoded(Image.fromarray(COLOUR)).getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"this is no picture",
        jpeg()[: len(jpeg()) // 2],
        jpeg()[:4],
        png()[: len(png()) // 2],
        png()[:20] + b"\xff" * 8 + png()[28:],
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n",
        b"GIF89a" + bytes(20),
    ],
    ids=["empty", "text", "half jpeg", "jpeg head", "half png", "broken png", "eps", "gif"],
)
def test_a_broken_file_raises_one_sentence_that_names_it(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "face.jpg"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"^cannot read image .*face\.jpg: ."):
        decode_image(file)


def test_an_absent_file_raises_the_systems_reason(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.jpg: No such file or directory$"):
        decode_image(tmp_path / "gone.jpg")


def test_a_decompression_bomb_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match="decompression bomb"):
        decode_image(encoded(Image.fromarray(COLOUR)))
