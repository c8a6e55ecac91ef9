"""
Decides whether a bundle may be opened. Nothing in it is opened before `verify` has returned.

Order: size caps; the signature over the manifest's raw bytes, by a key the caller pinned; only then its parsing;
target, version and expiry; names; and last every file of the folder against its size and digest. Whatever goes wrong
on the way, foreseen or not, is `Refused` with the culprit's name. The folder must be writable by its owner only: what
somebody changes between the check and the loading is not seen. Expiry is judged by this machine's clock unless `today`
is given.
"""

import contextlib
import datetime
import fcntl
import hashlib
import os
import re
import shutil
import stat
import unicodedata
from typing import Any, BinaryIO, Dict, Iterable, Iterator, List, NamedTuple, Optional, Set, Tuple

from . import ed25519, wire

MANIFEST, SIGNATURE = "manifest.json", "manifest.sig"
MAX_FILES, MAX_BYTES, MAX_MANIFEST, MAX_SIGNATURE = 512, 4 << 30, 4 << 20, 4096
BLOCK = 512  # of a tar
STATE, STATE_SCHEMA = "versions.json", "edgeformer.versions/1"
# O_NONBLOCK: opening a pipe somebody put in a file's place must not wait for its writer.
READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
MEMBER = {b"1": "hard link", b"2": "symbolic link", b"3": "device", b"4": "device", b"5": "folder", b"6": "pipe"}
MEMBER.update({b"S": "sparse file", b"x": "pax header", b"g": "pax header", b"L": "GNU name", b"K": "GNU name"})


class Refused(ValueError):
    """This bundle must not be opened. The message names the culprit."""


class Versions(NamedTuple):
    """The highest version of each bundle this device accepted: key -> name -> version."""

    schema: str
    highest: Dict[str, Dict[str, int]]


def verify(folder, keys, target=None, minimum_version=0, today=None):
    # type: (Any, Iterable[str], Optional[str], int, Optional[datetime.date]) -> wire.Manifest
    """The manifest of a bundle that is exactly what one of `keys` (public, hex) signed; else Refused."""
    with _refusing("{}: cannot be verified".format(folder)), opened(folder) as root:
        data, _ = _signed(root, keys)
        with _refusing(MANIFEST):
            manifest = wire.load_manifest(data)
        _check_claims(manifest, target, minimum_version, today or datetime.datetime.now(datetime.timezone.utc).date())
        _check_files(manifest.files)
        _check_references(manifest)
        _check_content(root, manifest.files)
        return manifest


def signed(folder, keys):
    # type: (Any, Iterable[str]) -> Tuple[bytes, str]
    """The manifest's bytes and the key that signed them, to look up which version is expected. No file is checked."""
    with _refusing("{}: cannot be verified".format(folder)), opened(folder) as root:
        return _signed(root, keys)


@contextlib.contextmanager
def _refusing(what):
    # type: (str) -> Iterator[None]
    try:
        yield
    except Refused:
        raise
    except Exception as error:  # an attacker chooses the input: what cannot be judged is refused
        raise Refused("{}: {}".format(what, error if str(error) else type(error).__name__)) from error


@contextlib.contextmanager
def opened(folder):
    # type: (Any) -> Iterator[int]
    """All work goes through this descriptor, so a folder swapped meanwhile is not half of each."""
    root = os.open(str(folder), os.O_RDONLY | os.O_DIRECTORY)
    try:
        yield root
    finally:
        os.close(root)


