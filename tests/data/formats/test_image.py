"""What a file's pixels become, and that no file, however broken, does anything else than raise."""

import mmap
import resource
import struct
import sys
import zlib
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import simplejpeg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from fastface_lightning.data.formats import image as image_module
from fastface_lightning.data.formats.image import (
    decode_image,
    decode_into,
    decode_original,
    encode_jpeg,
    is_packable,
)

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
    def refuse(*_: object) -> None:
        raise AssertionError("the fast path was not taken")

    monkeypatch.setattr(image_module, "_decode_any", refuse)


@pytest.fixture
def without_simplejpeg(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the fast path was taken")

    monkeypatch.setattr(simplejpeg, "decode_jpeg", refuse)


@pytest.mark.usefixtures("without_pillow")
def test_the_fast_path_gives_pillows_pixels_of_real_faces(shared_data: Path) -> None:
    files = sorted((shared_data / "lfw112" / "images").glob("*/*_0001.jpg"))[::25]
    assert len(files) >= 200
    for file in files:
        data = file.read_bytes()
        assert np.array_equal(decoded(data, 112), by_pillow(data)), file.name


@pytest.mark.usefixtures("without_pillow")
@pytest.mark.parametrize("size", [1, 17, 112])
@pytest.mark.parametrize(
    "options",
    [
        {"subsampling": "4:4:4"},
        {"subsampling": "4:2:2"},
        {"subsampling": "4:2:0"},
        {"subsampling": "4:2:0", "progressive": True},
        {"subsampling": "4:4:4", "progressive": True},
        {"quality": 30},
        {"quality": 100},
        {"optimize": True},
        {"restart_marker_blocks": 2},
        {"keep_rgb": True},
        {"comment": b"a face"},
        {"icc_profile": bytes(3000)},
        {"dpi": (300, 300)},
    ],
    ids=str,
)
def test_the_fast_path_gives_pillows_pixels_of_every_kind(size: int, options: dict) -> None:
    for mode in ("RGB", "L"):
        if mode == "L" and "keep_rgb" in options:
            continue
        data = encoded(photo(size).convert(mode), "JPEG", **options).getvalue()
        assert np.array_equal(decoded(data, size), by_pillow(data))


def test_any_buffer_of_bytes_will_do(tmp_path: Path) -> None:
    data = encoded(photo(112), "JPEG").getvalue()
    want = by_pillow(data)
    file = tmp_path / "pack"
    file.write_bytes(b"head" + data + b"tail")
    array = np.fromfile(file, np.uint8)
    for buffer in (data, bytearray(data), memoryview(array)[4:-4], array[4:-4]):
        assert np.array_equal(decoded(buffer, 112), want)
    spread = np.repeat(array[4:-4], 2)[::2]
    assert not spread.flags.c_contiguous
    assert np.array_equal(decoded(spread, 112), want)
    with (
        file.open("rb") as opened,
        mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as pages,
        memoryview(pages)[4:-4] as part,
    ):
        assert np.array_equal(decoded(part, 112), want)


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_only_the_images_place_in_the_batch_is_written(format: str) -> None:
    batch = torch.full((3, 16, 16, 3), 7, dtype=torch.uint8)
    data = encoded(Image.fromarray(COLOUR), format).getvalue()
    decode_into(data, batch.numpy()[1])
    assert np.array_equal(batch[1], by_pillow(data))
    assert (batch[[0, 2]] == 7).all()


@pytest.mark.parametrize(
    "out",
    [
        np.empty((8, 9, 3), np.uint8),
        np.empty((8, 8), np.uint8),
        np.empty((0, 0, 3), np.uint8),
        np.empty((8, 8, 3), np.float32),
        np.empty((8, 16, 3), np.uint8)[:, ::2],
        np.empty((3, 8, 8), np.uint8).transpose(1, 2, 0),
        np.frombuffer(bytes(192), np.uint8).reshape(8, 8, 3),
    ],
    ids=["oblong", "grey", "empty", "float", "strided", "planar", "read-only"],
)
def test_out_must_be_a_writable_square(out: np.ndarray) -> None:
    with pytest.raises(ValueError, match=r"^out must be a writable, C-contiguous \(size"):
        decode_into(encoded(photo(8), "JPEG").getvalue(), out)


@pytest.mark.usefixtures("without_simplejpeg")
@pytest.mark.parametrize("shape", [(28, 63), (42, 21), (40, 40), (50, 50)])
def test_jpegs_of_another_size_are_pillows(shape: tuple[int, int]) -> None:
    """Also when they hold just as many bytes as the square of 42."""
    data = encoded(photo(64).resize(shape), "JPEG").getvalue()
    want = Image.fromarray(by_pillow(data)).resize((42, 42), Image.Resampling.BILINEAR)
    assert np.array_equal(decoded(data, 42), want)


@pytest.mark.usefixtures("without_simplejpeg")
def test_cmyk_jpegs_are_pillows() -> None:
    data = encoded(photo(16).convert("CMYK"), "JPEG").getvalue()
    assert np.array_equal(decoded(data, 16), by_pillow(data))


def exif(orientation: int, order: str = "<", kind: int = 3) -> bytes:
    """An Exif block whose first entry is no orientation and whose second is (kind 3 or 4)."""
    value = struct.pack(order + {3: "HH", 4: "I"}[kind], *([orientation, 0][: 5 - kind]))
    head = {"<": b"II", ">": b"MM"}[order] + struct.pack(order + "HIH", 42, 8, 2)
    first = struct.pack(order + "HHI4s", 0x010F, 2, 4, b"Cam\0")
    second = struct.pack(order + "HHI", 0x0112, kind, 1) + value
    return b"Exif\0\0" + head + first + second + bytes(4)


@pytest.mark.parametrize("kind", [3, 4], ids=["short", "long"])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("orientation", range(9))
def test_turned_jpegs_of_the_right_size_are_turned(orientation: int, order: str, kind: int) -> None:
    data = encoded(photo(16), "JPEG", exif=exif(orientation, order, kind)).getvalue()
    plain = encoded(photo(16), "JPEG").getvalue()
    assert np.array_equal(decoded(data, 16), by_pillow(data))
    assert np.array_equal(by_pillow(data), by_pillow(plain)) == (orientation < 2)


def test_xmp_turns_a_jpeg_too() -> None:
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    data = encoded(photo(16), "JPEG", xmp=xmp).getvalue()
    plain = encoded(photo(16), "JPEG").getvalue()
    assert np.array_equal(decoded(data, 16), np.rot90(decoded(plain, 16), -1))


@pytest.mark.usefixtures("without_pillow")
@pytest.mark.parametrize(
    "block",
    [exif(1), exif(1, ">"), b"Exif\0\0MM\0*\0\0\0\x08\0\0", b"http://ns.adobe.com/xap/1.0/\0"],
)
def test_metadata_that_turns_nothing_keeps_the_fast_path(block: bytes) -> None:
    plain = encoded(photo(16), "JPEG").getvalue()
    segment = b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block
    assert np.array_equal(decoded(plain[:2] + segment + plain[2:], 16), decoded(plain, 16))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Tag data larger")
@given(block=st.binary(max_size=60), orientation=st.integers(0, 9), cut=st.integers(0, 60))
@settings(max_examples=200, deadline=None)
def test_metadata_never_makes_the_decoders_disagree(
    block: bytes, orientation: int, cut: int
) -> None:
    for payload in (b"Exif\0\0" + block, exif(orientation)[:cut] + block):
        segment = b"\xff\xe1" + struct.pack(">H", len(payload) + 2) + payload
        plain = encoded(photo(16), "JPEG").getvalue()
        data = plain[:2] + segment + plain[2:]
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


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "it is empty"),
        (b"this is no picture", "not a JPEG, PNG, WebP or BMP image: it starts with b'this is '"),
        (b"GIF89a" + bytes(20), "not a JPEG, PNG, WebP or BMP image: it starts with b'GIF89a"),
        (b"II*\0" + bytes(20), "not a JPEG, PNG, WebP or BMP image: it starts with b'II"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "not a JPEG, PNG, WebP or BMP image: it starts with b'%!PS"),
        (b"\xff\xd8\xff", "its header is broken"),
        (b"\x89PNG\r\n\x1a\n\0\0", "its header is broken"),
        (b"\xff\xd8", "not a JPEG, PNG, WebP or BMP image: it starts with b'.xff.xd8'"),
    ],
)
def test_the_bare_reason_is_given(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=f"^{reason}"):
        decoded(data, 16)


