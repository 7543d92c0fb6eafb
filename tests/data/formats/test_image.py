"""What a file's pixels become, and that no file, however broken, does anything else than raise."""

import resource
import struct
import sys
import zlib
from collections.abc import Callable
from io import BytesIO
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image, ImageOps

from fastface_lightning.data.formats import image as image_module
from fastface_lightning.data.formats.image import (
    decode_image,
    decode_into,
    encode_jpeg,
    is_packable,
)

RAMP = np.add.outer(np.arange(16), np.arange(16)).astype(np.uint8) * 8
COLOR = np.stack([RAMP, RAMP.T[::-1], 255 - RAMP], axis=-1)
GRAY = np.stack([RAMP] * 3, axis=-1)


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> BytesIO:
    file = BytesIO()
    image.save(file, format, **options)
    file.seek(0)
    return file


DEEP = Image.fromarray(RAMP.astype(np.uint16) * 257)
MODES = {
    "png": (encoded(Image.fromarray(COLOR)), COLOR),
    "bmp": (encoded(Image.fromarray(COLOR), "BMP"), COLOR),
    "webp": (encoded(Image.fromarray(COLOR), "WEBP", lossless=True), COLOR),
    "transparent": (encoded(Image.fromarray(np.dstack([COLOR, RAMP]))), COLOR),
    "gray": (encoded(Image.fromarray(RAMP)), GRAY),
    "16 bits are scaled, not clipped": (encoded(DEEP), GRAY),
    "1 bit": (encoded(Image.fromarray(RAMP > 100)), (GRAY > 100) * np.uint8(255)),
}


@pytest.mark.parametrize(("file", "pixels"), MODES.values(), ids=MODES)
def test_any_mode_becomes_8_bit_rgb(file: BytesIO, pixels: np.ndarray) -> None:
    tensor = decode_image(file, size=16)
    assert tensor.dtype == torch.uint8 and tensor.is_contiguous()
    assert np.array_equal(tensor.permute(1, 2, 0), pixels)


@pytest.mark.parametrize("transparency", [None, bytes([0, 128] * 8)])
@pytest.mark.filterwarnings("error")
def test_palette_gives_its_colours_and_drops_transparency(transparency: object) -> None:
    palette = Image.fromarray(COLOR).quantize(16)
    options = {} if transparency is None else {"transparency": transparency}
    tensor = decode_image(encoded(palette, **options), size=16)
    assert np.array_equal(tensor.permute(1, 2, 0), palette.convert("RGB"))


def test_cmyk_jpeg_is_nearly_its_rgb() -> None:
    file = encoded(Image.fromarray(COLOR).convert("CMYK"), "JPEG", quality=100, subsampling=0)
    error = decode_image(file, size=16).permute(1, 2, 0).numpy().astype(int) - COLOR
    assert np.abs(error).max() <= 8


def test_resizing_is_antialiased() -> None:
    """A one-pixel checkerboard shrinks to grey; without antialiasing it would alias."""
    board = (np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8)
    small = decode_image(encoded(Image.fromarray(board)), size=8)
    assert ((small > 110) & (small < 145)).all()


