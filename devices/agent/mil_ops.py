"""
What the operators of a Core ML program mean, in numpy: Apple's published semantics, not Apple's kernels.

`compile` makes a function from named arrays to named arrays. Values that the program declares fp16 are rounded to fp16
after each operator, and each operator computes in fp32, as a matrix engine with wide accumulators does. They are kept
in fp32 arrays meanwhile, which numpy multiplies fast. Every result must have the shape that the program declares.
"""

import math
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from . import mil

NUMPY = {
    "fp16": "float16", "fp32": "float32", "int32": "int32", "bool": "bool", "int8": "int8", "uint8": "uint8",
    "int16": "int16", "uint16": "uint16",
}  # fmt: skip
MOVES = {  # give values that were rounded before
    "reshape", "transpose", "expand_dims", "squeeze", "concat", "stack", "split", "tile", "slice_by_index",
    "slice_by_size", "gather", "gather_nd", "gather_along_axis", "identity", "select", "maximum", "minimum",
    "reduce_max", "reduce_min",
}  # fmt: skip
SILENT = ("name", "validate_indices", "output_indices_dtype")  # arguments that change no value here
Arrays = Dict[str, Any]


class Unsupported(ValueError):
    """An operator, or a form of one, that this interpreter does not know."""


class _Step(NamedTuple):
    kind: str
    run: Callable[..., Any]
    inputs: Dict[str, Any]  # argument -> Ref, list of Refs, or a constant
    outputs: Tuple[mil.Named, ...]


def compile(package, name, half=True):
    # type: (mil.Package, str, bool) -> Callable[[Arrays], Arrays]
    """
    One function of a package, from inputs to outputs by name. `half=False` leaves out the rounding to fp16: what the
    program would compute if only its weights were rounded. Raises Unsupported, naming every operator not known here.
    """
    function = package.function(name)
    unknown = sorted({x.kind for x in function.operations} - set(OPERATORS) - {"const"})
    if unknown:
        raise Unsupported("{}: no operator {} in this interpreter".format(name, ", ".join(unknown)))
    constants, steps = {}, []  # type: Arrays, List[_Step]
    for operation in function.operations:
        if operation.kind == "const":
            constants[operation.outputs[0].name] = _rounded(operation.attributes["val"], operation.outputs[0].type)
            continue
        inputs = {key: _argument(key, values, constants) for key, values in operation.inputs.items()}
        step = _Step(operation.kind, OPERATORS[operation.kind], inputs, operation.outputs)
        if operation.kind.startswith("constexpr_"):
            constants.update(_run(step._replace(inputs=dict(operation.attributes, **inputs)), constants, True))
        else:
            steps.append(step)

    def run(given):
        # type: (Arrays) -> Arrays
        values = dict(constants)
        for wanted in function.inputs:
            values[wanted.name] = _input(given, wanted)
        for step in steps:
            values.update(_run(step, values, half))
        return {key: values[key] for key in function.outputs}

    return run


def _argument(key, values, constants):
    # type: (str, List[Any], Arrays) -> Any
    """A single value as itself; constants are put in their place now."""
    known = [constants.get(x.name, x) if isinstance(x, mil.Ref) else _rounded(x, None) for x in values]
    return known if len(known) != 1 or key == "values" else known[0]


def _input(given, wanted):
    # type: (Arrays, mil.Named) -> Any
    if wanted.name not in given or wanted.type is None:
        raise ValueError("input {} is missing; given: {}".format(wanted.name, ", ".join(sorted(given))))
    array = np.asarray(given[wanted.name])
    if array.shape != wanted.type.shape:
        raise ValueError("input {} has shape {}, not {}".format(wanted.name, array.shape, wanted.type.shape))
    return _rounded(array, wanted.type)


