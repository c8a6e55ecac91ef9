"""
Both forms of a link against a real shell, and Ssh against a real server that fails on demand.

The server is asyncssh in a thread, with a folder of the test as the user's home. Like sshd it gives every command a
process group of its own; unlike it, `cut_after` drops the connection in the middle of what the host sends.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from edgeformer import link as link_module
from edgeformer.errors import BadInput, BundleRefused, LinkError, MissingExtra
from edgeformer.link import Link, Local, Ssh, SshOptions, connect
from edgeformer_agent import wire

asyncssh = pytest.importorskip("asyncssh", reason="the test server needs asyncssh")
pytest.importorskip("paramiko", reason="edgeformer[ssh] is not installed")

AWKWARD = 'with space/it\'s $HOME "quoted" *.bin'


class Device:
    """An SSH server with `home` as the user's folder, in a thread of its own."""

    def __init__(self, folder: Path) -> None:
        self.home = folder / "home"
        self.home.mkdir(parents=True)
        self.folder, self.key = folder, asyncssh.generate_private_key("ssh-ed25519")
        self.client_key, self.known_hosts = folder / "id_test", folder / "known_hosts"
        client = asyncssh.generate_private_key("ssh-ed25519")
        client.write_private_key(self.client_key)
        self.authorized = client.convert_to_public()
        self.received, self.cut_after, self._connections = 0, None, []
        self.path, self.own_group = os.environ["PATH"], True
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._listen(0)
        self.trust(self.key)

    def trust(self, key: object) -> None:
        line = key.convert_to_public().export_public_key().decode().strip()
        self.known_hosts.write_text(f"[127.0.0.1]:{self.port} {line}\n")

    def change_key(self) -> None:
        self._do(self._stop())
        self.key = asyncssh.generate_private_key("ssh-ed25519")
        self._listen(self.port)

    @property
    def address(self) -> str:
        return f"ssh://tester@127.0.0.1:{self.port}"

    @property
    def options(self) -> SshOptions:
        return SshOptions(
            key_file=self.client_key,
            known_hosts=self.known_hosts,
            config=self.folder / "no_config",
            python=(sys.executable, "-I"),
        )

    def connect(self) -> Link:
        return Link(Ssh(self.address.removeprefix("ssh://"), self.options))

    def close(self) -> None:
        self._do(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _listen(self, port: int) -> None:
        self._server = self._do(self._start(port))
        self.port = self._server.get_port()

    def _do(self, work):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    async def _start(self, port: int):
        device = self

        class Server(asyncssh.SSHServer):
            def connection_made(self, connection: object) -> None:
                device._connections.append(connection)

            def begin_auth(self, _username: str) -> bool:
                return True

            def public_key_auth_supported(self) -> bool:
                return True

            def validate_public_key(self, _username: str, key: object) -> bool:
                return key == device.authorized

        return await asyncssh.listen(
            "127.0.0.1",
            port,
            server_factory=Server,
            server_host_keys=[self.key],
            process_factory=self._serve,
            encoding=None,
        )

    def cut(self) -> None:
        for connection in self._connections:
            self._loop.call_soon_threadsafe(connection.abort)

    async def _stop(self) -> None:
        self._server.close()
        await self._server.wait_closed()

    async def _serve(self, request) -> None:
        pipe = asyncio.subprocess.PIPE
        process = await asyncio.create_subprocess_exec(
            "/bin/sh",
            "-c",
            f"echo 'Welcome!'; {request.command}",
            stdin=pipe,
            stdout=pipe,
            stderr=pipe,
            cwd=self.home,
            env={"HOME": str(self.home), "PATH": self.path},
            start_new_session=self.own_group,
        )
        feeding = asyncio.ensure_future(self._feed(request, process.stdin))
        await asyncio.gather(self._copy(process.stdout, request.stdout), self._copy(process.stderr, request.stderr))
        code = await process.wait()
        with contextlib.suppress(OSError):
            request.exit(code) if code >= 0 else request.exit_with_signal(signal.Signals(-code).name[3:])
        feeding.cancel()

    async def _feed(self, request, sink) -> None:
        try:
            while data := await request.stdin.read(1 << 14):
                self.received += len(data)
                if self.cut_after is not None and self.received >= self.cut_after:
                    request.channel.get_connection().abort()
                    break
                sink.write(data)
                await sink.drain()
        except (OSError, asyncssh.Error):
            pass
        finally:
            sink.close()

    async def _copy(self, source, sink) -> None:
        while data := await source.read(1 << 14):
            with contextlib.suppress(OSError, asyncssh.Error):
                sink.write(data)
                await sink.drain()


@pytest.fixture
def device(tmp_path: Path) -> Iterator[Device]:
    device = Device(tmp_path / "device")
    yield device
    device.close()


@pytest.fixture(params=["local", "ssh"])
def link(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Link]:
    if request.param == "local":
        with Link(Local(tmp_path / "home of mine")) as link:
            yield link
    else:
        with request.getfixturevalue("device").connect() as link:
            yield link


def described(folder: Path) -> tuple[str, dict[str, wire.File]]:
    files = {
        path.relative_to(folder).as_posix(): wire.File(
            path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest()
        )
        for path in folder.rglob("*")
        if path.is_file()
    }
    return hashlib.sha256(repr(sorted(files.items())).encode()).hexdigest(), files


def a_folder(folder: Path, contents: Mapping[str, bytes]) -> Path:
    for name, data in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def random_bytes(seed: int, size: int) -> bytes:
    return hashlib.shake_128(seed.to_bytes(4, "little")).digest(size)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    contents = {"model.onnx": random_bytes(1, 3 << 20), "small.json": b"{}", "empty": b"", AWKWARD: b"awkward"}
    return a_folder(tmp_path / "bundle", contents)


def push(link: Link, folder: Path, progress: Callable[[int, int], None] | None = None) -> str:
    digest, files = described(folder)
    return link.push(folder, digest, files, progress)


def content(folder: Path | str) -> dict[str, bytes]:
    root = Path(folder)
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def releases(link: Link) -> list[str]:
    return sorted(path.name for path in Path(link.home, "releases").iterdir())


def ends(pid: int, seconds: float = 10) -> bool:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


# --- push: both forms


def test_a_push_makes_the_release_exactly_the_folder(link: Link, folder: Path) -> None:
    steps: list[tuple[int, int]] = []
    release = push(link, folder, lambda done, total: steps.append((done, total)))
    assert content(release) == content(folder)
    assert Path(release) == Path(link.home, "releases", described(folder)[0][:32])
    assert releases(link) == [Path(release).name]
    total = sum(file.size for file in described(folder)[1].values())
    assert steps == sorted(steps) and steps[-1] == (total, total) and len(steps) > 4


def test_our_folder_is_closed_to_other_users(link: Link, folder: Path) -> None:
    release = Path(push(link, folder))
    for path in (Path(link.home), release, release / "model.onnx"):
        assert path.stat().st_mode & 0o077 == 0


def test_a_complete_release_is_only_verified_again(link: Link, folder: Path) -> None:
    release = Path(push(link, folder))
    before = (release / "model.onnx").stat()
    steps: list[tuple[int, int]] = []
    assert push(link, folder, lambda done, total: steps.append((done, total))) == str(release)
    assert (release / "model.onnx").stat() == before
    assert len(steps) == 1


@pytest.mark.parametrize("damage", ["changed", "extra", "link", "absent"])
def test_a_damaged_release_is_made_right(link: Link, folder: Path, damage: str) -> None:
    release = Path(push(link, folder))
    model = release / "model.onnx"
    if damage == "changed":
        model.write_bytes(model.read_bytes()[:-1] + b"?")
    elif damage == "extra":
        (release / "more").write_bytes(b"more")
    elif damage == "absent":
        model.unlink()
    else:
        (release / "more").symlink_to("/etc/passwd")
    assert content(push(link, folder)) == content(folder)
    assert not (release / "more").is_symlink() and releases(link) == [release.name]


def part_of(link: Link, folder: Path) -> Path:
    return Path(link.home, "releases", described(folder)[0][:32] + ".part")


def test_a_partial_file_is_continued(link: Link, folder: Path) -> None:
    model = folder / "model.onnx"
    a_folder(part_of(link, folder), {"model.onnx": model.read_bytes()[: 2 << 20], "small.json": b"{}"})
    inode = (part_of(link, folder) / "model.onnx").stat().st_ino
    release = Path(push(link, folder))
    assert content(release) == content(folder)
    assert (release / "model.onnx").stat().st_ino == inode


@pytest.mark.parametrize("size", [1 << 20, 3 << 20, 4 << 20])
def test_a_corrupted_partial_is_sent_again(link: Link, folder: Path, size: int) -> None:
    a_folder(part_of(link, folder), {"model.onnx": random_bytes(9, size), "stray": b"x"})
    (part_of(link, folder) / "empty").symlink_to("/dev/null")
    assert content(push(link, folder)) == content(folder)


def test_a_file_of_another_release_is_copied(link: Link, folder: Path, tmp_path: Path) -> None:
    first = Path(push(link, folder))
    second = a_folder(tmp_path / "second", {"renamed.onnx": (folder / "model.onnx").read_bytes(), "new": b"new"})
    sent: list[int] = []
    release = Path(push(link, second, lambda done, _total: sent.append(done)))
    assert content(release) == content(second)
    # In one step, not in the blocks of an upload; and a copy, since the agent refuses files that have two names.
    assert len(sent) == 1 + len(["new"]) + 1
    assert (release / "renamed.onnx").stat().st_ino != (first / "model.onnx").stat().st_ino


def test_names_that_leave_the_folder_are_refused(link: Link, tmp_path: Path) -> None:
    folder = a_folder(tmp_path / "bundle", {"x": b"x"})
    with pytest.raises(BundleRefused, match="leaves the bundle"):
        link.push(folder, "0" * 64, {"../bundle/x": wire.File(1, "0" * 64)})
    with pytest.raises(BundleRefused, match="instead of 2"):
        link.push(folder, "0" * 64, {"x": wire.File(2, "0" * 64)})
    with pytest.raises(BadInput, match="hexadecimal"):
        link.push(folder, "../../etc", {"x": wire.File(1, "0" * 64)})
    assert releases(link) == []


def test_content_that_is_not_what_the_digest_says_is_refused(link: Link, folder: Path) -> None:
    digest, files = described(folder)
    files["small.json"] = wire.File(2, "0" * 64)
    with pytest.raises(LinkError, match=r"small\.json \(sha256 44136fa3.*Nothing was put in place"):
        link.push(folder, digest, files)
    assert releases(link) == [f"{digest[:32]}.part"]
    assert not (part_of(link, folder) / "small.json").exists()
    assert content(push(link, folder)) == content(folder)


def test_a_device_that_hashes_wrongly_is_refused(device: Device, folder: Path, tmp_path: Path) -> None:
    liar = tmp_path / "bin" / "sha256sum"
    a_folder(tmp_path, {"bin/sha256sum": b'#!/bin/sh\nfor f; do echo "%s  $f"; done\n' % (b"0" * 64)})
    liar.chmod(0o755)
    device.path = f"{liar.parent}:{device.path}"
    with device.connect() as link:
        with pytest.raises(LinkError, match="what the device stored is not what was sent"):
            push(link, folder)
        assert releases(link) == [part_of(link, folder).name]


def test_a_full_disk_is_told(device: Device, folder: Path, tmp_path: Path) -> None:
    a_folder(tmp_path, {"bin/cat": b"#!/bin/sh\necho 'cat: write error: No space left on device' >&2\nexit 1\n"})
    (tmp_path / "bin/cat").chmod(0o755)
    device.path = f"{tmp_path / 'bin'}:{device.path}"
    with device.connect() as link, pytest.raises(LinkError, match=r"cannot write .*No space left on device"):
        push(link, folder)


def test_an_upload_that_was_cut_is_resumed(device: Device, folder: Path) -> None:
    total = sum(file.size for file in described(folder)[1].values())
    device.cut_after = total // 2
    with device.connect() as link, pytest.raises(LinkError, match=r"was lost.*goes on where it stopped"):
        push(link, folder)
    assert device.received < total
    partial = part_of(link, folder)
    assert partial.is_dir() and not partial.with_suffix("").exists()
    first, device.received, device.cut_after = device.received, 0, None
    with device.connect() as link:
        assert content(push(link, folder)) == content(folder)
        assert releases(link) == [partial.stem]
    assert 0 < device.received < total
    assert device.received + first <= total + (1 << 17)  # nothing but what was on its way is sent twice


# --- run, fetch, remove: both forms


def test_output_and_exit_code_of_a_command(link: Link) -> None:
    lines: list[str] = []
    script = "import sys; print('out ä'); print('err', file=sys.stderr); print(sys.argv[1:]); sys.exit(7)"
    words = ["two words", "it's", '"', "$HOME", "`id`", "*", "", "a\nb"]
    assert link.run([sys.executable, "-X", "utf8", "-uc", script, *words], lines.append) == 7
    assert lines == ["out ä", "err", repr(words)]


@pytest.mark.parametrize(
    ("script", "code"), [("exit 0", 0), ("exit 3", 3), ("kill -9 $$", 137), ("kill -TERM $$", 143)]
)
def test_exit_codes(link: Link, script: str, code: int) -> None:
    assert link.run(["sh", "-c", script]) == code


def test_a_command_that_does_not_exist(link: Link) -> None:
    lines: list[str] = []
    assert link.run(["no-such-program"], lines.append) == 127
    assert "not found" in lines[-1]


def test_lines_arrive_while_the_command_runs(link: Link) -> None:
    times: list[float] = []
    link.run(["sh", "-c", "echo one; sleep 0.5; printf two"], lambda _line: times.append(time.monotonic()))
    assert len(times) == 2 and times[1] - times[0] > 0.3


def interrupting(pids: list[int]) -> Callable[[str], None]:
    """A listener that notes the process ids in the first line and is Ctrl-C."""

    def interrupt(line: str) -> None:
        pids.extend(int(word) for word in line.split())
        raise KeyboardInterrupt

    return interrupt


@pytest.mark.parametrize("stubborn", [False, True])
def test_an_interrupt_ends_the_command_and_its_children(
    link: Link, monkeypatch: pytest.MonkeyPatch, stubborn: bool
) -> None:
    if stubborn:  # what ignores TERM is killed after the grace time
        monkeypatch.setattr(link_module, "_RUN", link_module._RUN.replace("sleep 5", "sleep 0.3"))
    script = ("trap '' TERM; " if stubborn else "") + "sleep 60 & echo $$ $!; wait; wait; sleep 60"
    pids: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        link.run(["sh", "-c", script], interrupting(pids))
    assert len(pids) == 2 and all(ends(pid, 5) for pid in pids)
    assert link.run(["true"]) == 0  # the link itself is still good


def test_an_interrupt_ends_the_children_without_a_group_of_their_own(device: Device) -> None:
    device.own_group = False
    pids: list[int] = []
    with device.connect() as link, pytest.raises(KeyboardInterrupt):
        link.run(["sh", "-c", "sleep 60 & echo $$ $!; wait"], interrupting(pids))
    assert len(pids) == 2 and all(ends(pid, 5) for pid in pids)


def test_a_lost_connection_ends_the_command(device: Device) -> None:
    pids: list[int] = []
    with device.connect() as link, pytest.raises(LinkError, match="was lost"):

        def cut(line: str) -> None:
            pids.append(int(line))
            device.cut()

        link.run(["sh", "-c", "echo $$; exec sleep 60"], cut)
    assert ends(pids[0])


def test_a_killed_host_ends_the_command(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from edgeformer.link import Link, Local\n"
        f"link = Link(Local(Path({str(tmp_path)!r})))\n"
        "link.run(['sh', '-c', 'echo $$; exec sleep 60'], lambda line: print(line, flush=True))\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as host:
        assert host.stdout
        pid = int(host.stdout.readline())
        host.kill()
    assert ends(pid)


def test_fetch_and_remove(link: Link) -> None:
    path = f"{link.home}/it's a file"
    data = b"\x00\xff\r\n" + random_bytes(3, 1 << 19)
    Path(path).write_bytes(data)
    assert link.fetch(path, len(data)) == data
    with pytest.raises(LinkError, match="larger than the 100 bytes"):
        link.fetch(path, 100)
    link.remove(path)
    link.remove(path)
    with pytest.raises(LinkError, match=r"cannot read .*No such file"):
        link.fetch(path, 100)


# --- opening


def test_a_temporary_home_goes_with_its_link(folder: Path) -> None:
    with connect("local") as link:
        assert Path(push(link, folder)).is_dir()
    assert not Path(link.home).exists()


def test_a_given_home_stays(tmp_path: Path) -> None:
    with connect(f"local:{tmp_path / 'mine'}") as link:
        assert link.home == str(tmp_path / "mine")
    assert (tmp_path / "mine").is_dir()


@pytest.mark.parametrize("form", ["ssh://tester@127.0.0.1:{}", "tester@127.0.0.1:{}"])
def test_both_ways_to_write_an_ssh_address(device: Device, form: str) -> None:
    with connect(form.format(device.port), device.options) as link:
        assert link.home == str(device.home / ".edgeformer")
        assert link.run(["true"]) == 0


@pytest.mark.parametrize(
    "url", ["locl", "local:", "", "sshh://pi@host", "http://host", "adb:123", "host", "ssh:pi@host"]
)
def test_an_unknown_form_lists_the_known_ones(url: str) -> None:
    with pytest.raises(BadInput, match="local, local:/home/folder, ssh://user@host:port or user@host"):
        connect(url)


@pytest.mark.parametrize("url", ["ssh://", "ssh://pi:secret@host", "ssh://pi@host/folder", "ssh://pi@host:port"])
def test_a_wrong_ssh_address_is_wrong_use(url: str) -> None:
    with pytest.raises(BadInput, match="is not an SSH address"):
        connect(url)


def test_an_unknown_host_is_refused_with_its_fingerprint(device: Device) -> None:
    device.known_hosts.write_text("garbage\n@cert-authority * ssh-ed25519 AAAA\nother ssh-ed25519 AAAA\n")
    with pytest.raises(LinkError) as caught:
        device.connect()
    assert device.key.get_fingerprint() in str(caught.value)
    assert f"ssh-keyscan -p {device.port} 127.0.0.1 >> {device.known_hosts}" in str(caught.value)
    assert not list(device.home.iterdir())


def test_a_changed_host_key_is_refused_loudly(device: Device) -> None:
    known = device.key.get_fingerprint()
    device.change_key()
    with pytest.raises(LinkError, match=r"THE HOST KEY OF tester@127.0.0.1:\d+ HAS CHANGED") as caught:
        device.connect()
    assert known in str(caught.value) and device.key.get_fingerprint() in str(caught.value)
    assert f"-R '[127.0.0.1]:{device.port}'" in str(caught.value)


@pytest.mark.parametrize("algorithm", ["ssh-ed25519", "ssh-rsa"])
def test_a_key_that_is_not_accepted(device: Device, algorithm: str) -> None:
    asyncssh.generate_private_key(algorithm).write_private_key(device.client_key)
    with pytest.raises(LinkError, match=r"accepts none of our keys .*ssh-copy-id -p"):
        device.connect()


def test_a_key_with_a_passphrase_is_not_asked_for(device: Device) -> None:
    key = asyncssh.generate_private_key("ssh-ed25519")
    key.write_private_key(device.client_key, passphrase="secret")
    with pytest.raises(LinkError, match=r"has a passphrase.*ssh-add"):
        device.connect()


def test_a_key_file_that_does_not_exist(device: Device) -> None:
    with pytest.raises(BadInput, match="nowhere does not exist"):
        connect(device.address, dataclasses.replace(device.options, key_file=Path("nowhere")))


def test_nobody_listens(device: Device) -> None:
    device._do(device._stop())
    with pytest.raises(LinkError, match=r"cannot reach tester@127.0.0.1:\d+.*Is the device on"):
        device.connect()


def test_a_server_that_never_speaks(device: Device) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as silent:
        options = dataclasses.replace(device.options, connect_seconds=0.3)
        with pytest.raises(LinkError, match="cannot open an SSH session"):
            connect(f"pi@127.0.0.1:{silent.getsockname()[1]}", options)


def test_the_ssh_config_is_used(device: Device, tmp_path: Path) -> None:
    config = tmp_path / "config"
    config.write_text(
        f"Host board\n HostName 127.0.0.1\n Port {device.port}\n User tester\n IdentityFile {device.client_key}\n"
        f" UserKnownHostsFile {device.known_hosts}\nHost far\n ProxyJump board\n"
    )
    with connect("ssh://board", SshOptions(config=config)) as link:
        assert link.home == str(device.home / ".edgeformer")
    with pytest.raises(BadInput, match="reaches far by proxyjump"):
        connect("ssh://far", SshOptions(config=config))


def test_without_paramiko_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "paramiko", None)
    with pytest.raises(MissingExtra, match=r"pip install 'edgeformer\[ssh\]'"):
        connect("pi@host")
    with connect("local") as link:
        assert link.run(["true"]) == 0
