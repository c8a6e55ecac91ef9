"""Attacks on the files of an unpacked bundle. None needs a key."""

import os
from pathlib import Path

import pytest
from small_bundle import KEYS, PROGRAM, TARGET, edit, sign, signer

from edgeformer import bundle, errors, signing
from edgeformer_agent import verify as agent


def test_tampered_program(good, refused):
    data = bytearray((good / PROGRAM).read_bytes())
    data[10] ^= 1
    (good / PROGRAM).write_bytes(data)
    message = refused(good, f"changed: {PROGRAM} (sha256 ")
    assert "missing" not in message and "extra" not in message


def test_grown_program(good, refused):
    with (good / PROGRAM).open("ab") as file:
        file.write(b"\0")
    refused(good, f"changed: {PROGRAM} (1027 bytes instead of 1026)")


def test_tampered_agent(good, refused):
    data = (good / "agent.pyz").read_bytes()
    (good / "agent.pyz").write_bytes(data.replace(b"sys.exit", b"sys.exec"))
    refused(good, "changed: agent.pyz")


def test_tampered_manifest(good, refused):
    data = (good / "manifest.json").read_bytes()
    (good / "manifest.json").write_bytes(data.replace(b'"version": 3', b'"version": 4'))
    refused(good, "manifest.json: its signature by " + KEYS[0])


def test_tampered_signature(good, refused):
    data = (good / "manifest.sig").read_text()
    at = data.index('"signature": "') + 20
    (good / "manifest.sig").write_text(data[:at] + ("0" if data[at] != "0" else "1") + data[at + 1 :])
    refused(good, "manifest.json: its signature by " + KEYS[0])


def test_signature_of_another_bundle(good, refused, tmp_path):
    other = bundle.write(tmp_path / "other", agent.verify(good, KEYS)._replace(version=9), _contents(good), signer())
    (good / "manifest.sig").write_bytes((other.path / "manifest.sig").read_bytes())
    refused(good, "manifest.json: its signature")


def test_mixed_with_files_of_another_version(good, refused, tmp_path):
    contents = {**_contents(good), PROGRAM: b"another"}
    other = bundle.write(tmp_path / "other", agent.verify(good, KEYS)._replace(version=4), contents, signer())
    (good / PROGRAM).write_bytes((other.path / PROGRAM).read_bytes())
    refused(good, f"changed: {PROGRAM}")


def test_signed_by_an_unknown_key(good, refused):
    sign(good, (good / "manifest.json").read_bytes(), signer(2))
    refused(good, f"signed by {signer(2).public}, which is not a trusted key", KEYS[0])


def test_another_key_claims_the_trusted_name(good, refused):
    """The key in the file is what is compared, and it must be the one that signed."""
    sign(good, (good / "manifest.json").read_bytes(), signer(2))
    text = (good / "manifest.sig").read_text()
    (good / "manifest.sig").write_text(text.replace(signer(2).public, KEYS[0]))
    refused(good, "manifest.json: its signature")


def test_no_key_trusts_nobody(good, refused):
    refused(good, "no trusted key", keys=())


def test_no_key_on_this_machine_trusts_nobody(good):
    with pytest.raises(errors.BundleRefused, match="no trusted key"):
        bundle.open_bundle(good).verify()
    signing.trust("builder", KEYS[0])
    bundle.open_bundle(good).verify()


def test_part_of_a_key_is_no_key(good, refused):
    refused(good, "not a trusted key", keys=KEYS[0][:10])
    refused(good, "not a trusted key", keys=("",))


def test_extra_file(good, refused):
    (good / "programs/evil.so").write_bytes(b"")
    refused(good, "extra: programs/evil.so")


def test_extra_file_beside_the_manifest(good, refused):
    (good / ".hidden").write_bytes(b"")
    refused(good, "extra: .hidden")


def test_extra_folder(good, refused):
    (good / "edgeformer_agent").mkdir()
    refused(good, "extra: edgeformer_agent (folder)")


def test_extra_manifest_deeper(good, refused):
    (good / "programs/manifest.json").write_bytes((good / "manifest.json").read_bytes())
    refused(good, "extra: programs/manifest.json")


def test_extra_name_that_paints_over_the_terminal(good, refused):
    (good / "x\x1b[2J").write_bytes(b"")
    assert "\x1b" not in refused(good, "extra: 'x\\x1b[2J'")


def test_missing_file(good, refused):
    (good / "cases/golden.npz").unlink()
    refused(good, "missing: cases/golden.npz")


def test_missing_manifest(good):
    (good / "manifest.json").unlink()
    with pytest.raises(agent.Refused, match=r"manifest\.json"):
        agent.verify(good, KEYS)
    with pytest.raises(errors.BadInput, match=r"manifest\.json"):
        bundle.open_bundle(good)


def test_missing_signature(good, refused):
    (good / "manifest.sig").unlink()
    refused(good, "manifest.sig")


def test_everything_that_differs_is_named(good, refused):
    (good / PROGRAM).write_bytes(b"")
    (good / "agent.pyz").write_bytes(b"")
    (good / "cases/golden.npz").unlink()
    (good / "one").write_bytes(b"")
    (good / "cases/two").write_bytes(b"")
    message = refused(good)
    assert message == (
        f"changed: agent.pyz (0 bytes instead of {_size(good)}), {PROGRAM} (0 bytes instead of 1026); "
        "extra: cases/two (file), one (file); missing: cases/golden.npz"
    )


