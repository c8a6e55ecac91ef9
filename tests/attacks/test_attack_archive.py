"""Attacks by the archive. Every one is a good archive with one thing changed."""

import io
import os
import tarfile
import zipfile
from pathlib import Path

import pytest
from small_bundle import KEYS, PROGRAM, TARGET

from edgeformer import bundle, errors
from edgeformer_agent import verify as agent


def packed(good, change=list, form=tarfile.USTAR_FORMAT):
    """The bundle packed by Python's tarfile; `change` edits the list of (TarInfo, bytes)."""
    members = []
    for name in sorted([*agent.verify(good, KEYS).files, "manifest.json", "manifest.sig"]):
        member = tarfile.TarInfo(name)
        data = (good / name).read_bytes()
        member.size = len(data)
        members.append((member, data))
    change(members)
    path = good.parent / "attack.tar"
    with tarfile.open(path, "w", format=form) as archive:
        for member, data in members:
            archive.addfile(member, io.BytesIO(data))
        end = archive.offset + 2 * agent.BLOCK
    os.truncate(path, end)  # tarfile pads to 10,240 bytes
    return path


def member(name, kind, link="", data=b""):
    made = tarfile.TarInfo(name)
    made.type, made.linkname, made.size = kind, link, len(data)
    return made, data


def test_the_good_one(good, tmp_path):
    """The attacks below are refused for what they change, not for being packed by tarfile."""
    archive = packed(good)
    assert archive.read_bytes() == Path(f"{good}.tar").read_bytes()
    agent.unpack(archive, tmp_path / "unpacked")
    agent.verify(tmp_path / "unpacked", KEYS, TARGET)
    bundle.open_bundle(archive).verify(KEYS, TARGET)


@pytest.mark.parametrize(
    ("kind", "word"),
    [
        (tarfile.SYMTYPE, "symbolic link"),
        (tarfile.LNKTYPE, "hard link"),
        (tarfile.CHRTYPE, "device"),
        (tarfile.BLKTYPE, "device"),
        (tarfile.FIFOTYPE, "pipe"),
        (tarfile.DIRTYPE, "folder"),
        (tarfile.GNUTYPE_SPARSE, "sparse file"),
        (tarfile.CONTTYPE, "unknown type"),
        (tarfile.AREGTYPE, "unknown type"),
        (b"V", "unknown type"),
    ],
)
def test_member_that_is_no_file(good, not_unpacked, kind, word):
    archive = packed(good, lambda members: members.append(member("zz", kind, "/etc/passwd")))
    not_unpacked(archive, "zz", word)


def test_link_first_then_a_file_through_it(good, not_unpacked, tmp_path):
    (tmp_path / "outside").mkdir()

    def change(members):
        members += [member("zz", tarfile.SYMTYPE, str(tmp_path / "outside")), member("zz/x", tarfile.REGTYPE)]

    not_unpacked(packed(good, change), "zz: is a symbolic link")


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_long_names_of_other_dialects(good, not_unpacked, form):
    archive = packed(good, lambda members: members.append(member("z" * 120, tarfile.REGTYPE)), form)
    if form == tarfile.PAX_FORMAT:
        not_unpacked(archive, "is a pax header")
    else:  # its magic number is another
        not_unpacked(archive, "not a bundle's archive", error=errors.BadInput)


def test_pax_header_renames_a_file(good, not_unpacked):
    def change(members):
        members[0][0].pax_headers = {"path": "../../evil"}

    not_unpacked(packed(good, change, tarfile.PAX_FORMAT), "pax header")


