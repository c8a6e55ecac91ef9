"""
TensorRT 8.2 on a Jetson; anywhere else a stand-in that says so.

On the device the program's own C++ and CUDA sources are compiled once with JetPack's compilers, the engine is built
once from the ONNX file, and both are kept in the user's cache under a hash of everything that went in. Without
TensorRT, ONNX Runtime computes the standard-operator file on the CPU, which is what the build machine's check needs.
fp16 is then modelled: every floating-point operand, result and weight is rounded to fp16, arithmetic inside an operator
is fp32, and the nodes that the engine keeps in fp32 are not rounded. The order of the GPU's sums is not modelled.
"""

import ctypes
import hashlib
import os
import shutil
import subprocess
import sys
from typing import Any, Callable, Iterable, Iterator, List, Optional, Set

import numpy as np

from .. import cases, native, wire

try:
    _NVINFER = ctypes.CDLL("libnvinfer.so.8")  # type: Optional[ctypes.CDLL]
except OSError:
    _NVINFER = None
    # ONNX Runtime 1.29 and later report every session to their maker, unless told before they are imported.
    os.environ["ORT_DISABLE_TELEMETRY"] = "1"
    import onnxruntime

PLAN, STANDARD, PLUGIN = "build.txt", "model.onnx", "plugin.onnx"
CUDA = "/usr/local/cuda"
FLAGS = ["-std=c++14", "-O3", "-shared"]
ARCHITECTURES = ["-gencode=arch=compute_53,code=sm_53", "-gencode=arch=compute_53,code=compute_53"]  # code, and PTX
MESSAGE = 1024  # bytes of an error text
MOST_OUTPUT = 1 << 20  # values of one row's output


