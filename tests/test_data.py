"""Rows: every form of data, cut and thinned as said, and a message with the line where a file is wrong."""

import io
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest

torch = pytest.importorskip("torch")
hf = pytest.importorskip("transformers")

from edgeformer import check, data, model as models  # noqa: E402
from edgeformer.data import load  # noqa: E402
from edgeformer.errors import BadInput  # noqa: E402
from edgeformer.model import Model  # noqa: E402

LABELLED = "classification"


def head(num_labels: int) -> Model:
    config = hf.BertConfig(**families.TEXT, num_labels=num_labels)
    return models.load(
        hf.BertForSequenceClassification(config), tokenizer=families.tokenizer(), lengths=(8, 16), name="head"
    )


@pytest.fixture(scope="module")
def embedding() -> Model:
    return models.load(families.tiny("bert"), tokenizer=families.tokenizer(), lengths=(8, 16), name="tiny")


@pytest.fixture(scope="module")
def classes() -> Model:
    return head(3)


@pytest.fixture(scope="module")
def regression() -> Model:
    return head(1)


@pytest.fixture(scope="module")
def vit() -> Model:
    return models.load(families.tiny("vit"))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "rows.tsv"


def ids(rows: data.Rows) -> list[list[int]]:
    return [row["input_ids"].tolist() for row in rows.rows]


def words(*numbers: int) -> str:
    return " ".join(f"w{n}" for n in numbers)


def text(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines), "utf-8")
    return path


# --- texts --------------------------------------------------------------------------------------------------------


def test_texts(embedding: Model, tmp_path: Path) -> None:
    wanted = [[2, 5, 6, 3], [2, 7, 3]]
    given = load(embedding, ["w3 w4", "", "  ", "w5"], None)
    path = text(tmp_path / "a.txt", "w3 w4", "", "  ", "w5")
    for rows in (given, load(embedding, path, None), load(embedding, str(path), None)):
        assert ids(rows) == wanted and rows.labels is None and rows.task is None
    assert given.source == "texts given by the caller"
    row = given.rows[0]
    assert list(row) == [x.name for x in embedding.inputs]
    assert {a.dtype.name for a in row.values()} == {"int32"} and {a.shape for a in row.values()} == {(4,)}
    assert row["attention_mask"].tolist() == [1] * 4 and row["token_type_ids"].tolist() == [0] * 4


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_line_ends_and_byte_order_mark(embedding: Model, tmp_path: Path, end: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + end.join(["w3", "w4\u2028w5"]).encode())
    assert ids(load(embedding, path, None)) == [[2, 5, 3], [2, 6, 7, 3]]  # neither [UNK] nor a third row
    assert data._lines(path)[0] == "w3"  # some tokenizers drop the mark by themselves


def test_a_txt_may_hold_tabs_and_any_suffix(embedding: Model, file: Path) -> None:
    assert ids(load(embedding, text(file, "w3\tw4"), None)) == [[2, 5, 6, 3]]


def test_the_sample(embedding: Model) -> None:
    rows = load(embedding, None, None)
    assert rows.source == "sample texts of the package" and len(rows.rows) > 30
    assert max(len(x) for x in ids(rows)) == 16


def test_rows_are_cut_at_the_limit(embedding: Model, regression: Model, file: Path) -> None:
    long = words(*range(3, 40))
    (row,) = ids(load(embedding, [long], None))
    assert row == [2, *range(5, 19), 3]
    (pair,) = load(regression, text(file, f"{long}\tw9 w9\t1"), "similarity").rows
    assert len(pair["input_ids"]) == 16
    assert pair["input_ids"].tolist()[-4:] == [3, 11, 11, 3]  # the longer text is cut first
    assert pair["token_type_ids"].tolist()[-4:] == [0, 1, 1, 1]


