"""
`python3 agent.pyz run BUNDLE --key HEX`: verifies a bundle, measures every program this device has a runtime for,
writes one report. `verify` only verifies. Progress goes to stderr.

Exit codes: 0 done; 1 the bundle is refused or a self-check failed; 2 wrong use; 3 something is missing here.
"""

import argparse
import contextlib
import datetime
import os
import signal
import subprocess
import sys
import tempfile
from typing import Any, Dict, Iterator, List, Optional, Tuple

from . import verify, wire

VERSION = "1"  # of the agent; the schema of what it reads and writes is in wire.py
REFUSED, WRONG_USE, MISSING = 1, 2, 3
CHILD_SECONDS = 3600


class Stop(Exception):
    """Ends the agent with this exit code and message."""

    def __init__(self, code, message):
        # type: (int, str) -> None
        super(Stop, self).__init__(message)
        self.code = code


def main(arguments=None):
    # type: (Optional[List[str]]) -> int
    """The exit code."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except Stop as stop:
        _say("edgeformer agent: {}".format(stop))
        return stop.code
    except (verify.Refused, wire.WireError) as error:
        _say("edgeformer agent: bundle refused: {}".format(error))
        return REFUSED
    except OSError as error:  # a permission, a full disk
        _say("edgeformer agent: {}".format(error))
        return MISSING
    except KeyboardInterrupt:
        _say("edgeformer agent: interrupted; nothing was changed")
        return 130


def _parser():
    # type: () -> argparse.ArgumentParser
    parser = argparse.ArgumentParser(
        prog="agent.pyz", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    commands = parser.add_subparsers(dest="name", metavar="COMMAND")
    commands.required = True
    for name, command in (("run", _run), ("verify", _verify), ("measure", _measure)):
        sub = commands.add_parser(name)
        sub.set_defaults(command=command)
        sub.add_argument("bundle")
        sub.add_argument("--key", action="append", default=[], help="public key that may sign, hex; repeatable")
        sub.add_argument("--home", help="keeps the versions seen, `current` and `previous`")
        if name != "verify":
            _measuring(sub)
    return parser


def _measuring(sub):
    # type: (argparse.ArgumentParser) -> None
    sub.add_argument("--out", help="where the report goes; stdout without it")
    sub.add_argument("--profile", default="default", choices=["default", "quick", "mlperf"])
    sub.add_argument("--min-runs", type=_count, help="replaces the profile's least number of runs")
    sub.add_argument("--min-seconds", type=_seconds, help="replaces the profile's least duration")
    sub.add_argument("--rows", type=_count, help="at most this many evaluation rows; all without it")
    sub.add_argument("--threads", type=_count, default=1)
    sub.add_argument("--program", action="append", default=[], help="only this one; repeatable")
    sub.add_argument("--root", default="/", help="where /sys and /proc are read")


def _count(text):
    # type: (str) -> int
    if int(text) < 1:
        raise argparse.ArgumentTypeError("{} must be at least 1".format(text))
    return int(text)


def _seconds(text):
    # type: (str) -> float
    if not 0 <= float(text) < float("inf"):
        raise argparse.ArgumentTypeError("{} must be a number of seconds, 0 or more".format(text))
    return float(text)


def _verify(options):
    # type: (Any) -> int
    manifest, key = _verified(options)
    _say("ok: {} version {} for {}, signed by {}".format(manifest.name, manifest.version, manifest.target, key[:16]))
    return 0


def _verified(options):
    # type: (Any) -> Tuple[wire.Manifest, str]
    """The manifest and who signed it; refuses what is older than what this device has accepted before."""
    if not options.key:
        raise Stop(WRONG_USE, "--key is missing: the public key that this device trusts, from `edgeformer keys show`")
    data, key = verify.signed(options.bundle, options.key)
    least = verify.highest(options.home, wire.load_manifest(data).name, key) if options.home else 0
    return verify.verify(options.bundle, options.key, minimum_version=least), key


def _run(options):
    # type: (Any) -> int
    started = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    _require()
    signal.signal(signal.SIGTERM, _terminated)
    manifest, key = _verified(options)
    _check_out(options.out)
    entries = _chosen(manifest, options.program)
    results, skipped = [], {}  # type: List[wire.Result], Dict[str, str]
    for number, entry in enumerate(entries, 1):
        _say("[{}/{}] {}".format(number, len(entries), entry.name))
        outcome = _in_child(options, entry)
        if isinstance(outcome, str):
            skipped[entry.name] = outcome
            _say("  skipped: {}".format(outcome))
        else:
            results.append(outcome)
            _say("  {}".format(_line(outcome)))
    report = _report(options, manifest, started, tuple(results), skipped)
    _write(options.out, wire.dump(report))
    if not results:
        raise Stop(MISSING, "no program could run here: {}".format("; ".join(sorted(set(skipped.values())))))
    if report.selected is None:
        raise Stop(REFUSED, "no program passed its self-check; the report says how far off it was")
    if options.home:
        _activate(options, manifest, key)
    return 0 if all(result.golden.passed for result in results) else REFUSED


def _require():
    # type: () -> None
    if sys.version_info < (3, 6):
        raise Stop(MISSING, "Python {}.{} is too old; the agent needs 3.6".format(*sys.version_info[:2]))
    for package in ("numpy", "psutil"):
        try:
            __import__(package)
        except ImportError:
            raise Stop(
                MISSING, "{0} is not installed for {1}. Run: {1} -m pip install {0}".format(package, sys.executable)
            )


def _terminated(number, frame):  # noqa: ARG001
    # type: (int, Any) -> None
    """Unwinds, so that the child and the temporary folder go too."""
    raise Stop(128 + number, "terminated; nothing was changed")


def _check_out(path):
    # type: (Optional[str]) -> None
    """Told before minutes of measuring, not after them."""
    if path is None:
        return
    try:
        folder = os.path.dirname(os.path.abspath(path))
        os.makedirs(folder, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise Stop(MISSING, "--out {} cannot be written: {}".format(path, error))
    if os.path.isdir(path):
        raise Stop(WRONG_USE, "--out {} is a folder; name a file".format(path))


def _chosen(manifest, names):
    # type: (wire.Manifest, List[str]) -> List[wire.Entry]
    known = [entry.name for entry in manifest.programs]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise Stop(WRONG_USE, "no program {} in this bundle; it has {}".format(", ".join(unknown), ", ".join(known)))
    return [entry for entry in manifest.programs if not names or entry.name in names]


def _in_child(options, entry):
    # type: (Any, wire.Entry) -> Any
    """A Result, or the reason why there is none."""
    missing = _lacking(entry)
    if missing:
        return missing
    with tempfile.TemporaryDirectory(prefix="edgeformer-") as folder:
        out = os.path.join(folder, "result.json")
        command = [sys.executable] + (["-I"] if sys.flags.isolated else []) + [os.path.abspath(sys.argv[0])]
        command += ["measure", os.path.abspath(options.bundle), "--out", out, "--program", entry.name]
        command += ["--profile", options.profile, "--threads", str(options.threads), "--root", options.root]
        for name in ("min_runs", "min_seconds", "rows"):
            value = getattr(options, name)
            command += [] if value is None else ["--" + name.replace("_", "-"), str(value)]
        for key in options.key:
            command += ["--key", key]
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=CHILD_SECONDS)
        except subprocess.TimeoutExpired:
            return "stopped after {} s".format(CHILD_SECONDS)
        words = done.stdout.decode("utf-8", "replace").strip().splitlines()
        if done.returncode == 0:
            with open(out, "rb") as file:
                return wire.decode(wire.Measured, wire.RESULT_SCHEMA, file.read()).result
        died = " (killed by signal {})".format(-done.returncode) if done.returncode < 0 else ""
        return (words[-1].replace("edgeformer agent: ", "") if words else "it ended without a word") + died


def _lacking(entry):
    # type: (wire.Entry) -> Optional[str]
    """What this device lacks, told before a runtime is imported: a loader's own message names no remedy."""
    from . import system

    facts = system.facts()
    floor, here = entry.needs.glibc, facts["glibc"]
    if floor and here and [int(x) for x in here.split(".")] < [int(x) for x in floor.split(".")]:
        return "glibc {} is installed, the runtime needs {}: a newer system is needed".format(here, floor)
    lacking = [feature for feature in entry.needs.isa if feature not in (facts["isa"] or ())]
    return "this CPU lacks {}".format(", ".join(lacking)) if lacking else None


