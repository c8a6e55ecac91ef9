"""
Reaches a device: put a folder there, run a command there, bring a file back.

A `Link` works through a form, `Local` (this machine) or `Ssh`: something that can start a shell command. The other side
needs a POSIX shell with find, wc, head and sha256sum; no SFTP, no daemon. Another form is a class with two methods.

What a push promises: `releases/<id>` appears under its name only when every byte in it was hashed on the device.
Before that it is `releases/<id>.part`: a cache that the next push of the same bundle resumes, and that nothing opens.
What a run promises: the command does not outlive the connection. Its life hangs on the open input of its channel, so
Ctrl-C, a kill and a lost network all end it.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import itertools
import logging
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Protocol, Self
from urllib.parse import urlsplit

from edgeformer_agent import verify, wire

from .errors import BadInput, BundleRefused, LinkError, MissingExtra, MissingTool

FORMS = "local, local:/home/folder, ssh://user@host:port or user@host"
CHUNK = 1 << 18
GRACE_SECONDS = 5  # between asking a command to end and killing it
DEAD_SECONDS = 45  # without an answer from the network, a connection counts as lost

Progress = Callable[[int, int], None]  # bytes that are on the device, bytes in total


def connect(url: str, options: SshOptions | None = None) -> Link:
    """Opens the link that `url` names: local, local:/home/folder, ssh://user@host:port or user@host."""
    scheme, _, rest = url.partition(":")
    if url == "local" or (scheme == "local" and rest):
        return Link(Local(Path(rest) if rest else None))
    if scheme == "ssh" and rest.startswith("//"):
        return Link(Ssh(rest[2:], options))
    if re.fullmatch(r"[^/:@\s]+@[^/@\s]+", url):
        return Link(Ssh(url, options))
    raise BadInput(f"{url!r} is not a way to reach a device. Use {FORMS}.")


class Form(Protocol):
    """What differs between devices: how a shell command is started there."""

    label: str  # for messages
    home: str  # the folder that is ours, absolute or from where commands start
    python: tuple[str, ...]  # starts the interpreter there

    def start(self, command: str) -> Process: ...

    def close(self) -> None: ...


class Process(Protocol):
    """A shell command that was started. Its stdout and stderr are one stream. A lost connection is a LinkError."""

    def send(self, data: bytes) -> None:
        """BrokenPipeError if the command ended before it had read everything."""

    def end_input(self) -> None: ...

    def receive(self) -> bytes:
        """The next output, b"" at its end."""

    def status(self, seconds: float | None = None) -> int:
        """Waits for the exit code; TimeoutError after `seconds`."""

    def close(self) -> None: ...


