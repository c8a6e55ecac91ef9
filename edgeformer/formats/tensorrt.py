"""
ONNX of opset 13 for TensorRT 8.2 (JetPack 4.6), and the sources from which the device builds what runs it.

`model.onnx` is in standard operators and runs anywhere. A model with sparse attention has `plugin.onnx` beside it,
where each such layer is one node of our plugin. The device compiles plugin and runner with its own nvcc (there is no
cross compiler for it here) and builds the engine once. Both files are fp32: `build.txt` says in which precision the
engine is built, which nodes stay fp32 in it, and for which sizes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from edgeformer_agent import wire

from .. import data, native, onnx_graph, rounding
from ..attention import onnx_function
from ..errors import ExportError
from ..model import Model
from ..program import Program
from ..tensorrt import lower, ranges, rules

PRECISIONS = ("fp16", "fp32")
RUNTIME = wire.Runtime("tensorrt", "8.2", "8.3")
GLIBC = "2.27"  # of JetPack 4.6, which TensorRT 8.2 comes with
BYTES = {"fp16": 2, "fp32": 4}
BATCH = (1, 1, 4)  # least, usual, most rows of the engine's profile
USUAL_LENGTH = 128


def export(model: Model, precisions: Sequence[str]) -> Iterator[Program]:
    """Any batch up to 4, any length up to `model.max_length`. Raises ExportError, naming what would be refused."""
    traced = onnx_graph.trace(replace(model, past=None), "tensorrt")  # it does not generate
    sparse = onnx_function.present(traced)
    made = {"model.onnx": lower.standard(traced)} | ({"plugin.onnx": lower.with_plugin(traced)} if sparse else {})
    if "fp16" in precisions:
        seen = ranges.peaks(made["model.onnx"].proto, data.load(model, None, None).rows)
        chosen = rounding.chosen(model, "fp16")
        made = {name: _kept(lowered, seen, chosen) for name, lowered in made.items()}
    for name, lowered in made.items():
        rules.hold(lowered.proto, f"{model.name}, {name}", lowered.fp32 if "fp16" in precisions else None)
    files = {name: lowered.proto.SerializeToString(deterministic=True) for name, lowered in made.items()}
    work = onnx_graph.work(traced, model)
    for precision in precisions:
        share = BYTES[precision] / 4
        yield Program(
            format="tensorrt",
            precision=precision,
            files={**files, "build.txt": _plan(model, precision, made), **_sources(sparse)},
            inputs=model.inputs,
            outputs=(model.output,),
            lengths=(),
            runtime=RUNTIME,
            needs=wire.Needs(glibc=GLIBC),
            work=tuple(
                w._replace(weight_bytes=w.weight_bytes * share, activation_bytes=w.activation_bytes * share)
                for w in work
            ),
        )


def _kept(lowered: lower.Lowered, seen: Mapping[str, float], chosen: rounding.Chosen) -> lower.Lowered:
    """What the model asks in fp32, and what fp16 has no room for, stays fp32 as well."""
    asked = lower.layers(lowered.proto, chosen)
    return lowered.with_fp32([*ranges.loud(lowered.proto, seen), *asked])


def _plan(model: Model, precision: str, made: dict[str, lower.Lowered]) -> bytes:
    """Lines of words, which the runner's C++ reads: precision, a size profile for each input, nodes that stay fp32."""
    most = max(model.max_length, 1)
    lengths = (1, min(USUAL_LENGTH, most), most)
    lines = [f"precision {precision}"]
    for x in model.inputs:
        sizes = [
            "x".join(str(rows if i == 0 else length if n < 0 else n) for i, n in enumerate(x.shape))
            for rows, length in zip(BATCH, lengths, strict=True)
        ]
        lines.append(f"input {x.name} {' '.join(sizes)}")
    for name, lowered in made.items():
        lines += [f"fp32 {name} {_word(node)}" for node in lowered.fp32]
    return ("\n".join(lines) + "\n").encode()


def _word(name: str) -> str:
    if len(name.split()) != 1:
        raise ExportError(f"tensorrt: node name {name!r} must be one word, to be named in build.txt")
    return name


def _sources(sparse: bool) -> dict[str, bytes]:
    """What the device compiles, next to the program."""
    names = ("runner.cc", *(("dsa_plugin.cu", "dsa_kernels.cuh") if sparse else ()))
    return {name: (native.sources() / "tensorrt" / name).read_bytes() for name in names}
