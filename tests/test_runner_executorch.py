"""The .pte runner: its protocol against a runner of a few lines, and the real one, here and in a board."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeformer as ef
from edgeformer import native as builds
from edgeformer_agent import native, wire
from edgeformer_agent.runners import executorch as runner

INPUTS = (wire.Tensor("x", "float32", (-1, -1)), wire.Tensor("n", "int32", (-1, -1)))
ROW = {"x": np.arange(3, dtype=np.float32), "n": np.arange(3, dtype=np.int64)}

# Answers R with the sum of the request's bytes, J with two layers, and the rest as the test says.
FAKE = """#!{python}
import struct, sys
def text(words): return struct.pack("<I", len(words)) + words.encode()
def send(data): sys.stdout.buffer.write(struct.pack("<I", len(data)) + data); sys.stdout.buffer.flush()
if sys.argv[1] == "--version": print("1.5.9"); sys.exit()
{start}
methods = struct.pack("<I", {methods}) + text("forward") + text("standard")
send(b"\\0" + struct.pack("<II", {protocol}, int(sys.argv[3])) + text("1.5.9") + methods)
while True:
    head = sys.stdin.buffer.read(4)
    if not head: break
    request = sys.stdin.buffer.read(struct.unpack("<I", head)[0])
    {then}
    if request[:1] == b"J": send(b"\\0" + text("neon") + struct.pack("<qIqqqq", 2, 2, 3, 4, 1, 4))
    elif request[:1] == b"P": send(b"\\1" + text("started without `profile`"))
    else: send(b"\\0" + struct.pack("<QIBBIIf", 1500, 1, 6, 2, 1, 1, sum(request)))
"""


def fake(tmp_path: Path, *, start: str = "", protocol: int = 2, methods: int = 2, then: str = "pass") -> str:
    path = tmp_path / "runner"
    path.write_text(FAKE.format(python=sys.executable, start=start, protocol=protocol, methods=methods, then=then))
    return str(path)  # not executable, as an upload leaves it


def opened(library: str) -> runner.Runner:
    return runner.Runner(library, "model.pte", INPUTS, 3)


def test_a_row_there_and_an_output_back(tmp_path: Path) -> None:
    run = opened(fake(tmp_path))
    sent = struct.pack("<I7sI", 7, b"forward", 1)  # the first output of it
    sent += struct.pack("<I", 2) + struct.pack("<BBII", 6, 2, 1, 3) + ROW["x"].tobytes()
    sent += struct.pack("<BBII", 3, 2, 1, 3) + ROW["n"].astype(np.int32).tobytes()
    assert run(ROW) == sum(b"R" + sent) and run.last_ns == 1500
    assert (run.version, run.threads, run.methods) == ("1.5.9", 3, ["forward", "standard"])
    assert runner.version(str(tmp_path / "runner")) == "1.5.9"


def test_the_journal_counts_a_run(tmp_path: Path) -> None:
    run = opened(fake(tmp_path))
    journal = native.journal(run, "unused")
    assert journal is not None
    journal.watch(run)(ROW)
    assert journal.native() == wire.Native(2, "neon", (0.75, 0.25))


def test_a_dense_program_has_no_journal(tmp_path: Path) -> None:
    assert native.journal(opened(fake(tmp_path, methods=1)), "unused") is None


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"start": "sys.exit('no such file')"}, "ended with code 1: no such file"),
        ({"start": "send(b'\\1' + text('the file cannot be read')); sys.exit(1)"}, "the file cannot be read"),
        ({"protocol": 1}, "speaks protocol 1, this agent 2"),
        ({"methods": 9}, "ends too early"),
    ],
)
def test_a_bad_beginning(tmp_path: Path, how: dict[str, Any], says: str) -> None:
    with pytest.raises(runner.Broken, match=says):
        opened(fake(tmp_path, **how))


@pytest.mark.parametrize(
    ("then", "says"),
    [
        ("sys.exit('out of memory')", "ended with code 1: out of memory"),
        ("import os; os.kill(os.getpid(), 11)", "killed by signal 11"),
        ("sys.stdout.buffer.write(b'\\9\\0\\0\\0half'); sys.exit(7)", "ended with code 7"),
        ("send(b'\\1' + text('the method failed')); continue", "the method failed"),
        ("send(b'\\0' + b'12345678'); continue", "ends too early"),
    ],
)
def test_a_bad_answer(tmp_path: Path, then: str, says: str) -> None:
    run = opened(fake(tmp_path, then=then))
    with pytest.raises(runner.Broken, match=says):
        run(ROW)


def test_a_runner_that_is_gone_stays_gone(tmp_path: Path) -> None:
    run = opened(fake(tmp_path))
    os.kill(run._process.pid, signal.SIGKILL)
    for says in ("killed by signal 9", "is closed"):
        with pytest.raises(runner.Broken, match=says):
            run(ROW)


def test_nothing_is_left_running(tmp_path: Path) -> None:
    run = opened(fake(tmp_path))
    process = run._process
    del run
    assert process.returncode == -signal.SIGKILL


# --- the real one -----------------------------------------------------------------------------------------------------

LENGTH = 70


@pytest.fixture
def bundle(executorch_bundle: Any) -> Any:
    return executorch_bundle


def rows(length: int) -> tuple[dict[str, np.ndarray[Any, Any]], Any]:
    import sparse_models
    import torch

    made = sparse_models.rows(1, length)
    return {name: x[0] for name, x in made.items()}, tuple(map(torch.from_numpy, made.values()))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "fp32"])
def test_both_methods_agree_with_torch(bundle: Any, precision: str) -> None:
    made, model, _ = bundle
    entry = next(e for e in made.manifest.programs if e.precision == precision)
    path, library = str(made.path / entry.path), str(builds.runner())
    forward = runner.load(path, entry, 1, library)
    standard = runner.Runner(library, path, entry.inputs, method="standard")
    python = runner.load(path, entry, 1)
    for length in (1, 2, 33, LENGTH):
        row, tensors = rows(length)
        want, counted = model.module(*tensors)[0].numpy(), forward.counters()
        outputs = [run(row) for run in (forward, standard, python)]
        counted = forward.counters()
        assert counted.calls == 1 and counted.kernel_set != "scalar" and 0 < counted.kept[0][0] <= counted.kept[0][1]
        for output in outputs:
            np.testing.assert_allclose(output, outputs[0], rtol=0, atol=1e-6)
            np.testing.assert_allclose(output, want, rtol=0, atol=1e-6 if precision == "fp32" else 0.05)
    with pytest.raises(runner.Broken, match="an input does not fit the method"):
        forward(rows(LENGTH + 1)[0])
    np.testing.assert_array_equal(forward(row), outputs[0])  # and it goes on
    assert standard.counters is None and not hasattr(python, "counters")
    times = dict(forward.profiled(row))
    assert (
        times["edgeformer::dsa.out"] > 0
        and any("Fully Connected" in name for name in times)
        and all(ms >= 0 for ms in times.values())
    )
    with pytest.raises(runner.Broken, match="without `profile`"):
        forward.profile(row)


@pytest.mark.slow
def test_two_methods_share_the_weights(bundle: Any) -> None:
    """A weight's bytes stand once in the file, in either precision; the int8 file is the smaller one."""
    made, model, _ = bundle
    stored = {e.precision: (made.path / e.path).read_bytes() for e in made.manifest.programs}
    bias = model.module.module.layers[0].o.bias.detach().numpy().tobytes()
    assert stored["fp32"].count(bias) == stored["int8"].count(bias) == 1
    assert len(stored["int8"]) < len(stored["fp32"])


