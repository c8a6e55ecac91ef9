"""
Core ML: one .mlpackage, a function `length_N` a sequence length, one copy of the weights. For iOS 18 and later.

Functions and not enumerated shapes, though both need iOS 18 for a model of two inputs: every shape is a constant then,
and masks and positions fold away. ML programs have no custom operator: sparse attention becomes standard operators
(see `attention.static`) in the layers and at the lengths where that is less work.
"""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    logging.getLogger("coremltools").setLevel(logging.ERROR)  # it is tested with older releases of torch, and says so
    import coremltools as ct
import torch

from edgeformer_agent import wire

from .. import rms_norm, rounding
from ..attention import static, swap
from ..attention.dsa import Scorer
from ..attention.reference import TOP_K
from ..coreml_package import MANIFEST, MASKED, Converted, assemble
from ..errors import ExportError
from ..model import Model
from ..program import Program

PRECISIONS = ("int8", "fp16", "int4", "fp32")
RULE = TOP_K  # a program holds a fixed number of blocks a head
RUNTIME = wire.Runtime("Core ML", "8", "99")  # 8 came with iOS 18; later ones open older packages
PACKAGE = "model.mlpackage"
# Of the converter's 90 passes those that encoders need. Out are, on purpose: fp16 (set in `coreml_package`), and guards
# against negative indices, which no token or position has: they would put five operators before every table.
PASSES = [
    f"common::{name}"
    for name in (
        "update_output_dtypes", "cast_optimization", "noop_elimination", "const_elimination",
        "sanitize_input_output_names", "divide_to_multiply", "select_optimization", "fuse_matmul_weight_bias",
        "fuse_linear_bias", "fuse_gelu_tanh_approximation", "fuse_gelu_exact", "rank0_expand_dims_swap",
        "fuse_squeeze_expand_dims", "reduce_transposes", "fuse_conv_bias", "fuse_layernorm_or_instancenorm",
        "fuse_reduce_mean", "merge_consecutive_reshapes", "merge_consecutive_transposes", "fuse_transpose_matmul",
        "reduce_transposes", "remove_redundant_ops", "const_elimination", "cast_optimization", "dead_code_elimination",
        "const_deduplication", "dedup_op_and_var_names", "topological_reorder", "dead_code_elimination",
    )
]  # fmt: skip
_aten = torch.ops.aten


def export(model: Model, precisions: Sequence[str]) -> Iterator[Program]:
    """
    Batch 1, static shapes: a function for each of `model.lengths`, `length_0` where there is no sequence.
    Raises ExportError with the converter's own words.
    """
    converted: dict[int, Converted] = {}
    sparse: dict[str, Any] = {}
    made: list[Any] = []  # the converter's results; their weights lie in folders that live as long as they do
    try:
        for length in model.lengths or (0,):
            converted[length], account = _converted(model, length, made)
            sparse |= {str(length): account} if account else {}
    except Exception as error:
        raise ExportError(f"coreml: {model.name} does not convert: {type(error).__name__}: {error}") from error
    for precision in precisions:
        package = assemble(converted, precision, rounding.chosen(model, precision))
        order = sorted(package.files, key=lambda name: (name != MANIFEST, name))
        yield Program(
            format="coreml",
            precision=precision,
            files={f"{PACKAGE}/{name}": package.files[name] for name in order},
            inputs=model.inputs,
            outputs=(model.output,),
            lengths=model.lengths,
            runtime=RUNTIME,
            needs=wire.Needs(),
            work=package.work,
            sparse_layers=sparse,
        )