def _signed(root, keys):
    # type: (int, Iterable[str]) -> Tuple[bytes, str]
    keys = (keys,) if isinstance(keys, str) else tuple(keys)
    if not keys:
        raise Refused("no trusted key was given, so no signature can be accepted: pin the public key of the builder")
    data = read(root, MANIFEST, MAX_MANIFEST)
    raw = read(root, SIGNATURE, MAX_SIGNATURE)
    with _refusing(SIGNATURE):
        mark = wire.decode(wire.Signature, wire.SIGNATURE_SCHEMA, raw)  # type: wire.Signature
    if wire.dump(mark) != raw or not _hex(mark.key, 32) or not _hex(mark.signature, 64):
        raise Refused("{}: not written as edgeformer writes it".format(SIGNATURE))
    if mark.key not in keys:
        known = ", ".join(sorted(keys))
        raise Refused("{}: signed by {}, which is not a trusted key (trusted: {})".format(SIGNATURE, mark.key, known))
    if not ed25519.verify(bytes.fromhex(mark.key), bytes.fromhex(mark.signature), data):
        raise Refused("{}: its signature by {} does not match; one of the two was changed".format(MANIFEST, mark.key))
    return data, mark.key


def read(root, name, most):
    # type: (int, str, int) -> bytes
    """The bytes of one plain file of the folder `root`."""
    with _refusing(name), _plain(root, name) as file:
        data = file.read(most + 1)
        if len(data) > most:
            raise Refused("{}: larger than {} bytes".format(name, most))
        return data


@contextlib.contextmanager
def _plain(folder, name):
    # type: (int, str) -> Iterator[BinaryIO]
    """Asks the open file what it is, not whatever has its name by now."""
    descriptor = os.open(name, READ, dir_fd=folder)
    try:
        kind = _kind(os.fstat(descriptor))
        if kind != "file":
            raise Refused("{}: is a {}, not a plain file".format(name, kind))
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            yield file
    finally:
        os.close(descriptor)


def _hex(text, size):
    # type: (str, int) -> bool
    return re.fullmatch("[0-9a-f]{%d}" % (2 * size), text) is not None


def _check_claims(manifest, target, minimum_version, today):
    # type: (wire.Manifest, Optional[str], int, datetime.date) -> None
    if target is not None and manifest.target != target:
        raise Refused("built for target {!r}, this is {!r}".format(manifest.target, target))
    if manifest.version < max(minimum_version, 0):
        raise Refused(
            "rollback: {!r} version {} is older than {}, which was accepted before".format(
                manifest.name, manifest.version, minimum_version
            )
        )
    if not re.fullmatch("[0-9]{4}-[0-9]{2}-[0-9]{2}", manifest.expires):
        raise Refused("expires: {!r} is not a date, YYYY-MM-DD".format(manifest.expires))
    if today > datetime.datetime.strptime(manifest.expires, "%Y-%m-%d").date():
        raise Refused("expired: valid to {}, today is {}; build it again".format(manifest.expires, today))


def _check_files(files):
    # type: (Dict[str, wire.File]) -> None
    if len(files) > MAX_FILES:
        raise Refused("{} files, more than {}".format(len(files), MAX_FILES))
    check_names(files, (MANIFEST, SIGNATURE))
    for name, file in files.items():
        if file.size < 0 or not _hex(file.sha256, 32):
            raise Refused("{}: size {} and sha256 {!r} are no size and digest".format(name, file.size, file.sha256))
    total = sum(file.size for file in files.values())
    if total > MAX_BYTES:
        raise Refused("{} bytes in total, more than {}".format(total, MAX_BYTES))


def check_names(names, reserved=()):
    # type: (Iterable[str], Iterable[str]) -> None
    """Refuses a name that could mean another file, here or on a disk that folds case or Unicode forms."""
    taken = {_folded(name): name + " (reserved)" for name in reserved}
    folders = {}  # type: Dict[str, str]
    for name in names:
        reason = _bad_name(name)
        if reason:
            raise Refused("file name {}: {}".format(_shown(name), reason))
        if _folded(name) in taken:
            raise Refused("file name {}: the same as {} on some disks".format(name, taken[_folded(name)]))
        taken[_folded(name)] = name
        for folder in _parents(name):
            if folders.setdefault(_folded(folder), folder) != folder:
                raise Refused("folder {}: the same as {} on some disks".format(folder, folders[_folded(folder)]))
    for folded in sorted(set(folders) & set(taken)):
        raise Refused("file name {}: also the folder {}".format(taken[folded], folders[folded]))