def _run(step, values, half):
    # type: (_Step, Arrays, bool) -> Arrays
    """The outputs of one operator by name."""
    arguments = {}
    for key, x in step.inputs.items():
        if key in SILENT:
            continue
        if isinstance(x, mil.Ref):
            x = values[x.name]
        elif isinstance(x, list):
            x = [values[y.name] if isinstance(y, mil.Ref) else y for y in x]
        arguments[key] = x
    try:
        with np.errstate(all="ignore"):  # infinity and NaN are values here; the caller looks at the outputs
            found = _call(step.run, arguments)
    except (TypeError, ValueError, IndexError) as error:
        if isinstance(error, Unsupported):
            raise
        raise Unsupported("{} of {}: {}".format(step.kind, step.outputs[0].name, error))
    found = found if isinstance(found, tuple) else (found,)
    half = half and step.kind not in MOVES
    return {named.name: _checked(step.kind, named, x, half) for named, x in zip(step.outputs, found)}


def _call(run, arguments):
    # type: (Callable[..., Any], Arrays) -> Any
    """numpy's own functions know no argument names."""
    if isinstance(run, np.ufunc) or run is np.round:
        return run(arguments["x"], *([arguments["y"]] if "y" in arguments else []))
    return run(**arguments)


def _checked(kind, named, x, half):
    # type: (str, mil.Named, Any, bool) -> Any
    x = _rounded(x, named.type, half)
    if named.type is not None and -1 not in named.type.shape and np.shape(x) != named.type.shape:
        raise mil.BadPackage(
            "{} gives {} with shape {}; the program declares {}".format(kind, named.name, np.shape(x), named.type.shape)
        )
    return x


def _rounded(x, declared, half=True):
    # type: (Any, Optional[mil.Type], bool) -> Any
    """As the program declares it; fp16 values live in fp32 arrays."""
    if isinstance(x, (str, list)):
        return x
    x = np.asarray(x)
    dtype = x.dtype.name if declared is None else declared.dtype
    if dtype == "float16":
        if not half:
            return x.astype(np.float32, copy=False)
        return x.astype(np.float16, copy=False).astype(np.float32)
    return x.astype(dtype, copy=False)


# --- operators --------------------------------------------------------------------------------------------------------


def _linear(x, weight, bias=None):
    # type: (Any, Any, Any) -> Any
    y = np.matmul(x, weight.T)
    return y if bias is None else y + bias


def _matmul(x, y, transpose_x=False, transpose_y=False):
    # type: (Any, Any, Any, Any) -> Any
    return np.matmul(np.swapaxes(x, -1, -2) if transpose_x else x, np.swapaxes(y, -1, -2) if transpose_y else y)


