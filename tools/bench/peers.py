"""
What a user gets from others' tools: one function a peer, which yields a program for each setting worth trying.

Every setting is a `turns.Entrant`; `frontier.py` takes the best of each peer, by the same rule for all.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from edgeformer import data
from edgeformer.model import Model
from edgeformer.program import Program
from edgeformer_agent import wire
from edgeformer_agent.cases import Row
from tools.bench import shelf, turns
from tools.bench.turns import Entrant, Run

LENGTHS = (16, 32, 48, 64, 128)  # of what has static shapes
OPSET = 17


@dataclass(frozen=True)
class Kit:
    """
    What every peer is given. source: the model's folder; source_data: that of train.tsv and dev.tsv; calibration: rows
    that nothing is judged on; work: a folder that is kept.
    """

    source: Path
    model: Model
    source_data: Path
    rows: data.Rows
    calibration: data.Rows
    work: Path

    def kept(self, name: str, make: Callable[[Path], object]) -> Path:
        """A file in the work folder, made once for these weights; `name` says with what versions and settings."""
        path = self.folder / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=path.parent) as folder:
                make(Path(folder) / name)
                for file in sorted(Path(folder).iterdir(), key=lambda p: p.name == name):  # the named one last
                    file.replace(path.parent / file.name)
        return path

    @cached_property
    def folder(self) -> Path:
        """In the work folder, of these weights alone."""
        return self.work / hashlib.sha256((self.source / "model.safetensors").read_bytes()).hexdigest()[:16]

    def entrant(self, name: str, runtime: str, setting: str, run: Run, size_bytes: int) -> Entrant:
        return Entrant(name, runtime, setting, run, self.rows, size_bytes / 1e6, shelf.tokenizer_mb(self.model))


@dataclass(frozen=True)
class Peer:
    """`modules` are what it needs; `install` is what brings them."""

    name: str
    modules: tuple[str, ...]
    install: str
    settings: Callable[[Kit], Iterator[Entrant]]

    def missing(self) -> list[str]:
        return [name for name in self.modules if find_spec(name) is None]


class _Logits(torch.nn.Module):
    """The model as its users load it: ids, mask and types [B, N] -> logits [B, classes]."""

    def __init__(self, source: Path, attention: str) -> None:
        super().__init__()
        from transformers import AutoModelForSequenceClassification

        found = AutoModelForSequenceClassification.from_pretrained(source, attn_implementation=attention)
        self.model = found.float().eval()

    def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids).logits


def _example(kit: Kit, length: int, batch: int) -> tuple[torch.Tensor, ...]:
    return tuple(torch.ones(batch, length, dtype=torch.int64) for _ in kit.model.inputs)


def _names(kit: Kit) -> list[str]:
    return [x.name for x in kit.model.inputs]


# --- ONNX Runtime -----------------------------------------------------------------------------------------------------


def onnxruntime(kit: Kit) -> Iterator[Entrant]:
    """
    Dynamic int8 of the graph in which the transformers optimizer has fused attention, embeddings and normalization. It
    recognizes them in what the TorchScript exporter writes of eager attention; the newer exporter's graph keeps them
    apart, and is here with the project's usual setting.
    """
    fused, apart = _fused(kit, "eager"), _fused(kit, "sdpa")
    kinds = list(product((fused,), ("QInt8", "QUInt8"), (True, False), (False, True)))
    for path, kind, channels, reduced in [*kinds, (apart, "QInt8", True, False)]:
        setting = f"{path.stem.split('-')[1]}, {kind}, per {'channel' if channels else 'tensor'}"
        setting += ", reduced range" if reduced else ""
        yield _onnx(kit, "ONNX Runtime int8", _quantized(kit, path, kind, channels, reduced), setting)


def onnxruntime_fp32(kit: Kit) -> Entrant:
    """The model as it is: what differences are against."""
    return _onnx(kit, "ONNX Runtime fp32", _fused(kit, "eager"), "fused attention")


def _fused(kit: Kit, attention: str) -> Path:
    import onnxruntime as runtime
    from onnxruntime.transformers import optimizer

    def make(path: Path) -> None:
        config = kit.model.module.module.config  # type: ignore[union-attr]
        with tempfile.TemporaryDirectory() as folder:
            plain = f"{folder}/plain.onnx"
            _onnx_export(kit, attention, plain)
            options = {"num_heads": config.num_attention_heads, "hidden_size": config.hidden_size}
            optimizer.optimize_model(plain, "bert", opt_level=0, **options).save_model_to_file(str(path))

    kind = "fused attention" if attention == "eager" else "plain attention"
    return kit.kept(f"ort {runtime.__version__}-{kind}-fp32.onnx", make)


def _onnx_export(kit: Kit, attention: str, path: str) -> None:
    names, module, example = _names(kit), _Logits(kit.source, attention), _example(kit, 16, 2)
    axes = {name: {0: "batch", 1: "sequence"} for name in names} | {"logits": {0: "batch"}}
    torch.onnx.export(
        module, example, path, dynamo=False, opset_version=OPSET,
        input_names=names, output_names=["logits"], dynamic_axes=axes,
    )  # fmt: skip


def _quantized(kit: Kit, source: Path, kind: str, channels: bool, reduced: bool) -> Path:
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    def make(path: Path) -> None:
        kinds = {"weight_type": QuantType[kind], "per_channel": channels, "reduce_range": reduced}
        # The shapes behind a fused operator are unknown to the quantizer.
        quantize_dynamic(source, path, **kinds, extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT})

    return kit.kept(f"{source.stem}-{kind}-{channels:d}-{reduced:d}.onnx", make)


def _onnx(kit: Kit, name: str, path: Path, setting: str) -> Entrant:
    """By the agent's own runner, with the types that this graph takes."""
    import onnx

    content = path.read_bytes()
    types = {x.name: x.type.tensor_type.elem_type for x in onnx.load_from_string(content).graph.input}
    kinds = {onnx.TensorProto.INT32: "int32", onnx.TensorProto.INT64: "int64"}
    inputs = tuple(x._replace(dtype=kinds[types[x.name]]) for x in kit.model.inputs)
    program = Program(
        format="onnx", precision="int8", files={"model.onnx": content}, inputs=inputs,
        outputs=(kit.model.output._replace(name="logits"),), lengths=(),
        runtime=wire.Runtime("onnxruntime", "1", "2"), needs=wire.Needs(), work=(),
    )  # fmt: skip
    folder = kit.work / "open" / path.stem
    return turns.entrant(name, program, folder, kit.rows, shelf.tokenizer_mb(kit.model), setting)


