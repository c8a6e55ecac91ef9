"""
The agent as a device runs it: one file, a fresh interpreter with nothing of ours on its path, a small real program.

`device` has numpy, psutil and ONNX Runtime; its LiteRT is a stand-in that does what the program's bytes say: crash,
sleep, or leave a mark that something was opened.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import venv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import factory
import numpy as np
import pytest
from small_bundle import KEYS, edit, signer
from test_link import ends

from edgeformer import bundle
from edgeformer.bundle import Bundle
from edgeformer_agent import __main__ as agent, cases, measure, system, verify, wire

LENGTHS = (3, 1, 7, 5, 9, 2, 11, 4, 8, 6, 10, 12)
TABLE = np.random.default_rng(3).normal(0, 2, (16, 2)).astype(np.float32)
RUNTIMES = {
    "onnx": wire.Runtime("onnxruntime", "1.20", "2"),
    "litert": wire.Runtime("ai-edge-litert", "2.3", "2.4"),
}
LITERT = """
import os, signal, time
def load_delegate(library): ...
class Interpreter:
    def __init__(self, model_path, num_threads, experimental_delegates):
        with open(model_path) as file:
            word = file.read()
        with open(os.environ["MARK"] + ".part", "w") as file:
            file.write(str(os.getpid()))
        os.replace(os.environ["MARK"] + ".part", os.environ["MARK"])
        if word == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        time.sleep(60)
"""


@dataclasses.dataclass(frozen=True)
class Device:
    """An interpreter, and a folder for its temporary files that must be empty after every run."""

    python: Path
    temporary: Path

    @property
    def mark(self) -> Path:
        return self.temporary.with_name("mark")

    def start(self, folder: Path, *words: str | Path, verb: str = "run", flags: Sequence[str] = ()) -> Any:
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [self.python, "-I", *flags, folder / "agent.pyz", verb, folder, *words],
            stdout=pipe, stderr=pipe, cwd=self.temporary.parent, start_new_session=True,
            env={"HOME": str(self.temporary), "TMPDIR": str(self.temporary), "MARK": str(self.mark), "LC_ALL": "C"},
        )  # fmt: skip

    def run(
        self, folder: Path, *words: str | Path, verb: str = "run", key: str = KEYS[0], flags: Sequence[str] = ()
    ) -> subprocess.CompletedProcess[str]:
        known = ("--key", key) if key else ()
        with self.start(folder, *words, *known, verb=verb, flags=flags) as process:
            out, errors = (stream.decode() for stream in process.communicate())
        assert not list(self.temporary.iterdir())
        assert "Traceback" not in errors
        return subprocess.CompletedProcess(process.args, process.returncode, out, errors)


def an_interpreter(folder: Path, packages: Sequence[str], own: Mapping[str, str]) -> Path:
    """A virtual environment with links to installed packages and the text of others: nothing else can be imported."""
    venv.EnvBuilder(symlinks=True).create(folder)
    site = next((folder / "lib").glob("python*/site-packages"))
    for name in packages:
        found = importlib.util.find_spec(name)
        assert found and found.origin
        origin = Path(found.origin).parent
        for path in (origin, origin.with_name(f"{name}.libs")):
            if path.exists():
                (site / path.name).symlink_to(path)
    for file, text in own.items():
        (site / file).parent.mkdir(exist_ok=True)
        (site / file).write_text(text)
    return folder / "bin" / "python"


@pytest.fixture(scope="module")
def interpreters(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    pytest.importorskip("onnxruntime")
    folder, packages = tmp_path_factory.mktemp("interpreters"), ("numpy", "psutil")
    litert = {"ai_edge_litert/__init__.py": "__version__ = '2.3.0'", "ai_edge_litert/interpreter.py": LITERT}
    old = {"onnxruntime.py": "__version__ = '1.9.2'"}
    return {
        "device": an_interpreter(folder / "device", (*packages, "onnxruntime"), litert),
        "bare": an_interpreter(folder / "bare", packages, {}),
        "old": an_interpreter(folder / "old", packages, old),
        "no numpy": an_interpreter(folder / "none", ("psutil",), {}),
    }


@pytest.fixture
def device(interpreters: Mapping[str, Path], tmp_path: Path) -> Device:
    (tmp_path / "temporary").mkdir()
    return Device(interpreters["device"], tmp_path / "temporary")


def on(device: Device, interpreters: Mapping[str, Path], name: str) -> Device:
    return dataclasses.replace(device, python=interpreters[name])


def program(detours: int = 0) -> bytes:
    """Mean of the tokens' rows of TABLE. Detours multiply by the identity: the same result, later."""
    helper = pytest.importorskip("onnx.helper")
    from onnx import TensorProto, numpy_helper

    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["x0"])]
    for i in range(detours):
        nodes.append(helper.make_node("MatMul", [f"x{i}", "there"], [f"wide{i}"]))
        nodes.append(helper.make_node("MatMul", [f"wide{i}", "back"], [f"x{i + 1}"]))
    nodes.append(helper.make_node("ReduceMean", [f"x{detours}"], ["logits"], axes=[1], keepdims=0))
    wide = np.eye(2, 512, dtype=np.float32)
    weights = {"table": TABLE, "there": wide, "back": wide.T}
    graph = helper.make_graph(
        nodes,
        "mean",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "tokens"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])],
        [numpy_helper.from_array(array, name) for name, array in weights.items() if detours or name == "table"],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7)
    return bytes(model.SerializeToString())


