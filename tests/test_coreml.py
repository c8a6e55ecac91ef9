"""Core ML packages: every family through the interpreter, shared weights, same bytes, sparse layers, Apple's reader."""

from __future__ import annotations

import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("coremltools")

import edgeformer as ef  # noqa: E402
from edgeformer import check, data, formats, model as models, rms_norm  # noqa: E402
from edgeformer.attention import dsa, scorer, swap  # noqa: E402
from edgeformer.attention.reference import THRESHOLD, TOP_K, Config  # noqa: E402
from edgeformer.errors import ExportError  # noqa: E402
from edgeformer.program import Program  # noqa: E402
from edgeformer_agent import mil, mil_ops, wire  # noqa: E402

coreml = formats.load("coreml")
import coremltools as ct  # noqa: E402
from coremltools.converters.mil.frontend.milproto.load import load as read_by_apple  # noqa: E402


def entry(program: Program) -> wire.Entry:
    """As build() writes it, as far as a runner looks."""
    nothing = wire.Fidelity("", 0, 0, 0, 0), wire.Prediction("", 1, wire.Metrics(), 1, 1, "")
    return wire.Entry(
        program.name, program.format, program.precision, program.entry, program.size_bytes, program.inputs,
        program.outputs, program.lengths, program.runtime, program.needs, program.work, nothing[1], nothing[0], 0.9,
    )  # fmt: skip


def kinds(program: Program, length: int) -> Counter[str]:
    with check.opened(program) as path:
        function = mil.Package(str(Path(path).parent)).function(f"length_{length}")
    return Counter(operation.kind for operation in function.operations)


@pytest.fixture(scope="module")
def bert() -> tuple[models.Model, dict[str, Program]]:
    model = models.load(families.tiny("bert"), name="tiny", lengths=(16, 48))
    return model, {program.precision: program for program in coreml.export(model, coreml.PRECISIONS)}


@pytest.mark.parametrize(
    ("precision", "least", "furthest"),
    [("fp32", 0.9999999, 1e-6), ("fp16", 0.99999, 2e-3), ("int8", 0.999, 0.01), ("int4", 0.99, 0.1)],
)
def test_each_precision_is_as_close_as_it_can_be(
    precision: str, least: float, furthest: float, bert: tuple[models.Model, dict[str, Program]]
) -> None:
    model, programs = bert
    program = programs[precision]
    rows = data.load(model, None, None).rows
    wanted = check.reference(model, rows, lambda _: None)
    found = check.fidelity(model, check.run(program, entry(program), rows, lambda _: None), wanted, None)
    assert found.worst > least and found.max_abs < furthest, found
    compressed = {"fp32": 0, "fp16": 0, "int8": 5, "int4": 5}[precision]  # words, and the wide layers of 2048 weights
    assert kinds(program, 16)["constexpr_blockwise_shift_scale"] == compressed


def test_precisions_differ_in_size_and_not_in_arithmetic(bert: tuple[models.Model, dict[str, Program]]) -> None:
    _, programs = bert
    work = {name: program.work[-1] for name, program in programs.items()}
    assert work["fp32"].weight_bytes == 2 * work["fp16"].weight_bytes
    assert work["fp16"].weight_bytes > work["int8"].weight_bytes > work["int4"].weight_bytes
    assert len({w.flops for w in work.values()}) == 1 and {w.int8_ops for w in work.values()} == {0.0}
    tokens, hidden, wide, layers = 48, 32, 64, 2
    linear = tokens * hidden * (4 * hidden + 2 * wide)
    assert work["fp16"].flops == 2 * layers * (linear + 2 * tokens * tokens * hidden)


def test_a_package_is_what_apples_own_reader_reads(bert: tuple[models.Model, dict[str, Program]]) -> None:
    """It checks the types and shapes of every operator against the operator set."""
    for program in bert[1].values():
        with check.opened(program) as path:
            folder = Path(path).parent
            assert folder.name == "model.mlpackage" and Path(path).name == "Manifest.json"
            spec = ct.utils.load_spec(str(folder))
            read = read_by_apple(spec, spec.specificationVersion, str(folder / mil.WEIGHTS).rpartition("/")[0])
        assert set(read.functions) == {"length_16", "length_48"}
        described = {f.name: [x.name for x in (*f.input, *f.output)] for f in spec.description.functions}
        names = [*(x.name for x in program.inputs), program.outputs[0].name]
        assert described == dict.fromkeys(("length_16", "length_48"), names)


def test_the_same_model_gives_the_same_bytes(bert: tuple[models.Model, dict[str, Program]]) -> None:
    _, programs = bert
    (again,) = coreml.export(models.load(families.tiny("bert"), name="tiny", lengths=(16, 48)), ["int8"])
    assert again.files == programs["int8"].files
    manifest = json.loads(again.files["model.mlpackage/Manifest.json"])
    assert {x["path"] for x in manifest["itemInfoEntries"].values()} == {
        "com.apple.CoreML/model.mlmodel", "com.apple.CoreML/weights"
    }  # fmt: skip
    whole = b"".join(again.files.values())
    assert not any(x in whole for x in (b"coremltools", b"conversion_date", str(Path.home()).encode()))


