"""A `.bin` is read as data whatever it asks for, and written so that every reader takes it."""

import base64
import logging
import os
import pickle
import random
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fastface_lightning.data import pairs as pairs_module
from fastface_lightning.data.formats.verification_bin import (
    unpack_verification_bin,
    write_verification_bin,
)
from fastface_lightning.data.pairs import VerificationPairs, read_verification_bin

# Two PNG images of one pixel, grey 50 and 150.
IMAGES = [
    base64.b64decode(
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGMwAgAANAAzzoMkbwAAAABJRU5ErkJggg=="
    ),
    base64.b64decode(
        "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGOYBgAAmACXII84hQAAAABJRU5ErkJggg=="
    ),
]
# Pickles of them and of one truth value, written by Python 2.7.18 with numpy 1.16.6.
PYTHON_2 = {
    "pickle 2 bytearray": base64.b64decode(
        "gAJdcQAoY19fYnVpbHRpbl9fCmJ5dGVhcnJheQpxAVhKAAAAwolQTkcNChoKAAAADUlIRFIAAAABAAAAAQgAAA"
        "AAOn7Cm1UAAAAKSURBVHjCnGMwAgAANAAzw47CgyRvAAAAAElFTkTCrkJgwoJxAlUHbGF0aW4tMXEDhnEEUnEF"
        "aAFYTQAAAMKJUE5HDQoaCgAAAA1JSERSAAAAAQAAAAEIAAAAADp+wptVAAAACklEQVR4wpxjwpgGAADCmADCly"
        "DCjzjChQAAAABJRU5Ewq5CYMKCcQZVB2xhdGluLTFxB4ZxCFJxCWVdcQqJYYZxCy4="
    ),
    "cPickle 0 numpy": base64.b64decode(
        "KChscDEKY251bXB5LmNvcmUubXVsdGlhcnJheQpfcmVjb25zdHJ1Y3QKcDIKKGNudW1weQpuZGFycmF5CnAzCi"
        "hJMAp0UydiJwp0UnA0CihJMQooSTY3CnRjbnVtcHkKZHR5cGUKcDUKKFMndTEnCkkwCkkxCnRScDYKKEkzClMn"
        "fCcKTk5OSS0xCkktMQpJMAp0YkkwMApTJ1x4ODlQTkdcclxuXHgxYVxuXHgwMFx4MDBceDAwXHJJSERSXHgwMF"
        "x4MDBceDAwXHgwMVx4MDBceDAwXHgwMFx4MDFceDA4XHgwMFx4MDBceDAwXHgwMDp+XHg5YlVceDAwXHgwMFx4"
        "MDBcbklEQVR4XHg5Y2MwXHgwMlx4MDBceDAwNFx4MDAzXHhjZVx4ODMkb1x4MDBceDAwXHgwMFx4MDBJRU5EXH"
        "hhZUJgXHg4MicKdGJhZzIKKGczCihJMAp0UydiJwp0UnA3CihJMQooSTY3CnRnNgpJMDAKUydceDg5UE5HXHJc"
        "blx4MWFcblx4MDBceDAwXHgwMFxySUhEUlx4MDBceDAwXHgwMFx4MDFceDAwXHgwMFx4MDBceDAxXHgwOFx4MD"
        "BceDAwXHgwMFx4MDA6flx4OWJVXHgwMFx4MDBceDAwXG5JREFUeFx4OWNjXHg5OFx4MDZceDAwXHgwMFx4OThc"
        "eDAwXHg5NyBceDhmOFx4ODVceDAwXHgwMFx4MDBceDAwSUVORFx4YWVCYFx4ODInCnRiYShscDgKY251bXB5Lm"
        "NvcmUubXVsdGlhcnJheQpzY2FsYXIKcDkKKGc1CihTJ2IxJwpJMApJMQp0UnAxMAooSTMKUyd8JwpOTk5JLTEK"
        "SS0xCkkwCnRiUydceDAxJwp0UnAxMQphdHAxMgou"
    ),
    "cPickle 0 str": base64.b64decode(
        "KChscDEKUydceDg5UE5HXHJcblx4MWFcblx4MDBceDAwXHgwMFxySUhEUlx4MDBceDAwXHgwMFx4MDFceDAwXH"
        "gwMFx4MDBceDAxXHgwOFx4MDBceDAwXHgwMFx4MDA6flx4OWJVXHgwMFx4MDBceDAwXG5JREFUeFx4OWNjMFx4"
        "MDJceDAwXHgwMDRceDAwM1x4Y2VceDgzJG9ceDAwXHgwMFx4MDBceDAwSUVORFx4YWVCYFx4ODInCnAyCmFTJ1"
        "x4ODlQTkdcclxuXHgxYVxuXHgwMFx4MDBceDAwXHJJSERSXHgwMFx4MDBceDAwXHgwMVx4MDBceDAwXHgwMFx4"
        "MDFceDA4XHgwMFx4MDBceDAwXHgwMDp+XHg5YlVceDAwXHgwMFx4MDBcbklEQVR4XHg5Y2NceDk4XHgwNlx4MD"
        "BceDAwXHg5OFx4MDBceDk3IFx4OGY4XHg4NVx4MDBceDAwXHgwMFx4MDBJRU5EXHhhZUJgXHg4MicKcDMKYShs"
        "cDQKSTAxCmF0cDUKLg=="
    ),
    "cPickle 2 numpy": base64.b64decode(
        "gAJdcQEoY251bXB5LmNvcmUubXVsdGlhcnJheQpfcmVjb25zdHJ1Y3QKcQJjbnVtcHkKbmRhcnJheQpxA0sAhV"
        "UBYodScQQoSwFLQ4VjbnVtcHkKZHR5cGUKcQVVAnUxSwBLAYdScQYoSwNVAXxOTk5K/////0r/////SwB0YolV"
        "Q4lQTkcNChoKAAAADUlIRFIAAAABAAAAAQgAAAAAOn6bVQAAAApJREFUeJxjMAIAADQAM86DJG8AAAAASUVORK"
        "5CYIJ0YmgCaANLAIVVAWKHUnEHKEsBS0OFaAaJVUOJUE5HDQoaCgAAAA1JSERSAAAAAQAAAAEIAAAAADp+m1UA"
        "AAAKSURBVHicY5gGAACYAJcgjziFAAAAAElFTkSuQmCCdGJlXXEIY251bXB5LmNvcmUubXVsdGlhcnJheQpzY2"
        "FsYXIKcQloBVUCYjFLAEsBh1JxCihLA1UBfE5OTkr/////Sv////9LAHRiVQEBhlJxC2GGcQwu"
    ),
}

