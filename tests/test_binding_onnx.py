"""DSA in ONNX Runtime: the library, the function in standard operators, and a program that has both."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import platform
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import dsa_cases
import numpy as np
import pytest

from edgeformer import native
from edgeformer.attention import reference as ref

torch = pytest.importorskip("torch")
onnx = pytest.importorskip("onnx")
ort = pytest.importorskip("onnxruntime")
pytest.importorskip("ziglang")
onnx_function = pytest.importorskip("edgeformer.attention.onnx_function")
import sparse_models  # noqa: E402

LIBRARY = native.binding("onnx")
OLD = "1.17.3"  # the oldest that a program's own range admits


@functools.cache
def library() -> ctypes.CDLL:
    made = ctypes.CDLL(str(LIBRARY))
    made.edgeformer_dsa_kernels.restype = ctypes.c_char_p
    return made


def one_node(case: dsa_cases.Case, **more: Any) -> Any:
    """A model of a single DSA node; operands that are None are left out."""
    T = onnx.TensorProto  # noqa: N806
    names = [name if x is not None else "" for name, x in zip(dsa_cases.ORDER, case.operands, strict=True)]
    while not names[-1]:
        names.pop()
    node = onnx.helper.make_node("DSA", names, ["out"], domain=onnx_function.DOMAIN, **{**case.attributes, **more})
    inputs = [
        onnx.helper.make_tensor_value_info(name, T.INT32 if name.endswith("len") else T.FLOAT, x.shape)
        for name, x in feeds(case).items()
    ]
    out = onnx.helper.make_tensor_value_info("out", T.FLOAT, case.operands[0].shape)
    imports = [onnx.helper.make_opsetid("", onnx_function.OPSET), onnx.helper.make_opsetid(onnx_function.DOMAIN, 1)]
    return onnx.helper.make_model(
        onnx.helper.make_graph([node], "one", inputs, [out]), opset_imports=imports, ir_version=9
    )


def feeds(case: dsa_cases.Case) -> dict[str, Any]:
    return {name: x for name, x in zip(dsa_cases.ORDER, case.operands, strict=True) if x is not None}


def run(model: Any, inputs: dict[str, Any], *, library: Path | None = None, threads: int = 1) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    if library:
        options.register_custom_ops_library(str(library))
    data = model if isinstance(model, bytes) else model.SerializeToString()
    return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"]).run(None, inputs)[0]


def kept() -> list[tuple[int, int]]:
    pairs = (ctypes.c_int64 * 2048)()
    count = library().edgeformer_dsa_kept(1024, pairs)
    return [(pairs[2 * i], pairs[2 * i + 1]) for i in range(count)]


@pytest.mark.parametrize("case", dsa_cases.PLAIN + dsa_cases.RULES, ids=lambda case: case.name)
def test_library(case: dsa_cases.Case) -> None:
    library().edgeformer_dsa_reset()
    outputs = [run(one_node(case), feeds(case), library=LIBRARY, threads=threads) for threads in (1, 2)]
    np.testing.assert_allclose(outputs[0], case.expected(), rtol=0, atol=5e-6)
    np.testing.assert_array_equal(outputs[0], outputs[1])
    assert library().edgeformer_dsa_calls() == 2 and kept() == [case.kept()] * 2


def test_library_runs_the_best_kernels() -> None:
    features = Path("/proc/cpuinfo").read_text().split() if Path("/proc/cpuinfo").exists() else []
    if platform.machine() == "x86_64" and "avx2" in features:
        assert library().edgeformer_dsa_kernels().startswith(b"avx")


def test_library_int8() -> None:
    case = dsa_cases.case("int8", rows=(200, 200), lengths=([180], [180]), dim=64)
    out = run(one_node(case, compute=1), feeds(case), library=LIBRARY)
    want = case.expected()
    assert 1e-4 < np.linalg.norm(out - want) / np.linalg.norm(want) < 3e-2  # int8 really ran, and well


@pytest.mark.parametrize(
    ("case", "why"),
    [
        (dsa_cases.case("dim", dim=24), "dim: 16 to 256, a multiple of 16"),
        (dsa_cases.case("block", block_q=24), "block_q"),
        (dsa_cases.case("theta", heads=(4, 2)), "theta: one value per list of heads"),
    ],
    ids=lambda x: getattr(x, "name", ""),
)
def test_library_says_what_it_cannot(case: dsa_cases.Case, why: str) -> None:
    operands = list(case.operands)
    if case.name == "theta":
        operands[7] = operands[7][:3]
    case = dsa_cases.Case(case.name, case.config, tuple(operands))
    with pytest.raises(Exception, match=f"edgeformer DSA: .*{why}"):
        run(one_node(case), feeds(case), library=LIBRARY)


@pytest.mark.parametrize("case", dsa_cases.PLAIN, ids=lambda case: case.name)
def test_function(case: dsa_cases.Case) -> None:
    case = case.with_lengths()
    model = one_node(case)
    onnx_function.attach(model)
    onnx.checker.check_model(model)
    library().edgeformer_dsa_reset()
    np.testing.assert_allclose(run(model, feeds(case)), case.expected(), rtol=0, atol=5e-6)
    assert library().edgeformer_dsa_calls() == 0


def test_without_function_and_library_it_does_not_load() -> None:
    with pytest.raises(Exception, match="DSA"):
        run(one_node(dsa_cases.PLAIN[0]), feeds(dsa_cases.PLAIN[0]))


def test_rules_the_function_cannot_express_are_refused() -> None:
    for attributes in ({"rule": 2}, {"max_blocks": 3}, {"min_blocks": 2}):
        with pytest.raises(ValueError, match="rule 0 without clamps"):
            onnx_function.node(*"qkvabcde", **attributes)


@functools.cache
def programs(**config: Any) -> Any:
    """fp32 and int8 of a small encoder with two DSA layers, and its Model."""
    from edgeformer.formats import onnx as format

    model = sparse_models.model(**config)
    return model, list(format.export(model, ("fp32", "int8")))


@pytest.mark.slow
@pytest.mark.parametrize("config", [{}, {"kv_heads": 1, "causal": 1, "n_sink": 1}], ids=["encoder", "causal-gqa"])
@pytest.mark.parametrize("precision", [0, 1], ids=["fp32", "int8"])
def test_program(precision: int, config: dict[str, Any]) -> None:
    model, made = programs(**config)
    data = made[precision].files["model.onnx"]
    proto = onnx.load_from_string(data)
    assert [f.name for f in proto.functions] == ["DSA"] and made[precision].sparse
    kinds = [node.op_type for node in proto.graph.node]
    assert kinds.count("DSA") == sparse_models.LAYERS and ("MatMulInteger" in kinds) == bool(precision)
    for batch, length in ((1, 70), (3, 96), (1, 1)):
        rows = sparse_models.rows(batch, length)
        library().edgeformer_dsa_reset()
        plain = run(data, rows)
        assert library().edgeformer_dsa_calls() == 0
        found = run(data, rows, library=LIBRARY)
        assert library().edgeformer_dsa_calls() == sparse_models.LAYERS == len(kept())
        np.testing.assert_allclose(found, plain, rtol=0, atol=1e-5 if not precision else 2e-2)
        if not precision:
            want = model.module(*map(torch.from_numpy, rows.values())).detach().numpy()
            np.testing.assert_allclose(found, want, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_the_oldest_runtime(tmp_path: Path) -> None:
    """Its wheel, unpacked: the library and a program's bytes are the same for every release."""
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(tmp_path)]
    done = subprocess.run([*download, f"onnxruntime=={OLD}", "numpy==1.26.4"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"onnxruntime {OLD} is not to be had here: {done.stderr.strip()[-200:]}")
    site = tmp_path / "site"
    for wheel in tmp_path.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    data = programs()[1][0].files["model.onnx"]
    (tmp_path / "model.onnx").write_bytes(data)
    rows = sparse_models.rows(2, 70)
    code = f"""
import ctypes, json, numpy as np, onnxruntime as ort
def run(library):
    options = ort.SessionOptions(); options.intra_op_num_threads = 2; options.log_severity_level = 4
    if library: options.register_custom_ops_library(library)
    session = ort.InferenceSession("model.onnx", options, providers=["CPUExecutionProvider"])
    return session.run(None, {{n: np.array(x, np.int32) for n, x in json.load(open("rows.json")).items()}})[0].tolist()
c = ctypes.CDLL({str(LIBRARY)!r})
plain = run(None); before = c.edgeformer_dsa_calls(); found = run({str(LIBRARY)!r})
print(json.dumps([ort.__version__, before, c.edgeformer_dsa_calls(), plain, found]))
"""
    (tmp_path / "rows.json").write_text(json.dumps({name: x.tolist() for name, x in rows.items()}))
    environment = {**os.environ, "PYTHONPATH": str(site)}
    command = [sys.executable, "-S", "-c", code]
    said = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert said.returncode == 0, said.stderr[-800:]
    version, before, calls, plain, found = json.loads(said.stdout.splitlines()[-1])
    assert (version, before, calls) == (OLD, 0, sparse_models.LAYERS)
    np.testing.assert_allclose(found, plain, rtol=0, atol=1e-5)
    np.testing.assert_allclose(found, run(data, rows, library=LIBRARY), rtol=0, atol=1e-5)


def test_the_schema_is_the_reference_config() -> None:
    names = {*onnx_function.INTEGERS, "scale"} - {"compute"}
    assert names == set(vars(ref.Config())) and onnx_function.OPERANDS == dsa_cases.ORDER
    assert {k: v for k, v in onnx_function.INTEGERS.items() if k != "compute"}.items() <= vars(ref.Config()).items()


def test_libraries_are_cached_and_say_where_they_cannot_be_built() -> None:
    assert native.binding("onnx") == LIBRARY and native.bindings() == ["executorch", "litert", "onnx"]
    with pytest.raises(native.BuildError, match="no binding 'tensorflow'; there are executorch, litert, onnx"):
        native.binding("tensorflow")
    with pytest.raises(native.BuildError, match="object files only"):
        native.binding("onnx", "android-aarch64")


def test_a_library_names_no_machine() -> None:
    for target in ("linux-x86_64", "linux-aarch64"):
        data = native.binding("onnx", target).read_bytes()
        assert str(Path.home()).encode() not in data and str(native.sources()).encode() not in data
