"""
TensorRT as far as this machine goes: what is written is opset 13, passes the parser's rules, and computes what torch
computes. No TensorRT is here; the runner's stand-in says so.
"""

# ruff: noqa: E501 (tables of nodes, a case a line)

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import sparse_models  # noqa: E402
from onnx import TensorProto as T, helper  # noqa: E402
from test_formats import entry  # noqa: E402

import edgeformer as ef  # noqa: E402
from edgeformer import check, data, formats, model as models, onnx_graph, rounding  # noqa: E402
from edgeformer.attention import onnx_function  # noqa: E402
from edgeformer.errors import ExportError  # noqa: E402
from edgeformer.program import Program  # noqa: E402
from edgeformer.tensorrt import lower, ranges, rules  # noqa: E402
from edgeformer_agent import measure, runners  # noqa: E402


def llama() -> Any:
    import transformers as hf

    torch.manual_seed(0)
    text = {**families.TEXT, "max_position_embeddings": 64}
    config = hf.LlamaConfig(**text, num_key_value_heads=2, num_labels=3, pad_token_id=0)
    return hf.LlamaForSequenceClassification(config).eval()


def exported(model: models.Model) -> dict[str, Program]:
    return {p.precision: p for p in formats.load("tensorrt").export(model, ["fp16", "fp32"])}


def opened(program: Program, model: models.Model, folder: Path) -> Callable[[Any], Any]:
    for name, content in program.files.items():
        (folder / name).write_bytes(content)
    run: Callable[[Any], Any] = runners.load("tensorrt").load(str(folder / program.entry), entry(program, model), 1)
    return run


def proto_of(program: Program, name: str = "model.onnx") -> Any:
    return onnx.load_from_string(program.files[name])


