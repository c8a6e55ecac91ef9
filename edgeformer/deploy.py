"""
Ships a bundle to a device, has it measured there, and brings the report back.

Verify here; push (resumable, proved by hashes computed there); run the agent there; fetch and check its report; clean
up there. The agent verifies the bundle again, checks it against the golden outputs, and only then makes
`<home>/current` point to it, in one step. So whatever ends us, at any moment: `current` names the release it named
before or the complete new one, and the agent there has ended. What may stay is `releases/<id>.part`, the upload's
beginning: nothing opens it, the next deploy of this bundle continues it, the next one of another bundle deletes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import NoReturn

from edgeformer_agent import verify, wire

from . import signing
from .bundle import AGENT, Bundle
from .errors import BadInput, BundleRefused, CheckFailed, EdgeformerError, LinkError, Missing, WrongUse
from .link import Link, SshOptions, connect

PROFILES = ("default", "quick", "mlperf")
REPORT_BYTES = 64 << 20
LAST_LINES = 12  # of the agent, in an error

ReportProgress = Callable[[str, int, int], None]  # verify | push | measure | clean, done, total

# $1 home, $2 the release that was just pushed. Every other one that is neither current nor previous goes, and so does
# what runs that were cut off have left: uploads, working folders, half of a flip. `current` is a link, or a file with
# the name where there are no links.
_CLEAN = (
    'cd "$1/releases" || exit 0; rm -rf ../work-* ../current.* ../previous.*; keep=" $2 "; '
    'for n in current previous; do t=$(readlink "../$n" || cat "../$n") && keep="$keep${t##*/} "; done 2>/dev/null; '
    'for d in *; do case "$keep" in *" $d "*) ;; *) rm -rf "./$d";; esac; done'
)


@dataclass(frozen=True)
class Measure:
    """How the agent measures. None leaves it to the profile."""

    profile: str = "default"
    programs: tuple[str, ...] = ()  # names; all if empty
    threads: int | None = None
    min_runs: int | None = None
    min_seconds: float | None = None
    rows: int | None = None  # at most this many of the evaluation rows


def deploy(
    bundle: Bundle,
    where: str | Link,
    *,
    measure: Measure | None = None,
    ssh: SshOptions | None = None,
    keys: Iterable[str] | None = None,
    report_progress: ReportProgress | None = None,
    on_line: Callable[[str], None] | None = None,
) -> wire.Report:
    """
    The device's report on `bundle`. `where` as in `link.connect`, or an open link, which stays open.

    `keys`: public keys to accept, instead of those this machine trusts. `on_line` receives what the agent prints.
    A program that failed its self-check is in the report (`golden.passed`), and then `selected` is another one or None;
    errors are raised only where there is no report. Use it for one bundle at a time per device.
    """
    measure, tell = measure or Measure(), report_progress or _ignore
    _check_measure(bundle, measure)
    trusted = tuple(signing.trusted().values()) if keys is None else tuple(keys)
    tell("verify", 0, 1)
    bundle.verify(trusted)
    key, digest = _signing_key(bundle, trusted), bundle.digest
    tell("verify", 1, 1)
    with _term_raises(), _opened(where, ssh) as link:
        release = link.push(bundle.path, digest, _inventory(bundle), lambda done, total: tell("push", done, total))
        tell("measure", 0, 1)
        report = _measure(link, release, digest, [*_options(measure), "--key", key], on_line or _ignore)
        tell("measure", 1, 1)
        tell("clean", 0, 1)
        # What stays because this fails, the next deploy deletes; it must not cost the report.
        with contextlib.suppress(EdgeformerError):
            link.run(["sh", "-c", _CLEAN, "sh", link.home, digest[:32]])
        tell("clean", 1, 1)
    return report


def run(
    bundle: Bundle,
    *,
    measure: Measure | None = None,
    keys: Iterable[str] | None = None,
    report_progress: ReportProgress | None = None,
    on_line: Callable[[str], None] | None = None,
) -> wire.Report:
    """`deploy` to this machine: the same agent in a fresh interpreter, in a temporary home."""
    return deploy(bundle, "local", measure=measure, keys=keys, report_progress=report_progress, on_line=on_line)


def _check_measure(bundle: Bundle, measure: Measure) -> None:
    """What can be known to be wrong before anything is sent."""
    if measure.profile not in PROFILES:
        raise BadInput(f"profile {measure.profile!r} is not known. Use one of: {', '.join(PROFILES)}.")
    names = [entry.name for entry in bundle.manifest.programs]
    unknown = sorted(set(measure.programs) - set(names))
    if unknown:
        raise BadInput(f"the bundle has no program {', '.join(map(repr, unknown))}. It has: {', '.join(names)}.")
    for name, value in (("threads", measure.threads), ("min_runs", measure.min_runs), ("rows", measure.rows)):
        if value is not None and value < 1:
            raise BadInput(f"{name} is {value}; it must be at least 1.")
    if measure.min_seconds is not None and not 0 <= measure.min_seconds < float("inf"):
        raise BadInput(f"min_seconds is {measure.min_seconds}; it must be a number of seconds, 0 or more.")


def _options(measure: Measure) -> list[str]:
    options = ["--profile", measure.profile]
    for name, value in (
        ("--min-runs", measure.min_runs),
        ("--min-seconds", measure.min_seconds),
        ("--threads", measure.threads),
        ("--rows", measure.rows),
    ):
        options += [] if value is None else [name, str(value)]
    return options + [word for program in measure.programs for word in ("--program", program)]


def _signing_key(bundle: Bundle, trusted: Sequence[str]) -> str:
    """The key the device is to pin: the one that signed this bundle, not every key this machine trusts."""
    if bundle.signer not in trusted:  # the file was replaced after it was verified
        raise BundleRefused(f"{bundle.path / verify.SIGNATURE}: signed by {bundle.signer}, which is not trusted here.")
    return bundle.signer


def _inventory(bundle: Bundle) -> dict[str, wire.File]:
    """Every file of the bundle, also the two that the manifest cannot list."""
    files = dict(bundle.manifest.files)
    for name in (verify.MANIFEST, verify.SIGNATURE):
        data = (bundle.path / name).read_bytes()
        files[name] = wire.File(len(data), hashlib.sha256(data).hexdigest())
    return files


def _measure(
    link: Link, release: str, digest: str, options: Sequence[str], on_line: Callable[[str], None]
) -> wire.Report:
    # The agent's temporary files go with this folder, also those of an agent that was killed.
    work = f"{link.home}/work-{digest[:16]}-{secrets.token_hex(8)}"
    path, last = f"{work}/report.json", deque[str](maxlen=LAST_LINES)

    def heard(line: str) -> None:
        last.append(line)
        on_line(line)

    agent = [*link.python, "-u", f"{release}/{AGENT}", "run", release, "--home", link.home, "--out", path]
    try:
        if link.run(["mkdir", "-p", work], heard):
            raise LinkError(f"cannot create {work} on the device:\n{last[-1] if last else ''}")
        code = link.run(["env", f"TMPDIR={work}", *agent, *options], heard)
        if code not in (0, 1):
            _fail(code, link, "\n".join(last))
        return _fetched(link, path, digest, code, "\n".join(last))
    finally:
        with contextlib.suppress(EdgeformerError):
            link.remove(work)


def _fetched(link: Link, path: str, digest: str, code: int, said: str) -> wire.Report:
    try:
        data = link.fetch(path, REPORT_BYTES)
    except LinkError:
        if code == 0:
            raise
        if "bundle refused: " in said:
            raise BundleRefused(f"the device refuses the bundle. It said:\n{said}") from None
        raise CheckFailed(f"the agent failed on the device and wrote no report. It said:\n{said}") from None
    try:
        report = wire.load_report(data)
    except wire.WireError as error:
        raise CheckFailed(f"the device's report cannot be used: {error}") from error
    if report.bundle != digest:
        raise CheckFailed(f"the report is about bundle {report.bundle[:16]}, but {digest[:16]} was deployed.")
    return report


def _fail(code: int, link: Link, said: str) -> NoReturn:
    """The agent's exit code as an error, with what it said last."""
    if code in (126, 127):
        python = " ".join(link.python)
        raise Missing(f"{python} cannot be started on the device. Install Python 3.6 or newer there.\n{said}")
    if code == 2:
        raise WrongUse(f"the agent does not accept this call. It said:\n{said}")
    if code == 3:
        raise Missing(f"something is missing on the device. It said:\n{said}")
    if code == 128 + signal.SIGKILL:
        raise LinkError(f"the agent was killed on the device; often its memory was full. It said last:\n{said}")
    raise LinkError(f"the agent ended with code {code} on the device. It said last:\n{said}")


@contextlib.contextmanager
def _opened(where: str | Link, ssh: SshOptions | None) -> Iterator[Link]:
    if isinstance(where, str):
        with connect(where, ssh) as link:
            yield link
    else:
        yield where


@contextlib.contextmanager
def _term_raises() -> Iterator[None]:
    """SIGTERM unwinds like Ctrl-C, so that temporary folders go. Where somebody handles it already, they decide."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def leave(number: int, frame: FrameType | None) -> None:  # noqa: ARG001
        sys.exit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _ignore(*_: object) -> None:
    pass
