"""Writing and opening bundles: deterministic bytes, and the old bundle or the complete new one, whatever happens."""

import hashlib
import io
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
from small_bundle import CONTENTS, KEYS, PROGRAM, TARGET, edit, manifest, signer, small

from edgeformer import bundle, errors
from edgeformer_agent import verify as agent, wire

HERE = str(Path(__file__).parent)
LARGE = {**CONTENTS, "programs/weights.bin": bytes(3 << 20)}
# Versions 1, 2, 3, .. over each other until somebody kills it.
FOREVER = """
import sys; sys.path.insert(0, sys.argv[1])
import pathlib, small_bundle
version = int(sys.argv[3])
contents = {**small_bundle.CONTENTS, "programs/weights.bin": bytes(1 << 20)}
while True:
    version += 1
    small_bundle.small(pathlib.Path(sys.argv[2]), overwrite=True, contents=contents, version=version)
    print(version, flush=True)
"""


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home/cache"))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home/config"))


def state(folder: Path) -> tuple[int, int]:
    """The versions of the folder and of the archive; both verify completely."""
    found = agent.verify(folder, KEYS, TARGET).version
    opened = bundle.open_bundle(f"{folder}.tar")
    opened.verify(KEYS, TARGET)
    return found, opened.manifest.version


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.parent.iterdir() if path.name != "home")


# What is written


def test_write_and_open(tmp_path: Path) -> None:
    made = small(tmp_path / "b")
    assert made.path == tmp_path / "b"
    assert made.archive == tmp_path / "b.tar"
    assert left(made.path) == ["b", "b.tar"]
    assert set(made.manifest.files) == {*CONTENTS, "agent.pyz"}
    assert made.manifest.files[PROGRAM] == wire.File(1026, hashlib.sha256(CONTENTS[PROGRAM]).hexdigest())
    assert made.digest == hashlib.sha256((tmp_path / "b/manifest.json").read_bytes()).hexdigest()
    assert (tmp_path / "b/agent.pyz").read_bytes() == bundle.agent_zip()
    opened = bundle.open_bundle(str(tmp_path / "b"))
    assert opened == made
    opened.verify(KEYS, TARGET)
    opened.verify(iter(KEYS))


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    one = small(tmp_path / "one")
    os.umask(old := os.umask(0o077))
    try:
        os.umask(0o077)
        two = small(tmp_path / "deeper/two", contents=dict(reversed(CONTENTS.items())))
    finally:
        os.umask(old)
    assert one.archive.read_bytes() == two.archive.read_bytes()
    assert one.digest == two.digest


def test_files_and_bytes_are_the_same(tmp_path: Path) -> None:
    for name, data in CONTENTS.items():
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    from_files = small(tmp_path / "files", contents={name: tmp_path / "in" / name for name in CONTENTS})
    assert from_files.archive.read_bytes() == small(tmp_path / "bytes").archive.read_bytes()


def test_every_tar_reads_the_archive(tmp_path: Path) -> None:
    made = small(tmp_path / "b", contents={**CONTENTS, "cases/" + "n" * 90 + ".bin": b"", "naïve": b"x" * 512})
    names = sorted([*made.manifest.files, "manifest.json", "manifest.sig"])
    with tarfile.open(made.archive) as archive:
        assert archive.getnames() == names
        assert {(m.mtime, m.uid, m.gid, m.uname, m.mode, m.type) for m in archive} == {(0, 0, 0, "", 0o644, b"0")}
        for name in names:
            file = archive.extractfile(name)
            assert file and file.read() == (made.path / name).read_bytes()
    if shutil.which("tar"):
        (tmp_path / "out").mkdir()
        subprocess.run(["tar", "xf", made.archive, "-C", tmp_path / "out"], check=True)
        agent.verify(tmp_path / "out", KEYS)