class Link:
    """A way to reach a device. Takes over its form and closes it. One user at a time: two would disturb each other."""

    def __init__(self, form: Form) -> None:
        self._form = form
        self.python = form.python
        try:
            home = self._checked("create our folder", _HOME, form.home)
        except BaseException:
            form.close()
            raise
        self.home = home.decode("utf-8", "surrogateescape").rstrip("\n")  # absolute, on the device

    def push(self, folder: Path, digest: str, files: Mapping[str, wire.File], progress: Progress | None = None) -> str:
        """Makes `<home>/releases/<digest[:32]>` hold exactly `files` of `folder`; returns its path on the device."""
        _check_push(folder, digest, files)
        root, name = f"{self.home}/releases", digest[:32]
        there = self._listing(root)
        if self._wrong(f"{root}/{name}", _below(there, name), files):
            self._prepare(f"{root}/{name}.part", _below(there, f"{name}.part"), files)
            self._fill(folder, root, f"{name}.part/", files, there, progress or _ignore)
            self._check_arrived(f"{root}/{name}.part", files)
            self._checked("put the release in place", _FINISH, root, name)
        elif progress:
            progress(_total(files), _total(files))
        return f"{root}/{name}"

    def run(self, command: Sequence[str], on_line: Callable[[str], None] | None = None) -> int:
        """Runs a command there, hands over its output by line, returns its exit code: 128 + n for signal n."""
        process = self._form.start(_command(_RUN, command))
        try:
            for line in _lines(_after_mark(process)):
                if on_line:
                    on_line(line)
            return process.status()
        except BaseException:
            # The watcher on the device ends the command; waiting for it makes "interrupted" mean "ended".
            with contextlib.suppress(LinkError, OSError):
                process.end_input()
                process.status(GRACE_SECONDS + 2)
            raise
        finally:
            process.close()

    def fetch(self, path: str, limit_bytes: int) -> bytes:
        """The content of a file there; LinkError if it is absent or larger."""
        data = self._checked(f"read {path}", _FETCH, path, str(limit_bytes + 1))
        if len(data) > limit_bytes:
            raise LinkError(f"{self._form.label}: {path} is larger than the {limit_bytes} bytes that are accepted.")
        return data

    def remove(self, path: str) -> None:
        """Deletes a file or a folder there; absent is fine."""
        self._checked(f"remove {path}", _REMOVE, path)

    def close(self) -> None:
        self._form.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wrong(self, folder: str, there: Mapping[str, int], files: Mapping[str, wire.File]) -> dict[str, str]:
        """How `folder`, which holds `there`, differs from `files`; hashes only what has the right size."""
        wrong = dict.fromkeys(there.keys() - files.keys(), "extra")
        wrong.update(dict.fromkeys(files.keys() - there.keys(), "absent"))
        wrong.update({p: f"{there[p]} bytes" for p in files.keys() & there.keys() if there[p] != files[p].size})
        if not wrong:
            hashes = self._hashes(folder, files)
            wrong = {p: f"sha256 {hashes.get(p)}" for p, file in files.items() if hashes.get(p) != file.sha256}
        return wrong

    def _prepare(self, part: str, there: Mapping[str, int], files: Mapping[str, wire.File]) -> None:
        """Folders for `files`, and nothing in `part` that is not the beginning of one of them."""
        stray = [path for path, size in there.items() if path not in files or not 0 <= size <= files[path].size]
        for batch in _batches(f"{part}/{path}" for path in stray):
            self._checked("tidy the upload folder", _REMOVE, *batch)
        for batch in _batches(sorted({f"{part}/{Path(path).parent}" for path in files})):
            self._checked("create folders", _FOLDERS, *batch)

    def _fill(
        self,
        folder: Path,
        root: str,
        part: str,
        files: Mapping[str, wire.File],
        there: Mapping[str, int],
        progress: Progress,
    ) -> None:
        """Gets every file into `part` by the cheapest way that is proved: there, copied, continued, sent."""
        begun = {path for path, file in files.items() if 0 < there.get(part + path, 0) <= file.size}
        missing = {file.size for path, file in files.items() if there.get(part + path) != file.size}
        others = {path for path, size in there.items() if size in missing and not path.startswith(part)}
        hashes = self._hashes(root, {part + path for path in begun} | others)
        copies = {hashes[path]: path for path in others & hashes.keys()}
        done = 0
        for path, file in files.items():
            here = hashes.get(part + path)
            if here != file.sha256 and file.sha256 in copies:
                self._checked(f"copy {path}", _COPY, root, f"./{copies[file.sha256]}", f"./{part}{path}")
            elif here != file.sha256:
                start = there[part + path] if path in begun else 0
                start = start if here == _sha256(folder / path, start) else 0
                self._send(folder / path, f"{root}/{part}{path}", start, done, _total(files), progress)
            done += file.size
            progress(done, _total(files))

    def _send(self, source: Path, destination: str, start: int, before: int, total: int, progress: Progress) -> None:
        with source.open("rb") as file:
            file.seek(start)
            data = _counted(file, lambda sent: progress(before + start + sent, total))
            self._checked(f"write {destination}", _APPEND if start else _WRITE, destination, data=data)

    def _check_arrived(self, part: str, files: Mapping[str, wire.File]) -> None:
        wrong = self._wrong(part, self._listing(part), files)
        if wrong:
            # What is wrong is deleted, so that the next push sends it instead of trusting it.
            for batch in _batches(f"{part}/{path}" for path in wrong):
                self._checked("delete what is wrong", _REMOVE, *batch)
            shown = ", ".join(f"{path} ({how})" for path, how in sorted(wrong.items())[:5])
            raise LinkError(
                f"{self._form.label}: what the device stored is not what was sent: {shown}. Nothing was put in place. "
                "Run the same command again; if it repeats, check the device's disk and memory."
            )

    def _listing(self, folder: str) -> dict[str, int]:
        """Size of every file below `folder`; -1 for what is neither file nor folder."""
        lines = self._checked("list what is there", _LIST, folder).split(b"\n")
        sizes = {_name(line): -1 for line in lines if line.startswith(b"./")}
        return sizes | {_name(found[2]): int(found[1]) for found in map(_SIZE.fullmatch, lines) if found}

    def _hashes(self, folder: str, paths: Iterable[str]) -> dict[str, str]:
        """sha256 computed on the device; a file it cannot read has none."""
        hashes: dict[str, str] = {}
        for batch in _batches(f"./{path}" for path in paths):
            status, output = self._ask(_HASH, folder, *batch)
            if status == 127:
                raise LinkError(f"{self._form.label} has no sha256sum: {_tail(output)}. Install coreutils there.")
            found = [match for match in map(_SHA.fullmatch, output.split(b"\n")) if match]
            hashes.update({_name(match[2]): match[1].decode() for match in found})
        return hashes

    def _checked(self, what: str, script: str, *values: str, data: Iterable[bytes] = ()) -> bytes:
        status, output = self._ask(script, *values, data=data)
        if status:
            raise LinkError(f"{self._form.label}: cannot {what}: {_tail(output) or f'exit code {status}'}")
        return output

    def _ask(self, script: str, *values: str, data: Iterable[bytes] = ()) -> tuple[int, bytes]:
        process = self._form.start(_command(script, values))
        try:
            with contextlib.suppress(BrokenPipeError):  # it ended early; its output and its code say why
                for block in data:
                    process.send(block)
                process.end_input()
            output = b"".join(_after_mark(process))
            return process.status(), output
        finally:
            process.close()


