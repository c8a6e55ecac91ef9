"""
The CUDA sources of the TensorRT plugin on a CPU: kernels through a shim over the conformance vectors, the plugin object
through its life in a stub host. Nothing here ran on a GPU or met TensorRT.
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeformer import native
from edgeformer.attention import reference as ref

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import dsa_vectors as vectors

INDEX = json.loads(vectors.INDEX.read_text())
CASES = {c["name"]: c for c in (*INDEX["cases"], *INDEX["biased"]) if not c["compute"]}
LISTS = [name for name in CASES if name.startswith("lists-")]
WHOLE = [name for name in CASES if name not in LISTS]
STUBS = Path(__file__).parent / "native" / "tensorrt"
SOURCES = native.sources() / "tensorrt"
FLAGS = ["-std=c++14", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
INTEGERS = (
    "block_q", "block_k", "rule", "min_blocks", "max_blocks", "force_diag", "n_sink", "causal", "q_offset",
    "select_per_kv", "dense_below",
)  # fmt: skip
HALF_BOUND = 5e-3  # relative L2, the specification's bound for f16
# fp16 has no such inputs: their point is a score or a mass that only fp32 operands give.
ONLY_FP32 = {"huge-scores", "underflow-of-a-one-token-block"}


def compiled(source: Path, folder: Path, *more: str) -> Path:
    """With the system's compiler; else with ziglang, which builds its own C++ library first and takes minutes."""
    found = shutil.which("g++") or shutil.which("clang++")
    command = [found] if found else [sys.executable, "-m", "ziglang", "c++", "-x", "c++", "-fno-sanitize=all"]
    out = folder / f"lib{source.stem}.so"
    command += [*FLAGS, *more, f"-I{STUBS}", f"-I{SOURCES}", str(source), "-o", str(out)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return out


def opened(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.edgeformer_dsa_calls.restype = ctypes.c_int64
    library.edgeformer_dsa_kept.restype = ctypes.c_int32
    library.test_from_half.restype = ctypes.c_float
    return library


@pytest.fixture(scope="session")
def host(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    return opened(compiled(STUBS / "host.cc", tmp_path_factory.mktemp("host")))


def integers(values: Any) -> Any:
    return np.ascontiguousarray(values, np.int32).ctypes.data_as(ctypes.c_void_p)


def call(library: ctypes.CDLL, function: str, config: ref.Config, tensors: list[Any], kept: Any) -> tuple[int, Any]:
    """The status and the output, in the dtype of q; the lists go to or come from `kept`."""
    tensors = [np.ascontiguousarray(x) for x in tensors]
    out = np.full_like(tensors[0], 7)  # every element must be written
    attributes = np.array([getattr(config, name) for name in INTEGERS], np.int32)
    shapes = np.array([n for x in tensors for n in (x.ndim, *x.shape)], np.int32)
    pointers = (ctypes.c_void_p * len(tensors))(*(x.ctypes.data for x in tensors))
    status = getattr(library, function)(
        integers(attributes), ctypes.c_float(config.scale), int(out.dtype == np.float16), integers(shapes), pointers,
        ctypes.c_void_p(out.ctypes.data), ctypes.c_void_p(kept.ctypes.data),
    )  # fmt: skip
    return status, out


def tensors_of(name: str, dtype: Any) -> tuple[ref.Config, list[Any]]:
    config, qkv, scorer, given, position_bias = vectors.operands(CASES[name])
    if position_bias is None:
        position_bias = np.full((qkv[0].shape[1], 1), 7, np.float32)
    batch, rows, keys = qkv[0].shape[0], qkv[0].shape[2], qkv[1].shape[2]
    lengths = [
        np.ascontiguousarray(ref.lengths(x, batch, full), np.int32) for x, full in zip(given, (rows, keys), strict=True)
    ]
    with np.errstate(over="ignore"):
        return config, [*(x.astype(dtype) for x in qkv), *scorer, *lengths, position_bias]


def rows_of(lists: ref.Lists, blocks: int) -> Any:
    """As the kernels lay a list out: its count, then the blocks."""
    rows = np.zeros((*lists.cnt.shape, 1 + blocks), np.int32)
    rows[..., 0] = lists.cnt
    rows[..., 1 : 1 + lists.idx.shape[-1]] = lists.idx
    return rows


def compare(name: str, out: Any, want: Any, most: float) -> None:
    assert (np.isnan(out) == np.isnan(want)).all()
    error = np.nan_to_num(out.astype(np.float64) - want)
    if out.dtype == np.float32:
        assert np.abs(error).max(initial=0) <= 5e-6 * most, name
    else:
        assert np.linalg.norm(error) <= HALF_BOUND * np.linalg.norm(np.nan_to_num(want)), name


def check_whole(library: ctypes.CDLL, name: str, dtype: Any) -> None:
    config, tensors = tensors_of(name, dtype)
    wide = [x.astype(np.float32) for x in tensors[:3]]
    scorer, lengths, position_bias = ref.Scorer(*tensors[3:8]), tensors[8:10], tensors[10]
    want = ref.select(config, wide[0], wide[1], scorer, *lengths)
    blocks = ref.blocks(wide[1].shape[2], config.block_k)
    kept = np.zeros((*want.cnt.shape, 1 + blocks), np.int32)
    status, out = call(library, "test_plugin", config, tensors, kept)
    assert status == 0
    np.testing.assert_array_equal(kept[..., 0], want.cnt)
    pair = (ctypes.c_int64 * 2)()
    assert library.edgeformer_dsa_kept(1, pair) == 1
    all_kept = dataclasses.replace(config, dense_below=1 << 30, max_blocks=0)
    candidates = ref.select(all_kept, wide[0], wide[1], scorer, *lengths).cnt.sum()
    assert tuple(pair) == (want.cnt.sum(), candidates)
    used = np.arange(want.idx.shape[-1]) < want.cnt[..., None]
    np.testing.assert_array_equal(kept[..., 1 : 1 + want.idx.shape[-1]][used], want.idx[used])
    exact = ref.attend(config, *wide, want, *lengths, position_bias=position_bias)
    compare(name, out, exact, CASES[name]["max_v"])
    if dtype is np.float32:  # the stored vector too, not only this machine's reference
        case = CASES[name]
        stored = np.array([np.nan if x is None else x for x in case["out"]], np.float64)
        compare(name, out.reshape(-1)[case["at"]], stored, case["max_v"])


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["fp32", "fp16"])
def test_plugin(host: ctypes.CDLL, dtype: Any, name: str) -> None:
    if dtype is np.float16 and name in ONLY_FP32:
        pytest.skip("needs operands beyond fp16")
    before = host.edgeformer_dsa_calls()
    check_whole(host, name, dtype)
    assert host.edgeformer_dsa_calls() == before + 1


@pytest.mark.parametrize("name", LISTS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16], ids=["fp32", "fp16"])
def test_attention_over_given_lists(host: ctypes.CDLL, dtype: Any, name: str) -> None:
    config, tensors = tensors_of(name, dtype)
    lists = vectors.padded(CASES[name]["lists"], vectors.list_shape(CASES[name]))
    kept = rows_of(lists, ref.blocks(tensors[1].shape[2], config.block_k))
    status, out = call(host, "test_attend", config, tensors, kept)
    assert status == 0
    wide = [x.astype(np.float32) for x in tensors[:3]]
    compare(name, out, ref.attend(config, *wide, lists, *tensors[8:10]), CASES[name]["max_v"])


@pytest.mark.parametrize("change", [{"block_q": 24}, {"block_k": 256}, {"rule": 3}], ids=str)
def test_the_plugin_refuses_what_its_kernels_cannot(host: ctypes.CDLL, change: dict[str, int]) -> None:
    config, tensors = tensors_of(WHOLE[0], np.float32)
    before = host.edgeformer_dsa_calls()
    status, out = call(host, "test_plugin", ref.Config(**{**vars(config), **change}), tensors, np.zeros(64, np.int32))
    assert status == 1 and (out == 7).all() and host.edgeformer_dsa_calls() == before


def test_half_precision_of_the_shim_is_numpys(host: ctypes.CDLL) -> None:
    every = np.arange(65536, dtype=np.uint16)
    floats = every.view(np.float16).astype(np.float32)
    for bits, value in zip(every.tolist()[::7], floats.tolist()[::7], strict=True):
        got = host.test_from_half(bits)
        assert got == value or (got != got and value != value)
    tests = np.concatenate([floats[np.isfinite(floats)][::13] * np.float32(1.0003), [65519, 65520, 1e-8, 6e-8, -0.0]])
    with np.errstate(over="ignore"):
        want = tests.astype(np.float16)
    for x, half in zip(tests.tolist(), want.view(np.uint16).tolist(), strict=True):
        assert host.test_to_half(ctypes.c_float(x)) & 0xFFFF == half, x


def test_the_attributes_are_the_reference_config() -> None:
    listed = re.findall(r'\{"(\w+)", &Rules::', (SOURCES / "dsa_plugin.cu").read_text())
    assert tuple(listed) == INTEGERS and {*INTEGERS, "scale"} == set(vars(ref.Config()))


@pytest.mark.slow
def test_an_nvcc_takes_the_plugin(tmp_path: Path) -> None:
    """Not the board's 10.2, and for the oldest GPU it knows; the shim is out of its reach."""
    nvcc = shutil.which("nvcc", path=f"{os.environ.get('PATH', '')}{os.pathsep}/usr/local/cuda/bin")
    if nvcc is None:
        pytest.skip("no nvcc")
    shutil.copy(STUBS / "NvInfer.h", tmp_path)
    known = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    words = ["-std=c++14", "-Werror=all-warnings", "-Wno-deprecated-gpu-targets", f"-arch={known[0]}", "-c"]
    source = [str(SOURCES / "dsa_plugin.cu"), "-o", str(tmp_path / "plugin.o")]
    run = subprocess.run([nvcc, *words, f"-I{tmp_path}", *source], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]


SANITIZED = ("position-causal-chunk", "shape-33-block-32-dim-128", "rule-1-theta-0.75", "padding-zero",
             "batch-2-lengths", "gqa-4-1-per_kv-1")  # fmt: skip


@pytest.mark.slow
def test_no_sanitizer_complains(tmp_path: Path) -> None:
    found = shutil.which("g++") or shutil.which("clang++")
    runtime = found and subprocess.run([found, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout
    if not runtime or not Path(runtime.strip()).is_absolute():
        pytest.skip("no compiler with AddressSanitizer")
    flags = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-DNDEBUG")
    library = compiled(STUBS / "host.cc", tmp_path, *flags)
    code = (
        "import sys, numpy as np; sys.path.insert(0, sys.argv[1]); import test_tensorrt_plugin as t\n"
        "library = t.opened(t.Path(sys.argv[2]))\n"
        "for name in t.SANITIZED:\n"
        "    for dtype in (np.float32, np.float16):\n        t.check_whole(library, name, dtype)\n"
        "print(library.edgeformer_dsa_calls())"
    )
    options = {"ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0", "LD_PRELOAD": runtime.strip()}
    command = [sys.executable, "-c", code, str(Path(__file__).parent), str(library)]
    run = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **options})
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split()[-1] == str(2 * len(SANITIZED))
