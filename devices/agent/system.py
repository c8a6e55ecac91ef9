"""
Facts that explain a number: what the device is, and its clocks, temperatures, throttling and charger around a run.

Every reader takes `root`, so a recorded board (`tests/sysfs`, `tools/record_sysfs.py`) reads like a real one. What
cannot be read is None or left out, never guessed. Sizes in `_mb` are MiB.
"""

import glob
import os
import platform
import re
import resource
import subprocess
import sys
from typing import Any, Dict, List, Optional, Tuple

from . import wire

# Linux numbers implementers and parts in MIDR_EL1; names from Arm's and lscpu's tables.
ARM_CORES = {
    ("0x41", "0xd03"): "Cortex-A53",
    ("0x41", "0xd04"): "Cortex-A35",
    ("0x41", "0xd05"): "Cortex-A55",
    ("0x41", "0xd07"): "Cortex-A57",
    ("0x41", "0xd08"): "Cortex-A72",
    ("0x41", "0xd09"): "Cortex-A73",
    ("0x41", "0xd0a"): "Cortex-A75",
    ("0x41", "0xd0b"): "Cortex-A76",
    ("0x41", "0xd0c"): "Neoverse-N1",
    ("0x41", "0xd0d"): "Cortex-A77",
    ("0x41", "0xd40"): "Neoverse-V1",
    ("0x41", "0xd41"): "Cortex-A78",
    ("0x41", "0xd42"): "Cortex-A78AE",
    ("0x41", "0xd44"): "Cortex-X1",
    ("0x41", "0xd46"): "Cortex-A510",
    ("0x41", "0xd47"): "Cortex-A710",
    ("0x41", "0xd48"): "Cortex-X2",
    ("0x41", "0xd49"): "Neoverse-N2",
    ("0x41", "0xd4d"): "Cortex-A715",
    ("0x41", "0xd4e"): "Cortex-X3",
    ("0x41", "0xd4f"): "Neoverse-V2",
    ("0x4e", "0x003"): "Denver 2",
    ("0x4e", "0x004"): "Carmel",
}
X86_ISA = re.compile(r"sse4|avx|fma$|f16c$|amx")  # of 100 flags, those a kernel is chosen by
VIRTUAL = re.compile(r"qemu|kvm|vmware|virtualbox|bochs|\bxen\b|virtual machine|amazon ec2|google|openstack", re.I)
LIMITS = re.compile(r"cpu|gpu|processor|devfreq|balanced", re.I)  # cooling devices that slow the chip; no fan, no LCD

UNDERVOLTED, LIMITED = 0x1, 0xE  # vcgencmd get_throttled: now; the same bits 16 higher: since boot
STICKY = 16
FREQUENCY, TEMPERATURE = 0.05, 10.0


def text(path):
    # type: (str) -> Optional[str]
    """The file without surrounding white space and NULs, or None."""
    try:
        with open(path, "rb") as file:
            return file.read(1 << 20).decode("utf-8", "replace").strip(" \t\r\n\0") or None
    except OSError:
        return None


def number(path):
    # type: (str) -> Optional[int]
    try:
        return int(text(path) or "")
    except ValueError:
        return None


