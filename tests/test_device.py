"""Profiles: each loads, each group has a source, units are plausible, and a broken one is refused by key."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import pytest

from edgeformer import device
from edgeformer.errors import EdgeformerError, MissingExtra, ProfileError, UnknownTarget

FIXED = [name for name in device.names() if name != "host"]
PI = (files("edgeformer.profiles") / "raspberry-pi-4.toml").read_text(encoding="utf-8")


def _load_text(folder: Path, text: str) -> device.Device:
    path = folder / "board.toml"
    path.write_text(text, encoding="utf-8")
    return device._read(path, {})


def test_the_promised_targets_are_there() -> None:
    assert {"host", "iphone-13", "jetson-nano", "pixel-7", "raspberry-pi-4"} <= set(device.names())
    assert device.names() == sorted(device.names())


@pytest.mark.parametrize("name", [*FIXED, "host"])
def test_every_profile_loads_and_every_group_has_a_source(name: str) -> None:
    found = device.load(name)
    assert found.name == name
    groups = {"cores", *device._GROUPS} | ({"accelerator"} if found.accelerator else set())
    assert set(found.sources) == groups
    assert all(len(text) > 10 for text in found.sources.values())


@pytest.mark.parametrize("name", FIXED)
def test_peaks_follow_from_clock_and_vector_width(name: str) -> None:
    found = device.load(name)
    ghz = found.cores[0].max_mhz / 1000
    assert found.fp32_gflops / ghz == pytest.approx(
        min((8, 16, 32), key=lambda n: abs(n - found.fp32_gflops / ghz)), rel=0.01
    )
    assert found.fp32_gflops < found.int8_gops <= 4.1 * found.fp32_gflops
    every_core_as_the_fastest = sum(c.count * c.max_mhz for c in found.cores) / 1000 * found.fp32_gflops / ghz
    assert found.fp32_gflops < found.fp32_gflops_all <= every_core_as_the_fastest * 1.01
    assert ("dotprod" in found.features) == (found.int8_gops > 2.1 * found.fp32_gflops)


@pytest.mark.parametrize("name", [*FIXED, "host"])
def test_units_are_plausible(name: str) -> None:
    found = device.load(name)
    assert 1 <= found.bandwidth_gbs <= (found.bandwidth_peak_gbs or 1000) < 1001
    assert 16 <= found.l1d_kb <= found.l2_kb <= (found.l3_kb or found.l2_kb * 1024)
    assert found.memory_mb >= 512
    assert all(300 <= c.max_mhz <= 7000 and c.count >= 1 for c in found.cores)
    assert found.idle_w is None or found.busy_w is None or 0.1 < found.idle_w < found.busy_w < 100
    for low, high in (found.band_one_thread, found.band_all_threads):
        assert 0.1 <= low < 1 < high <= 10
    assert found.band_one_thread[1] <= found.band_all_threads[1]
    assert "x86_64" in found.arch or "neon" in found.features


def test_formats_are_asked_by_name() -> None:
    pi = device.load("raspberry-pi-4")
    assert pi.formats[0] == "litert"
    assert pi.runs("onnx")
    assert not pi.runs("coreml")


def test_a_device_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        device.load("raspberry-pi-4").memory_mb = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [("raspbery-pi4", "raspberry-pi-4"), ("Pixel7", "pixel-7"), ("pi-4", "raspberry-pi-4"), ("nano", "jetson-nano")],
)
def test_a_typo_suggests(typed: str, meant: str) -> None:
    with pytest.raises(UnknownTarget, match=re.escape(f"Did you mean '{meant}'")) as caught:
        device.load(typed)
    assert caught.value.exit_code == 2
    assert caught.value.nearest[0] == meant
    assert all(name in str(caught.value) for name in device.names())


def test_a_name_like_nothing_lists_what_there_is() -> None:
    with pytest.raises(UnknownTarget, match=r"no target '\?\?'\. Known: host, iphone-13"):
        device.load("??")


def _drop(line: str) -> Callable[[str], str]:
    return lambda text: re.sub(rf"(?m)^{line} = .*\n", "", text, count=1)


def _set(key: str, value: str) -> Callable[[str], str]:
    return lambda text: re.sub(rf"(?m)^{key} = .*$", lambda _: f"{key} = {value}", text, count=1)


def _add(after: str, line: str) -> Callable[[str], str]:
    return lambda text: text.replace(after, f"{after}\n{line}", 1)


def _accelerate(line: str) -> Callable[[str], str]:
    table = f'[accelerator]\nname = "a GPU"\nformats = ["tensorrt"]\nfp16_gflops = 1\n{line}\n\n'
    return lambda text: text.replace("[sources]", f'{table}[sources]\naccelerator = "made up"')


MALFORMED = [
    ("title", _drop("title"), "missing"),
    ("formats", _set("formats", "[]"), "[]"),
    ("formats", _set("formats", '["Lite RT"]'), "Lite RT"),
    ("formats", _set("formats", '"onnx"'), "onnx"),
    ("frmats", _add('soc = "Broadcom BCM2711"', "frmats = []"), "unknown"),
    ("cores[0].max_mhz", _set("max_mhz", "1.5"), "1.5"),
    ("cores[0].count", _set("count", "true"), "True"),
    ("cores[0].clock", _add("max_mhz = 1500", "clock = 1"), "unknown"),
    ("cores", _add("max_mhz = 1500", '[[cores]]\nname = "big"\ncount = 1\nmax_mhz = 2000'), "[1500, 2000] MHz"),
    ("isa.arch", _set("arch", '"arm"'), "'arm'"),
    ("cache.l2_kb", _drop("l2_kb"), "missing"),
    ("memory.bandwidth_gbs", _set("bandwidth_gbs", "4800"), "4800"),
    ("memory.bandwidth_gbs", _set("bandwidth_gbs", '"4.8"'), "'4.8'"),
    ("memory.bandwidth_gbs", _set("bandwidth_gbs", "20"), "20"),
    ("memory.bandwidth_mbs", _add("[memory]", "bandwidth_mbs = 1"), "unknown"),
    ("peak.fp32_efficiency", _set("fp32_efficiency", "60"), "60"),
    ("peak.fp32_gflops_all", _set("fp32_gflops_all", "6"), "6"),
    ("peak.band_one_thread", _set("band_one_thread", "[2.0, 0.5]"), "[2.0, 0.5]"),
    ("floor.glibc", _set("glibc", "2.36"), "2.36"),
    ("power.sensors", _drop("sensors"), "missing"),
    ("power", lambda text: re.sub(r"(?s)\[power\].*?\n\n", "", text), "missing"),
    ("accelerator.efficiency", _accelerate("efficiency = 4"), "4"),
    ("accelerator.formats", _accelerate("efficiency = 0.4"), "tensorrt"),
    ("sources.cache", lambda text: re.sub(r"(?m)^cache = .*\n", "", text), "missing"),
    ("sources.gpu", _add("[sources]", 'gpu = "guessed"'), "unknown"),
    ("the file", lambda text: text + "\n[broken", "at end of document"),
]


@pytest.mark.parametrize(("key", "damage", "found"), MALFORMED, ids=[f"{m[0]}-{i}" for i, m in enumerate(MALFORMED)])
def test_a_malformed_profile_is_refused_by_key(
    tmp_path: Path, key: str, damage: Callable[[str], str], found: str
) -> None:
    text = damage(PI)
    assert text != PI, "the damage did nothing"
    with pytest.raises(ProfileError) as caught:
        _load_text(tmp_path, text)
    assert (caught.value.file, caught.value.key) == ("board.toml", key)
    assert str(caught.value).startswith(f"board.toml: {key} must be ")
    assert found in caught.value.found
    assert caught.value.exit_code == 2


def test_host_has_plausible_facts_and_they_do_not_change() -> None:
    host = device.load("host")
    assert host == device.load("host")
    assert host.cores[0].count >= 1
    assert host.fp32_gflops_all == pytest.approx(host.fp32_gflops * host.cores[0].count, abs=0.1)
    assert 1 < host.fp32_gflops < 1000
    assert host.python is not None and host.python.startswith("3.")
    assert {"onnx", "litert"} == set(host.formats)


@pytest.mark.parametrize(
    ("cpuinfo", "features", "rates"),
    [
        ("flags\t\t: sse2 avx2 fma", ["avx2"], (32, 40)),
        ("flags\t\t: avx2 avx_vnni", ["avx2", "avx_vnni"], (32, 128)),
        ("flags\t\t: avx2 avx512f", ["avx2", "avx512f"], (32, 40)),
        ("flags\t\t: avx2 avx512f avx512_vnni", ["avx2", "avx512f", "avx512_vnni"], (32, 128)),
        ("flags\t\t: avx512f avx512_vnni amx_int8", ["avx512f", "avx512_vnni", "amx_int8"], (64, 768)),
        ("Features\t: fp asimd evtstrm crc32", ["neon"], (8, 16)),
        ("Features\t: fp asimd asimdhp asimddp", ["neon", "dotprod", "fp16"], (16, 64)),
        ("model name\t: avx2 in a name is no flag", [], (8, 16)),
    ],
)
def test_features_and_rates_from_cpuinfo(cpuinfo: str, features: list[str], rates: tuple[int, int]) -> None:
    assert device._features(cpuinfo) == features
    assert device._per_cycle(features) == rates


def test_host_reads_clock_and_caches_under_a_root(tmp_path: Path) -> None:
    cpu = tmp_path / "sys/devices/system/cpu/cpu0"
    for leaf, text in {
        "cpufreq/cpuinfo_max_freq": "1803000\n",
        "cache/index0/level": "1\n",
        "cache/index0/type": "Data\n",
        "cache/index0/size": "64K\n",
        "cache/index1/level": "1\n",
        "cache/index1/type": "Instruction\n",
        "cache/index1/size": "48K\n",
        "cache/index2/level": "2\n",
        "cache/index2/type": "Unified\n",
        "cache/index2/size": "2048K\n",
    }.items():
        (cpu / leaf).parent.mkdir(parents=True, exist_ok=True)
        (cpu / leaf).write_text(text)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text("model name\t: A CPU\nflags\t\t: avx2\n")
    found = device._detected(tmp_path)
    assert found["soc"] == "A CPU"
    assert found["cores"][0]["max_mhz"] == 1800
    assert found["cache"] == {"l1d_kb": 64, "l2_kb": 2048}
    assert found["peak"]["fp32_gflops"] == 57.6


def test_an_error_says_what_to_run() -> None:
    assert "pip install 'edgeformer[onnx]'" in str(MissingExtra("onnx", "onnxruntime"))
    assert MissingExtra("onnx").exit_code == 3
    assert EdgeformerError.exit_code == 1