def test_headers_are_those_of_tarfile() -> None:
    """In every corner: long names that need the prefix, sizes up to the cap."""
    drawn = random.Random(1)
    for _ in range(300):
        size = drawn.choice([0, 1, 511, 512, drawn.randrange(4 << 30)])
        name = "/".join("n" * drawn.randrange(1, 90) for _ in range(drawn.randrange(1, 5)))
        member = tarfile.TarInfo(name)
        member.size = size
        try:
            theirs = member.tobuf(tarfile.USTAR_FORMAT)
        except ValueError:
            with pytest.raises(agent.Refused, match="does not fit"):
                agent.header(name, size)
            continue
        # tarfile splits a long name at the last possible slash, we at the first: any reader joins them again.
        assert tarfile.TarInfo.frombuf(agent.header(name, size), "utf-8", "strict").name == name
        assert len(agent.header(name, size)) == len(theirs)
        if len(name) <= 100:
            assert agent.header(name, size) == theirs


def test_a_large_file_is_packed_whole(tmp_path: Path) -> None:
    data = random.Random(2).randbytes((3 << 20) + 5)
    made = small(tmp_path / "b", contents={**CONTENTS, "programs/weights.bin": data})
    opened = bundle.open_bundle(made.archive)
    opened.verify(KEYS)
    assert (opened.path / "programs/weights.bin").read_bytes() == data


def test_an_archive_is_opened_under_its_digest(tmp_path: Path) -> None:
    made = small(tmp_path / "b")
    shutil.move(made.archive, tmp_path / "elsewhere.tar")
    opened = bundle.open_bundle(tmp_path / "elsewhere.tar")
    digest = hashlib.sha256((tmp_path / "elsewhere.tar").read_bytes()).hexdigest()
    assert opened.path == tmp_path / "home/cache/edgeformer/bundles" / digest
    assert opened.digest == made.digest
    assert opened.archive.read_bytes() == (tmp_path / "elsewhere.tar").read_bytes()
    opened.verify(KEYS)
    assert bundle.open_bundle(tmp_path / "elsewhere.tar") == opened
    assert left(opened.path) == [digest, f"{digest}.tar"]


# The agent


def test_the_agent_is_deterministic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy = tmp_path / "edgeformer_agent"
    shutil.copytree(Path(bundle.edgeformer_agent.__file__).parent, copy)
    (copy / "__pycache__").mkdir(exist_ok=True)
    (copy / "__pycache__/x.pyc").write_bytes(b"x")
    for path in copy.rglob("*"):
        os.utime(path, (1e9, 1e9))
    before = bundle.agent_zip()
    monkeypatch.setattr(bundle.edgeformer_agent, "__file__", str(copy / "__init__.py"))
    assert bundle.agent_zip() == before


