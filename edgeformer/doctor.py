"""What is installed here, what can be built, reached and measured with it, and the line that adds the rest."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version

from edgeformer_agent import power, runners, system

from . import device, formats, signing


@dataclass(frozen=True)
class Finding:
    """One thing looked at. `fix` is the line that adds what is missing, None where there is none."""

    area: str  # format | link | target | key | sensor
    name: str
    ok: bool
    says: str
    fix: str | None = None


def examine() -> tuple[Finding, ...]:
    """Reads metadata only: no framework is imported."""
    return (*_formats(), _extra("link", "ssh", "deploy over SSH"), *_targets(), _keys(), _sensor())


def _formats() -> list[Finding]:
    found = [_extra("format", name, f"build and check {name}") for name in formats.names()]
    unrunnable = sorted(set(formats.names()) - set(runners.names()))
    return found + [Finding("format", name, False, "has no runner in the agent") for name in unrunnable]


def _extra(area: str, extra: str, does: str) -> Finding:
    """Compares what the extra asks for with what is installed."""
    lacking, here = [], []
    for package in _packages(extra):
        try:
            here.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            lacking.append(package)
    if lacking:
        return Finding(
            area, extra, False, f"cannot {does}: no {', '.join(lacking)}", f"pip install 'edgeformer[{extra}]'"
        )
    shared = set(_packages("sdk"))
    return Finding(area, extra, True, f"can {does}: {', '.join(p for p in here if p.split()[0] not in shared)}")


def _packages(extra: str) -> list[str]:
    """Distribution names behind an extra of ours, followed through extras of extras."""
    names: list[str] = []
    for line in requires("edgeformer") or []:
        requirement, _, marker = line.partition(";")
        if not re.search(rf"""extra\s*==\s*['"]{extra}['"]""", marker):
            continue
        name = re.split(r"[\s\[<>=!~]", requirement.strip())[0]
        inner = re.search(r"\[(.*?)\]", requirement)
        names += (
            [p for e in (inner[1].split(",") if inner else []) for p in _packages(e)]
            if name == "edgeformer"
            else [name]
        )
    return names


def _targets() -> list[Finding]:
    return [_target(name) for name in device.names()]


def _target(name: str) -> Finding:
    """Formats of the target that can be built here, what else its programs need on this side, and what is lacking."""
    wanted = device.load(name)
    formats_here = {x.name: x for x in _formats()}
    ready = [f for f in wanted.formats if f in formats_here and formats_here[f].ok]
    lacking = [formats_here[f] for f in wanted.formats if f in formats_here and not formats_here[f].ok]
    later = [f for f in wanted.formats if f not in formats_here]
    tools = [tool for tool in _tools(wanted) if not tool.ok]
    says = [f"builds {', '.join(ready)}"] * bool(ready)
    says += [f"not {', '.join(x.name for x in lacking)}"] * bool(lacking)
    says += [f"{', '.join(later)} in a later version"] * bool(later)
    says += [tool.says for tool in tools]
    fixes = [x.fix for x in (*lacking, *tools) if x.fix]
    return Finding("target", name, bool(ready), "; ".join(says), " && ".join(dict.fromkeys(fixes)) or None)


def _tools(wanted: device.Device) -> list[Finding]:
    """What reaching the device, or linking our operator into its app, takes on this machine."""
    if wanted.android_api:
        ndk = any(os.environ.get(name) for name in ("ANDROID_NDK_HOME", "ANDROID_NDK_ROOT"))
        no_ndk = Finding("tool", "ndk", ndk, "no Android NDK (ANDROID_NDK_HOME) to link the operator into an app")
        return [_command("adb", "no adb to reach the phone", "apt-get install adb"), no_ndk]
    if wanted.ios:
        return [_command("xcodebuild", "no Xcode: the app in devices/ios is compiled on a Mac", None)]
    return [] if wanted.name == "host" else [_extra("link", "ssh", "deploy over SSH")]


def _command(name: str, says: str, fix: str | None) -> Finding:
    return Finding("tool", name, shutil.which(name) is not None, says, fix)


def _keys() -> Finding:
    names = signing.names()
    if signing.DEFAULT in names:
        return Finding("key", signing.DEFAULT, True, f"signs bundles: {signing.public()[:16]}…")
    return Finding(
        "key", signing.DEFAULT, True, "none yet; the first build makes one", f"edgeformer keys create {signing.DEFAULT}"
    )


def _sensor() -> Finding:
    sensor = power.find()
    if sensor:
        return Finding("sensor", "power", True, f"energy can be measured here: {sensor.source}")
    virtual = system.facts()["virtual"]
    return Finding("sensor", "power", False, power.why_not() + (f" ({virtual})" if virtual else ""))
