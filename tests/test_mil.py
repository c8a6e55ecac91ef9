"""
The interpreter of Core ML programs, held against torch operator by operator: everything else here trusts it.

One module computes each operator on its own, is converted once in fp32, and each of its outputs is compared.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("coremltools")

from edgeformer import formats  # noqa: E402
from edgeformer_agent import mil, mil_ops  # noqa: E402

formats.load("coreml")  # quietens the converter before it is imported
import coremltools as ct  # noqa: E402
import coremltools.optimize.coreml as cto  # noqa: E402

F = torch.nn.functional
X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
IDS = torch.tensor([[3, 0, 5], [1, 1, 2]])
CASES: dict[str, tuple[str, Callable[[Any], Any]]] = {  # name -> the operator that must be met, what torch computes
    "linear": ("linear", lambda x: F.linear(x, WEIGHT, WEIGHT[:, 0])),
    "matmul": ("matmul", lambda x: x @ x.transpose(-1, -2)),
    "conv": ("conv", lambda x: F.conv2d(x[:, None], WEIGHT.reshape(4, 1, 2, 4), WEIGHT[:, 0], stride=(2, 4))),
    "conv_1x1": ("conv", lambda x: F.conv2d(x[:, :, None].transpose(1, 3), WEIGHT[:, :, None, None])),
    "add": ("add", lambda x: x + x[:, :1]),
    "sub": ("sub", lambda x: x[:, :1] - x),
    "mul": ("mul", lambda x: x * x[..., :1]),
    "div": ("real_div", lambda x: x / (x[:, :1] * 2)),
    "maximum": ("maximum", lambda x: torch.maximum(x, x[:, :1])),
    "minimum": ("minimum", lambda x: torch.minimum(x, x[:, :1])),
    "pow": ("pow", lambda x: (x + 5) ** 3.0),
    "greater": ("greater", lambda x: (x > x[:, :1]).float()),
    "less": ("less", lambda x: (x < x[:, :1]).float()),
    "greater_equal": ("greater_equal", lambda x: (x >= x[:, :1]).float()),
    "equal": ("equal", lambda x: (x == x[:, :1]).float()),
    "not_equal": ("not_equal", lambda x: (x != x[:, :1]).float()),
    "and": ("logical_and", lambda x: torch.logical_and(x > 0, x < 1).float()),
    "select": ("select", lambda x: torch.where(x > 0, x, x * 2)),
    "clip": ("clip", lambda x: x.clamp(-0.5, 0.5)),
    "exp": ("exp", lambda x: x.exp()),
    "sqrt": ("sqrt", lambda x: (x * x).sqrt()),
    "rsqrt": ("rsqrt", lambda x: (x * x + 1).rsqrt()),
    "log": ("log", lambda x: (x * x + 1).log()),
    "abs": ("abs", lambda x: x.abs()),
    "sin": ("sin", lambda x: x.sin()),
    "cos": ("cos", lambda x: x.cos()),
    "tanh": ("tanh", lambda x: x.tanh()),
    "sigmoid": ("sigmoid", lambda x: x.sigmoid()),
    "relu": ("relu", lambda x: x.relu()),
    "silu": ("silu", lambda x: F.silu(x)),
    "gelu": ("gelu", lambda x: F.gelu(x)),
    "gelu_tanh": ("gelu", lambda x: 0.5 * x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3)))),
    "softmax": ("softmax", lambda x: x.softmax(1)),
    "layer_norm": ("layer_norm", lambda x: F.layer_norm(x, (8,), WEIGHT[0], WEIGHT[1], 1e-3)),
    "sum": ("reduce_sum", lambda x: x.sum(1)),
    "mean": ("reduce_mean", lambda x: x.mean((0, 2), keepdim=True)),
    "amax": ("reduce_max", lambda x: x.amax(-1)),
    "amin": ("reduce_min", lambda x: x.amin(-1)),
    "norm": ("reduce_l2_norm", lambda x: torch.linalg.vector_norm(x, dim=-1)),
    "cumsum": ("cumsum", lambda x: x.cumsum(1)),
    "reshape": ("reshape", lambda x: x.reshape(2, 6, 2, 4)),
    "permute": ("transpose", lambda x: x.permute(2, 0, 1)),
    "unsqueeze": ("expand_dims", lambda x: x[:, None]),
    "squeeze": ("squeeze", lambda x: x[:, :1].squeeze(1)),
    "cat": ("concat", lambda x: torch.cat([x, x * 2], 1)),
    "stack": ("stack", lambda x: torch.stack([x, x * 2], 1)),
    "split": ("split", lambda x: x.split([2, 4], 1)[1]),
    "tile": ("tile", lambda x: x.repeat(1, 2, 1)),
    "pad": ("pad", lambda x: F.pad(x, (1, 2))),
    "slice": ("slice_by_index", lambda x: x[:, 1:5:2, 3:]),
    "embedding": ("gather", lambda x: F.embedding(IDS, x[0])),
    "topk": ("topk", lambda x: x.topk(3, -1)[0]),
}


class Each(torch.nn.Module):  # type: ignore[misc, name-defined]
    def forward(self, x: Any) -> Any:
        return tuple(compute(x) for _, compute in CASES.values())


def convert(module: Any, path: Path, inputs: tuple[Any, ...] = (X,), **options: Any) -> Any:
    program = torch.export.export(module.eval(), inputs).run_decompositions({})
    settings = {"compute_precision": ct.precision.FLOAT32, "minimum_deployment_target": ct.target.iOS18, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = ct.convert(program, convert_to="mlprogram", skip_model_load=True, **settings)
    made.save(str(path))
    return made


@pytest.fixture(scope="module")
def each(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[set[str], Any, Any]]:
    """name -> (operators in the program, what the interpreter gives, what torch gives)"""
    path = tmp_path_factory.mktemp("each") / "each.mlpackage"
    names = [f"out_{name}" for name in CASES]
    convert(Each(), path, outputs=[ct.TensorType(name=n) for n in names])
    package = mil.Package(str(path))
    function = package.function("main")
    found = mil_ops.compile(package, "main")({function.inputs[0].name: X.numpy()})
    kinds = {operation.kind for operation in function.operations}
    return {n: (kinds, found[f"out_{n}"], y.numpy()) for n, y in zip(CASES, Each()(X), strict=True)}


@pytest.mark.parametrize("name", CASES)
def test_an_operator_is_what_torch_computes(name: str, each: dict[str, tuple[set[str], Any, Any]]) -> None:
    kinds, got, wanted = each[name]
    assert CASES[name][0] in kinds, f"the converter made something else of it: {sorted(kinds)}"
    np.testing.assert_allclose(got, wanted, atol=2e-6, rtol=2e-6)


def test_values_are_rounded_to_half_after_each_operator(tmp_path: Path) -> None:
    class Two(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, x: Any) -> Any:
            return (x * 1.001).exp()

    convert(Two(), tmp_path / "p.mlpackage", compute_precision=ct.precision.FLOAT16)
    package = mil.Package(str(tmp_path / "p.mlpackage"))
    name = package.function("main").inputs[0].name
    (got,) = mil_ops.compile(package, "main")({name: X.numpy()}).values()
    (loose,) = mil_ops.compile(package, "main", half=False)({name: X.numpy()}).values()

    def half(x: Any) -> Any:
        return np.float32(np.float16(x))

    wanted = half(np.exp(half(half(X.numpy()) * half(1.001))))
    assert np.array_equal(got, wanted) and not np.array_equal(loose, wanted)
    np.testing.assert_allclose(loose, np.exp(X.numpy() * 1.001), rtol=1e-3)


# --- weights ----------------------------------------------------------------------------------------------------------


class Layer(torch.nn.Module):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.linear = torch.nn.Linear(64, 96)

    def forward(self, x: Any) -> Any:
        return self.linear(x)


def per_channel(bits: int) -> Any:
    return cto.OpLinearQuantizerConfig(mode="linear_symmetric", dtype=f"int{bits}", weight_threshold=16)


FORMATS = {
    "affine_int8": (
        ct.target.iOS16, cto.linear_quantize_weights, lambda: per_channel(8), "constexpr_affine_dequantize",
    ),
    "int8_ios18": (
        ct.target.iOS18, cto.linear_quantize_weights, lambda: per_channel(8), "constexpr_blockwise_shift_scale",
    ),
    "int4_blocks": (
        ct.target.iOS18, cto.linear_quantize_weights,
        lambda: cto.OpLinearQuantizerConfig(
            mode="linear", dtype="int4", granularity="per_block", block_size=16, weight_threshold=16
        ), "constexpr_blockwise_shift_scale",
    ),
    "lut4": (
        ct.target.iOS16, cto.palettize_weights,
        lambda: cto.OpPalettizerConfig(mode="uniform", nbits=4, weight_threshold=16), "constexpr_lut_to_dense",
    ),
    "lut6_ios18": (
        ct.target.iOS18, cto.palettize_weights,
        lambda: cto.OpPalettizerConfig(mode="uniform", nbits=6, weight_threshold=16), "constexpr_lut_to_dense",
    ),
    "lut4_groups": (
        ct.target.iOS18, cto.palettize_weights,
        lambda: cto.OpPalettizerConfig(
            mode="uniform", nbits=4, granularity="per_grouped_channel", group_size=32, weight_threshold=16
        ), "constexpr_lut_to_dense",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMATS)
def test_a_compressed_weight_is_what_apples_tool_makes_of_it(name: str, tmp_path: Path) -> None:
    target, compress, config, operator = FORMATS[name]
    x = torch.randn(1, 3, 64)
    plain = convert(Layer(), tmp_path / "plain.mlpackage", (x,), minimum_deployment_target=target)
    small = compress(plain, cto.OptimizationConfig(global_config=config()))
    small.save(str(tmp_path / "small.mlpackage"))
    cto.decompress_weights(small).save(str(tmp_path / "again.mlpackage"))
    found = {}
    for kind in ("plain", "small", "again"):
        package = mil.Package(str(tmp_path / f"{kind}.mlpackage"))
        function = package.function("main")
        assert (operator in {x.kind for x in function.operations}) == (kind == "small")
        (found[kind],) = mil_ops.compile(package, "main")({function.inputs[0].name: x.numpy()}).values()
    np.testing.assert_allclose(found["small"], found["again"], atol=1e-6)
    assert 1e-5 < abs(found["small"] - found["plain"]).max() < 1  # it was compressed, and not to noise


# --- damage -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("good") / "good.mlpackage"
    convert(Layer(), path, (torch.randn(1, 3, 64),), compute_precision=ct.precision.FLOAT16)
    return path


def damaged(good: Path, tmp_path: Path, file: str, change: Callable[[bytes], bytes]) -> str:
    path = tmp_path / "bad.mlpackage"
    shutil.copytree(good, path)
    (path / file).write_bytes(change((path / file).read_bytes()))
    return str(path)


@pytest.mark.parametrize(
    ("file", "change", "says"),
    [
        (mil.WEIGHTS, lambda x: x[:2000], r"weight\.bin: the constant at \d+ ends at \d+, after the file's 2000 bytes"),
        (mil.WEIGHTS, lambda x: x[:64] + b"\0" * 4 + x[68:], r"does not begin with 0xDEADBEEF but with 0x0"),
        (mil.WEIGHTS, lambda x: x[:64], r"lies outside the file of 64 bytes"),
        (mil.WEIGHTS, lambda x: x[:72] + (8).to_bytes(8, "little") + x[80:], r"has 8 bytes; 6144 float16 of 16 bits"),
        (mil.MODEL, lambda x: x[: len(x) // 2], r"model\.mlmodel: ends in the middle"),
        (mil.MODEL, lambda x: b"\x08\x09", "holds no ML program"),
        (mil.MODEL, lambda x: x.replace(b"linear", b"lineal"), "no operator lineal in this interpreter"),
        (mil.MODEL, lambda x: x.replace(b"weight.bin", b"weight.bim"), r"not in weights/weight\.bin"),
        (mil.MODEL, lambda x: x.replace(b"main", b"mine"), "no function 'main'"),
    ],
)
def test_a_damaged_package_is_refused_and_says_where(
    file: str, change: Callable[[bytes], bytes], says: str, good: Path, tmp_path: Path
) -> None:
    path = damaged(good, tmp_path, file, change)
    with pytest.raises((mil.BadPackage, mil_ops.Unsupported), match=says):
        mil_ops.compile(mil.Package(path), "main")


def test_no_cut_of_a_program_passes_or_crashes(good: Path, tmp_path: Path) -> None:
    whole = (good / mil.MODEL).read_bytes()
    for cut in range(1, len(whole), 97):
        shutil.rmtree(tmp_path / "bad.mlpackage", ignore_errors=True)
        with pytest.raises((mil.BadPackage, mil_ops.Unsupported)):
            mil_ops.compile(mil.Package(damaged(good, tmp_path, mil.MODEL, lambda x, n=cut: x[:n])), "main")


def test_inputs_must_fit(good: Path) -> None:
    package = mil.Package(str(good))
    run, name = mil_ops.compile(package, "main"), package.function("main").inputs[0].name
    with pytest.raises(ValueError, match=r"has shape \(1, 4, 64\), not \(1, 3, 64\)"):
        run({name: np.zeros((1, 4, 64))})
    with pytest.raises(ValueError, match="is missing"):
        run({})
    with pytest.raises(mil.BadPackage, match=r"model\.mlmodel: No such file"):
        mil.Package(str(good / "nowhere"))
