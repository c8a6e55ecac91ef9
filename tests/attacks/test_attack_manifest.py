"""Attacks by a manifest that is correctly signed: a stolen key, or a builder that was fooled."""

import datetime
import json
import unicodedata

import pytest
from small_bundle import KEYS, PROGRAM, TARGET, edit, rename, sign

from edgeformer_agent import verify as agent


def text(folder):
    return (folder / "manifest.json").read_text()


def replaced(folder, old, new):
    data = text(folder)
    assert old in data
    sign(folder, data.replace(old, new, 1).encode())


# Names


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("../evil", "leaves the bundle"),
        ("programs/../../evil", "leaves the bundle"),
        ("programs/..", "leaves the bundle"),
        ("/etc/evil", "absolute"),
        ("//evil", "absolute"),
        ("programs\\evil", "backslash"),
        ("c:evil", "colon"),
        ("programs/x:stream", "colon"),
        ("programs//evil", "empty part"),
        ("programs/./evil", "empty part"),
        ("programs/", "empty part"),
        ("", "empty part"),
        (".", "empty part"),
        ("ev\nil", "control"),
        ("ev\x00il", "control"),
        ("ev\x7fil", "control"),
        ("ev\u202eil", "control"),
        ("ev\u200bil", "control"),
        (unicodedata.normalize("NFD", "caf\u00e9"), "NFC"),
        ("\u212bngstrom", "NFC"),
        ("x" * 101, "too long"),
        ("a/" * 130 + "x", "too long"),
    ],
)
def test_name(good, refused, name, reason):
    rename(good, "agent.pyz", name)
    shown = name if name.isprintable() and name else ascii(name)
    refused(good, f"file name {shown}: ", reason)


def test_name_that_is_half_a_character(good, refused):
    """Python would write it to the disk as a raw byte that no UTF-8 name has."""
    rename(good, "agent.pyz", "ev\udc80il")
    refused(good, "ev\\udc80il", "surrogate")
    with pytest.raises(agent.Refused, match="control"):
        agent.check_names(["ev\udc80il"])


@pytest.mark.parametrize("name", ["manifest.json", "manifest.sig", "Manifest.JSON", "MANIFEST.sig"])
def test_reserved_name(good, refused, name):
    rename(good, "agent.pyz", name)
    refused(good, f"file name {name}: the same as manifest.", "(reserved)")


def copied(name, to):
    return lambda body: body["files"].update({to: body["files"][name]})


@pytest.mark.parametrize("other", ["AGENT.pyz", "Agent.PYZ"])
def test_names_that_fold_to_one(good, refused, other):
    edit(good, copied("agent.pyz", other))
    (good / other).write_bytes((good / "agent.pyz").read_bytes())
    refused(good, other, "the same as", "on some disks")


@pytest.mark.parametrize("pair", [("straße", "STRASSE"), ("\u01c5", "\u01c6"), ("ﬁle", "file")])
def test_names_that_fold_to_one_in_unicode(good, refused, pair):
    for name in pair:
        edit(good, copied("agent.pyz", name))
        (good / name).write_bytes((good / "agent.pyz").read_bytes())
    refused(good, pair[1], "on some disks")


def test_folders_that_fold_to_one(good, refused):
    edit(good, copied("agent.pyz", "Cases/other"))
    (good / "Cases").mkdir()
    (good / "Cases/other").write_bytes((good / "agent.pyz").read_bytes())
    refused(good, "folder", "Cases", "the same as")


@pytest.mark.parametrize("name", ["agent.pyz/x", "AGENT.PYZ/x"])
def test_file_that_is_also_a_folder(good, refused, name):
    edit(good, copied("agent.pyz", name))
    refused(good, "agent.pyz", "also the folder")


# JSON


def test_duplicate_key(good, refused):
    replaced(good, '"version": 3', '"version": 3, "version": 3')
    refused(good, "manifest.json", "duplicate key 'version'")


def test_duplicate_file(good, refused):
    replaced(good, '"files": {', '"files": {"agent.pyz": {"sha256": "", "size": 0},')
    refused(good, "duplicate key 'agent.pyz'")


def test_duplicate_key_in_the_signature(good, refused):
    data = (good / "manifest.sig").read_text()
    (good / "manifest.sig").write_text(data.replace('"key"', f'"key": "{KEYS[0]}", "key"', 1))
    refused(good, "manifest.sig", "duplicate key 'key'")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_not_a_finite_number(good, refused, value):
    replaced(good, '"metric_ratio": 0.99', f'"metric_ratio": {value}')
    refused(good, "manifest.json", value, "not a finite number")


@pytest.mark.parametrize("schema", ["edgeformer.manifest/2", "edgeformer.report/1", "", None])
def test_unknown_schema(good, refused, schema):
    edit(good, lambda body: body.update(schema=schema))
    refused(good, "manifest.json", f"schema {schema!r}")


def test_unknown_schema_of_the_signature(good, refused):
    data = (good / "manifest.sig").read_text()
    (good / "manifest.sig").write_text(data.replace("signature/1", "signature/2"))
    refused(good, "manifest.sig", "edgeformer.signature/2")


@pytest.mark.parametrize("key", ["version", "target", "expires", "files", "programs", "cases", "gate", "name"])
def test_missing_key(good, refused, key):
    edit(good, lambda body: body.pop(key))
    refused(good, "manifest.json", f"missing keys ['{key}']")


def test_unknown_key(good, refused):
    edit(good, lambda body: body.update(post_install="rm"))
    refused(good, "manifest.json", "unknown keys ['post_install']")


