"""One small differentiable program for each way into flash_attn's interface, for compilers and for GPUs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import flashtile.integrations.flash_attn as flash_attn
from flashtile.integrations.flash_attn.bert_padding import index_first_axis, pad_input
from flashtile.integrations.flash_attn.layers.rotary import RotaryEmbedding, apply_rotary_emb
from flashtile.integrations.flash_attn.modules.mha import MHA, FlashCrossAttention, FlashSelfAttention

BATCH, SEQLEN, HEADS, HEAD_DIM = 2, 6, 4, 16
LENGTHS = (2, 4)
TOKENS = sum(LENGTHS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tensors:
    """What the routes take, all on one device and none of it made while they run."""

    qkv: Tensor  # [BATCH, SEQLEN, 3, HEADS, HEAD_DIM]
    tokens: Tensor  # [TOKENS, 3, HEADS, HEAD_DIM]
    cu_seqlens: Tensor
    slopes: Tensor
    cos: Tensor  # [16, HEAD_DIM / 2]
    sin: Tensor
    caches: Tensor  # [2, BATCH, 10, HEADS, HEAD_DIM]
    pages: Tensor  # [2, 8, 4, HEADS, HEAD_DIM]
    block_table: Tensor
    lengths: Tensor
    rows: Tensor
    indices: Tensor

    @classmethod
    def on(cls, device: str, dtype: torch.dtype = torch.float32) -> Tensors:
        generator = torch.Generator().manual_seed(2)

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device=device, dtype=dtype)

        def integers(*numbers: int) -> Tensor:
            return torch.tensor(numbers, dtype=torch.int32, device=device)

        return cls(
            qkv=draw(BATCH, SEQLEN, 3, HEADS, HEAD_DIM),
            tokens=draw(TOKENS, 3, HEADS, HEAD_DIM),
            cu_seqlens=integers(0, LENGTHS[0], TOKENS),
            slopes=torch.rand(HEADS, generator=generator).to(device),
            cos=draw(16, HEAD_DIM // 2).cos(),
            sin=draw(16, HEAD_DIM // 2).sin(),
            caches=draw(2, BATCH, 10, HEADS, HEAD_DIM),
            pages=draw(2, 8, 4, HEADS, HEAD_DIM),
            block_table=integers(3, 1, 0, 7).view(BATCH, 2),
            lengths=integers(*LENGTHS),
            rows=integers(1, 0),
            indices=integers(0, 1, 6, 7, 8, 9),
        )


class Block(nn.Module):
    """A layer of a small transformer."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        embed_dim = HEADS * HEAD_DIM
        self.norm = nn.LayerNorm(embed_dim)
        self.mixer = MHA(embed_dim, HEADS, causal=True, **options)

    def forward(self, x: Tensor, **arguments: Any) -> Tensor:
        return x + self.mixer(self.norm(x), **arguments)


def dense(t: Tensors, qkv: Tensor) -> Tensor:
    q, k, v = qkv.unbind(2)
    return flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(3, 0), alibi_slopes=t.slopes)


def dense_with_lse(t: Tensors, qkv: Tensor) -> Tensor:
    out, lse, _ = flash_attn.flash_attn_kvpacked_func(
        qkv[:, :, 0], qkv[:, :, 1:], softcap=5.0, alibi_slopes=t.slopes, return_attn_probs=True
    )
    return out + lse.transpose(1, 2).unsqueeze(-1).to(out.dtype)


def dense_with_dropout(t: Tensors, qkv: Tensor) -> Tensor:
    out, _, s_dmask = flash_attn.flash_attn_qkvpacked_func(qkv, 0.5, alibi_slopes=t.slopes, return_attn_probs=True)
    return out + s_dmask.sum()


def packed(t: Tensors, qkv: Tensor) -> Tensor:
    tokens = qkv.flatten(0, 1)[:TOKENS]
    first = flash_attn.flash_attn_varlen_qkvpacked_func(tokens, t.cu_seqlens, 4, causal=True)
    (_, k, v), packing = tokens.unbind(1), (t.cu_seqlens, t.cu_seqlens, 4, 4)
    second = flash_attn.flash_attn_varlen_kvpacked_func(first, tokens[:, 1:], *packing)
    third = flash_attn.flash_attn_varlen_func(second, k, v, *packing, 0.1)
    return third + flash_attn.flash_attn_unpadded_func(third, k, v, *packing, 0.0)


