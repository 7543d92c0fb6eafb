"""A verification ``.bin`` is a pickle, read here by an unpickler that builds data and nothing else.

The field exchanges LFW, CFP-FP, AgeDB-30 and their kin as pickles of (2N encoded images, N truth
values). Loading a pickle runs whatever it names, so a downloaded one is read in two steps: a first
pass over its opcodes refuses all but those of lists, numbers, texts and bytes, and whatever makes
the unpickler allocate more than in proportion to the file; then the names it may use, numpy's among
them, stand for small functions of this module that check and keep bytes.
"""

import math
import mmap
import os
import pickle
import pickletools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...files import replacing

_MAX_OPCODES = 10_000_000  # some 30 for an image that is a numpy array, 5 for others
_MAX_LINE = 256  # characters of a number or a name

# What pickles of data consist of; INST, OBJ, NEWOBJ, EXT, PERSID, dicts, sets, DUP ... are refused.
_OPCODES = {
    "PROTO", "FRAME", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "INT", "LONG", "BININT",
    "BININT1", "BININT2", "LONG1", "STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES",
    "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE",
    "BINUNICODE8", "EMPTY_LIST", "LIST", "APPEND", "APPENDS", "EMPTY_TUPLE", "TUPLE", "TUPLE1",
    "TUPLE2", "TUPLE3", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET",
    "GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD",
}  # fmt: skip
# What follows each: a number of bytes, a line, or bytes after their number.
_ARGUMENTS = {
    opcode.code.encode("latin-1"): opcode.arg.n if opcode.arg else 0
    for opcode in pickletools.opcodes
    if opcode.name in _OPCODES
}
_COUNT_BYTES = {
    pickletools.TAKEN_FROM_ARGUMENT1: 1,
    pickletools.TAKEN_FROM_ARGUMENT4: 4,
    pickletools.TAKEN_FROM_ARGUMENT4U: 4,
    pickletools.TAKEN_FROM_ARGUMENT8U: 8,
}