def rows() -> tuple[cases.Row, ...]:
    drawn = np.random.default_rng(5)
    return tuple({"input_ids": drawn.integers(0, 16, n)} for n in LENGTHS)


def right(row: cases.Row) -> Any:
    return TABLE[row["input_ids"]].mean(axis=0)


def made(
    folder: Path, programs: Mapping[str, bytes], wrong: Sequence[str] = (), needs: wire.Needs | None = None,
    **changes: object,
) -> Bundle:  # fmt: skip
    """A bundle of `programs`; the golden outputs of those in `wrong` are not what they compute."""
    entries = tuple(
        factory.entry(
            name, inputs=(wire.Tensor("input_ids", "int64", (-1, -1)),), lengths=(), needs=needs or wire.Needs(),
            outputs=(wire.Tensor("logits", "float32", (-1, 2)),), runtime=RUNTIMES[name.split("-")[0]],
        )
        for name in programs
    )  # fmt: skip
    given, reference = rows(), tuple(right(row) for row in rows())
    labels = np.array([output.argmax() for output in reference])
    labels[0] = 1 - labels[0]
    golden = {name: tuple(y[::-1] if name in wrong else y for y in reference[:3]) for name in programs}
    contents = {
        **{entry.path: programs[entry.name] for entry in entries},
        "cases/golden.npz": cases.dump(cases.Cases(given[:3], golden, None)),
        "cases/evaluation.npz": cases.dump(cases.Cases(given, {"reference": reference}, labels)),
    }
    where = wire.Cases("cases/golden.npz", "cases/evaluation.npz", len(given), "made up")
    manifest = factory.manifest((), files={}, cases=where, **{"expires": "2999-12-31", **changes})
    return bundle.write(folder, manifest._replace(programs=entries), contents, signer())


SHORT = ("--profile", "quick", "--min-runs", "1", "--min-seconds", "0", "--rows", "2")


def current(home: Path) -> str:
    return str((home / "current").readlink())


# --- A report -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def measured(interpreters: Mapping[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, wire.Report]:
    folder = tmp_path_factory.mktemp("measured")
    (folder / "temporary").mkdir()
    made_bundle = made(folder / "bundle", {"onnx-fp32": program(detours=20), "onnx-int8": program()})
    device = Device(interpreters["device"], folder / "temporary")
    done = device.run(made_bundle.path, "--profile", "quick", "--out", folder / "out" / "report.json")
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    assert [path.name for path in (folder / "out").iterdir()] == ["report.json"]
    return made_bundle, wire.load_report((folder / "out" / "report.json").read_bytes())


def test_the_report_is_of_this_bundle_on_this_device(measured: tuple[Bundle, wire.Report]) -> None:
    made_bundle, report = measured
    assert report.bundle == made_bundle.digest
    assert (report.name, report.version, report.target) == ("minilm-sst2", 3, "raspberry-pi-4")
    assert (report.kind, report.profile, report.skipped) == ("measured", "quick", {})
    assert report.device["cores"] == os.cpu_count()
    assert report.device["python"].startswith("{}.{}.".format(*sys.version_info))
    assert [result.program for result in report.results] == ["onnx-fp32", "onnx-int8"]