def test_several_lengths_share_their_weights(bert: tuple[models.Model, dict[str, Program]]) -> None:
    (one,) = coreml.export(models.load(families.tiny("bert"), name="tiny", lengths=(48,)), ["fp16"])
    weights = [len(p.files[f"model.mlpackage/{mil.WEIGHTS}"]) for p in (one, bert[1]["fp16"])]
    assert weights[0] < weights[1] < 1.2 * weights[0]  # a table of positions for the shorter length


def test_what_cannot_be_converted_is_named() -> None:
    class Odd(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, x: Any) -> Any:
            return torch.special.bessel_j0(x)

    model = models.load(Odd(), example=(torch.ones(1, 4),), name="odd")
    with pytest.raises(ExportError, match=r"coreml: odd does not convert: .*special_bessel_j0"):
        list(coreml.export(model, ["fp32"]))


def test_the_approximate_gelu_stays_approximate() -> None:
    class Approximate(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, x: Any) -> Any:
            return torch.nn.functional.gelu(x, approximate="tanh")

    x = torch.linspace(-4, 4, 64)[None]
    model = models.load(Approximate(), example=(x,), name="gelu")
    (program,) = coreml.export(model, ["fp32"])
    (got,) = check.run(program, entry(program), [{"x0": x[0].numpy()}], lambda _: None)
    np.testing.assert_allclose(got, Approximate()(x)[0].numpy(), atol=1e-6)
    assert kinds(program, 0) == {"const": 1, "gelu": 1}


@pytest.mark.slow
def test_a_decoder_of_large_numbers_fits_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    model = families.loud(3000)
    rows = data.load(model, None, None).rows[:16]
    wanted = check.reference(model, rows, lambda _: None)

    def found() -> list[wire.Fidelity]:
        programs = coreml.export(model, ["fp32", "fp16"])
        outputs = [check.run(program, entry(program), rows, lambda _: None) for program in programs]
        return [check.fidelity(model, x, wanted, None) for x in outputs]

    full, half = found()
    assert full.worst > 1 - 1e-5 and half.worst > 0.98
    monkeypatch.setattr(coreml.rms_norm, "scale", lambda _: 0)
    full, half = found()
    assert full.worst > 1 - 1e-5 and half.mean < 0.9


@pytest.mark.parametrize("epsilon", [1e-6, 1e-5, 0.1])
def test_a_scaled_norm_is_the_same_norm(epsilon: float) -> None:
    class Norm(torch.nn.Module):  # type: ignore[misc, name-defined]
        def forward(self, x: Any) -> Any:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + epsilon)

    rows = torch.randn(1, 8, 64) * torch.tensor([0, 1e-7, 1e-4, 1e-3, 0.1, 1, 1e3, 1e4])[:, None]
    rows[0, 6, 3] = 6e4
    program = torch.export.export(Norm(), (rows,)).run_decompositions()
    assert rms_norm.scale(program.graph) == 1
    program.graph_module.recompile()
    (half,) = program.graph_module(rows.half())
    (single,) = program.graph_module(rows)
    wanted = Norm()(rows.double())
    torch.testing.assert_close(single.double(), wanted, rtol=2e-6, atol=1e-9)
    torch.testing.assert_close(half.double()[:, 2:], wanted[:, 2:], rtol=3e-3, atol=1e-4)


def sparse_bert(counts: list[float]) -> models.Model:
    import transformers as hf

    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=200, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=128,
    )  # fmt: skip
    module = hf.BertModel(config).eval()
    for parameter in module.parameters():
        parameter.data.mul_(3 if parameter.ndim > 1 else 1)
    made = torch.Generator().manual_seed(1)
    model = models.load(module, name="sparse", lengths=(64, 128))

    def parameters(layer: swap.Layer) -> Any:
        given = dsa.fresh(layer.heads, layer.dim, rank=8, generator=made)
        return given._replace(theta=torch.tensor(counts)) if layer.number else None  # the first layer stays dense

    swap.install(model.module, parameters, Config(block_q=16, block_k=16, rule=TOP_K, dense_below=64))
    return model


