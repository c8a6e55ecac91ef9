"""The emulated board behaves like a board: real SSH and SFTP, arm64 programs, and nothing left on the host."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

paramiko = pytest.importorskip("paramiko")


def _connect(board: Any, known_hosts: Path) -> Any:
    client = paramiko.SSHClient()
    client.load_host_keys(str(known_hosts))
    client.set_missing_host_key_policy(paramiko.RejectPolicy())
    key = {"key_filename": str(board.client_key), "look_for_keys": False, "allow_agent": False}
    client.connect(board.host, board.port, board.user, **key)
    return client


@pytest.fixture(scope="module")
def client(board: Any) -> Iterator[Any]:
    client = _connect(board, board.known_hosts)
    yield client
    client.close()


def _run(client: Any, command: str) -> tuple[int, str]:
    _, output, errors = client.exec_command(command)
    text = output.read().decode() + errors.read().decode()
    return output.channel.recv_exit_status(), text.strip()


def _processes(word: str) -> list[str]:
    """Command lines that contain word. A zombie has none."""
    lines = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = file.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # ended meanwhile
            continue
        if word in line and file.parent.name != str(os.getpid()):
            lines.append(line)
    return lines


def _wait_until(condition: Any, seconds: float = 10) -> bool:
    deadline = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(met)


def test_programs_are_arm64_and_exit_codes_travel(board_tool: ModuleType, board: Any) -> None:
    command = [*board_tool.ssh(board), "uname -m; cat; exit 3"]
    result = subprocess.run(command, input="typed", capture_output=True, text=True)
    assert (result.stdout, result.stderr, result.returncode) == ("aarch64\ntyped", "", 3)


def test_it_looks_like_a_raspberry_pi(client: Any) -> None:
    code, text = _run(client, "cat /proc/device-tree/model; grep -c 0xd08 /proc/cpuinfo; cat /etc/edgeformer-emulated")
    assert (code, text) == (0, "Raspberry Pi 4 Model B Rev 1.4\x004\nqemu-user cortex-a72")


def test_host_files_are_out_of_reach(client: Any, tmp_path: Path) -> None:
    """stat and mv use statx and renameat2, which proot would let through to the host's own files."""
    here = tmp_path / "here"
    here.touch()
    code, text = _run(client, f"stat {here}; mv {here} /root/stolen; ls /host-rootfs")
    assert (code, text.count("No such file"), here.exists()) == (0, 2, True), text
    assert text.splitlines()[0] == "usr"


def test_upload_rename_resume(client: Any, tmp_path: Path) -> None:
    content = os.urandom(300_000)
    (tmp_path / "file").write_bytes(content)
    with client.open_sftp() as sftp:
        sftp.mkdir("/root/upload")
        sftp.put(str(tmp_path / "file"), "/root/upload/file.part")
        with sftp.open("/root/upload/file.part", "ab") as file:
            file.write(b"resumed")
        with sftp.open("/root/upload/file", "w") as file:
            file.write(b"old")
        sftp.posix_rename("/root/upload/file.part", "/root/upload/file")
        assert sftp.listdir("/root/upload") == ["file"]
        assert sftp.stat("/root/upload/file").st_size == len(content) + 7
    code, text = _run(client, "sha256sum upload/file")
    assert (code, text.split()[0]) == (0, hashlib.sha256(content + b"resumed").hexdigest())


def test_a_wrong_host_key_is_refused(board: Any, tmp_path: Path) -> None:
    name, kind, _ = board.host_key.split()
    other = tmp_path / "other"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(other)], check=True)
    (tmp_path / "known_hosts").write_text(f"{name} {kind} {other.with_suffix('.pub').read_text().split()[1]}\n")
    with pytest.raises(paramiko.BadHostKeyException):
        _connect(board, tmp_path / "known_hosts")
    (tmp_path / "empty").touch()
    with pytest.raises(paramiko.SSHException, match="not found in known_hosts"):
        _connect(board, tmp_path / "empty")


def test_runtimes_and_psutil_work(client: Any) -> None:
    program = """
import importlib.metadata, onnxruntime, psutil
from ai_edge_litert.interpreter import Interpreter
print(onnxruntime.__version__, importlib.metadata.version("ai-edge-litert"), psutil.cpu_count(), psutil.cpu_freq().max)
assert psutil.Process().memory_info().rss > 1e6
"""
    code, text = _run(client, f"python3 - <<'end'\n{program}\nend")
    assert (code, text) == (0, "1.31.1 2.3.0 4 1500.0")


def test_a_command_ends_with_its_session(board_tool: ModuleType, board: Any) -> None:
    session = subprocess.Popen([*board_tool.ssh(board), "sleep 4711 & sleep 4712"])
    assert _wait_until(lambda: _processes("/bin/sleep 4711") and _processes("/bin/sleep 4712"))
    session.kill()
    session.wait()
    assert _wait_until(lambda: not _processes("sleep 471"))


def test_nothing_is_left_after_an_error(board_tool: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), board_tool.running(board_tool.cached(), tmp_path) as board:
        session = subprocess.Popen([*board_tool.ssh(board), "sleep 4713"], stderr=subprocess.DEVNULL)
        assert _wait_until(lambda: _processes("/bin/sleep 4713"))
        raise ZeroDivisionError
    assert session.wait(10) == 255
    assert not _processes("sleep 4713") + _processes(str(tmp_path))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_after_a_signal(board_tool: ModuleType, tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, str(board_tool.__file__), "run", "--seconds", "60"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as run:
        assert run.stdout is not None
        assert run.stdout.readline().startswith("ssh ")
        assert _processes(str(tmp_path))
        run.send_signal(number)
    assert _wait_until(lambda: not _processes(str(tmp_path)))
    assert bool(list(tmp_path.iterdir())) == (number == signal.SIGKILL)  # which leaves no time to remove the folder


def test_it_says_what_is_missing(board_tool: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board_tool, "TOOLS", {**board_tool.TOOLS, "no-such-tool": "its-package"})
    assert board_tool.missing().endswith("run: apt-get install its-package")
    with pytest.raises(board_tool.BoardError, match="no identity 'pi'; known: raspberry-pi-4"):
        board_tool.cached("pi")


def test_a_failed_make_leaves_nothing(board_tool: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(board_tool, "_fetch_packages", lambda scratch: [])
    with pytest.raises(board_tool.BoardError, match="downloading aarch64 wheels failed"):
        board_tool.make(tmp_path / "root", ["no/such requirement"])
    assert not list(tmp_path.iterdir())
