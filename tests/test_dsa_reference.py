"""The numpy definition against independent code: torch's own attention, and selection written as dense masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from edgeformer.attention import reference as ref  # noqa: E402

THETA = {ref.THRESHOLD: 0.12, ref.TOP_P: 0.7, ref.TOP_K: 3.0}


def random(seed: int, *shape: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def scorer(heads: int, dim: int, theta: Any, lists: int | None = None, rank: int = 16) -> ref.Scorer:
    w, biases = (
        (random(s, heads, dim, rank) / 2 for s in (11, 12)),
        (random(13, heads, 17) / 3, random(14, heads, 1) / 3),
    )
    return ref.Scorer(*w, *biases, np.full(lists or heads, theta, np.float32))


def sdpa(q: Any, k: Any, v: Any, mask: Any, groups: int) -> np.ndarray[Any, Any]:
    wide = [torch.from_numpy(x).double() for x in (q, k.repeat(groups, 1), v.repeat(groups, 1))]
    return np.asarray(torch.nn.functional.scaled_dot_product_attention(*wide, attn_mask=torch.from_numpy(mask)))


@pytest.mark.parametrize(
    "heads, groups, q_rows, k_rows, causal, offset, length",
    [
        (4, 4, 200, 200, 0, 0, None),
        (4, 2, 130, 130, 1, 0, None),
        (4, 2, 200, 200, 0, 0, (200, 70)),
        (4, 1, 1, 300, 1, 299, None),
        (2, 2, 3, 257, 1, 254, None),
        (2, 2, 64, 64, 0, 0, (64, 0)),
        (2, 1, 100, 230, 1, 130, (60, 190)),
    ],
)
def test_theta_0_is_dense(
    heads: int, groups: int, q_rows: int, k_rows: int, causal: int, offset: int, length: Any
) -> None:
    batch, dim = 2, 32
    q, k, v = random(1, batch, heads, q_rows, dim), *(random(s, batch, groups, k_rows, dim) for s in (2, 3))
    q_len = np.array(length if length and q_rows == k_rows else [q_rows] * batch)
    kv_len = np.array(length or [k_rows] * batch)
    c = ref.Config(causal=causal, q_offset=offset)
    out = ref.fused(c, q, k, v, scorer(heads, dim, 0), q_len, kv_len)
    mask = np.broadcast_to(np.arange(k_rows) < kv_len[:, None, None, None], (batch, 1, q_rows, k_rows))
    if causal:
        mask = mask & (np.arange(k_rows) <= offset + np.arange(q_rows)[:, None])
    want = sdpa(q, k, v, mask, heads // groups)
    for b in range(batch):
        valid = q_len[b] if kv_len[b] else 0
        assert np.abs(out[b, :, :valid] - want[b, :, :valid]).max(initial=0) < 1e-12
        assert not out[b, :, valid:].any()


def dense_masks(c: ref.Config, q: Any, k: Any, s: ref.Scorer) -> Any:
    """Kept blocks [H, nQ, nK] for full lengths without clamps, as one would write it in torch."""
    _, n, d = q[0].shape
    pooled = [torch.from_numpy(x[0]).reshape(-1, n // b, b, d).mean(2) for x, b in ((q, c.block_q), (k, c.block_k))]
    zq, zk = (torch.einsum("hnd,hdr->hnr", p, torch.from_numpy(w)) for p, w in zip(pooled, (s.wq, s.wk), strict=True))
    i, j = torch.arange(zq.shape[1])[:, None], torch.arange(zk.shape[1])[None]
    reach = s.dist_bias.shape[1] // 2
    z = zq @ zk.transpose(1, 2)
    z = z + torch.from_numpy(s.dist_bias)[:, ((j - i * c.block_q // c.block_k).clamp(-reach, reach) + reach)]
    z[:, :, 0] += torch.from_numpy(s.sink_bias)[:, 0, None]
    forced = (j * c.block_k < (i + 1) * c.block_q) & ((j + 1) * c.block_k > i * c.block_q)
    if c.causal:
        hidden = j * c.block_k > (i + 1) * c.block_q - 1
        z, forced = z.masked_fill(hidden, -torch.inf), forced & ~hidden
    p = z.softmax(-1)
    if c.rule == ref.THRESHOLD:
        kept = p >= float(s.theta[0])
    else:
        _, order = torch.sort(p + 10 * forced, dim=-1, descending=True, stable=True)
        real = p.gather(-1, order)
        inside = torch.arange(p.shape[-1]) < s.theta[0]
        if c.rule == ref.TOP_P:
            inside = (real.cumsum(-1) - real) < float(s.theta[0])
        kept = torch.zeros_like(p, dtype=torch.bool).scatter(-1, order, inside.expand_as(p))
    return ((kept | forced) & torch.isfinite(z)).numpy()


@pytest.mark.parametrize("rule", THETA)
@pytest.mark.parametrize("causal", [0, 1])
@pytest.mark.parametrize("block_q, block_k", [(64, 64), (32, 64), (64, 32)])
def test_selection_and_output_equal_a_masked_dense_attention(
    rule: int, causal: int, block_q: int, block_k: int
) -> None:
    heads, n, dim = 3, 512, 32
    q, k, v = (random(s, 1, heads, n, dim) for s in (4, 5, 6))
    c, s = ref.Config(rule=rule, causal=causal, block_q=block_q, block_k=block_k), scorer(heads, dim, THETA[rule])
    lists, kept = ref.select(c, q, k, s), dense_masks(c, q, k, s)
    for h, i in np.ndindex(*kept.shape[:2]):
        np.testing.assert_array_equal(lists.idx[0, h, i, : lists.cnt[0, h, i]], np.flatnonzero(kept[h, i]))
    assert 0 < kept.mean() < 0.9
    mask = kept.repeat(block_q, 1).repeat(block_k, 2)[None]
    if causal:
        mask = mask & np.tri(n, dtype=bool)
    np.testing.assert_allclose(ref.attend(c, q, k, v, lists), sdpa(q, k, v, mask, 1), atol=1e-12)


@pytest.mark.parametrize("rule", THETA)
@pytest.mark.parametrize("least, most, sinks", [(1, 0, 0), (2, 4, 1), (8, 0, 0), (0, 1, 2)])
def test_every_list_is_well_formed(rule: int, least: int, most: int, sinks: int) -> None:
    q, k = (random(s, 1, 2, 500, 32) for s in (7, 8))
    c = ref.Config(rule=rule, min_blocks=least, max_blocks=most, n_sink=sinks)
    idx, cnt = ref.select(c, q, k, scorer(2, 32, THETA[rule]))
    for h, i in np.ndindex(2, 8):
        kept = idx[0, h, i, : cnt[0, h, i]]
        assert (np.diff(kept) > 0).all() and (idx[0, h, i, len(kept) :] == -1).all()
        assert min(least, 8) <= len(kept) <= (most or 8)
        assert most == 1 or (i in kept and (not sinks or 0 in kept))


def test_ties_go_left_and_forced_goes_first() -> None:
    q, k = (random(s, 1, 1, 512, 32) for s in (7, 8))
    zero = ref.Scorer(*(np.zeros_like(x) for x in scorer(1, 32, 0)[:4]), np.array([3.0]))
    idx, _ = ref.select(ref.Config(rule=ref.TOP_K), q, k, zero)
    assert [idx[0, 0, i, :3].tolist() for i in (0, 1, 5)] == [[0, 1, 2], [0, 1, 2], [0, 1, 5]]


def test_float64_selection_agrees_wherever_the_margin_is_clear() -> None:
    q, k = (random(s, 1, 4, 500, 64) for s in (1, 2))
    for rule, theta in THETA.items():
        c, s = ref.Config(rule=rule, block_q=32, block_k=32), scorer(4, 64, theta)
        exact, single = ref.select(c, q, k, s, dtype=np.float64), ref.select(c, q, k, s)
        for row in ref.mass_rows(c, q, k, s):
            for h in range(4):
                if ref.margin(c, row.mass[h], row.forced, theta, 500) > 1e-5:
                    np.testing.assert_array_equal(exact.idx[0, h, row.i], single.idx[0, h, row.i])


def test_per_kv_lists_average_the_heads_of_a_group() -> None:
    q, k = random(1, 1, 4, 256, 32), random(2, 1, 2, 256, 32)
    s = scorer(4, 32, 0.2, lists=2)
    each = [row.mass for row in ref.mass_rows(ref.Config(), q, k, s)]
    both = [row.mass for row in ref.mass_rows(ref.Config(select_per_kv=1), q, k, s)]
    for four, two in zip(each, both, strict=True):
        np.testing.assert_allclose(two, four.reshape(2, 2, -1).mean(1), rtol=1e-6)