def test_the_fastest_program_is_selected(measured: tuple[Bundle, wire.Report]) -> None:
    slow, fast = (result.latency for result in measured[1].results)
    assert slow and fast and slow.p50_ms > fast.p50_ms
    assert measured[1].selected == "onnx-int8"


@pytest.mark.parametrize("which", [0, 1])
def test_a_result_has_every_figure(measured: tuple[Bundle, wire.Report], which: int) -> None:
    result = measured[1].results[which]
    assert result.golden.passed and result.golden.rows == 3 and result.golden.worst > 0.9999
    assert (result.format, result.threads) == ("onnx", 1)
    assert result.runtime_version == importlib.import_module("onnxruntime").__version__
    assert min(result.import_ms, result.load_ms, result.first_ms) > 0
    assert result.latency and result.latency.n == len(result.latency.samples_us)
    assert result.latency.n >= 10 and result.latency.n % len(LENGTHS) == 0 and result.latency.seconds >= 0.5
    assert sorted(result.latency.row_lengths) == sorted(LENGTHS)
    assert 5 < result.memory.growth_mb < result.memory.peak_rss_mb
    assert result.fidelity and result.fidelity.rows == len(LENGTHS)
    assert result.fidelity.mean == 1 and result.fidelity.max_abs < 1e-5
    assert result.fidelity.metric == "accuracy"
    assert result.fidelity.value == result.fidelity.reference == pytest.approx(11 / 12)
    assert "too_short" in result.flags and "evaluation_partial" not in result.flags
    assert result.before and result.after and set(result.before) == set(result.after)


def test_the_plan_can_be_changed(device: Device, tmp_path: Path) -> None:
    made_bundle = made(tmp_path / "bundle", {"onnx-fp32": program(), "onnx-int8": program()})
    words = [
        "--program",
        "onnx-int8",
        "--profile",
        "quick",
        "--rows",
        "5",
        "--min-runs",
        "23",
        "--min-seconds",
        "0.2",
        "--threads",
        "2",
    ]
    done = device.run(made_bundle.path, *words)
    report = wire.load_report(done.stdout.encode())  # without --out the report, and only that, is on stdout
    (result,) = report.results
    assert done.returncode == 0 and result.latency
    assert (result.program, result.threads, report.profile) == ("onnx-int8", 2, "custom")
    assert len(result.latency.row_lengths) == 5 and result.latency.n >= 25 and result.latency.seconds >= 0.2
    assert result.fidelity and result.fidelity.rows == 5
    assert "evaluation_partial" in result.flags
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "bundle.tar", "temporary"]


def test_stdout_is_utf8_in_every_locale(device: Device, tmp_path: Path) -> None:
    made_bundle = made(tmp_path / "bundle", {"onnx-int8": program()}, name="modèle")
    done = device.run(made_bundle.path, *SHORT, flags=("-X", "utf8=0"))
    assert wire.load_report(done.stdout.encode()).name == "modèle", done.stderr


def test_a_recorded_root_is_what_is_described(device: Device, tmp_path: Path) -> None:
    made_bundle = made(tmp_path / "bundle", {"onnx-int8": program()})
    (tmp_path / "root" / "etc").mkdir(parents=True)
    (tmp_path / "root" / "etc" / "edgeformer-emulated").write_text("nothing at all")
    done = device.run(made_bundle.path, "--root", tmp_path / "root")
    report = wire.load_report(done.stdout.encode())
    assert (report.kind, report.device["emulation"]) == ("emulated", "/etc/edgeformer-emulated: nothing at all")
    assert report.results[0].latency and report.results[0].latency.n < 10  # few are spent on times that mean nothing
    assert "evaluation_partial" in report.results[0].flags


# --- Wrong use ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "key", "says"),
    [
        ((), "", "--key is missing"),
        (("--program", "onnx-fp16"), KEYS[0], "no program onnx-fp16 in this bundle; it has litert-int8, onnx-int8"),
        (("--rows", "0"), KEYS[0], "0 must be at least 1"),
        (("--min-seconds", "inf"), KEYS[0], "inf must be a number of seconds"),
        (("--profile", "long"), KEYS[0], "invalid choice: 'long'"),
    ],
)
def test_wrong_use(device: Device, tmp_path: Path, words: Sequence[str], key: str, says: str) -> None:
    made_bundle = made(tmp_path / "bundle", {"litert-int8": b"mark", "onnx-int8": program()})
    done = device.run(made_bundle.path, *words, key=key)
    assert (done.returncode, done.stdout) == (2, "") and says in done.stderr
    assert not device.mark.exists()


