"""Every kernel set of the C core against the definition; the vectors have their own file."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeformer import native
from edgeformer.attention import kernel, reference as ref
from edgeformer.errors import BuildError

HERE = Path(__file__).parent
INDEX, PROGRAM = HERE / "golden" / "dsa" / "index.json", HERE / "native" / "dsa_vectors.c"
SETS = list(native.kernel_sets(native.TARGETS[native.host()].arch))
VECTOR_SETS = [name for name in SETS if name != "scalar"]


def random(seed: int, *shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def problem(heads: int = 2, groups: int = 2, n: int = 257, dim: int = 64, theta: float = 0.1, batch: int = 1) -> Any:
    q, k, v = (random(s, batch, h, n, dim) for s, h in ((1, heads), (2, groups), (3, groups)))
    w = (random(s, heads, dim, 16) / 2 for s in (4, 5))
    biases = (random(6, heads, 17) / 3, random(7, heads, 1) / 3)
    return q, k, v, ref.Scorer(*w, *biases, np.full(heads, theta, np.float32))


@pytest.fixture(params=SETS)
def kernels(request: pytest.FixtureRequest) -> Any:
    with kernel.only(request.param) as possible:
        if not possible:
            pytest.skip(f"this machine cannot run {request.param}")
        yield request.param
        assert kernel.kernels() == request.param, "the set under test is not the set that ran"


def test_a_capable_cpu_runs_its_best_set() -> None:
    """A set that is skipped everywhere is not tested; this is the one place that notices."""
    info = Path("/proc/cpuinfo")
    flags = set(info.read_text().split()) if info.exists() else set()
    wide = {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= flags
    best = "avx512_vnni" if wide and "avx512_vnni" in flags else "avx512" if wide else None
    best = best or ("avx2" if {"avx2", "fma"} <= flags else None)
    if best is None:
        pytest.skip("no x86 vector flags to compare with")
    assert kernel.kernels() == best


def test_an_unknown_set_is_refused_and_changes_nothing() -> None:
    before = kernel.kernels()
    with kernel.only("avx1024") as possible:
        assert not possible and kernel.kernels() == before


@pytest.mark.parametrize("block_q, block_k", [(64, 64), (32, 32), (16, 128), (128, 48)])
@pytest.mark.parametrize("dim", [16, 32, 64, 96, 128])
def test_dense_and_sparse_agree_with_the_definition(kernels: str, dim: int, block_q: int, block_k: int) -> None:
    q, k, v, s = problem(heads=4, dim=dim)
    for causal in (0, 1):
        c = ref.Config(block_q=block_q, block_k=block_k, causal=causal)
        lists = kernel.select(c, q, k, s)
        np.testing.assert_array_equal(lists.idx, ref.select(c, q, k, s).idx)
        for given in (lists, None):
            want, bound = ref.attend(c, q, k, v, given), 5e-6 * np.abs(v).max()
            assert np.abs(kernel.attend(c, q, k, v, given) - want).max() <= bound
            error = kernel.attend(c, q, k, v, given, compute=kernel.I8) - want
            assert np.linalg.norm(error) <= 3e-2 * np.linalg.norm(want)


def test_vector_sets_give_the_same_bits() -> None:
    """No horizontal sums, one order everywhere: ISAs differ only in how many queries go at a time."""
    q, k, v, s = problem()
    seen: dict[str, list[Any]] = {}
    for name in VECTOR_SETS:
        with kernel.only(name) as possible:
            if possible:
                out = kernel.fused(ref.Config(causal=1), q, k, v, s)[0]
                seen[name] = [out, kernel.attend(ref.Config(), q, k, v, compute=kernel.I8)]
    first, *others = seen.values()
    for other in others:
        for a, b in zip(first, other, strict=True):
            np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("compute", [kernel.F32, kernel.I8])
def test_threads_strides_and_workspace_do_not_change_a_bit(kernels: str, compute: int) -> None:
    q, k, v, s = problem(heads=6, groups=3, n=200, batch=2)
    c = ref.Config(block_q=32, block_k=32, causal=1)
    want, kept = kernel.fused(c, q, k, v, s, compute=compute)
    for threads in (2, 7):
        assert (kernel.fused(c, q, k, v, s, compute=compute, threads=threads)[0] == want).all()
    q, k, v, out = (np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (q, k, v, np.zeros_like(q)))
    assert (kernel.fused(c, q, k, v, s, compute=compute, out=out)[0] == want).all()
    candidates = sum(len(row.candidates) for row in ref.mass_rows(c, q, k, s)) * 6
    assert 0 < kept[0] < kept[1] == candidates


def test_copying_strided_rows_is_only_faster(kernels: str) -> None:
    """BNHD without and with room for a copy, and with garbage in the padding that must not be copied into view."""
    q, k, v, _ = problem(heads=4, groups=2, n=200)
    length = np.array([170], np.int32)
    want = kernel.attend(ref.Config(), q, k, v, None, length, length)
    k[:, :, 170:], v[:, :, 170:] = np.nan, np.nan
    k, v = (np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (k, v))
    c, out = kernel.config(ref.Config(), q, k), np.empty_like(q)
    least, room = (
        f(ctypes.byref(c), 1) for f in (kernel.library().dsa_workspace, kernel.library().dsa_workspace_strided)
    )
    assert room - least >= k.nbytes + v.nbytes
    for size in (least, room - 1, room):
        memory = np.full(size + 8, 0xA5, np.uint8)
        before = (*map(kernel.tensor, (q, k, v)), None, None, kernel.lengths(length, length))
        place = (*kernel.addresses([memory]), ctypes.c_size_t(size), None)
        assert kernel.library().dsa_attend(ctypes.byref(c), *before, *place, *kernel.output(out)) == 0
        np.testing.assert_array_equal(out, want)
        assert (memory[size:] == 0xA5).all()


def test_the_workspace_is_not_overrun_and_may_be_unaligned(kernels: str) -> None:
    q, k, v, s = problem()
    for compute in (kernel.F32, kernel.I8):
        c, out = kernel.config(ref.Config(block_k=48), q, k, s, compute), np.empty_like(q)
        size = kernel.library().dsa_workspace(ctypes.byref(c), 1)
        memory = np.full(size + 64, 0xA5, np.uint8)
        place = ctypes.c_void_p(memory.ctypes.data + 3)
        before = (*map(kernel.tensor, (q, k, v)), kernel.scorer(s), kernel.lengths(None, None))
        tail = (*kernel.output(out), None)
        assert kernel.library().dsa_fused(ctypes.byref(c), *before, place, ctypes.c_size_t(size), None, *tail) == 0
        assert (memory[:3] == 0xA5).all() and (memory[3 + size :] == 0xA5).all()
        assert kernel.library().dsa_fused(ctypes.byref(c), *before, place, ctypes.c_size_t(size - 1), None, *tail) == 2


@pytest.mark.parametrize("compute", [kernel.F32, kernel.I8])
def test_padding_may_hold_anything(kernels: str, compute: int) -> None:
    q, k, v, s = problem(n=200)
    length, c = np.array([130], np.int32), ref.Config()
    want, _ = kernel.fused(c, q, k, v, s, length, length, compute=compute)
    for garbage in (np.nan, np.inf, 3e38):
        dirty = [x.copy() for x in (q, k, v)]
        for x in dirty:
            x[:, :, 130:] = garbage
        np.testing.assert_array_equal(kernel.fused(c, *dirty, s, length, length, compute=compute)[0], want)
    assert not want[:, :, 130:].any() and want[:, :, :130].any()


@pytest.mark.parametrize("bad", [np.float32(np.nan), np.uint32(0xFFFFFFFF).view(np.float32)])
def test_nan_in_a_used_token_reaches_every_row_that_sees_it(kernels: str, bad: np.float32) -> None:
    q, k, v, _ = problem(n=192)
    lists = ref.Lists(
        np.array([[[[0, 1, -1], [1, -1, -1], [2, -1, -1]]] * 2], np.int32), np.array([[[2, 1, 1]] * 2], np.int32)
    )
    for x in (k, v):
        dirty = x.copy()
        dirty[:, :, 70, 5] = bad
        out = kernel.attend(ref.Config(), q, *((dirty, v) if x is k else (k, dirty)), lists)
        assert np.isnan(out[:, :, :128, 5]).all() and not np.isnan(out[:, :, 128:]).any()
    dirty = q.copy()
    dirty[:, :, 7, 5] = bad
    out = kernel.attend(ref.Config(), dirty, k, v, lists)
    assert np.isnan(out[:, :, 7]).all() and not np.isnan(np.delete(out, 7, 2)).any()


@pytest.mark.parametrize("compute", [kernel.F32, kernel.I8])
def test_keys_of_the_future_do_not_matter(kernels: str, compute: int) -> None:
    """Also where a query block starts inside a key block, and where the first queries see none of it."""
    q, k, v, _ = problem(n=192)
    for block_q, block_k, offset in ((64, 64, 0), (32, 128, 0), (128, 48, 0), (16, 64, 7)):
        c = ref.Config(block_q=block_q, block_k=block_k, causal=1, q_offset=offset)
        want = kernel.attend(c, q, k, v, compute=compute)[:, :, :70]
        late = k.copy()
        late[:, :, 70 + offset :] = v[:, :, 70 + offset :] if compute == kernel.I8 else np.nan
        got = kernel.attend(c, q, late, v, compute=compute)[:, :, :70]
        if compute == kernel.F32:
            np.testing.assert_array_equal(got, want)
        else:  # one scale per block, one mean per head
            assert np.linalg.norm(got - want) <= 3e-2 * np.linalg.norm(want)


def test_large_logits_stay_exact(kernels: str) -> None:
    q, k, v, _ = problem(n=130)
    want = ref.attend(ref.Config(), 30 * q, 30 * k, v)
    assert np.abs(kernel.attend(ref.Config(), 30 * q, 30 * k, v) - want).max() <= 2e-3


@pytest.mark.parametrize(
    "field, value",
    [
        *[("dim", x) for x in (0, 24, 272)],
        *[(b, x) for b in ("block_q", "block_k") for x in (0, 8, 40, 144)],
        *[(x, 0) for x in ("batch", "q_heads", "kv_heads", "q_rows", "k_rows", "rank")],
        *[
            (x, -1)
            for x in ("dist", "sinks", "positions", "min_blocks", "max_blocks", "n_sink", "q_offset", "rule", "compute")
        ],
        ("kv_heads", 3),
        ("rule", 3),
        ("compute", kernel.BF16),
        ("q_offset", 2**31 - 1),
        ("batch", 2**30),
    ],
)
def test_a_bad_config_names_its_field(field: str, value: int) -> None:
    q, k, v, s = problem()
    c = kernel.config(ref.Config(), q, k, s)
    assert kernel.why(c) is None
    setattr(c, field, value)
    text = kernel.why(c)
    assert text is not None and text.startswith("q_heads" if field == "kv_heads" and value == 3 else field)
    assert kernel.library().dsa_workspace(ctypes.byref(c), 1) == 0
    out = kernel.output(np.empty_like(q))
    with pytest.raises(
        ValueError, match="unsupported" if value == kernel.BF16 and field == "compute" else "bad config"
    ):
        before = (*map(kernel.tensor, (q, k, v)), None, None, kernel.lengths(None, None))
        kernel.prepare("dsa_attend", c, before, out)()


# ---- The build.


@pytest.mark.parametrize("target", sorted(native.TARGETS))
def test_every_target_compiles(target: str) -> None:
    made = native.library(target)
    assert made.exists() and native.library(target) == made
    if not native.TARGETS[target].shared:
        want = {"dsa.o", "dispatch.o", "cpu.o", *(f"kernel_{n}.o" for n in native.kernel_sets("aarch64"))}
        assert {path.name for path in made.iterdir()} == want


def test_every_kernel_file_is_in_the_one_list() -> None:
    listed = {f"kernel_{name}.c" for arch in ("x86_64", "aarch64") for name in native.kernel_sets(arch)}
    assert listed == {path.name for path in (native.sources() / "dsa").glob("kernel_*.c")}


def test_the_core_includes_no_libc() -> None:
    allowed = {"<stddef.h>", "<stdint.h>", "<float.h>", "<immintrin.h>", "<arm_neon.h>", "<cpuid.h>"}
    for path in (native.sources() / "dsa").iterdir():
        included = {line.split()[1] for line in path.read_text().splitlines() if line.startswith("#include <")}
        assert included <= allowed, path.name


def test_build_errors_say_what_failed(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"sparc.*linux-aarch64"):
        native.library("linux-sparc")
    broken = tmp_path / "broken.c"
    broken.write_text("int main(void) { return nothing; }\n")
    with pytest.raises(BuildError, match=r"broken\.c.* for x86_64-linux-musl(.|\n)*undeclared identifier 'nothing'"):
        native.zig("-target", "x86_64-linux-musl", "-c", str(broken), "-o", str(tmp_path / "broken.o"))


def test_a_failed_build_leaves_nothing_behind(tmp_path: Path) -> None:
    with pytest.raises(BuildError), native.whole_or_nothing(tmp_path / "made") as work:
        (work / "half").touch()
        raise BuildError("stop")
    assert not list(tmp_path.iterdir())


# ---- The same vectors in C: on Arm under qemu, and with the sanitizers.


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("cpu, best", [("cortex-a72", "neon"), ("max", "neon_dotprod")])
def test_vectors_on_arm(cpu: str, best: str) -> None:
    """On a Cortex-A72 a dot product is an illegal instruction: using one ends the program."""
    qemu = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
    if not qemu:
        pytest.skip("qemu-aarch64-static is not installed")
    arm = str(native.program(PROGRAM, "linux-aarch64"))
    said = run(qemu, "-cpu", cpu, arm, str(INDEX), best)
    assert said.startswith(f"best: {best}\n") and f"{best}: 111 of 111 cases ok" in said
    if cpu == "cortex-a72":
        assert "cannot run" in run(qemu, "-cpu", cpu, arm, str(INDEX), "neon_dotprod")


@pytest.mark.slow
def test_vectors_with_sanitizers(tmp_path: Path) -> None:
    gcc = shutil.which("gcc")
    if not gcc or native.host() != "linux-x86_64":
        pytest.skip("gcc for this machine is not installed")
    flags = "-std=gnu11 -O1 -DDSA_CHECK_LISTS -fsanitize=address,undefined -fno-sanitize-recover=all".split()
    objects = []
    for path, own in native.units(native.TARGETS["linux-x86_64"]):
        objects.append(str(tmp_path / f"{path.stem}.o"))
        run(gcc, *flags, *own, "-c", str(path), "-o", objects[-1])
    binary = str(tmp_path / "vectors")
    run(gcc, *flags, f"-I{native.sources() / 'dsa'}", str(PROGRAM), *objects, "-o", binary, "-lm")
    said = run(binary, str(INDEX))
    assert f"{kernel.kernels()}: 111 of 111 cases ok" in said and "scalar: 111 of 111 cases ok" in said


def test_neon_executes_hardly_more_multiply_adds_than_attention_has(tmp_path: Path) -> None:
    """No device is needed to see a tile fall out of registers or work done twice: count instructions, not seconds."""
    qemu, gcc = shutil.which("qemu-aarch64"), shutil.which("gcc")
    if not qemu or not gcc:
        pytest.skip("qemu-aarch64 (the dynamic build, which loads plugins) or gcc is not installed")
    plugin, arm = str(tmp_path / "fmla.so"), str(native.program(HERE / "native" / "dsa_dense.c", "linux-aarch64"))
    run(gcc, "-O2", "-shared", "-fPIC", str(HERE / "native" / "fmla_plugin.c"), "-o", plugin)
    counts = []
    for times in ("1", "2"):
        command = [qemu, "-cpu", "cortex-a72", "-plugin", plugin, arm, times]
        done = subprocess.run(command, capture_output=True, text=True)
        if "plugin" in done.stderr and done.returncode:
            pytest.skip(f"this qemu loads no plugins: {done.stderr.strip()[:80]}")
        assert done.returncode == 0, done.stderr
        counts.append(int(done.stderr.split("fmla ")[1]))
    needed = 2 * 256 * 256 * 64 / 4
    assert needed <= counts[1] - counts[0] <= 1.1 * needed
