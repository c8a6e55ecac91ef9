"""doctor: for each target what is here, what is missing, and the line that adds it."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError

import pytest

from edgeformer import device, doctor, formats


def target(name: str) -> doctor.Finding:
    return next(x for x in doctor.examine() if (x.area, x.name) == ("target", name))


def test_every_target_says_what_it_builds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version", lambda _package: "1")
    for name in device.names():
        found = target(name)
        assert found.ok and all(f in found.says for f in device.load(name).formats if f in formats.names())


def test_a_missing_package_and_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package == "executorch":
            raise PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr(doctor, "version", version)
    monkeypatch.setattr(doctor.shutil, "which", lambda _name: None)
    found = target("pixel-7")
    assert "not executorch" in found.says and "builds litert" in found.says and "no adb" in found.says
    assert found.fix == "pip install 'edgeformer[executorch]' && apt-get install adb"


def test_a_board_is_reached_over_ssh(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(package: str) -> str:
        if package == "paramiko":
            raise PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr(doctor, "version", version)
    found = target("raspberry-pi-4")
    assert found.ok and "cannot deploy over SSH" in found.says and found.fix == "pip install 'edgeformer[ssh]'"


def test_a_tool_that_is_here_is_not_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "version", lambda _package: "1")
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/usr/bin/" + name)
    monkeypatch.setenv("ANDROID_NDK_HOME", "/ndk")
    found = target("pixel-7")
    assert "adb" not in found.says and "NDK" not in found.says and found.fix is None