def _measure(options):
    # type: (Any) -> int
    """The child. The parent has verified every file just now; the manifest that is read here is the signed one."""
    from . import measure, system, timing

    manifest = wire.load_manifest(verify.signed(options.bundle, options.key)[0])
    entry = _chosen(manifest, options.program)[0]
    emulated = system.emulation(options.root) is not None
    plan = timing.plan(options.profile, options.min_runs, options.min_seconds, emulated)
    rows = options.rows if options.rows is not None else timing.EMULATED_ROWS if emulated else None
    settings = measure.Options(options.threads, plan, rows, options.root, emulated)
    try:
        result = measure.measure(options.bundle, manifest, entry, settings)
    except measure.Unavailable as error:
        raise Stop(MISSING, str(error))
    except Exception as error:
        raise Stop(REFUSED, "{}: {}".format(type(error).__name__, error))
    _write(options.out, wire.dump(wire.Measured(wire.RESULT_SCHEMA, result)))
    return 0


def _report(options, manifest, started, results, skipped):
    # type: (Any, wire.Manifest, str, Tuple[wire.Result, ...], Dict[str, str]) -> wire.Report
    from . import power, system

    with open(os.path.join(options.bundle, "manifest.json"), "rb") as file:
        digest = wire.digest(file.read())
    emulated = system.emulation(options.root)
    passed = [(r.latency.p50_ms, r.program) for r in results if r.golden.passed and r.latency]
    custom = options.min_runs is not None or options.min_seconds is not None or options.rows is not None
    report = wire.Report(
        schema=wire.REPORT_SCHEMA,
        id="",
        bundle=digest,
        name=manifest.name,
        version=manifest.version,
        target=manifest.target,
        kind="emulated" if emulated else "measured",
        started=started,
        agent=VERSION,
        profile="custom" if custom else options.profile,
        device=dict(system.facts(options.root), emulation=emulated, no_energy=power.why_not(options.root) or None),
        results=results,
        skipped=skipped,
        selected=min(passed)[1] if passed else None,
    )
    return report._replace(id=wire.report_id(report))


