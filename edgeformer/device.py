"""A device is a TOML file under devices/profiles, read once, checked key by key.

`load(name)` gives what a prediction and a bundle need: cores, peak rates, memory, the software floor, what can be read
about power. Units are in the names; a fact that is not known is absent from the file and None here. `load("host")`
fills the hardware groups from this machine instead. Where each number comes from: `Device.sources`.
"""

from __future__ import annotations

import platform
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from .errors import ProfileError, UnknownTarget

__all__ = ["Accelerator", "Cluster", "Device", "load", "names"]


@dataclass(frozen=True)
class Cluster:
    """Equal cores: their design, how many, and the highest clock in MHz."""

    name: str
    count: int
    max_mhz: int


@dataclass(frozen=True)
class Accelerator:
    """What runs `formats` instead of the CPU. Peaks in GFLOP/s; `efficiency` is the fraction a good program gets."""

    name: str
    formats: tuple[str, ...]
    fp16_gflops: float
    efficiency: float
    fp32_gflops: float | None = None  # None: it has no fp32


@dataclass(frozen=True)
class Device:
    """One target.

    Sizes are in kB and MB of 1024, bandwidths in GB/s of 1e9 bytes. Peaks are in 1e9 operations per second and count a
    multiply-add as two: `fp32_gflops` and `int8_gops` for one core of the first (fastest) cluster, `*_all` for all
    cores at once. An efficiency is the fraction of that peak which a good matrix product reaches, on one thread and on
    all (`*_all`), as far as operations limit it. A band holds the factors from a predicted time to its ends.
    """

    name: str
    title: str
    soc: str
    formats: tuple[str, ...]  # in order of preference
    cores: tuple[Cluster, ...]  # fastest first
    arch: str
    features: tuple[str, ...]
    l1d_kb: int  # per core
    l2_kb: int  # as the fastest cluster's core sees it, shared or not
    memory_mb: int
    bandwidth_gbs: float  # sustained, CPU side
    fp32_gflops: float
    int8_gops: float
    fp32_gflops_all: float
    int8_gops_all: float
    fp32_efficiency: float
    int8_efficiency: float
    fp32_efficiency_all: float
    int8_efficiency_all: float
    band_one_thread: tuple[float, float]
    band_all_threads: tuple[float, float]
    os: str
    sensors: tuple[str, ...]  # what can give watts or joules; empty: nothing can
    on_request: tuple[str, ...] = ()  # formats it also runs; a build makes them only where they are named
    l3_kb: int | None = None
    bandwidth_peak_gbs: float | None = None  # of the memory interface
    glibc: str | None = None
    python: str | None = None
    android_api: int | None = None
    ios: str | None = None
    idle_w: float | None = None  # whole device
    busy_w: float | None = None  # whole device, all cores at work
    accelerator: Accelerator | None = None
    sources: Mapping[str, str] = field(default_factory=dict, hash=False, repr=False)  # {group: where from}

    def runs(self, format: str) -> bool:
        """Whether the product plans this format for the device; says nothing about what this version can build."""
        return format in (*self.formats, *self.on_request)


def names() -> list[str]:
    """The targets there are, sorted."""
    return sorted(p.name[:-5] for p in files("edgeformer.profiles").iterdir() if p.name.endswith(".toml"))


def load(name: str) -> Device:
    """The device of that name.

    `load("host")` detects this machine: architecture, physical cores, instruction sets, clock, caches, memory, glibc
    and Python. Its peaks are clock x operations per cycle of the best instruction set (`_PER_CYCLE`), so they are the
    same at each call on one machine. The clock is the highest the kernel reports; a virtual machine shows the nominal
    one, and the real peak can then be higher.
    """
    known = names()
    if name not in known:
        raise UnknownTarget(name, known)
    return _read(files("edgeformer.profiles") / f"{name}.toml", _detected() if name == "host" else {})


# --- the rules a profile keeps ------------------------------------------------------------------------------------


class _Rule(NamedTuple):
    says: str  # completes "must be ..."
    holds: Callable[[Any], bool]
    read: Callable[[Any], Any]
    required: bool = True

    @property
    def optional(self) -> _Rule:
        return self._replace(required=False)