# --- What both forms do, in shell -------------------------------------------------------------------------------------
# Every script is one line, because some login shells cannot quote a newline, and gets its values as $1, $2, ...:
# nothing is ever pasted into a script. A login shell may greet on stdout; what counts follows MARK.

MARK = b"edgeformer-begins-here\n"
_HOME = 'umask 077; mkdir -p "$1/releases" && cd "$1" && pwd -P'
_LIST = 'cd "$1" && find . -type f -exec wc -c {} + && find . ! -type f ! -type d'
# macOS before 15 has no sha256sum. A missing file is an absent line, so the exit code says nothing.
_HASH = 'cd "$1" && shift && if command -v sha256sum >/dev/null; then sha256sum "$@"; else shasum -a 256 "$@"; fi'
_FOLDERS = 'umask 077; mkdir -p "$@"'
_COPY = 'cd "$1" && cp "$2" "$3"'
_WRITE = 'umask 077; cat >"$1"'
_APPEND = 'cat >>"$1"'
# A release that is there but damaged gives way only now. Old sync programs ignore the names and sync everything.
_FINISH = (
    'cd "$1" && { find "$2.part" -exec sync {} + 2>/dev/null; rm -rf "$2.old"; '
    'if [ -e "$2" ]; then mv "$2" "$2.old"; fi; mv "$2.part" "$2" && rm -rf "$2.old"; }'
)
_FETCH = 'head -c "$2" <"$1"'
_REMOVE = 'rm -rf -- "$@"'
# The command runs in the background and a watcher reads the channel's input; its end (we closed, were killed, or the
# network went) ends the command and what it started: the process group where the server made us one, as sshd does, else
# the processes below it, itself last because its end ends the watcher. The shell outlives TERM, and output that nobody
# reads, so that its exit tells that the command has ended. `read`, unlike cat, is no process that could stay.
_RUN = (
    "t() { ps -A -o pid= -o ppid= | while read -r c q; do [ $q = $1 ] && t $c; done; echo $1; }; "
    'exec 3<&0; "$@" 3<&- </dev/null & p=$!; trap "" TERM PIPE; '
    "{ while read -r x; do :; done; g=-$$; kill -TERM $g || { g=$(t $p); kill -TERM $g; }; "
    f"sleep {GRACE_SECONDS}; kill -KILL $g; }} <&3 >/dev/null 2>&1 & w=$!; exec 3<&-; "
    "wait $p; s=$?; exec 2>/dev/null; kill -KILL $w; exit $s"
)
_SIZE = re.compile(rb"\s*(\d+) (\./.+)")
_SHA = re.compile(rb"([0-9a-f]{64}) [ *](\./.+)")