JPEG = encoded(Image.fromarray(COLOR), "JPEG").getvalue()
PNG = encoded(Image.fromarray(COLOR)).getvalue()
BROKEN = {
    "empty": (b"", "it is empty"),
    "text": (b"this is no picture", "not a JPEG, PNG, WebP or BMP"),
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not a JPEG"),
    "half a jpeg": (JPEG[: len(JPEG) // 2], "[Tt]runcated"),
    "header of a png": (PNG[:20] + b"\xff" * 8 + PNG[28:], "broken|checksum"),
}


@pytest.mark.parametrize(("content", "reason"), BROKEN.values(), ids=BROKEN)
def test_a_broken_file_raises_one_sentence_that_names_it(
    content: bytes, reason: str, tmp_path: Path
) -> None:
    file = tmp_path / "face.jpg"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^cannot read image .*face\.jpg: .*{reason}"):
        decode_image(file)


def exif(orientation: int, order: str = "<", kind: int = 3) -> bytes:
    """An Exif block whose second entry is the orientation, a number of 2 or 4 bytes (kind 3, 4)."""
    value = struct.pack(order + {3: "HH", 4: "I"}[kind], *([orientation, 0][: 5 - kind]))
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HIH", 42, 8, 2)
    first = struct.pack(order + "HHI4s", 0x010F, 2, 4, b"Cam\0")
    second = struct.pack(order + "HHI", 0x0112, kind, 1) + value
    return b"Exif\0\0" + head + first + second + bytes(4)


# The two decoders of `decode_into`.


def photo(size: int, seed: int = 0) -> Image.Image:
    """Something with slopes, edges and noise: blocks of colour, blurred by enlarging, and grain."""
    rng = np.random.default_rng(seed)
    blocks = Image.fromarray(rng.integers(0, 256, (5, 5, 3)).astype(np.uint8))
    smooth = np.asarray(blocks.resize((size, size), Image.Resampling.BICUBIC)).astype(int)
    return Image.fromarray((smooth + rng.integers(-9, 10, smooth.shape)).clip(0, 255).astype("u1"))


def by_pillow(data: bytes) -> np.ndarray:
    """The slow twin: (H, W, 3), upright."""
    with Image.open(BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def decoded(data: bytes, size: int) -> np.ndarray:
    out = np.empty((size, size, 3), np.uint8)
    decode_into(data, out)
    return out


@pytest.fixture
def without_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_module, "_open", None)


@pytest.fixture
def without_simplejpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(simplejpeg, "decode_jpeg", None)


@pytest.mark.usefixtures("without_pillow")
def test_the_fast_path_gives_pillows_pixels_of_real_faces(shared_data: Path) -> None:
    files = sorted((shared_data / "lfw112" / "images").glob("*/*_0001.jpg"))[::25]
    assert len(files) >= 200
    for file in files:
        data = file.read_bytes()
        assert np.array_equal(decoded(data, 112), by_pillow(data)), file.name


@pytest.mark.usefixtures("without_pillow")
@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": "4:4:4"},
        {"subsampling": "4:2:0", "progressive": True},
        {"quality": 30, "restart_marker_blocks": 2},
        {"comment": b"a face", "icc_profile": bytes(3000), "exif": exif(1, ">")},
    ],
    ids=str,
)
def test_the_fast_path_gives_pillows_pixels_of_every_kind(options: dict) -> None:
    for size in (1, 17, 112):
        for mode in ("RGB", "L"):
            data = encoded(photo(size).convert(mode), "JPEG", **options).getvalue()
            assert np.array_equal(decoded(data, size), by_pillow(data))


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_only_the_images_place_in_the_batch_is_written(format: str) -> None:
    """Whatever buffer the image comes in."""
    data = encoded(Image.fromarray(COLOR), format).getvalue()
    array = np.frombuffer(b"head" + data + b"tail", np.uint8)
    for buffer in (memoryview(array)[4:-4], np.repeat(array[4:-4], 2)[::2]):
        batch = np.full((3, 16, 16, 3), 7, np.uint8)
        decode_into(buffer, batch[1])
        assert np.array_equal(batch[1], by_pillow(data)) and (batch[[0, 2]] == 7).all()


def test_out_must_be_a_writable_square() -> None:
    for out in (
        np.empty((8, 9, 3), np.uint8),
        np.empty((8, 8, 3), np.float32),
        np.empty((8, 16, 3), np.uint8)[:, ::2],
        np.frombuffer(bytes(192), np.uint8).reshape(8, 8, 3),  # read-only
    ):
        with pytest.raises(ValueError, match="out must be a writable"):
            decode_into(encoded(photo(8), "JPEG").getvalue(), out)


@pytest.mark.usefixtures("without_simplejpeg")
def test_jpegs_of_another_size_or_in_cmyk_are_pillows() -> None:
    """Also when they hold just as many bytes as the square of 42."""
    for shape in ((28, 63), (42, 21), (50, 50)):
        data = encoded(photo(64).resize(shape), "JPEG").getvalue()
        want = Image.fromarray(by_pillow(data)).resize((42, 42), Image.Resampling.BILINEAR)
        assert np.array_equal(decoded(data, 42), want)
    data = encoded(photo(16).convert("CMYK"), "JPEG").getvalue()
    assert np.array_equal(decoded(data, 16), by_pillow(data))


@pytest.mark.parametrize("orientation", range(9))
def test_orientation_is_applied(orientation: int) -> None:
    png = encoded(Image.fromarray(COLOR), exif=exif(orientation)).getvalue()
    assert np.array_equal(decoded(png, 16), by_pillow(png))
    if orientation == 6:
        assert np.array_equal(decoded(png, 16), np.rot90(COLOR, -1))
    for order, kind in product("<>", (3, 4)):
        data = encoded(photo(16), "JPEG", exif=exif(orientation, order, kind)).getvalue()
        assert np.array_equal(decoded(data, 16), by_pillow(data))
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="%d"/></x:xmpmeta>' % orientation
    data = encoded(photo(16), "JPEG", xmp=xmp).getvalue()
    assert np.array_equal(decoded(data, 16), by_pillow(data))


def test_what_only_simplejpeg_refuses_is_read_as_ever() -> None:
    """Stray bytes between segments: a warning to libjpeg, an error to the strict fast path."""
    plain = encoded(photo(16), "JPEG").getvalue()
    table = plain.index(b"\xff\xdb")
    data = plain[:table] + b"stray" + plain[table:]
    with pytest.raises(ValueError):
        simplejpeg.decode_jpeg(data)
    assert np.array_equal(decoded(data, 16), decoded(plain, 16))


# Hostile input.


def test_a_jpeg_cut_anywhere_in_its_data_raises() -> None:
    for options in ({}, {"progressive": True}):
        data = encoded(photo(16), "JPEG", **options).getvalue()
        for length in range(0, len(data) - 2, 3):
            with pytest.raises(ValueError):
                decoded(data[:length], 16)