@pytest.mark.parametrize("content", ["", "\n\n  \n"])
def test_empty_files(embedding: Model, classes: Model, tmp_path: Path, content: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text(content)
    with pytest.raises(BadInput, match=r"a.txt sha256:\w+: no text in it; one a line"):
        load(embedding, path, None)
    path.write_text("text\tlabel\n" if content else "")
    with pytest.raises(BadInput, match=r"a.txt holds no rows"):
        load(classes, path, LABELLED)
    with pytest.raises(BadInput, match="no text in it"):
        load(embedding, [], None)


@pytest.mark.parametrize("content", [b"\xff\xfew\x003\x00", b"caf\xe9\t1\n", bytes(range(256)), b"\x89PNG\r\n\x1a\n"])
def test_other_encodings_and_binary_files(embedding: Model, classes: Model, file: Path, content: bytes) -> None:
    file.write_bytes(content)
    for model, task in ((embedding, None), (classes, LABELLED)):
        with pytest.raises(BadInput, match=r"rows.tsv is not UTF-8 text: .* at byte \d+"):
            load(model, file, task)


def test_a_field_without_end(classes: Model, file: Path) -> None:
    with pytest.raises(BadInput, match="not a table"):
        load(classes, text(file, "w" * 200_000 + "\t1"), LABELLED)


@pytest.mark.parametrize("name", ["none.txt", "none.npz", "."])
def test_no_file(embedding: Model, tmp_path: Path, name: str) -> None:
    with pytest.raises(BadInput, match=r"no file .* to check the programs with"):
        load(embedding, tmp_path / name, None)


def test_texts_need_a_tokenizer(vit: Model, classes: Model, file: Path) -> None:
    bare = models.load(families.tiny("bert"))
    with pytest.raises(BadInput, match=r"bertmodel has no tokenizer .*give rows as .npz"):
        load(bare, ["w3"], None)
    with pytest.raises(BadInput, match="has no tokenizer"):
        load(vit, text(file, "w3\t1"), LABELLED)


def test_a_tokenizer_without_segments(classes: Model) -> None:
    tokenizer = families.tokenizer()
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    (row,) = load(models.replace(classes, tokenizer=tokenizer), ["w3 w4"], None).rows
    assert row["token_type_ids"].tolist() == [0] * 4
    tokenizer.model_input_names = ["input_ids"]
    with pytest.raises(BadInput, match="the tokenizer gives no attention_mask"):
        load(models.replace(classes, tokenizer=tokenizer), ["w3"], None)


# --- labels -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", ["sentence\tlabel", "label", "a\tb\tc", None])
@pytest.mark.parametrize("task", ["classification", "sst2"])
def test_classes(classes: Model, file: Path, header: str | None, task: str) -> None:
    lines = ["w3 w4\t2", "", "w5\t0", "w6\t1.0"]
    rows = load(classes, text(file, *([header] if header else []), *lines), task)
    assert ids(rows) == [[2, 5, 6, 3], [2, 7, 3], [2, 8, 3]]
    assert rows.labels is not None and rows.labels.tolist() == [2, 0, 1] and rows.labels.dtype == np.float32
    assert rows.task == classes.task._replace(metric="accuracy") and not rows.task.paired
    judged = data.with_task(classes, rows)
    assert judged.task == rows.task and judged.module is classes.module
    assert data.with_task(classes, load(classes, ["w3"], None)) is classes


def test_quotes_are_text(classes: Model, file: Path) -> None:
    rows = load(classes, text(file, '"w3 w4\t1', 'w5" ""w6\t2', '"w7"\t0'), LABELLED)
    assert [len(x) for x in ids(rows)] == [5, 7, 5]  # a quote is a token of its own; no row swallows the next
    assert ids(rows)[0] == [2, 1, 5, 6, 3]


@pytest.mark.parametrize("task", ["similarity", "stsb"])
def test_pairs_by_a_head_and_by_two_embeddings(embedding: Model, regression: Model, file: Path, task: str) -> None:
    path = text(file, "a\tb\tscore", "w3\tw4 w5\t4.5", "w6\tw7\t0")
    together = load(regression, path, task)
    assert ids(together) == [[2, 5, 3, 6, 7, 3], [2, 8, 3, 9, 3]]
    assert together.rows[0]["token_type_ids"].tolist() == [0, 0, 0, 1, 1, 1]
    assert together.task == regression.task._replace(metric="spearman", paired=False)
    apart = load(embedding, path, task)
    assert ids(apart) == [[2, 5, 3], [2, 6, 7, 3], [2, 8, 3], [2, 9, 3]]
    assert apart.task == embedding.task._replace(metric="spearman", paired=True)
    for rows in (together, apart):
        assert rows.labels is not None and rows.labels.tolist() == [4.5, 0]


@pytest.mark.parametrize(
    ("lines", "line"),
    [
        (["w3\t1", "w4\tpos"], 2),
        (["text\tlabel", "w3\t1", "", "w4\tpos"], 4),  # the line of the file, past header and gaps
        (["text\tlabel", "w3\t1", "w4"], 3),
        (["w3\t1", "w4\t1\t1"], 2),
        (["w3\t1", "w4\tnan"], 2),
        (["w3\t1", "w4\tinf"], 2),
        (["w3\t1", "w4\t"], 2),
        (["w3\t1", "w4 1"], 2),
        (["text\tlabel", "text\tlabel"], 2),  # one header
    ],
)
def test_a_bad_row_is_named(classes: Model, file: Path, lines: list[str], line: int) -> None:
    with pytest.raises(BadInput, match=rf"rows.tsv, line {line}: task 'classification' needs 1 text column\(s\) and"):
        load(classes, text(file, *lines), LABELLED)


@pytest.mark.parametrize("label", ["3", "-1", "0.5", "1e9"])
def test_labels_out_of_range(classes: Model, file: Path, label: str) -> None:
    with pytest.raises(BadInput, match=r"labels .* do not fit a head with 3 classes"):
        load(classes, text(file, "w3\t1", f"w4\t{label}"), LABELLED)


@pytest.mark.parametrize(
    ("model", "task"), [("embedding", "sst2"), ("regression", "sst2"), ("classes", "stsb"), ("vit", "stsb")]
)
def test_a_task_the_model_cannot_answer(model: str, task: str, file: Path, request: pytest.FixtureRequest) -> None:
    path = text(file, "w3\t1" if data.TABLES[task] == 1 else "w3\tw4\t1")
    with pytest.raises(BadInput, match=rf"task '{task}' does not go with a model whose output is "):
        load(request.getfixturevalue(model), path, task)


def test_unknown_tasks_and_tasks_without_labels(classes: Model, tmp_path: Path) -> None:
    with pytest.raises(
        BadInput, match=r"no task 'ner'; known: classification, cola, lambada, longtech, similarity, squad, sst2"
    ):
        load(classes, None, "ner")
    (tmp_path / "a.npz").write_bytes(b"")
    for unlabelled in (None, ["w3"], tmp_path / "a.npz"):
        with pytest.raises(BadInput, match=r"task 'sst2' needs labelled data: a .tsv file"):
            load(classes, unlabelled, "sst2")


# --- how many -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "most"), [(10, 3), (10, 9), (7, 2), (1000, 7), (5, 5), (3, 9), (1, 1)])
def test_thinning_is_even(count: int, most: int) -> None:
    kept = data.thin(list(range(count)), most)
    assert len(kept) == min(count, most) == len(set(kept)) and kept == sorted(kept) and kept[0] == 0
    gaps = np.diff([*kept, count])
    assert gaps.max() - gaps.min() <= 1


def test_thinned_rows_keep_their_labels(classes: Model, file: Path) -> None:
    rows = load(classes, text(file, *(f"w{10 + i}\t{i % 3}" for i in range(40))), LABELLED, most=11)
    assert len(rows.rows) == 11 and rows.labels is not None
    assert [(row[1] - 12) % 3 for row in ids(rows)] == rows.labels.tolist()


def test_thinned_pairs_stay_pairs(embedding: Model, file: Path) -> None:
    """`most` counts labels: a pair is one, though it is two rows."""
    path = text(file, *(f"w{10 + i}\tw{100 + i}\t{i}" for i in range(40)))
    rows = load(embedding, path, "stsb", most=7)
    assert len(rows.rows) == 14 and rows.labels is not None and len(rows.labels) == 7
    for (left, right), label in zip(zip(ids(rows)[::2], ids(rows)[1::2], strict=True), rows.labels, strict=True):
        assert (left[1] - 12, right[1] - 102) == (label, label)


def test_the_default_limit(embedding: Model, tmp_path: Path) -> None:
    assert data.MAX_ROWS == 1000
    lines = [f"w{3 + i % 190}" for i in range(1500)]
    assert len(load(embedding, lines, None).rows) == 1000
    assert len(load(embedding, text(tmp_path / "a.txt", *lines), None).rows) == 1000
    pairs = text(tmp_path / "a.tsv", *(f"{a}\tw9\t1" for a in lines[:1200]))
    assert len(load(embedding, pairs, "stsb").rows) == 2000
    assert len(load(embedding, lines[:1000], None, most=10**6).rows) == 1000


# --- arrays -------------------------------------------------------------------------------------------------------


def packed(path: Path, **arrays: Any) -> Path:
    path = path.with_suffix(".npz")
    np.savez(path, **arrays)
    return path


def tokens(count: int, length: int, **changes: Any) -> dict[str, np.ndarray]:
    names = ("input_ids", "attention_mask", "token_type_ids")
    return {n: np.arange(count * length).reshape(count, length) + 3 for n in names} | changes


def test_arrays(embedding: Model, vit: Model, file: Path) -> None:
    images = np.random.default_rng(0).standard_normal((5, 3, 32, 32))
    rows = load(vit, packed(file, pixel_values=images, other=np.ones(3)), None)
    assert len(rows.rows) == 5 and rows.labels is None and list(rows.rows[0]) == ["pixel_values"]
    assert rows.rows[4]["pixel_values"].dtype == np.float32
    np.testing.assert_allclose(rows.rows[4]["pixel_values"], images[4].astype(np.float32))
    assert len(load(vit, packed(file, pixel_values=images), None, most=2).rows) == 2
    whole = load(vit, packed(file, pixel_values=np.full((1, 3, 32, 32), 255, np.uint8)), None)
    assert whole.rows[0]["pixel_values"].dtype == np.float32
    text_rows = load(embedding, packed(file, **tokens(2, 6)), None)
    assert [a.dtype.name for a in text_rows.rows[0].values()] == ["int32"] * 3
    assert text_rows.rows[1]["input_ids"].tolist() == [9, 10, 11, 12, 13, 14]


def test_arrays_are_cut_at_the_limit(embedding: Model, file: Path) -> None:
    rows = load(embedding, packed(file, **tokens(2, 40)), None)
    assert {a.shape for row in rows.rows for a in row.values()} == {(16,)}
    assert rows.rows[0]["input_ids"].tolist() == list(range(3, 19))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"attention_mask": np.ones((3, 6))}, "float64"),  # would be cut to whole numbers
        ({"attention_mask": np.ones((4, 6), int)}, r"same number of rows, at least one, got .*'attention_mask': 4"),
        ({"token_type_ids": np.ones((0, 6), int)}, "same number of rows"),
        ({"input_ids": np.ones(3, int)}, r"rows of input_ids have shape \(\), the model takes \(-1,\)"),
        ({"input_ids": np.ones((3, 6, 1), int)}, r"have shape \(6, 1\)"),
        ({"input_ids": np.array([["a"] * 6] * 3)}, "needs an array for each input"),
        ({"input_ids": np.array([None])}, "needs an array for each input"),
    ],
)
def test_arrays_that_do_not_fit(embedding: Model, file: Path, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(BadInput, match=says):
        load(embedding, packed(file, **tokens(3, 6, **changes)), None)


def test_arrays_without_a_row_or_an_input(embedding: Model, vit: Model, file: Path) -> None:
    with pytest.raises(BadInput, match=r"needs an array for each input \['input_ids', .*token_type_ids"):
        load(embedding, packed(file, input_ids=np.ones((1, 4), int), attention_mask=np.ones((1, 4), int)), None)
    with pytest.raises(BadInput, match="at least one"):
        load(vit, packed(file, pixel_values=np.ones((0, 3, 32, 32))), None)
    with pytest.raises(BadInput, match=r"shape \(3, 32, 31\), the model takes \(3, 32, 32\)"):
        load(vit, packed(file, pixel_values=np.ones((1, 3, 32, 31))), None)


def npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.ones((1, 3, 32, 32)))
    return buffer.getvalue()


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"text", b"\x80\x04N.", npy()])
def test_files_that_are_no_npz(vit: Model, file: Path, content: bytes) -> None:
    path = file.with_suffix(".npz")
    path.write_bytes(content)
    with pytest.raises(BadInput, match=r"rows.npz needs an array for each input"):
        load(vit, path, None)


