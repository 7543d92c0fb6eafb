"""A `.bin` is read as data whatever it asks for, and written so that every reader takes it."""

import base64
import os
import pickle
import random
import subprocess
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
    "pickle 0 bytearray": base64.b64decode(
        "KChscDAKY19fYnVpbHRpbl9fCmJ5dGVhcnJheQpwMQooVolQTkcNXHUwMDBhGlx1MDAwYQAAAA1JSERSAAAAAQ"
        "AAAAEIAAAAADp+m1UAAABcdTAwMGFJREFUeJxjMAIAADQAM86DJG8AAAAASUVORK5CYIIKcDIKUydsYXRpbi0x"
        "JwpwMwp0cDQKUnA1CmFnMQooVolQTkcNXHUwMDBhGlx1MDAwYQAAAA1JSERSAAAAAQAAAAEIAAAAADp+m1UAAA"
        "BcdTAwMGFJREFUeJxjmAYAAJgAlyCPOIUAAAAASUVORK5CYIIKcDYKUydsYXRpbi0xJwpwNwp0cDgKUnA5CmEo"
        "bHAxMApJMDAKYXRwMTEKLg=="
    ),
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
    "cPickle 1 str": base64.b64decode(
        "KF1xAShVQ4lQTkcNChoKAAAADUlIRFIAAAABAAAAAQgAAAAAOn6bVQAAAApJREFUeJxjMAIAADQAM86DJG8AAA"
        "AASUVORK5CYIJxAlVDiVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGOYBgAAmACX"
        "II84hQAAAABJRU5ErkJggnEDZV1xBEkwMQphdHEFLg=="
    ),
    "cPickle 2 numpy": base64.b64decode(
        "gAJdcQEoY251bXB5LmNvcmUubXVsdGlhcnJheQpfcmVjb25zdHJ1Y3QKcQJjbnVtcHkKbmRhcnJheQpxA0sAhV"
        "UBYodScQQoSwFLQ4VjbnVtcHkKZHR5cGUKcQVVAnUxSwBLAYdScQYoSwNVAXxOTk5K/////0r/////SwB0YolV"
        "Q4lQTkcNChoKAAAADUlIRFIAAAABAAAAAQgAAAAAOn6bVQAAAApJREFUeJxjMAIAADQAM86DJG8AAAAASUVORK"
        "5CYIJ0YmgCaANLAIVVAWKHUnEHKEsBS0OFaAaJVUOJUE5HDQoaCgAAAA1JSERSAAAAAQAAAAEIAAAAADp+m1UA"
        "AAAKSURBVHicY5gGAACYAJcgjziFAAAAAElFTkSuQmCCdGJlXXEIY251bXB5LmNvcmUubXVsdGlhcnJheQpzY2"
        "FsYXIKcQloBVUCYjFLAEsBh1JxCihLA1UBfE5OTkr/////Sv////9LAHRiVQEBhlJxC2GGcQwu"
    ),
    "cPickle 2 str": base64.b64decode(
        "gAJdcQEoVUOJUE5HDQoaCgAAAA1JSERSAAAAAQAAAAEIAAAAADp+m1UAAAAKSURBVHicYzACAAA0ADPOgyRvAA"
        "AAAElFTkSuQmCCcQJVQ4lQTkcNChoKAAAADUlIRFIAAAABAAAAAQgAAAAAOn6bVQAAAApJREFUeJxjmAYAAJgA"
        "lyCPOIUAAAAASUVORK5CYIJxA2VdcQSIYYZxBS4="
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


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    SETS,
    st.sampled_from(PROTOCOLS),
    st.sampled_from(list(IMAGE_KINDS)),
    st.sampled_from(list(TRUTH_KINDS)),
    st.sampled_from([b"numpy._core", b"numpy.core"]),
    st.sampled_from([list, tuple]),
)
def test_all_types_in_all_protocols(
    bin_file: Bin,
    pairs: list[tuple[bytes, bytes, bool]],
    protocol: int,
    image_kind: str,
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


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.lists(st.tuples(st.binary(min_size=1), st.binary(min_size=1), st.booleans()), min_size=1))
def test_what_is_written_every_reader_takes(
    tmp_path: Path, pairs: list[tuple[bytes, bytes, bool]]
) -> None:
    """Also plain ``pickle.load`` with each encoding that InsightFace's code and its kin pass."""
    images = [image for a, b, _ in pairs for image in (a, b)]
    same = [truth for *_, truth in pairs]
    file = tmp_path / "set.bin"
    write_verification_bin(file, images, same)
    assert unpack_verification_bin(file) == (images, same)
    data = file.read_bytes()
    assert data[:2] == b"\x80\x02"  # what Python 2 knows
    for encoding in ("ASCII", "bytes", "latin1"):
        assert pickle.loads(data, encoding=encoding) == (images, same)
    assert sorted(tmp_path.iterdir()) == [file]


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
    assert f"cannot read image 5 of {file}: " in pairs.missing[1]
    assert "3 of the 4 pairs" in caplog.text
    with pytest.raises(ValueError, match=r"none of the 1 pairs of .*set.bin can be read: image 0"):
        read_verification_bin(bin_file(pickle.dumps(([b"a", b"b"], [True]))), size=8)


