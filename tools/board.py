"""An emulated arm64 board behind a real OpenSSH server, for the tests and the demo.

The board is a Debian root with real aarch64 wheels and the /proc and /sys files of a known device. Every command
runs in it under proot and qemu-user, so no root rights, no binfmt_misc and no container are needed. Emulated time
says nothing about a real board: check results here, never speed.

    with running(cached("raspberry-pi-4"), workdir) as board:
        subprocess.run([*ssh(board), "uname -m"])

What a run may change is its own: /root, /tmp, /var/tmp, /run, /dev/shm and /sys. The rest of the root is shared with
other runs. A command ends when its last process ends, so nothing survives its ssh session; unlike on a real board,
nohup does not help.
"""

from __future__ import annotations

import argparse
import ctypes
import errno
import hashlib
import importlib.util
import os
import platform
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

RELEASE, PYTHON = "bookworm", "3.11"
PACKAGES = (
    "base-files bash coreutils dash findutils gzip grep libc-bin libc6 libgomp1 libstdc++6 openssh-sftp-server procps "
    f"python{PYTHON} python3 sed tar"
).split()
WHEELS = (
    "numpy",
    "psutil",
    "onnxruntime==1.31.1",
    "ai-edge-litert==2.3.0",
    "backports.strenum",
    "flatbuffers",
    "tqdm",
    "typing_extensions",
)
# Older pips take a platform literally: manylinux_2_28 does not imply the earlier ones.
PLATFORMS = tuple(f"manylinux{tag}_aarch64" for tag in ("_2_28", "_2_27", "_2_17", "2014"))
MODULES = ("numpy", "psutil", "onnxruntime", "ai_edge_litert.interpreter")  # imported once to check the root
SITE = f"usr/local/lib/python{PYTHON}/dist-packages"
MARK = "etc/edgeformer-emulated"  # one line: what emulates, and which core
OWN = ("/root", "/tmp", "/var/tmp", "/run", "/dev/shm", "/sys")  # each run has its own
DEVICES = ("null", "zero", "full", "random", "urandom", "tty", "ptmx", "pts")  # of the host's /dev; not its disks
TOOLS = {
    "qemu-aarch64-static": "qemu-user-static",
    "proot": "proot",
    "sshd": "openssh-server",
    "ssh": "openssh-client",
    "ssh-keygen": "openssh-client",
    "setpriv": "util-linux",
    "apt-get": "apt",
    "dpkg-deb": "dpkg",
    "tar": "tar",
}
SOURCES = (Path("/etc/apt/sources.list.d/debian.sources"), Path("/etc/apt/sources.list"))
# proot 5.1 does not translate the paths of these newer calls: stat(1) and mv(1) would act on the host's files. Told
# that the kernel lacks them, programs use the older calls, which proot knows. Numbers: Linux's asm/unistd.h.
HIDDEN_CALLS = {  # statx, renameat2, execveat, open_tree, move_mount, openat2, faccessat2, mount_setattr, fchmodat2
    "x86_64": (332, 316, 322, 428, 429, 437, 439, 442, 452),
    "aarch64": (291, 276, 281, 428, 429, 437, 439, 442, 452),
}
PRCTL = {"x86_64": 157, "aarch64": 167}


class BoardError(RuntimeError):
    """The board cannot be made or started here; the message says why and what to do."""


class Identity(NamedTuple):
    """What tells programs on which device they run. One cluster of equal Arm Ltd. cores."""

    model: str
    compatible: tuple[str, ...]
    hardware: str
    cpu: str  # qemu's name: it decides which instructions exist
    part: str
    revision: int
    features: str
    cores: int
    khz: tuple[int, int]
    l2_kb: int
    zones: tuple[tuple[str, int], ...]  # thermal zones: type, millidegrees
    rails: tuple[tuple[str, int, int], ...] = ()  # INA3221 channels: name, mV, mA


