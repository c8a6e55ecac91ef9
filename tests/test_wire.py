"""
The wire format: golden bytes that bind the agents in other languages, and a reader that takes nothing by halves.

`golden/*.json` are part of the contract. They change only together with a schema's number.
"""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Union, get_args, get_origin

import pytest

from edgeformer_agent import wire

GOLDEN = Path(__file__).parent / "golden"
FREE = wire.Report.__annotations__["device"]  # facts: any JSON
SHA = "00112233445566778899aabbccddeeff" * 2

# What an implementation gets wrong first: keys by code point (not by UTF-16 unit), floats of either notation, quotes.
TRAPS = {
    "\U0001d11e": "after \ufb01 by code point, before it by UTF-16 unit",
    "\ufb01": 'quote " backslash \\ slash / newline \n tab \t bell \x07 delete \x7f',
    "zz": None,
    "Z": True,
    "a": {"b": [], "a": {}},
    "é": ["ü", "\u2028", "\U0001f600"],
    "numbers": [
        0,
        -1,
        9007199254740993,
        0.1,
        1.0,
        -0.0,
        1e-07,
        0.0001,
        1e16,
        123456789012345.0,
        1.7976931348623157e308,
    ],
}


def manifest() -> wire.Manifest:
    metrics = wire.Metrics(latency_ms=41.25, latency_p90_ms=60.0, accuracy=0.875)
    entry = wire.Entry(
        name="litert-int8",
        format="litert",
        precision="int8",
        path="programs/litert-int8/model.tflite",
        size_bytes=23_000_001,
        inputs=(
            wire.Tensor("input_ids", "int32", (-1, -1), 1),
            wire.Tensor("pixel_values", "float32", (-1, 3, 224, 224), 0.5),
        ),
        outputs=(wire.Tensor("logits", "float32", (-1, 2)),),
        lengths=(16, 128),
        runtime=wire.Runtime("ai-edge-litert", "2.3.0", "3"),
        needs=wire.Needs("2.34", ("neon", "dotprod")),
        work=(wire.Work(0, 1e6, 0, 2.5, 3.0), wire.Work(128, 1e22, 6.9e8, 2.3e7, 1e-05)),
        predicted=wire.Prediction("raspberry-pi-4", 1, metrics, 0.5, 2.0, "roofline"),
        checked=wire.Fidelity("agreement", 0.99, 0.954, 3e-06, 32, "accuracy", 0.875, 0.88),
        golden_similarity=0.98,
        libraries={"linux-aarch64": "native/linux-aarch64/libedgeformer_litert.so"},
    )
    bare = wire.Entry(
        "onnx-fp32", "onnx", "fp32", "programs/onnx-fp32/model.onnx", 0, (), (), (),
        wire.Runtime("onnxruntime", "1", "2"), wire.Needs(), (),
        wire.Prediction("raspberry-pi-4", 4, wire.Metrics(), 1, 1, ""), wire.Fidelity("cosine", 1, 1, 0, 1), 0.9999,
    )  # fmt: skip
    return wire.Manifest(
        schema=wire.MANIFEST_SCHEMA,
        name="minilm-sst2",
        version=20261121,
        target="raspberry-pi-4",
        expires="2027-12-31",
        builder="edgeformer 0.1.0",
        task=wire.Task("classification", "accuracy", False, ("negativ", "größer")),
        programs=(entry, bare),
        history=(wire.Step("load", TRAPS), wire.Step("prune.heads", {})),
        gate=wire.Gate(0.99, 0.985, 0.98, 0.985, True),
        cases=wire.Cases("cases/golden.npz", "cases/evaluation.npz", 32, "sample texts"),
        files={"programs/b": wire.File(2, SHA), "programs/B": wire.File(0, SHA[::-1])},
    )


