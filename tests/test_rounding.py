"""Rounding: programs hold the numbers that training and sensitivity pretend, and each layer in its own precision."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from edgeformer import calibration, check, data, formats, model as models, rounding  # noqa: E402
from edgeformer.errors import BadInput, ExportError  # noqa: E402
from edgeformer.passes import distil, mixed, qat  # noqa: E402
from edgeformer.program import Program  # noqa: E402
from edgeformer.train import Recipe, fit, quiet  # noqa: E402
from edgeformer.workshop import described  # noqa: E402

QUERY, INNER = "module.encoder.layer.0.attention.self.query", "module.encoder.layer.1.intermediate.dense"
WORDS = "module.embeddings.word_embeddings"
TEXTS = tuple(f"w{i} w{i + 1} w{i + 2}" for i in range(3, 40))


def bert() -> models.Model:
    return models.load(families.tiny("bert"), name="tiny", lengths=(16,))


def answer(program: Program, rows: Any) -> Any:
    return np.stack(check.run(program, described(program), rows, lambda _n: None))


def distance(a: Any, b: Any) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize(("precision", "groups", "most"), [("int8", 1, 127), ("int4", 2, 7)])
def test_what_is_pretended_is_what_is_stored(precision: str, groups: int, most: int) -> None:
    weight = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    weight.data[3] = 0
    values, scales = rounding.stored(weight, precision)
    assert scales.shape == (5, groups) and values.dtype == torch.int8 and int(values.abs().max()) == most
    whole = (values.reshape(5, groups, -1) * scales[..., None]).reshape(5, 64)
    pretended = rounding.pretended(weight, precision)
    assert torch.allclose(pretended, whole, atol=1e-7) and not torch.equal(pretended, weight)
    pretended.sum().backward()
    assert torch.equal(weight.grad, torch.ones(5, 64)), "the gradient passes as if nothing had been rounded"
    assert rounding.fitting("int4", 48) == "int8" and rounding.fitting("int4", 64) == "int4"


OPERATORS = {  # of a BERT of 12 linear layers (its pooler is dead) and 3 tables, QUERY kept in fp32 and INNER in int8;
    # of the tables one is of token types, and the others have scales to look up in int8
    "int8": {"MatMulInteger": 11, "Gather": 5, "MatMul": 5},
    "int4-embeddings": {"MatMulInteger": 11, "GatherBlockQuantized": 2, "Gather": 1, "MatMul": 5},
    "int4": {"MatMulNBits": 10, "MatMulInteger": 1, "GatherBlockQuantized": 2, "Gather": 1, "MatMul": 5},
}


def test_onnx_holds_each_layer_in_its_precision() -> None:
    onnx = pytest.importorskip("onnx")
    model = replace(bert(), precisions={QUERY: "fp32", INNER: "int8"})
    rows = data.load(model, None, None).rows[:4]
    fp32 = np.stack(check.reference(model, rows, lambda _n: None))
    known = rounding.layers(model.module)
    for program in formats.load("onnx").export(model, [*OPERATORS]):
        graph = onnx.load_from_string(program.files[program.entry]).graph
        kinds = Counter(node.op_type for node in graph.node)
        assert {k: kinds[k] for k in OPERATORS[program.precision]} == OPERATORS[program.precision]
        (kept,) = [w for w in graph.initializer if list(w.dims) == [32, 32] and w.data_type == onnx.TensorProto.FLOAT]
        assert np.array_equal(onnx.numpy_helper.to_array(kept), known[QUERY].weight.detach().numpy().T)
        assert program.runtime.minimum == ("1.17" if program.precision == "int8" else "1.22")
        module = rounding.pretending(model, rounding.asked(model, program.precision), "token")
        pretended = np.stack(check.reference(replace(model, module=module), rows, lambda _n: None))
        got = answer(program, rows)
        assert distance(got, pretended) < 0.35 * distance(got, fp32) or program.precision == "int8"
    assert program.precision == "int4" and program.work[0].weight_bytes < 32 * 32 * 4 + 10 * 32 * 64 / 2 + 32 * 64


@pytest.mark.slow
@pytest.mark.parametrize("format", ["litert", "executorch"])
def test_int4_runs_and_pretending_says_what_it_answers(format: str) -> None:
    pytest.importorskip({"litert": "litert_torch"}.get(format, format))
    model = replace(bert(), precisions={QUERY: "fp32", INNER: "int8"})
    (program,) = formats.load(format).export(model, ["int4"])
    rows = data.load(model, None, None).rows[:4]
    fp32 = np.stack(check.reference(model, rows, lambda _n: None))
    asked = rounding.asked(model, "int4")
    if format == "litert":  # positions are a constant of each length there, in float
        del asked["module.embeddings.position_embeddings"]
    module = rounding.pretending(model, asked, "token")
    pretended = np.stack(check.reference(replace(model, module=module), rows, lambda _n: None))
    got = answer(program, rows)
    assert distance(got, pretended) < 0.35 * distance(got, fp32)
    packed = program.files[program.entry]
    held = [known.weight.detach().numpy().tobytes() in packed for known in rounding.layers(model.module).values()]
    assert sum(held[3:]) == 1 and held[3], "of the linear layers only the one kept in fp32 is there as it was"
    if format == "litert":
        assert program.runtime.minimum == "2.1"
        from ai_edge_litert import schema_py_generated as schema

        read = schema.ModelT.InitFromPackedBuf(packed, 0)
        types = Counter(t.type for t in read.subgraphs[0].tensors if t.shape is not None and len(t.shape) == 2)
        # 10 linear layers and the words; segments are few, positions fold into a constant.
        assert types[schema.TensorType.INT4] == 11


def test_core_ml_computes_a_layer_in_fp32_and_stores_one_in_int8() -> None:
    pytest.importorskip("coremltools")
    import coremltools as ct
    from coremltools.converters.mil.frontend.milproto.load import load as read_by_apple

    from edgeformer_agent import mil

    model = replace(bert(), precisions={QUERY: "fp32", INNER: "int8"})
    rows = data.load(model, None, None).rows[:4]
    fp32 = np.stack(check.reference(model, rows, lambda _n: None))
    weight = rounding.layers(model.module)[QUERY].weight.detach().numpy()
    for program in formats.load("coreml").export(model, ["int4", "fp16", "fp32"]):
        with check.opened(program) as path:
            folder = str(Path(path).parent)
            operations = mil.Package(folder).function("length_16").operations
            spec = ct.utils.load_spec(folder)
            read_by_apple(spec, spec.specificationVersion, f"{folder}/{mil.WEIGHTS}".rpartition("/")[0])  # checks types
        made = {x.outputs[0].name: x for x in operations}
        linear = [x for x in operations if x.kind == "linear"]
        wide = [x for x in linear if x.outputs[0].type.dtype == "float32"]
        held = [made[x.inputs["weight"][0].name] for x in linear]
        kinds = Counter("int" if "data" in x.inputs else x.attributes["val"].dtype.name for x in held)
        assert sum(x.kind == "const" and np.array_equal(x.attributes["val"], weight) for x in held) == 1
        if program.precision == "fp32":
            assert kinds == {"float32": 12} and len(wide) == 12
            continue
        assert len(wide) == 1 and made[wide[0].inputs["x"][0].name].kind == "cast"
        got = answer(program, rows)
        if program.precision == "fp16":
            assert kinds == {"float32": 1, "float16": 11} and distance(got, fp32) < 1e-3
            continue
        most = sorted(int(np.abs(x.inputs["data"][0]).max()) for x in held if "data" in x.inputs)
        assert kinds == {"float32": 1, "int": 4, "float16": 7} and most[-1] == 127 and 8 >= most[2] >= most[0] >= 7
        assert distance(got, fp32) < 0.05


NARROWING = {"next_token": "module.model.layers.1.mlp.down_proj", "embedding": "module.encoder.layer.0.output.dense"}


def test_huge_values_of_a_decoder_are_quantized_apart() -> None:
    pytest.importorskip("executorch")
    executorch = formats.load("executorch")
    made = torch.Generator().manual_seed(0)
    linear = torch.nn.Linear(64, 32)
    with torch.no_grad():  # weights that int8 holds exactly
        linear.weight.copy_(torch.randint(-126, 127, linear.weight.shape, generator=made).float() / 127)
        linear.weight[:, 0] = 1
    x = torch.randn(1, 5, 64, generator=made)
    x[..., 3] = 1000
    wanted, whole = linear(x), executorch._Linear(linear, "int8")
    off = [abs(made(x) - wanted).max() for made in (whole, rounding.Apart(copy.deepcopy(whole)))]
    assert off[1] < off[0] / 8
    np.testing.assert_allclose(rounding.Apart(linear)(x).detach(), wanted.detach(), rtol=1e-5, atol=1e-3)
    decoder, encoder = families.model("llama"), families.model("bert")
    decoder.module.get_submodule("module.model.layers.1.mlp").down_proj = torch.nn.Linear(128, 64)
    for model, kind in ((decoder, rounding.Apart), (encoder, executorch._Linear)):
        found = dict(executorch._integers(model, "int8").named_modules())
        assert type(found[NARROWING[model.task.kind]]) is kind


def test_executorch_asks_for_no_third_trace_of_what_xnnpack_takes_whole() -> None:
    pytest.importorskip("executorch")
    executorch, linear = formats.load("executorch"), torch.ops.aten.linear.default
    graph = torch.export.export(torch.nn.Linear(4, 4), (torch.ones(1, 4),))
    operators, rule = executorch._partitioner(graph).ops_to_not_decompose(graph)
    assert linear in operators and rule is None
    assert executorch._kept_whole(lambda _: ([linear], lambda _: False), graph)[1] is not None


def test_layers_that_lose_most_are_kept() -> None:
    model = bert()
    rows = data.load(model, None, None)
    inner = model.module.get_submodule(INNER)
    inner.weight.data = rounding.pretended(inner.weight.data, "int4")  # what is rounded already loses nothing
    mixed_by = partial(mixed.layers, rows, precision="int4", activations="none")
    made = mixed_by(keep=4)(model)
    facts = made.history[-1].facts
    order = list(facts["sensitivity"])
    assert facts["sensitivity"][INNER] < 1e-5 < min(facts["sensitivity"][name] for name in order[:4])
    assert made.precisions == facts["kept"] == dict.fromkeys(order[:4], "int8") and not model.precisions
    assert facts["loss"] < facts["loss_without"]
    found = mixed_by(loss=1.01 * facts["loss"])(model)
    assert found.history[-1].facts["loss"] <= 1.01 * facts["loss"]
    assert 0 < len(found.precisions) <= 4
    assert torch.equal(found.module(*model.example(8)), model.module(*model.example(8))), "weights stay as they were"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"precision": "fp16", "keep": 1}, "precision 'fp16' must be one of int8, int4"),
        ({}, "give either loss"),
        ({"keep": 1, "loss": 0.1}, "give either loss"),
        ({"loss": 1.5}, "must be between 0 and 1"),
        ({"loss": 1e-9}, "allow more than"),
        ({"keep": 1, "activations": "rows"}, "activations 'rows' must be one of"),
    ],
)
def test_a_mistake_is_named(settings: dict[str, Any], words: str) -> None:
    model = bert()
    with pytest.raises(BadInput, match=words):
        mixed.layers(data.load(model, None, None), most_rows=2, **settings)(model)


def test_a_layer_that_is_not_there_is_named() -> None:
    with pytest.raises(BadInput, match=r"module\.nothing = int8: tiny has no such layer"):
        rounding.chosen(replace(bert(), precisions={"module.nothing": "int8"}), "int4")
    asked = rounding.chosen(replace(bert(), precisions={QUERY: "fp32", WORDS: "fp32", INNER: "int8"}), "fp16")
    asked.hold([QUERY], "coreml")
    with pytest.raises(ExportError, match=rf"coreml: precisions: {QUERY} = fp32: the program has no such linear"):
        asked.hold([], "coreml")
    with pytest.raises(BadInput, match="precision 'int3' must be one of"):
        qat.train(TEXTS, precision="int3")


class StoppedError(Exception):
    """In the middle of training."""


def test_a_decoder_learns_with_rounding_too() -> None:
    module = families.tiny("llama")
    with torch.no_grad():
        module.lm_head.weight.mul_(20)  # answers worth learning
    model = models.load(module, name="tiny", lengths=(16,), tokenizer=families.tokenizer())
    random = np.random.default_rng(0)
    texts = [" ".join(f"w{n}" for n in random.integers(3, 40, random.integers(2, 12))) for _ in range(240)]
    recipe = Recipe(epochs=4, batch=16, rate=3e-4, bf16=False)
    made = qat.train(texts[:200], activations="token", recipe=recipe)(model)

    def lost(trained: models.Model) -> float:
        rounded = replace(trained, module=rounding.pretending(trained, rounding.asked(trained, "int4"), "token"))
        got, want = (torch.tensor(np.stack(check.reference(x, rows, lambda _n: None))) for x in (rounded, model))
        return float(distil.response(got, want, "classification", 1.0))

    rows = data.load(model, texts[200:], None).rows  # that it did not learn from
    assert lost(made) < 0.8 * lost(model)


def test_training_with_rounding_resumes_with_the_same_bits_and_loses_less(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = models.load(families.tiny("roberta"), name="tiny", lengths=(16,), tokenizer=families.tokenizer())
    recipe = Recipe(epochs=6, batch=8, rate=1e-3, bf16=False)

    def stop(what: str, done: int, total: int) -> None:
        if what == "distil" and done == total // 2:
            raise StoppedError

    def train(folder: Path, progress: Any) -> models.Model:
        return qat.train(TEXTS, recipe=recipe, folder=folder, progress=progress)(model)

    whole = train(tmp_path / "whole", quiet)
    monkeypatch.setattr(distil, "fit", partial(fit, save_every_s=0.0))
    with pytest.raises(StoppedError):
        train(tmp_path / "part", stop)
    again = train(tmp_path / "part", quiet)
    want, got = whole.module.state_dict(), again.module.state_dict()
    assert want.keys() == got.keys() == model.module.state_dict().keys(), "nothing of the rounding is left"
    assert all(torch.equal(want[key], got[key]) for key in want)
    assert not any(m._forward_pre_hooks for m in whole.module.modules())

    (batch,) = calibration.batches(model, data.load(model, TEXTS, None), len(TEXTS))

    def lost(trained: models.Model) -> float:
        module = rounding.pretending(trained, rounding.asked(trained, "int4"), "tensor")
        with torch.no_grad():
            a, b = (m(*batch.inputs).softmax(-1) for m in (module, model.module))
        return float((a - b).square().sum())

    assert lost(whole) < 0.8 * lost(model)


def test_errors_of_rounding_make_up_for_each_other_where_inputs_go_together() -> None:
    random = np.random.default_rng(0)
    few = random.normal(size=(8, 48))
    x = random.normal(size=(500, 8)) @ few + 0.1 * random.normal(size=(500, 48))
    weight = random.normal(size=(48, 16)) * 20

    def lost(whole: np.ndarray) -> float:
        return float(np.linalg.norm(x @ (weight - whole)) / np.linalg.norm(x @ weight))

    made = rounding.compensated(weight, rounding.factor(x.T @ x / len(x)), 127)
    assert lost(made) < lost(np.rint(weight)) / 2 and np.abs(made - weight).max() < 20
    assert (made == np.rint(made)).all()
    unknown = rounding.compensated(weight * 9, rounding.factor(np.zeros((48, 48))), 127)
    np.testing.assert_array_equal(unknown, np.rint(weight * 9).clip(-127, 127))
