"""The cases file: what goes in comes out, the same cases are the same bytes, and nothing else is taken for one."""

import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeformer_agent import cases

TEXT = cases.Cases(
    rows=tuple(
        {"input_ids": np.arange(n, dtype=np.int32) + n, "attention_mask": np.ones(n, np.int32)} for n in (5, 1, 3)
    ),
    outputs={
        "onnx-int8": tuple(np.full(2, i, np.float32) for i in range(3)),
        "litert-fp32": tuple(np.float32([i, -i, np.nan]) for i in range(3)),
    },
    labels=np.float32([1, 0, 1]),
)
IMAGES = cases.Cases(
    rows=tuple(
        {"pixel_values": np.random.default_rng(i).standard_normal((3, 4, 2)).astype(np.float32)} for i in (0, 1)
    ),
    outputs={"reference": (np.float32([1]), np.float32([2]))},
    labels=None,
)


def stored(folder: Path, data: bytes) -> cases.Cases:
    path = folder / "cases.npz"
    path.write_bytes(data)
    return cases.load(str(path))


def arrays(made: cases.Cases) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(cases.dump(made))) as found:
        return {name: found[name] for name in found.files}


def packed(**changes: Any) -> bytes:
    """TEXT with other arrays; None takes one out. `.` is written as `__`."""
    new = {name.replace("__", "."): array for name, array in changes.items()}
    kept = {name: array for name, array in {**arrays(TEXT), **new}.items() if array is not None}
    buffer = io.BytesIO()
    np.savez(buffer, **kept)
    return buffer.getvalue()


@pytest.mark.parametrize("made", [TEXT, IMAGES], ids=["ragged", "images"])
def test_round_trip(made: cases.Cases, tmp_path: Path) -> None:
    again = stored(tmp_path, cases.dump(made))
    assert len(again.rows) == len(made.rows) and again.outputs.keys() == made.outputs.keys()
    lists = [(again.rows[i], made.rows[i]) for i in range(len(made.rows))]
    lists += [(dict(enumerate(again.outputs[k])), dict(enumerate(made.outputs[k]))) for k in made.outputs]
    for found, wanted in lists:
        assert found.keys() == wanted.keys()
        for key, array in wanted.items():
            np.testing.assert_array_equal(found[key], array)
            assert found[key].dtype == array.dtype and found[key].shape == array.shape
    if made.labels is None:
        assert again.labels is None
    else:
        np.testing.assert_array_equal(again.labels, made.labels)
    assert cases.dump(again) == cases.dump(made)


def test_the_layout_of_the_file() -> None:
    """Readers in other languages hold on to this."""
    found = arrays(TEXT)
    assert sorted(found) == [
        "input.attention_mask.shapes", "input.attention_mask.values", "input.input_ids.shapes",
        "input.input_ids.values", "labels", "output.litert-fp32.shapes", "output.litert-fp32.values",
        "output.onnx-int8.shapes", "output.onnx-int8.values",
    ]  # fmt: skip
    assert found["input.input_ids.values"].tolist() == [5, 6, 7, 8, 9, 1, 3, 4, 5]
    assert found["input.input_ids.shapes"].tolist() == [[5], [1], [3]]
    assert arrays(IMAGES)["input.pixel_values.shapes"].tolist() == [[3, 4, 2]] * 2
    assert found["labels"].dtype == np.float32 and found["input.input_ids.shapes"].dtype == np.int32


def test_scalars_are_rows_without_axes(tmp_path: Path) -> None:
    row = {"x": np.asarray(3, np.int32)}
    again = stored(tmp_path, cases.dump(cases.Cases((row, row), {}, None)))
    assert [r["x"].shape for r in again.rows] == [(), ()] and int(again.rows[1]["x"]) == 3


def test_the_same_cases_are_the_same_bytes() -> None:
    first = cases.dump(TEXT)
    other_order = cases.Cases(
        tuple(dict(reversed(row.items())) for row in TEXT.rows), dict(reversed(TEXT.outputs.items())), TEXT.labels
    )
    assert cases.dump(TEXT) == first
    assert cases.dump(other_order) == first
    times = {member.date_time for member in zipfile.ZipFile(io.BytesIO(first)).infolist()}
    assert times == {(1980, 1, 1, 0, 0, 0)}  # no clock in it
    assert cases.dump(TEXT._replace(labels=np.float32([1, 1, 1]))) != first


