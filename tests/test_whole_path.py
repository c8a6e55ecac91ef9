"""
The whole path on a real, tiny model: build, run here, deploy to an emulated arm64 board over real OpenSSH, again and
again. What the board measures is not looked at, only what it computes and which release it ends up with.
"""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import families
import pytest

pytest.importorskip("torch")
pytest.importorskip("onnxruntime")
pytest.importorskip("litert_torch")
pytest.importorskip("paramiko")

import edgeformer as ef
from edgeformer import bundle as bundles, signing
from edgeformer.errors import BundleRefused
from edgeformer.link import Link
from edgeformer_agent import verify

pytestmark = pytest.mark.slow

PROGRAMS = {"onnx-int8", "litert-int8"}
ROWS = 4  # what the agent takes by itself where it is emulated
ONE = ef.Measure("quick", programs=("onnx-int8",))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ef.Bundle]:
    """Built once, with keys of its own; not the caches: the board's root lies there."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(folder / "config"))
        yield ef.build(
            families.tiny("bert"), "raspberry-pi-4", precision="int8", lengths=(16, 48), out=folder,
            name="tiny-bert", version=1, gate=0.9,
        )  # fmt: skip


def newer(bundle: ef.Bundle, folder: Path, version: int) -> ef.Bundle:
    """The same programs and one more file, as a later version."""
    files = [name for name in bundle.manifest.files if name not in (bundles.AGENT, "notes.txt")]
    contents = {name: bundle.path / name for name in files} | {"notes.txt": f"version {version}".encode()}
    return bundles.write(folder, bundle.manifest._replace(version=version), contents, signing.load())


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose bytes went over a link."""
    names: list[str] = []
    send = Link._send

    def recording(self: Link, source: Path, *rest: Any) -> None:
        names.append(source.name)
        send(self, source, *rest)

    monkeypatch.setattr(Link, "_send", recording)
    return names


Deploy = Callable[..., ef.Report]


@pytest.fixture(scope="module")
def deploy(board: Any) -> Deploy:
    def deploy(bundle: ef.Bundle, **options: Any) -> ef.Report:
        ssh = ef.SshOptions(key_file=board.client_key, known_hosts=board.known_hosts)
        return ef.deploy(bundle, address(board), ssh=ssh, **options)

    return deploy


def address(board: Any) -> str:
    return f"ssh://{board.user}@{board.host}:{board.port}"


def current(board: Any) -> str:
    return str((board.home / ".edgeformer" / "current").readlink())


def release(bundle: ef.Bundle) -> str:
    return f"releases/{bundle.digest[:32]}"


def working(word: str) -> list[str]:
    """Command lines that contain word, of this host and of the board, whose processes are the host's too."""
    lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(file.read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:  # ended meanwhile
            continue
    return [line for line in lines if word in line]


@pytest.fixture(scope="module")
def here(bundle: ef.Bundle) -> ef.Report:
    return ef.run(bundle, measure=ef.Measure("quick", rows=ROWS))


@pytest.fixture(scope="module")
def there(bundle: ef.Bundle, deploy: Deploy) -> ef.Report:
    return deploy(bundle, measure=ef.Measure("quick"))


def test_it_runs_here(bundle: ef.Bundle, here: ef.Report) -> None:
    assert (here.kind, here.bundle, here.version, here.skipped) == ("measured", bundle.digest, 1, {})
    assert {result.program for result in here.results} == PROGRAMS and here.selected in PROGRAMS
    for result in here.results:
        assert result.golden.passed and result.golden.worst > 0.9999  # the machine that built it
        assert result.latency and result.latency.p50_ms > 0
        assert result.fidelity and result.fidelity.rows == ROWS and result.fidelity.mean > 0.9


def test_it_runs_on_the_board(bundle: ef.Bundle, here: ef.Report, there: ef.Report, board: Any) -> None:
    assert (there.kind, there.bundle, there.skipped) == ("emulated", bundle.digest, {})
    assert there.device["machine"] == "aarch64" and there.device["model"].startswith("Raspberry Pi 4")
    assert there.device["emulation"] and there.selected in PROGRAMS
    at_home = {result.program: result for result in here.results}
    assert {result.program for result in there.results} == PROGRAMS
    for result in there.results:
        assert result.golden.passed, result.golden
        assert result.runtime_version == at_home[result.program].runtime_version
        wanted = at_home[result.program].fidelity
        assert wanted and result.fidelity and result.fidelity.rows == wanted.rows
        assert result.fidelity.mean == pytest.approx(wanted.mean, abs=0.005)
    assert current(board) == release(bundle)
    left = {path.name for path in (board.home / ".edgeformer").iterdir()}
    assert left - {"previous"} == {"current", "releases", "versions.json"}  # another file's tests may have been first


def test_the_same_bundle_again_is_not_sent(
    bundle: ef.Bundle, there: ef.Report, deploy: Deploy, board: Any, sent: list[str]
) -> None:
    pushed: list[tuple[int, int]] = []
    report = deploy(
        bundle, measure=ONE, report_progress=lambda what, *step: pushed.append(step) if what == "push" else None
    )
    total = sum(path.stat().st_size for path in bundle.path.rglob("*") if path.is_file())
    assert (sent, pushed) == ([], [(total, total)])
    assert (report.selected, current(board)) == ("onnx-int8", release(bundle))


def test_a_newer_bundle_shares_files_and_there_is_no_way_back(
    bundle: ef.Bundle, there: ef.Report, deploy: Deploy, board: Any, sent: list[str], tmp_path: Path
) -> None:
    second = newer(bundle, tmp_path / "second", 2)
    assert deploy(second, measure=ONE).version == 2
    assert sorted(sent) == ["manifest.json", "manifest.sig", "notes.txt"]
    assert current(board) == release(second)
    assert str((board.home / ".edgeformer" / "previous").readlink()) == release(bundle)

    with pytest.raises(BundleRefused, match="rollback: 'tiny-bert' version 1 is older than 2") as refused:
        deploy(bundle, measure=ONE)
    assert refused.value.exit_code == 1
    assert current(board) == release(second)
    assert verify.highest(board.home / ".edgeformer", "tiny-bert", signing.load().public) == 2


def test_an_interrupted_deploy_changes_nothing(
    bundle: ef.Bundle, there: ef.Report, deploy: Deploy, board: Any, sent: list[str], tmp_path: Path
) -> None:
    third, before = newer(bundle, tmp_path / "third", 3), current(board)
    keys = ["--identity", str(board.client_key), "--known-hosts", str(board.known_hosts)]
    command = [sys.executable, "-m", "edgeformer", "deploy", str(third.path), address(board), *keys]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        said = [next(line for line in process.stderr if line.startswith("[1/2]"))]
        while not working("agent.pyz measure"):
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        said += process.stderr
    assert process.returncode == 130 and "Traceback" not in "".join(said), said
    assert not working(third.digest[:32])
    assert current(board) == before
    assert not list((board.home / ".edgeformer").glob("work-*"))

    assert deploy(third, measure=ONE).selected == "onnx-int8"
    assert sent == []  # the upload had been complete
    assert current(board) == release(third)
