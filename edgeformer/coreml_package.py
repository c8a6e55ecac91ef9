"""
From converted fp32 ML programs to one .mlpackage: a function a length, each weight once, any precision, the same bytes.

The converter is asked for fp32 only, once a length. Precision is a matter of storage and of declared types, so it is
set here, on the converted program; four precisions of a model cost one conversion, and rounding starts from fp32.
"""

from __future__ import annotations

import json
import tempfile
import uuid
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from coremltools import libmilstoragepython as storage
from coremltools.proto import FeatureTypes_pb2, MIL_pb2, Model_pb2

from edgeformer_agent import mil, wire

from .errors import ExportError
from .rounding import Chosen

_READER: Any = storage._BlobStorageReader  # Apple's own, in C++
_WRITER: Any = storage._BlobStorageWriter
MANIFEST = "Manifest.json"
IOS_18 = 9  # of the specification: several functions in a program came with it
LEAST_WEIGHT = 2048  # elements; smaller constants stay in floating point
GROUP = 32  # weights that share a scale in int4
TRIALS = np.linspace(0.7, 1.0, 7)  # of the largest weight of a group: clipping it may round the others better
MASKED = 30000.0  # what stands for "minus infinity": two of it still add up to a finite fp16 value
TINY = 2.0**-24  # the least fp16 value above 0
WEIGHT_OF = {("linear", "weight"), ("conv", "weight"), ("gather", "x")}  # output channels, or rows, first
BITS = {MIL_pb2.FLOAT32: 32, MIL_pb2.INT32: 32, MIL_pb2.FLOAT16: 16, MIL_pb2.INT8: 8, MIL_pb2.INT4: 4}


@dataclass(frozen=True)
class Converted:
    """What the converter made of one length: its specification, and the file its weights are in."""

    spec: Any
    weights: Path


@dataclass(frozen=True)
class Package:
    """Files by their path inside the package, and the work of each length."""

    files: Mapping[str, bytes]
    work: tuple[wire.Work, ...]


def assemble(converted: Mapping[int, Converted], precision: str, chosen: Chosen) -> Package:
    """
    `converted` by length; 0 where there is no sequence. Function `length_N` of the result is that of length N.
    `chosen`: what layers are stored in. Raises ExportError where one that must compute in fp32 is not in the program.
    """
    spec, work = Model_pb2.Model(specificationVersion=IOS_18), []
    spec.mlProgram.version = 1
    with tempfile.TemporaryDirectory() as folder:
        weights = _Weights(Path(folder) / "weight.bin", precision, chosen)
        for length, one in sorted(converted.items()):
            name, main = f"length_{length}", one.spec.mlProgram.functions["main"]
            function = spec.mlProgram.functions[name]
            function.CopyFrom(main)
            block = function.block_specializations[function.opset]
            reader = _READER(str(one.weights)) if one.weights.is_file() else None
            exact = _exact(block, reader, chosen)
            if precision != "fp32":
                _halve(function, block, exact)
            _store(block, reader, weights, exact)
            _describe(spec.description.functions.add(name=name), one.spec.description, precision)
            work.append(_work(function, block, length))
        spec.description.defaultFunctionName = f"length_{min(converted)}"
        files = {
            MANIFEST: _manifest(),
            mil.MODEL: spec.SerializeToString(deterministic=True),
            mil.WEIGHTS: weights.path.read_bytes() if weights.path.exists() else b"",
        }
    return Package(files, tuple(work))


# --- fp32 to fp16 -----------------------------------------------------------------------------------------------------


def _halve(function: Any, block: Any, exact: Collection[str]) -> None:
    """
    Every fp32 value of a program becomes fp16, but those that operations of `exact` give; constants in the weights'
    file are left to `_store`.
    """
    for named in (*function.inputs, *block.inputs):
        _half_type(named.type)
    for operation in block.operations:
        if operation.outputs[0].name in exact:
            continue
        for named in operation.outputs:
            _half_type(named.type)
        for value in _values(operation):
            _half_value(value)