def cosine(a: Any, b: Any) -> float:
    return float(np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.slow
@pytest.mark.parametrize("family", ("bert",))  # the others: test_families.py
def test_a_family_is_written_passes_and_agrees(family: str, tmp_path: Path) -> None:
    module = llama() if family == "llama" else families.tiny(family)
    model = models.load(module, name=family, lengths=None if family == "vit" else (48,))
    programs = exported(model)
    rows = data.load(model, None, None).rows[:12]
    wanted = check.reference(model, rows, lambda _: None)
    for precision, program in programs.items():
        proto = proto_of(program)
        assert {(o.domain, o.version) for o in proto.opset_import} == {("", 13)} and not proto.functions
        assert rules.breaches(proto) == []
        run = opened(program, model, tmp_path)
        found = [run(row) for row in rows]
        if precision == "fp32":
            for got, want in zip(found, wanted, strict=True):
                np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
        else:  # rounded, and not by much
            assert min(map(cosine, found, wanted)) > 0.995
            assert max(np.abs(a - b).max() for a, b in zip(found, wanted, strict=True)) > 1e-5
    half, full = programs["fp16"].work[-1], programs["fp32"].work[-1]
    assert half.flops == full.flops > 0 and 2 * half.weight_bytes == full.weight_bytes > 0


@pytest.mark.slow
@pytest.mark.parametrize("config", [{}, {"kv_heads": 1, "causal": 1, "n_sink": 1}], ids=["encoder", "causal-gqa"])
def test_a_sparse_model_has_a_file_with_and_one_without_the_plugin(config: dict[str, Any], tmp_path: Path) -> None:
    model = sparse_models.model(**config)
    programs = exported(model)
    for program in programs.values():
        assert list(program.files) == [
            "model.onnx", "plugin.onnx", "build.txt", "runner.cc", "dsa_plugin.cu", "dsa_kernels.cuh",
        ]  # fmt: skip
        kinds = [node.op_type for node in proto_of(program, "plugin.onnx").graph.node]
        assert kinds.count(lower.PLUGIN) == sparse_models.LAYERS
        assert lower.PLUGIN not in {node.op_type for node in proto_of(program).graph.node}
    plan = programs["fp16"].files["build.txt"].decode()
    selecting = [line for line in plan.splitlines() if line.startswith("fp32 model.onnx select_")]
    assert len(selecting) > 50 * sparse_models.LAYERS and plan.startswith(
        "precision fp16\ninput input_ids 1x1 1x96 4x96"
    )
    for batch, length in ((1, 96), (1, 1), (1, 33)):
        row = {name: x[0] for name, x in sparse_models.rows(batch, length).items()}
        want = model.module(*(torch.from_numpy(x[None]) for x in row.values()))[0].detach().numpy()
        for precision, program in programs.items():
            got = opened(program, model, tmp_path)(row)
            np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 if precision == "fp32" else 2e-2)
    session = ort.InferenceSession(programs["fp32"].files["model.onnx"], providers=["CPUExecutionProvider"])
    rows = sparse_models.rows(3, 70)
    want = model.module(*map(torch.from_numpy, rows.values())).detach().numpy()
    np.testing.assert_allclose(session.run(None, rows)[0], want, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_bundle_for_the_nano_verifies_and_is_measured_there_only(tmp_path: Path, config_home: Path) -> None:
    bundle = ef.build(
        families.tiny("bert"), "jetson-nano", precision=("fp16", "fp32"), lengths=(48,), out=tmp_path, name="tiny"
    )
    bundle.verify()
    names = {e.name: e for e in bundle.manifest.programs}
    assert set(names) == {"tensorrt-fp16", "tensorrt-fp32"} and all(e.checked.mean > 0.995 for e in names.values())
    assert {f"programs/tensorrt-fp16/{n}" for n in ("model.onnx", "build.txt", "runner.cc")} <= set(
        bundle.manifest.files
    )
    plan = measure.Options(1, None, 1, "/", True)  # type: ignore[arg-type]
    with pytest.raises(measure.Unavailable, match=r"tensorrt 0 \(none here; onnxruntime .* needs >=8\.2,<8\.3"):
        measure.measure(str(bundle.path), bundle.manifest, names["tensorrt-fp16"], plan)


def test_the_stand_in_claims_no_tensorrt_and_refuses_what_it_cannot(tmp_path: Path) -> None:
    runner = runners.load("tensorrt")
    assert runner.version() == f"0 (none here; onnxruntime {ort.__version__} stands in)"
    model = sparse_models.model()
    made = entry(
        Program("tensorrt", "int8", {"model.onnx": b""}, model.inputs, (model.output,), (), *(None,) * 2, ()),  # type: ignore[arg-type]
        model,
    )
    with pytest.raises(ValueError, match="'int8': this runner has fp16 and fp32"):
        runner.load("model.onnx", made)
    with pytest.raises(ValueError, match="built on the device"):
        runner.load("model.onnx", made, 1, "lib.so")


# --- lowering: one operator at a time, against ONNX Runtime -----------------------------------------------------------


def graph(nodes: list[Any], inputs: dict[str, Any], constants: dict[str, Any], opset: int = 20) -> Any:
    """A model whose output is `out`; the first axis of every input is free."""
    made = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(x.dtype), ["n", *x.shape[1:]] if x.ndim else []
        )
        for name, x in inputs.items()
    ]
    weights = [onnx.numpy_helper.from_array(np.asarray(x), name) for name, x in constants.items()]
    out = [onnx.ValueInfoProto(name="out")]
    proto = helper.make_model(
        helper.make_graph(nodes, "g", made, out, weights),
        opset_imports=[helper.make_opsetid("", opset), helper.make_opsetid(onnx_function.DOMAIN, 1)],
        ir_version=9,
    )
    typed = onnx.shape_inference.infer_shapes(proto)
    assert typed.graph.output[0].type.tensor_type.elem_type
    return typed


def computed(proto: Any, inputs: dict[str, Any]) -> Any:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"]).run(
        None, inputs
    )[0]