@pytest.mark.parametrize(
    ("out", "code", "says"),
    [("bundle.tar/report.json", 3, "report.json cannot be written"), ("temporary", 2, "is a folder; name a file")],
)
def test_an_out_that_cannot_be_written_is_told_before_measuring(
    device: Device, tmp_path: Path, out: str, code: int, says: str
) -> None:
    made_bundle = made(tmp_path / "bundle", {"litert-int8": b"mark"})
    done = device.run(made_bundle.path, "--out", tmp_path / out)
    assert (done.returncode, done.stdout) == (code, "") and says in done.stderr
    assert not device.mark.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "bundle.tar", "temporary"]


# --- Refused --------------------------------------------------------------------------------------------------------


def _tamper(folder: Path) -> None:
    path = folder / "programs/litert-int8/model.litert"
    path.write_bytes(path.read_bytes().upper())


REFUSALS = {
    "tampered": (_tamper, "changed: programs/litert-int8/model.litert (sha256"),
    "extra": (lambda folder: (folder / "numpy.py").touch(), "extra: numpy.py"),
    "expired": (lambda folder: edit(folder, lambda body: body.update(expires="2020-02-29")), "valid to 2020-02-29"),
    "unsigned": (lambda folder: (folder / "manifest.sig").unlink(), "manifest.sig: "),
}


@pytest.mark.parametrize("verb", ["run", "verify"])
@pytest.mark.parametrize("case", REFUSALS)
def test_a_bundle_that_is_not_what_was_signed(device: Device, tmp_path: Path, case: str, verb: str) -> None:
    made_bundle, home = made(tmp_path / "bundle", {"litert-int8": b"mark"}), tmp_path / "home"
    change, says = REFUSALS[case]
    change(made_bundle.path)
    done = device.run(made_bundle.path, "--home", home, verb=verb)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert done.stderr.startswith("edgeformer agent: bundle refused: ") and says in done.stderr
    assert not device.mark.exists() and not home.exists()


def test_a_key_that_is_not_pinned(device: Device, tmp_path: Path) -> None:
    made_bundle = made(tmp_path / "bundle", {"litert-int8": b"mark"})
    done = device.run(made_bundle.path, key=signer(2).public)
    assert done.returncode == 1 and f"signed by {KEYS[0]}, which is not a trusted key" in done.stderr
    assert not device.mark.exists()


# --- Self-check -----------------------------------------------------------------------------------------------------


def test_a_program_that_computes_something_else(device: Device, tmp_path: Path) -> None:
    home = tmp_path / "home"
    good = made(home / "releases" / "good", {"onnx-int8": program()})
    bad = made(home / "releases" / "bad", {"onnx-int8": program()}, wrong=["onnx-int8"], version=4)
    assert device.run(good.path, "--home", home, *SHORT).returncode == 0
    done = device.run(bad.path, "--home", home, "--out", tmp_path / "report.json")
    assert done.returncode == 1 and "no program passed its self-check" in done.stderr
    report = wire.load_report((tmp_path / "report.json").read_bytes())
    (result,) = report.results
    assert (report.selected, result.latency, result.fidelity, result.golden.passed) == (None, None, None, False)
    assert result.golden.worst < result.golden.floor and result.flags == ("self_check_failed",)
    assert current(home) == "releases/good"
    assert device.run(good.path, "--home", home, *SHORT).returncode == 0  # what failed has not raised the version


def test_one_program_that_fails_does_not_cost_the_other(device: Device, tmp_path: Path) -> None:
    home = tmp_path / "home"
    programs = {"onnx-fp32": program(), "onnx-int8": program()}
    made_bundle = made(home / "releases" / "mixed", programs, wrong=["onnx-int8"])
    done = device.run(made_bundle.path, "--home", home, *SHORT)
    report = wire.load_report(done.stdout.encode())
    assert done.returncode == 1 and "self-check failed: similarity" in done.stderr
    assert [result.golden.passed for result in report.results] == [True, False]
    assert (report.selected, current(home)) == ("onnx-fp32", "releases/mixed")