def test_what_the_agent_contains() -> None:
    with zipfile.ZipFile(io.BytesIO(bundle.agent_zip())) as archive:
        names = archive.namelist()
        assert {member.date_time for member in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        start = archive.read("__main__.py").decode()
    assert names == sorted(names)
    assert {"__main__.py", "edgeformer_agent/__init__.py", "edgeformer_agent/wire.py"} <= set(names)
    assert not [name for name in names if not name.endswith(".py") or "__pycache__" in name]
    assert "from edgeformer_agent.__main__ import main" in start


def old_python() -> str | None:
    roots = [Path(os.environ.get("PYENV_ROOT", Path("~/.pyenv").expanduser())) / "versions"]
    found = [str(path) for root in roots for path in root.glob("3.6.*/bin/python3.6")] + [shutil.which("python3.6")]
    working = (path for path in found if path and not subprocess.run([path, "-c", ""], capture_output=True).returncode)
    return next(working, None)


@pytest.mark.parametrize("python", [sys.executable, old_python()], ids=["this", "3.6"])
def test_the_shipped_agent_verifies_in_a_bare_interpreter(tmp_path: Path, python: str | None) -> None:
    """No site-packages: what decides needs the standard library only, also that of Python 3.6."""
    if python is None:
        pytest.skip("no Python 3.6 here")
    made = small(tmp_path / "b")
    code = """
import sys
sys.path.insert(0, sys.argv[1] + "/agent.pyz")
from edgeformer_agent import verify
manifest = verify.verify(sys.argv[1], (sys.argv[2],), "raspberry-pi-4")
verify.unpack(sys.argv[1] + ".tar", sys.argv[3])
verify.verify(sys.argv[3], (sys.argv[2],))
verify.remember(sys.argv[4], manifest, sys.argv[2])
assert verify.highest(sys.argv[4], manifest.name, sys.argv[2]) == 3
with open(sys.argv[1] + "/extra", "w"):
    pass
try:
    verify.verify(sys.argv[1], (sys.argv[2],))
except verify.Refused as error:
    print(verify.__file__, error)
"""
    arguments = [str(made.path), KEYS[0], str(tmp_path / "unpacked"), str(tmp_path / "state")]
    said = subprocess.run([python, "-I", "-S", "-c", code, *arguments], capture_output=True, text=True)
    assert said.stdout == f"{made.path}/agent.pyz/edgeformer_agent/verify.py extra: extra (file)\n", said.stderr


# What is not written


@pytest.mark.parametrize(
    "name", ["../x", "/x", "manifest.json", "MANIFEST.SIG", "a\\b", "Agent.pyz", "", "a/", "x" * 120]
)
def test_bad_names_are_not_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(errors.BundleRefused, match="is not written, a device would refuse it: file name"):
        small(tmp_path / "in/b", contents={**CONTENTS, name: b""})
    assert left(tmp_path / "b") == ["in"]
    assert left(tmp_path / "in/b") == []


def test_what_a_device_would_refuse_is_not_written(tmp_path: Path) -> None:
    for changes, culprit in [
        ({"expires": "2020-01-01"}, "expired"),
        ({"cases": wire.Cases("cases/other.npz", "cases/evaluation.npz", 1, "")}, "cases.golden: refers to"),
        ({"version": -1}, "version -1"),
    ]:
        with pytest.raises(errors.BundleRefused, match=culprit):
            small(tmp_path / "b", **changes)
    for history in (float("nan"), object(), {1, 2}):
        with pytest.raises(errors.BadInput, match="cannot be written as JSON"):
            small(tmp_path / "b", history=(wire.Step("x", {"value": history}),))
    with pytest.raises(errors.BadInput, match=r"agent\.pyz is added"):
        small(tmp_path / "b", contents={**CONTENTS, "agent.pyz": b""})
    with pytest.raises(errors.BadInput, match="is not a file"):
        small(tmp_path / "b", contents={**CONTENTS, "x": tmp_path / "nothing"})
    assert left(tmp_path / "b") == []


def test_nothing_is_overwritten_without_being_asked(tmp_path: Path) -> None:
    small(tmp_path / "b")
    with pytest.raises(errors.WrongUse, match=r"b exists.*--overwrite"):
        small(tmp_path / "b", version=4)
    shutil.rmtree(tmp_path / "b")
    with pytest.raises(errors.WrongUse, match=r"b\.tar exists.*--overwrite"):
        small(tmp_path / "b", version=4)
    assert small(tmp_path / "b", version=4, overwrite=True).manifest.version == 4
    assert state(tmp_path / "b") == (4, 4)


def test_overwrite_leaves_nothing_of_the_old_one(tmp_path: Path) -> None:
    small(tmp_path / "b", contents=LARGE)
    made = small(tmp_path / "b", version=4, overwrite=True)
    assert not (made.path / "programs/weights.bin").exists()
    assert state(made.path) == (4, 4)
    assert left(made.path) == ["b", "b.tar"]


def test_a_folder_that_is_no_bundle_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "b/sub").mkdir(parents=True)
    (tmp_path / "b/sub/thesis.txt").write_text("years of work")
    with pytest.raises(errors.BadInput, match=r"b is not replaced: .*no manifest\.json"):
        small(tmp_path / "b", overwrite=True)
    (tmp_path / "b/manifest.json").write_text("{}")  # a browser extension has one too
    with pytest.raises(errors.BadInput, match="b is not replaced"):
        small(tmp_path / "b", overwrite=True)
    assert (tmp_path / "b/sub/thesis.txt").read_text() == "years of work"


