"""`edgeformer::dsa` in torch, and its plain-torch twin, against the conformance vectors and against each other."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from test_dsa_vectors import CASES, NAMES, check, operands, strided, vectors

from edgeformer.attention import dsa, op
from edgeformer.attention.reference import Config
from edgeformer.errors import BadInput

ops = torch.ops.edgeformer
BLOCK = {"block_q": 32, "block_k": 32}


def problem(n: int = 100, heads: int = 4, groups: int = 2, theta: float = 0.2, batch: int = 2) -> Any:
    generator = torch.Generator().manual_seed(n)
    q, k, v = (torch.randn(batch, h, n, 32, generator=generator) for h in (heads, groups, groups))
    s = dsa.fresh(heads, 32, generator=generator)
    bias = torch.randn(heads, 65, generator=generator) / 3
    return q, k, v, s._replace(wq=s.wq * 3, dist_bias=bias, theta=torch.full((heads,), theta))


def lengths(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


def torched(name: str) -> tuple[Any, ...]:
    case, (c, qkv, scorer, length, position_bias) = CASES[NAMES.index(name)], operands(name)
    q, k, v = (torch.from_numpy(strided(x, case["bnhd"])) for x in qkv)
    lens = [None if x is None else torch.from_numpy(np.asarray(x, np.int32)) for x in length]
    lens.append(None if position_bias is None else torch.from_numpy(position_bias))
    lists = [torch.from_numpy(x) for x in vectors.padded(case["lists"], vectors.list_shape(case))]
    parameters = type(scorer)(*(torch.from_numpy(np.asarray(x, np.float32)) for x in scorer))
    return case, c, (q, k, v), parameters, lens, lists  # the lengths, and then the position bias


@pytest.mark.parametrize("name", NAMES)
def test_vectors_through_the_operator(name: str) -> None:
    case, c, (q, k, v), s, last, (idx, cnt) = torched(name)
    attending = {**op.attention(c), "scale": c.scale, "compute": case["compute"]}
    out = ops.dsa_attend(q, k, v, idx, cnt, *last, **attending)
    check(case, out.numpy())
    if not name.startswith("lists-"):
        found = ops.dsa_select(q, k, *s, *last[:2], **op.selection(c))
        assert torch.equal(found[0], idx) and torch.equal(found[1], cnt)
        assert np.array_equal(
            ops.dsa(q, k, v, *s, *last, **{**vars(c), "compute": case["compute"]}), out, equal_nan=True
        )


@pytest.mark.parametrize("name", NAMES)
def test_vectors_through_plain_torch(name: str) -> None:
    case, c, (q, k, v), s, last, (idx, cnt) = torched(name)
    kept = dsa.from_lists(idx, cnt, -(-k.shape[2] // c.block_k))
    if not name.startswith("lists-"):
        assert torch.equal(dsa.select(c, q, k, s, *last[:2]), kept)
    again = dsa.to_lists(kept, idx.shape[-1])
    assert torch.equal(again[0], idx) and torch.equal(again[1], cnt)
    if case["compute"] == 0 and all(
        torch.isfinite(x).all() for x in (q, k, v)
    ):  # a masked sum spreads a used NaN further
        check(case, dsa.attend(c, q, k, v, kept, *last).numpy())


def test_the_schema_has_the_defaults_of_the_definition() -> None:
    found = {name: float(value) for name, value in re.findall(r"(\w+)=([\d.]+)", op.SCHEMA)}
    assert found == {**{name: float(value) for name, value in vars(Config()).items()}, "compute": 0.0}


@pytest.mark.parametrize(
    "attributes",
    [
        {**BLOCK, "causal": 1, "n_sink": 1},
        *(
            pytest.param(x, marks=pytest.mark.slow)
            for x in (BLOCK, {**BLOCK, "rule": 1, "max_blocks": 2}, {**BLOCK, "select_per_kv": 1})
        ),
    ],
    ids=str,
)
def test_opcheck(attributes: dict[str, int]) -> None:
    q, k, v, s = problem(70)
    s = s._replace(theta=s.theta[:2]) if attributes.get("select_per_kv") else s
    lens = lengths(70, 41)
    bias = torch.randn(4, 2 * 50 + 1)
    q, k, v, bias = (x.requires_grad_() for x in (q, k, v, bias))
    torch.library.opcheck(ops.dsa.default, (q, k, v, *s, lens, lens), attributes)
    torch.library.opcheck(ops.dsa.default, (q, k, v, *s, lens, lens, bias), attributes)
    torch.library.opcheck(ops.dsa_select.default, (q, k, *s, lens, lens), attributes)
    lists = ops.dsa_select(q, k, *s, lens, lens, **attributes)
    attending = {name: value for name, value in attributes.items() if name in ("block_q", "block_k", "causal")}
    torch.library.opcheck(ops.dsa_attend.default, (q, k, v, *lists, lens, lens, bias), attending)
    q, k, v, bias = (x.detach() for x in (q, k, v, bias))
    for backward in (ops.dsa_attend_backward, ops.dsa_position_backward):
        torch.library.opcheck(backward.default, (q, q, k, v, *lists, lens, lens, bias), attending)


@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("small_chunks", [False, True])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("positions", [0, 30])
def test_gradients_are_those_of_plain_torch(
    causal: int, small_chunks: bool, padded: bool, positions: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small_chunks:
        monkeypatch.setattr(op, "_GRADIENT_BYTES", 1)
    q, k, v, s = problem()
    lens, c = lengths(100, 61) if padded else None, Config(**BLOCK, causal=causal, scale=0.3)
    weight = torch.randn(q.shape)
    found = []
    bias = [torch.randn(4, 2 * positions + 1)] if positions else []
    for run in (
        lambda q, k, v, *bias: ops.dsa(q, k, v, *s, lens, lens, *bias, **vars(c)),
        lambda q, k, v, *bias: dsa.forward(c, q, k, v, s, lens, lens, *bias),
    ):
        inputs = [x.clone().requires_grad_() for x in (q, k, v, *bias)]
        (run(*inputs) * weight).sum().backward()
        found.append([x.grad for x in inputs])
    assert all(torch.isfinite(x).all() and x.abs().max() > 0 for x in found[0])
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)


def test_padding_may_hold_nan() -> None:
    q, k, v, s = problem()
    lens = lengths(100, 61)
    want = ops.dsa(q, k, v, *s, lens, lens, **BLOCK)
    for x in (q, k, v):
        x[1, :, 61:] = torch.nan
    assert torch.equal(ops.dsa(q, k, v, *s, lens, lens, **BLOCK), want)
    torch.testing.assert_close(dsa.forward(Config(**BLOCK), q, k, v, s, lens, lens), want, rtol=0, atol=1e-5)


def test_threads_change_no_bit_and_the_tally_counts() -> None:
    q, k, v, s = problem(700)
    before, outs, threads = op.counters(), [], torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            outs.append(ops.dsa(q, k, v, *s, **BLOCK))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    after = op.counters()
    kept = int(ops.dsa_select(q, k, *s, **BLOCK)[1].sum())
    assert after.calls - before.calls == 3
    assert after.kept - before.kept == 3 * kept
    assert after.candidates - before.candidates == 3 * 2 * 4 * 22 * 22


def test_strides_are_free() -> None:
    q, k, v, s = problem()
    rows = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    assert torch.equal(ops.dsa(*rows, *s, **BLOCK), ops.dsa(q, k, v, *s, **BLOCK))


def test_export_with_a_free_length() -> None:
    class Layer(torch.nn.Module):
        def forward(self, q: Any, k: Any, v: Any) -> Any:
            return ops.dsa(q, k, v, *s, **BLOCK)

    q, k, v, s = problem()
    n = torch.export.Dim("n", min=33, max=4096)
    program = torch.export.export(Layer(), (q, k, v), dynamic_shapes=({2: n},) * 3, strict=False)
    q, k, v, _ = problem(257)
    assert torch.equal(program.module()(q, k, v), Layer()(q, k, v))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q, k, v, s: ((q.double(), k, v, *s), BLOCK), "q must be float32"),
        (lambda q, k, v, s: ((q, k, v[:, :1], *s), BLOCK), "must have one shape"),
        (lambda q, k, v, s: ((q, k, v, *s[:4], s.theta[:1]), BLOCK), "theta must be float32"),
        (lambda q, k, v, s: ((q, k, v, *s), {"block_q": 40}), "block_q"),
        (lambda q, k, v, s: ((q[..., :8], k[..., :8], v[..., :8], s.wq[:, :8], s.wk[:, :8], *s[2:]), BLOCK), "dim: 16"),
        (lambda q, k, v, s: ((q, k, v, *s, torch.tensor([3, 4])), BLOCK), "lengths must be"),
        (lambda q, k, v, s: ((q, k, v, *s, None, None, torch.ones(4, 6)), BLOCK), "position_bias must be float32"),
    ],
)
def test_what_cannot_be_run_is_refused_with_a_reason(change: Any, words: str) -> None:
    arguments, attributes = change(*problem())
    with pytest.raises(BadInput, match=words):
        ops.dsa(*arguments, **attributes)


def test_lists_that_point_outside_are_refused() -> None:
    q, k, v, _ = problem(64, batch=1)
    idx, cnt = torch.zeros(1, 4, 2, 2, dtype=torch.int32), torch.ones(1, 4, 2, dtype=torch.int32)
    ops.dsa_attend(q, k, v, idx, cnt, **BLOCK)
    for bad_idx, bad_cnt in (
        (idx + 2, cnt),
        (idx - 1, cnt),
        (idx, cnt + 2),
        (idx[:, :3], cnt[:, :3]),
        (idx.long(), cnt),
    ):
        with pytest.raises(BadInput, match="dsa_attend"):
            ops.dsa_attend(q, k, v, bad_idx, bad_cnt, **BLOCK)