# --- LiteRT -----------------------------------------------------------------------------------------------------------


def litert(kit: Kit) -> Iterator[Entrant]:
    """Dynamic int8 by the quantizer's own recipe; a signature for each length."""
    from ai_edge_litert import __version__ as version
    from ai_edge_quantizer import quantizer, recipe

    def make(path: Path) -> None:
        found = quantizer.Quantizer(str(_tflite(kit, version)), recipe.dynamic_wi8_afp32()).quantize()
        found.export_model(str(path))

    (program,) = shelf.load(kit.kept(f"litert {version}-int8.tflite", make), kit.model).programs
    folder, setting = kit.work / "open" / "litert", f"dynamic, per channel, lengths {', '.join(map(str, LENGTHS))}"
    yield turns.entrant("LiteRT int8", program, folder, kit.rows, shelf.tokenizer_mb(kit.model), setting)


def _tflite(kit: Kit, version: str) -> Path:
    import litert_torch

    def make(path: Path) -> None:
        module, converter = _Logits(kit.source, "sdpa"), litert_torch
        for length in LENGTHS:
            example = tuple(x.int() for x in _example(kit, length, 1))
            converter = converter.signature(f"length_{length}", module, example)
        converter.convert().export(str(path))

    return kit.kept(f"litert {version}-fp32.tflite", make)


