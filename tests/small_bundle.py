"""A small valid bundle, and the means to sign whatever an attacker with a trusted key might write."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import factory
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from edgeformer import bundle, signing
from edgeformer_agent import wire

PROGRAM = "programs/onnx-int8/model.onnx"
CONTENTS = {
    PROGRAM: b"\x08\x0a" + bytes(range(256)) * 4,
    "cases/golden.npz": b"golden",
    "cases/evaluation.npz": b"evaluation",
}
TARGET = "raspberry-pi-4"


def signer(seed: int = 1) -> signing.Signer:
    private = Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32)
    return signing.Signer(f"seed{seed}", private.public_key().public_bytes_raw().hex(), private)


KEYS = (signer().public,)


def manifest(**changes: object) -> wire.Manifest:
    return factory.manifest(("onnx-int8",), files={}, **{"expires": "2999-12-31", **changes})


def small(folder: Path, *, overwrite: bool = False, contents: Any = CONTENTS, **changes: object) -> bundle.Bundle:
    return bundle.write(folder, manifest(**changes), contents, signer(), overwrite=overwrite)


def sign(folder: Path, data: bytes, by: signing.Signer | None = None) -> None:
    """Puts any bytes in the manifest's place, correctly signed."""
    by = by or signer()
    mark = wire.Signature(wire.SIGNATURE_SCHEMA, by.public, by.sign(data).hex())
    (folder / "manifest.json").write_bytes(data)
    (folder / "manifest.sig").write_bytes(wire.dump(mark))


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest as a dictionary and signs it again."""
    body = json.loads((folder / "manifest.json").read_bytes())
    change(body)
    sign(folder, json.dumps(body).encode())


def rename(folder: Path, old: str, new: str) -> None:
    """One listed file under another name, on the disk where that is possible and in the manifest."""

    def change(body: dict[str, Any]) -> None:
        body["files"][new] = body["files"].pop(old)

    edit(folder, change)
