"""The gate: what it lets through, what it says when it does not, and that nothing broken slips past it."""

import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import families
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from edgeformer import check, model as models  # noqa: E402
from edgeformer.check import DEFAULT_GATE, gate, hold  # noqa: E402
from edgeformer.errors import BadInput, ExportError, GateFailed  # noqa: E402
from edgeformer.program import Program  # noqa: E402
from edgeformer_agent import wire  # noqa: E402

NAN = float("nan")


def found(mean: float = 1.0, measure: str = "cosine", **changes: Any) -> wire.Fidelity:
    return wire.Fidelity(measure, mean, 0.1234, 0.5, 32)._replace(**changes)


def labelled(value: float, reference: float, metric: str = "accuracy") -> wire.Fidelity:
    return found(0.0, metric=metric, value=value, reference=reference)


def refused(what: wire.Fidelity, limit: wire.Gate) -> str:
    with pytest.raises(GateFailed) as error:
        hold("onnx-int8", what, limit)
    return str(error.value)


# --- which gate ---------------------------------------------------------------------------------------------------


def test_the_default() -> None:
    assert gate(None) == wire.Gate(0.99, 0.985, 0.98, 0.985, False)


@pytest.mark.parametrize("value", [0, 0.5, 0.98, 0.985, 0.989])
def test_a_number_is_every_limit(value: float) -> None:
    assert gate(value) == wire.Gate(value, value, value, value, True)


@pytest.mark.parametrize("value", [0.99, 0.999, 1, 1.0])
def test_a_stricter_number_is_not_loosened(value: float) -> None:
    assert gate(value) == wire.Gate(value, value, value, value, False)


@pytest.mark.parametrize("field", wire.Gate._fields[:4])
def test_one_loosened_limit_is_recorded_whatever_the_caller_says(field: str) -> None:
    for said in (False, True):
        limit = DEFAULT_GATE._replace(**{field: 0.97}, loosened=said)
        assert gate(limit) == limit._replace(loosened=True)
        stricter = DEFAULT_GATE._replace(**{field: 0.999}, loosened=said)
        assert gate(stricter) == stricter._replace(loosened=False)


@pytest.mark.parametrize("value", [-0.01, 1.01, 99, NAN, float("inf"), -float("inf")])
def test_a_limit_out_of_range(value: float) -> None:
    bad: list[Any] = [value, *(DEFAULT_GATE._replace(**{field: value}) for field in wire.Gate._fields[:4])]
    for limit in bad:
        with pytest.raises(BadInput, match=r"each limit is a share of fp32, from 0 to 1"):
            gate(limit)


# --- without labels -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", ["cosine", "agreement", "correlation", "likelihood"])
def test_each_measure_has_its_limit(measure: str) -> None:
    limit = wire.Gate(0.1, 0.2, 0.3, 0.4, False)
    least = {"cosine": 0.2, "agreement": 0.3, "correlation": 0.4, "likelihood": 0.3}[measure]
    hold("x", found(least, measure), limit)
    assert f"mean {measure} with fp32 {least - 0.01:.4f} on 32 rows" in refused(found(least - 0.01, measure), limit)


def test_the_message_has_the_program_both_numbers_and_what_to_do() -> None:
    message = refused(found(0.97512), DEFAULT_GATE)
    assert message == (
        "onnx-int8: mean cosine with fp32 0.9751 on 32 rows is below the gate 0.9850 (the worst row has 0.1234) by "
        "0.0099; nothing was packaged. Use another precision, or loosen the gate on purpose: gate=0.975"
    )


@pytest.mark.parametrize(
    ("mean", "says"),
    [
        (0.98496, "0.98496000 on 32 rows is below the gate 0.98500000 (the worst row has 0.1234) by 0.00004000;"),
        (
            0.985 - 4e-8,
            "0.98499996 on 32 rows is below the gate 0.98500000 (the worst row has 0.1234) by 0.00000004;",
        ),
    ],
)
def test_numbers_that_are_close_are_written_out(mean: float, says: str) -> None:
    """Not "0.9850 is below 0.9850 by 0.0000"."""
    assert says in refused(found(mean), DEFAULT_GATE)