def test_pax_sparse_file(good, not_unpacked):
    def change(members):
        members[0][0].pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9" * 15}

    not_unpacked(packed(good, change, tarfile.PAX_FORMAT), "pax header")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../evil", "leaves the bundle"),
        ("programs/../../evil", "leaves the bundle"),
        ("/tmp/evil", "absolute"),
        ("a\\b", "backslash"),
        ("c:evil", "colon"),
        ("a//b", "empty part"),
        ("./a", "empty part"),
        ("ev\nil", "control"),
        ("cafe\u0301", "NFC"),
    ],
)
def test_name(good, not_unpacked, name, reason):
    def change(members):
        members.append(member(name, tarfile.REGTYPE, data=b"evil"))
        members.sort(key=lambda pair: pair[0].name)

    not_unpacked(packed(good, change), "file name " + (name if name.isprintable() else ascii(name)), reason)


def test_name_that_is_not_utf8(good, not_unpacked):
    archive = packed(good, lambda members: members.append(member("zz\udcff", tarfile.REGTYPE)))
    not_unpacked(archive, "utf-8")


def test_duplicate_member(good, not_unpacked):
    archive = packed(good, lambda members: members.append(members[-1]))
    not_unpacked(archive, f"{PROGRAM}: twice")


def test_names_that_fold_to_one(good, not_unpacked):
    archive = packed(good, lambda members: members.insert(0, member("AGENT.pyz", tarfile.REGTYPE)))
    not_unpacked(archive, "agent.pyz", "the same as AGENT.pyz")


def test_file_that_is_also_a_folder(good, not_unpacked):
    archive = packed(good, lambda members: members.insert(1, member("agent.pyz/x", tarfile.REGTYPE)))
    not_unpacked(archive, "file name agent.pyz: also the folder")


def test_unsorted(good, not_unpacked):
    not_unpacked(packed(good, lambda members: members.reverse()), "not in the order of names")


@pytest.mark.parametrize(
    ("field", "value"), [("mode", 0o4755), ("uid", 1), ("gid", 1), ("mtime", 1), ("uname", "root"), ("gname", "root")]
)
def test_header_that_edgeformer_does_not_write(good, not_unpacked, field, value):
    archive = packed(good, lambda members: setattr(members[1][0], field, value))
    not_unpacked(archive, "cases/evaluation.npz: its tar header")


def test_checksum(good, not_unpacked):
    archive = packed(good)
    data = bytearray(archive.read_bytes())
    data[150] ^= 1
    archive.write_bytes(data)
    not_unpacked(archive, "agent.pyz: its tar header")


@pytest.mark.parametrize("size", [b"\x80" + b"\0" * 6 + b"\1\0\0\0\0", b"-0000000001\0", b"77777777777 ", b"0" * 12])
def test_size_that_is_no_number(good, not_unpacked, size):
    archive = packed(good)
    data = archive.read_bytes()
    archive.write_bytes(data[:124] + size + data[136:])
    not_unpacked(archive, "agent.pyz: its size")


def test_size_beyond_the_archive(good, not_unpacked):
    archive = good.parent / "attack.tar"
    archive.write_bytes(agent.header("a", 1 << 31) + bytes(4096))
    not_unpacked(archive, "a: the archive is cut off")


def test_oversize_bytes(good):
    """A sparse archive of a kilobyte on this disk that would fill the device's."""
    archive = good.parent / "attack.tar"
    archive.write_bytes(agent.header("a", 5 << 30))
    os.truncate(archive, (5 << 30) + 3 * agent.BLOCK)
    with pytest.raises(agent.Refused, match=f"a: more than {agent.MAX_BYTES} bytes"):
        agent.unpack(archive, good.parent / "unpacked")


def test_oversize_bytes_on_the_host(good, not_unpacked, monkeypatch):
    for name in ("MAX_BYTES", "MAX_MANIFEST", "MAX_SIGNATURE"):
        monkeypatch.setattr(agent, name, 500)
    not_unpacked(Path(f"{good}.tar"), "agent.pyz: more than 500 bytes")


def test_oversize_count(good, not_unpacked, monkeypatch):
    monkeypatch.setattr(agent, "MAX_FILES", 3)
    not_unpacked(Path(f"{good}.tar"), f"{PROGRAM}: more than 3 files")


