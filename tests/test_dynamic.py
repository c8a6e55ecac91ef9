"""Work that depends on the input: nothing changes where nothing is left out, and what is left out does not run."""

import json
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from edgeformer import calibration, data, model as models  # noqa: E402
from edgeformer.errors import BadInput  # noqa: E402
from edgeformer.passes import dynamic  # noqa: E402

ENCODERS = tuple(name for name in families.NAMES if name != "llama")
CLASSES = ("roberta", "vit")


def load(family: str) -> models.Model:
    return models.load(families.tiny(family), lengths=None if family == "vit" else (8, 16))


def rows(model: models.Model) -> data.Rows:
    return data.load(model, None, None)


def padded(model: models.Model) -> tuple[Any, ...]:
    """Rows of different lengths in one batch."""
    return next(calibration.batches(model, rows(model), 6)).inputs


@pytest.mark.parametrize("family", ENCODERS)
def test_tokens_that_never_leave_change_nothing(family: str) -> None:
    model = load(family)
    made = dynamic.tokens(rows(model), after=0, threshold=dynamic.NEVER_DROPS)(model)
    assert torch.equal(made.module(*padded(model)), model.module(*padded(model)))
    assert {x.tokens for x in dynamic.saved(made, rows(model))} == {0}


@pytest.mark.parametrize("family", ENCODERS)
def test_tokens_leave(family: str) -> None:
    model = load(family)
    made = dynamic.tokens(rows(model), after=0, keep=0.5)(model)
    found = dynamic.saved(made, rows(model))
    assert sum(x.tokens for x in found) > 0 and 1 < np.mean([x.layers_run for x in found]) < 2
    output = made.module(*padded(model))
    assert torch.isfinite(output).all() and not torch.equal(output, model.module(*padded(model)))
    # A row alone and in a batch with longer ones: its own tokens are those that count.
    assert 0.2 < made.history[-1].facts["tokens_kept"] < 1


@pytest.mark.parametrize("family", CLASSES)
def test_rows_leave_early_or_never(family: str) -> None:
    model = load(family)
    given = padded(model)
    never = dynamic.early_exit(rows(model), after=0, threshold=dynamic.NEVER_EXITS)(model)
    assert torch.equal(never.module(*given), model.module(*given))
    assert {x.layers_run for x in dynamic.saved(never, rows(model))} == {2.0}
    always = dynamic.early_exit(rows(model), after=0, threshold=0.0)(model)
    ran: list[int] = []
    last = next(m for name, m in always.module.named_modules() if name.endswith(".1.layer"))
    last.register_forward_hook(lambda *_: ran.append(1))
    assert {x.layers_run for x in dynamic.saved(always, rows(model))} == {1.0}
    assert not ran, "the last layer ran although every row was done"
    assert not torch.equal(always.module(*given), model.module(*given))


def test_the_threshold_is_the_least_that_agrees() -> None:
    logits = torch.tensor([[4.0, 0.0], [3.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
    wanted = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    sure = logits.softmax(-1)[:, 0]
    assert sure[2] < dynamic._sure_enough(logits, wanted, 1.0) < sure[1]
    assert dynamic._sure_enough(logits, wanted, 0.75) < sure[3]
    assert dynamic._sure_enough(logits[2:3], wanted[2:3], 1.0) == dynamic.NEVER_EXITS


def test_bad_input_says_what_to_do() -> None:
    with pytest.raises(BadInput, match="keep 0 must be above 0"):
        dynamic.tokens([], keep=0)
    model = load("bert")
    with pytest.raises(BadInput, match="is no classification"):
        dynamic.early_exit([])(model)
    with pytest.raises(BadInput, match="has 2 layers, from 0; one at least must come after"):
        dynamic.tokens(rows(model), after=1)(model)
    with pytest.raises(BadInput, match="has a dynamic pass already"):
        dynamic.tokens(rows(model), after=0)(dynamic.tokens(rows(model), after=0)(model))
    with pytest.raises(BadInput, match="no dynamic pass"):
        dynamic.saved(model, rows(model))


def session(model: models.Model, folder: Path, profile: bool = False) -> Any:
    import onnxruntime

    from edgeformer import formats

    program = next(formats.load("onnx").export(model, ["fp32"]))
    options = onnxruntime.SessionOptions()
    options.enable_profiling = profile
    options.profile_file_prefix = str(folder / "profile")
    return onnxruntime.InferenceSession(program.files[program.entry], options, providers=["CPUExecutionProvider"])


def answer(made: Any, row: Any) -> Any:
    return made.run(None, {name: array[None] for name, array in row.items()})[0][0]


def truth(model: models.Model, row: Any) -> Any:
    with torch.no_grad():
        return model.module(*(torch.from_numpy(row[x.name][None]) for x in model.inputs))[0].numpy()


@pytest.mark.slow
@pytest.mark.parametrize("family", ("bert", "modernbert"))
def test_token_pruning_runs_in_onnx(family: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = load(family)
    made = dynamic.tokens(rows(model), after=0, keep=0.5)(model)
    program = session(made, tmp_path)
    for row in rows(model).rows[::8]:
        assert np.abs(answer(program, row) - truth(made, row)).max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("family", CLASSES)
def test_early_exit_skips_operators_in_onnx(family: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = load(family)
    row, executed = rows(model).rows[5], []
    for threshold in (0.0, dynamic.NEVER_EXITS):
        made = dynamic.early_exit(rows(model), after=0, threshold=threshold)(model)
        program = session(made, tmp_path, profile=True)
        assert np.abs(answer(program, row) - truth(made, row)).max() < 1e-4
        events = json.loads(Path(program.end_profiling()).read_text())
        executed.append(sum(e.get("args", {}).get("op_name") in ("MatMul", "Gemm", "FusedMatMul") for e in events))
    assert executed[0] < 0.7 * executed[1], executed