def test_the_same_shape_in_another_type_differs(tmp_path: Path) -> None:
    wide = cases.Cases(tuple({k: v.astype(np.int64) for k, v in row.items()} for row in TEXT.rows), {}, None)
    assert stored(tmp_path, cases.dump(wide)).rows[0]["input_ids"].dtype == np.int64


def test_length() -> None:
    assert [cases.length(row) for row in TEXT.rows] == [5, 1, 3]
    assert cases.length(IMAGES.rows[0]) == 0


SHAPES = np.int32([[5], [1], [3]])


@pytest.mark.parametrize(
    "changes",
    [
        {"input__input_ids__shapes": SHAPES + 1},
        {"input__input_ids__shapes": SHAPES - np.int32([[0], [0], [1]])},  # values left over
        {"input__input_ids__shapes": np.int32([[9], [-1], [1]])},  # the sum is right, every slice fits
        {"input__input_ids__shapes": np.int32([[-5, -1], [-1, -1], [-3, -1]])},  # the products are right
        {"input__input_ids__shapes": np.int32([5, 1, 3])},
        {"input__input_ids__shapes": np.int32(9)},
        {"input__input_ids__shapes": np.int32([[9]])},  # one row, where the mask has three
        {"input__input_ids__shapes": np.array([["5"], ["1"], ["x"]])},
        {"input__input_ids__values": np.arange(8, dtype=np.int32)},
        {"input__input_ids__values": np.arange(9, dtype=np.int32).reshape(9, 1)},
        {"output__onnx-int8__shapes": np.int32([[2], [4]])},
        {"input__input_ids__values": None},
        {"input__input_ids__shapes": None},
        {"surplus": np.int32([1])},
        {"labels": np.float32([1, 0])},
        {"labels": np.float32([1])},  # would be broadcast to every row
        {"labels": np.float32([[1], [0], [1]])},
        {"labels": np.float32(1)},
    ],
    ids=str,
)
def test_damaged_arrays_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"."):
        stored(tmp_path, packed(**changes))


def test_the_unchanged_arrays_are_not_refused(tmp_path: Path) -> None:
    assert len(stored(tmp_path, packed()).rows) == 3
    pairs = packed(**{name: None for name in arrays(TEXT) if name.startswith("output")}, labels=None)
    assert stored(tmp_path, pairs).outputs == {}


def test_a_label_a_pair(tmp_path: Path) -> None:
    made = cases.Cases(TEXT.rows[:2], {}, np.float32([4.5]))
    assert stored(tmp_path, cases.dump(made)).labels.tolist() == [4.5]


def test_no_inputs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one"):
        stored(tmp_path, packed(**{name: None for name in arrays(TEXT) if name.startswith("input")}))


def test_a_claim_of_too_many_values_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cases, "MAX_VALUES", 8)
    with pytest.raises(ValueError, match="9 values"):
        stored(tmp_path, packed())


class Trap:
    """Pickled, it makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["labels", "input.input_ids.values", "input.input_ids.shapes"])
def test_pickles_are_not_opened(tmp_path: Path, name: str) -> None:
    trap = tmp_path / "opened"
    buffer = io.BytesIO()
    np.savez(buffer, **{**arrays(TEXT), name: np.array([Trap(trap)], dtype=object)})
    with pytest.raises(ValueError, match="allow_pickle"):
        stored(tmp_path, buffer.getvalue())
    assert not trap.exists()
    with np.load(io.BytesIO(buffer.getvalue()), allow_pickle=True) as opened:
        assert opened[name] is not None
    assert trap.exists()  # the trap works


def npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.arange(3))
    return buffer.getvalue()


@pytest.mark.parametrize(
    "data", [b"", b"PK\x03\x04", b"text", cases.dump(TEXT)[:-30], cases.dump(TEXT)[:300], npy(), b"\x80\x04N."]
)
def test_other_files_are_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        stored(tmp_path, data)


def test_a_flipped_byte_is_refused(tmp_path: Path) -> None:
    """The zip's own checksum sees it, also where no signature is checked."""
    data = bytearray(cases.dump(TEXT))
    at = data.index(np.arange(5, 10, dtype=np.int32).tobytes())
    data[at] ^= 1
    with pytest.raises(ValueError, match="CRC"):
        stored(tmp_path, bytes(data))


def test_a_missing_file_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        cases.load(str(tmp_path / "none.npz"))