def test_a_value_that_is_not_finite_is_no_result(device: Device, tmp_path: Path) -> None:
    """Only a later row shows it: the golden ones are the first three."""
    onnx = pytest.importorskip("onnx")
    model = onnx.load_from_string(program())
    infinite = TABLE.copy()
    infinite[next(t for t in range(16) if all(t not in row["input_ids"] for row in rows()[:3]))] = np.inf
    model.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(infinite, "table"))
    made_bundle = made(tmp_path / "bundle", {"onnx-fp32": program(), "onnx-int8": model.SerializeToString()})
    done = device.run(made_bundle.path, *SHORT[:-2])
    report = wire.load_report(done.stdout.encode())
    assert report.selected == "onnx-fp32" and "gives a value that is not finite" in report.skipped["onnx-int8"]


# --- What is missing ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "says"),
    [
        (
            "bare",
            "onnxruntime is not installed (No module named 'onnxruntime'). Run: pip install 'onnxruntime>=1.20,<2'",
        ),
        ("old", "onnxruntime 1.9.2 is installed, the program needs >=1.20,<2"),
    ],
)
def test_no_runtime_that_fits(
    device: Device, interpreters: Mapping[str, Path], tmp_path: Path, where: str, says: str
) -> None:
    made_bundle = made(tmp_path / "bundle", {"onnx-int8": program()})
    done = on(device, interpreters, where).run(made_bundle.path, "--home", tmp_path / "home")
    report = wire.load_report(done.stdout.encode())
    assert (done.returncode, report.results, report.selected) == (3, (), None)
    assert report.skipped == {"onnx-int8": says}
    assert f"no program could run here: {says}" in done.stderr
    assert not (tmp_path / "home").exists()


def test_a_missing_runtime_is_answered_with_what_helps() -> None:
    def says(package: str, distrust: str | None = None) -> str:
        entry = factory.entry("onnx-int8")._replace(runtime=wire.Runtime(package, "8.2", "8.3"))
        return str(measure._missing(entry, ImportError("none"), distrust))

    assert says("tensorrt").endswith("(none). It comes with JetPack: sudo apt-get install nvidia-jetpack")
    untrusted = says("executorch", "killed by signal 4")
    assert untrusted.startswith(
        "the bundle's own library cannot be used here (killed by signal 4), and executorch is not"
    )
    assert untrusted.endswith("Run: pip install 'executorch>=8.2,<8.3'")


def test_a_profile_is_short_and_costs_no_result() -> None:
    class Run:
        def profiled(self, row: dict[str, np.ndarray]) -> list[tuple[str, float]]:
            if len(row["input_ids"]) != 4:
                raise ValueError("not the row of median length")
            return [(f"op{i}", 20.0 - i) for i in range(14)]

    found = measure._profile(Run(), [{"input_ids": np.zeros(n)} for n in (9, 1, 4)])
    assert [x.operator for x in found] == [*(f"op{i}" for i in range(12)), "the rest"] and found[-1].ms == 15.0
    assert measure._profile(Run(), [{"input_ids": np.zeros(1)}]) == () == measure._profile(print, [])


def test_a_device_without_numpy(device: Device, interpreters: Mapping[str, Path], tmp_path: Path) -> None:
    made_bundle, bare = made(tmp_path / "bundle", {"onnx-int8": program()}), on(device, interpreters, "no numpy")
    done = bare.run(made_bundle.path)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.endswith(f"Run: {bare.python} -m pip install numpy\n")
    assert bare.run(made_bundle.path, verb="verify").stderr.startswith("ok: minilm-sst2 version 3 for raspberry-pi-4")


def test_a_runtime_that_crashes_takes_nothing_with_it(device: Device, tmp_path: Path) -> None:
    home = tmp_path / "home"
    made_bundle = made(home / "releases" / "1", {"litert-int8": b"crash", "onnx-int8": program()})
    done = device.run(made_bundle.path, "--home", home, *SHORT)
    report = wire.load_report(done.stdout.encode())
    assert device.mark.exists()
    assert report.skipped == {"litert-int8": f"it ended without a word (killed by signal {int(signal.SIGSEGV)})"}
    assert (done.returncode, report.selected, current(home)) == (0, "onnx-int8", "releases/1")


def test_a_system_that_is_too_old(device: Device, tmp_path: Path) -> None:
    made_bundle = made(tmp_path / "bundle", {"onnx-int8": program()}, needs=wire.Needs(glibc="99.1"))
    done = device.run(made_bundle.path)
    assert done.returncode == 3 and "the runtime needs 99.1: a newer system is needed" in done.stderr