def test_a_bundle_with_somebodys_notes_is_not_overwritten(tmp_path: Path) -> None:
    made = small(tmp_path / "b")
    (made.path / "programs/notes.txt").write_text("years of work")
    with pytest.raises(errors.BadInput, match=r"besides a bundle it holds programs/notes\.txt"):
        small(tmp_path / "b", overwrite=True)
    assert (made.path / "programs/notes.txt").exists()


@pytest.mark.parametrize("kind", ["file", "link to a bundle", "dangling link"])
def test_what_is_no_folder_is_not_overwritten(tmp_path: Path, kind: str) -> None:
    if kind == "file":
        (tmp_path / "b").write_text("x")
    else:
        small(tmp_path / "real")
        (tmp_path / "b").symlink_to(tmp_path / ("real" if kind == "link to a bundle" else "nothing"))
    before = left(tmp_path / "b")
    with pytest.raises(errors.BadInput, match="is not a folder"):
        small(tmp_path / "b", overwrite=True)
    assert left(tmp_path / "b") == before


@pytest.mark.parametrize("kind", ["file", "other tar", "folder", "link"])
def test_an_archive_of_something_else_is_not_overwritten(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "b.tar"
    if kind == "folder":
        path.mkdir()
    elif kind == "link":
        path.symlink_to("nothing")
    elif kind == "other tar":
        with tarfile.open(path, "w") as archive:
            archive.add(__file__, "thesis.txt")
    else:
        path.write_text("years of work")
    with pytest.raises(errors.BadInput, match=r"b\.tar is not a bundle's archive"):
        small(tmp_path / "b", overwrite=True)
    assert left(tmp_path / "b") == ["b.tar"]


@pytest.mark.parametrize("damage", ["changed", "missing", "link"])
def test_a_damaged_bundle_and_an_empty_folder_are_overwritten(tmp_path: Path, damage: str) -> None:
    made = small(tmp_path / "b")
    (made.path / PROGRAM).unlink()
    if damage != "missing":
        (made.path / PROGRAM).symlink_to("/etc/passwd") if damage == "link" else (made.path / PROGRAM).write_text("x")
    small(made.path, version=4, overwrite=True)
    assert state(made.path) == (4, 4)
    (tmp_path / "empty").mkdir()
    small(tmp_path / "empty", overwrite=True)


@pytest.mark.parametrize("what", ["nothing", "file", "empty folder", "folder"])
def test_what_is_no_bundle_is_not_opened(tmp_path: Path, what: str) -> None:
    path = tmp_path / "b"
    if what == "file":
        path.write_text("x")
    elif what != "nothing":
        path.mkdir()
        (path / "model.onnx").write_text("x") if what == "folder" else None
    with pytest.raises(errors.BadInput, match="is no bundle"):
        bundle.open_bundle(path)


def test_a_folder_whose_manifest_is_none_is_refused(tmp_path: Path) -> None:
    made = small(tmp_path / "b")
    edit(made.path, lambda body: body.pop("version"))
    with pytest.raises(errors.BundleRefused, match=r"manifest\.json: .*missing keys \['version'\]"):
        bundle.open_bundle(made.path)


def test_verify_names_the_folder_and_the_file(tmp_path: Path) -> None:
    made = small(tmp_path / "b")
    (made.path / PROGRAM).write_bytes(b"")
    with pytest.raises(errors.BundleRefused) as refusal:
        made.verify(KEYS)
    assert str(refusal.value) == f"{made.path}: changed: {PROGRAM} (0 bytes instead of 1026)"
    assert refusal.value.exit_code == 1


# When something fails on the way

STEPS = ["agent_zip", "_store", "_sign", "_pack", "_sync", "_commit", "_move", "_exchange"]


@pytest.mark.parametrize(
    "failure", [OSError(28, "No space left on device"), KeyboardInterrupt(), MemoryError()], ids=repr
)
@pytest.mark.parametrize("step", STEPS)
def test_a_failure_leaves_the_old_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str, failure: BaseException
) -> None:
    small(tmp_path / "b")

    def fail(*_: object) -> None:
        raise failure

    with monkeypatch.context() as patch, pytest.raises(type(failure)):
        patch.setattr(bundle, step, fail)
        small(tmp_path / "b", version=4, overwrite=True)
    assert left(tmp_path / "b") == ["b", "b.tar"]
    assert state(tmp_path / "b") == (3, 3)