def version(library=None):  # noqa: ARG001 (the library does not bring the runtime)
    # type: (Optional[str]) -> str
    """Of TensorRT; where there is none, a text that no program's range admits."""
    if _NVINFER is None:
        return "0 (none here; onnxruntime {} stands in)".format(onnxruntime.__version__)
    number = int(_NVINFER.getInferLibVersion())
    return "{}.{}.{}".format(number // 1000, number // 100 % 10, number % 100)


def load(path, entry, threads=1, library=None):
    # type: (str, wire.Entry, int, Optional[str]) -> Callable[[cases.Row], Any]
    """`path` is the standard-operator file. Raises ValueError or OSError with what is missing."""
    if library is not None:
        raise ValueError("tensorrt: {}: the plugin is built on the device, not carried".format(library))
    if entry.precision not in ("fp16", "fp32"):
        raise ValueError("tensorrt: precision {!r}: this runner has fp16 and fp32".format(entry.precision))
    if _NVINFER is None:
        return _stand_in(path, entry, threads)
    return _engine(path, entry)


# --- the stand-in -----------------------------------------------------------------------------------------------------


def _stand_in(path, entry, threads):
    # type: (str, wire.Entry, int) -> Callable[[cases.Row], Any]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if entry.precision == "fp16":
        # No optimization may see that a number is rounded and widened again.
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        with open(os.path.join(os.path.dirname(path), PLAN)) as file:
            model = _rounded(path, _exact(file.read()))
    else:
        with open(path, "rb") as binary:
            model = binary.read()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    outputs = [entry.outputs[0].name]
    dtypes = {tensor.name: tensor.dtype for tensor in entry.inputs}

    def run(row):
        # type: (cases.Row) -> Any
        feed = {name: array[None].astype(dtypes[name], copy=False) for name, array in row.items()}
        return session.run(outputs, feed)[0][0]

    return run


def _exact(plan):
    # type: (str) -> Set[str]
    """The nodes of the standard-operator file that stay fp32."""
    words = [line.split() for line in plan.splitlines()]
    return {w[2] for w in words if w[:2] == ["fp32", STANDARD]}


def _rounded(path, exact):
    # type: (str, Set[str]) -> bytes
    """The graph with all that nodes outside `exact` take, give and weigh rounded to fp16 and back."""
    import onnx
    from onnx import TensorProto, numpy_helper

    model = onnx.load(path)
    typed = onnx.shape_inference.infer_shapes(model).graph
    values = list(typed.value_info) + list(typed.input)
    floats = {v.name for v in values if v.type.tensor_type.elem_type == TensorProto.FLOAT}
    used = {name for node in model.graph.node if node.name not in exact for name in node.input}
    nodes = list(_rounding(model.graph.node, exact, floats))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    for weight in model.graph.initializer:
        if weight.data_type == TensorProto.FLOAT and weight.name in used:
            with np.errstate(over="ignore"):
                array = numpy_helper.to_array(weight).astype(np.float16).astype(np.float32)
            weight.CopyFrom(numpy_helper.from_array(array, weight.name))
    return bytes(model.SerializeToString())


def _rounding(nodes, exact, floats):
    # type: (Iterable[Any], Set[str], Set[str]) -> Iterator[Any]
    """The nodes, and casts around those outside `exact`; `floats` are the names of fp32 values."""
    narrow = set()  # type: Set[str]
    for node in nodes:
        half = node.name not in exact
        for i, name in enumerate(node.input):
            if half and name in floats and name not in narrow:  # of an exact node, or of the graph
                if name + "/taken" not in narrow:
                    yield from _casts(name, name + "/taken")
                    narrow.add(name + "/taken")
                node.input[i] = name + "/taken"
        yield node
        for i, name in enumerate(node.output):
            if half and name in floats:
                node.output[i] = name + "/wide"
                yield from _casts(name + "/wide", name)
                narrow.add(name)


def _casts(wide, narrow):
    # type: (str, str) -> Iterator[Any]
    from onnx import TensorProto, helper

    yield helper.make_node("Cast", [wide], [narrow + "/half"], to=TensorProto.FLOAT16)
    yield helper.make_node("Cast", [narrow + "/half"], [narrow], to=TensorProto.FLOAT)


# --- the device -------------------------------------------------------------------------------------------------------


def _engine(path, entry):
    # type: (str, wire.Entry) -> Callable[[cases.Row], Any]
    folder = os.path.dirname(os.path.abspath(path))
    library = _compiled(folder, "runner.cc", _runner_command())
    plugin = _plugin(folder) if os.path.exists(os.path.join(folder, PLUGIN)) else None
    session = _open(library, _built(library, folder, STANDARD if plugin is None else PLUGIN))
    run = _runs(library, session, entry)
    return run if plugin is None else _proven(run, plugin)


def _plugin(folder):
    # type: (str) -> Optional[ctypes.CDLL]
    """The plugin, known to TensorRT from now on; None, and a word on stderr, where it cannot be built."""
    try:
        library = _compiled(folder, "dsa_plugin.cu", _plugin_command())
    except OSError as error:
        sys.stderr.write("tensorrt: sparse attention runs in standard operators: {}\n".format(error))
        return None
    library.edgeformer_dsa_calls.restype = ctypes.c_int64
    return library


def _runner_command():
    # type: () -> List[str]
    places = ["-I{}/include".format(CUDA), "-L{}/lib64".format(CUDA)]
    return [_tool("g++", [])] + FLAGS + ["-fPIC"] + places + ["-lnvinfer", "-lnvonnxparser", "-lcudart"]


def _plugin_command():
    # type: () -> List[str]
    return [_tool("nvcc", [CUDA + "/bin"])] + FLAGS + ["-Xcompiler", "-fPIC"] + ARCHITECTURES + ["-lnvinfer"]


def _tool(name, places):
    # type: (str, List[str]) -> str
    path = os.pathsep.join([os.environ.get("PATH", os.defpath)] + places)
    found = shutil.which(name, path=path)
    if found is None:
        raise OSError("{} is missing; JetPack has it: sudo apt-get install nvidia-jetpack".format(name))
    return found


def _kept(*parts):
    # type: (*bytes) -> str
    """Where something made from these bytes is kept; the folder is there, the file not yet."""
    digest = hashlib.sha256()
    for part in (version().encode("ascii"),) + parts:
        digest.update(str(len(part)).encode("ascii") + b" " + part)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = os.path.join(base, "edgeformer", "tensorrt")
    os.makedirs(folder, exist_ok=True)
    return os.path.join(folder, digest.hexdigest()[:32])


def _read(folder, *names):
    # type: (str, *str) -> List[bytes]
    contents = []
    for name in names:
        with open(os.path.join(folder, name), "rb") as file:
            contents.append(file.read())
    return contents


def _compiled(folder, source, command):
    # type: (str, str, List[str]) -> ctypes.CDLL
    """The library made from one of the program's sources: compiled once, opened for everyone to see its symbols."""
    headers = sorted(name for name in os.listdir(folder) if name.endswith(".cuh"))
    done = _kept(*(_read(folder, source, *headers) + [word.encode() for word in command])) + ".so"
    if not os.path.exists(done):
        temporary = "{}.{}".format(done, os.getpid())
        # The source first: a linker takes from a library only what it was already asked for.
        line = command[:1] + [os.path.join(folder, source), "-o", temporary] + command[1:]
        made = subprocess.run(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        if made.returncode:
            words = made.stdout.decode("utf-8", "replace").strip()
            raise OSError("{} does not compile here: {}".format(source, words[-MESSAGE:] or "no word of why"))
        os.replace(temporary, done)
    return ctypes.CDLL(done, ctypes.RTLD_GLOBAL)


def _built(library, folder, model):
    # type: (ctypes.CDLL, str, str) -> str
    """The engine's file. TensorRT tries kernels for minutes, once for each model, plan, plugin and version."""
    plan, onnx = _read(folder, PLAN, model)
    sources = sorted(name for name in os.listdir(folder) if name.endswith((".cu", ".cuh", ".cc")))
    done = _kept(onnx, plan, model.encode("ascii"), *_read(folder, *sources)) + ".engine"
    if not os.path.exists(done):
        temporary = "{}.{}".format(done, os.getpid())
        error = ctypes.create_string_buffer(MESSAGE)
        words = [os.path.join(folder, model).encode(), model.encode("ascii"), plan, temporary.encode()]
        if not library.edgeformer_trt_build(*(words + [error, MESSAGE])):
            raise ValueError("tensorrt: {}".format(error.value.decode("utf-8", "replace")))
        os.replace(temporary, done)
    return done


def _open(library, engine):
    # type: (ctypes.CDLL, str) -> ctypes.c_void_p
    error = ctypes.create_string_buffer(MESSAGE)
    library.edgeformer_trt_open.restype = ctypes.c_void_p
    session = library.edgeformer_trt_open(engine.encode(), error, MESSAGE)
    if not session:
        raise ValueError("tensorrt: {}".format(error.value.decode("utf-8", "replace")))
    return ctypes.c_void_p(session)


def _runs(library, session, entry):
    # type: (ctypes.CDLL, ctypes.c_void_p, wire.Entry) -> Callable[[cases.Row], Any]
    names = (ctypes.c_char_p * len(entry.inputs))(*[tensor.name.encode() for tensor in entry.inputs])
    out, out_shape = np.empty(MOST_OUTPUT, np.float32), (ctypes.c_int32 * 9)()
    error = ctypes.create_string_buffer(MESSAGE)

    def run(row):
        # type: (cases.Row) -> Any
        arrays = [np.ascontiguousarray(row[t.name][None], t.dtype) for t in entry.inputs]
        sizes = [n for array in arrays for n in (array.ndim,) + array.shape]
        done = library.edgeformer_trt_run(
            session, len(arrays), names, (ctypes.c_int32 * len(sizes))(*sizes),
            (ctypes.c_void_p * len(arrays))(*[array.ctypes.data for array in arrays]), entry.outputs[0].name.encode(),
            ctypes.c_void_p(out.ctypes.data), ctypes.c_int64(out.nbytes), out_shape, error, MESSAGE,
        )  # fmt: skip
        if not done:
            raise ValueError("tensorrt: {}".format(error.value.decode("utf-8", "replace")))
        shape = tuple(out_shape[1 : 1 + out_shape[0]])
        return out[: int(np.prod(shape))].reshape(shape)[0].copy()

    return run


def _proven(run, plugin):
    # type: (Callable[[cases.Row], Any], ctypes.CDLL) -> Callable[[cases.Row], Any]
    """The same function; each run must have called the plugin, or something else computed its result."""

    def watched(row):
        # type: (cases.Row) -> Any
        before = plugin.edgeformer_dsa_calls()
        output = run(row)
        if plugin.edgeformer_dsa_calls() == before:
            raise RuntimeError("tensorrt: the engine has our plugin and did not call it")
        return output

    watched.counters = native.in_process(plugin._name)  # type: ignore[attr-defined]
    return watched