def _values(operation: Any) -> Iterator[Any]:
    """Constants, in the order of their names: maps have none."""
    for key in sorted(operation.inputs):
        yield from (x.value for x in operation.inputs[key].arguments if x.WhichOneof("binding") == "value")
    yield from (operation.attributes[key] for key in sorted(operation.attributes) if key != "name")


def _half_type(kind: Any) -> None:
    if kind.tensorType.dataType == MIL_pb2.FLOAT32:
        kind.tensorType.dataType = MIL_pb2.FLOAT16


def _half_value(value: Any) -> None:
    tensor = value.immediateValue.tensor
    if value.type.tensorType.dataType == MIL_pb2.STRING and list(tensor.strings.values) == ["fp32"]:
        tensor.strings.values[:] = ["fp16"]  # what a cast casts to
    if value.type.tensorType.dataType != MIL_pb2.FLOAT32 or value.WhichOneof("value") == "blobFileValue":
        return
    _half_type(value.type)
    tensor.bytes.values = half(np.asarray(tensor.floats.values, np.float32)).tobytes()


def half(x: np.ndarray) -> np.ndarray:
    """Rounded to fp16. What is beyond it is a mask and stays finite; what would become 0 (an epsilon) does not."""
    x = np.where(np.abs(x) > np.finfo(np.float16).max, np.copysign(MASKED, x), x)
    if x.size == 1:
        x = np.where((x != 0) & (np.abs(x) < TINY), np.copysign(TINY, x), x)
    return x.astype(np.float16)


# --- layers that stay fp32 --------------------------------------------------------------------------------------------


def _exact(block: Any, reader: Any, chosen: Chosen) -> set[str]:
    """
    Rewrites the linear layers that must be computed in fp32, with casts around them and constants of their own. What
    the operations give that must stay as it is then, by name.
    """
    if not chosen.exact:
        return set()
    constants = {x.outputs[0].name: x for x in block.operations if x.type == "const"}
    types = {x.name: x.type for named in (block.inputs, *(o.outputs for o in block.operations)) for x in named}
    made: list[Any] = []
    exact: set[str] = set()
    found = set()
    for operation in block.operations:
        if path := _computed_in_fp32(operation, constants, reader, chosen):
            found.add(path)
            widened = list(_widened(operation, constants, types))
            exact |= {x.outputs[0].name for x in widened}
            made += widened
        else:
            made.append(operation)
    chosen.hold(found, "coreml")
    read = {x.name for o in made for argument in o.inputs.values() for x in argument.arguments} | {*block.outputs}
    kept = [x for x in made if x.type != "const" or x.outputs[0].name in read]
    del block.operations[:]
    block.operations.extend(kept)
    return exact


def _computed_in_fp32(operation: Any, constants: Mapping[str, Any], reader: Any, chosen: Chosen) -> str:
    """The path of a linear layer that must be; "" of anything else."""
    if operation.type != "linear":
        return ""
    weight = constants.get(operation.inputs["weight"].arguments[0].name)
    value = None if weight is None else weight.attributes["val"]
    if value is None or value.WhichOneof("value") != "blobFileValue":
        return ""
    tensor = value.type.tensorType
    return chosen.computed_in_fp32(_read(reader, tensor.dataType, value.blobFileValue.offset).reshape(_shape(tensor)))


def _widened(operation: Any, constants: Mapping[str, Any], types: Mapping[str, Any]) -> Iterator[Any]:
    """From fp16 to fp32, its constants, the layer, and back under the name of its output."""
    out = operation.outputs[0].name
    made = MIL_pb2.Operation()
    made.CopyFrom(operation)
    for key in sorted({"weight", "bias"} & {*operation.inputs}):
        (argument,) = made.inputs[key].arguments
        constant = MIL_pb2.Operation()
        constant.CopyFrom(constants[argument.name])
        argument.name = _renamed(constant, f"{out}_{key}_fp32")
        yield constant
    x = made.inputs["x"].arguments[0]
    yield from _cast(x.name, f"{out}_x_fp32", types[x.name], "fp32")
    x.name = f"{out}_x_fp32"
    _renamed(made, f"{out}_fp32")
    yield made
    yield from _cast(f"{out}_fp32", out, types[out], "fp16")


