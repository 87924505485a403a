"""S_dmask, the attention weights with dropout's pattern in their signs, which flash_attn returns for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashtile.functional import attention_varlen
from flashtile.nn.padding import packed_positions
from flashtile.spec.dropout import keep_mask


@torch.no_grad()
def probabilities_with_signs(q: Tensor, k: Tensor, *, dropout_p: float, dropout_seed: Tensor, **options: Any) -> Tensor:
    """The weights of ``attention_varlen`` before dropout, negative where dropout drops them.

    Attention to values that are the rows of the identity matrix returns the weights themselves.

    Args:
        q: [tokens_q, heads_q, head_dim].
        k: [tokens_kv, heads_kv, head_dim].
        dropout_p, dropout_seed: of the call whose pattern is wanted.
        options: the packing and the other options of the call.

    Returns:
        [batch, heads_q, max_seqlen_q, max_seqlen_kv] in q's dtype.
    """
    cu_seqlens_q, seqlen_q, seqlen_kv = (options[name] for name in ("cu_seqlens_q", "max_seqlen_q", "max_seqlen_kv"))
    batch, heads_q, device = cu_seqlens_q.shape[0] - 1, q.shape[-2], q.device
    if 0 in (*q.shape, *k.shape, batch, seqlen_q, seqlen_kv):
        return q.new_zeros(batch, heads_q, seqlen_q, seqlen_kv)
    _, kv_pos = packed_positions(options["cu_seqlens_kv"], num_tokens=k.shape[0])
    identity = kv_pos[:, None, None] == torch.arange(seqlen_kv, device=device)
    identity = identity.to(q.dtype).expand(-1, k.shape[-2], -1)  # [tokens_kv, heads_kv, seqlen_kv]
    rows = attention_varlen(q, k, identity, backend="naive", **options)  # [tokens_q, heads_q, seqlen_kv]

    sequence_idx, q_pos = packed_positions(cu_seqlens_q, num_tokens=q.shape[0])
    p = rows.new_zeros(batch, seqlen_q, heads_q, seqlen_kv)
    # Rows of no sequence are 0, so that adding them to any place changes nothing.
    p.index_put_((sequence_idx, q_pos), rows, accumulate=True)
    keep = keep_mask(
        dropout_seed,
        dropout_p=dropout_p,
        batch_idx=torch.arange(batch, device=device)[:, None, None, None],
        head_idx=torch.arange(heads_q, device=device)[:, None, None],
        q_pos=torch.arange(seqlen_q, device=device)[:, None],
        kv_begin=0,
        kv_end=seqlen_kv,
    )
    p = p.transpose(1, 2)
    return torch.where(keep, p, -p)
