"""
`deploy` over both forms of a link, with a small stand-in for the agent. The agent itself, the bundle's signature and an
emulated board have tests of their own; here it is about what `deploy` asks for, brings back and leaves behind.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_link import Device, a_folder, described, device, ends, random_bytes  # noqa: F401 (a fixture)

from edgeformer.bundle import Bundle
from edgeformer.deploy import Measure, deploy, run
from edgeformer.errors import BadInput, BundleRefused, CheckFailed, LinkError, Missing, WrongUse
from edgeformer.link import Link, Local
from edgeformer_agent import wire

KEY = "ab" * 32

# What an agent does, without measuring: says what it was asked, answers as told, makes `current` point to its release.
AGENT = """
import argparse, json, os, shutil, sys, time
p = argparse.ArgumentParser()
p.add_argument("verb"); p.add_argument("release")
for name in ("home", "out", "key", "profile", "min-runs", "min-seconds", "threads", "rows"):
    p.add_argument("--" + name)
p.add_argument("--program", action="append")
a = p.parse_args()
print(json.dumps(vars(a)))
told = json.load(open(os.path.join(a.release, "told.json")))
if told["report"]:
    shutil.copy(os.path.join(a.release, "report.json"), a.out)
if told["sleep"]:
    print("pid", os.getpid()); time.sleep(told["sleep"])
for line in told["say"]:
    print(line, file=sys.stderr)
if told["code"] == 0:
    current, previous = os.path.join(a.home, "current"), os.path.join(a.home, "previous")
    if os.path.islink(current) and os.readlink(current) != os.path.join("releases", os.path.basename(a.release)):
        os.replace(current, previous)
    if not os.path.islink(current):
        os.symlink(os.path.join("releases", os.path.basename(a.release)), current + ".new")
        os.replace(current + ".new", current)