RANDOM = np.random.default_rng(0)
X = {"x": RANDOM.standard_normal((3, 4, 16)).astype(np.float32)}
IDS = {"x": RANDOM.integers(-5, 9, (3, 7)).astype(np.int64)}
GAIN = {"g": X["x"][0, 0], "b": X["x"][0, 1]}
node = helper.make_node
LOWERED = {
    "layer-norm": ([node("LayerNormalization", ["x", "g", "b"], ["out"], "n", epsilon=1e-3)], X, GAIN),
    "layer-norm-without-bias": ([node("LayerNormalization", ["x", "g"], ["out"], "n", axis=2)], X, GAIN),
    "gelu": ([node("Gelu", ["x"], ["out"], "n")], X, {}),
    "gelu-tanh": ([node("Gelu", ["x"], ["out"], "n", approximate="tanh")], X, {}),
    "reciprocal": ([node("Reciprocal", ["x"], ["out"], "n")], X, {}),
    "mean-axes-as-input": ([node("ReduceMean", ["x", "a"], ["out"], "n", keepdims=0)], X, {"a": np.array([1])}),
    "max-axes-as-input": ([node("ReduceMax", ["x", "a"], ["out"], "n")], X, {"a": np.array([-1])}),
    "sum-of-integers": ([node("ReduceSum", ["x", "a"], ["out"], "n")], IDS, {"a": np.array([-1])}),
    "smallest-integer": ([node("ReduceMin", ["x", "a"], ["out"], "n")], IDS, {"a": np.array([0])}),
    "cumulated-integers": ([node("CumSum", ["x", "a"], ["out"], "n")], IDS, {"a": np.array(1)}),
    "argmax-of-integers": ([node("ArgMax", ["x"], ["out"], "n", axis=-1, select_last_index=0)], IDS, {}),
    "clipped-integers": ([node("Clip", ["x", "a", "b"], ["out"], "n")], IDS, {"a": np.array(-2), "b": np.array(3)}),
    "part-of-a-shape": ([node("Shape", ["x"], ["out"], "n", start=-2, end=3)], X, {}),
    "modulo": ([node("Abs", ["x"], ["p"]), node("Mod", ["p", "a"], ["out"], "n")], IDS, {"a": np.array(4)}),
    "where-of-two-ranks": (
        [node("Greater", ["x", "z"], ["c"]), node("Where", ["c", "x", "g"], ["out"], "n")], X, {"z": np.float32(0), **GAIN},
    ),
    "and-true": (
        [node("Greater", ["x", "z"], ["c"]), node("And", ["t", "c"], ["d"], "n"), node("Cast", ["d"], ["out"], to=T.FLOAT)],
        X, {"z": np.float32(0), "t": np.array(True)},
    ),
    "or-true": (
        [node("Greater", ["x", "z"], ["c"]), node("Or", ["t", "c"], ["d"], "n"), node("Cast", ["d"], ["out"], to=T.FLOAT)],
        X, {"z": np.float32(0), "t": np.array(True)},
    ),
    "gathered-booleans": (
        [node("Greater", ["x", "z"], ["c"]), node("GatherND", ["c", "i"], ["d"], "n"), node("Cast", ["d"], ["out"], to=T.INT32)],
        IDS, {"z": np.array(0), "i": np.array([[0, 1], [2, 3]])},
    ),
    "equal-booleans": (
        [node("Greater", ["x", "z"], ["c"]), node("Equal", ["c", "t"], ["d"], "n"), node("Cast", ["d"], ["out"], to=T.FLOAT)],
        X, {"z": np.float32(0), "t": np.array(True)},
    ),
    "filled": (
        [node("Shape", ["x"], ["s"]), node("ConstantOfShape", ["s"], ["o"], "n", value=helper.make_tensor("", T.INT64, [1], [5])),
         node("Cast", ["o"], ["out"], to=T.INT32)],
        X, {},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", LOWERED)
def test_lowered_it_means_the_same_and_passes(name: str) -> None:
    nodes, inputs, constants = LOWERED[name]
    proto = graph(nodes, inputs, constants)
    made = lower.standard(proto).proto
    assert made.opset_import[0].version == 13 and rules.breaches(made) == []
    np.testing.assert_allclose(computed(made, inputs), computed(proto, inputs), rtol=0, atol=2e-6)


def test_what_overflows_or_counts_stays_fp32_and_what_multiplies_does_not() -> None:
    nodes = [
        node("LayerNormalization", ["x", "g", "b"], ["h"], "norm"),
        node("MatMul", ["h", "w"], ["m"], "product"),
        node("ReduceL2", ["m", "a"], ["out"], "length"),
    ]
    constants = {**GAIN, "w": np.eye(16, dtype=np.float32), "a": np.array([-1])}
    fp32 = lower.standard(graph(nodes, X, constants)).fp32
    assert len(fp32) == 10 and {name.split("/")[0] for name in fp32} == {"norm", "length"}


def test_a_root_mean_square_stays_fp32_up_to_its_reciprocal() -> None:
    nodes = [
        node("Pow", ["x", "two"], ["p"], "square"),
        node("ReduceMean", ["p", "a"], ["m"], "mean"),
        node("Add", ["m", "e"], ["s"], "shifted"),
        node("Sqrt", ["s"], ["r"], "root"),
        node("Reciprocal", ["r"], ["f"], "factor"),
        node("Mul", ["x", "f"], ["y"], "unit"),
        node("Add", ["y", "e"], ["out"], "next"),
    ]
    constants = {"two": np.float32(2), "a": np.array([-1]), "e": np.float32(1e-5)}
    loud = {"x": X["x"] * 9000}
    made = lower.standard(graph(nodes, loud, constants))
    assert [name.split("/")[0] for name in made.fp32] == ["square", "mean", "shifted", "root", "factor"]
    seen = ranges.peaks(made.proto, [{"x": row} for row in loud["x"]])
    assert (
        1e8 < seen["m"] < seen["p"]
        and 2e4 < np.abs(loud["x"]).max() < 3e4
        and set(ranges.loud(made.proto, seen)) < set(made.fp32)
    )


@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
def test_a_layer_asked_in_fp32_stays_so_with_its_bias(op: str) -> None:
    weight = RANDOM.standard_normal((16, 8)).astype(np.float32)
    x = {"x": RANDOM.standard_normal((3, 16)).astype(np.float32)}
    nodes = [
        node(op, ["x", "w"], ["y"], "product"),
        node("Add", ["y", "b"], ["z"], "bias"),
        node("Add", ["z", "z"], ["out"], "next"),
    ]
    made = graph(nodes, x, {"w": weight, "b": weight[0]}, opset=13)
    key = rounding._content(np.ascontiguousarray(weight.T))
    assert list(lower.layers(made, rounding.Chosen(("fp16", "fp16"), exact={key: "layer"}))) == ["product", "bias"]
    assert list(lower.layers(made, rounding.Chosen(("fp16", "fp16")))) == []
    with pytest.raises(ExportError, match="tensorrt: precisions: other = fp32: the program has no such linear layer"):
        list(lower.layers(made, rounding.Chosen(("fp16", "fp16"), exact={((8, 16), b""): "other"})))


@pytest.mark.slow
def test_what_is_seen_to_leave_fp16_stays_fp32(tmp_path: Path) -> None:
    up = "module.model.layers.1.mlp.up_proj"
    model = replace(families.loud(1e6), past=None, precisions={up: "fp32"})
    rows = data.load(model, None, None).rows[:16]
    wanted = check.reference(model, rows, lambda _: None)
    program = exported(model)["fp16"]
    made = lower.standard(onnx_graph.trace(model, "tensorrt"))
    plan = program.files["build.txt"].decode().splitlines()
    kept = {line.split()[2] for line in plan if line.startswith("fp32")}
    (asked,) = lower.layers(made.proto, rounding.chosen(model, "fp16"))
    assert kept > {asked, *made.fp32} and asked not in made.fp32
    without = [line for line in plan if not line.startswith("fp32") or line.split()[2] in made.fp32]
    changed = replace(program, files={**program.files, "build.txt": "\n".join(without).encode()})
    found = check.fidelity(model, [opened(program, model, tmp_path)(row) for row in rows], wanted, None)
    assert found.worst > 0.98
    run = opened(changed, model, tmp_path)
    assert not all(np.isfinite(run(row)).all() for row in rows)


def test_masks_fit_fp16() -> None:
    nodes = [node("Greater", ["x", "z"], ["c"]), node("Where", ["c", "x", "far"], ["out"], "n")]
    made = lower.standard(graph(nodes, X, {"z": np.float32(0), "far": np.float32(-3.4e38)}))
    assert computed(made.proto, X).min() == lower.MASKED and rules.breaches(made.proto, made.fp32) == []


def test_the_modelled_fp16_rounds_every_result_and_weight_outside_the_fp32_nodes(tmp_path: Path) -> None:
    nodes = [
        node("Mul", ["x", "w"], ["m"], "product"),
        node("Add", ["m", "w"], ["s"], "sum"),
        node("Neg", ["s"], ["out"], "last"),
    ]
    made = graph(nodes, X, {"w": GAIN["g"]}, opset=13)
    onnx.save(made, tmp_path / "model.onnx")
    runner = runners.load("tensorrt")

    def found(*exact: str) -> Any:
        return computed(onnx.load_from_string(runner._rounded(str(tmp_path / "model.onnx"), set(exact))), X)

    def half(x: Any) -> Any:
        return x.astype(np.float16).astype(np.float32)

    x, w = X["x"], half(GAIN["g"])
    np.testing.assert_array_equal(found(), -half(half(half(x) * w) + w))
    np.testing.assert_array_equal(
        found("product"), -half(half(x * w) + w)
    )  # what it gives is rounded where it is taken
    np.testing.assert_array_equal(found("product", "sum"), -half(x * GAIN["g"] + GAIN["g"]))
    np.testing.assert_array_equal(found("product", "sum", "last"), -(x * GAIN["g"] + GAIN["g"]))


# --- the checker: a seeded violation for each rule --------------------------------------------------------------------

INT = {"x": np.ones((2, 3), np.int32)}
BOOL = {"x": np.ones((2, 3), bool)}
WIDE = {"x": np.ones((1,) * 9, np.float32)}
ONE = {"x": np.ones((2, 3), np.float32)}
VIOLATIONS: dict[str, tuple[list[Any], dict[str, Any], dict[str, Any], str]] = {
    "an operator it does not have": ([node("Det", ["x"], ["out"], "n")], {"x": np.ones((2, 3, 3), np.float32)}, {}, "Det 'n'.*an operator of the parser"),
    "integers in a reduction": ([node("ReduceMax", ["x"], ["out"], "n", axes=[1])], INT, {}, "takes FP32/FP16, got INT32 in 'x'; cast"),
    "booleans gathered": ([node("Cast", ["x"], ["c"], to=T.BOOL), node("Gather", ["c", "i"], ["d"], "n"), node("Cast", ["d"], ["out"], to=T.INT32)], INT, {"i": np.array([0])}, "Gather 'n': takes .*got BOOL"),
    "a boolean input": ([node("Cast", ["x"], ["out"], to=T.FLOAT)], BOOL, {}, "value 'x': inputs and outputs are FP32, FP16 or INT32, got BOOL"),
    "a boolean output": ([node("Greater", ["x", "x"], ["out"], "n")], ONE, {}, "value 'out'.*got BOOL"),
    "a double input": ([node("Cast", ["x"], ["out"], to=T.FLOAT)], {"x": np.ones((2, 3))}, {}, "value 'x'.*got DOUBLE"),
    "a boolean weight": ([node("Cast", ["x"], ["c"], to=T.BOOL), node("And", ["c", "t"], ["d"]), node("Cast", ["d"], ["out"], to=T.INT32)], INT, {"t": np.array([True])}, "weight 't': weights are numbers, got BOOL"),
    "an integer of 64 bits": ([node("Add", ["x", "k"], ["out"])], {"x": np.ones((2, 3), np.int64)}, {"k": np.array([2**40])}, "weight 'k': INT64 becomes INT32, got 1099511627776"),
    "nine axes": ([node("Relu", ["x"], ["out"], "n")], WIDE, {}, "at most 8 axes, got 9 of 'x'"),
    "axes that are computed": ([node("Shape", ["x"], ["s"]), node("Slice", ["s", "a", "b"], ["t"]), node("Unsqueeze", ["x", "t"], ["out"], "n")], ONE, {"a": np.array([0]), "b": np.array([1])}, "Unsqueeze 'n': this input is an initializer"),
    "a shape made of values": ([node("Cast", ["x"], ["s"], to=T.INT64), node("Expand", ["one", "s"], ["out"], "n")], {"x": np.ones(2, np.float32)}, {"one": np.ones(1, np.float32)}, "Expand 'n': shapes come from shapes and constants, got 's'"),
    "ranks that differ": ([node("Greater", ["x", "z"], ["c"]), node("Where", ["c", "x", "z"], ["out"], "n")], ONE, {"z": np.float32(0)}, r"Where 'n': operands of one rank, got ranks \[0, 2\]"),
    "the smallest of TopK": ([node("TopK", ["x", "k"], ["out", "i"], "n", largest=0)], ONE, {"k": np.array([2])}, "largest=0"),
    "the last of equals": ([node("ArgMax", ["x"], ["out"], "n", select_last_index=1)], ONE, {}, "select_last_index=1"),
    "an ellipsis": ([node("Einsum", ["x", "x"], ["out"], "n", equation="...i,...i->...")], ONE, {}, "no ellipsis"),
    "a zero point": ([node("QuantizeLinear", ["x", "s", "z"], ["q"], "n"), node("DequantizeLinear", ["q", "s", "z"], ["out"])], ONE, {"s": np.float32(0.1), "z": np.array(3, np.int8)}, "zero point 0"),
    "filled with integers": ([node("Shape", ["x"], ["s"]), node("ConstantOfShape", ["s"], ["out"], "n", value=helper.make_tensor("", T.INT32, [1], [5]))], ONE, {}, "fills with FP32, got INT32"),
    "an identity of a dynamic shape": ([node("EyeLike", ["x"], ["out"], "n")], ONE, {}, "no EyeLike of a dynamic shape"),
}  # fmt: skip


@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_seeded_violation_is_refused(name: str) -> None:
    nodes, inputs, constants, says = VIOLATIONS[name]
    with pytest.raises(ExportError, match=f"tensorrt: seeded: TensorRT 8.2 would refuse it: .*{says}"):
        rules.hold(graph(nodes, inputs, constants, opset=13), "seeded")


@pytest.mark.parametrize("op", ["LayerNormalization", "Gelu"])
def test_newer_operators_are_named_with_their_decomposition(op: str) -> None:
    nodes, inputs, constants = LOWERED["layer-norm" if op != "Gelu" else "gelu"]
    proto = graph(nodes, inputs, constants)
    assert [b.rule for b in rules.breaches(proto)] == ["opset 7 to 13"]
    proto.opset_import[0].version = 13
    (found,) = [b for b in rules.breaches(proto) if b.rule == "an operator of the parser"]
    assert found.value == op and "write it as" in found.remedy


def test_a_function_and_a_constant_beyond_fp16_are_refused() -> None:
    made = graph([node("Add", ["x", "k"], ["out"], "n")], ONE, {"k": np.float32(1e6)}, opset=13)
    assert rules.breaches(made) == [] == rules.breaches(made, ["n"])
    assert [b.rule for b in rules.breaches(made, [])] == ["fp16 ends at 65504"]
    made.functions.append(onnx_function.function())
    assert "inline it" in rules.breaches(made)[0].remedy


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"head": 24}, "head of 16 to 128"),
        ({"block_q": 24}, "block_q of 16 to 128"),
        ({"drop": "theta"}, "initializer"),
    ],
    ids=str,
)
def test_a_plugin_node_its_kernels_cannot_run_is_refused(change: dict[str, Any], says: str) -> None:
    dim = change.get("head", 32)
    q = {name: np.ones((1, 2, 64, dim), np.float32) for name in "qkv"}
    scorer = {
        "wq": np.ones((2, dim, 4)),
        "wk": np.ones((2, dim, 4)),
        "d": np.ones((2, 3)),
        "s": np.ones((2, 1)),
        "theta": np.ones(2),
    }
    scorer = {name: x.astype(np.float32) for name, x in scorer.items()}
    lengths = {"l": np.array([64], np.int32)}
    attributes = {**onnx_function.INTEGERS, "scale": 0.0, "plugin_version": "1", "plugin_namespace": ""}
    attributes |= {"block_q": change.get("block_q", 64)}
    made = node(lower.PLUGIN, [*q, *scorer, "l", "l"], ["h"], "n", domain=onnx_function.DOMAIN, **attributes)
    inputs = {**q, **lengths, **({"theta": scorer.pop("theta")} if "drop" in change else {})}
    proto = graph([node("Relu", ["q"], ["out"], "keeps-shape"), made], inputs, scorer, opset=13)
    assert [says in str(b) for b in rules.breaches(proto)] == [True]


@pytest.mark.slow
def test_a_model_the_device_cannot_run_is_told_which_node() -> None:
    class Odd(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.isinf(x).float() + x

    model = models.load(Odd(), example=(torch.ones(1, 4),), name="odd")
    with pytest.raises(ExportError, match=r"tensorrt: odd, model\.onnx: .*IsInf '.*an operator of the parser"):
        exported(model)