def paged(t: Tensors, qkv: Tensor) -> Tensor:
    q, packing = qkv[:, :3, 0].flatten(0, 1), (t.cu_seqlens, t.cu_seqlens, 4, 4)
    k, v = t.pages.unbind()
    return flash_attn.flash_attn_varlen_func(q, k, v, *packing, block_table=t.block_table)


def rotated(t: Tensors, qkv: Tensor) -> Tensor:
    q, k, v = qkv.unbind(2)
    q = apply_rotary_emb(q, t.cos, t.sin)
    k = apply_rotary_emb(k.clone(), t.cos, t.sin, interleaved=True, inplace=True, seqlen_offsets=t.lengths)
    both = RotaryEmbedding(HEAD_DIM)(torch.stack((q, k, v), dim=2), seqlen_offset=t.lengths)
    return FlashSelfAttention(softmax_scale=0.2)(both)


def rotated_packed(t: Tensors, qkv: Tensor) -> Tensor:
    q, kv = qkv.flatten(0, 1)[:TOKENS].split((1, 2), dim=1)
    q = apply_rotary_emb(q.squeeze(1), t.cos, t.sin, cu_seqlens=t.cu_seqlens, max_seqlen=4)
    return FlashCrossAttention(causal=True)(q, kv, None, t.cu_seqlens, 4, t.cu_seqlens, 4)


def padding(t: Tensors, qkv: Tensor) -> Tensor:
    tokens = index_first_axis(qkv.flatten(0, 1), t.indices)
    out = flash_attn.flash_attn_varlen_qkvpacked_func(tokens, t.cu_seqlens, 4)
    return pad_input(out, t.indices, BATCH, SEQLEN)


ROUTES: dict[str, Callable[[Tensors, Tensor], Tensor]] = {
    route.__name__: route
    for route in (
        dense,
        dense_with_lse,
        dense_with_dropout,
        packed,
        paged,
        rotated,
        rotated_packed,
        padding,
    )
}
"""From the tensors, and a qkv that may require a gradient."""


def cached(t: Tensors, qkv: Tensor) -> tuple[Tensor, ...]:
    """out, lse and the caches, dense, after a step."""
    q, k, v = qkv[:, :2].unbind(2)
    k_cache, v_cache = t.caches.clone().unbind()
    options = {"cache_seqlens": t.lengths, "causal": True, "alibi_slopes": t.slopes, "cache_leftpad": t.lengths - 1}
    out, lse = flash_attn.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, t.cos, t.sin, return_softmax_lse=True, **options
    )
    return out, lse, k_cache, v_cache


def cached_by_index(t: Tensors, qkv: Tensor) -> tuple[Tensor, ...]:
    q, k, v = qkv[:, :2].unbind(2)
    k_cache, v_cache = t.caches.clone().unbind()
    out = flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=3, cache_batch_idx=t.rows)
    return out, k_cache, v_cache


def cached_in_pages(t: Tensors, qkv: Tensor) -> tuple[Tensor, ...]:
    q, k, v = qkv[:, :2].unbind(2)
    k_cache, v_cache = t.pages.clone().unbind()
    options = {"cache_seqlens": t.lengths, "block_table": t.block_table, "window_size": (3, -1), "softcap": 4.0}
    out = flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, **options)
    return out, k_cache, v_cache


STEPS: dict[str, Callable[[Tensors, Tensor], tuple[Tensor, ...]]] = {
    step.__name__: step for step in (cached, cached_by_index, cached_in_pages)
}

MODULES: dict[str, dict[str, Any]] = {
    "plain": {},
    "grouped, rotary": {"num_heads_kv": 2, "rotary_emb_dim": 8},
    "alibi, window, checkpointing": {"use_alibi": True, "window_size": (3, 0), "checkpointing": True},
}
"""Options of ``Block``."""
