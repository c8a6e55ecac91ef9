"""The command line: exit codes, one JSON document, help that teaches, and messages that say what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import small_bundle

COMMANDS = ("build", "verify", "run", "deploy", "report", "compare", "targets", "doctor", "keys")


def run(*words: object, home: Path) -> subprocess.CompletedProcess[str]:
    """A fresh process, as a shell would start it, with keys of its own."""
    environment = os.environ | {"XDG_CONFIG_HOME": str(home), "XDG_CACHE_HOME": str(home), "COLUMNS": "100"}
    command = [sys.executable, "-m", "edgeformer", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def document(done: subprocess.CompletedProcess[str]) -> object:
    """Exactly one on stdout: `json.loads` refuses anything beside it."""
    return json.loads(done.stdout)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, tmp_path: Path) -> None:
    done = run(command, "--help", home=tmp_path)
    assert done.returncode == 0 and "Usage: " in done.stdout and len(done.stdout.splitlines()) > 8


def test_the_commands_are_these(tmp_path: Path) -> None:
    text = run("--help", home=tmp_path).stdout
    assert all(f"│ {name} " in text for name in COMMANDS)


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["biuld"], 2, "Did you mean 'build'?"),
        (["build", "--target", "host"], 2, "--model"),
        (["build", "--model", "x", "--target", "raspbery-pi-4"], 2, "Did you mean 'raspberry-pi-4'?"),
        (["build", "--model", "x", "--target", "iphone-13", "--format", "onnx"], 2, "it runs coreml"),
        (["build", "--model", "x", "--target", "host", "--format", "onxx"], 2, "'onnx'"),
        (["build", "--model", "no/such/folder", "--target", "host"], 2, "no/such/folder"),
        (["verify", "nowhere"], 2, "no bundle"),
        (["targets", "pixel7"], 2, "Did you mean 'pixel-7'?"),
        (["compare", "a.json"], 2, "second report"),
        (["compare", "a.json", "b.json"], 2, "a.json"),
        (["keys", "show", "nobody"], 2, "nobody"),
        (["keys", "trust", "friend", "12"], 2, "64"),
    ],
)
def test_wrong_use_exits_with_2_and_says_what_to_do(words: list[str], code: int, says: str, tmp_path: Path) -> None:
    done = run(*words, home=tmp_path)
    assert (done.returncode, done.stdout) == (code, "")
    assert says in done.stderr and "Traceback" not in done.stderr


def test_json_is_one_document_also_when_it_fails(tmp_path: Path) -> None:
    assert {t["name"] for t in document(run("targets", "--json", home=tmp_path))} >= {"raspberry-pi-4", "host"}  # type: ignore[attr-defined]
    assert {f["area"] for f in document(run("doctor", "--json", home=tmp_path))} >= {"format", "target", "sensor"}  # type: ignore[attr-defined]
    failed = run("verify", "nowhere", "--json", home=tmp_path)
    assert failed.returncode == 2 and document(failed)["exit_code"] == 2  # type: ignore[index]


def test_targets_shows_every_figure_with_its_source(tmp_path: Path) -> None:
    text = run("targets", "raspberry-pi-4", home=tmp_path).stdout
    assert "Cortex-A72" in text and "glibc" in text and "power: " in text


def test_keys_from_birth_to_distrust(tmp_path: Path) -> None:
    made = run("keys", "create", "lab", home=tmp_path).stdout.strip()
    assert len(made) == 64 and run("keys", "show", "lab", home=tmp_path).stdout.strip() == made
    assert run("keys", "create", "lab", home=tmp_path).returncode == 2
    assert run("keys", "trust", "friend", small_bundle.KEYS[0], home=tmp_path).returncode == 0
    listed = {k["name"]: k["own"] for k in document(run("keys", "list", "--json", home=tmp_path))}  # type: ignore[attr-defined]
    assert listed == {"lab": True, "friend": False}
    assert run("keys", "untrust", "nobody", home=tmp_path).returncode == 2


def test_verify_names_what_differs_and_exits_with_1(tmp_path: Path) -> None:
    bundle = small_bundle.small(tmp_path / "bundle")
    key = ("--key", small_bundle.KEYS[0])
    good = run("verify", bundle.path, *key, "--json", home=tmp_path)
    assert good.returncode == 0 and document(good)["ok"] is True  # type: ignore[index]
    assert run("verify", bundle.archive, *key, home=tmp_path).returncode == 0
    assert run("verify", bundle.path, home=tmp_path).returncode == 1  # no key is trusted here
    victim = bundle.path / small_bundle.PROGRAM
    victim.write_bytes(victim.read_bytes() + b"!")
    bad = run("verify", bundle.path, *key, home=tmp_path)
    assert bad.returncode == 1 and small_bundle.PROGRAM in bad.stderr


def test_a_closed_pipe_is_no_traceback(tmp_path: Path) -> None:
    environment = os.environ | {"XDG_CONFIG_HOME": str(tmp_path)}
    shell = f"{sys.executable} -m edgeformer targets raspberry-pi-4 | head -n 1"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, env=environment)
    assert "Traceback" not in done.stderr