# --- OpenVINO ---------------------------------------------------------------------------------------------------------


def openvino(kit: Kit) -> Iterator[Entrant]:
    """Post-training int8 of weights and activations, and int8 weights alone, each with what is left in fp32 or bf16."""
    for path, what in ((_ptq(kit), "NNCF PTQ, transformer, mixed"), (_weights(kit), "NNCF int8 weights")):
        for rest in ("f32", "bf16"):
            yield _compiled(kit, "OpenVINO int8", path, rest, f"{what}, rest {rest}")


def openvino_float(kit: Kit) -> Iterator[Entrant]:
    for kind in ("f32", "bf16"):
        yield _compiled(kit, f"OpenVINO {kind.replace('f32', 'fp32')}", _openvino_model(kit), kind, "as it is")


def _openvino_model(kit: Kit) -> Path:
    import openvino as ov

    def make(path: Path) -> None:
        shapes = [(name, [-1, -1], ov.Type.i64) for name in _names(kit)]
        example = dict(zip(_names(kit), _example(kit, 16, 2), strict=True))
        found = ov.convert_model(_Logits(kit.source, "sdpa"), example_input=example, input=shapes)
        ov.save_model(found, path, compress_to_fp16=False)

    return kit.kept(f"openvino {ov.__version__[:8]}-fp32.xml", make)


def _ptq(kit: Kit) -> Path:
    import nncf
    import openvino as ov

    def make(path: Path) -> None:
        rows = nncf.Dataset(list(kit.calibration.rows), lambda row: _fed(kit, row))
        kinds = {"model_type": nncf.ModelType.TRANSFORMER, "preset": nncf.QuantizationPreset.MIXED}
        source = ov.Core().read_model(_openvino_model(kit))
        ov.save_model(nncf.quantize(source, rows, subset_size=len(kit.calibration.rows), **kinds), path)

    return kit.kept(f"nncf {nncf.__version__}-ptq.xml", make)


def _weights(kit: Kit) -> Path:
    import nncf
    import openvino as ov

    def make(path: Path) -> None:
        source = ov.Core().read_model(_openvino_model(kit))
        ov.save_model(nncf.compress_weights(source, mode=nncf.CompressWeightsMode.INT8_SYM), path)

    return kit.kept(f"nncf {nncf.__version__}-weights.xml", make)


def _compiled(kit: Kit, name: str, path: Path, precision: str, setting: str) -> Entrant:
    """Dynamic shapes. OpenVINO has no runner in the agent: this is its own interface, called in its cheapest way."""
    import openvino as ov

    options = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": 1, "ENABLE_CPU_PINNING": False}
    compiled = ov.Core().compile_model(path, "CPU", options | {"INFERENCE_PRECISION_HINT": precision})
    request = compiled.create_infer_request()

    def run(row: Row) -> np.ndarray:
        found = request.infer(_fed(kit, row), share_inputs=True, share_outputs=True)
        return np.array(found[0][0], np.float32)

    size = path.stat().st_size + path.with_suffix(".bin").stat().st_size
    return kit.entrant(name, f"openvino {ov.__version__.partition('-')[0]}", setting, run, size)


def _fed(kit: Kit, row: Row) -> dict[str, np.ndarray]:
    return {name: row[name][None].astype(np.int64) for name in _names(kit)}


PEERS = (
    Peer("ONNX Runtime", ("onnx", "onnxruntime"), "pip install 'edgeformer[onnx]'", onnxruntime),
    Peer("LiteRT", ("litert_torch", "ai_edge_litert", "ai_edge_quantizer"), "pip install 'edgeformer[litert]'", litert),
    Peer("OpenVINO", ("openvino", "nncf"), "pip install 'edgeformer[peers]'", openvino),
)