def _command(script: str, values: Sequence[str]) -> str:
    # `exec`: the login shell gives way, so the script leads the process group that the server made.
    # One stream on the device already: SSH does not keep the order of two.
    return shlex.join(["exec", "sh", "-c", f"exec 2>&1; echo {MARK.decode().strip()}; {script}", "sh", *values])


def _check_push(folder: Path, digest: str, files: Mapping[str, wire.File]) -> None:
    if not re.fullmatch("[0-9a-f]{32,}", digest):
        raise BadInput(f"digest {digest!r} must be at least 32 hexadecimal digits.")
    try:
        verify.check_names(files)  # before any of them becomes a path on a device
    except verify.Refused as error:
        raise BundleRefused(str(error)) from None
    for name, file in files.items():
        found = (folder / name).stat().st_size if (folder / name).is_file() else None
        if found != file.size:
            raise BundleRefused(f"{folder / name}: {found} bytes instead of {file.size}; build the bundle again.")


def _below(sizes: Mapping[str, int], folder: str) -> dict[str, int]:
    return {path.removeprefix(f"{folder}/"): size for path, size in sizes.items() if path.startswith(f"{folder}/")}


def _batches(names: Iterable[str], size: int = 100) -> Iterator[list[str]]:
    """Names for one command each, far below any limit of a command line."""
    rest = iter(names)
    while batch := list(itertools.islice(rest, size)):
        yield batch


def _total(files: Mapping[str, wire.File]) -> int:
    return sum(file.size for file in files.values())


def _ignore(*_: object) -> None:
    pass


def _after_mark(process: Process) -> Iterator[bytes]:
    head = b""
    while MARK not in head:
        block = process.receive()
        if not block:
            code = process.status()  # a lost connection says so here
            raise LinkError(f"the device runs no commands for this user (exit code {code}): {_tail(head)}")
        head += block
    yield head.partition(MARK)[2]
    while block := process.receive():
        yield block


def _lines(blocks: Iterable[bytes]) -> Iterator[str]:
    rest = b""
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            yield line.decode("utf-8", "replace").rstrip("\r")
    if rest:
        yield rest.decode("utf-8", "replace")


def _counted(file: BinaryIO, report: Callable[[int], None]) -> Iterator[bytes]:
    sent = 0
    while block := file.read(CHUNK):
        yield block
        sent += len(block)
        report(sent)


def _sha256(path: Path, size: int) -> str:
    """Of the first `size` bytes."""
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(min(size, CHUNK)):
            sha.update(block)
            size -= len(block)
    return sha.hexdigest()


def _name(line: bytes) -> str:
    return line.removeprefix(b"./").decode("utf-8", "surrogateescape")


def _tail(output: bytes) -> str:
    return " / ".join(output.decode("utf-8", "replace").strip().splitlines()[-3:])