def _number(low: float, high: float, unit: str) -> _Rule:
    def holds(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high

    return _Rule(f"a number from {low:g} to {high:g}, in {unit}", holds, float)


def _whole(low: int, high: int, unit: str) -> _Rule:
    rule = _number(low, high, unit)
    return _Rule(f"a whole number from {low} to {high}, in {unit}", lambda v: isinstance(v, int) and rule.holds(v), int)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and value != "" and value == value.lower() and value.split() == [value]


def _is_version(value: Any) -> bool:
    return isinstance(value, str) and all(part.isdigit() for part in value.split("."))


def _is_band(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) == 2 and all(_FACTOR.holds(v) for v in value) and value[0] < 1 < value[1]
    )


def _list_of(one: Callable[[Any], bool], says: str, at_least: int) -> _Rule:
    def holds(value: Any) -> bool:
        return isinstance(value, list) and len(value) >= at_least and all(one(v) for v in value)

    return _Rule(says, holds, tuple)


_TEXT = _Rule("a non-empty text", lambda v: isinstance(v, str) and v.strip() != "", str)
_TEXTS = _list_of(_TEXT.holds, "a list of texts, [] for none", 0)
_FORMATS = _list_of(_is_name, "a list of one or more lowercase format names without spaces", 1)
_FEATURES = _list_of(_is_name, "a list of lowercase instruction set names, [] for none", 0)
_VERSION = _Rule('a version such as "2.36"', _is_version, str)
_FACTOR = _number(0.01, 100, "times the prediction")
_BAND = _Rule("two factors, the first below 1, the second above", _is_band, lambda v: (float(v[0]), float(v[1])))
_RATE = _number(0.1, 100_000, "1e9 operations per second")
_SHARE = _number(0.01, 1, "parts of the peak")
_BANDWIDTH = _number(0.1, 1000, "GB/s")
_CACHE = _whole(4, 1 << 20, "kB")
_WATT = _number(0.01, 1000, "W")

_TOP = {"title": _TEXT, "soc": _TEXT, "formats": _FORMATS, "on_request": _FORMATS.optional}
_CORES = {"name": _TEXT, "count": _whole(1, 1024, "cores"), "max_mhz": _whole(100, 10_000, "MHz")}
_ACCELERATOR = {
    "name": _TEXT,
    "formats": _FORMATS,
    "fp16_gflops": _RATE,
    "fp32_gflops": _RATE.optional,
    "efficiency": _SHARE,
}
_GROUPS = {  # every key is the `Device` field of that name
    "isa": {"arch": _Rule('"aarch64" or "x86_64"', lambda v: v in ("aarch64", "x86_64"), str), "features": _FEATURES},
    "cache": {"l1d_kb": _CACHE, "l2_kb": _CACHE, "l3_kb": _CACHE.optional},
    "memory": {
        "memory_mb": _whole(64, 1 << 24, "MB"),
        "bandwidth_gbs": _BANDWIDTH,
        "bandwidth_peak_gbs": _BANDWIDTH.optional,
    },
    "peak": {
        **dict.fromkeys(("fp32_gflops", "int8_gops", "fp32_gflops_all", "int8_gops_all"), _RATE),
        **dict.fromkeys(("fp32_efficiency", "int8_efficiency", "fp32_efficiency_all", "int8_efficiency_all"), _SHARE),
        **dict.fromkeys(("band_one_thread", "band_all_threads"), _BAND),
    },
    "floor": {
        "os": _TEXT,
        "glibc": _VERSION.optional,
        "python": _VERSION.optional,
        "android_api": _whole(21, 99, "Android API levels").optional,
        "ios": _VERSION.optional,
    },
    "power": {"idle_w": _WATT.optional, "busy_w": _WATT.optional, "sensors": _TEXTS},
}
_TABLES = ("cores", *_GROUPS, "accelerator", "sources")


