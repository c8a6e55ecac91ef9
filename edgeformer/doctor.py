"""What is installed here, what can be built, reached and measured with it, and the line that adds the rest."""

from __future__ import annotations

import re
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
    found = [_extra("format", name, f"build and run {name}") for name in formats.names()]
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
    built = set(formats.names())
    found = []
    for name in device.names():
        wanted = device.load(name).formats
        now, later = [f for f in wanted if f in built], [f for f in wanted if f not in built]
        says = "; ".join(
            [f"builds {', '.join(now)}"] * bool(now) + [f"{', '.join(later)} in a later version"] * bool(later)
        )
        found.append(Finding("target", name, bool(now), says))
    return found


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
