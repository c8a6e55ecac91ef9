"""Keys: made once, private to their owner, never replaced; trust is explicit."""

import subprocess
import sys
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from cryptography.hazmat.primitives.serialization import BestAvailableEncryption, Encoding, NoEncryption, PrivateFormat

from edgeformer import errors, signing
from edgeformer_agent import ed25519

OTHER = Ed25519PrivateKey.from_private_bytes(b"\7" * 32).public_key().public_bytes_raw().hex()


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    return tmp_path / "keys"


def test_what_a_key_signs_the_agent_verifies(keys: Path) -> None:
    made = signing.create("ci", keys)
    assert ed25519.verify(bytes.fromhex(made.public), made.sign(b"data"), b"data")
    loaded = signing.load("ci", keys)
    assert loaded == made
    assert loaded.sign(b"data") == made.sign(b"data")


def test_files(keys: Path) -> None:
    made = signing.create("ci", keys)
    assert sorted(path.name for path in keys.iterdir()) == ["ci.pem", "ci.pub"]
    assert (keys / "ci.pem").stat().st_mode & 0o777 == 0o600
    assert keys.stat().st_mode & 0o777 == 0o700
    assert (keys / "ci.pub").read_text() == f"{made.public}\n"
    assert b"BEGIN PRIVATE KEY" in (keys / "ci.pem").read_bytes()  # PKCS8


def test_the_private_key_is_in_no_representation(keys: Path) -> None:
    made = signing.create("ci", keys)
    assert "private" not in repr(made).lower()


def test_the_default_key_is_made_on_first_use(keys: Path) -> None:
    assert signing.names(keys) == ()
    first = signing.load(folder=keys)
    assert signing.names(keys) == ("default",)
    assert signing.load(folder=keys).public == first.public


def test_the_folder_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    signing.load()
    assert (tmp_path / "config/edgeformer/keys/default.pem").is_file()
    for ignored in ("", "relative"):
        monkeypatch.setenv("XDG_CONFIG_HOME", ignored)
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        assert signing._folder(None) == tmp_path / "home/.config/edgeformer/keys"


def test_other_keys_are_not_made_silently(keys: Path) -> None:
    with pytest.raises(errors.Missing, match=r"no private key 'ci' .*signing.create\('ci'\)"):
        signing.load("ci", keys)


def test_a_key_is_never_replaced(keys: Path) -> None:
    made = signing.create("ci", keys)
    with pytest.raises(errors.WrongUse, match="never replaced"):
        signing.create("ci", keys)
    assert signing.load("ci", keys).public == made.public
    assert not [path for path in keys.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o604, 0o660, 0o601])
def test_a_key_that_others_can_read_is_refused(keys: Path, mode: int) -> None:
    signing.create("ci", keys)
    (keys / "ci.pem").chmod(mode)
    with pytest.raises(errors.CheckFailed, match=rf"mode {mode:o}.*chmod 600 .*ci\.pem"):
        signing.load("ci", keys)


def test_a_mismatched_public_half_is_refused(keys: Path) -> None:
    signing.create("ci", keys)
    (keys / "ci.pub").write_text(OTHER)
    with pytest.raises(errors.CheckFailed, match=r"ci\.pub is not the public half"):
        signing.load("ci", keys)


def test_a_lost_public_half_is_written_again(keys: Path) -> None:
    made = signing.create("ci", keys)
    (keys / "ci.pub").unlink()
    assert signing.trusted(keys) == {"ci": made.public}
    assert (keys / "ci.pub").read_text().strip() == made.public


@pytest.mark.parametrize("content", [b"", b"junk", b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_a_damaged_private_key(keys: Path, content: bytes) -> None:
    signing.create("ci", keys)
    (keys / "ci.pem").write_bytes(content)
    with pytest.raises(errors.BadInput, match=r"ci\.pem is not"):
        signing.load("ci", keys)


def test_keys_of_other_kinds(keys: Path) -> None:
    signing.create("ci", keys)
    rsa = generate_private_key(65537, 2048)
    (keys / "ci.pem").write_bytes(rsa.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    with pytest.raises(errors.BadInput, match="only Ed25519"):
        signing.load("ci", keys)
    locked = BestAvailableEncryption(b"secret")
    (keys / "ci.pem").write_bytes(Ed25519PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, locked))
    with pytest.raises(errors.BadInput, match="not an unencrypted"):
        signing.load("ci", keys)


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "a/b", "A", "a b", ".hidden", "ü", "x" * 65, "a\n", "a\0"])
def test_names(keys: Path, name: str) -> None:
    calls = [signing.create, signing.load, signing.public, signing.untrust]
    for call in calls:
        with pytest.raises(errors.BadInput, match="cannot name a key"):
            call(name, keys)
    with pytest.raises(errors.BadInput, match="cannot name a key"):
        signing.trust(name, OTHER, keys)
    assert not keys.exists()