def test_sparse_layers_become_standard_operators_where_that_is_less_work() -> None:
    model = sparse_bert([2.0, 2.0, 4.0, 4.0])
    exact, rounded = coreml.export(model, ["fp32", "fp16"])
    assert kinds(exact, 64)["greater"] == 0 and kinds(exact, 128)["greater"] == 1  # one sparse layer, by its rank
    dense = {w.length: w.flops for w in next(iter(coreml.export(_dense(model), ["fp32"]))).work}
    work = {w.length: w.flops for w in exact.work}
    assert work[64] == dense[64] and work[128] < dense[128]
    ids = [np.arange(n, dtype=np.int32) % 190 + 3 for n in (17, 64, 90, 128)]
    rows = [{"input_ids": x, "attention_mask": np.ones_like(x), "token_type_ids": np.zeros_like(x)} for x in ids]
    rows = [
        {**r, "attention_mask": np.ones_like(r["input_ids"]), "token_type_ids": np.zeros_like(r["input_ids"])}
        for r in rows
    ]
    wanted = check.reference(model, [{k: v.astype(np.int32) for k, v in r.items()} for r in rows], lambda _: None)
    for program, close in ((exact, 2e-6), (rounded, 5e-3)):
        for got, y in zip(check.run(program, entry(program), rows, lambda _: None), wanted, strict=True):
            np.testing.assert_allclose(got, y, atol=close)
    plain = check.reference(_dense(model), rows[-1:], lambda _: None)
    assert abs(plain[0] - wanted[-1]).max() > 1e-3  # what is compared is not dense attention


def _dense(model: models.Model) -> models.Model:
    module = copy.deepcopy(model.module)
    swap.remove(module, "eager")
    return model.after("dense", module, facts={})


def test_the_operators_of_the_static_form_are_counted(bert: tuple[models.Model, dict[str, Program]]) -> None:
    """Nothing of it may hide in a dense program."""
    found = kinds(bert[1]["fp32"], 48)
    assert not {"greater", "topk", "less"} & set(found), found


@pytest.mark.slow
def test_builds_for_the_iphone(tmp_path: Path, config_home: Path) -> None:
    options: dict[str, Any] = {"name": "tiny", "lengths": (16, 48), "gate": 0.9, "version": 1}
    one = ef.build(families.tiny("bert"), "iphone-13", out=tmp_path / "a", **options)
    two = ef.build(families.tiny("bert"), "iphone-13", out=tmp_path / "b", **options)
    one.verify()
    (program,) = one.manifest.programs
    assert program.name == "coreml-int8" and program.path.endswith("model.mlpackage/Manifest.json")
    assert sum(program.path.rpartition("/")[0] in name for name in one.manifest.files) == 3
    assert one.digest == two.digest
    assert mil_ops.compile(mil.Package(str((one.path / program.path).parent)), "length_48")


@pytest.mark.slow
def test_a_sparse_build_counts_blocks_for_core_ml_and_says_which_layers_are_sparse(
    tmp_path: Path, config_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its programs need a count where others take a threshold; the scorers are trained once for both."""
    import transformers as hf

    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
        max_position_embeddings=512,
    )  # fmt: skip
    trained, whole = [], scorer.train

    def train(stats: scorer.Statistics, _recipe: Any, **options: Any) -> scorer.Trained:
        trained.append(stats)
        return whole(stats, scorer.Recipe(steps=5), **options)

    monkeypatch.setattr(scorer, "train", train)
    options: dict[str, Any] = {"lengths": (64, 512), "gate": 0.5, "name": "long", "out": tmp_path, "precision": "fp32"}
    host, phone = ef.build(
        hf.BertModel(config).eval(), ["host", "iphone-13"], formats=["onnx", "coreml"], attention="dsa", **options
    )
    assert len(trained) == 1
    steps = [{step.name: step.facts for step in bundle.manifest.history} for bundle in (host, phone)]
    assert [s["sparsify.dsa"]["rule"] for s in steps] == [THRESHOLD, TOP_K]
    by_head = [isinstance(s["sparsify.dsa"]["theta"]["512"], list) for s in steps]
    assert by_head == [False, True]  # a threshold gives each head its share, a count has to be its own
    assert "sparse_layers" not in steps[0]["export.onnx"]
    assert steps[1]["export.coreml"]["sparse_layers"] == {
        "64": {"sparse": 0, "layers": 2, "dense_because": ["rows of up to 256 tokens are dense"]},
        "512": {"sparse": 2, "layers": 2},
    }


@pytest.mark.slow
def test_a_decoder_is_sparse_in_core_ml(tmp_path: Path, config_home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = scorer.train
    monkeypatch.setattr(scorer, "train", lambda stats, *_, **__: whole(stats, scorer.Recipe(steps=5)))
    options: dict[str, Any] = {"lengths": (320,), "gate": 0.5, "precision": "fp32", "name": "decoder", "budget": 0.5}
    bundle = ef.build(families.tiny("llama"), "iphone-13", attention="dsa", out=tmp_path, **options)
    facts = {step.name: step.facts for step in bundle.manifest.history}
    assert facts["attention"]["chosen"] == "dsa" and facts["sparsify.dsa"]["rule"] == TOP_K
    assert facts["export.coreml"]["sparse_layers"]["320"] == {"sparse": 2, "layers": 2}