@pytest.mark.parametrize("mean", [NAN, -1.0, 0.0])
def test_what_no_gate_lets_through_is_not_told_to_loosen_it(mean: float) -> None:
    message = refused(found(mean), DEFAULT_GATE)
    assert f"fp32 {mean:.4f}" in message and "loosen" not in message


def test_a_metric_without_labels_does_not_count() -> None:
    """The task has a metric, the data had no labels: closeness decides."""
    hold("x", found(0.99, metric="accuracy"), DEFAULT_GATE)
    refused(found(0.9, metric="accuracy"), DEFAULT_GATE)


# --- with labels --------------------------------------------------------------------------------------------------


def test_the_metric_decides_where_there_are_labels() -> None:
    hold("x", labelled(0.99, 1.0), DEFAULT_GATE)
    hold("x", labelled(0.9, 0.8), DEFAULT_GATE)  # better than fp32
    hold("x", labelled(0.7921, 0.8), DEFAULT_GATE)
    message = refused(labelled(0.78, 0.8), DEFAULT_GATE)
    assert message == (
        "onnx-int8: accuracy 0.7800 on 32 rows is below the gate 0.7920 (99.00% of fp32's 0.8000) by 0.0120; nothing "
        "was packaged. Use another precision, or loosen the gate on purpose: gate=0.975"
    )
    assert "accuracy nan" in refused(labelled(NAN, 0.8), DEFAULT_GATE)
    assert "fp32's nan" in refused(labelled(0.8, NAN), DEFAULT_GATE)


@pytest.mark.parametrize("reference", [1.0, 0.8, 0.05, 0.0, -0.05, -0.4, -1.0])
def test_a_program_as_good_as_fp32_passes_every_gate(reference: float) -> None:
    """A negative correlation times 0.99 would be more than the model itself has."""
    for limit in (None, 0.0, 0.5, 0.9, 1.0):
        hold("x", labelled(reference, reference, "spearman"), gate(limit))


def test_a_negative_reference() -> None:
    limit = gate(0.9)
    hold("x", labelled(-0.439, -0.4, "spearman"), limit)
    assert "spearman -0.4410 on 32 rows is below the gate -0.4400" in refused(labelled(-0.441, -0.4), limit).replace(
        "accuracy", "spearman"
    )
    hold("x", labelled(-0.441, -0.4), gate(0.89))


def test_a_reference_of_zero_allows_no_loss() -> None:
    hold("x", labelled(0.0, 0.0), DEFAULT_GATE)
    hold("x", labelled(0.1, 0.0), gate(0.0))
    assert "loosen" not in refused(labelled(-0.1, 0.0), gate(0.0))


@pytest.mark.parametrize(
    "what",
    [
        *(found(mean) for mean in (0.9849, 0.975, 0.57, 0.29, 0.0015)),
        *(found(0.9, measure) for measure in ("agreement", "correlation")),
        *(labelled(value, 0.8) for value in (0.7919, 0.78, 0.29, 0.001)),
        *(labelled(value, -0.4) for value in (-0.41, -0.5, -0.79)),
    ],
)
def test_the_gate_that_the_message_names_lets_it_through(what: wire.Fidelity) -> None:
    hint = re.search(r"gate=([0-9.]+)$", refused(what, DEFAULT_GATE))
    assert hint
    named = gate(float(hint.group(1)))
    hold("x", what, named)
    assert named.loosened and named.metric_ratio < 0.99
    refused(what, gate(named.metric_ratio + 0.002))  # and none much stricter does


# --- reference and run --------------------------------------------------------------------------------------------