@pytest.mark.parametrize("exists", [True, False])
@pytest.mark.parametrize("exchange", [True, False])
def test_an_archive_that_cannot_be_placed_takes_the_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool, exists: bool
) -> None:
    if exists:
        small(tmp_path / "b")
    if not exchange:
        monkeypatch.setattr(bundle, "_exchange", lambda *_: False)
    real = Path.replace

    def fail(self: Path, target: Path) -> Path:
        if self.name == "archive.tar" and target.parent == tmp_path:
            raise PermissionError(13, "Permission denied")
        return real(self, target)

    with monkeypatch.context() as patch, pytest.raises(PermissionError):
        patch.setattr(Path, "replace", fail)
        small(tmp_path / "b", version=4, overwrite=True)
    assert left(tmp_path / "b") == (["b", "b.tar"] if exists else [])
    if exists:
        assert state(tmp_path / "b") == (3, 3)


@pytest.mark.parametrize("overwrite", [True, False])
def test_what_appears_during_the_write_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overwrite: bool
) -> None:
    pack = bundle._pack

    def quicker(*arguments: object) -> None:
        pack(*arguments)  # type: ignore[arg-type]
        (tmp_path / "b").mkdir()
        (tmp_path / "b/thesis.txt").write_text("years of work")

    monkeypatch.setattr(bundle, "_pack", quicker)
    with pytest.raises(errors.WrongUse, match=r"b is not replaced" if overwrite else r"b exists"):
        small(tmp_path / "b", overwrite=overwrite)
    assert (tmp_path / "b/thesis.txt").read_text() == "years of work"
    assert left(tmp_path / "b") == ["b"]


def test_a_full_disk(tmp_path: Path) -> None:
    """A real refusal of the system to write: the limit on the size of a file."""
    small(tmp_path / "b")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(OSError, match="File too large"):
            small(tmp_path / "b", version=4, overwrite=True, contents=LARGE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert left(tmp_path / "b") == ["b", "b.tar"]
    assert state(tmp_path / "b") == (3, 3)


def test_without_exchange_two_renames_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "_exchange", lambda *_: False)
    small(tmp_path / "b")
    small(tmp_path / "b", version=4, overwrite=True)
    assert state(tmp_path / "b") == (4, 4)
    assert left(tmp_path / "b") == ["b", "b.tar"]


def test_linux_exchanges(tmp_path: Path) -> None:
    """So that the tests of the atomic way are known to run it."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if sys.platform != "linux":
        pytest.skip("only Linux has renameat2")
    assert bundle._exchange(tmp_path / "one", tmp_path / "two")
    assert (tmp_path / "one/two").exists()
    assert (tmp_path / "two/one").exists()
    assert not bundle._exchange(tmp_path / "one", tmp_path / "nothing")


def killed(folder: Path, patch: str, version: int = 4) -> None:
    """A process that overwrites the bundle and kills itself where `patch` says."""
    code = f"""