def _checked(file: str, group: str, table: Any, rules: Mapping[str, _Rule]) -> dict[str, Any]:
    """The values of one table, converted; the first broken rule raises `ProfileError` with `group.key`."""
    if not isinstance(table, dict):
        raise ProfileError(file, group, "a table", "missing" if table is None else repr(table))
    prefix = f"{group}." if group else ""
    for key in table:
        if key not in rules:
            raise ProfileError(file, prefix + key, f"one of the keys {', '.join(rules)}", "an unknown key")
    for key, rule in rules.items():
        if key not in table and rule.required:
            raise ProfileError(file, prefix + key, rule.says, "missing")
        if key in table and not rule.holds(table[key]):
            raise ProfileError(file, prefix + key, rule.says, repr(table[key]))
    return {key: rules[key].read(value) for key, value in table.items()}


def _clusters(file: str, tables: Any) -> tuple[Cluster, ...]:
    if not isinstance(tables, list) or not tables:
        raise ProfileError(file, "cores", "one or more [[cores]] tables", "missing" if tables is None else repr(tables))
    return tuple(Cluster(**_checked(file, f"cores[{i}]", table, _CORES)) for i, table in enumerate(tables))


def _parsed(path: Traversable) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ProfileError(path.name, "the file", "valid TOML", str(error)) from error


def _read(path: Traversable, detected: Mapping[str, Any]) -> Device:
    """The profile at `path`; `detected` holds keys and tables that are laid over those of the file."""
    file, raw = path.name, _parsed(path)
    for key, facts in detected.items():
        raw[key] = {**raw.get(key, {}), **facts} if isinstance(facts, dict) else facts
    groups = {key: raw.pop(key) for key in _TABLES if key in raw}
    for key in raw.keys() - _TOP.keys():
        raise ProfileError(file, key, f"one of {', '.join((*_TOP, *_TABLES))}", "an unknown name")
    values = _checked(file, "", raw, _TOP)
    values["cores"] = _clusters(file, groups.get("cores"))
    for group, rules in _GROUPS.items():
        values |= _checked(file, group, groups.get(group), rules)
    if "accelerator" in groups:
        values["accelerator"] = Accelerator(**_checked(file, "accelerator", groups["accelerator"], _ACCELERATOR))
    sources = groups.pop("sources", None)
    values["sources"] = _checked(file, "sources", sources, dict.fromkeys(groups, _TEXT))
    device = Device(name=file.removesuffix(".toml"), **values)
    _agree(file, device)
    return device


def _agree(file: str, d: Device) -> None:
    """Rules between keys."""
    mhz = [c.max_mhz for c in d.cores]
    if mhz != sorted(mhz, reverse=True):
        raise ProfileError(file, "cores", "in order, fastest first", f"{mhz} MHz")
    if d.bandwidth_peak_gbs is not None and d.bandwidth_gbs > d.bandwidth_peak_gbs:
        rule = f"at most bandwidth_peak_gbs, {d.bandwidth_peak_gbs:g}"
        raise ProfileError(file, "memory.bandwidth_gbs", rule, f"{d.bandwidth_gbs:g}")
    for one in ("fp32_gflops", "int8_gops"):
        if getattr(d, f"{one}_all") < getattr(d, one):
            rule = f"at least {one}, {getattr(d, one):g}"
            raise ProfileError(file, f"peak.{one}_all", rule, f"{getattr(d, f'{one}_all'):g}")
    if d.accelerator and not set(d.accelerator.formats) <= set(d.formats):
        rule = f"among the formats of the device, {', '.join(d.formats)}"
        raise ProfileError(file, "accelerator.formats", rule, ", ".join(d.accelerator.formats))


# --- this machine -------------------------------------------------------------------------------------------------

# Flag in /proc/cpuinfo -> our name.
_FLAGS = {
    "avx2": "avx2",
    "avx512f": "avx512f",
    "avx_vnni": "avx_vnni",
    "avx512_vnni": "avx512_vnni",
    "amx_int8": "amx_int8",
    "asimd": "neon",
    "asimddp": "dotprod",
    "asimdhp": "fp16",
    "i8mm": "i8mm",
}
# (feature, fp32 FLOP per cycle, int8 OP per cycle) of one core, best first; each column takes the first that is not 0.
# 32 = two 256-bit or one 512-bit fused multiply-add; CPUs with AMX have two of 512 bit. 128 = two 256-bit vpdpbusd.
# AMX: 768 of the 2048 of its tiles, what products of MiniLM's size can feed. Measured at 2.6 GHz, one thread: ORT int8
# products 1050-1400 GOP/s; LiteRT int8 MiniLM at 32 tokens (0.69 GOP) 1.17 ms, fp32 9.3 ms; numpy 1024^3 151 GFLOP/s.
# AVX2 without VNNI needs three instructions for 32 products. Arm: two FMLA / SDOT pipes from A76 on, before it one.
_PER_CYCLE = (
    ("amx_int8", 64, 768),
    ("avx512_vnni", 32, 128),
    ("avx512f", 32, 0),
    ("avx_vnni", 32, 128),
    ("avx2", 32, 40),
    ("dotprod", 16, 64),
    ("neon", 8, 16),
    ("", 8, 16),
)