@pytest.mark.parametrize(
    ("needs", "glibc", "isa", "says"),
    [
        (wire.Needs("2.28"), "2.9", None, "glibc 2.9 is installed, the runtime needs 2.28: a newer system is needed"),
        (wire.Needs("2.28"), "2.28", None, None),
        (wire.Needs("2.28"), None, None, None),  # musl, macOS: the runtime's import will tell
        (wire.Needs(None, ("asimd", "asimddp", "i8mm")), "2.31", ["asimd", "fp"], "this CPU lacks asimddp, i8mm"),
        (wire.Needs("2.31", ("asimd",)), "2.36", ["asimd", "fp"], None),
    ],
)
def test_what_a_device_lacks(
    monkeypatch: pytest.MonkeyPatch, needs: wire.Needs, glibc: str | None, isa: list[str] | None, says: str | None
) -> None:
    monkeypatch.setattr(system, "facts", lambda: {"glibc": glibc, "isa": isa})
    assert agent._lacking(factory.entry("onnx-int8", needs=needs)) == says


def test_a_program_that_hangs_is_stopped(device: Device, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_bundle = made(tmp_path / "bundle", {"litert-int8": b"sleep"})
    monkeypatch.setattr(sys, "executable", str(device.python))
    monkeypatch.setattr(sys, "argv", [str(made_bundle.path / "agent.pyz")])
    monkeypatch.setenv("MARK", str(device.mark))
    options = argparse.Namespace(
        bundle=made_bundle.path, profile="quick", threads=1, root="/", key=KEYS, min_runs=None, min_seconds=None,
        rows=None,
    )  # fmt: skip
    for seconds in (1, 4, 16, 64):  # until the child came as far as to hang, on a machine however busy
        monkeypatch.setattr(agent, "CHILD_SECONDS", seconds)
        assert agent._in_child(options, made_bundle.manifest.programs[0]) == f"stopped after {seconds} s"
        if device.mark.exists():
            break
    assert ends(int(device.mark.read_text()))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_program_too(device: Device, tmp_path: Path, number: signal.Signals, code: int) -> None:
    made_bundle = made(tmp_path / "bundle", {"litert-int8": b"sleep"})
    words = ["--key", KEYS[0], "--home", tmp_path / "home", "--out", tmp_path / "report.json"]
    with device.start(made_bundle.path, *words) as process:
        while not device.mark.exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        errors = process.communicate()[1].decode()
    assert process.returncode == code and errors.endswith("nothing was changed\n") and "Traceback" not in errors
    assert ends(int(device.mark.read_text()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "bundle.tar", "mark", "temporary"]
    assert not list(device.temporary.iterdir())


# --- Releases -------------------------------------------------------------------------------------------------------


def test_current_and_previous_and_no_way_back(device: Device, tmp_path: Path) -> None:
    home = tmp_path / "home"
    versions = [made(home / "releases" / f"v{n}", {"onnx-int8": program()}, version=n) for n in (1, 2, 3)]
    for number in (0, 1, 1, 2):  # once more is no change
        assert device.run(versions[number].path, "--home", home, *SHORT).returncode == 0
        assert current(home) == f"releases/v{number + 1}"
    assert str((home / "previous").readlink()) == "releases/v2"
    for verb in ("run", "verify"):
        done = device.run(versions[1].path, "--home", home, verb=verb)
        assert done.returncode == 1
        assert "rollback: 'minilm-sst2' version 2 is older than 3, which was accepted before" in done.stderr
    assert device.run(home / "current", "--home", home, *SHORT).returncode == 0  # named by the link itself
    assert (current(home), str((home / "previous").readlink())) == ("releases/v3", "releases/v2")
    assert sorted(path.name for path in home.iterdir()) == ["current", "previous", "releases", "versions.json"]


def test_a_home_that_is_a_link_and_not_there_yet(device: Device, tmp_path: Path) -> None:
    made_bundle = made(tmp_path / "bundle", {"onnx-int8": program()})
    (tmp_path / "deep" / "deeper").mkdir(parents=True)
    (tmp_path / "link").symlink_to("deep/deeper")
    assert device.run(made_bundle.path, "--home", tmp_path / "link" / "new", *SHORT).returncode == 0
    assert (tmp_path / "deep" / "deeper" / "new" / "current").resolve() == made_bundle.path.resolve()


def test_a_home_that_cannot_change(device: Device, tmp_path: Path) -> None:
    """The report is written all the same, and the exit code says that the device still has the old release."""
    made_bundle, home = made(tmp_path / "bundle", {"onnx-int8": program()}), tmp_path / "home"
    (home / "current").mkdir(parents=True)
    done = device.run(made_bundle.path, "--home", home, *SHORT)
    assert done.returncode == 3 and f"it passed, but it cannot become {home}/current: " in done.stderr
    assert wire.load_report(done.stdout.encode()).selected == "onnx-int8"
    assert [path.name for path in home.iterdir()] == ["current"]


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_a_whole_release(device: Device, tmp_path: Path) -> None:
    home, moments = tmp_path / "home", random.Random(0)
    paths = [made(home / "releases" / name, {"onnx-int8": program()}, builder=name).path for name in ("a", "b")]
    began = time.monotonic()
    assert device.run(paths[0], "--home", home, *SHORT).returncode == 0
    whole = time.monotonic() - began
    for number in range(8):
        before = current(home)
        with device.start(paths[(number + 1) % 2], "--key", KEYS[0], "--home", home, *SHORT) as process:
            time.sleep(moments.uniform(0.4, 1.1) * whole)
            os.killpg(process.pid, signal.SIGKILL)
        assert current(home) in (before, f"releases/{'ba'[number % 2]}")
        assert (home / "current" / "manifest.json").is_file()
        assert verify.highest(home, "minilm-sst2", KEYS[0]) == 3
    shutil.rmtree(device.temporary)  # what a kill leaves there goes with the folder that deploy makes for each run
    device.temporary.mkdir()
    assert device.run(paths[1], "--home", home, *SHORT).returncode == 0
    assert current(home) == "releases/b"


FLIP = """
import argparse, itertools, sys
sys.path.insert(0, sys.argv[1])
from edgeformer_agent import __main__ as agent, wire
manifest = wire.load_manifest(open(sys.argv[3] + "/manifest.json", "rb").read())
print("go", flush=True)
for number in itertools.count(1):
    options = argparse.Namespace(home=sys.argv[2], bundle=sys.argv[3 + number % 2])
    agent._activate(options, manifest._replace(version=number), "k")
"""


def test_current_is_never_missing_while_it_flips(device: Device, tmp_path: Path) -> None:
    home, moments = tmp_path / "home", random.Random(1)
    paths = [made(home / "releases" / name, {"onnx-int8": program()}, builder=name).path for name in ("a", "b")]
    command = [device.python, "-I", "-c", FLIP, paths[0] / "agent.pyz", home, *paths]
    seen, newest = set(), 0
    for _ in range(5):
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout and process.stdout.readline() == b"go\n"
            while newest == 0 and not (home / "current").is_symlink():
                assert process.poll() is None
            until = time.monotonic() + moments.uniform(0.02, 0.1)
            while time.monotonic() < until:
                seen.add(current(home))
            process.kill()
        seen.add(current(home))
        newest = verify.highest(home, "minilm-sst2", "k")  # raises where the file is not whole
        assert newest > 0
    assert seen == {"releases/a", "releases/b"}


# --- Python 3.6 -----------------------------------------------------------------------------------------------------


def _python36() -> str | None:
    found = [*Path.home().glob(".pyenv/versions/3.6*/bin/python3.6"), shutil.which("python3.6")]
    for python in filter(None, found):
        version = subprocess.run([python, "-c", "import sys; print(sys.version_info[:2])"], capture_output=True)
        if version.stdout == b"(3, 6)\n":
            return str(python)
    return None


def test_python_36_verifies_a_bundle(device: Device, tmp_path: Path) -> None:
    python = _python36()
    if python is None:
        pytest.skip("no python3.6 here")
    old = dataclasses.replace(device, python=Path(python))
    made_bundle, home = made(tmp_path / "bundle", {"onnx-int8": program()}, name="modèle"), tmp_path / "home"
    verify.remember(home, made_bundle.manifest, KEYS[0])
    done = old.run(made_bundle.path, "--home", home, verb="verify")
    assert done.returncode == 0 and "version 3 for raspberry-pi-4" in done.stderr
    assert old.run(made_bundle.path).returncode == 3  # it has no numpy, and says so
    _tamper_any(made_bundle.path)
    assert old.run(made_bundle.path, verb="verify").returncode == 1


def _tamper_any(folder: Path) -> None:
    path = folder / "programs/onnx-int8/model.onnx"
    path.write_bytes(path.read_bytes() + b"\0")