import sys; sys.path.insert(0, sys.argv[1])
import os, pathlib, signal, small_bundle
from edgeformer import bundle
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
{patch}
small_bundle.small(pathlib.Path(sys.argv[2]), overwrite=True, version={version})
"""
    done = subprocess.run([sys.executable, "-c", code, HERE, str(folder)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


@pytest.mark.parametrize("step", ["_sign", "_pack", "_commit", "_exchange"])
def test_killed_before_the_exchange_is_the_old_one(tmp_path: Path, step: str) -> None:
    small(tmp_path / "b")
    killed(tmp_path / "b", f"bundle.{step} = die")
    assert len(left(tmp_path / "b")) == 3
    assert bundle.open_bundle(tmp_path / "b").manifest.version == 3
    assert state(tmp_path / "b") == (3, 3)
    small(tmp_path / "b", version=5, overwrite=True)
    assert state(tmp_path / "b") == (5, 5)
    assert left(tmp_path / "b") == ["b", "b.tar"]


def test_killed_between_folder_and_archive_is_finished_by_the_next(tmp_path: Path) -> None:
    small(tmp_path / "b")
    killed(tmp_path / "b", "pathlib.Path.replace = die")
    assert state(tmp_path / "b") == (4, 3)
    assert bundle.open_bundle(tmp_path / "b").manifest.version == 4
    assert state(tmp_path / "b") == (4, 4)


def test_killed_between_folder_and_archive_of_the_first_bundle(tmp_path: Path) -> None:
    killed(tmp_path / "b", "pathlib.Path.replace = die")
    assert bundle.open_bundle(tmp_path / "b").archive.is_file()
    assert state(tmp_path / "b") == (4, 4)


def test_killed_between_two_renames_is_put_back(tmp_path: Path) -> None:
    small(tmp_path / "b")
    patch = """
def between(new, folder, old):
    if folder.exists():
        folder.rename(old)
        die()
    new.rename(folder)
