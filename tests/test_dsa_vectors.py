"""The conformance vectors, through the reference and through every kernel set; C programs read the same file."""

from __future__ import annotations

import json
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeformer import native
from edgeformer.attention import kernel, reference as ref

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
import dsa_vectors as vectors

INDEX = json.loads(vectors.INDEX.read_text())
CASES = [*INDEX["cases"], *INDEX["biased"]]
NAMES = [c["name"] for c in CASES]
SETS = list(native.kernel_sets(native.TARGETS[native.host()].arch))


@cache
def operands(name: str) -> tuple[Any, ...]:
    return vectors.operands(CASES[NAMES.index(name)])


def strided(x: np.ndarray[Any, Any], bnhd: int) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) if bnhd else x


def check(case: dict[str, Any], out: np.ndarray[Any, Any]) -> None:
    got = out.reshape(-1)[case["at"]].astype(np.float64)
    want = np.array([np.nan if x is None else x for x in case["out"]], np.float64)
    assert (np.isnan(got) == np.isnan(want)).all()
    error = np.nan_to_num(got - want)
    if case["compute"]:
        assert np.linalg.norm(error) <= 3e-2 * np.linalg.norm(np.nan_to_num(want))
    else:
        assert np.abs(error).max(initial=0) <= 5e-6 * case["max_v"]


def test_the_index_is_small_and_names_are_unique() -> None:
    assert vectors.INDEX.stat().st_size < 600_000 and len(set(NAMES)) == len(NAMES)


def test_the_generator_is_the_stated_recurrence() -> None:
    s, want = 7, []
    for _ in range(50):
        s = (s * 1664525 + 1013904223) % 2**32
        want.append((s >> 8 & 0xFFFF) / 32768 - 1)
    np.testing.assert_array_equal(vectors.fill(7, 50), want)


@pytest.mark.parametrize("name", NAMES)
def test_reference(name: str) -> None:
    case, (c, qkv, scorer, length, position_bias) = CASES[NAMES.index(name)], operands(name)
    lists = vectors.padded(case["lists"], vectors.list_shape(case))
    if not name.startswith("lists-"):
        found = ref.select(c, qkv[0], qkv[1], scorer, *length)
        np.testing.assert_array_equal(found.idx, lists.idx)
    check(case | {"compute": 0}, ref.attend(c, *qkv, lists, *length, position_bias=position_bias))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kernels", SETS)
def test_kernels(kernels: str, name: str) -> None:
    case, (c, qkv, scorer, length, position_bias) = CASES[NAMES.index(name)], operands(name)
    q, k, v = (strided(x, case["bnhd"]) for x in qkv)
    lists = vectors.padded(case["lists"], vectors.list_shape(case))
    with kernel.only(kernels) as possible:
        if not possible:
            pytest.skip(f"this machine cannot run {kernels}")
        assert kernel.kernels() == kernels
        options = {"compute": case["compute"], "position_bias": position_bias}
        out = kernel.attend(c, q, k, v, lists, *length, out=strided(np.empty_like(q), case["bnhd"]), **options)
        check(case, out)
        if name.startswith("lists-"):
            return
        found = kernel.select(c, q, k, scorer, *length)
        np.testing.assert_array_equal(found.idx, lists.idx)
        np.testing.assert_array_equal(found.cnt, lists.cnt)
        for threads in (1, 2, 7):
            same, (kept, _) = kernel.fused(c, q, k, v, scorer, *length, threads=threads, **options)
            np.testing.assert_array_equal(same, out)
            assert kept == found.cnt.sum()
