"""Labelled files: what each holds becomes rows and what judges them, and a message names the line that is wrong."""

import json
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest

torch = pytest.importorskip("torch")

from edgeformer import data  # noqa: E402
from edgeformer.errors import BadInput  # noqa: E402
from edgeformer.model import Model, load  # noqa: E402
from edgeformer_agent import cases, score, wire  # noqa: E402


def model(family: str, **options: Any) -> Model:
    return load(families.tiny(family), tokenizer=families.tokenizer(), **options)


def written(path: Path, *lines: Any) -> Path:
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines), "utf-8")
    return path


def squad(*paragraphs: tuple[str, list[tuple[str, list[str]]]]) -> dict[str, Any]:
    made = [
        {
            "context": context,
            "qas": [{"id": "x", "question": q, "answers": [{"text": a, "answer_start": 0} for a in answers]}
                    for q, answers in asked],
        }
        for context, asked in paragraphs
    ]  # fmt: skip
    return {"version": "1.1", "data": [{"title": "t", "paragraphs": made}]}


def test_questions(tmp_path: Path) -> None:
    """[CLS] question [SEP] text [SEP]; a question without an answer is left out."""
    body = squad(("w7 w8, w9", [("w3 w4", ["w8", "w8, w9"]), ("w5", [])]))
    rows = data.load(model("distilbert"), written(tmp_path / "dev.json", body), "squad")
    assert rows.task == wire.Task("question_answering", "f1") and len(rows.rows) == 1
    assert rows.rows[0]["input_ids"].tolist() == [2, 5, 6, 3, 9, 10, 1, 11, 3]
    said = json.loads(bytes(rows.labels[0]))
    assert said["offsets"] == [[0, 0]] * 4 + [[0, 2], [3, 5], [5, 6], [7, 9], [0, 0]]
    assert said["answers"] == ["w8", "w8, w9"]
    logits = np.zeros((9, 2))
    logits[5, 0] = logits[7, 1] = 9
    assert score.metric(rows.task._replace(metric="exact_match"), [logits], rows.labels) == 1


def test_a_long_text_loses_its_end(tmp_path: Path) -> None:
    body = squad((" ".join(f"w{i}" for i in range(3, 60)), [("w3", ["w59"])]))
    rows = data.load(model("distilbert", lengths=(16,)), written(tmp_path / "dev.json", body), "squad")
    assert rows.rows[0]["input_ids"].shape == (16,)
    assert score.metric(rows.task, [np.zeros((16, 2))], rows.labels) == 0


TAGGED = [{"tokens": ["w3", "w4,w5"], "labels": ["B-PER", 2]}, {"tokens": ["w6"], "labels": ["O"]}]
CONLL = ["-DOCSTART-\tO", "", "w3\tB-PER", "w4,w5\tI-PER", "", "w6 NN x O"]


@pytest.mark.parametrize(("name", "lines"), [("a.jsonl", TAGGED), ("a.tsv", CONLL), ("a.tsv", [*CONLL, "", ""])])
def test_words_with_labels(tmp_path: Path, name: str, lines: list[Any]) -> None:
    """The first token of a word has its label."""
    rows = data.load(model("electra"), written(tmp_path / name, *lines), "tokens")
    assert [row["input_ids"].tolist() for row in rows.rows] == [[2, 5, 6, 1, 7, 3], [2, 8, 3]]
    no = score.IGNORED
    assert [x.tolist() for x in rows.labels] == [[no, 1, 2, no, no, no], [no, 0, no]]
    assert rows.task == wire.Task("token_classification", "accuracy", False, ("O", "B-PER", "I-PER"))


def test_the_last_word_is_told_token_by_token(tmp_path: Path) -> None:
    path = written(tmp_path / "a.jsonl", {"text": "w3 w4 w5,w6\n"}, {"text": "w7 w8"})
    llama = model("llama")
    llama.tokenizer.backend_tokenizer.post_processor = None  # decoders have no [SEP]
    rows = data.load(llama, path, "lambada")
    assert [row["input_ids"].tolist() for row in rows.rows] == [[5, 6], [5, 6, 7], [5, 6, 7, 1], [9]]
    assert [x.tolist() for x in rows.labels] == [[0, 7], [0, 1], [0, 8], [1, 10]]
    assert rows.task == wire.Task("next_token", "accuracy")
    few = data.load(llama, path, "lambada", most=3)  # whole passages
    assert [x.tolist() for x in few.labels] == [[0, 7], [0, 1], [0, 8]]


def test_few_rows_of_a_large_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "REFERENCE_BYTES", 4 * 200 * 5)
    assert len(data.load(model("llama"), ["w3", "w4"] * 20, None).rows) == 5


def test_labels_that_are_arrays_travel(tmp_path: Path) -> None:
    rows = data.load(model("electra"), written(tmp_path / "a.jsonl", *TAGGED), "tokens")
    path = tmp_path / "evaluation.npz"
    path.write_bytes(cases.dump(cases.Cases(rows.rows, {"reference": rows.labels}, rows.labels)))
    again = cases.load(str(path))
    assert [x.tolist() for x in again.labels] == [x.tolist() for x in rows.labels]
    short = cases.Cases(rows.rows, {}, rows.labels[:1])
    path.write_bytes(cases.dump(short))
    with pytest.raises(ValueError, match="same number of rows"):
        cases.load(str(path))


@pytest.mark.parametrize(
    ("family", "task", "lines", "message"),
    [
        ("distilbert", "squad", ["{"], "not a file of SQuAD"),
        ("distilbert", "squad", [{"data": [{}]}], "not a file of SQuAD .*KeyError"),
        ("distilbert", "squad", [squad(("w3", []))], "holds no rows"),
        ("distilbert", "squad", [" "], "holds no rows"),
        ("electra", "tokens", [TAGGED[0], {"tokens": ["w3"], "labels": []}], "line 2: 1 tokens have 0 labels"),
        ("electra", "tokens", [TAGGED[0], {"tokens": ["w3"], "labels": ["B-LOC"]}], "line 2: label 'B-LOC' is none"),
        ("electra", "tokens", [TAGGED[0], "{"], "line 2 is not JSON"),
        ("electra", "tokens", ["w3\tO", "w4"], "line 2: a word, a tab and its label"),
        ("llama", "lambada", [{"text": "w3 w4"}, {"txt": ""}], "line 2: an object with text"),
        ("llama", "lambada", [{"text": "w3"}], "line 1: no last word"),
        ("llama", "squad", ["{}"], r"task 'squad' does not go with .* \(next token\)"),
        ("electra", "lambada", ["{}"], "does not go with"),
    ],
)
def test_what_is_wrong_is_named(family: str, task: str, lines: list[Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=message):
        data.load(model(family), written(tmp_path / "a.file", *lines), task)