def _conv(x, weight, bias=None, strides=None, pad_type="valid", pad=None, dilations=None, groups=1):
    # type: (Any, Any, Any, Any, str, Any, Any, int) -> Any
    """Two-dimensional, in one group: a matrix product for each place of the kernel."""
    if x.ndim != 4 or groups != 1 or pad_type not in ("valid", "custom"):
        raise Unsupported("conv of rank {}, groups {}, pad_type {}".format(x.ndim, groups, pad_type))
    if pad is not None and pad_type == "custom":
        x = np.pad(x, [(0, 0), (0, 0), (pad[0], pad[1]), (pad[2], pad[3])], "constant")
    step = (1, 1) if strides is None else tuple(int(n) for n in strides)
    apart = (1, 1) if dilations is None else tuple(int(n) for n in dilations)
    kernel = weight.shape[2:]
    size = [(x.shape[2 + i] - apart[i] * (kernel[i] - 1) - 1) // step[i] + 1 for i in (0, 1)]
    out = np.zeros((x.shape[0], weight.shape[0], size[0] * size[1]), np.float32)
    for i in range(kernel[0]):
        for j in range(kernel[1]):
            top, left = i * apart[0], j * apart[1]
            seen = x[:, :, top : top + size[0] * step[0] : step[0], left : left + size[1] * step[1] : step[1]]
            out += np.matmul(weight[:, :, i, j], seen.reshape(seen.shape[0], seen.shape[1], -1))
    out = out if bias is None else out + bias[:, None]
    return out.reshape(out.shape[0], out.shape[1], size[0], size[1])


def _erf(x):
    # type: (Any) -> Any
    """Abramowitz and Stegun 7.1.26, within 1.5e-7; fp16 steps are 1000 times that."""
    a = np.abs(x.astype(np.float64))
    t = 1 / (1 + 0.3275911 * a)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    return np.copysign(1 - series * np.exp(-a * a), x)


def _gelu(x, mode="EXACT"):
    # type: (Any, str) -> Any
    if mode == "EXACT":
        return 0.5 * x * (1 + _erf(x * math.sqrt(0.5)))
    if mode == "TANH_APPROXIMATION":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    if mode == "SIGMOID_APPROXIMATION":
        return x * _sigmoid(1.702 * x)
    raise Unsupported("gelu in mode {}".format(mode))


def _sigmoid(x):
    # type: (Any) -> Any
    return 1 / (1 + np.exp(-x))


def _softmax(x, axis=-1):
    # type: (Any, int) -> Any
    e = np.exp(x - x.max(int(axis), keepdims=True))
    return e / e.sum(int(axis), keepdims=True)


def _layer_norm(x, axes=None, gamma=None, beta=None, epsilon=1e-5):
    # type: (Any, Any, Any, Any, float) -> Any
    over = tuple(range(x.ndim)) if axes is None else tuple(int(n) % x.ndim for n in axes)
    centred = x - x.mean(over, keepdims=True)
    y = centred / np.sqrt((centred * centred).mean(over, keepdims=True) + epsilon)
    shape = [n if i in over else 1 for i, n in enumerate(x.shape)]
    y = y if gamma is None else y * gamma.reshape(shape)
    return y if beta is None else y + beta.reshape(shape)


def _reduced(function):
    # type: (Callable[..., Any]) -> Callable[..., Any]
    def reduce(x, axes=None, keep_dims=False):
        # type: (Any, Any, Any) -> Any
        return function(x, axis=None if axes is None else tuple(int(n) for n in axes), keepdims=bool(keep_dims))

    return reduce


def _l2(x, axis, keepdims):
    # type: (Any, Any, bool) -> Any
    return np.sqrt(np.sum(x * x, axis=axis, keepdims=keepdims))


def _reshape(x, shape):
    # type: (Any, Any) -> Any
    return x.reshape([x.shape[i] if n == 0 else int(n) for i, n in enumerate(shape)])


def _expand_dims(x, axes):
    # type: (Any, Any) -> Any
    axes = np.atleast_1d(axes)
    rank = x.ndim + len(axes)
    for axis in sorted(int(n) % rank for n in axes):
        x = np.expand_dims(x, axis)
    return x


def _squeeze(x, axes=None):
    # type: (Any, Any) -> Any
    return np.squeeze(x, None if axes is None else tuple(int(n) for n in np.atleast_1d(axes)))


def _concat(values, axis, interleave=False):
    # type: (Sequence[Any], Any, Any) -> Any
    if interleave:
        raise Unsupported("concat with interleave")
    return np.concatenate(values, int(axis))


def _split(x, axis, num_splits=None, split_sizes=None):
    # type: (Any, Any, Any, Any) -> Tuple[Any, ...]
    places = int(num_splits) if split_sizes is None else np.cumsum(split_sizes)[:-1]
    return tuple(np.split(x, places, int(axis)))


def _slice_by_index(x, begin, end, stride=None, begin_mask=None, end_mask=None, squeeze_mask=None):
    # type: (Any, Any, Any, Any, Any, Any, Any) -> Any
    index = []  # type: List[Any]
    for i in range(x.ndim):
        if squeeze_mask is not None and squeeze_mask[i]:
            index.append(int(begin[i]))
            continue
        first = None if begin_mask is not None and begin_mask[i] else int(begin[i])
        last = None if end_mask is not None and end_mask[i] else int(end[i])
        index.append(slice(first, last, 1 if stride is None else int(stride[i])))
    return x[tuple(index)]


def _slice_by_size(x, begin, size):
    # type: (Any, Any, Any) -> Any
    return x[tuple(slice(int(b), None if n == -1 else int(b) + int(n)) for b, n in zip(begin, size))]


def _gather(x, indices, axis=0, batch_dims=0):
    # type: (Any, Any, Any, Any) -> Any
    if batch_dims:
        raise Unsupported("gather with batch_dims {}".format(batch_dims))
    indices = np.asarray(indices).astype(np.int64)
    axis = int(axis)
    if indices.size and not -x.shape[axis] <= indices.min() <= indices.max() < x.shape[axis]:
        raise ValueError("index {}..{} is outside 0..{}".format(indices.min(), indices.max(), x.shape[axis] - 1))
    return np.take(x, indices, axis)


def _gather_nd(x, indices, batch_dims=0):
    # type: (Any, Any, Any) -> Any
    if batch_dims:
        raise Unsupported("gather_nd with batch_dims {}".format(batch_dims))
    return x[tuple(np.moveaxis(np.asarray(indices).astype(np.int64), -1, 0))]


def _along(x, indices, axis):
    # type: (Any, Any, int) -> Any
    """np.take_along_axis, which numpy has from 1.15 on."""
    index = list(np.indices(indices.shape, sparse=False))
    index[axis] = indices.astype(np.int64)
    return x[tuple(index)]


def _gather_along_axis(x, indices, axis=0):
    # type: (Any, Any, Any) -> Any
    return _along(x, indices, int(axis))


def _topk(x, k=1, axis=-1, ascending=False, sort=True, return_indices=True):  # noqa: ARG001
    # type: (Any, Any, Any, Any, Any, Any) -> Any
    """Sorted in any case."""
    order = np.argsort(x if ascending else -x, int(axis), kind="mergesort")  # stable
    first = np.take(order, np.arange(int(k)), int(axis))
    found = _along(x, first, int(axis))
    return (found, first) if return_indices else found


def _cumsum(x, axis=0, exclusive=False, reverse=False):
    # type: (Any, Any, Any, Any) -> Any
    axis = int(axis)
    y = np.flip(np.cumsum(np.flip(x, axis), axis), axis) if reverse else np.cumsum(x, axis)
    return y - x if exclusive else y


def _tile(x, reps):
    # type: (Any, Any) -> Any
    return np.tile(x, [int(n) for n in reps])


def _pad(x, pad, mode="constant", constant_val=0.0):
    # type: (Any, Any, str, Any) -> Any
    """`pad` names the last axes."""
    if mode != "constant":
        raise Unsupported("pad in mode {}".format(mode))
    last = np.asarray(pad, np.int64).reshape(-1, 2)
    width = [(0, 0)] * (x.ndim - len(last)) + [(int(a), int(b)) for a, b in last]
    return np.pad(x, width, "constant", constant_values=constant_val)


def _cast(x, dtype):
    # type: (Any, str) -> Any
    if dtype not in NUMPY:
        raise Unsupported("cast to {}".format(dtype))
    return np.asarray(x).astype(NUMPY[dtype])


def _clip(x, alpha, beta):
    # type: (Any, Any, Any) -> Any
    return np.minimum(np.maximum(x, alpha), beta)


def _rsqrt(x, epsilon=1e-12):
    # type: (Any, Any) -> Any
    return 1 / np.sqrt(x + epsilon)


def _log(x, epsilon=1e-45):
    # type: (Any, Any) -> Any
    return np.log(x + epsilon)


def _inverse(x, epsilon=1e-4):
    # type: (Any, Any) -> Any
    return 1 / (x + epsilon)


# --- compressed weights -----------------------------------------------------------------------------------------------


def _along_axis(values, axis, rank):
    # type: (Any, Any, int) -> Any
    values = np.asarray(values).astype(np.float32)
    return values if not values.ndim else values.reshape([-1 if i == int(axis) % rank else 1 for i in range(rank)])


def _affine(quantized_data, zero_point, scale, axis):
    # type: (Any, Any, Any, Any) -> Any
    rank = quantized_data.ndim
    centred = quantized_data.astype(np.float32) - _along_axis(zero_point, axis, rank)
    return centred * _along_axis(scale, axis, rank)


def _spread(blocks, shape):
    # type: (Any, Tuple[int, ...]) -> Any
    """A value a block to a value an element."""
    for axis, n in enumerate(shape):
        if n % blocks.shape[axis]:
            raise ValueError("{} blocks do not divide axis {} of {}".format(blocks.shape[axis], axis, shape))
        if 1 < blocks.shape[axis] < n:
            blocks = blocks.repeat(n // blocks.shape[axis], axis)
    return blocks


def _blockwise(data, scale, offset=None):
    # type: (Any, Any, Any) -> Any
    centred = data.astype(np.float32)
    if offset is not None:
        centred = centred - _spread(offset.astype(np.float32), data.shape)
    return centred * _spread(scale.astype(np.float32), data.shape)


def _lut(indices, lut, shape=None):
    # type: (Any, Any, Any) -> Any
    """iOS 16: bytes of packed indices and one table. iOS 18: indices of the weight's shape, a table a block."""
    if shape is not None:
        bits, count = int(math.log2(len(lut))), int(np.prod(np.asarray(shape, np.int64)))
        places = np.arange(count * bits)
        ones = (np.ravel(indices)[places // 8] >> (places % 8).astype(np.uint8)) & 1
        return lut[(ones.reshape(count, bits).astype(np.int64) << np.arange(bits)).sum(1)].reshape(
            [int(n) for n in shape]
        )
    if lut.shape[-1] != 1:
        raise Unsupported("look-up tables of vectors")
    block = [np.arange(n) * lut.shape[i] // n for i, n in enumerate(indices.shape)]
    return lut[tuple(np.ix_(*block)) + (indices.astype(np.int64), 0)]


OPERATORS = {
    # products
    "linear": _linear,
    "matmul": _matmul,
    "conv": _conv,
    # of two
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "real_div": np.true_divide,
    "floor_div": np.floor_divide,
    "mod": np.mod,
    "pow": np.power,
    "maximum": np.maximum,
    "minimum": np.minimum,
    "equal": np.equal,
    "not_equal": np.not_equal,
    "greater": np.greater,
    "greater_equal": np.greater_equal,
    "less": np.less,
    "less_equal": np.less_equal,
    "logical_and": np.logical_and,
    "logical_or": np.logical_or,
    # of one
    "abs": np.abs,
    "ceil": np.ceil,
    "cos": np.cos,
    "erf": _erf,
    "exp": np.exp,
    "floor": np.floor,
    "gelu": _gelu,
    "inverse": _inverse,
    "log": _log,
    "logical_not": np.logical_not,
    "relu": lambda x: np.maximum(x, 0),
    "round": np.round,
    "rsqrt": _rsqrt,
    "sigmoid": _sigmoid,
    "sign": np.sign,
    "silu": lambda x: x * _sigmoid(x),
    "sin": np.sin,
    "sqrt": np.sqrt,
    "square": np.square,
    "tanh": np.tanh,
    # and the rest
    "cast": _cast,
    "clip": _clip,
    "identity": lambda x: x,
    "select": lambda cond, a, b: np.where(cond, a, b),
    "softmax": _softmax,
    "layer_norm": _layer_norm,
    "cumsum": _cumsum,
    "topk": _topk,
    "reduce_sum": _reduced(np.sum),
    "reduce_mean": _reduced(np.mean),
    "reduce_max": _reduced(np.max),
    "reduce_min": _reduced(np.min),
    "reduce_l2_norm": _reduced(_l2),
    # shapes and places
    "reshape": _reshape,
    "transpose": lambda x, perm: np.transpose(x, [int(n) for n in perm]),
    "expand_dims": _expand_dims,
    "squeeze": _squeeze,
    "concat": _concat,
    "stack": lambda values, axis: np.stack(values, int(axis)),
    "split": _split,
    "tile": _tile,
    "pad": _pad,
    "slice_by_index": _slice_by_index,
    "slice_by_size": _slice_by_size,
    "gather": _gather,
    "gather_nd": _gather_nd,
    "gather_along_axis": _gather_along_axis,
    # weights
    "constexpr_affine_dequantize": _affine,
    "constexpr_blockwise_shift_scale": _blockwise,
    "constexpr_lut_to_dense": _lut,
}  # type: Dict[str, Callable[..., Any]]