PROTOCOLS = range(pickle.HIGHEST_PROTOCOL + 1)
Bin = Callable[[bytes], Path]


@pytest.fixture
def bin_file(tmp_path: Path) -> Bin:
    """``bin_file(content)`` writes a `.bin` and returns its path."""

    def write(content: bytes) -> Path:
        file = tmp_path / "set.bin"
        file.write_bytes(content)
        return file

    return write


# Benign files


@pytest.mark.parametrize("name", PYTHON_2)
def test_pickles_of_python_2(bin_file: Bin, name: str) -> None:
    same = "bytearray" not in name
    assert unpack_verification_bin(bin_file(PYTHON_2[name])) == (IMAGES, [same])
    pairs = read_verification_bin(bin_file(PYTHON_2[name]), size=8)
    assert pairs.images.dtype == torch.uint8 and pairs.images.is_contiguous()
    assert pairs.images[:, :, 0, 0].tolist() == [[50] * 3, [150] * 3]
    assert pairs.same.tolist() == [same] and pairs.missing == []


def writable(image: bytes) -> np.ndarray:
    return np.frombuffer(image, np.uint8).copy()


IMAGE_KINDS: dict[str, Callable[[bytes], Any]] = {
    "bytes": bytes,
    "bytearray": bytearray,
    "text": lambda image: image.decode("latin-1"),
    "array": lambda image: np.frombuffer(image, np.uint8),
    "writable array": writable,
    "column": lambda image: writable(image)[:, None],
}
TRUTH_KINDS: dict[str, Callable[[list[bool]], Any]] = {
    "list": list,
    "tuple": tuple,
    "numbers": lambda same: [int(value) for value in same],
    "numpy bools": lambda same: [np.bool_(value) for value in same],
    "numpy integers": lambda same: [np.int64(value) for value in same],
    "big-endian": lambda same: np.array(same, ">i4"),
    "array": np.array,
}
SETS = st.lists(st.tuples(st.binary(), st.binary(), st.booleans()), min_size=1, max_size=5)
few = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=20
)


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("image_kind", IMAGE_KINDS)
@few
@given(
    SETS,
    st.sampled_from(list(TRUTH_KINDS)),
    st.sampled_from([b"numpy._core", b"numpy.core"]),
    st.sampled_from([list, tuple]),
)
def test_all_types_in_all_protocols(
    bin_file: Bin,
    image_kind: str,
    protocol: int,
    pairs: list[tuple[bytes, bytes, bool]],
    truth_kind: str,
    numpy_core: bytes,
    outer: type,
) -> None:
    images = [image for a, b, _ in pairs for image in (a, b)]
    same = [truth for *_, truth in pairs]
    content = outer(([IMAGE_KINDS[image_kind](i) for i in images], TRUTH_KINDS[truth_kind](same)))
    data = pickle.dumps(content, protocol)
    if protocol < 4:  # names have no lengths yet
        data = data.replace(b"numpy._core", numpy_core)
    assert unpack_verification_bin(bin_file(data)) == (images, same)


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_a_file_of_many_frames(bin_file: Bin, protocol: int) -> None:
    """Images below and above the size at which the pickler leaves its frames."""
    rng = random.Random(0)
    images = [rng.randbytes(size) for size in [100, 5000] * 40 + [200_000] * 2]
    same = [i % 3 == 0 for i in range(41)]
    data = pickle.dumps((images, same), protocol)
    assert unpack_verification_bin(bin_file(data)) == (images, same)


