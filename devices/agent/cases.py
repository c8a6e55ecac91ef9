"""
The evaluation and golden cases of a bundle: rows of inputs of different lengths, and what must come out.

One .npz file, never pickled. A row has no batch axis. Rows of different shapes are stored flat:
`input.<name>.values` (all rows, one after the other) and `input.<name>.shapes` (rows, axes).
Outputs are stored the same way under `output.<name>`. Labels are optional: `labels` where each is a number, else
`label.labels` like the rows.
"""

import io
import zipfile
import zlib
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from . import wire

MAX_VALUES = 1 << 28  # refuse a file that claims more than a gigabyte of float32

Row = Dict[str, Any]  # input name -> array without batch axis


class Cases(NamedTuple):
    """Rows in order; every output list and the labels run parallel to them."""

    rows: Tuple[Row, ...]
    outputs: Dict[str, Tuple[Any, ...]]
    labels: Optional[Sequence[Any]]  # numbers, or arrays


def length(row):
    # type: (Row) -> int
    """Tokens of a row; 0 where the input has no sequence."""
    ids = row.get("input_ids")
    return 0 if ids is None else int(ids.shape[0])


def padded(array, tensor, length):
    # type: (Any, wire.Tensor, int) -> Any
    """An input of a row, filled up on the right to a static length with its own padding value."""
    if not length or -1 not in tensor.shape[1:]:
        return array.astype(tensor.dtype, copy=False)
    full = np.full((length,) + array.shape[1:], tensor.pad, tensor.dtype)
    full[: array.shape[0]] = array
    return full


def dump(cases):
    # type: (Cases) -> bytes
    """The same cases give the same bytes."""
    arrays = {}  # type: Dict[str, Any]
    for name in sorted(cases.rows[0]):
        _store(arrays, "input." + name, [row[name] for row in cases.rows])
    for name, outputs in sorted(cases.outputs.items()):
        _store(arrays, "output." + name, outputs)
    if cases.labels is not None and np.ndim(cases.labels[0]):
        _store(arrays, "label.labels", cases.labels)
    elif cases.labels is not None:
        arrays["labels"] = np.asarray(cases.labels, np.float32)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def load(path):
    # type: (str) -> Cases
    """Raises ValueError where the file is not what `dump` writes."""
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
        names = sorted({name.rsplit(".", 1)[0] for name in arrays if name != "labels"})
        lists = {name: _restore(arrays, name) for name in names}
    except (AttributeError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError("{}: not the cases of a bundle: {}".format(path, error or "it is empty"))
    inputs = {name[len("input.") :]: rows for name, rows in lists.items() if name.startswith("input.")}
    outputs = {name[len("output.") :]: tuple(rows) for name, rows in lists.items() if name.startswith("output.")}
    if not inputs or len({len(rows) for rows in lists.values()}) != 1:
        raise ValueError("{}: inputs and outputs must have the same number of rows, at least one".format(path))
    count, numbers = len(next(iter(inputs.values()))), arrays.get("labels")
    if numbers is not None and numbers.shape not in ((count,), (count / 2,)):
        raise ValueError("{}: labels of shape {} for {} rows".format(path, numbers.shape, count))
    labels = lists.get("label.labels", numbers)
    rows = tuple({name: values[i] for name, values in inputs.items()} for i in range(count))
    return Cases(rows, outputs, labels)


def _store(arrays, name, rows):
    # type: (Dict[str, Any], str, Any) -> None
    arrays[name + ".values"] = np.concatenate([np.ravel(row) for row in rows])
    arrays[name + ".shapes"] = np.asarray([row.shape for row in rows], np.int32)


def _restore(arrays, name):
    # type: (Dict[str, Any], str) -> List[Any]
    values, shapes = arrays[name + ".values"], arrays[name + ".shapes"]
    sizes = np.prod(shapes.astype(np.int64), axis=1)
    if values.ndim != 1 or values.size > MAX_VALUES or (shapes < 0).any() or sizes.sum() != values.size:
        raise ValueError("{}: {} values do not fill shapes of {}".format(name, values.size, int(sizes.sum())))
    ends = np.cumsum(sizes)
    return [values[end - size : end].reshape(shape) for end, size, shape in zip(ends, sizes, shapes)]