def report() -> wire.Report:
    latency = wire.Latency(
        40, 3, 0.125, 41.5, 0.25, 41.0, 41.25, 60.0, 61.0, 62.0, samples_us=(41000, 41250, 62000), row_lengths=(8, 21)
    )
    full = wire.Result(
        program="litert-int8",
        format="litert",
        precision="int8",
        runtime_version="2.3.0",
        threads=4,
        import_ms=412.0,
        load_ms=18.5,
        first_ms=51,
        golden=wire.Golden(3, 0.9999, 0.98, True),
        latency=latency,
        memory=wire.Memory(112.5, 61.0, 70.25),
        energy=wire.Energy("ina226", "trapezoid", 118.4, 61.3, 2.71, 12.0, 480, 512),
        fidelity=wire.Fidelity("agreement", 0.99, 0.954, 3e-06, 32, "f1", 0.875, 0.88, {"exact_match": 0.75}),
        before={"governor": "ondemand", "temp_c": {"cpu-thermal": 47.2}, "charger": None},
        after=TRAPS,
        flags=("throttled", "evaluation_partial"),
        native=wire.Native(6, "neon", (1.0, 0.5, 0.25)),
        profile=(wire.Spent("Fully Connected (NC, F32)", 30.5), wire.Spent("größer.out", 1)),
    )
    failed = full._replace(
        program="onnx-fp32",
        golden=wire.Golden(3, -1.0, 0.9999, False),
        latency=None,
        memory=wire.Memory(1e-07, 0.0),
        energy=None,
        fidelity=None,
        after={},
        flags=(),
        native=None,
        profile=(),
    )
    made = wire.Report(
        schema=wire.REPORT_SCHEMA,
        id="",
        bundle=SHA,
        name="minilm-sst2",
        version=20261121,
        target="raspberry-pi-4",
        kind="measured",
        started="2026-11-21T09:41:07Z",
        agent="0.1.0",
        profile="default",
        device={"model": "Raspberry Pi 4 Model B Rev 1.4", "cores": 4, "isa": ["asimd", "fp"]},
        results=(full, failed),
        skipped={"tensorrt-fp16": "no runtime: größer"},
        selected=None,
    )
    return made._replace(id=wire.report_id(made))


RECORDS: dict[str, tuple[Any, str, Callable[[], Any]]] = {
    "manifest": (wire.Manifest, wire.MANIFEST_SCHEMA, manifest),
    "report": (wire.Report, wire.REPORT_SCHEMA, report),
}
each = pytest.mark.parametrize("name", RECORDS)


def golden(name: str) -> bytes:
    return (GOLDEN / f"{name}.json").read_bytes()


def decode(name: str, body: Any) -> Any:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return wire.decode(RECORDS[name][0], RECORDS[name][1], data)


@each
def test_golden_bytes(name: str) -> None:
    assert wire.dump(RECORDS[name][2]()) == golden(name)


def test_golden_records() -> None:
    assert wire.load_manifest(golden("manifest")) == manifest()
    assert wire.load_report(golden("report")) == report()


@each
def test_the_canonical_form_in_words(name: str) -> None:
    """What another language must write, said without our own encoder."""
    text = golden(name).decode()
    lines = text.split("\n")
    assert lines[0] == "{" and lines[-2:] == ["}", ""]
    assert text.index("\ufb01") < text.index("\U0001d11e")
    assert (
        '"numbers": [\n' in text and "é" in text and "\\u2028" not in text and '"\u2028"' in text and "\\u0007" in text
    )
    assert all(f" {n}{end}\n" in text for n, end in (("-0.0", ","), ("1e-07", ","), ("1e+16", ","), ("0.0001", ",")))
    assert all(f" {n}" in text for n in ("123456789012345.0", "1.7976931348623157e+308\n", "9007199254740993"))
    assert '"a": {},' in text and '"b": []' in text


def test_the_identity_of_a_report() -> None:
    made = report()
    body = json.loads(golden("report"))
    assert made.id == body["id"] and made.id == wire.digest(golden("report").replace(made.id.encode(), b""))
    assert wire.report_id(made._replace(id="anything")) == made.id
    assert wire.report_id(made._replace(version=1)) != made.id


def typed(value: Any) -> Any:
    """With the type of every value: 1 is not 1.0, a list is not a tuple, a record is not its fields."""
    inner = value
    if isinstance(value, dict):
        inner = sorted((key, typed(item)) for key, item in value.items())
    elif isinstance(value, list | tuple):
        inner = [typed(item) for item in value]
    return type(value).__name__, repr(inner)


@each
def test_round_trip_keeps_types(name: str) -> None:
    first = RECORDS[name][2]()
    again = decode(name, wire.dump(first))
    assert again == first and typed(again) == typed(first)
    assert wire.dump(again) == wire.dump(first)


def backwards(value: Any) -> Any:
    """The same JSON, every object's keys in the opposite order."""
    if isinstance(value, dict):
        return {key: backwards(value[key]) for key in reversed(value)}
    return [backwards(item) for item in value] if isinstance(value, list) else value