@few
@given(st.lists(st.tuples(st.binary(min_size=1), st.binary(min_size=1), st.booleans()), min_size=1))
def test_what_is_written_every_reader_takes(
    tmp_path: Path, pairs: list[tuple[bytes, bytes, bool]]
) -> None:
    """Also plain ``pickle.load`` with each encoding that InsightFace's code and its kin pass."""
    images = [image for a, b, _ in pairs for image in (a, b)]
    same = [truth for *_, truth in pairs]
    file = tmp_path / "set.bin"
    write_verification_bin(file, images, np.array(same))  # type: ignore[arg-type]
    assert unpack_verification_bin(file) == (images, same)
    data = file.read_bytes()
    assert data[:2] == b"\x80\x02" and b"numpy" not in data  # what Python 2 knows
    for encoding in ("ASCII", "bytes", "latin1"):
        assert pickle.loads(data, encoding=encoding) == (images, same)
    assert sorted(tmp_path.iterdir()) == [file]


def test_absent_files_and_bad_sizes(tmp_path: Path, bin_file: Bin) -> None:
    with pytest.raises(ValueError, match="no verification set"):
        read_verification_bin(tmp_path)
    with pytest.raises(ValueError, match="size"):
        read_verification_bin(bin_file(b""), size=0)


def test_fixture(shared_data: Path) -> None:
    """Ten pairs of one person each, as numpy arrays; the plain unpickler is the twin."""
    file = shared_data / "fixtures" / "small_lfw.bin"
    images, same = unpack_verification_bin(file)
    trusted, trusted_same = pickle.loads(file.read_bytes())
    assert images == [array.tobytes() for array in trusted] and same == list(trusted_same)
    pairs = read_verification_bin(file)
    assert pairs.images.shape == (20, 3, 112, 112) and pairs.missing == []
    assert pairs.same.tolist() == 10 * [True]
    assert read_verification_bin(file, size=56).images.shape == (20, 3, 56, 56)