bundle._move = between
"""
    killed(tmp_path / "b", patch)
    assert not (tmp_path / "b").exists()
    assert bundle.open_bundle(tmp_path / "b").manifest.version == 3
    assert state(tmp_path / "b") == (3, 3)
    killed(tmp_path / "b", patch)
    with pytest.raises(errors.WrongUse, match="b exists"):
        small(tmp_path / "b", version=5)
    assert state(tmp_path / "b") == (3, 3)


@pytest.mark.slow
def test_killed_at_any_moment(tmp_path: Path) -> None:
    """The folder and the archive are complete at every moment; only the moment decides which version."""
    folder, version, drawn = tmp_path / "b", 0, random.Random(5)
    small(folder, version=version)
    for _ in range(15):
        command = [sys.executable, "-c", FOREVER, HERE, str(folder), str(version)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert process.stdout and process.stdout.readline()
        time.sleep(drawn.random() * 0.06)
        process.kill()
        said = [int(line) for line in process.stdout.read().split()]
        process.wait()
        finished = max(said, default=version + 1)
        found = state(folder)
        assert set(found) <= {finished, finished + 1}
        assert bundle.open_bundle(folder).manifest.version == found[0]
        assert state(folder) == (found[0], found[0])
        version = found[0]
    small(folder, version=version + 1, overwrite=True)
    assert left(folder) == ["b", "b.tar"]


def test_readers_never_see_half(tmp_path: Path) -> None:
    folder = tmp_path / "b"
    small(folder, version=0)
    process = subprocess.Popen([sys.executable, "-c", FOREVER, HERE, str(folder), "0"], stdout=subprocess.PIPE)
    versions: list[int] = []
    try:
        assert process.stdout and process.stdout.readline()
        for _ in range(200):
            try:
                versions.append(agent.verify(folder, KEYS).version)
            except agent.Refused as refusal:
                # The reader had the old folder open while the writer removed it: refused, not half read.
                assert "No such file" in str(refusal) or "missing: " in str(refusal)
    finally:
        process.kill()
        process.wait()
    assert versions == sorted(versions)
    assert len(set(versions)) > 1


def test_writers_at_the_same_time(tmp_path: Path) -> None:
    """The last one wins, with its folder and its archive."""
    folder = tmp_path / "b"
    small(folder)
    code = FOREVER.replace("while True:", "for _ in range(6):")
    commands = [[sys.executable, "-c", code, HERE, str(folder), str(1000 * n)] for n in (1, 2, 3)]
    running = [subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) for command in commands]
    complaints = [process.communicate()[1].decode() for process in running]
    assert [process.returncode for process in running] == [0, 0, 0], complaints
    one, other = state(folder)
    assert one == other > 1000
    assert left(folder) == ["b", "b.tar"]


def test_leftovers_of_living_processes_stay(tmp_path: Path) -> None:
    living = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    names = [f".b.{living.pid}.0123abcd.tmp", f".b.{dead.pid}.0123abcd.tmp", f".c.{dead.pid}.0123abcd.tmp", ".b.tmp"]
    for name in names:
        (tmp_path / name / "bundle").mkdir(parents=True)
    locked = tmp_path / f".b.{dead.pid}.ffffffff.tmp"  # of a process in another container
    locked.mkdir()
    with bundle._locked(locked):
        small(tmp_path / "b")
        living.communicate(b"\n")
        assert left(tmp_path / "b") == sorted([names[0], names[2], names[3], locked.name, "b", "b.tar"])
    small(tmp_path / "b", overwrite=True)
    assert left(tmp_path / "b") == sorted([names[2], names[3], "b", "b.tar"])


# The device's memory of versions


def test_versions_only_rise(tmp_path: Path) -> None:
    home = tmp_path / "state/deeper"
    assert agent.highest(home, "minilm-sst2", KEYS[0]) == 0
    for version, expected in [(3, 3), (2, 3), (5, 5), (0, 5)]:
        agent.remember(home, manifest(version=version), KEYS[0])
        assert agent.highest(home, "minilm-sst2", KEYS[0]) == expected
    agent.remember(home, manifest(version=9, name="other"), KEYS[0])
    agent.remember(home, manifest(version=7), signer(2).public)
    assert agent.highest(home, "minilm-sst2", KEYS[0]) == 5
    assert agent.highest(home, "other", KEYS[0]) == 9
    assert agent.highest(home, "minilm-sst2", signer(2).public) == 7
    assert [path.name for path in home.iterdir()] == ["versions.json"]


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"{", b'{"schema": "edgeformer.versions/1", "highest": {"k": {"n": "3"}}}', b"\0" * 99],
)
def test_a_damaged_memory_is_not_an_empty_one(tmp_path: Path, content: bytes) -> None:
    agent.remember(tmp_path, manifest(), KEYS[0])
    (tmp_path / "versions.json").write_bytes(content)
    with pytest.raises(agent.Refused, match=r"versions\.json: the record .* is damaged .*delete the file"):
        agent.highest(tmp_path, "minilm-sst2", KEYS[0])
    with pytest.raises(agent.Refused, match="damaged"):
        agent.remember(tmp_path, manifest(version=9), KEYS[0])
    assert (tmp_path / "versions.json").read_bytes() == content


def test_memory_survives_a_failed_write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent.remember(tmp_path, manifest(), KEYS[0])

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(agent.os, "fsync", fail)
    with pytest.raises(agent.Refused, match="No space left"):
        agent.remember(tmp_path, manifest(version=9), KEYS[0])
    assert agent.highest(tmp_path, "minilm-sst2", KEYS[0]) == 3


def test_agents_at_the_same_time_lose_nothing(tmp_path: Path) -> None:
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import small_bundle\n"
        "from edgeformer_agent import verify; input()\n"
        "for i in range(20): verify.remember(sys.argv[2], small_bundle.manifest(name=sys.argv[3] + str(i)), 'key')"
    )
    commands = [[sys.executable, "-c", code, HERE, str(tmp_path), name] for name in "ab"]
    running = [subprocess.Popen(command, stdin=subprocess.PIPE) for command in commands]
    time.sleep(0.5)  # both have imported; now both write
    for process in running:
        assert process.stdin
        process.stdin.write(b"\n")
        process.stdin.flush()
    assert [process.wait() for process in running] == [0, 0]
    assert [agent.highest(tmp_path, f"{n}{i}", "key") for n in "ab" for i in range(20)] == [3] * 40
