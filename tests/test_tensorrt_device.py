"""
The TensorRT runner's way on the device, against a stand-in for libnvinfer: what it compiles, builds, keeps, runs and
says. Nothing here met TensorRT, nvcc or a GPU.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edgeformer import native

pytestmark = pytest.mark.slow  # it compiles
STUBS = Path(__file__).parent / "native" / "tensorrt"
SOURCES = native.sources() / "tensorrt"
PLAN = """precision fp16
input input_ids 1x1 1x8 4x16
input attention_mask 1x1 1x8 4x16
fp32 model.onnx sum
fp32 model.onnx count
fp32 plugin.onnx other
"""
RUN = """
import ctypes, json, sys, types
import numpy as np
from edgeformer_agent import runners, wire
folder, lengths = sys.argv[1], json.loads(sys.argv[2])
runner = runners.load("tensorrt")
runner.CUDA = folder + "/no-cuda-here"  # a real one on this machine must not be met
runner.FLAGS.remove("-O3")  # nothing here is about speed
said = {"version": runner.version(), "outputs": []}
tensors = [wire.Tensor(n, "int32", (-1, -1)) for n in ("input_ids", "attention_mask")]
entry = types.SimpleNamespace(precision="fp16", inputs=tensors, outputs=[wire.Tensor("vector", "float32", (-1, 2))])
try:
    run = runner.load(folder + "/model.onnx", entry)
    for n in lengths:
        row = {"input_ids": np.arange(n), "attention_mask": np.ones(n)}
        said["outputs"].append(run(row).tolist())
    if hasattr(run, "counters"):
        said["counted"] = run.counters()
except Exception as error:
    said["error"] = type(error).__name__ + ": " + str(error)
