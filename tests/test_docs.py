"""What the documents say is so: code runs, commands exist, links lead somewhere, numbers were printed."""

from __future__ import annotations

import ast
import json
import re
import runpy
from pathlib import Path

import pytest

import edgeformer

ROOT = Path(__file__).parents[1]
DOCUMENTS = [p for folder in (".", "devices", "tools/bench") for p in sorted((ROOT / folder).glob("*.md"))]
README = (ROOT / "README.md").read_text()


def test_readme_is_short() -> None:
    assert len(README.splitlines()) < 150


def test_readme_code_uses_what_exists() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.S)
    used = {n.attr for n in ast.walk(ast.parse(block)) if isinstance(n, ast.Attribute)}
    assert used == {"build", "run", "deploy", "compare"} and used <= set(edgeformer.__all__)


def test_every_command_is_in_the_readme() -> None:
    from edgeformer.cli import app

    names = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    names |= {group.name for group in app.registered_groups if group.name}
    assert len(names) == 12
    assert [name for name in sorted(names) if f"`edgeformer {name}" not in README] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_links_lead_somewhere(path: Path) -> None:
    for link in re.findall(r"\]\((?!https?:|#)([^)]+)\)", path.read_text()):
        assert (path.parent / link.partition("#")[0]).exists(), link


def test_every_extra_named_in_the_readme_exists() -> None:
    import tomllib

    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"edgeformer\[(\w+)\]", README)) <= set(extras)


def test_the_table_comes_from_the_command() -> None:
    """The command that writes it makes the same shape from a summary, number by number."""
    table = runpy.run_path(str(ROOT / "tools" / "figures"))["table"]
    summary = {
        "bundle": {
            "name": "n",
            "target": "raspberry-pi-4",
            "programs": [
                {"name": "onnx-int8", "size_bytes": 23_907_533,
                 "predicted": {"metrics": {"latency_ms": 40.0}, "low": 0.5, "high": 2.0}},
            ],
        },
        "reports": [
            {"kind": kind, "device": {"cpu": "some CPU"}, "results": [
                {"program": "onnx-int8", "latency": {"p50_ms": 1.234, "p90_ms": 2.0}, "energy": None,
                 "fidelity": {"mean": 0.99, "worst": 0.98, "rows": 96}, "memory": {"peak_rss_mb": 99.6}}]}
            for kind in ("measured", "emulated")
        ],
    }  # fmt: skip
    lines = table(json.loads(json.dumps(summary))).splitlines()
    assert lines[-2] == "| onnx-int8 | 22.8 | 40 (20 to 80) | some CPU, measured | 1.23 / 2.00 | 0.9900 / 0.9800 (96) | 100 | no sensor |"  # fmt: skip  # noqa: E501
    assert "timing says nothing" in lines[-1] and "1.23" not in lines[-1]
    for row in re.findall(r"^\| (?:onnx|litert)-\w+ \|.*$", README, re.M):
        assert row.count("|") == lines[-1].count("|")