def _bad_name(name):
    # type: (str) -> Optional[str]
    """Why this name must not be in a bundle; None where it may."""
    if name.startswith("/"):
        return "absolute"
    if any(unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp") for c in name):
        return "has a control character"
    if "\\" in name or ":" in name:
        return "has a backslash or a colon"
    parts = name.split("/")
    if ".." in parts:
        return "leaves the bundle"
    if "" in parts or "." in parts:
        return "has an empty part"
    if unicodedata.normalize("NFC", name) != name:
        return "not in the Unicode form NFC"
    return None if _split(name.encode("utf-8")) else "too long"


def _folded(name):
    # type: (str) -> str
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", name).casefold())


def _parents(name):
    # type: (str) -> List[str]
    parts = name.split("/")
    return ["/".join(parts[:i]) for i in range(1, len(parts))]


def _shown(name):
    # type: (str) -> str
    """A name must not be able to paint over the terminal that shows it."""
    return name if name and name.isprintable() else ascii(name)


def _check_references(manifest):
    # type: (wire.Manifest) -> None
    named = [(entry.name, entry.path) for entry in manifest.programs]
    if len({name for name, _ in named}) != len(named):
        raise Refused("program names are not unique: {}".format(", ".join(sorted(name for name, _ in named))))
    cases = [("cases.golden", manifest.cases.golden), ("cases.evaluation", manifest.cases.evaluation)]
    for where, path in named + cases:
        if path not in manifest.files:
            raise Refused("{}: refers to {}, which is not in the bundle's files".format(where, _shown(path)))


def _check_content(root, files):
    # type: (int, Dict[str, wire.File]) -> None
    """Names everything that differs, not only the first."""
    odd = {}  # type: Dict[str, str]
    seen = set(_walk(root, "", files, {folder for name in files for folder in _parents(name)}, odd))
    found = {
        "changed": ["{} ({})".format(name, odd[name]) for name in sorted(odd) if name in files],
        "missing": sorted(set(files) - seen),
        "extra": ["{} ({})".format(_shown(name), odd[name]) for name in sorted(odd) if name not in files],
    }
    if odd or found["missing"]:
        raise Refused("; ".join(kind + ": " + _few(found[kind]) for kind in sorted(found) if found[kind]))


def _few(names):
    # type: (List[str]) -> str
    return ", ".join(names[:20]) + (" and {} more".format(len(names) - 20) if len(names) > 20 else "")


def _walk(folder, prefix, files, folders, odd):
    # type: (int, str, Dict[str, wire.File], Set[str], Dict[str, str]) -> Iterator[str]
    """Every name below `folder`; `odd` receives what is wrong with it. Enters no folder that no listed file needs."""
    for name in sorted(os.listdir(folder)):
        path = prefix + name
        kind = _kind(os.stat(name, dir_fd=folder, follow_symlinks=False))
        if kind == "folder" and path in folders:
            child = os.open(name, READ | os.O_DIRECTORY, dir_fd=folder)
            try:
                for inner in _walk(child, path + "/", files, folders, odd):
                    yield inner
            finally:
                os.close(child)
        elif kind != "file" or path not in (files if prefix else set(files) | {MANIFEST, SIGNATURE}):
            odd[path] = kind
        elif path in files:
            wrong = _difference(folder, name, files[path])
            if wrong:
                odd[path] = wrong
        yield path


def _kind(info):
    # type: (os.stat_result) -> str
    """`file` only for a plain file with one name: content shared with a name elsewhere can change under us."""
    if stat.S_ISREG(info.st_mode):
        return "file" if info.st_nlink == 1 else "hard link"
    if stat.S_ISDIR(info.st_mode):
        return "folder"
    return "symbolic link" if stat.S_ISLNK(info.st_mode) else "pipe, socket or device"


def _difference(folder, name, expected):
    # type: (int, str, wire.File) -> Optional[str]
    with _plain(folder, name) as file:
        size = os.fstat(file.fileno()).st_size
        if size != expected.size:
            return "{} bytes instead of {}".format(size, expected.size)
        sha, left = hashlib.sha256(), expected.size
        while left > 0:
            block = file.read(min(left, 1 << 20))
            if not block:
                return "became shorter while it was read"
            sha.update(block)
            left -= len(block)
    found = sha.hexdigest()
    return None if found == expected.sha256 else "sha256 {} instead of {}".format(found[:16], expected.sha256[:16])


def unpack(archive, folder):
    # type: (Any, Any) -> None
    """
    Writes the files of a bundle's tar into the new `folder`. Proves nothing about their content: `verify` does.

    Only the exact headers that `header` writes are accepted, so there are no links, devices, sparse files or extended
    names to interpret. All of them are checked before the first byte is written.
    """
    folder = str(folder)
    with _refusing("{}: cannot be unpacked".format(archive)), open(str(archive), "rb", opener=_patient) as file:
        found = members(file)
        os.mkdir(folder)
        try:
            for name, (offset, size) in found.items():
                _extract(file, offset, size, os.path.join(folder, *name.split("/")))
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise


def _patient(path, flags):
    # type: (str, int) -> int
    return os.open(path, flags | os.O_NONBLOCK)


def header(name, size):
    # type: (str, int) -> bytes
    """The one USTAR header of a file in a bundle's tar: no owner, no time, one mode."""
    split = _split(name.encode("utf-8"))
    if split is None or size >= 8**11:
        raise Refused("{}: the name or the size ({} bytes) does not fit an archive".format(_shown(name), size))
    before = split[1].ljust(100, b"\0") + b"0000644\x000000000\x000000000\0%011o\x0000000000000\0" % size
    after = b"0".ljust(101, b"\0") + (b"ustar\x0000".ljust(88, b"\0") + split[0]).ljust(255, b"\0")
    return before + b"%06o\0 " % sum(before + b" " * 8 + after) + after


def _split(name):
    # type: (bytes) -> Optional[Tuple[bytes, bytes]]
    """(prefix, rest) as USTAR stores a name; None where it does not fit."""
    if len(name) <= 100:
        return b"", name
    at = name.find(b"/", len(name) - 101)
    return (name[:at], name[at + 1 :]) if 0 < at <= 155 and name[at + 1 :] else None


def members(file):
    # type: (BinaryIO) -> Dict[str, Tuple[int, int]]
    """name -> (offset, size) of every file in a bundle's tar, all of its headers checked."""
    info = os.fstat(file.fileno())
    if not stat.S_ISREG(info.st_mode):
        raise Refused("is a {}, not a plain file".format(_kind(info)))
    found, offset = {}, 0  # type: Dict[str, Tuple[int, int]], int
    while True:
        block = _at(file, offset, BLOCK)
        if not block.strip(b"\0"):
            break
        name, size = _member(block)
        _check_room(name, size, found)
        found[name] = (offset + BLOCK, size)
        end, padding = offset + BLOCK + size, -size % BLOCK
        offset = end + padding
        if offset > info.st_size or _at(file, end, padding).strip(b"\0"):
            raise Refused("{}: the archive is cut off in it, or has bytes after it".format(name))
    if info.st_size != offset + 2 * BLOCK or _at(file, offset, 2 * BLOCK).strip(b"\0"):
        raise Refused("the archive is cut off, or has bytes after its end")
    check_names(found)
    return found


def _member(block):
    # type: (bytes) -> Tuple[str, int]
    if len(block) != BLOCK or block[257:263] != b"ustar\0":
        raise Refused("not a bundle's archive: no tar header where one must be (first bytes {!r})".format(block[:8]))
    name = b"/".join(part.rstrip(b"\0") for part in (block[345:500], block[:100]) if part.strip(b"\0")).decode("utf-8")
    shown, kind = _shown(name), block[156:157]
    if kind != b"0":
        raise Refused("{}: is a {}, not a plain file".format(shown, MEMBER.get(kind, "member of unknown type")))
    if _bad_name(name):
        raise Refused("file name {}: {}".format(shown, _bad_name(name)))
    if not re.match(b"[0-7]{11}\0", block[124:136]):
        raise Refused("{}: its size {!r} is not a number".format(shown, block[124:136]))
    size = int(block[124:135], 8)
    if block != header(name, size):
        raise Refused("{}: its tar header is not as edgeformer writes it; verify the unpacked folder".format(shown))
    return name, size


def _check_room(name, size, found):
    # type: (str, int, Dict[str, Tuple[int, int]]) -> None
    """Caps and order. The order also makes the archive's bytes a function of its content."""
    if name in found:
        raise Refused("{}: twice in the archive".format(name))
    if found and name < max(found):
        raise Refused("{}: not in the order of names".format(name))
    if len(found) == MAX_FILES + 2:
        raise Refused("{}: more than {} files".format(name, MAX_FILES))
    if size + sum(size for _, size in found.values()) > MAX_BYTES + MAX_MANIFEST + MAX_SIGNATURE:
        raise Refused("{}: more than {} bytes in total".format(name, MAX_BYTES))


def _at(file, offset, size):
    # type: (BinaryIO, int, int) -> bytes
    file.seek(offset)
    return file.read(size)


def _extract(file, offset, size, path):
    # type: (BinaryIO, int, int, str) -> None
    os.makedirs(os.path.dirname(path), exist_ok=True)
    file.seek(offset)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644), "wb") as out:
        while size:
            block = file.read(min(size, 1 << 20))
            if not block:
                raise Refused("{}: the archive became shorter while it was read".format(path))
            out.write(block)
            size -= len(block)