def test_trust_and_take_it_back(keys: Path) -> None:
    own = signing.create("ci", keys)
    signing.trust("alice", f" {OTHER.upper()}\n", keys)
    signing.trust("alice", OTHER, keys)  # twice is once
    assert signing.trusted(keys) == {"ci": own.public, "alice": OTHER}
    assert signing.public("alice", keys) == OTHER
    assert signing.public("ci", keys) == own.public
    assert signing.names(keys) == ("ci",)
    signing.untrust("alice", keys)
    assert signing.trusted(keys) == {"ci": own.public}
    with pytest.raises(errors.BadInput, match="nothing to take back"):
        signing.untrust("alice", keys)


def test_nobody_is_trusted_at_first(keys: Path) -> None:
    assert signing.trusted(keys) == {}
    with pytest.raises(errors.BadInput, match=r"no key 'default' here\. Known: none"):
        signing.public(folder=keys)


def test_a_trusted_key_is_not_replaced(keys: Path) -> None:
    signing.trust("alice", OTHER, keys)
    mallory = Ed25519PrivateKey.generate().public_key().public_bytes_raw().hex()
    with pytest.raises(errors.WrongUse, match="already trusted with another key"):
        signing.trust("alice", mallory, keys)
    assert signing.trusted(keys) == {"alice": OTHER}


def test_a_name_means_one_key(keys: Path) -> None:
    signing.create("ci", keys)
    with pytest.raises(errors.WrongUse, match="your own"):
        signing.trust("ci", OTHER, keys)
    signing.trust("alice", OTHER, keys)
    with pytest.raises(errors.WrongUse, match="somebody else's"):
        signing.create("alice", keys)


@pytest.mark.parametrize("key", ["", "00", OTHER[:-1], OTHER + "0", "zz" * 32, "01" + "00" * 31, "ff" * 32])
def test_what_is_no_public_key_is_not_trusted(keys: Path, key: str) -> None:
    with pytest.raises(errors.BadInput, match="not an Ed25519 public key"):
        signing.trust("alice", key, keys)
    assert signing.trusted(keys) == {}


def test_a_damaged_trusted_key_is_named(keys: Path) -> None:
    signing.trust("alice", OTHER, keys)
    (keys / "trusted/alice.pub").write_text("junk")
    with pytest.raises(errors.BadInput, match=r"alice\.pub is not a public key.*'junk'"):
        signing.trusted(keys)


def test_many_processes_agree_on_one_default_key(keys: Path) -> None:
    code = (
        "import sys, pathlib; from edgeformer import signing\n"
        "print(signing.load(folder=pathlib.Path(sys.argv[1])).public)"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(keys)], stdout=subprocess.PIPE) for _ in range(4)]
    said = {process.communicate()[0] for process in running}
    assert [process.returncode for process in running] == [0] * 4
    assert said == {f"{signing.load(folder=keys).public}\n".encode()}


def test_without_cryptography_the_message_installs_it(keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    signing.trust("alice", OTHER, keys)
    for module in [name for name in sys.modules if name.startswith("cryptography")]:
        monkeypatch.setitem(sys.modules, module, None)
    assert signing.trusted(keys) == {"alice": OTHER}  # verifying needs none
    with pytest.raises(errors.MissingExtra, match=r"pip install 'edgeformer\[sdk\]'"):
        signing.load(folder=keys)
    assert not (keys / "default.pem").exists()


def test_importing_it_imports_no_cryptography() -> None:
    code = "import sys; import edgeformer.bundle; sys.exit('cryptography' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