def test_an_undecodable_image_loses_its_pair(
    bin_file: Bin, caplog: pytest.LogCaptureFixture
) -> None:
    images = [IMAGES[0], b"", *IMAGES, IMAGES[1], b"no image", IMAGES[1][:40], IMAGES[0]]
    file = bin_file(pickle.dumps((images, [True, False, True, False])))
    pairs = read_verification_bin(file, size=8)
    assert pairs.images[:, 0, 0, 0].tolist() == [50, 150] and pairs.same.tolist() == [False]
    assert [line.split(":")[0] for line in pairs.missing] == [
        "image 0 and image 1", "image 4 and image 5", "image 6 and image 7"
    ]  # fmt: skip
    assert "3 of the 4 pairs" in caplog.text
    with pytest.raises(ValueError, match="none of the 1 pairs"):
        read_verification_bin(bin_file(pickle.dumps(([b"a", b"b"], [True]))), size=8)


def test_repeated_images_are_decoded_once(bin_file: Bin, monkeypatch: pytest.MonkeyPatch) -> None:
    """Good or bad; a real set may use them in many pairs, but not without bounds."""
    calls: list[bytes] = []
    decode = pairs_module.decode_into
    monkeypatch.setattr(
        pairs_module, "decode_into", lambda data, out: (calls.append(data), decode(data, out))
    )
    images = [IMAGES[0], b"bad", *IMAGES] * 5
    pairs = read_verification_bin(bin_file(pickle.dumps((images, [True] * 10))), size=2)
    assert len(pairs.same) == len(pairs.missing) == 5 and sorted(calls) == sorted({*images})
    monkeypatch.setattr(pairs_module, "_MOST_IMAGES", 10)
    read_verification_bin(bin_file(pickle.dumps((IMAGES * 100, [True] * 100))), size=2)
    with pytest.raises(ValueError, match="at most 100 times"):
        read_verification_bin(bin_file(pickle.dumps((IMAGES * 101, [True] * 101))), size=2)


# Malformed files

