"""
Core ML packages without Core ML: reads the ML program and the weights of an .mlpackage with numpy only.

A program is read as Apple published its format (coremltools' Model.proto and MIL.proto, field numbers below); nothing
of a damaged package is used: `BadPackage` says which file breaks which rule. What the operators mean is in `mil_ops`.
"""

import os
import struct
from typing import Any, Dict, Iterator, List, NamedTuple, Optional, Tuple

import numpy as np

MODEL = "Data/com.apple.CoreML/model.mlmodel"
WEIGHTS = "Data/com.apple.CoreML/weights/weight.bin"
MAGIC = 0xDEADBEEF  # opens each record of the weights' file
RECORD = struct.Struct("<IIQQ")  # magic, storage type, bytes, where they are in the file
STRING = 2  # MIL's own number for it
DTYPES = {
    1: "bool", 10: "float16", 11: "float32", 12: "float64", 21: "int8", 22: "int16", 23: "int32", 24: "int64",
    31: "uint8", 32: "uint16", 33: "uint32", 34: "uint64",
}  # fmt: skip
PACKED = {25: (4, True), 35: (4, False), 36: (2, False), 37: (1, False), 38: (6, False), 39: (3, False)}  # bits, signed

Message = Dict[int, List[Any]]


class BadPackage(ValueError):
    """Not a Core ML package that can be read here; the message says what is wrong with it."""


class Type(NamedTuple):
    """Of a tensor; -1 in the shape is not known before the program runs."""

    number: int  # MIL's
    shape: Tuple[int, ...]

    @property
    def dtype(self):
        # type: () -> str
        """As numpy holds it: the small integers in whole bytes."""
        if self.number in PACKED:
            return "int8" if PACKED[self.number][1] else "uint8"
        if self.number not in DTYPES:
            raise BadPackage("tensors of MIL type {} cannot be read here".format(self.number))
        return DTYPES[self.number]


class Named(NamedTuple):
    """An input, or what an operation gives."""

    name: str
    type: Optional[Type]  # None for what is no tensor


class Ref(NamedTuple):
    """The name of a value that was computed before."""

    name: str


class Operation(NamedTuple):
    """`inputs` are lists of `Ref` or of constants."""

    kind: str
    inputs: Dict[str, List[Any]]
    outputs: Tuple[Named, ...]
    attributes: Dict[str, Any]


class Function(NamedTuple):
    """One entry of a program, all its shapes fixed by whoever wrote it."""

    inputs: Tuple[Named, ...]
    outputs: Tuple[str, ...]
    operations: Tuple[Operation, ...]
    opset: str


