"""
Ed25519 keys on this machine, and who else's bundles it accepts. Nothing else is signed or verified with them.

The folder is `$XDG_CONFIG_HOME/edgeformer/keys` (else `~/.config`): `<name>.pem` is a private key, readable by its
owner only; `<name>.pub` its public half, one line of hex; `trusted/<name>.pub` the public keys of others. A public key
is 64 hex digits everywhere: here, in `manifest.sig`, and pinned on a device.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from edgeformer_agent import ed25519

from .errors import BadInput, CheckFailed, Missing, MissingExtra, WrongUse

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

DEFAULT = "default"


@dataclass(frozen=True)
class Signer:
    """A private key that is loaded."""

    name: str
    public: str  # hex
    _private: Ed25519PrivateKey = field(repr=False, compare=False)

    def sign(self, message: bytes) -> bytes:
        return self._private.sign(message)


def create(name: str, folder: Path | None = None) -> Signer:
    """A new key pair. An existing one is never replaced: what it signed would become unverifiable."""
    keys = _folder(folder)
    path = keys / f"{_checked(name)}.pem"
    if (keys / "trusted" / f"{name}.pub").exists():
        raise WrongUse(f"{name!r} already names somebody else's trusted key; use another name or untrust it first")
    keys.mkdir(mode=0o700, parents=True, exist_ok=True)
    with _crypto():
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
    private = Ed25519PrivateKey.generate()
    try:
        _put(path, private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()), 0o600)
    except FileExistsError:
        raise WrongUse(f"{path} exists; a key is never replaced. Use another name, or remove both its files") from None
    public = private.public_key().public_bytes_raw().hex()
    _public(path).unlink(missing_ok=True)  # left behind by a key that was removed
    _put_public(path, public)
    return Signer(name, public, private)


def names(folder: Path | None = None) -> tuple[str, ...]:
    """The private keys on this machine."""
    return tuple(sorted(path.stem for path in _folder(folder).glob("*.pem") if not path.name.startswith(".")))


def load(name: str = DEFAULT, folder: Path | None = None) -> Signer:
    """A private key by name. The default key is made on first use."""
    path = _folder(folder) / f"{_checked(name)}.pem"
    if name == DEFAULT and not path.exists():
        with contextlib.suppress(WrongUse):  # another process was first: its key is the default
            return create(name, folder)
    private = _private(path)
    public = private.public_key().public_bytes_raw().hex()
    if _public(path).exists() and _hex(_public(path)) != public:
        raise CheckFailed(f"{_public(path)} is not the public half of {path}; remove it and it is written again")
    _put_public(path, public)
    return Signer(name, public, private)


def public(name: str = DEFAULT, folder: Path | None = None) -> str:
    """The public key, own or trusted: what to pin on a device or to hand to others."""
    known = trusted(folder)
    if _checked(name) not in known:
        raise BadInput(f"no key {name!r} here. Known: {', '.join(sorted(known)) or 'none'}")
    return known[name]


def trust(name: str, key: str, folder: Path | None = None) -> None:
    """From now on bundles signed by this public key are accepted on this machine."""
    keys = _folder(folder)
    key = key.strip().lower()
    if not _is_key(key):
        raise BadInput(f"{key!r} is not an Ed25519 public key: 64 hex digits, as in the other machine's <name>.pub")
    if _checked(name) in names(folder):
        raise WrongUse(f"{name!r} is the name of one of your own keys; give the other one another name")
    path = keys / "trusted" / f"{name}.pub"
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        _put(path, f"{key}\n".encode(), 0o644)
    except FileExistsError:
        if _hex(path) != key:
            raise WrongUse(f"{name!r} is already trusted with another key, {_hex(path)}; untrust it first") from None


def untrust(name: str, folder: Path | None = None) -> None:
    path = _folder(folder) / "trusted" / f"{_checked(name)}.pub"
    try:
        path.unlink()
    except FileNotFoundError:
        raise BadInput(f"{name!r} is not a trusted key of somebody else, so there is nothing to take back") from None


def trusted(folder: Path | None = None) -> dict[str, str]:
    """name -> public key of everybody whose bundles this machine accepts: own keys and trusted ones."""
    keys = _folder(folder)
    found = {path.stem: _hex(path) for path in sorted((keys / "trusted").glob("*.pub")) if path.name[0] != "."}
    for name in names(folder):
        half = keys / f"{name}.pub"
        found[name] = _hex(half) if half.exists() else load(name, folder).public
    return found


def _folder(folder: Path | None) -> Path:
    if folder is not None:
        return Path(folder)
    configured = os.environ.get("XDG_CONFIG_HOME", "")
    # The XDG specification has relative values ignored.
    base = Path(configured) if Path(configured).is_absolute() else Path.home() / ".config"
    return base / "edgeformer" / "keys"


def _checked(name: str) -> str:
    if not re.fullmatch(r"[a-z0-9_-][a-z0-9._-]{0,63}", name):
        raise BadInput(f"{name!r} cannot name a key: use 1 to 64 of a-z, 0-9, '.', '_', '-', and no '.' in front")
    return name


def _public(private: Path) -> Path:
    return private.with_name(private.name.removesuffix(".pem") + ".pub")


def _private(path: Path) -> Ed25519PrivateKey:
    with _crypto():
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    try:
        with path.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777
            if mode & 0o077:
                raise CheckFailed(f"{path} is open to other users (mode {mode:o}). Run: chmod 600 {path}")
            key = load_pem_private_key(file.read(1 << 16), password=None)
    except FileNotFoundError:
        fix = f"Make it with signing.create({path.stem!r})"
        raise Missing(
            f"no private key {path.stem!r} (have: {', '.join(names(path.parent)) or 'none'}). {fix}"
        ) from None
    except (ValueError, TypeError) as error:
        raise BadInput(f"{path} is not an unencrypted private key in PEM: {error}") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise BadInput(f"{path} is a key of another kind; only Ed25519 signs bundles")
    return key


def _is_key(text: str) -> bool:
    return re.fullmatch("[0-9a-f]{64}", text) is not None and ed25519.valid(bytes.fromhex(text))


def _hex(path: Path) -> str:
    text = path.read_bytes()[:100].decode("ascii", "replace").strip()
    if not _is_key(text):
        raise BadInput(f"{path} is not a public key: one line of 64 hex digits is expected, found {text[:70]!r}")
    return text


def _put_public(private: Path, public: str) -> None:
    if not _public(private).exists():
        with contextlib.suppress(FileExistsError):  # another process: the same key, the same line
            _put(_public(private), f"{public}\n".encode(), 0o644)


def _put(path: Path, data: bytes, mode: int) -> None:
    """The whole file or none, never in place of another: written aside, then linked to its name."""
    aside = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    descriptor = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, mode)
    try:
        with os.fdopen(descriptor, "wb") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        os.link(aside, path)
    finally:
        aside.unlink()


@contextlib.contextmanager
def _crypto() -> Iterator[None]:
    """Only who signs needs `cryptography`; a device verifies without it."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise MissingExtra("sdk", "cryptography") from error