def _renamed(operation: Any, name: str) -> str:
    operation.outputs[0].name = name
    operation.attributes["name"].immediateValue.tensor.strings.values[:] = [name]
    return name


def _cast(x: str, to: str, kind: Any, dtype: str) -> Iterator[Any]:
    """A value of this type, cast; and the constant that says to what."""
    word = MIL_pb2.Operation(type="const")
    told = word.attributes["val"]
    told.type.tensorType.dataType = MIL_pb2.STRING
    told.immediateValue.tensor.strings.values.append(dtype)
    word.outputs.add(name=f"{to}_dtype").type.CopyFrom(told.type)
    made = MIL_pb2.Operation(type="cast")
    made.inputs["x"].arguments.add(name=x)
    made.inputs["dtype"].arguments.add(name=f"{to}_dtype")
    made.outputs.add(name=to).type.CopyFrom(kind)
    if dtype == "fp16":
        _half_type(made.outputs[0].type)
    for operation in (word, made):
        named = operation.attributes["name"]
        named.type.tensorType.dataType = MIL_pb2.STRING
        named.immediateValue.tensor.strings.values.append(operation.outputs[0].name)
        yield operation


# --- weights ----------------------------------------------------------------------------------------------------------


@dataclass
class _Weights:
    """The weights' file of a package. The same constant is written once, whatever function asks for it."""

    path: Path
    precision: str
    chosen: Chosen
    places: dict[Any, list[tuple[np.ndarray, int, int]]] = field(default_factory=dict)
    writer: Any = None

    def put(self, x: np.ndarray, kind: str) -> list[tuple[np.ndarray, int, int]]:
        """Data and, where it is quantized, scales: (array, MIL type, offset) each."""
        key = kind, x.shape, blake2b(x.tobytes()).digest()
        if key not in self.places:
            self.places[key] = [(y, number, self._write(y, number)) for y, number in self._rounded(x, kind)]
        return self.places[key]

    def _rounded(self, x: np.ndarray, kind: str) -> list[tuple[np.ndarray, int]]:
        if x.dtype != np.float32:
            return [(x, MIL_pb2.INT32)]
        stored = self._stored(x, kind)
        if stored in ("int8", "int4"):
            data, scale = _groups(x) if stored == "int4" else _channels(x)
            return [(data, MIL_pb2.INT4 if stored == "int4" else MIL_pb2.INT8), (scale, MIL_pb2.FLOAT16)]
        return [(x, MIL_pb2.FLOAT32)] if stored == "fp32" else [(half(x), MIL_pb2.FLOAT16)]

    def _stored(self, x: np.ndarray, kind: str) -> str:
        """Its precision: of a weight, a table (int8 at least), or any other constant."""
        if "fp32" in (self.precision, kind):
            return "fp32"
        if not kind:
            return "fp16"
        stored = self.chosen.of(x.reshape(len(x), -1), table=kind == "gather")
        if stored == "int4" and (kind == "gather" or x.ndim != 2):
            return "int8"
        return "fp16" if stored == "fp32" else stored

    def _write(self, x: np.ndarray, number: int) -> int:
        if self.writer is None:
            self.writer = _WRITER(str(self.path))
        flat = np.ascontiguousarray(x).reshape(-1)
        write: dict[int, Any] = {
            MIL_pb2.FLOAT32: lambda: self.writer.write_float_data(flat),
            MIL_pb2.FLOAT16: lambda: self.writer.write_fp16_data(flat.view(np.uint16)),
            MIL_pb2.INT32: lambda: self.writer.write_int32_data(flat),
            MIL_pb2.INT8: lambda: self.writer.write_int8_data(flat),
            MIL_pb2.INT4: lambda: self.writer.write_int4_data(flat),
        }
        return int(write[number]())