def test_repeated_images_are_decoded_once(bin_file: Bin, monkeypatch: pytest.MonkeyPatch) -> None:
    """Good or bad; a real set may use them in many pairs, but not without bounds."""
    from fastface_lightning.data import pairs as verification

    calls: list[bytes] = []
    decode = verification.decode_into
    monkeypatch.setattr(
        verification, "decode_into", lambda data, out: (calls.append(data), decode(data, out))
    )
    images = [IMAGES[0], b"bad", *IMAGES] * 5
    pairs = read_verification_bin(bin_file(pickle.dumps((images, [True] * 10))), size=2)
    assert len(pairs.same) == len(pairs.missing) == 5 and sorted(calls) == sorted({*images})
    monkeypatch.setattr(verification, "_MOST_IMAGES", 10)
    read_verification_bin(bin_file(pickle.dumps((IMAGES * 100, [True] * 100))), size=2)
    with pytest.raises(ValueError, match=r"at most 100 times .*, got 2 different ones in 202 pl"):
        read_verification_bin(bin_file(pickle.dumps((IMAGES * 101, [True] * 101))), size=2)


# Malformed files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (([], []), "two images for each truth value, got 0 images for 0 truth values"),
        ((IMAGES, []), "two images for each truth value, got 2 images for 0 truth values"),
        ((IMAGES, [True] * 2), "got 2 images for 2 truth values"),
        (([IMAGES[0]], [True]), "got 1 images for 1 truth values"),
        ((IMAGES, [2]), "got the truth value 2"),
        ((IMAGES, [-1]), "got the truth value -1"),
        ((IMAGES, [None]), "got the truth value None"),
        ((IMAGES, ["yes"]), "got the truth value 'yes'"),
        ((IMAGES, True), "got True instead of a list of truth values"),
        ((b"ab", [True]), "got b'ab' instead of a list of images"),
        ((IMAGES, np.array([3])), "got the truth value 3"),
        ((IMAGES, np.array([2], np.uint8).view(bool)), "got the truth value 2"),
        (([IMAGES, IMAGES], [True]), "got a list as image 0"),
        (([IMAGES[0], 7], [True]), "got 7 as image 1"),
        (([IMAGES[0], np.zeros(4, np.int32)], [True]), "got an array of numpy's .*'i4' as image 1"),
        (IMAGES, r"got b'\\x89PNG.* instead of a list of images"),
        (3, "got 3 instead of images and truth values"),
        ((IMAGES, [True], []), "got a tuple instead of images and truth values"),
        (([IMAGES[0], "\u0100"], [True]), "got a broken one .UnicodeEncodeError"),
        ({"images": IMAGES}, "got the opcode EMPTY_DICT"),
        ((IMAGES, [1.0]), "got the opcode BINFLOAT"),
        ((IMAGES, [np.float64(1)]), "got numpy's dtype 'f8'"),
        (([np.array(IMAGES), 1], [True]), "got numpy's dtype 'S67'"),
        (([np.array([b"a", None]), 1], [True]), "got numpy's dtype 'O8'"),
        (([np.zeros(1, "u1,O"), 1], [True]), "got numpy's dtype 'V9'"),
        (([np.zeros(1, "2u1,u1"), 1], [True]), "got numpy's dtype 'V3'"),
        ((IMAGES, {True}), "got (the opcode EMPTY_SET|a call of builtins.set)"),
        ((IMAGES, [1 << 4000]), "got the opcode LONG4"),
        ((IMAGES, [1 << 1000]), "got the truth value 1071508607"),
    ],
)
def test_other_contents_are_named(bin_file: Bin, content: Any, message: str) -> None:
    for protocol in (3, 4):
        file = bin_file(pickle.dumps(content, protocol))
        with pytest.raises(ValueError, match=message) as caught:
            unpack_verification_bin(file)
        assert str(caught.value).startswith(f"{file} must ") and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is truncated: it ends before its pickle does"),
        (b"\xff\xd8\xff\xe0", r"got the byte b'\\xff', which is no opcode"),
        (b".", "got a broken one"),
        (b"PK\x03\x04", "got the opcode PERSID"),
        (b"I1x\n.", "got a broken one .ValueError"),
        (b"h\x05.", "got a broken one .KeyError"),
        (b"\x8c\x01\xff.", "got a broken one .UnicodeDecodeError"),
        (b"Sabc\n.", "got the string b'abc' without its quotes"),
        (b"S'a\\u00ff'\n.", "got an unknown escape in the string"),
        (b"S'a\\'\n.", "got an unknown escape in the string"),
        (b"I" + b"1" * 40 + b"\n.", r"got the line b'1{33}' of more than 32 characters"),
        (b"c" + b"m" * 300 + b"\n.", "of more than 256 characters"),
        (b"K\x01\x85" * 2 + b"a.", "got an append to a tuple"),
    ],
)
def test_what_is_no_such_pickle_is_named(bin_file: Bin, data: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unpack_verification_bin(bin_file(data))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_truncation_is_noticed(bin_file: Bin, protocol: int) -> None:
    data = pickle.dumps((IMAGES, [True]), protocol)
    for length in range(len(data)):
        with pytest.raises(ValueError, match=r"set.bin is truncated: it ends before its pickle d"):
            unpack_verification_bin(bin_file(data[:length]))


def test_absent_files_and_bad_sizes(tmp_path: Path, bin_file: Bin) -> None:
    with pytest.raises(ValueError, match=r"^no verification set .*gone.bin$"):
        read_verification_bin(tmp_path / "gone.bin")
    with pytest.raises(ValueError, match=r"^no verification set "):
        read_verification_bin(tmp_path)
    with pytest.raises(ValueError, match=r"^size must be at least 1 pixel, got 0$"):
        read_verification_bin(bin_file(b""), size=0)


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
    read_verification_bin(bin_file(PYTHON_2["pickle 0 bytearray"]), size=8)  # imports its codecs
    canary_of_session.events = []
    yield canary_of_session
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


class Stateful(Call):
    """Pickles as a call, and a state for its result."""

    def __reduce__(self) -> Any:
        return *self.reduced, {"__class__": Call}


SHELL = "touch marker"
SET = b"(lp0\n"  # protocol 0, unfinished
TOUCH = b"(S'touch marker'\ntR."
EMPTY = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR"
UINT8 = b"cnumpy\ndtype\n(S'u1'\nI0\nI1\ntR(I3\nS'|'\nNNNI-1\nI-1\nI0\ntb"

HOSTILE_OBJECTS = {
    "os.system": (Call(os.system, SHELL), "a call of posix.system"),
    "subprocess": (Call(subprocess.Popen, ["touch", "marker"]), "a call of .*.Popen"),
    "eval": (Call(eval, "open('marker', 'w')"), "a call of (builtins|__builtin__).eval"),
    "exec": (Call(exec, "open('marker', 'w')"), "a call of (builtins|__builtin__).exec"),
    "getattr": (Call(getattr, os, "system"), "."),
    "import": (Call(__import__, "antigravity"), "a call of (builtins|__builtin__).__import__"),
    "open": (Call(open, "marker", "w"), r"a call of (io|_io|__builtin__|builtins).open"),
    "bytes of a number": (Call(bytes, 10**10), "an encoding of 10000000000"),
    "bytearray of a number": (Call(bytearray, 10**10), "an encoding of 10000000000"),
    "numpy.load": (Call(np.load, "x.npy", None, True), "a call of numpy.load"),
    "numpy.fromfile": (Call(np.fromfile, "/dev/zero"), "a call of numpy.*fromfile"),
    "numpy.zeros": (Call(np.zeros, 10**10), "a call of numpy.*zeros"),
    "ndarray": (Call(np.ndarray, (10**10,)), "a call of numpy.ndarray"),
    "path": (Path("marker"), "a call of pathlib"),
    "state": (Stateful(list), "(a call of .*list|the opcode)"),
    "nested": (([[Call(os.system, SHELL)]],), "a call of posix.system"),
    "in a dtype": (Call(np.dtype, Call(os.system, SHELL)), "a call of posix.system"),
    "object array": (np.array([Call(os.system, SHELL)], object), "numpy's dtype 'O8'"),
    "object dtype": (np.dtype(object), "numpy's dtype 'O8'"),
    "dates": (np.zeros(3, "M8[s]"), "numpy's dtype 'M8'"),
    "subarray dtype": (np.dtype((np.uint8, (10**5, 10**4))), "numpy's dtype 'V1000000000'"),
}  # fmt: skip


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("name", HOSTILE_OBJECTS)
def test_hostile_objects_are_refused(
    bin_file: Bin, canary: Canary, name: str, protocol: int
) -> None:
    hostile, message = HOSTILE_OBJECTS[name]
    if name == "getattr" and protocol < 4:
        hostile = Call(getattr, Path, "cwd")  # modules do not pickle
    try:
        file = bin_file(pickle.dumps(([hostile, hostile], [True]), protocol))
    except TypeError:  # what this protocol cannot say
        pytest.skip("does not pickle")
    with (
        canary,
        pytest.raises(ValueError, match=r"set.bin must hold images .* alone, got " + message),
    ):
        read_verification_bin(file)


HOSTILE_BYTES = {
    "GLOBAL": (SET + b"cos\nsystem\n" + TOUCH, "a call of os.system"),
    "GLOBAL of a dotted name": (b"cnumpy\nndarray.tofile\n.", "a call of numpy.ndarray.tofile"),
    "GLOBAL in a module": (b"cnumpy.core\nmultiarray._reconstruct.__globals__\n.", "__globals__"),
    "STACK_GLOBAL": (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "a call of os.system"),
    "STACK_GLOBAL of no names": (b"\x80\x04]]\x93.", "a list instead of a name"),
    "INST": (b"(S'touch marker'\nios\nsystem\n.", "the opcode INST"),
    "OBJ": (b"(cnumpy\ndtype\nS'O'\no.", "the opcode OBJ"),
    "NEWOBJ": (b"cnumpy\nndarray\n(I9\nt\x81.", "the opcode NEWOBJ"),
    "NEWOBJ_EX": (b"\x80\x04cnumpy\nndarray\n)}\x92.", "the opcode EMPTY_DICT"),
    "PERSID": (b"Pmarker\n.", "the opcode PERSID"),
    "BINPERSID": (b"S'marker'\nQ.", "the opcode BINPERSID"),
    "EXT1": (b"\x80\x02\x82\x01.", "the opcode EXT1"),
    "EXT2": (b"\x80\x02\x83\x01\x00.", "the opcode EXT2"),
    "EXT4": (b"\x80\x02\x84\x01\x00\x00\x00.", "the opcode EXT4"),
    "NEXT_BUFFER": (b"\x80\x05\x97.", "the opcode NEXT_BUFFER"),
    "DUP": (b"]22222.", "the opcode DUP"),
    "BUILD of a list": (b"](S'__class__'\nNtb.", "the opcode BUILD of a list"),
    "BUILD of a function": (b"cnumpy\ndtype\n(NNtb.", "the opcode BUILD of a function"),
    "BUILD with a dict": (EMPTY + b"}b.", "the opcode EMPTY_DICT"),
    "BUILD with a list": (EMPTY + b"(I1\n(I1\nt" + UINT8 + b"I0\n]tb.", "an array made of a list"),
    "REDUCE of a string": (b"S'os.system'\n" + TOUCH, "a call of b'os.system'"),
    "REDUCE of an array": (EMPTY + b"(tR.", "a call of an array"),
    "REDUCE without a tuple": (b"cnumpy\ndtype\n]R.", "a call of a function"),
    "reconstruct of a dtype": (EMPTY.replace(b"cnumpy\nndarray", b"cnumpy\ndtype") + b".", "_r"),
    "reconstruct of a shape": (EMPTY.replace(b"I0", b"I99999999999") + b".", "_reconstruct"),
    "reconstruct of nothing": (EMPTY.replace(b"cnumpy\nndarray\n", b"N") + b".", "_reconstruct"),
    "dtype of a list": (b"cnumpy\ndtype\n(]I0\nI1\ntR.", "a list instead of a name"),
    "dtype of a comma": (b"cnumpy\ndtype\n(S'u1,O'\nI0\nI1\ntR.", "numpy's dtype b?'u1,O'"),
    "object": (b"cnumpy\ndtype\n(S'object'\nI0\nI1\ntR.", "numpy's dtype b?'object'"),
    "|O": (b"cnumpy\ndtype\n(S'|O'\nI0\nI1\ntR.", "numpy's dtype"),
    "fields": (UINT8.replace(b"NNN", b"N(S'f'\nt]") + b".", "a structured dtype"),
    "subarray": (UINT8.replace(b"NNN", b"(S'u1'\n(I9\nttNN") + b".", "a structured dtype"),
    "byte order": (UINT8.replace(b"'|'", b"'O'") + b".", "a dtype of byte order 'O'"),
    "rot13": (b"c_codecs\nencode\n(Vabc\nVrot13\ntR.", "the encoding 'rot13'"),
    "zip": (b"c_codecs\nencode\n(Vabc\nVzip\ntR.", "the encoding 'zip'"),
    "utf-32": (b"c_codecs\nencode\n(Vabc\nVutf-32\ntR.", "the encoding 'utf-32'"),
    "error handler": (b"c_codecs\nencode\n(Vabc\nVlatin1\nVx\ntR.", "TypeError"),
    "negative shape": (EMPTY + b"(I1\n(I-1\nI-1\nt" + UINT8 + b"I0\nS'a'\ntb.", "no valid shape"),
    "multiplied shape": (
        EMPTY + b"(I1\n(" + b"L99999999999999L\n" * 60 + b"t" + UINT8 + b"I0\nS'a'\ntb.",
        "an array of shape",
    ),
    "many dimensions": (
        EMPTY + b"(I1\n(" + b"I1\n" * 65 + b"t" + UINT8 + b"I0\nS'a'\ntb.",
        "an array without a shape",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE_BYTES)
def test_hostile_opcodes_are_refused(bin_file: Bin, canary: Canary, name: str) -> None:
    data, message = HOSTILE_BYTES[name]
    file = bin_file(data)
    with canary, pytest.raises(ValueError, match=r"set.bin must .*, got .*" + message):
        read_verification_bin(file)


def wide(number: int, width: int = 8) -> bytes:
    return number.to_bytes(width, "little")


# Each tuple holds the one before it twice.
LAUGHS = b"]q\x00" + b"".join(
    b"h" + wide(i, 1) + b"h" + wide(i, 1) + b"\x86q" + wide(i + 1, 1) for i in range(200)
)
TEXT = b"X" + wide(100_000, 4) + b"\xc3\xbf" * 50_000
LONG_TEXT = b"X" + wide(4_000_000, 4) + b"\xc3\xbf" * 2_000_000
MANY = b"q\x00" + b"h\x00" * 29_999 + b"e](" + b"\x88" * 15_000 + b"e\x86."
EMPTY_UINT8 = EMPTY + b"(I1\n(I0\nt" + UINT8 + b"I0\nS''\ntb"
MEGABYTE = 1 << 20
TRUNCATED, LONE = "is truncated", "instead of images and truth values"
BOMBS = {
    "BINBYTES8": (b"\x80\x04\x8e" + wide(10**10) + b"abc", TRUNCATED),
    "BINBYTES8 of 2^64": (b"\x80\x04\x8e" + wide(2**64 - 1) + b"abc", TRUNCATED),
    "BYTEARRAY8": (b"\x80\x05\x96" + wide(10**10) + b"abc", TRUNCATED),
    "BINUNICODE8": (b"\x80\x04\x8d" + wide(10**10) + b"abc", TRUNCATED),
    "BINBYTES": (b"\x80\x03B" + wide(2**32 - 1, 4) + b"abc", TRUNCATED),
    "BINSTRING": (b"\x80\x02T" + wide(2**31 - 1, 4) + b"abc", TRUNCATED),
    "negative BINSTRING": (b"\x80\x02T" + wide(2**32 - 1, 4) + b"abc", TRUNCATED),
    "FRAME": (b"\x80\x04\x95" + wide(2**63) + b"]", TRUNCATED),
    "LONG4": (b"\x80\x02\x8b" + wide(2**31 - 1, 4) + b"1", "the opcode LONG4"),
    "LONG_BINPUT": (b"]r" + wide(2**32 - 1, 4) + b".", LONE),
    "LONG_BINGET": (b"]j" + wide(2**32 - 1, 4) + b".", "a broken one .KeyError"),
    "PUT": (b"]p" + b"9" * 30 + b"\n.", LONE),
    "digits": (b"I" + b"9" * 100_000 + b"\n.", "of more than 32 characters"),
    "long digits": (b"L" + b"9" * 100_000 + b"L\n.", "of more than 32 characters"),
    "an empty array of a shape": (
        EMPTY + b"(I1\n(L10000000000L\nt" + UINT8 + b"I0\nS''\ntb.",
        r"an array of shape \(10000000000,\) in 0 bytes",
    ),
    "encoded again and again": (
        TEXT + b"q\x00X\x06\x00\x00\x00latin1q\x01c_codecs\nencode\nq\x02"
        + b"h\x02h\x00h\x01\x86R" * 20_000 + b".",
        "more encoded bytes than the file has",
    ),
    "one text as many images": (b"](" + LONG_TEXT + MANY, "at most 100 times on average"),
    "one array as many images": (b"](" + EMPTY_UINT8 + MANY, "at most 100 times on average"),
    "billion laughs": (LAUGHS + b".", "a tuple as image 0"),
    "billion laughs as images": (LAUGHS + b"](h\xc8h\xc8e](\x88e\x86.", "a tuple as image 0"),
    "billion laughs as truth": (
        LAUGHS + b"](C\x01aC\x01ae](h\xc8e\x86.", "got the truth value a tuple"
    ),
    "billion laughs as a shape": (
        LAUGHS + EMPTY + b"(I1\nh\xc8" + UINT8 + b"I0\nS''\ntb.", "no valid shape"
    ),
    "billion laughs as a name": (LAUGHS + b"cnumpy\ndtype\n(h\xc8I0\nI1\ntR.", "of a name"),
    "billion laughs as an encoding": (
        LAUGHS + b"c_codecs\nencode\n(Va\nh\xc8tR.", "a tuple instead of a name"
    ),
    "billion laughs as a call": (LAUGHS + b")R.", "a call of a tuple"),
    "billion laughs as an empty shape": (
        LAUGHS + EMPTY.replace(b"(I0\nt", b"h\xc8") + b".", "numpy's _reconstruct"
    ),
    "a list in itself": (b"]q\x00h\x00ah\x00h\x00\x86.", "got a list as image 0"),
    "a list in itself as image": (b"]q\x00h\x00ah\x00a](\x88e\x86.", "got a list as image 0"),
    "deep lists": (b"]" * 200_000 + b"a" * 199_999 + b".", LONE),
    "deep tuples": (b")" + b"\x85" * 200_000 + b".", LONE),
    "deep marks": (b"(" * 200_000 + b"t" * 200_000 + b".", LONE),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_bombs_cost_no_more_than_their_size(bin_file: Bin, canary: Canary, name: str) -> None:
    """At most 2 MB, or 300 times the file, and a few seconds."""
    data, message = BOMBS[name]
    file = bin_file(data)
    tracemalloc.start()
    start = time.perf_counter()
    try:
        with canary, pytest.raises(ValueError, match=r"set\.bin .*" + message) as caught:
            read_verification_bin(file)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * MEGABYTE + 300 * len(data)
    assert time.perf_counter() - start < 20
    assert len(str(caught.value)) < 600 and "\n" not in str(caught.value)


# Fuzzing


def seeds() -> list[bytes]:
    content = [bytes(IMAGES[0]), bytearray(IMAGES[1]), *map(writable, IMAGES)], [True, np.True_]
    modern = [pickle.dumps(content, protocol) for protocol in PROTOCOLS]
    old_numpy = [data.replace(b"numpy._core", b"numpy.core") for data in modern[:4]]
    return [*PYTHON_2.values(), *modern, *old_numpy]


PIECES = [data for data, _ in HOSTILE_BYTES.values()] + [
    b"R",
    b"b",
    b"0",
    b"(",
    b"t",
    b"\x93",
    b".",
]


def mutated(data: bytes, rng: random.Random) -> bytes:
    """One to three random changes: bits, bytes, cuts, copies, hostile pieces."""
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
                out[i:i] = rng.choice(PIECES)
            case 5:
                out[i : i + 1] = rng.choice(PIECES).rstrip(b".")
            case 6:
                out[i:i] = rng.randbytes(rng.randint(1, 8))
    return bytes(out)


def outcome(file: Path, size: int) -> bool:
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


def test_mutations_give_pairs_or_one_sentence(bin_file: Bin, canary: Canary) -> None:
    rng = random.Random(0)
    start = time.perf_counter()
    read = 0
    for _ in range(100):
        for seed in seeds():
            file = bin_file(mutated(seed, rng))
            with canary:
                read += outcome(file, 4)
    assert 50 < read < 1500, "mutations must be neither harmless nor all fatal"
    assert time.perf_counter() - start < 60


def test_mutations_of_the_fixture(bin_file: Bin, canary: Canary, shared_data: Path) -> None:
    data = (shared_data / "fixtures" / "small_lfw.bin").read_bytes()
    rng = random.Random(1)
    for _ in range(100):
        file = bin_file(mutated(data, rng))
        with canary:
            outcome(file, 112)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes_give_one_sentence(bin_file: Bin, data: bytes) -> None:
    outcome(bin_file(data), 4)


# Writing


@pytest.mark.parametrize(
    ("images", "same", "message"),
    [
        ([], [], "set.bin must hold pairs, .*, got 0 images for 0 truth values"),
        ([b"a"], [True], "got 1 images for 1 truth values"),
        ([b"a", b""], [True], "image 1 must be bytes, got b''"),
        (["a", b"b"], [True], "image 0 must be bytes, got 'a'"),
        ([b"a", None], [True], "image 1 must be bytes, got None"),
        ([b"a", b"b"], [2], "same must hold bools, got 2"),
    ],
)
def test_what_is_no_set_is_not_written(
    tmp_path: Path, images: Any, same: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        write_verification_bin(tmp_path / "set.bin", images, same)
    assert not list(tmp_path.iterdir())


def test_numpy_bools_are_written_as_bools(tmp_path: Path) -> None:
    write_verification_bin(tmp_path / "set.bin", IMAGES, np.array([True]))  # type: ignore[arg-type]
    assert b"numpy" not in (tmp_path / "set.bin").read_bytes()


def test_impossible_places_are_errors_of_the_system(tmp_path: Path, bin_file: Bin) -> None:
    with pytest.raises(OSError):
        write_verification_bin(bin_file(b"") / "a.bin", IMAGES, [True])
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_verification_bin(tmp_path / "folder", IMAGES, [True])