@pytest.mark.slow
def test_work_is_counted_on_the_program(bundle: Any) -> None:
    from edgeformer.attention import cost

    made = bundle[0]
    work = {e.precision: e.work[-1] for e in made.manifest.programs}
    linears, shape = 2.0 * LENGTH * 4 * 64 * 64, (1, 2, LENGTH, 32)
    attention = cost.operations(shape, shape, 8, cost.Kept(0, ()))
    assert work["fp32"][:4] == (LENGTH, linears + attention, 0.0, 4 * 4 * 64 * 64)
    assert work["int8"][:4] == (LENGTH, attention, linears, 4 * 64 * 64)


@pytest.mark.slow
def test_a_bad_file_or_method_says_so(bundle: Any, tmp_path: Path) -> None:
    library, made = str(builds.runner()), bundle[0]
    entry = made.manifest.programs[0]
    (tmp_path / "model.pte").write_bytes(b"no program at all" * 100)
    for path, method, says in (
        (str(tmp_path / "none.pte"), "forward", "the file cannot be read"),
        (str(tmp_path / "model.pte"), "forward", "no program of this version"),
        (str(made.path / entry.path), "backward", "no such method"),
    ):
        with pytest.raises(runner.Broken, match=says):
            runner.Runner(library, path, entry.inputs, method=method)


@pytest.mark.slow
def test_a_board_without_torch_runs_it(bundle: Any, board: Any) -> None:
    made, _, config = bundle
    assert all(
        e.libraries == {"linux-aarch64": "native/linux-aarch64/edgeformer_runner"} for e in made.manifest.programs
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(config))
        report = ef.deploy(
            made, f"ssh://{board.user}@{board.host}:{board.port}",
            ssh=ef.SshOptions(key_file=board.client_key, known_hosts=board.known_hosts),
            measure=ef.Measure("quick", min_runs=2, min_seconds=0, rows=2),
        )  # fmt: skip
    assert report.kind == "emulated" and report.skipped == {}
    assert {r.program for r in report.results} == {"executorch-int8", "executorch-fp32"}
    for result in report.results:
        assert result.golden.passed and "native_fallback" not in result.flags and result.runtime_version == "1.5.1"
        assert result.native is not None
        assert (result.native.calls_per_run, result.native.kernel_set) == (1, "neon")
        assert len(result.native.kept) == 1 and 0 < result.native.kept[0] <= 1


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("cmake") or not shutil.which("g++"), reason="needs cmake and g++")
def test_cmake_builds_the_same_runner(bundle: Any, tmp_path: Path) -> None:
    made, entry = bundle[0], bundle[0].manifest.programs[0]
    source = builds.sources() / "bindings" / "executorch"
    sdk = builds.executorch(builds.host())
    configure = ["cmake", "-S", str(source), "-B", str(tmp_path), f"-DCMAKE_PREFIX_PATH={sdk}"]
    for command in (configure, ["cmake", "--build", str(tmp_path)]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-1500:]
    path, row = str(made.path / entry.path), rows(LENGTH)[0]
    outputs = []
    for library in (tmp_path / "edgeformer_runner", builds.runner()):
        run = runner.load(path, entry, 1, str(library))
        outputs.append(run(row))
        assert run.counters().calls == 1
    np.testing.assert_array_equal(outputs[0], outputs[1])