@each
def test_the_order_of_keys_does_not_matter(name: str) -> None:
    body = backwards(json.loads(golden(name)))
    assert next(iter(body)) != next(iter(json.loads(golden(name))))
    assert wire.dump(decode(name, body)) == golden(name)
    assert wire.dump(body) == golden(name)


# --- what is refused ----------------------------------------------------------------------------------------------

Place = tuple[Any, ...]


def places(kind: Any, value: Any, at: Place = ()) -> Iterator[tuple[Place, Any]]:
    """Every value that the schema gives a type, with that type; written apart from wire._decode."""
    yield at, kind
    inner = [k for k in get_args(kind) if k is not type(None)]
    if get_origin(kind) is Union and value is not None:
        yield from list(places(inner[0], value, at))[1:]
    elif hasattr(kind, "_fields"):
        for key in kind._fields:
            yield from places(kind.__annotations__[key], value[key], (*at, key))
    elif get_origin(kind) is tuple:
        for i, item in enumerate(value):
            yield from places(inner[0], item, (*at, i))
    elif get_origin(kind) is dict and inner[1] is not Any:
        for key, item in value.items():
            yield from places(inner[1], item, (*at, key))


def changed(body: Any, at: Place, value: Any) -> Any:
    body = json.loads(json.dumps(body))
    here = body
    for key in at[:-1]:
        here = here[key]
    if value is KeyError:
        del here[at[-1]]
    else:
        here[at[-1]] = value
    return body


def wrong(kind: Any) -> list[Any]:
    """JSON values that are not of this type."""
    samples: list[Any] = [None, True, 7, 7.5, "7", [None], {"x": None}]
    if get_origin(kind) is Union:
        kind = get_args(kind)[0]
        samples = samples[1:]
    accepted = {bool: (bool,), int: (int,), float: (int, float), str: (str,), FREE: (dict,)}.get(kind, ())
    return [s for s in samples if type(s) not in accepted]


@each
def test_every_field_refuses_every_other_type(name: str) -> None:
    body, kind = json.loads(golden(name)), RECORDS[name][0]
    found = list(places(kind, body))
    assert len(found) > 60
    for at, kind in found[1:]:
        if at == ("schema",):
            continue
        for value in wrong(kind):
            with pytest.raises(wire.WireError) as error:
                decode(name, changed(body, at, value))
            assert str(at[-1]) in str(error.value), (at, value)
        if get_origin(kind) is Union:
            assert decode(name, changed(body, at, None)) is not None


@each
def test_every_record_refuses_a_missing_and_an_unknown_key(name: str) -> None:
    body = json.loads(golden(name))
    records = [at for at, kind in places(RECORDS[name][0], body) if hasattr(kind, "_fields")]
    assert len(records) > 5
    for at in records:
        record: Any = body
        for key in at:
            record = record[key]
        for key in record:
            if at or key != "schema":
                with pytest.raises(wire.WireError, match=rf"unknown keys \[\], missing keys \['{key}'\]"):
                    decode(name, changed(body, (*at, key), KeyError))
        with pytest.raises(wire.WireError, match=r"unknown keys \['zz'\], missing keys \[\]"):
            decode(name, changed(body, (*at, "zz"), 1))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "1" * 400, "9" * 21])
@pytest.mark.parametrize("place", ['"version": 20261121', '"cores": 4', '"rows": 32', '"mean": 0.99', "0.0001"])
def test_numbers_that_are_not(number: str, place: str) -> None:
    text = golden("report").decode()
    assert place in text
    value = place.rpartition(" ")[2]
    with pytest.raises(wire.WireError, match=r"finite|too large"):
        decode("report", text.replace(place, place.replace(value, number), 1).encode())


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_are_not_written(value: float) -> None:
    for record in (manifest()._replace(history=(wire.Step("x", {"a": [value]}),)), wire.Metrics(latency_ms=value)):
        with pytest.raises(ValueError, match="JSON compliant"):
            wire.dump(record)


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ('"name": "minilm-sst2"', '"name": "a", "name": "minilm-sst2"', "name"),
        ('"zz": null', '"zz": null, "zz": null', "zz"),  # where any JSON goes
        ('"kind": "classification"', '"kind": "classification", "kind": "embedding"', "kind"),
    ],
)
def test_duplicate_keys(old: str, new: str, key: str) -> None:
    text = golden("manifest").decode()
    assert old in text
    with pytest.raises(wire.WireError, match=f"duplicate key '{key}'"):
        wire.load_manifest(text.replace(old, new, 1).encode())


