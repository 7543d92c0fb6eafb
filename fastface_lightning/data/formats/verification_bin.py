"""A verification ``.bin`` is a pickle, read here by an interpreter that knows data but no code.

The field exchanges LFW, CFP-FP, AgeDB-30 and their kin as pickles of (2N encoded images, N truth
values). Loading a pickle runs whatever it asks for, so a downloaded one is not loaded: this file
goes through its opcodes and builds lists, numbers, bytes and arrays of bytes. There is nothing else
that it could build or call. It allocates no more than in proportion to the file.
"""

import math
import pickle
import pickletools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from ...files import replacing

_LATIN_1 = ("latin1", "latin-1")
_LONGEST_NUMBER = 32  # characters
_LONGEST_NAME = 256  # characters
_ESCAPE = re.compile(rb"\\(?:[\\'\"nrt]|x[0-9a-f]{2})")  # all that Python 2 writes


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
    try:
        with path.open("rb") as file:
            images, same = _lists(_Machine(file, path.stat().st_size).run())
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

    It is a pickle of protocol 2, the last that Python 2 knows, of a list of bytes and a list of
    bools. In that protocol Python 3 writes bytes as Latin-1 text to be encoded, half as long again
    for a JPEG, which both Pythons and all values of ``pickle.load``'s ``encoding`` turn into the
    same bytes.

    The file appears under its name when it is whole, and replaces another one only then.

    Args:
        path: the file to write, in a folder that exists.
        images: 2N encoded images, those of pair i at 2i and 2i + 1.
        same: N truth values, whether a pair shows one person.

    Raises:
        ValueError: there are no pairs, or not two images a pair; an image is not bytes, or empty,
            or a truth value no bool; the file cannot be written.
    """
    path = Path(path)
    _check_count(path, len(images), len(same))
    for i, image in enumerate(images):
        if not isinstance(image, bytes) or not image:
            raise ValueError(f"image {i} must be bytes, got {_brief(image)}")
    for value in same:
        if not isinstance(value, (bool, np.bool_)):
            raise ValueError(f"same must hold bools, got {_brief(value)}")
    content = list(images), [bool(value) for value in same]
    with replacing(path) as part:
        part.write_bytes(pickle.dumps(content, protocol=2))


def _check_count(path: Path, num_images: int, num_pairs: int) -> None:
    if num_images != 2 * num_pairs or not num_pairs:
        raise ValueError(
            f"{path} must hold pairs, two images for each truth value,"
            f" got {num_images} images for {num_pairs} truth values"
        )


class _Refusal(ValueError):
    """What was found that may not be there."""


def _lists(content: Any) -> tuple[list[bytes], list[bool]]:
    """The unpickled object as what it should be."""
    if not isinstance(content, (list, tuple)) or len(content) != 2:
        raise _Refusal(f"{_brief(content)} instead of images and truth values")
    images, same = content
    if isinstance(same, _Array):
        same = same.numbers()
    for what, values in (("images", images), ("truth values", same)):
        if not isinstance(values, (list, tuple)):
            raise _Refusal(f"{_brief(values)} instead of a list of {what}")
    converted: dict[int, bytes] = {}  # an image may occur often: convert it once
    for i, image in enumerate(images):
        if id(image) not in converted:
            converted[id(image)] = _image(image, i)
    for value in same:
        if not (isinstance(value, int) and value in (0, 1)):
            raise _Refusal(f"the truth value {_brief(value)}")
    return [converted[id(image)] for image in images], [bool(value) for value in same]


def _image(image: Any, index: int) -> bytes:
    if isinstance(image, bytes):
        return image
    if isinstance(image, str):
        return image.encode("latin-1")
    if isinstance(image, _Array) and image.dtype.name == "u1":
        return image.data
    raise _Refusal(f"{_brief(image)} as image {index}")


def _brief(value: Any) -> str:
    """A value for a message; what it holds is not looked at, which might take for ever."""
    if isinstance(value, (str, bytes)):
        return repr(value[:60])
    if value is None or isinstance(value, int):
        return repr(value)[:60]
    if isinstance(value, _Array):
        return f"an array of numpy's dtype {value.dtype.name!r}"
    return f"a {type(value).__name__.lstrip('_').lower()}"


# Numpy's names for bytes, truth values and integers. Objects and structures have others.
_DTYPES = ("u1", "b1", "i1", "u2", "i2", "u4", "i4", "u8", "i8")


@dataclass(eq=False)
class _DType:
    """A numpy dtype. Pickles make it first, and say its byte order when it is referred to."""

    name: str
    order: str = "<"

    @property
    def size(self) -> int:
        return int(self.name[1])

    def set_state(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) < 5:
            raise _Refusal("a malformed dtype")
        if any(part is not None for part in state[2:5]):
            raise _Refusal("a structured dtype")
        order = _text(state[1])
        if order not in ("|", "<", ">"):
            raise _Refusal(f"a dtype of byte order {_brief(order)}")
        self.order = order


@dataclass(eq=False)
class _Array:
    """A numpy array of numbers, as the bytes that it consists of."""

    dtype: _DType
    data: bytes

    @classmethod
    def of(cls, shape: Any, dtype: Any, data: Any) -> "_Array":
        array = cls(_DType("u1"), b"")
        array.set_state((1, shape, dtype, False, data))
        return array

    def set_state(self, state: Any) -> None:
        if not isinstance(state, tuple) or len(state) != 5:
            raise _Refusal("a malformed array")
        _, shape, dtype, _, data = state
        if not isinstance(dtype, _DType) or not isinstance(data, bytes):
            raise _Refusal(f"an array made of {_brief(data)}")
        if not isinstance(shape, tuple) or len(shape) > 64:  # numpy's own limit
            raise _Refusal("an array without a shape")
        if any(type(length) is not int or length < 0 for length in shape):
            raise _Refusal("an array of no valid shape")
        if math.prod(shape) * dtype.size != len(data):
            raise _Refusal(f"an array of shape {shape} in {len(data)} bytes"[:200])
        self.dtype, self.data = dtype, data

    def numbers(self) -> list[int]:
        name = self.dtype.name.replace("b", "u")  # so that what is neither 0 nor 1 shows
        numbers: list[int] = np.frombuffer(self.data, self.dtype.order + name).tolist()
        return numbers


def _text(value: Any) -> str:
    """A name, which Python 2 writes as bytes."""
    if isinstance(value, bytes):
        return value[:_LONGEST_NAME].decode("latin-1")
    if not isinstance(value, str):
        raise _Refusal(f"{_brief(value)} instead of a name")
    return value


def _encode(text: Any, encoding: Any) -> bytes:
    """Python 3's bytes in protocols 0 to 2, and everyone's bytearray in those."""
    if not isinstance(text, str):
        raise _Refusal(f"an encoding of {_brief(text)}")
    if _text(encoding) not in _LATIN_1:
        raise _Refusal(f"a call of _codecs.encode with the encoding {_brief(encoding)}")
    return text.encode("latin-1")


def _bytes(value: Any = b"", encoding: Any = None) -> bytes:
    if isinstance(value, bytes) and encoding is None:
        return value
    return _encode(value, encoding)


def _dtype(name: Any, align: Any = False, copy: Any = True) -> _DType:  # noqa: ARG001
    if _text(name) not in _DTYPES:
        raise _Refusal(f"numpy's dtype {_brief(name)}")
    return _DType(_text(name))


def _reconstruct(kind: Any, shape: Any, code: Any) -> _Array:
    """An empty array, to be filled by the opcode BUILD."""
    if kind is not _FUNCTIONS["numpy.ndarray"] or shape != (0,) or code not in (b"b", "b"):
        raise _Refusal("a call of numpy's _reconstruct for something else than an empty array")
    return _Array(_DType("u1"), b"")


def _frombuffer(data: Any, dtype: Any, shape: Any, order: Any, axes: Any = None) -> _Array:  # noqa: ARG001
    return _Array.of(shape, dtype, data)


def _scalar(dtype: Any, data: Any) -> int:
    return _Array.of((1,), dtype, data).numbers()[0]


def _not_callable(*args: Any) -> None:  # noqa: ARG001
    raise _Refusal("a call of numpy.ndarray")


@dataclass(eq=False)
class _Function:
    """Stands for a function that a pickle names; what it calls is ours."""

    call: Callable[..., Any]


_FUNCTIONS = {
    "_codecs.encode": _Function(_encode),
    "numpy.dtype": _Function(_dtype),
    "numpy.ndarray": _Function(_not_callable),
    **{
        f"{builtins}.{name}": _Function(_bytes)
        for builtins in ("builtins", "__builtin__")
        for name in ("bytes", "bytearray")
    },
    **{
        f"numpy.{core}.{name}": _Function(call)
        for core in ("core", "_core")  # before and since numpy 2
        for name, call in (
            ("multiarray._reconstruct", _reconstruct),
            ("multiarray.scalar", _scalar),
            ("numeric._frombuffer", _frombuffer),
        )
    },
}


class _Machine:
    """Goes through a pickle's opcodes with a stack, marks on it, and a memo of what was built.

    Args:
        file: the pickle, to be read from where it stands.
        size: of the whole file, bytes; nothing in it can be longer.
    """

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        self._encodable = size  # bytes that calls may still make
        self._stack: list[Any] = []
        self._below: list[list[Any]] = []  # the stacks beneath the marks
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        """The object that the pickle describes."""
        while (code := self.take(1)) != pickle.STOP:
            if code in _VALUES:
                value = _VALUES[code](self)  # which may put another stack in place
                self._stack.append(value)
            elif code in _ACTIONS:
                _ACTIONS[code](self)
            else:
                raise _Refusal(_opcode(code))
        return self._stack.pop()

    def take(self, count: int) -> bytes:
        """The next bytes of the file."""
        if count > self._size:  # before anything is allocated for them
            raise EOFError
        data = self._file.read(count)
        if len(data) < count:
            raise EOFError
        return data

    def number(self, width: int, signed: bool = False) -> int:
        """An integer of ``width`` bytes."""
        return int.from_bytes(self.take(width), "little", signed=signed)

    def block(self, width: int) -> bytes:
        """Bytes after their own number, which takes ``width`` bytes."""
        return self.take(self.number(width))

    def line(self, limit: int | None = None) -> bytes:
        """The rest of a line."""
        line = self._file.readline(-1 if limit is None else limit + 1)
        if line.endswith(b"\n"):
            return line[:-1]
        if limit is not None and len(line) > limit:
            raise _Refusal(f"the line {_brief(line)} of more than {limit} characters")
        raise EOFError

    def numeral(self) -> int:
        """An integer in decimal digits, on a line."""
        return int(self.line(_LONGEST_NUMBER))

    def quoted(self) -> bytes:
        """A string as Python 2 displays it, on a line."""
        line = self.line()
        if len(line) < 2 or line[:1] != line[-1:] or line[:1] not in (b"'", b'"'):
            raise _Refusal(f"the string {_brief(line)} without its quotes")
        if b"\\" in _ESCAPE.sub(b"", line[1:-1]):
            raise _Refusal(f"an unknown escape in the string {_brief(line)}")
        return line[1:-1].decode("unicode_escape").encode("latin-1")

    def text(self, width: int) -> str:
        """UTF-8 after the number of its bytes."""
        return self.block(width).decode("utf-8", "surrogatepass")

    def items(self) -> list[Any]:
        """What lies above the last mark, which goes away with it."""
        items, self._stack = self._stack, self._below.pop()
        return items

    def mark(self) -> None:
        self._below.append(self._stack)
        self._stack = []

    def tuple_of(self, count: int) -> None:
        if len(self._stack) < count:
            raise IndexError("too few items for a tuple")
        self._stack[-count:] = [tuple(self._stack[-count:])]

    def append(self, items: list[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            raise _Refusal(f"an append to {_brief(self._stack[-1])}")
        self._stack[-1].extend(items)

    def remember(self, key: int) -> None:
        self._memo[key] = self._stack[-1]

    def function(self) -> _Function:
        """A function named on two lines."""
        return self.named(*(self.line(_LONGEST_NAME).decode() for _ in range(2)))

    def stacked_function(self) -> _Function:
        """A function named by two strings on the stack."""
        name, module = self._stack.pop(), self._stack.pop()
        return self.named(_text(module), _text(name))

    @staticmethod
    def named(module: str, name: str) -> _Function:
        full = f"{module}.{name}"
        if full not in _FUNCTIONS:
            raise _Refusal(f"a call of {full[:_LONGEST_NAME]}")
        return _FUNCTIONS[full]

    def call(self) -> Any:
        args, function = self._stack.pop(), self._stack.pop()
        if not isinstance(function, _Function) or not isinstance(args, tuple):
            raise _Refusal(f"a call of {_brief(function)}")
        result = function.call(*args)
        if isinstance(result, bytes):
            self._encodable -= len(result)
        if self._encodable < 0:
            raise _Refusal("more encoded bytes than the file has")
        return result

    def build(self) -> None:
        state, target = self._stack.pop(), self._stack[-1]
        if not isinstance(target, (_DType, _Array)):
            raise _Refusal(f"{_opcode(pickle.BUILD)} of {_brief(target)}")
        target.set_state(state)


def _opcode(code: bytes) -> str:
    names = {opcode.code: opcode.name for opcode in pickletools.opcodes}
    name = names.get(code.decode("latin-1"))
    return f"the opcode {name}" if name else f"the byte {code!r}, which is no opcode"


# The opcodes that pickles of data consist of. What is not here (INST, OBJ, NEWOBJ, EXT, PERSID,
# buffers, dicts, sets, floats ...) is refused.
_VALUES: dict[bytes, Callable[[_Machine], Any]] = {
    pickle.NONE: lambda m: None,
    pickle.NEWTRUE: lambda m: True,
    pickle.NEWFALSE: lambda m: False,
    pickle.INT: _Machine.numeral,  # b"01" and b"00" stand for truth values, equal to these
    pickle.LONG: lambda m: int(m.line(_LONGEST_NUMBER).rstrip(b"L")),
    pickle.BININT: lambda m: m.number(4, signed=True),
    pickle.BININT1: lambda m: m.number(1),
    pickle.BININT2: lambda m: m.number(2),
    pickle.LONG1: lambda m: m.number(m.number(1), signed=True),
    pickle.STRING: _Machine.quoted,
    pickle.BINSTRING: lambda m: m.block(4),
    pickle.SHORT_BINSTRING: lambda m: m.block(1),
    pickle.BINBYTES: lambda m: m.block(4),
    pickle.SHORT_BINBYTES: lambda m: m.block(1),
    pickle.BINBYTES8: lambda m: m.block(8),
    pickle.BYTEARRAY8: lambda m: m.block(8),
    pickle.UNICODE: lambda m: m.line().decode("raw_unicode_escape"),
    pickle.BINUNICODE: lambda m: m.text(4),
    pickle.SHORT_BINUNICODE: lambda m: m.text(1),
    pickle.BINUNICODE8: lambda m: m.text(8),
    pickle.EMPTY_LIST: lambda m: [],
    pickle.LIST: _Machine.items,
    pickle.EMPTY_TUPLE: lambda m: (),
    pickle.TUPLE: lambda m: tuple(m.items()),
    pickle.GET: lambda m: m._memo[m.numeral()],
    pickle.BINGET: lambda m: m._memo[m.number(1)],
    pickle.LONG_BINGET: lambda m: m._memo[m.number(4)],
    pickle.GLOBAL: _Machine.function,
    pickle.STACK_GLOBAL: _Machine.stacked_function,
    pickle.REDUCE: _Machine.call,
}
_ACTIONS: dict[bytes, Callable[[_Machine], Any]] = {
    pickle.PROTO: lambda m: m.take(1),
    pickle.FRAME: lambda m: m.take(8),
    pickle.MARK: _Machine.mark,
    pickle.TUPLE1: lambda m: m.tuple_of(1),
    pickle.TUPLE2: lambda m: m.tuple_of(2),
    pickle.TUPLE3: lambda m: m.tuple_of(3),
    pickle.APPEND: lambda m: m.append([m._stack.pop()]),
    pickle.APPENDS: lambda m: m.append(m.items()),
    pickle.PUT: lambda m: m.remember(m.numeral()),
    pickle.BINPUT: lambda m: m.remember(m.number(1)),
    pickle.LONG_BINPUT: lambda m: m.remember(m.number(4)),
    pickle.MEMOIZE: lambda m: m.remember(len(m._memo)),
    pickle.BUILD: _Machine.build,
}