IDENTITIES = {
    "raspberry-pi-4": Identity(
        model="Raspberry Pi 4 Model B Rev 1.4",
        compatible=("raspberrypi,4-model-b", "brcm,bcm2711"),
        hardware="BCM2835",
        cpu="cortex-a72",
        part="0xd08",
        revision=3,
        features="fp asimd evtstrm crc32 cpuid",
        cores=4,
        khz=(600000, 1500000),
        l2_kb=1024,
        zones=(("cpu-thermal", 48200),),
    ),
    "jetson-nano": Identity(
        model="NVIDIA Jetson Nano Developer Kit",
        compatible=("nvidia,p3450-0000", "nvidia,tegra210"),
        hardware="tegra210",
        cpu="cortex-a57",
        part="0xd07",
        revision=1,
        features="fp asimd evtstrm aes pmull sha1 sha2 crc32",
        cores=4,
        khz=(102000, 1479000),
        l2_kb=2048,
        zones=(("AO-therm", 41500), ("CPU-therm", 38000), ("GPU-therm", 36500)),
        rails=(("POM_5V_IN", 5010, 541), ("POM_5V_GPU", 5010, 42), ("POM_5V_CPU", 5010, 128)),
    ),
}


class Board(NamedTuple):
    """A running board and how to reach it; host_key is its line for known_hosts."""

    host: str
    port: int
    user: str
    host_key: str
    client_key: Path
    known_hosts: Path
    log: Path
    home: Path  # the board's /root, seen from the host


def ssh(board: Board, program: str = "ssh") -> list[str]:
    """The OpenSSH client's command line up to and including the destination, independent of the user's own settings."""
    options = {
        "IdentityFile": _quoted(board.client_key),
        "IdentitiesOnly": "yes",
        "BatchMode": "yes",
        "StrictHostKeyChecking": "yes",
        "UserKnownHostsFile": _quoted(board.known_hosts),
        "GlobalKnownHostsFile": "none",
        "LogLevel": "ERROR",
    }
    settings = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    where = ["-p", str(board.port), f"{board.user}@{board.host}"]
    return [program, "-F", "none", *settings, *where]


def _quoted(path: Path) -> str:
    """A path as OpenSSH's configuration takes it: % starts a token there."""
    return '"' + str(path).replace("%", "%%") + '"'


def missing() -> str | None:
    """Why there can be no board on this host, with the line that changes it; None if there can."""
    if sys.platform != "linux" or platform.machine() not in HIDDEN_CALLS:
        return f"the emulated board needs Linux on x86_64 or aarch64; this is {sys.platform} on {platform.machine()}"
    if (system := platform.freedesktop_os_release().get("ID")) != "debian":
        return (
            f"the emulated board's root comes from Debian's archive and this host is {system!r}; use a Debian container"
        )
    if packages := sorted({package for tool, package in TOOLS.items() if not _which(tool)}):
        return f"the emulated board needs programs that are not here; run: apt-get install {' '.join(packages)}"
    if not importlib.util.find_spec("pip"):
        return f"the emulated board's wheels need pip; run: {sys.executable} -m ensurepip"
    if not any(source.is_file() for source in SOURCES):
        return f"the emulated board needs the host's apt sources in {' or '.join(map(str, SOURCES))}"
    if subprocess.run(["proot", "true"], capture_output=True).returncode:
        return "proot cannot trace processes here; in a container, add: --cap-add SYS_PTRACE"
    return _login_refused()


def _login_refused() -> str | None:
    """Why sshd without PAM would turn this user away."""
    import pwd  # not on Windows, where this file must still answer missing()

    account = pwd.getpwuid(os.getuid())
    if Path(account.pw_shell).name in ("nologin", "false"):
        return f"sshd refuses user {account.pw_name}: its shell is {account.pw_shell}; run: chsh -s /bin/sh"
    if os.getuid() == 0:
        locked = [line for line in Path("/etc/shadow").read_text().splitlines() if line.startswith("root:!")]
        if locked:
            return "sshd refuses root: the account is locked; run as a normal user, or: usermod -p '*' root"
    return None