def highest(state_folder, name, key):
    # type: (Any, str, str) -> int
    """The highest version of this bundle by this key that was remembered; 0 if none."""
    return _versions(str(state_folder)).get(key, {}).get(name, 0)


def remember(state_folder, manifest, key):
    # type: (Any, wire.Manifest, str) -> None
    """From now on nothing older is `highest`. Call it when the new bundle has proved itself."""
    folder = str(state_folder)
    with _refusing("{}: cannot record the version".format(folder)):
        os.makedirs(folder, exist_ok=True)
        with opened(folder) as lock:
            with contextlib.suppress(OSError):  # NFS locks no folder
                fcntl.flock(lock, fcntl.LOCK_EX)  # two agents must not lose each other's entry
            seen = _versions(folder)
            if seen.get(key, {}).get(manifest.name, 0) < manifest.version:
                seen.setdefault(key, {})[manifest.name] = manifest.version
                _replace(lock, STATE, wire.dump(Versions(STATE_SCHEMA, seen)))


def _versions(folder):
    # type: (str) -> Dict[str, Dict[str, int]]
    path = os.path.join(folder, STATE)
    try:
        with open(path, "rb") as file:
            seen = wire.decode(Versions, STATE_SCHEMA, file.read(MAX_MANIFEST + 1))  # type: Versions
            return seen.highest
    except FileNotFoundError:
        return {}
    except Exception as error:
        # Starting again at 0 by itself would make a damaged file a way to roll back.
        raise Refused(
            "{}: the record of accepted versions is damaged ({}); if no older bundle can be offered "
            "to this device, delete the file and deploy again".format(path, error)
        ) from error


def _replace(folder, name, data):
    # type: (int, str, bytes) -> None
    temporary = name + ".tmp"
    flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
    with open(os.open(temporary, flags, 0o600, dir_fd=folder), "wb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, name, src_dir_fd=folder, dst_dir_fd=folder)
    os.fsync(folder)
