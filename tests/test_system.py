"""What the agent says about a device, read from folders that stand for boards (tests/sysfs)."""

import builtins
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from edgeformer_agent import power, system

BOARDS = Path(__file__).parent / "sysfs"
NAMES = ("container", "jetson-nano", "laptop", "raspberry-pi-4")
RECORDER = Path(__file__).parents[1] / "tools" / "record_sysfs.py"


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], Path]:
    def make(name: str) -> Path:
        return Path(shutil.copytree(BOARDS / name, tmp_path / name))

    return make


@pytest.fixture(scope="module")
def recorder() -> ModuleType:
    spec = importlib.util.spec_from_file_location("record_sysfs", RECORDER)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def put(root: Path, name: str, content: Any) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(f"{content}\n")


# --- facts

FACTS: dict[str, dict[str, Any]] = {
    "raspberry-pi-4": {
        "model": "Raspberry Pi 4 Model B Rev 1.4",
        "compatible": ["raspberrypi,4-model-b", "brcm,bcm2711"],
        "cpu": "4 x Cortex-A72",
        "cpu_parts": ["0xd08"] * 4,
        "cores": 4,
        "isa": ["asimd", "cpuid", "crc32", "evtstrm", "fp"],
        "memory_mb": 3794,
        "kernel": "6.6.31+rpt-rpi-v8",
        "os": "Debian GNU/Linux 12 (bookworm)",
        "virtual": None,
        "container": False,
    },
    "jetson-nano": {
        "model": "NVIDIA Jetson Nano Developer Kit",
        "compatible": ["nvidia,p3450-0000", "nvidia,jetson-nano", "nvidia,tegra210"],
        "cpu": "4 x Cortex-A57",
        "cores": 4,
        "memory_mb": 3964,
        "kernel": "4.9.337-tegra",
        "os": "Ubuntu 18.04.6 LTS",
        "virtual": None,
    },
    "laptop": {
        "model": "LENOVO 21HD0001GE",
        "compatible": [],
        "cpu": "4 x 13th Gen Intel(R) Core(TM) i5-1335U",
        "cpu_parts": [],
        "isa": ["avx", "avx2", "avx_vnni", "f16c", "fma", "sse4_1", "sse4_2"],
        "virtual": None,
        "container": False,
    },
    "container": {
        "model": None,
        "cpu": "2 x Intel(R) Xeon(R) Processor",
        "cores": 2,
        "virtual": "hypervisor",
        "container": True,
    },
}


@pytest.mark.parametrize("name", NAMES)
def test_facts(name: str) -> None:
    facts = system.facts(BOARDS / name)
    assert {key: facts[key] for key in FACTS[name]} == FACTS[name]
    for key in ("glibc", "python", "machine"):  # of this process, and this process runs on no recorded board
        assert facts[key] is None


def test_facts_of_this_machine_include_the_process() -> None:
    facts = system.facts()
    assert facts["python"] == platform.python_version()
    assert facts["machine"] == platform.machine()
    assert facts["kernel"] and facts["cores"] and facts["memory_mb"]


@pytest.mark.parametrize("root", [*(BOARDS / name for name in NAMES), BOARDS / "nowhere", Path("/")])
def test_everything_read_is_json(root: Path) -> None:
    for facts in (system.facts(root), system.snapshot(root)):
        assert json.loads(json.dumps(facts, allow_nan=False)) == facts


def test_nothing_there_is_none_and_not_a_guess(tmp_path: Path) -> None:
    facts, snapshot = system.facts(tmp_path), system.snapshot(tmp_path)
    assert {key: value for key, value in facts.items() if value} == {}
    assert {key: value for key, value in snapshot.items() if value} == {}
    assert system.emulation(tmp_path) is None
    assert system.flags(snapshot, snapshot) == ()