def with_size(data: bytes, width: int, height: int) -> bytes:
    """The same file announcing another size."""
    if data.startswith(b"\xff\xd8"):
        at, new = data.index(b"\xff\xc0") + 5, struct.pack(">HH", height, width)
    elif data.startswith(b"\x89PNG"):
        header = data[12:16] + struct.pack(">II", width, height) + data[24:29]
        at, new = 12, header + struct.pack(">I", zlib.crc32(header))
    else:  # WebP: put the extended header, which holds the canvas, before the image
        canvas = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
        at, new = 12, b"VP8X" + struct.pack("<II", 10, 0) + canvas
        return data[:4] + struct.pack("<I", len(data) + 10) + data[8:12] + new + data[12:]
    return data[:at] + new + data[at + len(new) :]


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in KiB on Linux alone")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("format", "width", "height"),
    [
        ("JPEG", 10000, 10000),  # above Pillow's limit, where Pillow only warns
        ("JPEG", 43690, 32769),  # 3 W H is 32,768 modulo 2^32
        ("PNG", 2**31 - 1, 2**31 - 1),
        ("WEBP", 10000, 10000),
    ],
)
def test_a_bomb_is_refused_before_it_takes_memory(format: str, width: int, height: int) -> None:
    data = with_size(encoded(photo(112), format).getvalue(), width, height)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"bombs|broken|size|could not create decoder") as error:
        decoded(data, 112)
    assert "112" not in str(error.value)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024


def mutated(data: bytes, rng: np.random.Generator) -> bytes:
    """One to four flips, cuts, insertions or repetitions."""
    for _ in range(rng.integers(1, 5)):
        at, length = rng.integers(0, max(len(data), 1)), rng.integers(1, 40)
        data = [
            data[:at] + bytes([rng.integers(256)]) + data[at + 1 :],
            data[:at] + data[at + length :],
            data[:at] + rng.bytes(length) + data[at:],
            data[:at] + data[at : at + length] + data[at:],
            data[:at] if rng.random() < 0.2 else data,
        ][rng.integers(5)]
    return data


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "save",
    [
        lambda image: encoded(image, "JPEG", exif=exif(6)),
        lambda image: encoded(image, "JPEG", progressive=True, subsampling=0),
        lambda image: encoded(image.convert("L"), "JPEG"),
        lambda image: encoded(image, "PNG"),
        lambda image: encoded(image, "WEBP"),
    ],
    ids=["exif", "progressive", "grey", "png", "webp"],
)
def test_mutated_files_fill_the_square_or_raise(
    save: Callable[[Image.Image], BytesIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And whatever the fast path reads, Pillow reads alike."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2**20)  # keeps what a flip announces small
    rng = np.random.default_rng(1)
    whole = save(photo(24)).getvalue()
    outcomes = {True: 0, False: 0}
    for _ in range(60):
        # Half of the mutations hit the header, where the fast path looks.
        cut = len(whole) if rng.random() < 0.5 else min(700, len(whole))
        data = mutated(whole[:cut], rng) + whole[cut:]
        try:
            pixels = decoded(data, 24)
        except ValueError:
            outcomes[False] += 1
            continue
        outcomes[True] += 1
        if is_packable(data, 24):
            assert np.array_equal(pixels, by_pillow(data))
    assert min(outcomes.values()) >= 2


# What goes into a pack.


@pytest.mark.parametrize("quality", [50, 95])
def test_encoding_keeps_color_at_full_resolution(quality: int) -> None:
    pixels = np.asarray(photo(112))
    data = encode_jpeg(pixels, quality)
    assert simplejpeg.decode_jpeg_header(data) == (112, 112, "YCbCr", "444")
    twin = encoded(Image.fromarray(pixels), "JPEG", quality=quality, subsampling="4:4:4").getvalue()
    assert np.array_equal(decoded(data, 112), by_pillow(twin)) and len(data) < len(twin)


def test_noise_of_any_size_can_be_encoded() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (700, 900, 3)).astype(np.uint8)
    assert simplejpeg.decode_jpeg(encode_jpeg(pixels, 100)).shape == pixels.shape


def test_a_pack_keeps_only_what_all_readers_see_alike() -> None:
    face = photo(16)
    plain = encoded(face, "JPEG").getvalue()
    assert is_packable(plain, 16) and is_packable(np.frombuffer(plain, np.uint8), 16)
    assert is_packable(encoded(face.convert("L"), "JPEG").getvalue(), 16)
    assert is_packable(encoded(face, "JPEG", progressive=True, exif=exif(1)).getvalue(), 16)
    assert not is_packable(plain, 17)
    for other in (
        encoded(face, "JPEG", exif=exif(6)).getvalue(),
        encoded(face.convert("CMYK"), "JPEG").getvalue(),
        encoded(face, "PNG").getvalue(),
        plain[:-40],
        plain[:-40] + b"\xff\xd9",
        b"",
    ):
        assert not is_packable(other, 16)