def _activate(options, manifest, key):
    # type: (Any, wire.Manifest, str) -> None
    """`current` becomes this bundle in one rename, `previous` what it was; then nothing older is accepted."""
    # Real paths: the bundle may have been named by `current` itself, which must not come to point to itself.
    home, bundle = os.path.realpath(options.home), os.path.realpath(options.bundle)
    current = os.path.join(home, "current")
    target = os.path.relpath(bundle, home)
    try:
        os.makedirs(home, exist_ok=True)
        before = os.readlink(current) if os.path.islink(current) else None
        if before not in (None, target):
            _point(os.path.join(home, "previous"), before)
        _point(current, target)
        verify.remember(home, manifest, key)
    except (OSError, verify.Refused) as error:
        raise Stop(MISSING, "it passed, but it cannot become {}: {}".format(current, error))


def _point(link, target):
    # type: (str, Any) -> None
    temporary = "{}.{}".format(link, os.getpid())
    with contextlib.suppress(FileNotFoundError):  # of a killed agent that had our number
        os.unlink(temporary)
    with _placing(temporary, link):
        os.symlink(target, temporary)


def _write(path, data):
    # type: (Optional[str], bytes) -> None
    """Whole or not at all."""
    if path is None:
        sys.stdout.buffer.write(data)  # UTF-8 in every locale
        sys.stdout.buffer.flush()
        return
    temporary = "{}.{}".format(path, os.getpid())
    with _placing(temporary, path), open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextlib.contextmanager
def _placing(temporary, path):
    # type: (str, str) -> Iterator[None]
    """What the block makes at `temporary` takes the place of `path`, or nothing stays of it."""
    try:
        yield
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def _line(result):
    # type: (wire.Result) -> str
    if result.latency is None:
        return "self-check failed: similarity {:.4f}, needs {:.4f}".format(result.golden.worst, result.golden.floor)
    return "p50 {:.2f} ms, p90 {:.2f} ms, {} runs, peak {:.0f} MB".format(
        result.latency.p50_ms, result.latency.p90_ms, result.latency.n, result.memory.peak_rss_mb
    )


def _say(text):
    # type: (str) -> None
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