def test_many_extra_files_do_not_flood_the_message(good, refused):
    for i in range(600):
        (good / f"x{i:04}").write_bytes(b"")
    assert len(refused(good, "and 580 more")) < 1000


@pytest.mark.parametrize("name", [PROGRAM, "agent.pyz"])
def test_symbolic_link_to_the_same_bytes(good, refused, tmp_path, name):
    (good / name).rename(tmp_path / "elsewhere")
    (good / name).symlink_to(tmp_path / "elsewhere")
    refused(good, f"changed: {name} (symbolic link)")


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sig"])
def test_symbolic_link_in_the_manifests_place(good, refused, tmp_path, name):
    (good / name).rename(tmp_path / "elsewhere")
    (good / name).symlink_to(tmp_path / "elsewhere")
    refused(good, name)
    with pytest.raises(agent.Refused, match=name):
        agent.signed(good, KEYS)


def test_file_that_becomes_a_link_between_look_and_opening(good, refused, tmp_path, monkeypatch):
    """What `stat` said about the name is asked again of what was opened."""
    seen = (good / PROGRAM).stat()
    (good / PROGRAM).rename(tmp_path / "elsewhere")
    (good / PROGRAM).symlink_to(tmp_path / "elsewhere")
    kind = agent._kind
    monkeypatch.setattr(agent, "_kind", lambda info: kind(seen if info.st_mode & 0o170000 == 0o120000 else info))
    refused(good, "model.onnx")


def test_symbolic_link_to_a_folder(good, refused, tmp_path):
    (good / "programs").rename(tmp_path / "elsewhere")
    (good / "programs").symlink_to(tmp_path / "elsewhere")
    refused(good, "programs (symbolic link)", f"missing: {PROGRAM}")


def test_dangling_link(good, refused):
    (good / "cases/weights.data").symlink_to("/nonexistent")
    refused(good, "extra: cases/weights.data (symbolic link)")


@pytest.mark.parametrize("name", [PROGRAM, "manifest.json", "manifest.sig"])
def test_hard_link(good, refused, tmp_path, name):
    """Its content could be changed later through the other name."""
    os.link(good / name, tmp_path / "elsewhere")
    refused(good, name, "hard link")


@pytest.mark.parametrize("name", [PROGRAM, "manifest.json", "manifest.sig", "cases/extra"])
@pytest.mark.timeout(10)
def test_pipe(good, refused, name):
    """Opening it would wait for ever."""
    (good / name).unlink(missing_ok=True)
    os.mkfifo(good / name)
    refused(good, name, "pipe")


@pytest.mark.parametrize("name", [PROGRAM, "manifest.sig"])
def test_folder_in_a_files_place(good, refused, name):
    (good / name).unlink()
    (good / name).mkdir()
    refused(good, name, "folder")


def test_file_in_a_folders_place(good, refused):
    for path in sorted((good / "cases").iterdir()):
        path.unlink()
    (good / "cases").rmdir()
    (good / "cases").write_bytes(b"")
    refused(good, "extra: cases (file)", "missing: cases/evaluation.npz, cases/golden.npz")


def test_deep_folders_are_not_entered(good, refused):
    deep = good
    for _ in range(300):
        deep = deep / "d"
        deep.mkdir()
    refused(good, "extra: d (folder)")


def test_file_larger_than_memory_is_not_read(good, refused):
    os.truncate(good / PROGRAM, 1 << 42)
    refused(good, f"changed: {PROGRAM} ({1 << 42} bytes instead of 1026)")


def test_oversize_manifest(good, refused, monkeypatch):
    monkeypatch.setattr(agent, "MAX_MANIFEST", (good / "manifest.json").stat().st_size - 1)
    refused(good, "manifest.json: larger than")


def test_oversize_manifest_is_not_read(good, refused):
    os.truncate(good / "manifest.json", 1 << 42)
    refused(good, "manifest.json: larger than")


def test_oversize_signature(good, refused):
    os.truncate(good / "manifest.sig", 1 << 42)
    refused(good, "manifest.sig: larger than")


def test_oversize_count(good, refused, monkeypatch):
    monkeypatch.setattr(agent, "MAX_FILES", 3)
    refused(good, "4 files, more than 3")


def test_oversize_bytes(good, refused, monkeypatch):
    monkeypatch.setattr(agent, "MAX_BYTES", 1000)
    refused(good, "bytes in total, more than 1000")


def test_replaced_after_it_was_opened(good):
    opened = bundle.open_bundle(good)
    edit(good, lambda body: body.update(version=4))
    agent.verify(good, KEYS, TARGET)
    with pytest.raises(errors.BundleRefused, match="replaced since"):
        opened.verify(KEYS, TARGET)


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_unreadable_file(good, refused):
    (good / PROGRAM).chmod(0)
    refused(good, PROGRAM)


def test_no_folder(tmp_path):
    with pytest.raises(agent.Refused, match="nothing"):
        agent.verify(tmp_path / "nothing", KEYS)
    with pytest.raises(errors.BadInput, match="nothing"):
        bundle.open_bundle(tmp_path / "nothing")


def _contents(folder: Path) -> dict[str, Path]:
    return {name: folder / name for name in agent.verify(folder, KEYS).files if name != "agent.pyz"}


def _size(folder: Path) -> int:
    return len(bundle.agent_zip()) if folder else 0