def rows(*lengths: int) -> list[dict[str, Any]]:
    random = np.random.default_rng(0)
    return [
        {
            "token_type_ids": np.zeros(n, np.int32),  # in another order than the inputs
            "input_ids": random.integers(5, 200, n).astype(np.int32),
            "attention_mask": np.ones(n, np.int32),
        }
        for n in lengths
    ]


def test_the_reference_is_each_row_alone_in_order() -> None:
    model, data, seen = models.load(families.tiny("bert")), rows(3, 9, 4), list[int]()
    outputs = check.reference(model, data, seen.append)
    assert seen == [1, 2, 3] and len(outputs) == 3
    for row, output in zip(data, outputs, strict=True):
        ids = torch.from_numpy(row["input_ids"])[None].long()
        with torch.no_grad():
            hidden = model.module.module(ids).last_hidden_state[0].mean(0)
        np.testing.assert_allclose(output, (hidden / hidden.norm()).numpy(), atol=1e-6)
        assert output.dtype == np.float32 and output.shape == (32,)


PROGRAM = Program(
    "onnx", "int8", {"model.onnx": b"entry", "model.data": b"weights"}, (), (), (),
    wire.Runtime("onnxruntime", "1", "2"), wire.Needs(), (),
)  # fmt: skip


def opened(monkeypatch: pytest.MonkeyPatch, step: Callable[[Any], Any]) -> list[Any]:
    """A runner in the device's place; gives what it was opened with."""
    calls: list[Any] = []

    def load(path: str, entry: Any, threads: int) -> Callable[[Any], Any]:
        calls.append((Path(path), {p.name: p.read_bytes() for p in Path(path).parent.iterdir()}, entry, threads))
        return step

    def runner(format: str) -> Any:
        assert format == "onnx"
        return SimpleNamespace(load=load)

    monkeypatch.setattr(check.runners, "load", runner)
    return calls


ENTRY: Any = object()


def test_a_program_is_opened_as_a_device_does(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, seen = opened(monkeypatch, lambda row: row["input_ids"][:2] * 0.5), list[int]()
    outputs = check.run(PROGRAM, ENTRY, rows(3, 9), seen.append)
    ((path, files, entry, threads),) = calls
    assert path.name == "model.onnx" and files == dict(PROGRAM.files) and (entry, threads) == (ENTRY, 1)
    assert not path.exists() and seen == [1, 2]
    for row, output in zip(rows(3, 9), outputs, strict=True):
        np.testing.assert_array_equal(output, row["input_ids"][:2] * 0.5)


def test_a_program_that_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    opened(monkeypatch, lambda row: row["none"])
    with pytest.raises(ExportError, match=r"onnx-int8 does not run in its own runtime: KeyError: 'none'"):
        check.run(PROGRAM, ENTRY, rows(3), lambda _: None)


@pytest.mark.parametrize("bad", [NAN, float("inf")])
def test_one_row_that_is_not_finite_is_enough(monkeypatch: pytest.MonkeyPatch, bad: float) -> None:
    """One of a thousand rows would not move a mean below its gate."""
    opened(monkeypatch, lambda row: np.float32([1, bad if len(row["input_ids"]) > 6 else 0]))
    with pytest.raises(GateFailed, match=r"onnx-int8: 2 of 5 rows give NaN or infinity, the first is row 1"):
        check.run(PROGRAM, ENTRY, rows(3, 9, 4, 8, 5), lambda _: None)


def test_fidelity_is_judged_by_the_models_task() -> None:
    model = models.load(families.tiny("roberta"))
    outputs, wanted = [np.float32([0, 1, 0])] * 2, [np.float32([0, 3, 0]), np.float32([3, 0, 0])]
    judged = check.fidelity(model, outputs, wanted, None)
    assert (judged.measure, judged.mean, judged.value) == ("agreement", 0.5, None)
    model = models.replace(model, task=model.task._replace(metric="accuracy"))
    judged = check.fidelity(model, outputs, wanted, np.float32([1, 1]))
    assert (judged.value, judged.reference) == (1.0, 0.5)