def test_garbage_is_none(copy: Callable[[str], Path]) -> None:
    root = copy("raspberry-pi-4")
    for path in [path for path in root.rglob("*") if path.is_file()]:
        path.write_bytes(b"\xff\xfe: \x00garbage\n\n: :\n0x")
    facts, snapshot = system.facts(root), system.snapshot(root)
    assert (facts["memory_mb"], facts["cores"], facts["os"], facts["isa"]) == (None, None, None, [])
    assert (snapshot["khz"], snapshot["temp_c"], snapshot["throttled"], snapshot["load"]) == ([], {}, None, None)
    assert json.dumps([facts, snapshot], allow_nan=False)
    assert power.find(root) is None


def test_mixed_cores_are_counted_and_share_their_isa(tmp_path: Path) -> None:
    def core(number: int, part: str, features: str) -> str:
        return (
            f"processor\t: {number}\nFeatures\t: {features}\nCPU implementer\t: 0x41\n"
            f"CPU part\t: {part}\nCPU variant\t: 0x1\n"
        )

    cores = [
        core(0, "0xd05", "asimd asimddp"),
        core(1, "0xd05", "asimd asimddp"),
        core(2, "0xd44", "asimd asimddp sve"),
    ]
    put(tmp_path, "proc/cpuinfo", "\n".join([*cores, core(3, "0xfff", "asimd asimddp"), "Hardware\t: GS201\n"]))
    facts = system.facts(tmp_path)
    assert facts["cpu"] == "2 x Cortex-A55 + 1 x Cortex-X1 + 1 x implementer 0x41 part 0xfff"
    assert facts["cores"] == 4
    assert facts["isa"] == ["asimd", "asimddp"]  # a thread may land on a core without sve


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("sys/hypervisor/type", "xen", "xen"),
        ("proc/device-tree/hypervisor/compatible", "linux,kvm\0", "linux,kvm"),
        ("sys/class/dmi/id/product_name", "Standard PC (Q35 + ICH9, 2009) KVM", "Standard PC (Q35 + ICH9, 2009) KVM"),
        ("sys/class/dmi/id/product_name", "Proliant DL380", None),
    ],
)
def test_virtual_machines(tmp_path: Path, file: str, content: str, expected: str | None) -> None:
    put(tmp_path, file, content)
    assert system.facts(tmp_path)["virtual"] == expected


# --- snapshots


def test_snapshot_of_a_pi() -> None:
    assert system.snapshot(BOARDS / "raspberry-pi-4") == {
        "governor": "ondemand",
        "khz": [1800000] * 4,
        "temp_c": {"cpu-thermal": 48.2},
        "throttled": 0x50000,
        "limited_by": [],
        "power_mode": None,
        "charger": None,
        "battery": None,
        "load": 0.42,
        "memory_available_mb": 3321,
    }


def test_snapshot_of_a_jetson(copy: Callable[[str], Path]) -> None:
    root = copy("jetson-nano")
    snapshot = system.snapshot(root)
    assert snapshot["power_mode"] == "5W"
    assert snapshot["throttled"] is None
    assert snapshot["limited_by"] == []  # the fan runs, which limits nothing
    assert "GPU-therm" not in snapshot["temp_c"]  # switched off, reads -256
    assert snapshot["temp_c"]["CPU-therm"] == 36.0 and len(snapshot["temp_c"]) == 5
    put(root, "var/lib/nvpmodel/status", "pmode:0000")
    assert system.snapshot(root)["power_mode"] == "MAXN"
    (root / "etc/nvpmodel.conf").unlink()
    assert system.snapshot(root)["power_mode"] == "mode 0"
    put(root, "sys/class/thermal/cooling_device1/cur_state", 3)
    assert system.snapshot(root)["limited_by"] == ["gpu-balanced"]


def test_snapshot_of_a_laptop(copy: Callable[[str], Path]) -> None:
    root = copy("laptop")
    snapshot = system.snapshot(root)
    assert snapshot["khz"] == [1800000, 1800000, 1300000, 1300000]
    assert snapshot["charger"] is False
    assert snapshot["battery"] == {"name": "BAT0", "status": "Discharging", "percent": 81}  # not the mouse's
    assert snapshot["limited_by"] == []  # a dim LCD limits nothing
    put(root, "sys/class/power_supply/usb/type", "USB_PD")
    put(root, "sys/class/power_supply/usb/online", 1)
    put(root, "sys/devices/system/cpu/cpu2/cpufreq/scaling_governor", "performance")
    snapshot = system.snapshot(root)
    assert snapshot["charger"] is True
    assert snapshot["governor"] == "performance+powersave"