print(json.dumps(said))
"""


def executable(path: Path, text: str) -> None:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


@pytest.fixture(scope="session")
def jetpack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `lib` (the stand-ins) and `bin` (an nvcc that hands over to the system's compiler)."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++, as the device has it")
    root = tmp_path_factory.mktemp("jetpack")
    (root / "lib").mkdir()
    (root / "bin").mkdir()
    library = root / "lib" / "libnvinfer.so.8"
    flags = ["-std=c++14", "-O0", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", f"-I{STUBS}"]
    subprocess.run(
        [compiler, *flags, "-Wl,-soname,libnvinfer.so.8", str(STUBS / "nvinfer.cc"), "-o", library], check=True
    )
    for name in ("libnvinfer.so", "libnvonnxparser.so", "libcudart.so"):
        (root / "lib" / name).symlink_to(library.name)
    words = 'case "$1" in -gencode=*|-Xcompiler) ;; *) set -- "$@" "$1" ;; esac; shift'
    executable(
        root / "bin" / "nvcc",
        f'#!/bin/sh\necho "$@" >> {root}/nvcc.log\nset -- "$@" --end\n'
        f'while [ "$1" != --end ]; do {words}; done\nshift\n'
        f'exec {compiler} -x c++ "$@"\n',
    )
    return root


def on_device(
    jetpack: Path, program: Path, cache: Path, lengths: tuple[int, ...] = (3,), nvcc: bool = True
) -> tuple[dict[str, Any], str]:
    """What the runner said, and what went to stderr."""
    real = [place for place in os.environ["PATH"].split(os.pathsep) if not (Path(place) / "nvcc").exists()]
    path = os.pathsep.join([*([str(jetpack / "bin")] if nvcc else []), *real])
    found = {"LD_LIBRARY_PATH": jetpack / "lib", "LIBRARY_PATH": jetpack / "lib", "CPLUS_INCLUDE_PATH": STUBS}
    environment = {**os.environ, **{k: str(v) for k, v in found.items()}, "PATH": path, "XDG_CACHE_HOME": str(cache)}
    command = [sys.executable, "-c", RUN, str(program), json.dumps(lengths)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def program(folder: Path, *, plugin: bool = True, model: bytes = b"standard") -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.onnx").write_bytes(model)
    (folder / "build.txt").write_text(PLAN)
    if plugin:
        (folder / "plugin.onnx").write_bytes(b"node EdgeformerDSA")
    for source in SOURCES.iterdir():
        if source.suffix in (".cu", ".cuh", ".cc"):
            shutil.copy(source, folder)
    return folder


def kept(cache: Path, suffix: str) -> list[Path]:
    return sorted((cache / "edgeformer" / "tensorrt").glob(f"*{suffix}"))


def test_compiled_and_built_once_then_kept(jetpack: Path, tmp_path: Path) -> None:
    folder, cache = program(tmp_path / "program", plugin=False), tmp_path / "cache"
    first, _ = on_device(jetpack, folder, cache, (3, 16))
    assert first == {"version": "8.2.1", "outputs": [[3.0, 3.0], [120.0, 16.0]]}
    (engine,), (library,) = kept(cache, ".engine"), kept(cache, ".so")
    lines = engine.read_text().splitlines()
    # fp16 and obeyed constraints; `sum` and what it became stay fp32, the integer layer and the others do not.
    assert lines[0] == "most 16 plain" and {"flag 0", "flag 9", "exact sum", "exact sum_7"} < set(lines)
    assert not any(line.startswith(("exact count", "exact other")) for line in lines)
    assert {"input_ids 0 1 1", "input_ids 1 1 8", "attention_mask 2 4 16"} < set(lines)
    before = engine.stat().st_mtime_ns, library.stat().st_mtime_ns
    again, _ = on_device(jetpack, folder, cache)
    assert again["outputs"] == [[3.0, 3.0]]
    assert (engine.stat().st_mtime_ns, library.stat().st_mtime_ns) == before
    program(folder, plugin=False, model=b"another")
    on_device(jetpack, folder, cache)
    assert len(kept(cache, ".engine")) == 2 and len(kept(cache, ".so")) == 1


def test_sparse_attention_takes_the_plugin(jetpack: Path, tmp_path: Path) -> None:
    folder, cache = program(tmp_path / "program"), tmp_path / "cache"
    said, errors = on_device(jetpack, folder, cache)
    counted = ["cuda", 1, [[1, 1]]]  # kernels, calls, kept of how many blocks
    assert (
        said == {"version": "8.2.1", "outputs": [[3.0, 3.0]], "counted": counted} and "standard operators" not in errors
    )
    (engine,) = kept(cache, ".engine")
    lines = engine.read_text().splitlines()
    assert lines[0].endswith("plugin") and "exact other" in lines and "exact sum" not in lines
    words = (jetpack / "nvcc.log").read_text()
    assert "-gencode=arch=compute_53,code=sm_53" in words and "-gencode=arch=compute_53,code=compute_53" in words


def test_without_nvcc_the_standard_file_runs(jetpack: Path, tmp_path: Path) -> None:
    folder, cache = program(tmp_path / "program"), tmp_path / "cache"
    said, errors = on_device(jetpack, folder, cache, nvcc=False)
    assert said["outputs"] == [[3.0, 3.0]]
    assert "standard operators: nvcc is missing" in errors and "nvidia-jetpack" in errors
    assert kept(cache, ".engine")[0].read_text().startswith("most 16 plain")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (("model.onnx", "op Gelu"), "ValueError: tensorrt: model.onnx: node 7: no importer registered for op: Gelu"),
        (("build.txt", "colour red\n"), "ValueError: tensorrt: build.txt: not of this runner's form"),
        (("runner.cc", "#error no headers"), "OSError: runner.cc does not compile here"),
    ],
    ids=["parser", "plan", "compiler"],
)
def test_a_failure_says_where_and_leaves_nothing(
    jetpack: Path, tmp_path: Path, change: tuple[str, str], says: str
) -> None:
    folder, cache = program(tmp_path / "program", plugin=False), tmp_path / "cache"
    (folder / change[0]).write_text(change[1])
    said, _ = on_device(jetpack, folder, cache)
    assert said["error"].startswith(says), said
    assert not kept(cache, ".engine")


def test_a_row_beyond_the_engine_and_a_damaged_engine_are_told(jetpack: Path, tmp_path: Path) -> None:
    folder, cache = program(tmp_path / "program", plugin=False), tmp_path / "cache"
    said, _ = on_device(jetpack, folder, cache, (3, 17))
    assert said["outputs"] == [[3.0, 3.0]]
    assert said["error"] == "ValueError: tensorrt: input_ids: outside the engine's sizes"
    kept(cache, ".engine")[0].write_text("rubbish")
    said, _ = on_device(jetpack, folder, cache)
    assert said["error"].endswith(".engine: this is no engine")
