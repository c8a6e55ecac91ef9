"""The cross-built libraries on an emulated Raspberry Pi 4: the same numbers, the NEON kernels, one call a layer."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import dsa_cases
import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("ai_edge_litert")
pytest.importorskip("ziglang")
import sparse_models
import test_binding_litert as litert
import test_binding_onnx as onnx

from edgeformer import build, native, signing
from edgeformer_agent import wire

pytestmark = pytest.mark.slow
MACHINE = "linux-aarch64"
NAMES = ("plain-32", "tail", "padded", "gqa", "causal-offset", "uneven-blocks", "top-p", "top-k", "most")

# Runs in the board. Every case in both runtimes, then int8 attention; prints what the libraries say.
SCRIPT = """
import ctypes, json, numpy, onnxruntime
from ai_edge_litert.interpreter import Interpreter, load_delegate

def onnx(name, inputs):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 2
    options.register_custom_ops_library("./libedgeformer_onnx.so")
    session = onnxruntime.InferenceSession(name + ".onnx", options, providers=["CPUExecutionProvider"])
    return session.run(None, {x.name: inputs[x.name] for x in session.get_inputs()})[0]

def litert(name, inputs):
    delegates = [load_delegate("./libedgeformer_litert.so")]
    made = Interpreter(name + ".tflite", num_threads=2, experimental_delegates=delegates)
    made.allocate_tensors()
    for detail in made.get_input_details():
        made.set_tensor(detail["index"], inputs[detail["name"]])
    made.invoke()
    return made.get_tensor(made.get_output_details()[0]["index"])

said = {}
for run in (onnx, litert):
    library = ctypes.CDLL("./libedgeformer_%s.so" % run.__name__)
    library.edgeformer_dsa_kernels.restype = ctypes.c_char_p
    worst = {}
    for name in json.load(open("names.json")):
        case = numpy.load(name + ".npz")
        got, want = run(name, case), case["want"]
        relative = numpy.linalg.norm(got - want) / numpy.linalg.norm(want)
        worst[name] = float(relative if name == "int8" else abs(got - want).max())
    said[run.__name__] = worst, library.edgeformer_dsa_calls(), library.edgeformer_dsa_kernels().decode()
print(json.dumps(said))
"""


def in_board(board_tool: ModuleType, board: Any, command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*board_tool.ssh(board), command], capture_output=True, text=True)


def test_libraries(board_tool: ModuleType, board: Any) -> None:
    folder = board.home / "bindings"
    folder.mkdir()
    cases = {case.name: case.with_lengths() for case in dsa_cases.PLAIN + dsa_cases.RULES if case.name in NAMES}
    cases["int8"] = dsa_cases.case("int8", rows=(128, 128), lengths=([100], [100])).with_lengths()
    for name, case in cases.items():
        compute = int(name == "int8")
        (folder / f"{name}.onnx").write_bytes(onnx.one_node(case, compute=compute).SerializeToString())
        (folder / f"{name}.tflite").write_bytes(litert.custom(case, compute=compute))
        given = {n: x for n, x in zip(dsa_cases.ORDER, case.operands, strict=True) if x is not None}
        np.savez(folder / name, want=case.expected(), **given)
    for format in ("onnx", "litert"):
        shutil.copy(native.binding(format, MACHINE), folder)
    (folder / "names.json").write_text(json.dumps(list(cases)))
    (folder / "script.py").write_text(SCRIPT)
    done = in_board(board_tool, board, "cd bindings && python3 script.py")
    assert done.returncode == 0, done.stderr[-800:]
    for worst, calls, kernels in json.loads(done.stdout.splitlines()[-1]).values():
        assert kernels == "neon" and calls == len(cases) == len(NAMES) + 1
        assert 1e-4 < worst.pop("int8") < 3e-2  # relative; int8 really ran
        assert max(worst.values()) < 5e-6, worst


def test_the_agent_runs_a_bundle(board_tool: ModuleType, board: Any, config_home: Path, tmp_path: Path) -> None:
    model = sparse_models.model(lengths=(32, 70))
    made = build(model, "raspberry-pi-4", out=tmp_path)
    shutil.copytree(made.path, board.home / "bundle")
    options = "--profile quick --min-runs 2 --min-seconds 0 --rows 2"
    key = signing.load(signing.DEFAULT).public
    done = in_board(board_tool, board, f"python3 bundle/agent.pyz run bundle --key {key} --out report.json {options}")
    assert done.returncode == 0, done.stderr[-800:]
    report = wire.load_report((board.home / "report.json").read_bytes())
    assert report.kind == "emulated" and [r.program for r in report.results] == ["litert-int8", "onnx-int8"]
    for result in report.results:
        assert result.native is not None and result.golden.passed and result.flags.count("native_fallback") == 0
        assert (result.native.kernel_set, result.native.calls_per_run) == ("neon", sparse_models.LAYERS)
        assert all(0 < share <= 1 for share in result.native.kept)