def test_cores_come_in_their_order_and_zones_keep_their_twins(tmp_path: Path) -> None:
    for core in (0, 2, 10):
        put(tmp_path, f"sys/devices/system/cpu/cpu{core}/cpufreq/scaling_cur_freq", 1000 + core)
    for zone in (0, 1):
        put(tmp_path, f"sys/class/thermal/thermal_zone{zone}/type", "acpitz")
        put(tmp_path, f"sys/class/thermal/thermal_zone{zone}/temp", 30000 + 1000 * zone)
    snapshot = system.snapshot(tmp_path)
    assert snapshot["khz"] == [1000, 1002, 1010]
    assert snapshot["temp_c"] == {"acpitz": 30.0, "acpitz (thermal_zone1)": 31.0}


@pytest.mark.parametrize(
    ("answer", "bits"),
    [("throttled=0x0", 0), ("throttled=0xe0008", 0xE0008), ("throttled=", None), ("VCHI error", None), ("0x5", None)],
)
def test_throttle_bits(tmp_path: Path, answer: str, bits: int | None) -> None:
    put(tmp_path, "vcgencmd_get_throttled", answer)
    assert system.snapshot(tmp_path)["throttled"] == bits


@pytest.mark.skipif(shutil.which("vcgencmd") is not None, reason="a Raspberry Pi has the real one")
def test_the_firmware_is_asked_on_the_real_root_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert system.snapshot()["throttled"] is None
    (tmp_path / "vcgencmd").write_text("#!/bin/sh\n[ $1 = get_throttled ] && echo throttled=0x20002\n")
    (tmp_path / "vcgencmd").chmod(0o755)
    assert system.snapshot()["throttled"] == 0x20002
    assert system.snapshot(BOARDS / "raspberry-pi-4")["throttled"] == 0x50000
    (tmp_path / "vcgencmd").write_text("#!/bin/sh\nprintf '\\377\\376'\n")
    assert system.snapshot()["throttled"] is None


# --- flags

QUIET = system.snapshot(BOARDS / "raspberry-pi-4")


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (0x0, 0x0, ()),
        (0x50000, 0x50000, ()),  # remembered since boot: says nothing about this run
        (0x0, 0x40000, ("throttled",)),  # came and went during the run
        (0x0, 0x20000, ("throttled",)),  # frequency was capped
        (0x0, 0x80000, ("throttled",)),  # soft temperature limit
        (0x0, 0x10000, ("undervolted",)),
        (0x10000, 0x50000, ("throttled",)),
        (0x40004, 0x40000, ("throttled",)),  # was on at the start
        (0x40000, 0x40004, ("throttled",)),
        (0x0, 0x1, ("undervolted",)),
        (0x0, 0xF000F, ("throttled", "undervolted")),
        (0x0, 0x100010, ()),  # bits nobody has defined
        (None, 0x0, ()),
        (None, None, ()),
    ],
)
def test_throttling_flags(before: int | None, after: int | None, expected: tuple[str, ...]) -> None:
    assert system.flags({**QUIET, "throttled": before}, {**QUIET, "throttled": after}) == expected


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"khz": [1800000] * 4}, ()),
        ({"khz": [1800000] * 3 + [1711000]}, ()),  # -4.9 %
        ({"khz": [1800000] * 3 + [1700000]}, ("freq_moved",)),  # -5.6 %
        ({"khz": [1900000] * 4}, ("freq_moved",)),
        ({"khz": [1800000] * 3}, ("freq_moved",)),  # a core went offline
        ({"temp_c": {"cpu-thermal": 58.1}}, ()),
        ({"temp_c": {"cpu-thermal": 58.3}}, ("temp_rise",)),
        ({"temp_c": {"cpu-thermal": 30.0}}, ()),
        ({"temp_c": {"gpu-thermal": 90.0}}, ()),  # nothing to compare with
        ({"limited_by": ["cpufreq-cpu0"]}, ("throttled",)),
        ({"charger": True}, ()),  # mains without a battery: any board
        ({"charger": True, "battery": {"name": "BAT0"}}, ("on_charger",)),
        ({"charger": False, "battery": {"name": "BAT0"}}, ()),
        ({"charger": None, "battery": {"name": "BAT0"}}, ()),
    ],
)
def test_other_flags(change: dict[str, Any], expected: tuple[str, ...]) -> None:
    assert system.flags(QUIET, {**QUIET, **change}) == expected
    if expected in (("on_charger",), ("throttled",)):
        assert system.flags({**QUIET, **change}, QUIET) == expected