def test_truncated(good, not_unpacked):
    data = Path(f"{good}.tar").read_bytes()
    archive = good.parent / "attack.tar"
    for size in range(agent.BLOCK, len(data), max(1, len(data) // 25)):
        archive.write_bytes(data[:size])
        not_unpacked(archive, "cut off" if size % agent.BLOCK == 0 else "")


@pytest.mark.parametrize("rest", [b"x", bytes(1), bytes(512), b"x" * 512])
def test_bytes_after_the_end(good, not_unpacked, rest):
    archive = good.parent / "attack.tar"
    archive.write_bytes(Path(f"{good}.tar").read_bytes() + rest)
    not_unpacked(archive, "bytes after its end")


def test_second_archive_after_the_end(good, not_unpacked):
    """Some readers go on after the zeros."""
    archive = good.parent / "attack.tar"
    archive.write_bytes(Path(f"{good}.tar").read_bytes() * 2)
    not_unpacked(archive, "bytes after its end")


def test_bytes_hidden_in_the_padding(good, not_unpacked):
    data = bytearray(Path(f"{good}.tar").read_bytes())
    data[-2 * agent.BLOCK - 1] = 1
    archive = good.parent / "attack.tar"
    archive.write_bytes(data)
    not_unpacked(archive, f"{PROGRAM}: ", "has bytes after it")


def test_zip_given_as_tar(good, not_unpacked):
    archive = good.parent / "attack.tar"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(good / "manifest.json", "manifest.json")
    not_unpacked(archive, "not a bundle's archive", "PK", error=errors.BadInput)


def test_compressed_tar(good, not_unpacked):
    archive = good.parent / "attack.tar"
    with tarfile.open(archive, "w:gz") as file:
        file.add(good, "good")
    not_unpacked(archive, "not a bundle's archive", error=errors.BadInput)


@pytest.mark.parametrize("data", [b"", b"x", b"\x80\x04\x95" * 500])
def test_neither_tar_nor_anything(good, not_unpacked, data):
    archive = good.parent / "attack.tar"
    archive.write_bytes(data)
    not_unpacked(archive, error=errors.BadInput)


@pytest.mark.timeout(10)
def test_pipe_given_as_tar(tmp_path, not_unpacked):
    os.mkfifo(tmp_path / "attack.tar")
    not_unpacked(tmp_path / "attack.tar", error=errors.BadInput)


def test_an_existing_folder_is_not_written_into(good):
    with pytest.raises(agent.Refused, match="exists"):
        agent.unpack(f"{good}.tar", good)
    agent.verify(good, KEYS)


def test_full_disk_leaves_nothing(good, tmp_path, monkeypatch):
    calls = []

    def full(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return extract(*arguments)

    extract = agent._extract
    monkeypatch.setattr(agent, "_extract", full)
    with pytest.raises(agent.Refused, match="No space left on device"):
        agent.unpack(f"{good}.tar", tmp_path / "unpacked")
    assert not (tmp_path / "unpacked").exists()


def test_tampered_content_is_found_after_unpacking(good):
    """The archive itself proves nothing."""
    (good / PROGRAM).write_bytes(bytes(1026))
    archive = good.parent / "attack.tar"
    names = ["agent.pyz", "cases/evaluation.npz", "cases/golden.npz", "manifest.json", "manifest.sig", PROGRAM]
    bundle._pack(good, names, archive)
    opened = bundle.open_bundle(archive)
    with pytest.raises(errors.BundleRefused, match=f"changed: {PROGRAM}"):
        opened.verify(KEYS, TARGET)


def test_tampered_cache(good):
    opened = bundle.open_bundle(f"{good}.tar")
    (opened.path / PROGRAM).write_bytes(b"")
    with pytest.raises(errors.BundleRefused, match=f"changed: {PROGRAM}"):
        bundle.open_bundle(f"{good}.tar").verify(KEYS, TARGET)