MALFORMED = {
    "nothing": ([], []),
    "no truth": (IMAGES, []),
    "half a pair": ([IMAGES[0]], [True]),
    "truth of 2": (IMAGES, [2]),
    "truth of text": (IMAGES, ["yes"]),
    "truth of 2 in a bool array": (IMAGES, np.array([2], np.uint8).view(bool)),
    "numpy floats": (IMAGES, [np.float64(1)]),
    "bytes for a list": (b"ab", [True]),
    "lists for images": ([IMAGES, IMAGES], [True]),
    "int32 images": ([IMAGES[0], np.zeros(4, np.int32)], [True]),
    "text beyond a byte": ([IMAGES[0], "\u0100"], [True]),
    "object arrays": ([np.array([b"a", None]), 1], [True]),
    "structured arrays": ([np.zeros(1, "u1,O"), 1], [True]),
    "three parts": (IMAGES, [True], []),
    "a dict": {"images": IMAGES},
    "a set": (IMAGES, {True}),
    "a huge number": (IMAGES, [1 << 1000]),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_other_contents_are_refused(bin_file: Bin, name: str) -> None:
    for protocol in PROTOCOLS:
        file = bin_file(pickle.dumps(MALFORMED[name], protocol))
        with pytest.raises(ValueError) as caught:
            unpack_verification_bin(file)
        assert str(caught.value).startswith(f"{file} must ") and len(str(caught.value)) < 400


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_truncation_is_noticed(bin_file: Bin, protocol: int) -> None:
    data = pickle.dumps((IMAGES, [True]), protocol)
    for length in range(0, len(data), 3):
        with pytest.raises(ValueError, match="is truncated"):
            unpack_verification_bin(bin_file(data[:length]))


# Hostile files


class Canary:
    """Notes what Python's audit events tell of code being run, while it listens."""

    TOUCHY = ("exec", "compile", "import", "pickle.", "os.", "subprocess.", "shutil.", "ctypes.",
              "socket.", "code.", "marshal.")  # fmt: skip

    def __init__(self) -> None:
        self.listening = False
        self.events: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.listening:
            return
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if event.startswith(self.TOUCHY) or writes:
            self.events.append(event)

    def __enter__(self) -> "Canary":
        self.listening = True
        return self

    def __exit__(self, *_: object) -> None:
        self.listening = False


canary_of_session = Canary()  # audit hooks stay for good, so one serves all tests


@pytest.fixture
def canary(bin_file: Bin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Canary]:
    """Must stay silent; nor may the file ``marker`` appear."""
    monkeypatch.chdir(tmp_path)
    Image.init()  # imports all its plugins
    read_verification_bin(bin_file(PYTHON_2["pickle 2 bytearray"]), size=8)  # imports its codecs
    logging.disable()  # a program that ran before may have left handlers that open files
    canary_of_session.events = []
    yield canary_of_session
    logging.disable(logging.NOTSET)
    assert not canary_of_session.events and not (tmp_path / "marker").exists()


def test_the_canary_sings(tmp_path: Path) -> None:
    """Else its silence would mean nothing."""
    payload = b'cbuiltins\neval\n(S\'open("%s/marker", "w").close()\'\ntR.' % bytes(tmp_path)
    canary_of_session.events = []
    with canary_of_session:
        pickle.loads(payload)
    assert {"pickle.find_class", "exec", "open"} <= set(canary_of_session.events)
    assert (tmp_path / "marker").exists()


class Call:
    """Pickles as a call of a function."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.reduced = function, args

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.reduced


SHELL = "touch marker"
HOSTILE_OBJECTS = {
    "os.system": Call(os.system, SHELL),
    "eval": Call(eval, "open('marker', 'w')"),
    "getattr": Call(getattr, Path, "cwd"),
    "import": Call(__import__, "antigravity"),
    "bytes of a number": Call(bytes, 10**10),
    "numpy.zeros": Call(np.zeros, 10**10),
    "ndarray": Call(np.ndarray, (10**10,)),
    "path": Path("marker"),
    "nested": ([[Call(os.system, SHELL)]],),
    "in a dtype": Call(np.dtype, Call(os.system, SHELL)),
    "object array": np.array([Call(os.system, SHELL)], object),
    "object dtype": np.dtype(object),
    "dates": np.zeros(3, "M8[s]"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_OBJECTS)
def test_hostile_objects_are_refused(bin_file: Bin, canary: Canary, name: str) -> None:
    hostile = HOSTILE_OBJECTS[name]
    for protocol in PROTOCOLS:
        file = bin_file(pickle.dumps(([hostile, hostile], [True]), protocol))
        with canary, pytest.raises(ValueError, match=r"set\.bin must "):
            read_verification_bin(file)


TOUCH = b"(S'touch marker'\ntR."
EMPTY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
UINT8 = b"cnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntb"
HOSTILE_BYTES = {
    "nothing a pickle has": b"\xff\xd8\xff\xe0",
    "STOP alone": b".",
    "a zip": b"PK\x03\x04",
    "GET of nothing": b"h\x05.",
    "text that is not UTF-8": b"\x8c\x01\xff.",
    "STRING without quotes": b"Sabc\n.",
    "STRING that ends in an escape": b"S'a\\'\n.",
    "protocol 6": b"\x80\x06].",
    "GLOBAL": b"(lp0\ncos\nsystem\n" + TOUCH,
    "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93.",
    "STACK_GLOBAL of no names": b"\x80\x04]]\x93.",
    "INST": b"(S'touch marker'\nios\nsystem\n.",
    "OBJ": b"(cnumpy\ndtype\nS'O'\no.",
    "NEWOBJ": b"cnumpy\nndarray\n(I9\nt\x81.",
    "NEWOBJ_EX": b"\x80\x04cnumpy\nndarray\n)}\x92.",
    "PERSID": b"Pmarker\n.",
    "EXT1": b"\x80\x02\x82\x01.",
    "NEXT_BUFFER": b"\x80\x05\x97.",
    "DUP": b"]22222.",
    "BUILD of a list": b"](S'__class__'\nNtb.",
    "BUILD of a function": b"cnumpy\ndtype\n(NNtb.",
    "BUILD of an encoder": b"c_codecs\nencode\n(N(S'x'\ntt(NVa\ntb.",
    "BUILD with a dict": EMPTY + b"}b.",
    "BUILD with a list": EMPTY + b"(I1\n(I1\nt" + UINT8 + b"I0\n]tb.",
    "BUILD with itself": EMPTY + b"p0\n(I1\n(I1\nt" + UINT8 + b"I0\ng0\ntb.",
    "REDUCE of an array": EMPTY + b"(tR.",
    "REDUCE without a tuple": b"cnumpy\ndtype\n]R.",
    "REDUCE with too many": b"c_codecs\nencode\n(Vabc\nVlatin1\nVx\ntR.",
    "_reconstruct of a dtype": EMPTY.replace(b"cnumpy\nndarray", b"cnumpy\ndtype") + b".",
    "_reconstruct of a shape": EMPTY.replace(b"I0", b"I99999999999") + b".",
    "_frombuffer of a shape": (
        b"cnumpy.core.numeric\n_frombuffer\n(S'a'\n" + UINT8 + b"(I99999999999\ntS'C'\ntR."
    ),
    "scalar of two": b"cnumpy.core.multiarray\nscalar\n(" + UINT8 + b"S'ab'\ntR.",
    "dtype of a list": b"cnumpy\ndtype\n(]I0\nI1\ntR.",
    "dtype of objects": b"cnumpy\ndtype\n(S'|O'\nI0\nI1\ntR.",
    "fields": UINT8.replace(b"NNN", b"N(S'f'\nt]") + b".",
    "subarray": UINT8.replace(b"NNN", b"(S'u1'\n(I9\nttNN") + b".",
    "byte order": UINT8.replace(b"'|'", b"'O'") + b".",
    "zip encoding": b"c_codecs\nencode\n(Vabc\nVzip\ntR.",
    "negative shape": EMPTY + b"(I1\n(I-1\nI-1\nt" + UINT8 + b"I0\nS'a'\ntb.",
    "many dimensions": EMPTY + b"(I1\n(" + b"I1\n" * 65 + b"t" + UINT8 + b"I0\nS'a'\ntb.",
    # The unpickler would skip what is left of the frame, and read on where nothing was checked.
    "opcode across a frame's end": b"\x80\x04\x95\x05" + bytes(7) + b"](X\x03\0\0\0abc.",
    "frame in a frame": b"\x80\x04" + 2 * (b"\x95\x0c" + bytes(7)) + b"].........",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_BYTES)
def test_hostile_opcodes_are_refused(bin_file: Bin, canary: Canary, name: str) -> None:
    file = bin_file(HOSTILE_BYTES[name])
    with canary, pytest.raises(ValueError, match=r"set\.bin must "):
        read_verification_bin(file)


def wide(number: int, width: int = 8) -> bytes:
    return number.to_bytes(width, "little")


# Each tuple holds the one before it twice.
LAUGHS = b"]q\x00" + b"".join(
    b"h" + wide(i, 1) + b"h" + wide(i, 1) + b"\x86q" + wide(i + 1, 1) for i in range(200)
)
TEXT = b"X" + wide(100_000, 4) + b"\xc3\xbf" * 50_000
LONG_TEXT = b"X" + wide(4_000_000, 4) + b"\xc3\xbf" * 2_000_000
MANY = b"q\x00" + b"h\x00" * 21_999 + b"e](" + b"\x88" * 11_000 + b"e\x86."
EMPTY_UINT8 = EMPTY + b"(I1\n(I0\nt" + UINT8 + b"I0\nS''\ntb"
# One megabyte in a bytearray, and arrays that share it.
BUFFER = b"\x96" + wide(1_000_000) + bytes(1_000_000) + b"q\x00"
SHARING = EMPTY + b"(I1\n(L1000000L\nt" + UINT8 + b"I0\nh\x00tb"
BOMBS = {
    "BINBYTES8": b"\x80\x04\x8e" + wide(10**10) + b"abc",
    "BINBYTES8 of 2^64": b"\x80\x04\x8e" + wide(2**64 - 1) + b"abc",
    "BINUNICODE8": b"\x80\x04\x8d" + wide(10**10) + b"abc",
    "negative BINSTRING": b"\x80\x02T" + wide(2**32 - 1, 4) + b"abc",
    "FRAME": b"\x80\x04\x95" + wide(2**40) + b"].",
    "LONG4": b"\x80\x02\x8b" + wide(2**31 - 1, 4) + b"1",
    "LONG_BINPUT": b"]r" + wide(2**32 - 1, 4) + b".",
    "PUT": b"]p" + b"9" * 18 + b"\n.",
    "a long name": b"c" + b"m" * 100_000 + b"\nn\n.",
    "an empty array of a shape": EMPTY + b"(I1\n(L10000000000L\nt" + UINT8 + b"I0\nS''\ntb.",
    "a product of lengths": (
        EMPTY + b"(I1\n(" + b"L99999999999999L\n" * 60 + b"t" + UINT8 + b"I0\nS'a'\ntb."
    ),
    "encoded again and again": (
        TEXT + b"q\x00X\x06\x00\x00\x00latin1q\x01c_codecs\nencode\nq\x02"
        + b"h\x02h\x00h\x01\x86R" * 20_000 + b"."
    ),
    "one text as many images": b"](" + LONG_TEXT + MANY,
    "one array as many images": b"](" + EMPTY_UINT8 + MANY,
    "many arrays in one buffer": (
        b"\x80\x05" + BUFFER + b"(" + SHARING * 2000 + b"l(" + b"\x88" * 999 + b"l\x86."
    ),
    "billion laughs": LAUGHS + b".",
    "billion laughs as images": LAUGHS + b"](h\xc8h\xc8e](\x88e\x86.",
    "billion laughs as truth": LAUGHS + b"](C\x01aC\x01ae](h\xc8e\x86.",
    "billion laughs as a shape": LAUGHS + EMPTY + b"(I1\nh\xc8" + UINT8 + b"I0\nS''\ntb.",
    "billion laughs as a name": LAUGHS + b"cnumpy\ndtype\n(h\xc8I0\nI1\ntR.",
    "billion laughs as an encoding": LAUGHS + b"c_codecs\nencode\n(Va\nh\xc8tR.",
    "billion laughs as arguments": LAUGHS + b"cnumpy\ndtype\nh\xc8R.",
    "a list in itself": b"]q\x00h\x00ah\x00h\x00\x86.",
    "a list in itself as image": b"]q\x00h\x00ah\x00a](\x88e\x86.",
    "deep lists": b"]" * 50_000 + b"a" * 49_999 + b".",
    "deep tuples": b")" + b"\x85" * 50_000 + b".",
    "deep marks": b"(" * 50_000 + b"t" * 50_000 + b".",
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_cost_no_more_than_their_size(bin_file: Bin, canary: Canary, name: str) -> None:
    """At most 2 MB, or 300 times the file up to 20 MB, or 10 times it; and a few seconds."""
    data = BOMBS[name]
    file = bin_file(data)
    tracemalloc.start()
    start = time.perf_counter()
    try:
        with canary, pytest.raises(ValueError) as caught:
            read_verification_bin(file)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < (2 << 20) + max(10 * len(data), min(300 * len(data), 20 << 20))
    assert time.perf_counter() - start < 20
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)


def test_opcodes_are_counted(bin_file: Bin, monkeypatch: pytest.MonkeyPatch) -> None:
    data = pickle.dumps((IMAGES * 100, [True] * 100))
    monkeypatch.setattr("fastface_lightning.data.formats.verification_bin._MAX_OPCODES", 100)
    with pytest.raises(ValueError, match="100 opcodes"):
        unpack_verification_bin(bin_file(data))


# Fuzzing


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One to three random changes: bits, bytes, cuts, copies, hostile pieces."""
    pieces = [*HOSTILE_BYTES.values(), *(b"R", b"b", b"0", b"(", b"t", b"\x93", b".")]
    out = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        i, j = sorted(rng.randrange(len(out) + 1) for _ in range(2))
        match rng.randrange(7):
            case 0 if i < len(out):
                out[i] ^= 1 << rng.randrange(8)
            case 1 if i < len(out):
                out[i] = rng.randrange(256)
            case 2:
                del out[i : min(j, i + 20)]
            case 3:
                out[i:i] = out[i : min(j, i + 50)]
            case 4:
                out[i:i] = rng.choice(pieces)
            case 5:
                out[i : i + 1] = rng.choice(pieces).rstrip(b".")
            case 6:
                out[i:i] = rng.randbytes(rng.randint(1, 8))
    return bytes(out)


def is_read(file: Path, size: int) -> bool:
    """Whether it is a set; if not, there is one short sentence that names the file."""
    try:
        pairs = read_verification_bin(file, size)
    except ValueError as error:
        message = str(error)
        assert str(file) in message and len(message) < 800
        return False
    assert isinstance(pairs, VerificationPairs)
    assert pairs.images.shape == (2 * len(pairs.same), 3, size, size) and len(pairs.same)
    return True


@pytest.mark.parametrize("count", [20, pytest.param(300, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of escapes that are none
@pytest.mark.filterwarnings("ignore::SyntaxWarning")
def test_mutations_give_pairs_or_one_sentence(
    bin_file: Bin, canary: Canary, shared_data: Path, count: int
) -> None:
    content = [bytes(IMAGES[0]), bytearray(IMAGES[1]), *map(writable, IMAGES)], [True, np.True_]
    modern = [pickle.dumps(content, protocol) for protocol in PROTOCOLS]
    seeds = [*PYTHON_2.values(), *modern, *(m.replace(b"_core", b"core") for m in modern[:4])]
    rng = random.Random(0)
    read = 0
    for _ in range(count):
        for seed in seeds:
            file = bin_file(mutated(seed, rng))
            with canary:
                read += is_read(file, 4)
    assert 0.02 < read / count / len(seeds) < 0.8, "neither harmless nor all fatal"
    fixture = (shared_data / "fixtures" / "small_lfw.bin").read_bytes()
    for _ in range(count):
        file = bin_file(mutated(fixture, rng))
        with canary:
            is_read(file, 112)


@few
@given(st.binary(max_size=200))
def test_any_bytes_give_one_sentence(bin_file: Bin, data: bytes) -> None:
    is_read(bin_file(data), 4)


# Writing


@pytest.mark.parametrize(
    ("images", "same"),
    [
        ([], []),
        ([b"a"], [True]),
        ([b"a", b""], [True]),
        (["a", b"b"], [True]),
        ([b"a", b"b"], [2]),
    ],
)
def test_what_is_no_set_is_not_written(tmp_path: Path, images: Any, same: Any) -> None:
    with pytest.raises(ValueError):
        write_verification_bin(tmp_path / "set.bin", images, same)
    assert not list(tmp_path.iterdir())


def test_impossible_places_are_errors_of_the_system(tmp_path: Path, bin_file: Bin) -> None:
    with pytest.raises(OSError):
        write_verification_bin(bin_file(b"") / "a.bin", IMAGES, [True])
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_verification_bin(tmp_path / "folder", IMAGES, [True])