# --- emulators


def test_a_marked_root_is_emulated(copy: Callable[[str], Path]) -> None:
    root = copy("raspberry-pi-4")
    assert system.emulation(root) is None
    put(root, "etc/edgeformer-emulated", "qemu-aarch64 10.1")
    reason = system.emulation(root)
    assert reason and "qemu-aarch64 10.1" in reason
    put(root, "etc/edgeformer-emulated", "")
    assert system.emulation(root)


def test_a_process_called_qemu_is_emulated(copy: Callable[[str], Path]) -> None:
    root = copy("raspberry-pi-4")
    put(root, "proc/self/comm", "qemu-aarch64-st")
    reason = system.emulation(root)
    assert reason and "qemu-aarch64-st" in reason
    put(root, "proc/self/comm", "my-qemu-test")
    assert system.emulation(root) is None


def test_an_arm_program_on_an_x86_cpuinfo_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    assert system.emulation("/") is None or Path("/etc/edgeformer-emulated").exists()
    x86 = "vendor_id" in Path("/proc/cpuinfo").read_text()
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert (system.emulation("/") is not None) is x86
    assert system.emulation(BOARDS / "laptop") is None  # a recorded laptop read on an Arm machine is no emulator


# --- memory


def test_memory_from_the_kernel() -> None:
    root = BOARDS / "raspberry-pi-4"
    assert system.peak_rss_mb(root) == 62340 / 1024
    assert system.rss_mb(root) == 58112 / 1024
    assert system.pss_mb(root) == 51944 / 1024
    assert system.pss_mb(BOARDS / "jetson-nano") is None  # kernel 4.9 has no smaps_rollup


def test_memory_where_the_kernel_does_not_tell(tmp_path: Path) -> None:
    assert system.peak_rss_mb(tmp_path) > 1  # getrusage
    assert system.rss_mb(tmp_path) == system.peak_rss_mb(tmp_path)
    assert system.pss_mb(tmp_path) is None
    assert system.reset_peak(tmp_path) is False


