"""
Labelled data in the files it is published in, as rows of a model's inputs with what judges them.

Each reader takes the model, the file's lines and how many rows there may be, and gives `Judged`. Raises BadInput with
the line or entry that is wrong.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from edgeformer_agent import score, wire
from edgeformer_agent.cases import Row

from .errors import BadInput
from .model import Model


class Judged(NamedTuple):
    """Rows, a label for each (what it is: `score.metric`), and the model's task with its metric."""

    rows: tuple[Row, ...]
    labels: Sequence[Any]
    task: wire.Task


def squad(model: Model, lines: list[str], most: int) -> Judged:
    """
    SQuAD's own JSON (version 1.1; questions of 2.0 without an answer are left out). A question that does not fit with
    its text into the model's limit loses the end of the text: the answer may be in it.
    """
    found = thin(list(_questions("\n".join(lines))), most)
    rows, labels = [], []
    for question, context, answers in found:
        encoded = _encoded(model, question, context, truncation="only_second", return_offsets_mapping=True)
        segments = encoded.sequence_ids()
        offsets = [list(at) if segment == 1 else [0, 0] for at, segment in zip(encoded["offset_mapping"], segments)]  # noqa: B905
        rows.append(_row(model, encoded))
        labels.append(score.answer_label(context, offsets, answers))
    return Judged(tuple(rows), labels, model.task._replace(metric="f1"))


def _questions(text: str) -> Iterator[tuple[str, str, list[str]]]:
    try:
        for article in json.loads(text)["data"]:
            for paragraph in article["paragraphs"]:
                for asked in paragraph["qas"]:
                    if answers := [answer["text"] for answer in asked["answers"]]:
                        yield asked["question"], paragraph["context"], answers
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(
            f"not a file of SQuAD (data, paragraphs, qas, answers): {type(error).__name__}: {error}"
        ) from error


def lambada(model: Model, lines: list[str], most: int) -> Judged:
    """
    Lines {"text": ...}: a passage whose last word is to be told. A word of several tokens is as many rows, each with
    the right tokens before it, and the passage is right if all of them are: what greedy decoding of the word would be.
    """
    passages = []
    for number, record in _records(lines, "text"):
        whole, before = (_ids(model, text) for text in (record["text"].rstrip(), _without_last_word(record["text"])))
        first = next((i for i, (a, b) in enumerate(zip(whole, before)) if a != b), len(before))  # noqa: B905
        if not _without_last_word(record["text"]) or not 0 < first < len(whole):
            raise BadInput(f"line {number}: no last word to tell in {record['text'][:60]!r}")
        passages.append([(whole[max(0, i - model.max_length) : i], whole[i]) for i in range(first, len(whole))])
    total = sum(map(len, passages))
    kept = thin(passages, max(1, most * len(passages) // max(total, 1))) if total > most else passages
    numbered = [(n, ids, token) for n, tokens in enumerate(kept) for ids, token in tokens]
    rows = tuple(_of_ids(model, ids) for _, ids, _ in numbered)
    labels = [np.asarray([n, token], np.int32) for n, _, token in numbered]
    return Judged(rows, labels, model.task._replace(metric="accuracy"))


def _without_last_word(text: str) -> str:
    return text.rstrip().rpartition(" ")[0]


def tokens(model: Model, lines: list[str], most: int) -> Judged:
    """
    Words with a label each: lines `word<TAB>label` with an empty line after a sentence (CoNLL), or lines {"tokens":
    [...], "labels": [...]}. The first token of a word is judged; further ones and special tokens are not.
    """
    sentences = thin(list(_json_sentences(lines) if lines[0].startswith("{") else _conll(lines)), most)
    known = {name: i for i, name in enumerate(model.task.labels)}
    rows, labels = [], []
    for number, words, tags in sentences:
        if unknown := sorted({str(tag) for tag in tags} - {*known, *map(str, known.values())}):
            raise BadInput(f"line {number}: label {unknown[0]!r} is none of the model's: {', '.join(known)}")
        encoded = _encoded(model, words, is_split_into_words=True, truncation=True)
        places = encoded.word_ids()
        firsts = [place is not None and place != before for place, before in zip(places, [None, *places])]  # noqa: B905
        wanted = [known.get(str(tag)) for tag in tags]
        wanted = [int(tag) if at is None else at for tag, at in zip(tags, wanted, strict=True)]
        rows.append(_row(model, encoded))
        labels.append(
            np.asarray([wanted[p] if f else score.IGNORED for p, f in zip(places, firsts, strict=True)], np.int32)
        )
    return Judged(tuple(rows), labels, model.task._replace(metric="accuracy"))


def _conll(lines: list[str]) -> Iterator[tuple[int, list[str], list[str]]]:
    words: list[str] = []
    tags: list[str] = []
    for number, line in enumerate([*lines, ""], 1):
        if not line.strip():
            if words:
                yield number - len(words), words, tags
            words, tags = [], []
            continue
        fields = line.split("\t") if "\t" in line else line.split()
        if fields[0] == "-DOCSTART-":
            continue
        if len(fields) < 2:
            raise BadInput(f"line {number}: a word, a tab and its label are expected, got {line[:60]!r}")
        words.append(fields[0])
        tags.append(fields[-1])


def _json_sentences(lines: list[str]) -> Iterator[tuple[int, list[str], list[Any]]]:
    for number, record in _records(lines, "tokens", "labels"):
        if not record["tokens"] or len(record["tokens"]) != len(record["labels"]):
            raise BadInput(f"line {number}: {len(record['tokens'])} tokens have {len(record['labels'])} labels")
        yield number, record["tokens"], record["labels"]


def _records(lines: list[str], *keys: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise BadInput(f"line {number} is not JSON: {error}") from error
        if not isinstance(record, dict) or not set(keys) <= set(record):
            raise BadInput(f"line {number}: an object with {', '.join(keys)} is expected, got {line[:60]!r}")
        yield number, record


# --- the model's tokenizer --------------------------------------------------------------------------------------------


def _encoded(model: Model, *texts: Any, **options: Any) -> Any:
    if not getattr(model.tokenizer, "is_fast", False):
        raise BadInput(
            f"{model.name} needs a fast tokenizer (tokenizer.json): words and answers are found by its offsets"
        )
    return model.tokenizer(*texts, max_length=model.max_length, **options)


def _row(model: Model, encoded: Any) -> Row:
    zeros = [0] * len(encoded["input_ids"])
    return {x.name: np.asarray(encoded.get(x.name, zeros), x.dtype) for x in model.inputs}


def _ids(model: Model, text: str) -> list[int]:
    """Without what a tokenizer puts after a text: the text goes on."""
    ids: list[int] = model.tokenizer(text)["input_ids"]
    return ids[:-1] if ids and ids[-1] == getattr(model.tokenizer, "eos_token_id", None) else ids


def _of_ids(model: Model, ids: list[int]) -> Row:
    return {x.name: np.asarray(ids if x.name == "input_ids" else [1] * len(ids), x.dtype) for x in model.inputs}


def thin(items: list[Any], most: int) -> list[Any]:
    """At most `most` of them, evenly spread."""
    if len(items) <= most:
        return items
    return [items[i * len(items) // most] for i in range(most)]


READERS: dict[str, tuple[str, Callable[[Model, list[str], int], Judged]]] = {  # task -> the kind of model, the reader
    "squad": ("question_answering", squad),
    "lambada": ("next_token", lambada),
    "tokens": ("token_classification", tokens),
}