def test_unknown_key_deeper(good, refused):
    edit(good, lambda body: body["files"]["agent.pyz"].update(mode=0o4755))
    refused(good, "agent.pyz", "unknown keys ['mode']")


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("version", "3", "int"),
        ("version", True, "int"),
        ("version", 3.0, "int"),
        ("version", None, "int"),
        ("target", ["raspberry-pi-4"], "str"),
        ("files", [], "dict"),
        ("programs", {}, "list"),
        ("gate", None, "dict"),
    ],
)
def test_wrong_type(good, refused, key, value, expected):
    edit(good, lambda body: body.update({key: value}))
    refused(good, f"manifest.{key}: expected {expected}")


@pytest.mark.parametrize("value", [{"size": -1}, {"sha256": ""}, {"sha256": "0" * 63 + "G"}, {"sha256": "0" * 65}])
def test_no_size_or_digest(good, refused, value):
    edit(good, lambda body: body["files"]["agent.pyz"].update(value))
    refused(good, "agent.pyz", "no size and digest")


def test_upper_case_digest(good, refused):
    edit(good, lambda body: body["files"][PROGRAM].update(sha256=body["files"][PROGRAM]["sha256"].upper()))
    refused(good, PROGRAM, "no size and digest")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"null", b"\xff\xfe", b"\xef\xbb\xbf{}", b"{}{}", b"'", b"\0"])
def test_not_a_document(good, refused, data):
    sign(good, data)
    refused(good, "manifest.json")


def test_truncated(good, refused):
    data = (good / "manifest.json").read_bytes()
    for size in range(0, len(data) - 2, len(data) // 20):
        sign(good, data[:size])
        refused(good, "manifest.json")


@pytest.mark.parametrize("opening", ["[", '{"a":'])
def test_deep_nesting(good, refused, opening):
    sign(good, (opening * 200_000).encode())
    refused(good, "manifest.json")


def test_deep_nesting_where_anything_goes(good, refused):
    replaced(good, '"calibration_rows": 300', '"x": ' + "[" * 100_000 + "]" * 100_000)
    refused(good, "manifest.json")


def test_number_of_a_million_digits(good, refused):
    replaced(good, '"version": 3', '"version": ' + "9" * 1_000_000)
    refused(good, "manifest.json", "99999999999999999999... is too large a number")


def test_total_that_overflows(good, refused):
    edit(good, lambda body: body["files"]["agent.pyz"].update(size=1 << 62))
    refused(good, "bytes in total")


@pytest.mark.parametrize("data", [b"", b"{}", b"[]", b"\xff", b"[" * 4000])
def test_signature_that_is_none(good, refused, data):
    (good / "manifest.sig").write_bytes(data)
    refused(good, "manifest.sig")


@pytest.mark.parametrize(("field", "bad"), [("key", "zz"), ("signature", ""), ("signature", "00"), ("key", 7)])
def test_signature_of_wrong_form(good, refused, field, bad):
    body = json.loads((good / "manifest.sig").read_bytes())
    body[field] = bad
    (good / "manifest.sig").write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")
    refused(good, "manifest.sig")


def test_signature_in_capitals(good, refused):
    """One signature, one spelling."""
    body = json.loads((good / "manifest.sig").read_bytes())
    body["signature"] = body["signature"].upper()
    (good / "manifest.sig").write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")
    refused(good, "manifest.sig")


# Claims


def test_wrong_target(good, refused):
    refused(good, "'raspberry-pi-4'", "'jetson-nano'", target="jetson-nano")


def test_rollback(good):
    assert agent.verify(good, KEYS, TARGET, 3).version == 3
    with pytest.raises(agent.Refused, match=r"rollback: 'minilm-sst2' version 3 is older than 4"):
        agent.verify(good, KEYS, TARGET, 4)


def test_rollback_after_a_newer_one_was_remembered(good, tmp_path):
    state = tmp_path / "state"
    newer = agent.verify(good, KEYS)._replace(version=7)
    agent.remember(state, newer, KEYS[0])
    with pytest.raises(agent.Refused, match="older than 7"):
        agent.verify(good, KEYS, TARGET, agent.highest(state, newer.name, KEYS[0]))


def test_negative_version(good, refused):
    edit(good, lambda body: body.update(version=-1))
    refused(good, "version -1")


def test_expiry(good, refused):
    day = datetime.date(2999, 12, 31)
    agent.verify(good, KEYS, TARGET, today=day)
    with pytest.raises(agent.Refused, match="expired: valid to 2999-12-31, today is 3000-01-01"):
        agent.verify(good, KEYS, TARGET, today=day + datetime.timedelta(days=1))
    edit(good, lambda body: body.update(expires="2020-02-29"))
    refused(good, "expired: valid to 2020-02-29")


@pytest.mark.parametrize("date", ["", "never", "2999-13-01", "2999-02-30", "2999-1-1", "2999-12-31\n", "٢٩٩٩-12-31"])
def test_no_date(good, refused, date):
    edit(good, lambda body: body.update(expires=date))
    refused(good)


def test_program_outside_the_files(good, refused):
    edit(good, lambda body: body["programs"][0].update(path="../../bin/sh"))
    refused(good, "onnx-int8: refers to ../../bin/sh")


@pytest.mark.parametrize("case", ["golden", "evaluation"])
def test_cases_outside_the_files(good, refused, case):
    edit(good, lambda body: body["cases"].update({case: "/dev/zero"}))
    refused(good, f"cases.{case}: refers to /dev/zero")


def test_two_programs_of_one_name(good, refused):
    edit(good, lambda body: body["programs"].append(body["programs"][0]))
    refused(good, "program names are not unique: onnx-int8")


def test_whatever_goes_wrong_is_a_refusal(good, refused, monkeypatch):
    def broken(*_):
        raise MemoryError

    monkeypatch.setattr(agent.ed25519, "verify", broken)
    refused(good, "cannot be verified: MemoryError")
