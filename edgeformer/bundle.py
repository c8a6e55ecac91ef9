"""
A bundle is a folder that says exactly what it contains: `manifest.json` lists every file with its size and digest,
`manifest.sig` signs the manifest's bytes. Beside it lies the same as one file, `<folder>.tar`.

`write` promises: the same inputs give the same bytes; a reader, or a power cut, finds the old bundle or the complete
new one, never half of one; and what it leaves was verified by the code that will verify it on the device.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import io
import os
import re
import secrets
import shutil
import sys
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import edgeformer_agent
from edgeformer_agent import verify as agent, wire

from . import signing
from .errors import BadInput, BundleRefused, WrongUse

AGENT = "agent.pyz"
START = b"import sys\n\nfrom edgeformer_agent.__main__ import main\n\nsys.exit(main())\n"


@dataclass(frozen=True)
class Bundle:
    """A bundle's folder, and what its manifest says. Nothing is proved before `verify`."""

    path: Path
    manifest: wire.Manifest

    @property
    def digest(self) -> str:
        """Names the bundle: every file hangs on the manifest's bytes."""
        return wire.digest(_manifest(self.path))

    @property
    def signer(self) -> str:
        """The public key that signed it, hex. `verify` says whether that is true and the key trusted."""
        mark: wire.Signature = wire.decode(
            wire.Signature, wire.SIGNATURE_SCHEMA, (self.path / agent.SIGNATURE).read_bytes()
        )
        return mark.key

    @property
    def archive(self) -> Path:
        return _archive(self.path)

    def verify(self, keys: Iterable[str] | None = None, target: str | None = None) -> None:
        """Raises BundleRefused, naming everything that differs. Without `keys`: the keys this machine trusts."""
        pinned = tuple(signing.trusted().values()) if keys is None else tuple(keys)
        with _refused(self.path):
            found = agent.verify(self.path, pinned, target)
        if found != self.manifest:
            raise BundleRefused(f"{self.path}: manifest.json was replaced since the bundle was opened; open it again")