# --- made up ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", families.NAMES)
def test_synthetic_rows_are_valid_and_the_same_each_time(family: str) -> None:
    model = models.load(families.tiny(family))
    rows, again = load(model, None, None), load(model, None, None)
    assert rows.source == "synthetic noise, seed 0" and rows.labels is None
    assert len(rows.rows) == data.SYNTHETIC_ROWS == 32
    for row, other in zip(rows.rows, again.rows, strict=True):
        assert list(row) == [x.name for x in model.inputs]
        for x in model.inputs:
            np.testing.assert_array_equal(row[x.name], other[x.name])
            assert row[x.name].dtype == x.dtype
    lengths = [len(row["input_ids"]) for row in rows.rows if "input_ids" in row]
    if lengths:
        assert (min(lengths), max(lengths)) == (4, model.max_length) and len(set(lengths)) > 25
        assert {int(v) for row in rows.rows for v in row["attention_mask"]} == {1}
        seen = np.concatenate([row["input_ids"] for row in rows.rows])
        assert seen.min() >= 3 and seen.max() < 200 and len(np.unique(seen)) > 100  # no special token
    outputs = [output.ravel() for output in check.reference(model, rows.rows, lambda _: None)]
    assert (
        all(np.isfinite(output).all() for output in outputs) and len({float(x[0]) for x in outputs}) == 32
    )  # rows that differ