@pytest.mark.parametrize(
    "schema", ["edgeformer.report/1", "edgeformer.manifest/2", "", None, 1, [], "Edgeformer.manifest/1"]
)
def test_another_schema(schema: Any) -> None:
    with pytest.raises(wire.WireError, match=r"this side speaks 'edgeformer.manifest/1'"):
        wire.load_manifest(json.dumps({**json.loads(golden("manifest")), "schema": schema}).encode())
    with pytest.raises(wire.WireError, match="schema None"):
        wire.load_manifest(b"{}")


def test_one_schema_is_not_read_as_the_other() -> None:
    with pytest.raises(wire.WireError, match="schema"):
        wire.load_report(golden("manifest"))
    with pytest.raises(wire.WireError, match="schema"):
        wire.load_manifest(golden("report"))


@pytest.mark.parametrize(
    "data", [b"", b"\xff{}", b"{", b"{} {}", b"{'a': 1}", b"\xef\xbb\xbf{}", b'{"a": 01}', b"{\x00}", b'{"a":1,}']
)
def test_no_json(data: bytes) -> None:
    with pytest.raises(wire.WireError, match="not a JSON document"):
        wire.load_report(data)


@pytest.mark.parametrize("data", [b"[]", b"null", b"1", b'"edgeformer.report/1"', b"[[1]]"])
def test_no_object(data: bytes) -> None:
    with pytest.raises(wire.WireError, match="expected a JSON object"):
        wire.load_report(data)


@pytest.mark.parametrize("shape", ["[", '{"a":'])
@pytest.mark.parametrize("depth", [34, 400, 900, 200_000])
def test_deep_nesting(shape: str, depth: int) -> None:
    """Where any JSON goes, too: what cannot be written again has no digest. 900 is read, and breaks the writer."""
    nested = shape * depth + "1" + {"[": "]", "{": "}"}[shape[0]] * depth
    text = golden("report").decode().replace('"cores": 4', f'"cores": {nested}', 1)
    with pytest.raises(wire.WireError, match=r"nested deeper|recursion"):
        wire.load_report(text.encode())


def test_facts_may_nest() -> None:
    facts: Any = 1
    for _ in range(15):
        facts = {"a": [facts]}
    made = report()._replace(device=facts)
    made = made._replace(id=wire.report_id(made))
    assert wire.load_report(wire.dump(made)) == made


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("report", '"name": "minilm-sst2"', '"name": "\\ud800"'),
        ("report", '"flags": []', '"flags": ["\\udc00"]'),
        ("report", '"tensorrt-fp16": ', '"\\ud800": '),
        ("report", '"cpu-thermal": 47.2', '"\\udfff": 47.2'),
        ("report", '"asimd"', '"\\ud834"'),
        ("manifest", '"builder": "edgeformer 0.1.0"', '"builder": "\\udbff"'),
        ("manifest", '"programs/b"', '"\\udcff"'),
    ],
)
def test_half_of_a_surrogate_pair(name: str, old: str, new: str) -> None:
    """Python reads it and cannot write it: in keys and values, typed and free."""
    text = golden(name).decode()
    assert old in text
    with pytest.raises(wire.WireError, match="surrogate"):
        decode(name, text.replace(old, new).encode())
    pair = re.sub(r"\\u\w{4}", lambda _: r"\ud834\udd1f", new)
    decode(name, text.replace(old, pair).encode())


@pytest.mark.parametrize(
    "field", [f for f in wire.Report._fields if f not in ("schema", "results", "device", "skipped")]
)
def test_a_changed_report_has_another_id(field: str) -> None:
    made = report()
    value = getattr(made, field)
    other = made._replace(**{field: value + 1 if isinstance(value, int) else f"{value or ''}0"})
    with pytest.raises(wire.WireError, match="changed on the way"):
        wire.load_report(wire.dump(other))


def test_a_change_deep_in_a_report_shows() -> None:
    made = report()
    for change in (
        made._replace(device={**made.device, "cores": 4.0}),
        made._replace(skipped={}),
        made._replace(results=made.results[:1]),
        made._replace(id=made.id.upper()),
        made._replace(results=(made.results[0]._replace(threads=1), made.results[1])),
    ):
        with pytest.raises(wire.WireError, match="changed on the way"):
            wire.load_report(wire.dump(change))


def test_the_headline_numbers() -> None:
    full, failed = report().results
    assert full.metrics() == wire.Metrics(41.25, 60.0, 112.5, 61.3, 0.875)
    assert failed.metrics() == wire.Metrics(None, None, 1e-07, None, None)