# --- Local ------------------------------------------------------------------------------------------------------------


class Local:
    """This machine. Without a folder the home is a temporary one, removed on close."""

    label = "this machine"

    def __init__(self, home: Path | None = None) -> None:
        self._shell = shutil.which("sh")
        if self._shell is None:
            raise MissingTool("sh", "deploy to a device that has a shell")
        self._temporary = None if home else tempfile.mkdtemp(prefix="edgeformer-")
        self.home = str(Path(home or self._temporary or "").expanduser().absolute())
        self.python: tuple[str, ...] = (sys.executable, "-I")

    def start(self, command: str) -> Process:
        assert self._shell
        pipe = subprocess.PIPE
        # A session of its own: Ctrl-C in a terminal must reach us first, and one kill must reach all of it.
        return _Here(
            subprocess.Popen(
                [self._shell, "-c", command], stdin=pipe, stdout=pipe, stderr=subprocess.STDOUT, start_new_session=True
            )
        )

    def close(self) -> None:
        if self._temporary:
            shutil.rmtree(self._temporary, ignore_errors=True)


class _Here:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin and process.stdout
        self._process, self._input, self._output = process, process.stdin, process.stdout

    def send(self, data: bytes) -> None:
        self._input.write(data)

    def end_input(self) -> None:
        self._input.close()

    def receive(self) -> bytes:
        return os.read(self._output.fileno(), CHUNK)

    def status(self, seconds: float | None = None) -> int:
        try:
            code = self._process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise TimeoutError from error
        return code if code >= 0 else 128 - code

    def close(self) -> None:
        with contextlib.suppress(BrokenPipeError):
            self._input.close()
        self._output.close()
        if self._process.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


# --- Ssh --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SshOptions:
    """What `~/.ssh/config` does not say, or should not decide."""

    key_file: Path | None = None  # only this key is offered, and no agent is asked
    known_hosts: Path | None = None  # instead of the user's and the system's
    config: Path = Path("~/.ssh/config")
    home: str = ".edgeformer"  # from the login folder, or absolute
    python: tuple[str, ...] = ("python3",)
    connect_seconds: float = 15
    keepalive_seconds: int = 10


class Ssh:
    """
    A device over SSH. `address` is host, user@host or user@host:port; host may be a name from `~/.ssh/config`.

    Authenticates with keys only and never asks for a password. A host whose key is not known is refused.
    """

    def __init__(self, address: str, options: SshOptions | None = None) -> None:
        options = options or SshOptions()
        self._target = _target(address, options)
        self.label, self.home, self.python = self._target.label, options.home, options.python
        self._client = _open_client(self._target, options)

    def start(self, command: str) -> Process:
        with _noticing_loss(self._target):
            transport = self._client.get_transport()
            if transport is None:
                raise LinkError(f"the link to {self.label} is closed.")
            channel = transport.open_session()
            channel.set_combine_stderr(True)
            channel.exec_command(command)
            return _There(channel, self._target)

    def close(self) -> None:
        self._client.close()


@dataclass(frozen=True)
class _Target:
    """An address after `~/.ssh/config` has been applied."""

    host: str
    port: int
    user: str
    keys: tuple[str, ...]
    known_hosts: tuple[Path, ...]

    @property
    def label(self) -> str:
        return f"{self.user}@{self.host}:{self.port}"


def _paramiko() -> Any:
    try:
        import paramiko
    except ImportError:
        raise MissingExtra("ssh", "paramiko") from None
    return paramiko