class Package:
    """An .mlpackage on disk. Functions are read when they are asked for; a constant that several share is read once."""

    def __init__(self, folder):
        # type: (str) -> None
        self.folder = folder
        self._weights = None  # type: Optional[bytes]
        self._blobs = {}  # type: Dict[Tuple[int, Type], Any]
        model = _message(_bytes(folder, MODEL), MODEL)
        self.version = int(_one(model, 1, 0))
        if 502 not in model:
            raise BadPackage("{}: holds no ML program (an older neural network?)".format(MODEL))
        program = _message(_one(model, 502, b""), MODEL)
        self._functions = dict(_pairs(program, 2, MODEL))

    @property
    def functions(self):
        # type: () -> Tuple[str, ...]
        return tuple(sorted(self._functions))

    def function(self, name):
        # type: (str) -> Function
        """Raises BadPackage, also for a name that is not there."""
        if name not in self._functions:
            raise BadPackage("{}: no function {!r}; there are {}".format(MODEL, name, ", ".join(self.functions)))
        body = _message(self._functions[name], MODEL)
        opset = _text(_one(body, 2, b""))
        blocks = dict(_pairs(body, 3, MODEL))
        if opset not in blocks:
            raise BadPackage("{}: function {} has no block for its opset {!r}".format(MODEL, name, opset))
        block = _message(blocks[opset], MODEL)
        operations = tuple(self._operation(data) for data in block.get(3, []))
        inputs = tuple(_named(data) for data in body.get(1, []))
        return Function(inputs, tuple(_text(x) for x in block.get(2, [])), operations, opset)

    def _operation(self, data):
        # type: (bytes) -> Operation
        body = _message(data, MODEL)
        kind = _text(_one(body, 1, b""))
        if 4 in body:
            raise BadPackage("{}: operation {} has blocks of its own (control flow); not read here".format(MODEL, kind))
        inputs = {
            key: [self._binding(x) for x in _message(argument, MODEL).get(1, [])]
            for key, argument in _pairs(body, 2, MODEL)
        }
        attributes = {key: self._value(value) for key, value in _pairs(body, 5, MODEL)}
        return Operation(kind, inputs, tuple(_named(x) for x in body.get(3, [])), attributes)

    def _binding(self, data):
        # type: (bytes) -> Any
        body = _message(data, MODEL)
        return Ref(_text(body[1][-1])) if 1 in body else self._value(_one(body, 2, b""))

    def _value(self, data):
        # type: (bytes) -> Any
        """An array, a string, or a list of these."""
        body = _message(data, MODEL)
        kind = _type(_one(body, 2, b""))
        if 5 in body:
            place = _message(body[5][-1], MODEL)
            if kind is None:
                raise BadPackage("{}: a constant in the weights' file is no tensor".format(MODEL))
            return self._blob(_text(_one(place, 1, b"")), int(_one(place, 2, 0)), kind)
        held = _message(_one(body, 3, b""), MODEL)
        if 3 in held:
            return [self._value(x) for x in _message(held[3][-1], MODEL).get(1, [])]
        return _immediate(_message(_one(held, 1, b""), MODEL), kind)

    def _blob(self, file, offset, kind):
        # type: (str, int, Type) -> Any
        if file != "@model_path/weights/weight.bin":
            raise BadPackage("{}: a constant lies in {!r}, not in weights/weight.bin".format(MODEL, file))
        if (offset, kind) not in self._blobs:
            if self._weights is None:
                self._weights = _bytes(self.folder, WEIGHTS)
            self._blobs[offset, kind] = _record(self._weights, offset, kind)
        return self._blobs[offset, kind]


def _bytes(folder, name):
    # type: (str, str) -> bytes
    try:
        with open(os.path.join(folder, name), "rb") as file:
            return file.read()
    except OSError as error:
        raise BadPackage("{}: {}".format(name, error.strerror or error))


def _record(weights, offset, kind):
    # type: (bytes, int, Type) -> Any
    """The tensor whose record begins at `offset`."""
    where = "{}: the constant at {}".format(WEIGHTS, offset)
    if offset % 64 or offset + RECORD.size > len(weights):
        raise BadPackage("{} lies outside the file of {} bytes, or not at a multiple of 64".format(where, len(weights)))
    magic, _, size, start = RECORD.unpack_from(weights, offset)
    if magic != MAGIC:
        raise BadPackage("{} does not begin with 0x{:X} but with 0x{:X}".format(where, MAGIC, magic))
    if start + size > len(weights):
        raise BadPackage("{} ends at {}, after the file's {} bytes".format(where, start + size, len(weights)))
    return _array(weights[start : start + size], kind, where)


def _array(data, kind, where):
    # type: (bytes, Type, str) -> Any
    count = _count(kind, where)
    bits = PACKED[kind.number][0] if kind.number in PACKED else 8 * np.dtype(kind.dtype).itemsize
    if len(data) < (count * bits + 7) // 8:
        raise BadPackage(
            "{} has {} bytes; {} {} of {} bits need {}".format(
                where, len(data), count, kind.dtype, bits, (count * bits + 7) // 8
            )
        )
    flat = _unpacked(data, count, kind.number) if kind.number in PACKED else np.frombuffer(data, kind.dtype, count)
    return flat.reshape(kind.shape)


def _count(kind, where):
    # type: (Type, str) -> int
    if -1 in kind.shape:
        raise BadPackage("{} has the open shape {}".format(where, kind.shape))
    count = 1
    for n in kind.shape:
        count *= n
    return count


