"""Students cut from a model: what stays, what it computes, and that their programs run on a device's runner."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from edgeformer import check, data, formats, model as models  # noqa: E402
from edgeformer.errors import BadInput  # noqa: E402
from edgeformer.passes import student  # noqa: E402
from edgeformer.workshop import described  # noqa: E402

TEXTS = ["w3 w4 w5", "w5 w6 w7 w8", "w9 w3"]


def classifier(**changes: Any) -> models.Model:
    torch.manual_seed(0)
    config = transformers.BertConfig(**{**families.TEXT, "num_labels": 3, "num_hidden_layers": 4, **changes})
    made = transformers.BertForSequenceClassification(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    return models.load(made, name="tiny", tokenizer=families.tokenizer(), lengths=(8, 16))


def outputs(model: models.Model, texts: list[str] = TEXTS) -> np.ndarray:
    rows = data.load(model, texts, None).rows
    return np.stack(check.reference(model, rows, lambda _: None))


def cut(*steps: Any) -> models.Model:
    model = classifier()
    for step in steps:
        model = step(model)
    return model


def test_layers_keep_the_first_and_the_last() -> None:
    model = classifier()
    before = outputs(model)
    small = student.layers(2)(model)
    stack, whole = student.layer_stack(small.module), student.layer_stack(model.module)
    assert len(stack) == 2 and len(whole) == 4 and small.module.module.config.num_hidden_layers == 2
    for mine, theirs in zip(stack, (whole[0], whole[3]), strict=True):
        assert torch.equal(mine.output.dense.weight, theirs.output.dense.weight)
    assert small.history[-1].facts["kept"] == [0, 3] and not np.allclose(outputs(small), before)
    assert np.array_equal(outputs(model), before)  # a pass leaves the model it was given alone
    assert np.array_equal(outputs(student.layers((0, 1, 2, 3))(model)), before)
    assert student.layers(1)(model).history[-1].facts["kept"] == [0]
    for wrong in (0, 5, (1, 0), (4,), ()):
        with pytest.raises(BadInput, match=r"tiny has 4; keep at least one"):
            student.layers(wrong)(model)


def test_layers_of_other_families() -> None:
    for family in ("distilbert", "roberta", "electra", "mpnet"):
        model = models.load(families.tiny(family), tokenizer=families.tokenizer())
        rows = data.load(model, TEXTS, None).rows
        small, whole = (check.reference(m, rows, lambda _: None) for m in (student.layers(1)(model), model))
        assert [x.shape for x in small] == [x.shape for x in whole], family
        assert not all(np.allclose(a, b) for a, b in zip(small, whole, strict=True)), family


def test_width_keeps_what_weighs_most() -> None:
    model = classifier()
    whole: Any = model.module.module
    channels, heads, neurons = [*range(0, 32, 2)], [1, 3], [*range(1, 64, 2)]
    with torch.no_grad():  # make some matter
        words = whole.bert.embeddings.word_embeddings.weight
        for name, x in whole.named_parameters():
            if x.ndim == 2 and x.shape[1] == 32 and not name.endswith("attention.output.dense.weight"):
                x[:, channels] *= 100
        for layer in whole.bert.encoder.layer:
            layer.intermediate.dense.weight[neurons] *= 100
            for head in heads:
                layer.attention.self.value.weight[head * 8 : head * 8 + 8] *= 100
    small = student.width(16)(model)
    narrow: Any = small.module.module
    assert (narrow.config.hidden_size, narrow.config.num_attention_heads, narrow.config.intermediate_size) == (
        16,
        2,
        32,
    )
    layer, old = narrow.bert.encoder.layer[1], whole.bert.encoder.layer[1]
    assert torch.equal(narrow.bert.embeddings.word_embeddings.weight, words[:, channels])
    assert torch.equal(layer.intermediate.dense.weight, old.intermediate.dense.weight[neurons][:, channels])
    kept = [i for head in heads for i in range(head * 8, head * 8 + 8)]
    assert torch.equal(layer.attention.self.value.weight, old.attention.self.value.weight[kept][:, channels])
    assert torch.equal(layer.attention.output.dense.weight, old.attention.output.dense.weight[channels][:, kept])
    assert torch.equal(narrow.classifier.weight, whole.classifier.weight[:, channels])
    assert outputs(small).shape == (3, 3)


def test_the_full_width_changes_nothing() -> None:
    model = classifier()
    np.testing.assert_allclose(outputs(student.width(32)(model)), outputs(model), atol=1e-6)
    less = student.width(32, ffn=48)(model)
    assert less.history[-1].facts["ffn"] == 48 and not np.allclose(outputs(less), outputs(model))


def test_width_names_what_it_cannot_cut() -> None:
    for wrong, said in ((12, "multiple of the head size 8"), (0, "multiple"), (40, "at most 32")):
        with pytest.raises(BadInput, match=said):
            student.width(wrong)(classifier())
    with pytest.raises(BadInput, match="ffn 65"):
        student.width(16, ffn=65)(classifier())
    with pytest.raises(BadInput, match="not in the layout of BERT; cut layers instead"):
        student.width(16)(models.load(families.tiny("distilbert"), tokenizer=families.tokenizer()))
    plain = models.load(torch.nn.Linear(4, 4), example=(torch.zeros(1, 4),))
    with pytest.raises(BadInput, match="no transformers model"):
        student.width(16)(plain)


def test_a_smaller_vocabulary_answers_the_same_texts_the_same() -> None:
    model = classifier()
    small = student.vocabulary(TEXTS)(model)
    facts = small.history[-1].facts
    assert facts["tokens"] == 5 + 7 and facts["of"] == 197  # special ones, and w3 to w9
    np.testing.assert_array_equal(outputs(small), outputs(model))
    assert small.module.module.bert.embeddings.word_embeddings.weight.shape == (12, 32)
    assert small.module.module.config.vocab_size == 12
    assert small.tokenizer("w100")["input_ids"][1] == small.tokenizer.unk_token_id
    assert student.vocabulary(TEXTS, least=2)(model).history[-1].facts["tokens"] == 5 + 2  # w3 and w5


def test_the_tokenizer_files_of_a_smaller_vocabulary_are_whole(tmp_path: Path) -> None:
    small = student.vocabulary(TEXTS)(classifier())
    for name, content in (small.files or {}).items():
        (tmp_path / Path(name).name).write_bytes(content)
    read = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text, pair in (("w3 w9", None), ("w8 unknown", "w5 w3")):
        assert read(text, pair)["input_ids"] == small.tokenizer(text, pair)["input_ids"]
    ids = read("w3 w9")["input_ids"]
    assert read.convert_ids_to_tokens(ids) == ["[CLS]", "w3", "w9", "[SEP]"] and max(ids) < 12
    assert read.pad_token_id == next(x.pad for x in small.inputs if x.name == "input_ids")
    written = json.loads((tmp_path / "tokenizer.json").read_text())
    assert sorted(written["model"]["vocab"].values()) == list(range(12))
    assert {x["content"]: x["id"] for x in written["added_tokens"]}["[MASK]"] == written["model"]["vocab"]["[MASK]"]


def test_what_has_no_word_pieces_keeps_its_vocabulary() -> None:
    with pytest.raises(BadInput, match="has no tokenizer"):
        student.vocabulary(TEXTS)(replace(classifier(), tokenizer=None))


def test_positions_and_embeddings() -> None:
    model = classifier()
    short = student.positions(8)(model)
    assert short.lengths == (8,) and short.max_length == 8
    np.testing.assert_allclose(outputs(short), outputs(model), atol=1e-6)
    with pytest.raises(BadInput, match="takes up to 16 tokens"):
        student.positions(17)(model)

    table = model.module.module.bert.embeddings.word_embeddings.weight
    with torch.no_grad():
        table.copy_(torch.randn(200, 4) @ torch.randn(4, 32))  # of rank 4
    factors = student.embeddings(4)(model)
    np.testing.assert_allclose(outputs(factors), outputs(model), atol=1e-3)
    assert factors.history[-1].facts["energy"] == 1.0
    both = student.vocabulary(TEXTS)(factors)
    np.testing.assert_allclose(outputs(both), outputs(factors), atol=1e-5)
    for wrong in (0, 32):
        with pytest.raises(BadInput, match=f"rank {wrong}"):
            student.embeddings(wrong)(model)


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "litert"])
def test_students_export_and_answer_as_in_torch(format: str) -> None:
    pytest.importorskip({"onnx": "onnx", "litert": "litert_torch"}[format])
    model = cut(
        student.layers(2), student.width(16), student.vocabulary(TEXTS), student.positions(12), student.embeddings(8)
    )
    assert [step.name for step in model.history[1:]] == [
        f"student.{name}" for name in ("layers", "width", "vocabulary", "positions", "embeddings")
    ]
    rows = data.load(model, TEXTS, None).rows
    wanted = check.reference(model, rows, lambda _: None)
    limits = {"fp32": 0.9999, "int8": check.DEFAULT_GATE.agreement}
    for program in formats.load(format).export(model, tuple(limits)):
        found = check.fidelity(model, check.run(program, described(program), rows, lambda _: None), wanted, None)
        assert found.worst > limits[program.precision] - 0.08 * (program.precision == "int8"), program.name
        check.hold(program.name, found, check.gate(None))