def _target(address: str, options: SshOptions) -> _Target:
    paramiko = _paramiko()
    try:
        parts = urlsplit(f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = None
    if not host or parts.password or parts.path.strip("/") or parts.query or parts.fragment or host.startswith("-"):
        raise BadInput(
            f"{address!r} is not an SSH address. Use user@host or user@host:port, with no password or folder."
        )
    config = options.config.expanduser()
    try:
        said = (paramiko.SSHConfig.from_path(config) if config.is_file() else paramiko.SSHConfig()).lookup(host)
        port = port or int(said.get("port", 22))
    except (paramiko.ConfigParseError, ValueError, OSError) as error:
        raise BadInput(f"{config} cannot be used: {error}") from error
    for key in ("proxyjump", "proxycommand"):
        if said.get(key, "none") != "none":
            raise BadInput(f"{config} reaches {host} by {key}, which is not supported; forward a port and use that.")
    keys = [str(options.key_file)] if options.key_file else said.get("identityfile", [])
    known = [*said.get("userknownhostsfile", "~/.ssh/known_hosts").split(), "/etc/ssh/ssh_known_hosts"]
    return _Target(
        said["hostname"],
        port,
        parts.username or said.get("user") or getpass.getuser(),
        tuple(str(Path(name).expanduser()) for name in keys if options.key_file or Path(name).expanduser().is_file()),
        (options.known_hosts,) if options.known_hosts else tuple(Path(name).expanduser() for name in known),
    )


def _open_client(target: _Target, options: SshOptions) -> Any:
    paramiko = _paramiko()
    client = paramiko.SSHClient()
    log = "edgeformer.ssh"  # paramiko prints tracebacks of its thread; ours is the error that is raised
    logging.getLogger(log).addHandler(logging.NullHandler())
    client.set_log_channel(log)
    _load_known(client.get_host_keys(), target.known_hosts)
    client.set_missing_host_key_policy(_Refuse(target))
    if options.key_file and not options.key_file.is_file():
        raise BadInput(f"key file {options.key_file} does not exist.")
    try:
        client.connect(
            target.host,
            target.port,
            target.user,
            key_filename=list(target.keys),
            allow_agent=options.key_file is None,
            look_for_keys=options.key_file is None,
            sock=_socket(target, options),
            timeout=options.connect_seconds,
            banner_timeout=options.connect_seconds,
            auth_timeout=options.connect_seconds,
            channel_timeout=options.connect_seconds,
            transport_factory=_transport,
        )
        client.get_transport().set_keepalive(options.keepalive_seconds)
    except BaseException as error:
        reached = _exchanged_keys(client)
        client.close()
        if isinstance(error, (paramiko.SSHException, OSError, EOFError, ValueError)):
            raise LinkError(_refusal(target, error, reached)) from error
        raise
    return client


def _socket(target: _Target, options: SshOptions) -> socket.socket:
    try:
        connection = socket.create_connection((target.host, target.port), options.connect_seconds)
    except OSError as error:
        raise LinkError(
            f"cannot reach {target.label}: {error}. Is the device on, is its SSH server running, is the port right?"
        ) from error
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # small requests, one after another
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # else a cable that was pulled is noticed after a quarter of an hour
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, DEAD_SECONDS * 1000)
    return connection


def _transport(connection: socket.socket, **settings: Any) -> Any:
    paramiko = _paramiko()
    transport = paramiko.Transport(connection, **settings)

    def refuse(*_: object) -> None:
        raise paramiko.AuthenticationException("the device asks for a second factor, which is not supported")

    transport.auth_interactive_dumb = refuse  # it would prompt on the terminal
    return transport


class _Refuse:
    """Host key policy: an unknown device is refused, with what to do about it."""

    def __init__(self, target: _Target) -> None:
        self._target = target

    def missing_host_key(self, client: object, hostname: str, key: Any) -> None:  # noqa: ARG002
        target, file = self._target, shlex.quote(str(self._target.known_hosts[0]))
        raise LinkError(
            f"{hostname} is not in {file}. It shows the {key.get_name()} key {key.fingerprint}. If that is its own "
            "(on its console: for f in /etc/ssh/ssh_host_*.pub; do ssh-keygen -lf $f; done), run here: "
            f"ssh-keyscan -p {target.port} {shlex.quote(target.host)} >> {file}"
        )


