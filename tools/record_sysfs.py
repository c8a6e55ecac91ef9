#!/usr/bin/env python3
"""
Record what the agent's readers see on this device, for tests/sysfs.

usage: python3 record_sysfs.py OUT [ROOT]     OUT is a folder, or an archive ending in .tar or .tar.gz

Needs nothing but Python 3.6. Copy it to the board alone. Serial numbers are blanked; files nobody may read are named
on stderr and left out (RAPL counters need root). `tests/test_system.py` holds that no reader opens a file not listed.
"""

import io
import re
import subprocess
import sys
import tarfile
from pathlib import Path

PATTERNS = (
    ".dockerenv",
    "etc/edgeformer-emulated",
    "etc/nvpmodel.conf",
    "etc/os-release",
    "proc/cpuinfo",
    "proc/device-tree/compatible",
    "proc/device-tree/hypervisor/compatible",
    "proc/device-tree/model",
    "proc/loadavg",
    "proc/meminfo",
    "proc/self/comm",
    "proc/self/smaps_rollup",
    "proc/self/status",
    "proc/sys/kernel/osrelease",
    "run/.containerenv",
    "sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*/curr[1-3]_input",
    "sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*/in[1-3]_input",
    "sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*/in[1-3]_label",
    "sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*/update_interval",
    "sys/bus/i2c/drivers/ina3221x/*/iio*device*/in_current[0-9]_input",
    "sys/bus/i2c/drivers/ina3221x/*/iio*device*/in_power[0-9]_input",
    "sys/bus/i2c/drivers/ina3221x/*/iio*device*/in_voltage[0-9]_input",
    "sys/bus/i2c/drivers/ina3221x/*/iio*device*/rail_name_[0-9]",
    "sys/class/dmi/id/product_name",
    "sys/class/dmi/id/sys_vendor",
    "sys/class/hwmon/hwmon*/curr[1-3]_input",
    "sys/class/hwmon/hwmon*/in[1-3]_input",
    "sys/class/hwmon/hwmon*/in[1-3]_label",
    "sys/class/hwmon/hwmon*/label",
    "sys/class/hwmon/hwmon*/name",
    "sys/class/hwmon/hwmon*/power1_input",
    "sys/class/hwmon/hwmon*/update_interval",
    "sys/class/power_supply/*/capacity",
    "sys/class/power_supply/*/current_now",
    "sys/class/power_supply/*/online",
    "sys/class/power_supply/*/power_now",
    "sys/class/power_supply/*/scope",
    "sys/class/power_supply/*/status",
    "sys/class/power_supply/*/type",
    "sys/class/power_supply/*/voltage_now",
    "sys/class/powercap/intel-rapl:*/energy_uj",
    "sys/class/powercap/intel-rapl:*/max_energy_range_uj",
    "sys/class/powercap/intel-rapl:*/name",
    "sys/class/thermal/cooling_device[0-9]*/cur_state",
    "sys/class/thermal/cooling_device[0-9]*/type",
    "sys/class/thermal/thermal_zone[0-9]*/temp",
    "sys/class/thermal/thermal_zone[0-9]*/type",
    "sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq",
    "sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor",
    "sys/firmware/devicetree/base/model",
    "sys/hypervisor/type",
    "var/lib/nvpmodel/status",
    "vcgencmd_get_throttled",
)
SERIAL = re.compile(rb"^(Serial\s*:\s*)\S+", re.M)


def collect(root):
    """Path below `root` -> content. Links are followed: sysfs is made of them."""
    found = {}
    for pattern in PATTERNS:
        for path in root.glob(pattern):
            try:
                content = path.read_bytes()[: 1 << 20]
            except OSError as error:
                print(f"left out: {error}", file=sys.stderr)
                continue
            found[str(path.relative_to(root))] = SERIAL.sub(rb"\g<1>0000000000000000", content)
    if root.resolve() == Path("/"):
        found.update(throttled())
    return found


def throttled():
    """A Raspberry Pi's throttle bits, which only a command gives."""
    command = ["vcgencmd", "get_throttled"]
    try:
        run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"vcgencmd_get_throttled": run.stdout} if run.returncode == 0 else {}


def write(found, out):
    """Into a new folder, or a new archive."""
    if out.endswith((".tar", ".tar.gz")):
        with tarfile.open(out, "x:gz" if out.endswith("gz") else "x") as archive:
            for name in sorted(found):
                entry = tarfile.TarInfo(name)
                entry.size = len(found[name])
                archive.addfile(entry, io.BytesIO(found[name]))
        return
    Path(out).mkdir(parents=True)
    for name in sorted(found):
        path = Path(out, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(found[name])


def main(arguments):
    if not 1 <= len(arguments) <= 2:
        print(__doc__, file=sys.stderr)
        return 2
    out, root = arguments[0], Path(arguments[1] if len(arguments) == 2 else "/")
    found = collect(root)
    try:
        write(found, out)
    except FileExistsError:
        print(f"{out} exists; choose another name", file=sys.stderr)
        return 2
    print(f"{out}: {len(found)} files")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