def test_memory_of_this_process_follows_an_allocation() -> None:
    """In a process of its own, whose peak nothing else has raised."""
    script = (
        "from edgeformer_agent import system\n"
        "held = system.rss_mb()\n"
        "big = bytearray(b'x') * (64 << 20)\n"
        "memory = system.memory(held)\n"
        "del big\n"
        "print(memory.growth_mb, memory.peak_rss_mb - held, system.reset_peak(), system.peak_rss_mb() - held)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, check=True, text=True)
    growth, peak, reset, rest = run.stdout.split()
    assert float(growth) == pytest.approx(float(peak)) == pytest.approx(64, abs=8)
    assert reset == "False" or float(rest) < 16


def test_growth_is_never_negative() -> None:
    assert system.memory(1e9).growth_mb == 0.0


# --- recording a new board


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Every path anyone tries to open or asks to exist."""
    seen: set[str] = set()
    plain, exists = builtins.open, os.path.exists

    def watch(file: Any, *arguments: Any, **named: Any) -> Any:
        seen.add(str(file))
        return plain(file, *arguments, **named)

    def ask(path: Any) -> bool:
        seen.add(str(path))
        return exists(path)

    monkeypatch.setattr(builtins, "open", watch)
    monkeypatch.setattr(os.path, "exists", ask)
    yield seen


def variants(root: Path) -> list[Path]:
    """The four boards, and what they do not show: an external meter, the newer Jetson layout, no counters."""
    made = [Path(shutil.copytree(BOARDS / name, root / name)) for name in NAMES]
    for file in ("name", "power1_input", "in1_input", "curr1_input", "update_interval", "label"):
        put(made[0], f"sys/class/hwmon/hwmon3/{file}", "ina226" if file == "name" else "garbage")
        put(made[0], f"sys/class/hwmon/hwmon4/{file}", {"name": "ina226", "label": "VIN"}.get(file, "garbage"))
    for board, folder in ((3, "sys/bus/i2c/drivers/ina3221/1-0040/hwmon/hwmon3"), (0, "sys/class/hwmon/hwmon5")):
        for file, content in {"name": "ina3221", "in1_label": "VDD_IN", "in1_input": 5, "curr1_input": "?"}.items():
            put(made[board], f"{folder}/{file}", content)
    (made[1] / "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0/in_power0_input").write_text("?")
    put(made[2], "sys/class/powercap/intel-rapl:0/energy_uj", "?")
    put(made[2], "sys/class/power_supply/BAT0/current_now", "?")
    return made


def test_the_recorder_copies_what_the_readers_read(tmp_path: Path, recorder: ModuleType, opened: set[str]) -> None:
    used: set[str] = set()
    for root in variants(tmp_path):
        opened.clear()
        for read in (system.facts, system.snapshot, system.emulation, system.pss_mb, system.peak_rss_mb, power.why_not):
            read(root)
        names = {os.path.relpath(path, root) for path in opened if path.startswith(str(root))}
        for name in names:
            patterns = [pattern for pattern in recorder.PATTERNS if fnmatch(name, pattern)]
            assert patterns, f"a reader opens {name}, which tools/record_sysfs.py does not copy"
            used.update(patterns)
    assert sorted(used) == sorted(recorder.PATTERNS), "a pattern of tools/record_sysfs.py that no reader needs"


@pytest.mark.parametrize("name", NAMES)
def test_a_recording_reads_like_the_board(name: str, tmp_path: Path, recorder: ModuleType) -> None:
    out = tmp_path / "out"
    assert recorder.main([str(out), str(BOARDS / name)]) == 0
    assert system.facts(out) == system.facts(BOARDS / name)
    assert system.snapshot(out) == system.snapshot(BOARDS / name)
    assert power.why_not(out) == power.why_not(BOARDS / name)

    def files(root: Path) -> set[str]:
        return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}

    unread = {path for path in files(BOARDS / name) if "intel-rapl-mmio" in path}  # a decoy
    assert files(out) == files(BOARDS / name) - unread
    assert recorder.main([str(out), str(BOARDS / name)]) == 2  # never over an older one


def test_a_recording_as_an_archive_names_no_serial(copy: Callable[[str], Path], recorder: ModuleType) -> None:
    root = copy("raspberry-pi-4")
    cpuinfo = root / "proc/cpuinfo"
    cpuinfo.write_text(cpuinfo.read_text().replace("0000000000000000", "100000001234abcd"))
    archive = root.parent / "pi.tar.gz"
    assert recorder.main([str(archive), str(root)]) == 0
    with tarfile.open(archive) as opened:
        member = opened.extractfile("proc/cpuinfo")
        assert member
        content = member.read().decode()
    assert "1234abcd" not in content and "Serial\t\t: 0000000000000000" in content
    assert recorder.main([]) == 2


def test_trees_are_small_and_plain() -> None:
    for name in NAMES:
        files = [path for path in (BOARDS / name).rglob("*") if not path.is_dir()]
        assert 0 < len(files) < 60
        assert not any(path.is_symlink() for path in files)
        assert all(path.stat().st_size < 4096 for path in files)
