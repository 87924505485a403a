"""What docs/migrate.md says about xformers: its masks, stored as it documents them, and layouts; and the calls here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flashtile
from flashtile.testing import cu_seqlens_of

LENGTHS = [(6, 6), (3, 7), (7, 3)]
Expected = Callable[[Tensor, Tensor], Tensor]
TRANSLATIONS: list[tuple[str, Expected, Callable[[int, int], dict[str, Any]]]] = [
    (
        "LowerTriangularMask",
        lambda i, j: j <= i,
        lambda m, n: {"causal": True} if m == n else {"mask": torch.ones(m, n, dtype=torch.bool).tril()},
    ),
    ("LowerTriangularFromBottomRightMask", lambda i, j: j - j.max() <= i - i.max(), lambda *_: {"causal": True}),
    (
        "LocalAttentionFromBottomRightMask(2, 1)",
        lambda i, j: (j - j.max() >= i - i.max() - 2) & (j - j.max() <= i - i.max() + 1),
        lambda *_: {"window": (2, 1)},
    ),
    (
        "LowerTriangularFromBottomRightLocalAttentionMask(3)",
        lambda i, j: (j - j.max() > i - i.max() - 3) & (j - j.max() <= i - i.max()),
        lambda *_: {"window": (3 - 1, 0)},
    ),
]


def formula(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """xformers' definition on [..., seqlen, head_dim]; rows that see nothing are 0 here."""
    weights = torch.softmax(q * q.shape[-1] ** -0.5 @ k.mT + bias, dim=-1)
    return weights.nan_to_num() @ v


@pytest.mark.parametrize(("seqlen_q", "seqlen_kv"), LENGTHS)
@pytest.mark.parametrize(("visible", "options"), [t[1:] for t in TRANSLATIONS], ids=[t[0] for t in TRANSLATIONS])
def test_masks(visible: Expected, options: Callable[[int, int], dict[str, Any]], seqlen_q: int, seqlen_kv: int) -> None:
    q, (k, v) = torch.randn(2, seqlen_q, 3, 8), torch.randn(2, 2, seqlen_kv, 3, 8).unbind()
    bias = torch.where(visible(torch.arange(seqlen_q)[:, None], torch.arange(seqlen_kv)), 0.0, -torch.inf)
    expected = formula(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), bias).transpose(1, 2)
    torch.testing.assert_close(flashtile.attention(q, k, v, **options(seqlen_q, seqlen_kv)), expected)


def test_a_tensor_as_bias() -> None:
    q, k, v = torch.randn(3, 2, 6, 3, 8).unbind()
    bias = torch.randn(2, 3, 6, 6).masked_fill(torch.rand(2, 3, 6, 6) < 0.3, -torch.inf)
    expected = formula(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), bias).transpose(1, 2)
    torch.testing.assert_close(flashtile.attention(q, k, v, bias=bias), expected)
    hides = torch.where(bias.isfinite(), 0.0, bias)
    expected = flashtile.attention(q, k, v, bias=hides)
    torch.testing.assert_close(flashtile.attention(q, k, v, mask=hides == 0), expected)


def test_one_head_and_groups_of_heads() -> None:
    q, k, v = torch.randn(3, 2, 6, 8).unbind()
    found = flashtile.attention(q[:, :, None], k[:, :, None], v[:, :, None])[:, :, 0]
    torch.testing.assert_close(found, formula(q, k, v, torch.zeros(())))

    q, (k, v) = torch.randn(2, 6, 3, 4, 8), torch.randn(2, 2, 6, 3, 1, 8).expand(2, 2, 6, 3, 4, 8).unbind()
    q_last, k_last, v_last = (x.permute(0, 2, 3, 1, 4) for x in (q, k, v))  # [batch, groups, heads, seqlen, head_dim]
    expected = formula(q_last, k_last, v_last, torch.zeros(())).permute(0, 3, 1, 2, 4)
    found = flashtile.attention(q.flatten(2, 3), k[:, :, :, 0], v[:, :, :, 0])
    torch.testing.assert_close(found.unflatten(2, (3, 4)), expected)


def test_block_diagonal() -> None:
    q, k, v = torch.randn(3, 1, 9, 2, 8).unbind()
    cu = cu_seqlens_of([4, 0, 5])
    found = flashtile.attention_varlen(
        q[0], k[0], v[0], cu_seqlens_q=cu, cu_seqlens_kv=cu, max_seqlen_q=5, max_seqlen_kv=5, causal=True
    )
    sequences = [
        flashtile.attention(q[:, rows], k[:, rows], v[:, rows], causal=True) for rows in (slice(4), slice(4, 9))
    ]
    torch.testing.assert_close(found[None], torch.cat(sequences, dim=1))