def _features(cpuinfo: str) -> list[str]:
    """Instruction sets named in the text of /proc/cpuinfo; on macOS, which has none, those every Apple chip has."""
    if not cpuinfo and platform.system() == "Darwin" and platform.machine() == "arm64":
        return ["neon", "dotprod", "fp16"]
    lines = [line.partition(":")[2].split() for line in cpuinfo.splitlines() if line.startswith(("flags", "Features"))]
    flags = {flag for line in lines for flag in line}
    return [name for flag, name in _FLAGS.items() if flag in flags]


def _per_cycle(features: list[str]) -> tuple[int, int]:
    """fp32 FLOP and int8 OP per cycle of one core."""
    rows = [row for row in _PER_CYCLE if row[0] in features or not row[0]]
    return rows[0][1], next(row[2] for row in rows if row[2])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _max_mhz(cpu: Path) -> int:
    """Highest clock in MHz, to the nearest 10: cpufreq's maximum, else what psutil says, else 2000."""
    khz = _text(cpu / "cpufreq" / "cpuinfo_max_freq").strip()
    if khz.isdigit():
        return round(int(khz) / 10_000) * 10
    seen = psutil.cpu_freq()
    return round((seen.max or seen.current) / 10) * 10 if seen else 2000


def _caches(cpu: Path) -> dict[str, int]:
    """Sizes in kB that core 0 sees; 32 and 512 are taken where the system does not say."""
    found = {"l1d_kb": 32, "l2_kb": 512}
    for index in sorted((cpu / "cache").glob("index*")):
        level, kind, size = (_text(index / leaf).strip() for leaf in ("level", "type", "size"))
        key = {"1": "l1d_kb", "2": "l2_kb", "3": "l3_kb"}.get(level)
        if key and kind != "Instruction" and size.endswith("K"):
            found[key] = int(size[:-1])
    return found


def _floor() -> dict[str, str]:
    system, glibc = f"{platform.system()} {platform.release()}", platform.libc_ver()[1]
    python = ".".join(platform.python_version_tuple()[:2])
    return {"os": system, "python": python, **({"glibc": glibc} if glibc else {})}


def _detected(root: Path = Path("/")) -> dict[str, Any]:
    """Tables for `_read`; `root` redirects /proc/cpuinfo and /sys."""
    cpuinfo, cpu = _text(root / "proc" / "cpuinfo"), root / "sys" / "devices" / "system" / "cpu" / "cpu0"
    machine = platform.machine().lower()
    models = [line.partition(":")[2].strip() for line in cpuinfo.splitlines() if line.startswith("model name")]
    model = models[0] if models else platform.processor() or machine
    count = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    features, mhz = _features(cpuinfo), _max_mhz(cpu)
    fp32, int8 = (round(rate * mhz / 1000, 1) for rate in _per_cycle(features))
    fp32_all, int8_all = round(fp32 * count, 1), round(int8 * count, 1)
    return {
        "soc": model,
        "cores": [{"name": model, "count": count, "max_mhz": mhz}],
        "isa": {"arch": {"amd64": "x86_64", "arm64": "aarch64"}.get(machine, machine), "features": features},
        "cache": _caches(cpu),
        "memory": {"memory_mb": psutil.virtual_memory().total >> 20},
        "peak": {"fp32_gflops": fp32, "int8_gops": int8, "fp32_gflops_all": fp32_all, "int8_gops_all": int8_all},
        "floor": _floor(),
    }
