"""The Swift records hold exactly what wire.py holds. There is no Swift compiler here: this reads the source."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest

from edgeformer_agent import wire

ROOT = Path(__file__).parents[1]
SOURCES = ROOT / "devices" / "ios" / "Sources" / "EdgeformerAgent"
NAMES = {str: "String", int: "Int", float: "Double", bool: "Bool", Any: "JSON"}
RECORDS = [
    "Tensor", "Work", "Metrics", "Prediction", "Fidelity", "Runtime", "Needs", "Entry", "Task", "Gate", "Step", "Cases",
    "File", "Manifest", "Signature", "Latency", "Memory", "Energy", "Golden", "Native", "Spent", "Result", "Report",
]  # fmt: skip


def swift_type(kind: Any) -> str:
    """An annotation of wire.py as Swift writes it."""
    arguments = get_args(kind)
    if get_origin(kind) is Union:
        return swift_type(arguments[0]) + "?"
    if get_origin(kind) is tuple:
        return f"[{swift_type(arguments[0])}]"
    if get_origin(kind) is dict:
        return f"[String: {swift_type(arguments[1])}]"
    return NAMES.get(kind) or kind.__name__


def structs(text: str) -> dict[str, list[tuple[str, str]]]:
    """Name -> its stored properties in order."""
    found = re.findall(r"public struct (\w+): Codable \{\n(.*?)\n\}", text, re.S)
    return {name: re.findall(r"public var `?(\w+)`?: (\S.*)", body) for name, body in found}


def breaches(text: str) -> list[str]:
    """Where the Swift source says something else than wire.py."""
    found = structs(text)
    wrong = [f"{name} is missing or unknown" for name in {*RECORDS} ^ {*found}]
    for name in RECORDS:
        wanted = [(key, swift_type(kind)) for key, kind in get_type_hints(getattr(wire, name)).items()]
        if found.get(name, wanted) != wanted:
            wrong.append(f"{name}: {found[name]} instead of {wanted}")
    return wrong


def test_every_record_has_the_fields_and_types_of_wire() -> None:
    assert breaches((SOURCES / "Wire.swift").read_text()) == []


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("public var p90_ms: Double\n", ""),
        ("public var p90_ms: Double", "public var p90_ms: Int"),
        ("public var energy: Energy?", "public var energy: Energy"),
        ("public var samples_us: [Int]", "public var samples_us: [Double]"),
        ("public struct Golden", "public struct Gold"),
    ],
)
def test_a_difference_is_found(before: str, after: str) -> None:
    text = (SOURCES / "Wire.swift").read_text()
    assert before in text and breaches(text.replace(before, after))


def test_every_key_of_the_golden_report_is_a_field() -> None:
    found = structs((SOURCES / "Wire.swift").read_text())

    def walk(value: Any, record: str) -> None:
        assert set(value) == {key for key, _ in found[record]}, record
        for key, kind in found[record]:
            inner = kind.strip("[]?")
            items = value[key] if isinstance(value[key], list) else [value[key]]
            for item in items if inner in found else ():
                if item is not None:
                    walk(item, inner)

    walk(json.loads((ROOT / "tests" / "golden" / "report.json").read_text()), "Report")


def test_what_the_swift_tests_expect_is_what_python_writes() -> None:
    text = (ROOT / "devices" / "ios" / "Tests" / "EdgeformerAgentTests" / "CanonicalTests.swift").read_text()
    pairs = re.findall(r'\("(\S+)", (\S+)\),', text)
    assert len(pairs) == 13
    for written, number in pairs:
        assert repr(float(number)) == written
    value = {"zz": None, "\u00e9": "a\n\u0007", "Z": [], "a": {}}
    dumped = wire.dump(value).decode().rstrip("\n")
    escaped = dumped.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\u00e9", "\\u{e9}")
    assert f'"{escaped}"' in text


def test_schemas_and_names_are_those_of_the_other_side() -> None:
    text = "".join(path.read_text() for path in sorted(SOURCES.glob("*.swift")))
    for schema in (wire.MANIFEST_SCHEMA, wire.REPORT_SCHEMA, wire.SIGNATURE_SCHEMA):
        assert f'"{schema}"' in text
    assert '"length_\\(length)"' in text  # the functions of formats/coreml.py
    assert (ROOT / "devices" / "profiles" / "iphone-13.toml").is_file() and '"iphone-13"' in text


def test_the_readme_says_that_nobody_compiled_it() -> None:
    assert "was not compiled" in (ROOT / "devices" / "ios" / "README.md").read_text()