def _channels(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 and a scale an output channel, symmetric."""
    top = np.abs(x).max(tuple(range(1, x.ndim)), keepdims=True)
    scale = _scale(top / 127)
    return np.clip(np.rint(x / scale), -127, 127).astype(np.int8), scale.astype(np.float16)


def _groups(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int4 and a scale for each GROUP of inputs of a channel, the one of TRIALS with the least squared error."""
    blocks = x.reshape(x.shape[0], -1, GROUP)
    top = np.abs(blocks).max(2, keepdims=True)
    best = np.full(top.shape, np.inf, np.float32)
    scale = best.copy()
    for share in TRIALS:
        tried = _scale(top * np.float32(share) / 7)
        error = ((np.clip(np.rint(blocks / tried), -8, 7) * tried - blocks) ** 2).sum(2, keepdims=True)
        scale, best = np.where(error < best, tried, scale), np.minimum(error, best)
    data = np.clip(np.rint(blocks / scale), -8, 7).astype(np.int8)
    return data.reshape(x.shape), scale[..., 0].astype(np.float16)


def _scale(x: np.ndarray) -> np.ndarray:
    """As fp16 holds it, so that rounding to integers knows the true scale."""
    scale: np.ndarray = np.maximum(x, TINY * 1024).astype(np.float16).astype(np.float32)
    return scale


def _store(block: Any, reader: Any, weights: _Weights, exact: Collection[str]) -> None:
    """Copies every constant that a block has in its own weights' file into the common one; those of `exact` in fp32."""
    kinds = _weight_kinds(block)
    for operation in block.operations:
        name = operation.outputs[0].name
        for value in _values(operation):
            if value.WhichOneof("value") != "blobFileValue":
                continue
            tensor = value.type.tensorType
            shape = _shape(tensor)
            x = _read(reader, tensor.dataType, value.blobFileValue.offset).reshape(shape)
            kind = kinds.get(name, "") if prod(shape) >= LEAST_WEIGHT else ""
            placed = weights.put(x, "fp32" if name in exact else kind)
            if len(placed) == 1:
                _point(value, *placed[0])
                if weights.precision != "fp32" and name not in exact:
                    _half_type(operation.outputs[0].type)
            else:
                _compress(operation, placed)
                break


def _read(reader: Any, number: int, offset: int) -> np.ndarray:
    """The converter writes fp32, and indices as int32."""
    if number == MIL_pb2.INT32:
        return np.asarray(reader.read_int32_data(offset), np.int32)
    if number == MIL_pb2.FLOAT32:
        return np.asarray(reader.read_float_data(offset), np.float32)
    raise ExportError(f"coreml: a constant of MIL type {MIL_pb2.DataType.Name(number)}; known are FLOAT32 and INT32")


def _weight_kinds(block: Any) -> dict[str, str]:
    """Name of a constant -> what uses it as its weight, where every use of it is one; a table may also be a head's."""
    uses: dict[str, list[str]] = {}
    for operation in block.operations:
        for key, argument in operation.inputs.items():
            for x in argument.arguments:
                uses.setdefault(x.name, []).append(operation.type if (operation.type, key) in WEIGHT_OF else "")
    return {name: min(found) for name, found in uses.items() if "" not in found}


def _point(value: Any, x: np.ndarray, number: int, offset: int) -> None:
    """`value` becomes the tensor at this offset."""
    value.Clear()
    tensor = value.type.tensorType
    tensor.dataType, tensor.rank = number, x.ndim
    for n in x.shape:
        tensor.dimensions.add().constant.size = n
    value.blobFileValue.fileName = "@model_path/weights/weight.bin"
    value.blobFileValue.offset = offset


def _compress(operation: Any, placed: list[tuple[np.ndarray, int, int]]) -> None:
    """A `const` becomes the operator that computes it from integers and scales."""
    del operation.attributes["val"]
    operation.type = "constexpr_blockwise_shift_scale"
    for key, place in zip(("data", "scale"), placed, strict=True):
        _point(operation.inputs[key].arguments.add().value, *place)
    _half_type(operation.outputs[0].type)


# --- the rest of a package --------------------------------------------------------------------------------------------


def _describe(entry: Any, description: Any, precision: str) -> None:
    kinds = FeatureTypes_pb2.ArrayFeatureType
    entry.input.extend(description.input)
    entry.output.extend(description.output)
    for feature in (*entry.input, *entry.output):
        array = feature.type.multiArrayType
        if array.dataType == kinds.FLOAT32 and precision != "fp32":
            array.dataType = kinds.FLOAT16


def _manifest() -> bytes:
    """Apple's tools write random identifiers; these are names of what they identify."""
    items = {
        "model.mlmodel": "CoreML Model Specification",
        "weights": "CoreML Model Weights",
    }
    ids = {name: str(uuid.uuid5(uuid.NAMESPACE_URL, f"edgeformer:{name}")).upper() for name in items}
    entries = {
        ids[name]: {
            "author": "com.apple.CoreML",
            "description": said,
            "name": name,
            "path": f"com.apple.CoreML/{name}",
        }
        for name, said in items.items()
    }
    body = {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": entries,
        "rootModelIdentifier": ids["model.mlmodel"],
    }
    return json.dumps(body, indent=1, sort_keys=True).encode() + b"\n"


def _work(function: Any, block: Any, length: int) -> wire.Work:
    """Products of a finished block. A multiply-add is two operations; arithmetic is in floating point."""
    types = {x.name: x.type.tensorType for x in function.inputs}
    stored: dict[str, float] = {}
    transposed = set()
    flops = weight_bytes = activation_bytes = 0.0
    for operation in block.operations:
        types |= {x.name: x.type.tensorType for x in operation.outputs}
        if operation.type == "const" or operation.type.startswith("constexpr"):
            values = [v.type.tensorType for v in _values(operation) if v.WhichOneof("value") == "blobFileValue"]
            stored[operation.outputs[0].name] = sum(prod(_shape(t)) * BITS.get(t.dataType, 0) / 8 for t in values)
            held = _values(operation)  # and not attributes[...], which would add what is not there
            if any(list(v.immediateValue.tensor.bools.values) == [True] for v in held):
                transposed.add(operation.outputs[0].name)
        if operation.type not in ("linear", "matmul", "conv"):
            continue
        left, right = (operation.inputs[key].arguments[0].name for key in _operands(operation.type))
        out = types[operation.outputs[0].name]
        depth = _depth(operation, _shape(types[left]), _shape(types[right]), transposed)
        flops += 2.0 * prod(_shape(out)) * depth
        weight_bytes += stored.get(right, 0)
        moved = [types[left], out, *([] if right in stored else [types[right]])]
        activation_bytes += sum(prod(_shape(t)) * BITS[t.dataType] / 8 for t in moved)
    return wire.Work(length, flops, 0.0, weight_bytes, activation_bytes)


def _operands(kind: str) -> tuple[str, str]:
    return ("x", "y") if kind == "matmul" else ("x", "weight")


def _depth(operation: Any, left: tuple[int, ...], right: tuple[int, ...], true: set[str]) -> int:
    """Multiply-adds behind one output value; `true` names the constants that say so."""
    if operation.type != "matmul":
        return prod(right[1:])
    flag = operation.inputs["transpose_x"].arguments if "transpose_x" in operation.inputs else ()
    return left[-2 if any(x.name in true for x in flag) else -1]


def _shape(tensor: Any) -> tuple[int, ...]:
    return tuple(int(d.constant.size) for d in tensor.dimensions)