def _which(tool: str) -> str | None:
    """Full path of a tool; a normal user's PATH often lacks the sbin folders."""
    return shutil.which(tool, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")


def _say(text: str) -> None:
    print(f"board: {text}", file=sys.stderr, flush=True)


def _run(command: Sequence[str], doing: str, **environment: str) -> str:
    """Standard output of a command that must succeed."""
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if result.returncode:
        tail = "\n".join((result.stderr or result.stdout).strip().splitlines()[-8:])
        raise BoardError(f"{doing} failed with exit code {result.returncode}: {shlex.join(command)}\n{tail}")
    return result.stdout


# Making a root


def make(root: Path, wheels: Sequence[str] = WHEELS, identity: str = "raspberry-pi-4") -> None:
    """Make a board's root folder, which appears complete or not at all. wheels are pip requirements, all of them."""
    device = _identity(identity)
    if root.exists():
        raise BoardError(f"{root} exists; remove it or name another folder")
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{root.name}.part-", dir=root.parent) as scratch:
        part = Path(scratch) / "root"
        _say(f"fetching Debian {RELEASE} for arm64")
        for package in _fetch_packages(Path(scratch)):
            _unpack(package, part)
        _say(f"fetching {len(wheels)} aarch64 wheels")
        for wheel in _fetch_wheels(wheels, Path(scratch) / "wheels"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(part / SITE)
        _lay_system(part, device)
        _lay_identity(part, device)
        _say("importing the runtimes once")
        _check(part, Path(scratch) / "state")
        part.rename(root)


def cached(identity: str = "raspberry-pi-4") -> Path:
    """The made root of this file, these wheels and this identity; made on first use."""
    import fcntl  # not on Windows, where this file must still answer missing()

    _identity(identity)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgeformer" / "boards"
    key = hashlib.sha256("\0".join((Path(__file__).read_text(), *WHEELS, identity)).encode()).hexdigest()[:16]
    root = cache / f"{identity}-{key}"
    cache.mkdir(parents=True, exist_ok=True)
    with Path(f"{root}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not root.exists():
            for killed in cache.glob(f"{root.name}.part-*"):  # we hold the lock: nobody is making it
                shutil.rmtree(killed, ignore_errors=True)
            started = time.monotonic()
            _say(f"making {root}, once")
            make(root, WHEELS, identity)
            _say(f"made in {time.monotonic() - started:.0f} s")
    return root


def _identity(name: str) -> Identity:
    if name not in IDENTITIES:
        raise BoardError(f"no identity {name!r}; known: {', '.join(IDENTITIES)}")
    return IDENTITIES[name]


def _fetch_packages(scratch: Path) -> list[Path]:
    """Download PACKAGES and what they depend on, with an apt state of our own: the host's stays as it is."""
    for folder in ("etc/preferences.d", "state/lists/partial", "cache/archives/partial"):
        (scratch / "apt" / folder).mkdir(parents=True)
    apt = scratch / "apt"
    source = next(source for source in SOURCES if source.is_file())
    codename = platform.freedesktop_os_release()["VERSION_CODENAME"]
    (apt / "etc" / source.name).write_text(source.read_text().replace(codename, RELEASE))
    (apt / "status").touch()
    proxies = _run(["apt-config", "dump", "--no-empty", "Acquire::http", "Acquire::https"], "reading apt's settings")
    (apt / "apt.conf").write_text(f"""{proxies}
        Dir::Etc "{apt}/etc"; Dir::Etc::sourcelist "{apt}/etc/{source.name}"; Dir::Etc::sourceparts "/dev/null";
        Dir::Etc::trustedparts "/etc/apt/trusted.gpg.d"; Dir::State "{apt}/state"; Dir::State::status "{apt}/status";
        Dir::Cache "{apt}/cache"; APT::Architecture "arm64"; APT::Architectures {{ "arm64"; }};
        APT::Install-Recommends "false"; APT::Sandbox::User "root"; Acquire::Languages "none";
    """)
    settings = {"APT_CONFIG": str(apt / "apt.conf")}
    _run(["apt-get", "-qq", "update"], "reading Debian's package lists", **settings)
    install = ["apt-get", "-qq", "-y", "--download-only", "-o", "Debug::NoLocking=1", "install", *PACKAGES]
    _run(install, "downloading Debian packages", **settings)
    return sorted((apt / "cache/archives").glob("*.deb"))


def _unpack(package: Path, root: Path) -> None:
    """Files only: no maintainer script runs, for it would need the guest before the guest exists."""
    for folder in ("bin", "lib", "sbin"):  # merged /usr first, so that packages which ship /bin land in /usr/bin
        (root / "usr" / folder).mkdir(parents=True, exist_ok=True)
        if not (root / folder).is_symlink():
            (root / folder).symlink_to(f"usr/{folder}")
    unneeded = [f"--exclude=./usr/share/{folder}/*" for folder in ("doc", "info", "lintian", "locale", "man")]
    # Not the archive's owners and modes: as root they would leave set-uid programs in a cache folder.
    plain = ["--no-same-owner", "--no-same-permissions", "--keep-directory-symlink"]
    command = ["tar", "-xf", "-", "-C", str(root), *plain, *unneeded]
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE) as archive:
        unpacked = subprocess.run(command, stdin=archive.stdout)
    if archive.returncode or unpacked.returncode:
        raise BoardError(f"{package.name} did not unpack into {root}; is the disk full?")


def _fetch_wheels(wheels: Sequence[str], folder: Path) -> list[Path]:
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    interpreter = ["--python-version", PYTHON, "--implementation", "cp", "--abi", f"cp{PYTHON.replace('.', '')}"]
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    any_abi = ["--abi", "abi3", "--abi", "none"]
    _run([*download, *platforms, *interpreter, *any_abi, "--dest", str(folder), *wheels], "downloading aarch64 wheels")
    return sorted(folder.glob("*.whl"))


def _lay_system(root: Path, device: Identity) -> None:
    """What Debian's maintainer scripts would have set up, and the folders a run binds over."""
    for folder in ("proc", *(own.lstrip("/") for own in OWN)):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for name in DEVICES:  # the places to bind over
        (root / "dev" / name).mkdir() if name == "pts" else (root / "dev" / name).touch()
    for name, link in (("fd", ""), ("stdin", "/0"), ("stdout", "/1"), ("stderr", "/2")):
        (root / "dev" / name).symlink_to(f"/proc/self/fd{link}")
    (root / "bin/sh").unlink(missing_ok=True)
    (root / "bin/sh").symlink_to("dash")
    for name, text in {
        "passwd": "root:x:0:0:root:/root:/bin/bash",
        "group": "root:x:0:",
        "hosts": "127.0.0.1 localhost",
        "edgeformer-emulated": f"qemu-user {device.cpu}",
    }.items():
        (root / "etc" / name).write_text(text + "\n")


def _lay_identity(root: Path, device: Identity) -> None:
    """Write the device's /proc and /sys files. onnxruntime and LiteRT crash when these describe the host's x86."""
    files = {
        **_cpu_files(device),
        "sys/firmware/devicetree/base/model": device.model + "\0",
        "sys/firmware/devicetree/base/compatible": "".join(name + "\0" for name in device.compatible),
    }
    for index, (kind, millidegrees) in enumerate(device.zones):
        files[f"sys/class/thermal/thermal_zone{index}/type"] = kind
        files[f"sys/class/thermal/thermal_zone{index}/temp"] = millidegrees
    for index, (name, millivolts, milliamperes) in enumerate(device.rails):
        chip = "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0"
        files[f"{chip}/rail_name_{index}"] = name
        files[f"{chip}/in_voltage{index}_input"] = millivolts
        files[f"{chip}/in_current{index}_input"] = milliamperes
        files[f"{chip}/in_power{index}_input"] = millivolts * milliamperes // 1000
    for path, value in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(value if isinstance(value, str) and value.endswith("\0") else f"{value}\n")
    for core in range(device.cores):
        (root / f"sys/devices/system/cpu/cpu{core}/cpufreq").symlink_to("../cpufreq/policy0")


def _cpu_files(device: Identity) -> dict[str, str | int]:
    """/proc/cpuinfo and the /sys tree of the cores: what onnxruntime's and XNNPACK's cpuinfo library reads."""
    cpu, every, mask = "sys/devices/system/cpu", f"0-{device.cores - 1}", f"{(1 << device.cores) - 1:x}"
    files: dict[str, str | int] = {f"{cpu}/{name}": every for name in ("possible", "present", "online")}
    files[f"{cpu}/kernel_max"] = device.cores - 1
    files["proc/cpuinfo"] = "".join(
        f"processor\t: {core}\nBogoMIPS\t: 108.00\nFeatures\t: {device.features}\nCPU implementer\t: 0x41\n"
        f"CPU architecture: 8\nCPU variant\t: 0x0\nCPU part\t: {device.part}\nCPU revision\t: {device.revision}\n\n"
        for core in range(device.cores)
    ) + (f"Hardware\t: {device.hardware}\nModel\t\t: {device.model}")
    low, high = device.khz
    governors = "conservative ondemand userspace powersave performance schedutil"
    policy: dict[str, str | int] = {
        **{f"cpuinfo_{name}_freq": khz for name, khz in (("min", low), ("max", high), ("cur", high))},
        **{f"scaling_{name}_freq": khz for name, khz in (("min", low), ("max", high), ("cur", high))},
        "scaling_governor": "ondemand",
        "scaling_available_governors": governors,
        "related_cpus": " ".join(map(str, range(device.cores))),
    }
    files.update({f"{cpu}/cpufreq/policy0/{name}": value for name, value in policy.items()})
    for core in range(device.cores):
        files.update({f"{cpu}/cpu{core}/{name}": value for name, value in _core_files(device, core).items()})
        topology = {"core_siblings": mask, "cluster_cpus": mask, "package_cpus": mask}
        for name, value in topology.items():
            files[f"{cpu}/cpu{core}/topology/{name}"] = value
            files[f"{cpu}/cpu{core}/topology/{name}_list"] = every
    return files


def _core_files(device: Identity, core: int) -> dict[str, str | int]:
    """The files of one core that do not depend on its neighbours, and its caches."""
    files: dict[str, str | int] = {
        "topology/physical_package_id": 0,
        "topology/core_id": core,
        "topology/cluster_id": 0,
        "topology/thread_siblings": f"{1 << core:x}",
        "topology/thread_siblings_list": core,
        "topology/core_cpus": f"{1 << core:x}",
        "topology/core_cpus_list": core,
        "regs/identification/midr_el1": f"0x00000000410f{device.part[2:]}{device.revision}",
    }
    caches = (
        (1, "Data", 32, str(core)),
        (1, "Instruction", 48, str(core)),
        (2, "Unified", device.l2_kb, f"0-{device.cores - 1}"),
    )
    for index, (level, kind, kilobytes, shared) in enumerate(caches):
        cache: dict[str, str | int] = {"level": level, "type": kind, "size": f"{kilobytes}K", "shared_cpu_list": shared}
        cache |= {"coherency_line_size": 64, "ways_of_associativity": 16, "number_of_sets": kilobytes}
        files.update({f"cache/index{index}/{name}": value for name, value in cache.items()})
    return files


def _check(root: Path, state: Path) -> None:
    """Import each runtime in the guest. It also leaves their compiled .pyc files, so that later imports are faster."""
    modules = [module for module in MODULES if (root / SITE / module.partition(".")[0]).is_dir()]
    program = "import json, platform" + "".join(f", {module}" for module in modules)
    command = f"python3 -c {shlex.quote(program + '; print(platform.machine())')}"
    guard = [sys.executable, "-I", __file__, "guard"]
    said = _run([*guard, *_guest(root, state), "/bin/sh", "-c", command], "the first imports in the board").strip()
    if said != "aarch64":
        raise BoardError(f"the board says it is {said!r}, not 'aarch64'; is qemu-aarch64-static intact?")


# Running a root


def _guest(root: Path, state: Path) -> list[str]:
    """The command that runs the words after it inside the board. state holds what this run may change."""
    for own in OWN[:-1]:
        (state / own.lstrip("/")).mkdir(parents=True, exist_ok=True)
    for folder in ("proot", "nothing"):
        (state / folder).mkdir(exist_ok=True)
    if not (state / "sys").exists():
        shutil.copytree(root / "sys", state / "sys", symlinks=True)
    qemu = str(_which("qemu-aarch64-static"))
    binds = {
        **{f"/dev/{name}": f"/dev/{name}" for name in DEVICES},
        # With -q, proot shows the whole host here, where "rm -rf /*" in the board would find it. It needs qemu only.
        str(state / "nothing"): "/host-rootfs",
        qemu: f"/host-rootfs{qemu}",
        "/proc": "/proc",  # the host's, for processes' own entries; over it, what identifies the device
        str(root / "proc/cpuinfo"): "/proc/cpuinfo",
        str(state / "sys/firmware/devicetree/base"): "/proc/device-tree",
        **{str(state / own.lstrip("/")): own for own in OWN},
    }
    environment = {
        "HOME": "/root",
        "USER": "root",
        "LOGNAME": "root",
        "SHELL": "/bin/bash",
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "LANG": "C.UTF-8",
        "PROOT_TMP_DIR": str(state / "proot"),
    }
    cpu = (root / MARK).read_text().split()[1]  # proot takes it inside -q; without it, qemu hides wrong-ISA bugs
    proot = [str(_which("proot")), "-0", "-q", f"{qemu} -cpu {cpu}", "-r", str(root), "-w", "/root"]
    mounts = [word for source, place in binds.items() for word in ("-b", f"{source}:{place}")]
    return ["env", "-i", *(f"{name}={value}" for name, value in environment.items()), *proot, *mounts]


@contextmanager
def running(root: Path, workdir: Path) -> Iterator[Board]:
    """Serve a made root by sshd on a free port of 127.0.0.1 while the block runs; afterwards no process is left.

    workdir gets the keys, sshd's log and, in state, all that the board's programs change. Ends with the calling thread.
    """
    workdir = workdir.resolve()
    workdir.mkdir(parents=True, exist_ok=True)
    _lay_session(root.resolve(), workdir)
    with _exit_on_sigterm():
        sshd, port = _start(workdir)
        try:
            yield _board(workdir, port)
        finally:
            _stop(sshd)


def _lay_session(root: Path, workdir: Path) -> None:
    """Keys, and the script that sshd runs in place of any command. sftp-server is a command like others: same root."""
    for name in ("host_key", "client_key"):
        if not (workdir / name).exists():
            _run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", str(workdir / name)], "making a key")
    guest = shlex.join(_guest(root, workdir / "state"))
    script = workdir / "session"
    script.write_text(
        "#!/bin/sh\n"
        "# QUIT when the connection's sshd dies: proot then kills all it runs, and it ignores TERM.\n"
        f'exec setpriv --pdeathsig QUIT {guest} /usr/bin/env TERM="${{TERM:-dumb}}" \\\n'
        '    /bin/sh -c "${SSH_ORIGINAL_COMMAND:-exec /bin/bash -l}"\n'
    )
    script.chmod(0o755)


def _sshd_config(workdir: Path, port: int) -> str:
    """Keys only, loopback only, one forced command, none of the host's set-up."""

    return f"""
        Port {port}
        ListenAddress 127.0.0.1
        HostKey "{workdir / "host_key"}"
        AuthorizedKeysFile {_quoted(workdir / "client_key.pub")}
        AuthenticationMethods publickey
        PermitRootLogin prohibit-password
        ForceCommand exec {shlex.quote(str(workdir / "session"))}
        Subsystem sftp /usr/lib/openssh/sftp-server
        AllowTcpForwarding no
        PermitUserRC no
        PrintLastLog no
        PrintMotd no
        StrictModes no
        UsePAM no
        UseDNS no
        PidFile none
        MaxStartups 100
        MaxSessions 100
    """


def _start(workdir: Path) -> tuple[subprocess.Popen[bytes], int]:
    """Start sshd and wait for its greeting. Another program can take the free port first: then try another one."""
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # sshd's empty folder for privilege separation, made at boot elsewhere
    log, config = workdir / "sshd.log", workdir / "sshd_config"
    log.write_text("")
    for _ in range(3):
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = int(free.getsockname()[1])
        config.write_text(_sshd_config(workdir, port))
        sshd = [str(_which("sshd")), "-D", "-f", str(config), "-E", str(log)]
        guard = [sys.executable, "-I", __file__, "guard"]
        process = subprocess.Popen([*guard, *sshd], stdin=subprocess.DEVNULL, start_new_session=True)
        try:
            if _greets(process, port):
                return process, port
        except BaseException:
            _stop(process)
            raise
        _stop(process)
    raise BoardError(f"sshd did not start in three attempts; its log {log} ends:\n{log.read_text()[-800:]}")


def _greets(process: subprocess.Popen[bytes], port: int) -> bool:
    deadline = time.monotonic() + 15
    while process.poll() is None and time.monotonic() < deadline:
        try:
            with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
                return connection.recv(4) == b"SSH-" and process.poll() is None
        except OSError:
            time.sleep(0.01)
    return False


def _board(workdir: Path, port: int) -> Board:
    import pwd  # not on Windows, where this file must still answer missing()

    kind, key = (workdir / "host_key.pub").read_text().split()[:2]
    line = f"[127.0.0.1]:{port} {kind} {key}"
    known_hosts = workdir / "known_hosts"
    known_hosts.write_text(line + "\n")
    return Board(
        host="127.0.0.1",
        port=port,
        user=pwd.getpwuid(os.getuid()).pw_name,
        host_key=line,
        client_key=workdir / "client_key",
        known_hosts=known_hosts,
        log=workdir / "sshd.log",
        home=workdir / "state/root",
    )


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """SIGTERM's default ends this process at once, before the board is taken down. Leaves other handlers alone."""
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def leave(number: int, _frame: object) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _stop(sshd: subprocess.Popen[bytes]) -> None:
    """End sshd, its connections (each its own session, so no process group has them) and what they run."""
    if sshd.poll() is None:
        sshd.send_signal(signal.SIGSTOP)  # no new connection while we look
    family = _descendants(sshd.pid)
    # The connections' sshds first: proot then takes its own down. A proot killed before its tracees would let them
    # run on untranslated, on the host's files.
    for pid in family:
        if _command(pid).startswith("sshd"):
            _kill(pid)
    deadline = time.monotonic() + 2
    while any(map(_alive, family)) and time.monotonic() < deadline:
        time.sleep(0.01)
    for pid in reversed(family):
        _kill(pid)
    sshd.kill()
    sshd.wait()


def _descendants(pid: int) -> list[int]:
    """All processes below pid, parents before children."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):  # ended meanwhile
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found = [pid]
    for parent in found:
        found.extend(children.get(parent, []))
    return found[1:]


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text()
    except OSError:
        return ""


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _kill(pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def guard(command: Sequence[str]) -> None:
    """Become command, without the system calls that proot cannot serve, and with an end when our parent ends."""
    load, unless_equal_skip, give = 0x20, 0x15, 0x06
    allow, fail = 0x7FFF0000, 0x00050000  # SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO
    instructions = [(load, 0, 0, 0)]  # the call's number
    for number in HIDDEN_CALLS[platform.machine()]:
        instructions += [(unless_equal_skip, 0, 1, number), (give, 0, 0, fail | errno.ENOSYS)]
    # sftp-server makes itself untraceable by prctl(PR_SET_DUMPABLE, 0), and a normal user's proot then cannot serve it.
    # It ends when that call fails, so the call does nothing and says it succeeded (errno 0).
    instructions += [(unless_equal_skip, 0, 3, PRCTL[platform.machine()]), (load, 0, 0, 16)]  # 16: first argument
    instructions += [(unless_equal_skip, 0, 1, 4), (give, 0, 0, fail), (give, 0, 0, allow)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in instructions))
    program = ctypes.create_string_buffer(struct.pack("HP", len(instructions), ctypes.addressof(code)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    prctl.argtypes = [ctypes.c_int, *[ctypes.c_ulong] * 4]
    for option, value, pointer in (
        (1, signal.SIGTERM, 0),  # PR_SET_PDEATHSIG
        (38, 1, 0),  # PR_SET_NO_NEW_PRIVS, which a filter needs
        (22, 2, ctypes.addressof(program)),  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER
    ):
        if prctl(option, value, pointer, 0, 0):
            raise BoardError(f"prctl({option}) failed: {os.strerror(ctypes.get_errno())}; seccomp filters are needed")
    os.execvp(command[0], list(command))


# Command line


def _run_until(identity: str, seconds: float | None) -> int:
    with tempfile.TemporaryDirectory(prefix="edgeformer-board-") as workdir:
        with running(cached(identity), Path(workdir)) as board:
            print(shlex.join(ssh(board)), flush=True)
            try:
                time.sleep(threading.TIMEOUT_MAX if seconds is None else seconds)
            except KeyboardInterrupt:
                _say("stopped")
    return 0


def _shell(identity: str, words: Sequence[str]) -> int:
    """One word is a shell line, several are exact arguments, none is an interactive shell. Its exit code is ours."""
    with tempfile.TemporaryDirectory(prefix="edgeformer-board-") as workdir:
        with running(cached(identity), Path(workdir)) as board:
            command = words[0] if len(words) == 1 else shlex.join(words)
            return subprocess.run([*ssh(board), *([command] if command else [])]).returncode


def main(arguments: Sequence[str]) -> int:
    if arguments[:1] == ["guard"]:  # for this file's own use
        guard(arguments[1:])
    parser = argparse.ArgumentParser(prog="board.py", description="An emulated arm64 board behind a real SSH server.")
    commands = parser.add_subparsers(dest="command", required=True)
    parsers = {
        "make": commands.add_parser("make", help="make the board's root and print its folder"),
        "run": commands.add_parser("run", help="serve the board and print the ssh line to use"),
        "shell": commands.add_parser("shell", help="run a command in the board and carry its exit code"),
    }
    for subparser in parsers.values():
        subparser.add_argument("--identity", choices=IDENTITIES, default="raspberry-pi-4")
    parsers["run"].add_argument("--seconds", type=float, help="stop after this time (default: when interrupted)")
    parsers["shell"].add_argument("words", nargs="*", metavar="COMMAND")
    options = parser.parse_args(arguments)
    if reason := missing():
        _say(reason)
        return 3
    try:
        if options.command == "run":
            return _run_until(options.identity, options.seconds)
        if options.command == "shell":
            return _shell(options.identity, options.words)
        print(cached(options.identity))
    except BoardError as error:
        _say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