def under(root, *pattern):
    # type: (str, str) -> List[str]
    """Paths below `root` that match, cpu2 before cpu10."""
    found = glob.glob(os.path.join(glob.escape(root), *pattern))
    return sorted(found, key=lambda path: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", path)])


def facts(root="/"):
    # type: (str) -> Dict[str, Any]
    """What does not change while the device runs. What only the running process knows is None for another root."""
    here = os.path.abspath(root) == "/"
    cpus = _cpuinfo(root)
    memory = _field(root, "proc/meminfo", "MemTotal")
    tree = text(os.path.join(root, "proc/device-tree/compatible"))
    release = re.search(r'^PRETTY_NAME="?([^"\n]*)', text(os.path.join(root, "etc/os-release")) or "", re.M)
    return {
        "model": _model(root),
        "compatible": tree.split("\0") if tree else [],
        "cpu": _cpu_name(cpus),
        "cpu_parts": [cpu["CPU part"] for cpu in cpus if "CPU part" in cpu],
        "cores": len(cpus) or None,
        "isa": _isa(cpus),
        "memory_mb": memory // 1024 if memory else None,
        "kernel": text(os.path.join(root, "proc/sys/kernel/osrelease")) or (platform.release() if here else None),
        "os": release.group(1) if release else None,
        "glibc": _glibc() if here else None,
        "python": platform.python_version() if here else None,
        "machine": platform.machine() if here else None,
        "virtual": _virtual(root, cpus),
        "container": any(os.path.exists(os.path.join(root, name)) for name in (".dockerenv", "run/.containerenv")),
    }


def snapshot(root="/"):
    # type: (str) -> Dict[str, Any]
    """What may change during a run. Two of these, right before and right after it, make `flags`."""
    cpu = "sys/devices/system/cpu/cpu[0-9]*/cpufreq"
    governors = {text(path) for path in under(root, cpu, "scaling_governor")} - {None}
    clocks = [number(path) for path in under(root, cpu, "scaling_cur_freq")]
    available = _field(root, "proc/meminfo", "MemAvailable")
    load = (text(os.path.join(root, "proc/loadavg")) or "").split()
    return {
        "governor": "+".join(sorted(str(name) for name in governors)) or None,
        "khz": [khz for khz in clocks if khz is not None],
        "temp_c": _temperatures(root),
        "throttled": _throttled(root),
        "limited_by": _limits(root),
        "power_mode": _power_mode(root),
        "charger": charger(root),
        "battery": _battery(root),
        "load": float(load[0]) if load and re.match(r"\d+(\.\d+)?$", load[0]) else None,
        "memory_available_mb": available // 1024 if available else None,
    }


def flags(before, after):
    # type: (Dict[str, Any], Dict[str, Any]) -> Tuple[str, ...]
    """What happened between two snapshots that a reader of the figures must know."""
    bits = _during(before.get("throttled"), after.get("throttled"))
    limited = any(state["limited_by"] for state in (before, after))
    clocks = list(zip(before["khz"], after["khz"]))
    hotplug = len(before["khz"]) != len(after["khz"])  # a core that came or went also moved
    zones = set(before["temp_c"]) & set(after["temp_c"])
    found = {
        "throttled": bool(bits & LIMITED) or limited,
        "undervolted": bool(bits & UNDERVOLTED),
        "freq_moved": hotplug or any(abs(b - a) > FREQUENCY * a for a, b in clocks),
        "temp_rise": any(after["temp_c"][zone] - before["temp_c"][zone] > TEMPERATURE for zone in zones),
        "on_charger": any(state["battery"] and state["charger"] for state in (before, after)),
    }
    return tuple(name for name in found if found[name])


def emulation(root="/"):
    # type: (str) -> Optional[str]
    """Why this is no real device, or None. A report from here is `emulated`."""
    marker = os.path.join(root, "etc/edgeformer-emulated")
    if os.path.exists(marker):
        return "/etc/edgeformer-emulated: {}".format(text(marker) or "present")
    comm = text(os.path.join(root, "proc/self/comm")) or ""
    if comm.startswith("qemu-"):
        return "/proc/self/comm is {}".format(comm)
    foreign = platform.machine().startswith(("aarch64", "arm")) and os.path.abspath(root) == "/"
    if foreign and any("vendor_id" in cpu for cpu in _cpuinfo(root)):
        return "{} program on an x86 /proc/cpuinfo".format(platform.machine())
    return None


def charger(root="/"):
    # type: (str) -> Optional[bool]
    """Whether outside power is connected; None where the kernel lists no supply but batteries."""
    states = [
        number(os.path.join(supply, "online"))
        for supply in under(root, "sys/class/power_supply/*")
        if text(os.path.join(supply, "type")) not in (None, "Battery", "BMS")
    ]
    known = [state for state in states if state is not None]
    return any(known) if known else None


def batteries(root="/"):
    # type: (str) -> List[str]
    """Folders of the batteries that feed the device itself; a wireless mouse reports one too, with scope Device."""
    return [
        supply
        for supply in under(root, "sys/class/power_supply/*")
        if text(os.path.join(supply, "type")) == "Battery" and text(os.path.join(supply, "scope")) != "Device"
    ]


def memory(held_mb):
    # type: (float) -> wire.Memory
    """
    Of this process and of those it has started, as a runtime may be one. `held_mb` is `rss_mb()` from before the
    runtime was imported.
    """
    import psutil

    children = [str(child.pid) for child in psutil.Process().children(recursive=True)]
    peak = peak_rss_mb() + sum((_field("/", "proc/{}/status".format(c), "VmHWM") or 0) / 1024.0 for c in children)
    pss = [pss_mb()] + [pss_mb(process=child) for child in children]
    whole = None if None in pss else sum(pss)  # type: ignore[arg-type]
    return wire.Memory(peak_rss_mb=peak, growth_mb=max(0.0, peak - held_mb), pss_mb=whole)


def peak_rss_mb(root="/"):
    # type: (str) -> float
    """The most memory this process has held since it started, or since `reset_peak`."""
    kib = _field(root, "proc/self/status", "VmHWM")
    if kib is not None:
        return kib / 1024.0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # KiB on Linux, bytes on macOS
    return most / (1048576.0 if sys.platform == "darwin" else 1024.0)


def rss_mb(root="/"):
    # type: (str) -> float
    """What this process holds now; where the kernel does not say, what it held at most."""
    kib = _field(root, "proc/self/status", "VmRSS")
    return kib / 1024.0 if kib is not None else peak_rss_mb(root)


def pss_mb(root="/", process="self"):
    # type: (str, str) -> Optional[float]
    """Held now, with shared pages divided among their users. Linux 4.14 or later."""
    kib = _field(root, "proc/{}/smaps_rollup".format(process), "Pss")
    return kib / 1024.0 if kib is not None else None


def reset_peak(root="/"):
    # type: (str) -> bool
    """Start the peak afresh, so that loading and running can be told apart. False where the kernel refuses."""
    try:
        with open(os.path.join(root, "proc/self/clear_refs"), "r+") as file:
            file.write("5")
        return True
    except OSError:
        return False


def _field(root, path, name):
    # type: (str, str, str) -> Optional[int]
    """The number of a `Name:   123 kB` line."""
    match = re.search(r"^{}:\s+(\d+)".format(name), text(os.path.join(root, path)) or "", re.M)
    return int(match.group(1)) if match else None


def _model(root):
    # type: (str) -> Optional[str]
    for path in ("proc/device-tree/model", "sys/firmware/devicetree/base/model"):
        if text(os.path.join(root, path)):
            return text(os.path.join(root, path))
    maker = text(os.path.join(root, "sys/class/dmi/id/sys_vendor"))
    product = text(os.path.join(root, "sys/class/dmi/id/product_name"))
    return " ".join(part for part in (maker, product) if part) or None


def _cpuinfo(root):
    # type: (str) -> List[Dict[str, str]]
    """One dictionary per processor; the trailing block of a Raspberry Pi names the board and is none."""
    blocks = re.split(r"\n\s*\n", text(os.path.join(root, "proc/cpuinfo")) or "")
    pairs = [[line.partition(":") for line in block.splitlines() if ":" in line] for block in blocks]
    found = [{key.strip(): value.strip() for key, _, value in block} for block in pairs]
    return [cpu for cpu in found if "processor" in cpu]


def _cpu_name(cpus):
    # type: (List[Dict[str, str]]) -> Optional[str]
    """4 x Cortex-A55 + 2 x Cortex-A78 + 2 x Cortex-X1."""
    names = []
    for cpu in cpus:
        part = (cpu.get("CPU implementer", ""), cpu.get("CPU part", ""))
        fallback = "implementer {} part {}".format(*part) if part[1] else "unknown core"
        names.append(ARM_CORES.get(part) or cpu.get("model name") or fallback)
    kinds = sorted(set(names), key=names.index)
    return " + ".join("{} x {}".format(names.count(name), name) for name in kinds) or None


def _isa(cpus):
    # type: (List[Dict[str, str]]) -> List[str]
    """What every core has: a thread may run on any of them."""
    sets = [set(cpu.get("Features", cpu.get("flags", "")).split()) for cpu in cpus]
    shared = set.intersection(*sets) if sets else set()
    return sorted(name for name in shared if "flags" not in cpus[0] or X86_ISA.match(name))


def _glibc():
    # type: () -> Optional[str]
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (AttributeError, ValueError, OSError):  # musl, bionic, macOS
        return None
    return version if name == "glibc" and version else None


def _virtual(root, cpus):
    # type: (str, List[Dict[str, str]]) -> Optional[str]
    """What shows that the cores are shared with somebody unseen."""
    for path in ("sys/hypervisor/type", "proc/device-tree/hypervisor/compatible"):
        if text(os.path.join(root, path)):
            return text(os.path.join(root, path))
    product = _model(root)
    if product and VIRTUAL.search(product):
        return product
    return "hypervisor" if any("hypervisor" in cpu.get("flags", "").split() for cpu in cpus) else None


def _temperatures(root):
    # type: (str) -> Dict[str, float]
    """Degrees by zone type. Zones are numbered differently at every boot; a switched-off one reads -256 C."""
    found = {}  # type: Dict[str, float]
    for zone in under(root, "sys/class/thermal/thermal_zone[0-9]*"):
        milli = number(os.path.join(zone, "temp"))
        name = text(os.path.join(zone, "type")) or os.path.basename(zone)
        if milli is not None and -40000 <= milli <= 150000:
            found[name if name not in found else "{} ({})".format(name, os.path.basename(zone))] = milli / 1000.0
    return found


def _throttled(root):
    # type: (str) -> Optional[int]
    """The bits of a Raspberry Pi's firmware; a recorded board carries the command's answer as a file."""
    answer = text(os.path.join(root, "vcgencmd_get_throttled"))
    if os.path.abspath(root) == "/":
        try:
            answer = subprocess.run(
                ["vcgencmd", "get_throttled"],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                universal_newlines=True,
                timeout=5,
            ).stdout
        except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
            return None
    match = re.match(r"throttled=0x([0-9a-fA-F]+)\s*$", answer or "")
    return int(match.group(1), 16) if match else None


def _during(before, after):
    # type: (Optional[int], Optional[int]) -> int
    """Bits on at either end, or newly remembered in between. A bit remembered since boot says nothing about the run."""
    before, after = before or 0, after or 0
    return before | after | (after & ~before) >> STICKY


def _limits(root):
    # type: (str) -> List[str]
    """Cooling devices that hold the chip back right now."""
    active = []
    for device in under(root, "sys/class/thermal/cooling_device[0-9]*"):
        name = text(os.path.join(device, "type")) or ""
        if LIMITS.search(name) and (number(os.path.join(device, "cur_state")) or 0) > 0:
            active.append(name)
    return sorted(set(active))


def _power_mode(root):
    # type: (str) -> Optional[str]
    """A Jetson's nvpmodel mode by name, 5W or MAXN, from the files the command itself uses; needs no root."""
    status = re.search(r"pmode:0*(\d+)", text(os.path.join(root, "var/lib/nvpmodel/status")) or "")
    if not status:
        return None
    name = r"^<\s*POWER_MODEL\s+ID={}\s+NAME=(\S+)".format(status.group(1))
    match = re.search(name, text(os.path.join(root, "etc/nvpmodel.conf")) or "", re.M)
    return match.group(1) if match else "mode {}".format(status.group(1))


def _battery(root):
    # type: (str) -> Optional[Dict[str, Any]]
    for supply in batteries(root):
        status, percent = text(os.path.join(supply, "status")), number(os.path.join(supply, "capacity"))
        return {"name": os.path.basename(supply), "status": status, "percent": percent}
    return None
