"""The static form of sparse attention against the definition: the same numbers, and only where it is less work."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from edgeformer.attention import dsa, reference as ref, static  # noqa: E402
from edgeformer.attention.op import Parameters  # noqa: E402
from edgeformer.attention.reference import THRESHOLD, TOP_K, TOP_P, Config  # noqa: E402

HEADS, DIM, BLOCK = 4, 16, 16


def scorer(theta: list[float], **changes: int) -> dsa.Scorer:
    made = torch.Generator().manual_seed(1)
    given = dsa.fresh(HEADS, DIM, rank=8, dist=2, sinks=1, generator=made)
    given = Parameters(
        given.wq * 3, given.wk * 3, torch.randn(given.dist_bias.shape, generator=made),
        torch.randn(given.sink_bias.shape, generator=made), torch.tensor(theta),
    )  # fmt: skip
    return dsa.Scorer(given, Config(block_q=BLOCK, block_k=BLOCK, rule=TOP_K, **changes))


@pytest.mark.parametrize(
    ("theta", "changes", "length", "positions"),
    [
        ([2, 2, 2, 2], {}, 128, 0),
        ([1, 1, 3, 2], {"n_sink": 2}, 128, 0),  # three are forced where one is asked for
        ([2, 2, 3, 1], {"causal": 1, "n_sink": 1}, 117, 0),
        ([2, 1, 1, 2], {"causal": 1, "max_blocks": 2, "n_sink": 2}, 128, 30),
        ([0.1, 0.2, 0.15, 0.3], {"causal": 1, "rule": THRESHOLD, "max_blocks": 3}, 111, 0),
        ([1, 3, 2, 5], {}, 97, 30),
        ([2, 4, 2, 4], {"n_sink": 1}, 33, 0),
        ([3, 3, 1, 1], {"force_diag": 0}, 128, 128),
        ([4, 4, 4, 4], {"max_blocks": 2}, 70, 0),
        ([0.1, 0.2, 0.15, 0.3], {"rule": THRESHOLD, "max_blocks": 3}, 111, 9),
    ],
)
def test_it_is_the_definition_on_valid_rows(
    theta: list[float], changes: dict[str, int], length: int, positions: int
) -> None:
    layer = scorer(theta)
    layer.config = Config(**{**vars(layer.config), **changes})
    made, causal = static.form(layer, 128), bool(layer.config.causal)
    assert isinstance(made, static.Static) and static.share(made.buckets, layer.config, 128) < 1
    q, k, v = torch.randn(3, 1, HEADS, 128, DIM, generator=torch.Generator().manual_seed(2))
    lengths = torch.tensor([length], dtype=torch.int32)
    bias = torch.randn(HEADS, 2 * positions + 1) if positions else None
    got = made(q, k, v, lengths, causal, 0.0, bias)[:, :, :length].numpy()
    wanted = ref.fused(
        layer.config, q.numpy(), k.numpy(), v.numpy(), ref.Scorer(*(x.numpy() for x in layer.parameters_of())),
        lengths.numpy(), lengths.numpy(), position_bias=None if bias is None else bias.numpy(),
    )[:, :, :length]  # fmt: skip
    np.testing.assert_allclose(got, wanted, atol=2e-6)


def test_rows_that_are_no_whole_blocks_are_padded() -> None:
    layer = scorer([2, 2, 1, 3])
    made = static.form(layer, 101)
    assert isinstance(made, static.Static)
    q, k, v = torch.randn(3, 1, HEADS, 101, DIM, generator=torch.Generator().manual_seed(2))
    for lengths in (None, torch.tensor([97], dtype=torch.int32)):
        got, wanted = (x(q, k, v, lengths, False, 0.0)[:, :, :97] for x in (made, layer))
        torch.testing.assert_close(got, wanted, atol=2e-6, rtol=0)


def test_grouped_heads_see_their_own_keys() -> None:
    made = static.form(scorer([2, 2, 2, 2]), 128)
    assert isinstance(made, static.Static)
    q, k = torch.randn(1, HEADS, 128, DIM), torch.randn(1, 2, 128, DIM)
    wide = k.repeat_interleave(2, 1)
    torch.testing.assert_close(made(q, k, k, None, False, 0.0), made(q, wide, wide, None, False, 0.0))


def test_heads_share_a_width_in_at_most_three_groups() -> None:
    assert static.buckets((2, 2, 2, 2)) == (static.Bucket((0, 1, 2, 3), 2),)
    assert static.buckets((1, 8, 1, 8)) == (static.Bucket((0, 2), 1), static.Bucket((1, 3), 8))
    found = static.buckets((1, 2, 3, 9, 9, 1))
    assert len(found) == 3 and sorted(h for b in found for h in b.heads) == [0, 1, 2, 3, 4, 5]
    assert sum(len(b.heads) * b.width for b in found) == 2 * 1 + 2 * 3 + 2 * 9


@pytest.mark.parametrize(
    ("theta", "changes", "length", "why"),
    [
        ([8, 8, 8, 8], {}, 128, "1.50 times the work"),
        ([4, 4, 4, 4], {}, 65, "1.59 times the work"),  # five blocks
        ([2, 2, 2, 2], {"block_q": 32}, 128, "blocks of 32 by 16 are not square"),
        ([2, 2, 2, 2], {"dense_below": 128}, 128, "up to 128 tokens are dense"),
        ([0.1, 0.1, 0.1, 0.1], {"rule": THRESHOLD}, 128, "nothing bounds"),
        ([0.5, 0.5, 0.5, 0.5], {"rule": TOP_P}, 128, "nothing bounds"),
    ],
)
def test_dense_where_it_is_not_less_work_or_cannot_be(
    theta: list[float], changes: dict[str, int], length: int, why: str
) -> None:
    layer = scorer(theta)
    layer.config = Config(**{**vars(layer.config), **changes})
    made = static.form(layer, length)
    assert isinstance(made, str) and why in made