def _unpacked(data, count, number):
    # type: (bytes, int, int) -> Any
    """Small integers, the first in the lowest bits."""
    bits, signed = PACKED[number]
    raw = np.frombuffer(data, np.uint8)
    if bits == 4:  # the fast way for what weights are
        flat = np.stack([raw & 15, raw >> 4], 1).reshape(-1)[:count]
    else:  # numpy 1.17 learnt another bit order; the agent's oldest is 1.13
        places = np.arange(count * bits)
        ones = (raw[places // 8] >> (places % 8).astype(np.uint8)) & 1
        flat = (ones.reshape(count, bits) << np.arange(bits, dtype=np.uint8)).sum(1).astype(np.uint8)
    return ((flat ^ 8).astype(np.int8) - 8).astype(np.int8) if signed else flat


def _immediate(tensor, kind):
    # type: (Message, Optional[Type]) -> Any
    """A constant inside the program."""
    field = next(iter(tensor), 0)
    held = _message(_one(tensor, field, b""), MODEL).get(1, []) if field else []
    if field == 4:
        texts = [_text(x) for x in held]
        return texts[0] if kind is None or not kind.shape else texts
    if kind is None:
        raise BadPackage("{}: a constant has no type".format(MODEL))
    where = "{}: a constant of shape {}".format(MODEL, kind.shape)
    if field == 7:
        return _array(bytes(held[-1]) if held else b"", kind, where)
    if field in (2, 3, 5):
        flat = np.array([number for x in held for number in _integers(x)], np.int64)  # type: Any
    else:
        flat = np.frombuffer(b"".join(bytes(x) for x in held), "<f8" if field == 6 else "<f4")
    count = _count(kind, where)
    if not flat.size and count:  # a single zero is left out of the file
        flat = np.zeros(count)
    if flat.size != count:
        raise BadPackage("{} holds {} values".format(where, flat.size))
    return flat.astype(kind.dtype).reshape(kind.shape)


def _integers(x):
    # type: (Any) -> Iterator[int]
    """A repeated integer: one of several, or all of them packed."""
    if isinstance(x, int):
        yield _signed(x)
        return
    place = 0
    while place < len(x):
        value, place = _varint(x, place, MODEL)
        yield _signed(value)


def _signed(value):
    # type: (int) -> int
    return value - (1 << 64) if value >> 63 else value


def _named(data):
    # type: (bytes) -> Named
    body = _message(data, MODEL)
    return Named(_text(_one(body, 1, b"")), _type(_one(body, 2, b"")))


def _type(data):
    # type: (bytes) -> Optional[Type]
    body = _message(data, MODEL)
    if 1 not in body:
        return None
    tensor = _message(body[1][-1], MODEL)
    shape = []
    for x in tensor.get(3, []):
        dimension = _message(x, MODEL)
        shape.append(int(_one(_message(dimension[1][-1], MODEL), 1, 0)) if 1 in dimension else -1)
    return Type(int(_one(tensor, 1, 0)), tuple(shape))


# --- protocol buffers -------------------------------------------------------------------------------------------------


def _message(data, where):
    # type: (Any, str) -> Message
    """Field number -> its values in order: integers, or bytes."""
    if isinstance(data, int):
        raise BadPackage("{}: a number where a message should be".format(where))
    found = {}  # type: Message
    value = None  # type: Any
    place, end = 0, len(data)
    while place < end:
        key, place = _varint(data, place, where)
        wire = key & 7
        if wire == 0:
            value, place = _varint(data, place, where)
        else:
            if wire == 2:
                size, place = _varint(data, place, where)
            elif wire in (1, 5):
                size = 8 if wire == 1 else 4
            else:
                raise BadPackage("{}: not a protocol buffer (wire type {})".format(where, wire))
            if place + size > end:
                raise BadPackage("{}: ends in the middle of a message".format(where))
            value, place = data[place : place + size], place + size
        found.setdefault(key >> 3, []).append(value)
    return found


def _varint(data, place, where):
    # type: (Any, int, str) -> Tuple[int, int]
    value = shift = 0
    while place < len(data) and shift < 70:
        byte = data[place]
        place += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, place
        shift += 7
    raise BadPackage("{}: ends in the middle of a number".format(where))


def _one(message, field, default):
    # type: (Message, int, Any) -> Any
    values = message.get(field)
    return values[-1] if values else default


def _pairs(message, field, where):
    # type: (Message, int, str) -> Iterator[Tuple[str, Any]]
    """The entries of a map."""
    for data in message.get(field, []):
        entry = _message(data, where)
        yield _text(_one(entry, 1, b"")), _one(entry, 2, b"")


def _text(data):
    # type: (Any) -> str
    try:
        return str(bytes(data).decode("utf-8"))
    except (UnicodeDecodeError, TypeError):
        raise BadPackage("{}: a name that is no text".format(MODEL))