def test_synthetic_rows_of_short_models_and_plain_modules() -> None:
    short = models.load(families.tiny("bert"), lengths=(2,))
    assert {len(row["input_ids"]) for row in load(short, None, None).rows} == {2}
    plain = models.load(torch.nn.Linear(3, 2), example=(torch.ones(1, 3),))
    rows = load(plain, None, None)
    assert {row["x0"].shape for row in rows.rows} == {(3,)} and rows.rows[0]["x0"].dtype == np.float32


def test_a_source_is_content_and_name_and_never_a_path(classes: Model, vit: Model, tmp_path: Path) -> None:
    folder = tmp_path / "secret project"
    folder.mkdir()
    npz = packed(folder / "b", pixel_values=np.ones((1, 3, 32, 32)))
    first = load(classes, text(folder / "a.txt", "w3"), None).source
    assert first == "a.txt sha256:" + first[-16:] and set(first[-16:]) <= set("0123456789abcdef")
    sources = [load(classes, text(folder / "a.tsv", "w3\t1"), LABELLED).source, load(vit, npz, None).source]
    sources += [first, load(classes, None, None).source, load(vit, None, None).source]
    assert not any("/" in s or "secret" in s for s in sources)
    assert load(classes, text(folder / "a.txt", "w4"), None).source != first
    assert load(classes, text(tmp_path / "a.txt", "w3"), None).source == first