def open_bundle(path: Path | str) -> Bundle:
    """A bundle from its folder or its archive. Its content is not verified yet, and must be before use."""
    path = Path(path).absolute()
    with contextlib.suppress(OSError):  # a disk that cannot be written holds no killed writer's leftovers
        _recover(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise BadInput(f"{path} is no bundle: there is no such folder or file")
    with path.open("rb") as file:
        if file.read(agent.BLOCK)[257:263] != b"ustar\0":
            raise BadInput(f"{path} is no bundle: neither a folder with a {agent.MANIFEST} nor a bundle's .tar")
    return _open_folder(_cached(path))


def write(
    folder: Path | str,
    manifest: wire.Manifest,
    contents: Mapping[str, bytes | Path],
    signer: signing.Signer,
    *,
    overwrite: bool = False,
) -> Bundle:
    """Signs and writes a bundle and its archive. The manifest's `files` are filled in, and the agent is added."""
    folder = Path(folder).absolute()
    if AGENT in contents:
        raise BadInput(f"{AGENT} is added by write; leave it out of the contents")
    _recover(folder)
    check_place(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _workspace(folder) as work, _refused(f"{folder} is not written, a device would refuse it"):
        new = work / "bundle"
        agent.check_names([*contents, AGENT], (agent.MANIFEST, agent.SIGNATURE))
        files = {name: _store(new / name, data) for name, data in {**contents, AGENT: agent_zip()}.items()}
        _sign(new, manifest._replace(schema=wire.MANIFEST_SCHEMA, files=files), signer)
        checked = agent.verify(new, (signer.public,), manifest.target)
        _pack(new, (*files, agent.MANIFEST, agent.SIGNATURE), work / "archive.tar")
        _sync(work)
        _commit(work, folder, overwrite)
    return Bundle(folder, checked)


def agent_zip() -> bytes:
    """The agent as one file, `python3 agent.pyz`. Stored, not compressed: zlib's output depends on its version."""
    root = Path(edgeformer_agent.__file__).parent
    sources = {f"edgeformer_agent/{path.relative_to(root).as_posix()}": path for path in root.rglob("*.py")}
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted([*sources, "__main__.py"]):
            member = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            member.create_system, member.external_attr = 3, 0o100644 << 16
            archive.writestr(member, sources[name].read_bytes() if name in sources else START)
    return data.getvalue()


@contextlib.contextmanager
def _refused(what: object) -> Iterator[None]:
    try:
        yield
    except agent.Refused as error:
        raise BundleRefused(f"{what}: {error}") from error


def _archive(folder: Path) -> Path:
    return folder.with_name(folder.name + ".tar")


def _open_folder(folder: Path) -> Bundle:
    try:
        return Bundle(folder, wire.load_manifest(_manifest(folder)))
    except wire.WireError as error:
        raise BundleRefused(f"{folder}: {agent.MANIFEST}: {error}") from error


def _manifest(folder: Path) -> bytes:
    if not os.path.lexists(folder / agent.MANIFEST):
        raise BadInput(f"{folder} is no bundle: it has no {agent.MANIFEST}")
    with _refused(folder), agent.opened(folder) as root:
        return agent.read(root, agent.MANIFEST, agent.MAX_MANIFEST)


def _cached(archive: Path) -> Path:
    """The archive unpacked under its own digest. What is digested is the copy that is unpacked, not the original."""
    configured = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(configured) if Path(configured).is_absolute() else Path.home() / ".cache"
    cache = base / "edgeformer" / "bundles"
    cache.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _workspace(cache / "opened") as work, _refused(archive):
        with (work / "archive.tar").open("wb") as copy, archive.open("rb") as file:
            shutil.copyfileobj(file, copy, 1 << 20)
        with (work / "archive.tar").open("rb") as copy:
            folder = cache / hashlib.file_digest(copy, "sha256").hexdigest()
        if not folder.exists():
            agent.unpack(work / "archive.tar", work / "bundle")
            _sync(work)
            with contextlib.suppress(OSError):  # another process was first, with the same content
                (work / "bundle").rename(folder)
        (work / "archive.tar").replace(_archive(folder))
    return folder


def check_place(folder: Path, overwrite: bool) -> None:
    """Only a bundle is ever replaced, and only on request."""
    archive = _archive(folder)
    for path in (folder, archive):
        if os.path.lexists(path) and not overwrite:
            raise WrongUse(f"{path} exists. Write to another folder, or replace it with --overwrite (overwrite=True)")
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise BadInput(f"{folder} is not a folder, so it is not replaced; remove it or write elsewhere")
    if folder.exists() and (foreign := _foreign(folder)):
        raise BadInput(f"{folder} is not replaced: {foreign}. Remove it or write elsewhere")
    if os.path.lexists(archive) and (archive.is_symlink() or not archive.is_file() or not _is_archive(archive)):
        raise BadInput(f"{archive} is not a bundle's archive, so it is not replaced; remove it or write elsewhere")


def _foreign(folder: Path) -> str:
    """What in this folder no bundle put there; "" where nothing is lost with it. A damaged bundle is still one."""
    if not any(folder.iterdir()):
        return ""
    try:
        known = {*_open_folder(folder).manifest.files, agent.MANIFEST, agent.SIGNATURE}
    except (BadInput, BundleRefused) as error:
        return str(error)
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    extra = sorted({path.relative_to(folder).as_posix() for path in found} - known)
    return f"besides a bundle it holds {', '.join(extra[:5])}" if extra else ""


def _is_archive(path: Path) -> bool:
    with path.open("rb") as file:
        block = file.read(agent.BLOCK)
    return block[257:263] == b"ustar\0" and block.startswith(AGENT.encode() + b"\0")


@contextlib.contextmanager
def _workspace(folder: Path) -> Iterator[Path]:
    """A folder beside the result, so that moving is a rename. Its name and its lock tell that its owner lives."""
    for path in _leftovers(folder):
        shutil.rmtree(path, ignore_errors=True)
    work = folder.with_name(f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    work.mkdir()
    try:
        with _locked(work):
            yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _leftovers(folder: Path) -> Iterator[Path]:
    """Workspaces of processes that no longer run."""
    pattern = re.compile(re.escape(f".{folder.name}.") + r"([0-9]+)\.[0-9a-f]{8}\.tmp")
    for path in folder.parent.iterdir() if folder.parent.is_dir() else ():
        match = pattern.fullmatch(path.name)
        if match and not _runs(int(match[1]), path):
            yield path


def _runs(pid: int, work: Path) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        pass
    except OSError:  # somebody else's process
        return True
    else:
        return True
    try:  # a process of another container has a number that means nothing here, but its lock does
        with _locked(work, fcntl.LOCK_NB):
            return False
    except OSError:
        return True


def _recover(folder: Path) -> None:
    """Finishes what a killed writer had decided: the folder was replaced, the archive beside it not yet."""
    for work in _leftovers(folder):
        if (work / "old").is_dir() and not folder.exists():  # between two renames: no exchange on this disk
            (work / "old").rename(folder)
        if (work / "archive.tar").is_file() and _is_of(work / "archive.tar", folder):
            (work / "archive.tar").replace(_archive(folder))


def _is_of(archive: Path, folder: Path) -> bool:
    """Whether both have the same manifest. A half-written archive has none."""
    try:
        with archive.open("rb") as file:
            offset, size = agent.members(file)[agent.MANIFEST]
            file.seek(offset)
            return file.read(size) == _manifest(folder)
    except (OSError, ValueError, KeyError, BadInput, BundleRefused):
        return False


def _store(path: Path, data: bytes | Path) -> wire.File:
    """Writes one file and digests the bytes that were written."""
    if isinstance(data, Path) and not data.is_file():
        raise BadInput(f"{data}, to be packed as {path.name}, is not a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    sha = hashlib.sha256()
    with path.open("xb") as out, io.BytesIO(data) if isinstance(data, bytes) else data.open("rb") as source:
        for block in iter(lambda: source.read(1 << 20), b""):
            sha.update(block)
            out.write(block)
        return wire.File(out.tell(), sha.hexdigest())


def _sign(folder: Path, manifest: wire.Manifest, signer: signing.Signer) -> None:
    try:
        data = wire.dump(manifest)
    except (TypeError, ValueError) as error:  # NaN, or a type JSON has not
        raise BadInput(f"the manifest cannot be written as JSON: {error}") from error
    mark = wire.Signature(wire.SIGNATURE_SCHEMA, signer.public, signer.sign(data).hex())
    (folder / agent.MANIFEST).write_bytes(data)
    (folder / agent.SIGNATURE).write_bytes(wire.dump(mark))


def _pack(folder: Path, names: Iterable[str], archive: Path) -> None:
    with archive.open("xb") as out:
        for name in sorted(names):
            size = (folder / name).stat().st_size
            out.write(agent.header(name, size))
            with (folder / name).open("rb") as file:
                shutil.copyfileobj(file, out, 1 << 20)
            out.write(bytes(-size % agent.BLOCK))
        out.write(bytes(2 * agent.BLOCK))


def _sync(folder: Path) -> None:
    """Files and folders: without the latter, names may be lost with the power though contents are not."""
    for path in (folder, *folder.rglob("*")):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextlib.contextmanager
def _locked(folder: Path, wait: int = 0) -> Iterator[int]:
    """The lock ends with the process that holds it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | wait)
        except BlockingIOError:
            raise
        except OSError:  # NFS locks no folder: the process number in the name has to do
            pass
        yield descriptor
    finally:
        os.close(descriptor)


def _commit(work: Path, folder: Path, overwrite: bool) -> None:
    """Folder and archive change places with the new ones; where the second fails, the first is taken back."""
    with _locked(folder.parent) as parent:  # two writers: the folder and the archive must be the same one's
        check_place(folder, overwrite)  # somebody may have been quicker
        replaced = folder.exists()
        _move(work / "bundle", folder, work / "old")
        try:
            (work / "archive.tar").replace(_archive(folder))
        except BaseException:
            if replaced:
                _move(work / "bundle" if (work / "bundle").exists() else work / "old", folder, work / "failed")
            else:
                folder.rename(work / "bundle")
            raise
        os.fsync(parent)


def _move(new: Path, folder: Path, old: Path) -> None:
    """`folder` becomes `new`. On Linux in one step; elsewhere the former one is for a moment at `old`."""
    if not folder.exists():
        new.rename(folder)
    elif not _exchange(new, folder):
        folder.rename(old)
        try:
            new.rename(folder)
        except BaseException:
            old.rename(folder)
            raise


def _exchange(one: Path, other: Path) -> bool:
    """Swaps two folders atomically; False where the system or the disk cannot."""
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    return renameat2 is not None and renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0