def test_a_real_gif_or_tiff_is_refused_whatever_its_name(tmp_path: Path) -> None:
    for format in ("GIF", "TIFF", "PPM"):
        file = tmp_path / f"{format}.jpg"
        photo(16).save(file, format)
        with pytest.raises(ValueError, match=rf"{format}\.jpg: not a JPEG, PNG, WebP or BMP image"):
            decode_image(file)


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}], ids=str)
def test_a_jpeg_cut_anywhere_in_its_data_raises(options: dict) -> None:
    data = encoded(photo(16), "JPEG", **options).getvalue()
    for length in range(len(data) - 2):
        with pytest.raises(ValueError):
            decoded(data[:length], 16)


def with_size(data: bytes, width: int, height: int) -> bytes:
    """The same file announcing another size."""
    if data.startswith(b"\xff\xd8"):
        at, new = data.index(b"\xff\xc0") + 5, struct.pack(">HH", height, width)
    elif data.startswith(b"\x89PNG"):
        header = data[12:16] + struct.pack(">II", width, height) + data[24:29]
        at, new = 12, header + struct.pack(">I", zlib.crc32(header))
    elif data.startswith(b"BM"):
        at, new = 18, struct.pack("<ii", width, height)
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
        ("JPEG", 65500, 65500),
        ("JPEG", 10000, 10000),  # above Pillow's limit, where Pillow only warns
        ("JPEG", 65535, 65535),
        ("JPEG", 43690, 32769),  # 3 W H is 32,768 modulo 2^32
        ("PNG", 2**31 - 1, 2**31 - 1),
        ("PNG", 10000, 10000),
        ("BMP", 2**30, 2**30),
        ("BMP", 10000, 10000),
        ("WEBP", 16383, 16383),
        ("WEBP", 10000, 10000),
    ],
)
def test_a_bomb_is_refused_before_it_takes_memory(format: str, width: int, height: int) -> None:
    data = with_size(encoded(photo(112), format).getvalue(), width, height)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"bomb|broken|size|could not create decoder") as error:
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
        lambda image: encoded(image, "BMP"),
        lambda image: encoded(image, "WEBP"),
    ],
    ids=["exif", "progressive", "grey", "png", "bmp", "webp"],
)
def test_mutated_files_fill_the_square_or_raise(
    save: Callable[[Image.Image], BytesIO], monkeypatch: pytest.MonkeyPatch
) -> None:
    """And whatever the fast path reads, Pillow reads alike."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2**20)  # keeps what a flip announces small
    rng = np.random.default_rng(1)
    whole = save(photo(24)).getvalue()
    outcomes = {True: 0, False: 0}
    for _ in range(150):
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
    assert min(outcomes.values()) >= 5


@pytest.mark.usefixtures("without_pillow")
def test_decode_image_shares_the_decoders() -> None:
    data = encoded(photo(16), "JPEG").getvalue()
    want = decoded(data, 16).transpose(2, 0, 1)
    for source in (data, BytesIO(data)):
        assert np.array_equal(decode_image(source, size=16), want)


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_an_original_keeps_its_size_and_stands_upright(format: str) -> None:
    data = encoded(photo(40).resize((40, 24)), format, exif=exif(6)).getvalue()
    pixels = decode_original(data)
    assert pixels.shape == (40, 24, 3) and pixels.dtype == np.uint8
    assert np.array_equal(pixels, by_pillow(data))
    with pytest.raises(ValueError, match=r"^it is empty$"):
        decode_original(b"")
    with pytest.raises(ValueError):
        decode_original(data[: len(data) // 2])


@pytest.mark.parametrize("size", [0, -3])
def test_decode_image_wants_a_positive_size(size: int) -> None:
    with pytest.raises(ValueError, match=f"^size must be at least 1 pixel, got {size}$"):
        decode_image(b"", size)


def test_bytes_are_named_by_their_number() -> None:
    with pytest.raises(ValueError, match=r"^cannot read image of 4 bytes: not a JPEG"):
        decode_image(b"text")


# What goes into a pack.


@pytest.mark.parametrize("quality", [50, 95, 100])
def test_encoding_keeps_colour_at_full_resolution(quality: int) -> None:
    pixels = np.asarray(photo(112))
    data = encode_jpeg(pixels, quality)
    assert simplejpeg.decode_jpeg_header(data) == (112, 112, "YCbCr", "444")
    twin = encoded(Image.fromarray(pixels), "JPEG", quality=quality, subsampling="4:4:4").getvalue()
    assert np.array_equal(decoded(data, 112), by_pillow(twin)) and len(data) < len(twin)
    assert is_packable(data, 112)


def test_encoding_is_nearer_than_the_fields_for_few_bytes_more(shared_data: Path) -> None:
    """On pictures with full colour: four faces in one, each shrunk by two."""
    error, length = [0.0, 0.0], [0, 0]
    files = sorted((shared_data / "lfw112" / "images").glob("*/*_0001.jpg"))[::60]
    for start in range(0, len(files) - 3, 4):
        small = [np.asarray(Image.open(f).reduce(2)) for f in files[start : start + 4]]
        pixels = np.block([[[small[0]], [small[1]]], [[small[2]], [small[3]]]])
        fields = encoded(Image.fromarray(pixels), "JPEG", quality=95, subsampling="4:2:0")
        for k, data in enumerate([encode_jpeg(pixels), fields.getvalue()]):
            error[k] += ((decoded(data, 112).astype(float) - pixels) ** 2).mean()
            length[k] += len(data)
    assert 10 * np.log10(error[1] / error[0]) > 3  # decibels
    assert length[0] < 1.15 * length[1]


def test_noise_of_any_size_can_be_encoded() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (700, 900, 3)).astype(np.uint8)
    for quality in (94, 95, 100):
        assert simplejpeg.decode_jpeg(encode_jpeg(pixels, quality)).shape == pixels.shape


def test_finer_quality_is_nearer_and_longer() -> None:
    pixels = np.asarray(photo(112))
    coded = [encode_jpeg(pixels, quality) for quality in (1, 50, 95, 100)]
    errors = [np.abs(decoded(data, 112).astype(int) - pixels).mean() for data in coded]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1
    assert [*map(len, coded)] == sorted(map(len, coded))


def test_encoding_takes_any_strides_and_shapes() -> None:
    pixels = np.asarray(photo(40))[5:25, ::-1]
    assert encode_jpeg(pixels) == encode_jpeg(pixels.copy())
    assert simplejpeg.decode_jpeg_header(encode_jpeg(pixels))[:2] == (20, 40)


@pytest.mark.parametrize("quality", [0, 101, -5])
def test_quality_has_bounds(quality: int) -> None:
    with pytest.raises(ValueError, match=rf"^quality must lie in \[1, 100\], got {quality}$"):
        encode_jpeg(COLOUR, quality)


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 4), (3, 8, 8), (0, 8, 3)])
def test_pixels_have_a_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"^pixels must be \(H, W, 3\) uint8, got uint8 \("):
        encode_jpeg(np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match="got float64"):
        encode_jpeg(np.zeros((8, 8, 3)))


def test_a_pack_keeps_only_what_all_readers_see_alike() -> None:
    face = photo(16)
    plain = encoded(face, "JPEG").getvalue()
    assert is_packable(plain, 16)
    assert is_packable(encoded(face.convert("L"), "JPEG").getvalue(), 16)
    assert is_packable(encoded(face, "JPEG", progressive=True, exif=exif(1)).getvalue(), 16)
    assert is_packable(np.frombuffer(plain, np.uint8), 16)

    assert not is_packable(plain, 17)
    assert not is_packable(encoded(face, "JPEG", exif=exif(6)).getvalue(), 16)
    assert not is_packable(encoded(face.convert("CMYK"), "JPEG").getvalue(), 16)
    assert not is_packable(encoded(face, "PNG").getvalue(), 16)
    assert not is_packable(plain[:-40], 16)
    assert not is_packable(plain[:-40] + b"\xff\xd9", 16)
    assert not is_packable(b"", 16)