def _load_known(keys: Any, files: Iterable[Path]) -> None:
    paramiko = _paramiko()
    for file in files:
        lines = file.read_text("utf-8", "replace").splitlines() if file.is_file() else []
        for line in lines:
            if not line.strip() or line.lstrip()[0] in "#@":  # marked lines (authorities) are not supported
                continue
            try:
                entry = paramiko.hostkeys.HostKeyEntry.from_line(line.strip())
            except Exception:  # a line that cannot be read must not hide the others
                continue
            for name in entry.hostnames if entry else ():
                keys.add(name, entry.key.get_name(), entry.key)


def _exchanged_keys(client: Any) -> bool:
    transport = client.get_transport()
    return transport is not None and transport.is_active() and transport.initial_kex_done


def _refusal(target: _Target, error: BaseException, reached: bool) -> str:
    """`reached`: the device's key was accepted, so what failed is ours."""
    paramiko = _paramiko()
    if isinstance(error, paramiko.BadHostKeyException):
        known = target.host if target.port == 22 else f"[{target.host}]:{target.port}"
        return (
            f"THE HOST KEY OF {target.label} HAS CHANGED: {error.expected_key.fingerprint} is known, it shows "
            f"{error.key.fingerprint}. Someone may be in between; nothing was sent. Only if you know that the device "
            f"was set up again, run: ssh-keygen -f {shlex.quote(str(target.known_hosts[0]))} -R {shlex.quote(known)}"
        )
    tried = " ".join(map(shlex.quote, target.keys))
    if isinstance(error, paramiko.PasswordRequiredException):
        return (
            f"{target.label}: the key {tried} has a passphrase, and none is asked for here. "
            "Load it into the agent (ssh-add), and name no key file."
        )
    if reached or isinstance(error, paramiko.AuthenticationException):
        return (
            f"{target.label} accepts none of our keys ({tried or 'the agent and ~/.ssh/id_*'}): {error}. "
            f"Run: ssh-copy-id -p {target.port} {target.user}@{target.host}"
        )
    return (
        f"cannot open an SSH session with {target.label}: {error or type(error).__name__}. "
        "Is what listens there an SSH server, and not too busy to answer?"
    )


@contextlib.contextmanager
def _noticing_loss(target: _Target) -> Iterator[None]:
    try:
        yield
    except (_paramiko().SSHException, OSError, EOFError) as error:
        raise LinkError(_lost(target, str(error) or type(error).__name__)) from error


def _lost(target: _Target, why: str) -> str:
    return (
        f"the connection to {target.label} was lost: {why}. "
        "Run the same command again: the upload goes on where it stopped."
    )


class _There:
    def __init__(self, channel: Any, target: _Target) -> None:
        self._channel, self._target = channel, target

    def send(self, data: bytes) -> None:
        try:
            self._channel.sendall(data)
        except (OSError, EOFError):  # closed, by the command's end or by the network's
            self._check_alive()
            raise BrokenPipeError from None

    def end_input(self) -> None:
        with _noticing_loss(self._target):
            self._channel.shutdown_write()

    def receive(self) -> bytes:
        with _noticing_loss(self._target):
            data: bytes = self._channel.recv(CHUNK)
            return data

    def status(self, seconds: float | None = None) -> int:
        if not self._channel.status_event.wait(seconds):
            raise TimeoutError
        if self._channel.exit_status < 0:  # ended without a code: by a signal, or the connection went
            self._check_alive()
            return 137  # only KILL ends our shell
        return int(self._channel.exit_status)

    def close(self) -> None:
        with contextlib.suppress(Exception):  # what it could say, the operation before has said
            self._channel.close()

    def _check_alive(self) -> None:
        transport = self._channel.get_transport()
        transport.join(1)  # the channels end shortly before their connection
        if not transport.is_active():
            raise LinkError(_lost(self._target, "closed by the other side"))