sys.exit(told["code"])
"""


@dataclasses.dataclass(frozen=True)
class FakeBundle:
    path: Path
    digest: str
    manifest: SimpleNamespace
    refused: str = ""

    @property
    def signer(self) -> str:
        return Bundle.signer.fget(self)  # type: ignore[attr-defined, no-any-return]

    def verify(self, keys: tuple[str, ...]) -> None:
        assert keys == (KEY,)
        if self.refused:
            raise BundleRefused(self.refused)


def a_report(digest: str) -> bytes:
    report = wire.Report(
        wire.REPORT_SCHEMA, "", digest, "a model", 1, "raspberry-pi-4", "measured", "2030-01-01T00:00:00Z", "0.1",
        "quick", {}, (), {}, None,
    )  # fmt: skip
    return wire.dump(report._replace(id=wire.report_id(report)))


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., FakeBundle]:
    """A bundle whose agent does as told; `seed` makes another one of the same name."""

    def make(
        seed: int = 0,
        code: int = 0,
        say: tuple[str, ...] = (),
        sleep: float = 0,
        report: bytes | None = b"",
        about: str = "",
    ) -> FakeBundle:
        digest = hashlib.sha256(repr((seed, code, say)).encode()).hexdigest()
        mark = wire.Signature(wire.SIGNATURE_SCHEMA, KEY, "00" * 64)
        told = {"code": code, "say": say, "sleep": sleep, "report": report is not None}
        listed = {
            "agent.pyz": AGENT.encode(),
            "model with space.bin": random_bytes(seed, 1 << 20),
            "told.json": json.dumps(told).encode(),
            "report.json": report or a_report(about or digest),
        }
        folder = a_folder(tmp_path / f"bundle-{len(list(tmp_path.iterdir()))}", listed)
        _, files = described(folder)
        a_folder(folder, {"manifest.json": b"{}", "manifest.sig": wire.dump(mark)})
        programs = [SimpleNamespace(name="onnx-int8"), SimpleNamespace(name="litert-int8")]
        return FakeBundle(folder, digest, SimpleNamespace(files=files, programs=programs))

    return make


@pytest.fixture(params=["local", "ssh"])
def link(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Link]:
    if request.param == "local":
        with Link(Local(tmp_path / "it's home")) as link:
            yield link
    else:
        with request.getfixturevalue("device").connect() as link:
            yield link


def below(link: Link) -> set[str]:
    """Everything in our folder, except what releases contain."""
    home = Path(link.home)
    return {
        path.relative_to(home).as_posix()
        for path in [*home.glob("*"), *home.glob("releases/*"), *home.glob("work-*/*")]
    }


def current(link: Link) -> str:
    return Path(link.home, "current").readlink().name


def test_the_report_comes_back_and_nothing_else_stays(link: Link, make: Callable[..., FakeBundle]) -> None:
    bundle, steps, lines = make(), [], []
    measure = Measure("quick", ("litert-int8", "onnx-int8"), 2, 5, 1.5, 7)
    report = deploy(
        bundle,
        link,
        measure=measure,
        keys=[KEY],
        report_progress=lambda *step: steps.append(step),
        on_line=lines.append,
    )
    assert report == wire.load_report(a_report(bundle.digest))
    name = bundle.digest[:32]
    assert below(link) == {"current", "releases", f"releases/{name}"}
    asked = json.loads(lines[0])
    out = asked.pop("out")
    assert out.startswith(f"{link.home}/work-{bundle.digest[:16]}-") and out.endswith("/report.json")
    assert asked == {
        "verb": "run", "release": f"{link.home}/releases/{name}", "home": link.home, "key": KEY, "profile": "quick",
        "min_runs": "5", "min_seconds": "1.5", "threads": "2", "rows": "7", "program": ["litert-int8", "onnx-int8"],
    }  # fmt: skip
    assert [what for what, _, _ in dict.fromkeys((w, 0, 0) for w, _, _ in steps)] == [
        "verify",
        "push",
        "measure",
        "clean",
    ]
    assert all(0 <= done <= total for _, done, total in steps) and steps[-1] == ("clean", 1, 1)


def test_old_releases_and_abandoned_uploads_are_removed(link: Link, make: Callable[..., FakeBundle]) -> None:
    bundles = [make(seed) for seed in range(3)]
    a_folder(Path(link.home), {f"releases/{'9' * 32}.part/x": b"", "work-other/report.json.7": b"", "current.7": b""})
    for bundle in bundles:
        deploy(bundle, link, keys=[KEY])
    kept = {f"releases/{bundle.digest[:32]}" for bundle in bundles[1:]}
    assert below(link) == {"current", "previous", "releases"} | kept
    assert current(link) == bundles[2].digest[:32]


def test_a_current_that_is_a_file_is_kept_too(link: Link, make: Callable[..., FakeBundle]) -> None:
    old = Path(link.home, "releases", "7" * 32)
    old.mkdir()
    Path(link.home, "previous").write_text(f"releases/{old.name}\n")
    deploy(make(), link, keys=[KEY])
    assert old.is_dir()


def test_a_release_that_failed_leaves_the_old_one_current(link: Link, make: Callable[..., FakeBundle]) -> None:
    good, bad = make(0), make(1, code=1, say=("onnx-int8: cosine 0.5 is below its floor 0.99",))
    deploy(good, link, keys=[KEY])
    assert deploy(bad, link, keys=[KEY]).bundle == bad.digest  # there is a report, and it says so
    assert current(link) == good.digest[:32]
    deploy(good, link, keys=[KEY])
    assert f"releases/{bad.digest[:32]}" not in below(link)


@pytest.mark.parametrize(
    ("code", "error", "says"),
    [
        (1, CheckFailed, "wrote no report.*last words"),
        (2, WrongUse, "does not accept this call.*last words"),
        (3, Missing, "missing on the device.*last words"),
        (9, LinkError, "ended with code 9 .*last words"),
        (137, LinkError, "memory was full.*last words"),
    ],
)
def test_exit_codes_of_the_agent(
    link: Link, make: Callable[..., FakeBundle], code: int, error: type[Exception], says: str
) -> None:
    bundle = make(code=code, say=(*map(str, range(100)), "pip install numpy", "last words"), report=None)
    with pytest.raises(error, match=f"(?s){says}") as caught:
        deploy(bundle, link, keys=[KEY])
    assert "pip install numpy" in str(caught.value) and "\n80\n" not in str(caught.value)
    assert "current" not in below(link) and not [name for name in below(link) if name.startswith("work")]


def test_a_bundle_that_the_device_refuses(link: Link, make: Callable[..., FakeBundle]) -> None:
    with pytest.raises(BundleRefused, match="rollback: version 3 is older than 4"):
        deploy(
            make(code=1, say=("bundle refused: rollback: version 3 is older than 4",), report=None), link, keys=[KEY]
        )


def test_no_python_on_the_device(link: Link, make: Callable[..., FakeBundle]) -> None:
    link.python = ("python-that-is-not-there",)
    with pytest.raises(Missing, match=r"python-that-is-not-there cannot be started.*Install Python 3\.6"):
        deploy(make(), link, keys=[KEY])


@pytest.mark.parametrize(
    ("report", "about", "says"),
    [
        (None, "", "cannot read .*work-"),
        (b"{}", "", "report cannot be used"),
        (a_report("0" * 64).replace(b'"version": 1', b'"version": 2'), "", "it was changed on the way"),
        (b"", "0" * 64, "the report is about bundle 0000000000000000"),
    ],
)
def test_a_report_that_is_not_one(
    link: Link, make: Callable[..., FakeBundle], report: bytes | None, about: str, says: str
) -> None:
    with pytest.raises((CheckFailed, LinkError), match=says):
        deploy(make(report=report, about=about), link, keys=[KEY])
    assert not [name for name in below(link) if name.startswith("work")]


def test_nothing_is_sent_of_a_bundle_that_is_refused(link: Link, make: Callable[..., FakeBundle]) -> None:
    with pytest.raises(BundleRefused, match="changed: model"):
        deploy(dataclasses.replace(make(), refused="changed: model"), link, keys=[KEY])
    bundle = make()
    other = wire.Signature(wire.SIGNATURE_SCHEMA, "cd" * 32, "00" * 64)
    (bundle.path / "manifest.sig").write_bytes(wire.dump(other))  # after verify, as far as deploy can tell
    with pytest.raises(BundleRefused, match="not trusted here"):
        deploy(bundle, link, keys=[KEY])
    assert below(link) == {"releases"}


@pytest.mark.parametrize(
    ("measure", "says"),
    [
        (Measure("quik"), "'quik' is not known. Use one of: default, quick, mlperf"),
        (Measure(programs=("onnx",)), "no program 'onnx'. It has: onnx-int8, litert-int8"),
        (Measure(threads=0), "threads is 0"),
        (Measure(min_seconds=float("nan")), "min_seconds is nan"),
    ],
)
def test_a_wrong_measure_is_told_before_anything_is_sent(
    make: Callable[..., FakeBundle], measure: Measure, says: str
) -> None:
    with pytest.raises(BadInput, match=says):
        deploy(make(), "nowhere", measure=measure, keys=[KEY])


@pytest.mark.parametrize("kind", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interrupt_ends_the_agent(link: Link, make: Callable[..., FakeBundle], kind: type[BaseException]) -> None:
    old, bundle, pids = make(), make(1, sleep=60), []
    deploy(old, link, keys=[KEY])

    def interrupt(line: str) -> None:
        if line.startswith("pid"):
            pids.append(int(line.split()[1]))
            raise kind

    with pytest.raises(kind):
        deploy(bundle, link, keys=[KEY], on_line=interrupt)
    assert ends(pids[0])
    assert current(link) == old.digest[:32]
    assert not [name for name in below(link) if name.startswith("work") or ".part" in name]


def test_an_interrupt_during_the_upload_leaves_only_its_beginning(link: Link, make: Callable[..., FakeBundle]) -> None:
    def interrupt(what: str, done: int, total: int) -> None:
        if what == "push" and done > total // 2:
            raise KeyboardInterrupt

    bundle = make()
    with pytest.raises(KeyboardInterrupt):
        deploy(bundle, link, keys=[KEY], report_progress=interrupt)
    assert below(link) == {"releases", f"releases/{bundle.digest[:32]}.part"}
    deploy(bundle, link, keys=[KEY])
    assert below(link) == {"current", "releases", f"releases/{bundle.digest[:32]}"}


def test_a_connection_lost_while_measuring(device: Device, make: Callable[..., FakeBundle]) -> None:  # noqa: F811
    pids: list[int] = []

    def cut(line: str) -> None:
        if line.startswith("pid"):
            pids.append(int(line.split()[1]))
            device.cut()

    with pytest.raises(LinkError, match="was lost"):
        deploy(make(sleep=60), device.address, ssh=device.options, keys=[KEY], on_line=cut)
    assert ends(pids[0])


def test_run_measures_here_and_leaves_nothing(
    make: Callable[..., FakeBundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    bundle = make()
    assert run(bundle, keys=[KEY]).bundle == bundle.digest
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_agent_and_removes_the_temporary_home(
    make: Callable[..., FakeBundle], tmp_path: Path, number: signal.Signals
) -> None:
    bundle = make(sleep=60)
    (tmp_path / "temporary").mkdir()
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from pathlib import Path; from types import SimpleNamespace\n"
        "from edgeformer.deploy import run; from test_deploy import FakeBundle, KEY\n"
        "from test_link import described\n"
        f"folder = Path({str(bundle.path)!r}); files = described(folder)[1]\n"
        "del files['manifest.json'], files['manifest.sig']\n"
        f"bundle = FakeBundle(folder, {bundle.digest!r}, SimpleNamespace(files=files, programs=[]))\n"
        "run(bundle, keys=[KEY], on_line=lambda line: print(line, flush=True))\n"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path / "temporary")}
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as host:
        assert host.stdout
        pid = next(int(line.split()[1]) for line in host.stdout if line.startswith("pid"))
        assert list((tmp_path / "temporary").iterdir())
        host.send_signal(number)
        host.wait(20)
    assert host.returncode == (143 if number is signal.SIGTERM else -signal.SIGINT)
    assert ends(pid)
    assert not list((tmp_path / "temporary").iterdir())