def _converted(model: Model, length: int, made: list[Any]) -> tuple[Converted, dict[str, Any]]:
    """One length in fp32, inputs and output under the model's names; and which layers are sparse in it."""
    with torch.no_grad(), _quiet():
        with _attention(model, length) as (module, account):
            program = torch.export.export(module, model.example(length)).run_decompositions(_decompositions())
        rms_norm.scale(program.graph)
        converted: Any = ct.convert(
            program,
            convert_to="mlprogram",
            minimum_deployment_target=ct.target.iOS18,
            compute_precision=ct.precision.FLOAT32,
            pass_pipeline=ct.PassPipeline(PASSES, "edgeformer"),
            skip_model_load=True,
            outputs=[ct.TensorType(name=model.output.name)],
        )
    made.append(converted)
    spec = converted.get_spec()
    for tensor, feature in zip(model.inputs, list(spec.description.input), strict=True):
        ct.utils.rename_feature(spec, feature.name, tensor.name, rename_outputs=False)
    return Converted(spec, Path(converted.weights_dir) / "weight.bin"), account


@contextmanager
def _attention(model: Model, length: int) -> Iterator[tuple[torch.nn.Module, dict[str, Any]]]:
    """The module with its sparse layers in the form that this length gets, and an account of them."""
    if not any(isinstance(m, Scorer) for m in model.module.modules()):
        yield model.module, {}
        return
    module = copy.deepcopy(model.module)
    if swap.has_thetas(module):
        swap.for_length(module, length)
    layers = swap.layers(module)
    scored = [layer for layer in layers if hasattr(layer.module, swap.SCORER)]
    tokens = length or _tokens(model)
    found = {x.number: static.form(swap.scorer(x), tokens) for x in scored}
    forms = {number: made for number, made in found.items() if not isinstance(made, str)}
    account: dict[str, Any] = {"sparse": len(forms), "layers": len(layers)}
    if reasons := sorted({made for made in found.values() if isinstance(made, str)}):
        account["dense_because"] = reasons
    with swap.replaced(module, lambda layer: forms.get(layer.number)):
        if not forms:
            swap.switch(module, "eager")
        yield module, account


def _tokens(model: Model) -> int:
    """How many its attention sees where no input is a sequence: an image gives some for its patches."""
    counted = _Count()
    with swap.replaced(model.module, lambda _: counted):
        model.module(*model.example(0))
    return counted.rows


class _Count(torch.nn.Module):
    """In place of attention: notes how many rows it is asked for."""

    rows = 0

    def forward(self, q: torch.Tensor, *_: Any) -> torch.Tensor:
        self.rows = q.shape[2]
        return q


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the converter's progress bars; what fails it raises."""
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


# --- what the converter does not know, in operators that it does ------------------------------------------------------


def _decompositions() -> dict[Any, Any]:
    return {
        _aten.new_ones.default: _new_ones,
        _aten.where.ScalarOther: lambda condition, x, y: torch.where(condition, x, _number(y)),
        _aten.__and__.Tensor: torch.logical_and,
        _aten.alias.default: lambda x: x,
        _aten.gelu.default: _gelu,
        _aten.scaled_dot_product_attention.default: _dense_attention,
    }


def _gelu(x: torch.Tensor, *, approximate: str = "none") -> torch.Tensor:
    """The converter (9.0) overlooks `approximate`; spelled out, a pass of its own finds the operator again."""
    if approximate == "none":
        unchanged: torch.Tensor = NotImplemented
        return unchanged
    return 0.5 * x * (1.0 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * torch.pow(x, 3))))


def _dense_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    dropout: float = 0.0,  # noqa: ARG001 (0 in a model that is not trained)
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Of a layer that stays dense between sparse ones."""
    if enable_gqa and q.shape[1] != k.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    logits = q @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
    if is_causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril()
    if mask is not None:
        bias = torch.where(mask, _number(0.0), _number(-MASKED)) if mask.dtype == torch.bool else mask
        logits = logits + bias
    return logits.softmax(-1) @ v


def _new_ones(x: torch.Tensor, size: Sequence[int], dtype: torch.dtype | None = None, **_: Any) -> torch.Tensor:
    dtype = dtype or x.dtype
    return torch.full(size, dtype == torch.bool or 1, dtype=dtype)


def _number(value: float) -> torch.Tensor:
    """A mask that fp16 can hold, also where two are added."""
    return torch.full((), max(min(float(value), MASKED), -MASKED))