def unpack_verification_bin(path: str | Path) -> tuple[list[bytes], list[bool]]:
    """The encoded images and truth values in a ``.bin``; images 2i and 2i + 1 are pair i.

    Pickles of all protocols are read, as Python 2 and 3 write them; an image may be bytes, a
    bytearray, text that holds one byte a character, or a numpy array of uint8, a truth value a
    bool, 0, 1 or numpy's. The images are not decoded.

    Raises:
        ValueError: the file cannot be read, is truncated, holds anything else, or there are not
            two images for each truth value.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no verification set {path}")
    if not path.stat().st_size:
        raise ValueError(f"{path} is truncated: it is empty")
    try:
        # Mapped, since a file that is no pickle may be larger than memory.
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _check_opcodes(data)
            images, same = _images_and_truth(_DataUnpickler(data).load())
    except _Refusal as refusal:
        raise ValueError(f"{path} must hold images and truth values alone, got {refusal}") from None
    except EOFError:
        raise ValueError(f"{path} is truncated: it ends before its pickle does") from None
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error
    except Exception as error:  # a broken pickle pops, looks up or decodes what is not there
        raise ValueError(
            f"{path} must be a pickle of images and truth values, got a broken one"
            f" ({type(error).__name__}: {str(error)[:80]})"
        ) from error
    _check_count(path, len(images), len(same))
    return images, same


def write_verification_bin(path: str | Path, images: Sequence[bytes], same: Sequence[bool]) -> None:
    """Write a ``.bin`` that InsightFace's readers load, under Python 2 as under Python 3.

    It is a pickle of protocol 2, the last that Python 2 knows, which all values of
    ``pickle.load``'s ``encoding`` turn into the same bytes. The file appears under its name when it
    is whole, and replaces another one only then.

    Args:
        path: the file to write; its folder is made.
        images: 2N encoded images, those of pair i at 2i and 2i + 1.
        same: N truth values, whether a pair shows one person.

    Raises:
        ValueError: there are no pairs, or not two images a pair; an image is not bytes, or empty,
            or a truth value no bool.
        OSError: the file cannot be written.
    """
    path = Path(path)
    _check_count(path, len(images), len(same))
    if not all(isinstance(image, bytes) and image for image in images):
        raise ValueError("images must be bytes, and none empty")
    if not all(isinstance(value, (bool, np.bool_)) for value in same):
        raise ValueError("same must hold bools")
    content = list(images), [bool(value) for value in same]
    with replacing(path) as part, part.open("wb") as file:
        pickle.dump(content, file, protocol=2)
        file.flush()
        os.fsync(file.fileno())


def _check_count(path: Path, num_images: int, num_pairs: int) -> None:
    if num_images != 2 * num_pairs or not num_pairs:
        raise ValueError(
            f"{path} must hold pairs, two images for each truth value,"
            f" got {num_images} images for {num_pairs} truth values"
        )


class _Refusal(ValueError):
    """What was found that may not be there."""


def _brief(value: Any) -> str:
    """A value for a message; containers may lie in themselves, and are not looked into."""
    if value is None or isinstance(value, (int, str, bytes)):
        return repr(value[:60] if isinstance(value, (str, bytes)) else value)[:60]
    return f"an object of type {type(value).__name__.strip('_').lower()}"


def _check_opcodes(data: mmap.mmap) -> None:
    """Refuse a pickle with opcodes that data does not need, or that claims more than it has.

    The unpickler allocates what lengths, frames and memo indices say before it looks further.
    """
    end = frame_end = 0
    for count in range(_MAX_OPCODES):
        start, code = end, data[end : end + 1]
        if not code:
            raise EOFError
        if code not in _ARGUMENTS:
            names = {opcode.code.encode("latin-1"): opcode.name for opcode in pickletools.opcodes}
            raise _Refusal(f"the opcode {names.get(code, repr(code))}")
        size, end = _ARGUMENTS[code], start + 1
        if size >= 0:
            end += size
        elif size == pickletools.UP_TO_NEWLINE:
            for _ in range(2 if code == pickle.GLOBAL else 1):
                line, end = end, data.find(b"\n", end) + 1
                if not end:
                    raise EOFError
                if end - line > _MAX_LINE and code not in (pickle.STRING, pickle.UNICODE):
                    raise _Refusal(f"a number or name of more than {_MAX_LINE} characters")
        else:
            width = _COUNT_BYTES[size]
            end += width + int.from_bytes(data[end : end + width], "little")
        if end > len(data):
            raise EOFError
        if start < frame_end < end or (code == pickle.FRAME and start < frame_end):
            raise _Refusal("frames that cut through opcodes")  # the unpickler would skip the rest
        if code == pickle.FRAME:
            frame_end = end + int.from_bytes(data[start + 1 : end], "little")
            if frame_end > len(data):
                raise EOFError
        elif code in (pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT):
            argument = data[start + 1 : end]
            index = int(argument) if code == pickle.PUT else int.from_bytes(argument, "little")
            if not 0 <= index <= count:  # the memo is an array
                raise _Refusal(f"memo index {index} after {count} opcodes")
        elif code == pickle.STOP:
            return
    raise _Refusal(f"more than {_MAX_OPCODES} opcodes")


class _DataUnpickler(pickle.Unpickler):
    """An unpickler of what passed ``_check_opcodes``; its names stand for the functions below."""

    def __init__(self, data: mmap.mmap) -> None:
        super().__init__(data, encoding="bytes")
        self._encodable = len(data)  # bytes that may still be made of text
        self._functions = {
            "_codecs.encode": self._encode,
            "numpy.dtype": _DType,
            "numpy.ndarray": _NDARRAY,
        }
        for module in ("builtins", "__builtin__"):
            self._functions |= {f"{module}.{name}": self._bytes for name in ("bytes", "bytearray")}
        for core in ("numpy.core", "numpy._core"):  # before and since numpy 2
            self._functions |= {
                f"{core}.multiarray._reconstruct": _reconstruct,
                f"{core}.multiarray.scalar": _scalar,
                f"{core}.numeric._frombuffer": _frombuffer,
            }

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full not in self._functions:
            raise _Refusal(f"the name {full[:_MAX_LINE]}")
        return self._functions[full]

    def _encode(self, text: Any, encoding: Any) -> bytes:
        """Python 3's bytes in protocols 0 to 2, and everyone's bytearray in those."""
        if not isinstance(text, str) or _text(encoding) not in ("latin1", "latin-1"):
            raise _Refusal(f"{_brief(text)} encoded as {_brief(encoding)}")
        self._encodable -= len(text)
        if self._encodable < 0:
            raise _Refusal("more encoded bytes than the file has")
        return text.encode("latin-1")

    def _bytes(self, value: Any = b"", encoding: Any = None) -> bytes:
        if isinstance(value, bytes) and encoding is None:
            return value
        return self._encode(value, encoding)


# Numpy's names for bytes, truth values and integers. Objects and structures have others.
_DTYPES = ("u1", "b1", "i1", "u2", "i2", "u4", "i4", "u8", "i8")
_NDARRAY = object()  # a pickle names numpy.ndarray only to pass it to _reconstruct


def _text(value: Any) -> str:
    """A name, which Python 2 writes as bytes."""
    if isinstance(value, bytes):
        return value.decode("latin-1")
    if not isinstance(value, str):
        raise _Refusal(f"{_brief(value)} instead of a name")
    return value


class _DType:
    """A numpy dtype of numbers. Pickles make it first, and say its byte order afterwards."""

    def __init__(self, name: Any, *_: Any) -> None:
        self.name, self.order = _text(name), "<"
        if self.name not in _DTYPES:
            raise _Refusal(f"numpy's dtype {_brief(name)}")

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 5:
            raise _Refusal("a malformed dtype")
        order = _text(state[1])
        if order not in ("|", "<", ">") or any(part is not None for part in state[2:5]):
            raise _Refusal("a structured dtype, or one of unknown byte order")
        self.order = order


class _Array:
    """A numpy array of numbers, as the bytes that it consists of."""

    def __init__(self) -> None:
        self.dtype = _DType("u1")
        self.data: bytes | bytearray = b""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise _Refusal("a malformed array")
        _, shape, dtype, _, data = state
        if not isinstance(dtype, _DType) or not isinstance(data, (bytes, bytearray)):
            raise _Refusal(f"an array made of {_brief(data)}")
        if (
            not isinstance(shape, tuple)
            or len(shape) > 64  # numpy's own limit
            or any(type(length) is not int or length < 0 for length in shape)
        ):
            raise _Refusal("an array of no valid shape")
        if math.prod(shape) * int(dtype.name[1]) != len(data):
            raise _Refusal(f"an array in {len(data)} bytes that its shape does not have")
        self.dtype, self.data = dtype, data

    def numbers(self) -> list[int]:
        name = self.dtype.name.replace("b", "u")  # so that what is neither 0 nor 1 shows
        numbers: list[int] = np.frombuffer(self.data, self.dtype.order + name).tolist()
        return numbers


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    """An empty array, to be filled by the opcode BUILD."""
    if kind is not _NDARRAY or shape != (0,) or code not in (b"b", "b"):
        raise _Refusal("a call of numpy's _reconstruct for something else than an empty array")
    return _Array()


def _frombuffer(data: Any, dtype: Any, shape: Any, *_: Any) -> _Array:
    array = _Array()
    array.__setstate__((1, shape, dtype, False, data))
    return array


def _scalar(dtype: Any, data: Any) -> int:
    return _frombuffer(data, dtype, (1,)).numbers()[0]


def _images_and_truth(content: Any) -> tuple[list[bytes], list[bool]]:
    """The unpickled object as what it should be."""
    if not isinstance(content, (list, tuple)) or len(content) != 2:
        raise _Refusal(f"{_brief(content)} instead of images and truth values")
    images, same = content
    if isinstance(same, _Array):
        same = same.numbers()
    for name, values in (("images", images), ("truth values", same)):
        if not isinstance(values, (list, tuple)):
            raise _Refusal(f"{_brief(values)} instead of a list of {name}")
    for value in same:
        if not (isinstance(value, int) and value in (0, 1)):
            raise _Refusal(f"the truth value {_brief(value)}")
    converted: dict[int, bytes] = {}  # the same data may occur often: convert it once
    encoded = []
    for i, image in enumerate(images):
        data = image.data if isinstance(image, _Array) and image.dtype.name == "u1" else image
        if not isinstance(data, (bytes, bytearray, str)):
            raise _Refusal(f"{_brief(image)} as image {i}")
        if id(data) not in converted:
            converted[id(data)] = bytes(data, "latin-1") if isinstance(data, str) else bytes(data)
        encoded.append(converted[id(data)])
    return encoded, [bool(value) for value in same]
