"""The dropout contract of ``flashtile.spec.dropout`` for one tile of scores."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def survivors(dropout, batch_idx, head_idx, q_begin, kv_begin, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr):
    """[BLOCK_Q, BLOCK_KV] float32: 1 / (1 - p) where the probability survives, else 0.

    One Philox call serves four neighbouring keys, so ``kv_begin`` is a multiple of four, as tiles are.
    """
    seed = tl.load(dropout.seed_ptr)
    group = kv_begin // 4 + tl.arange(0, BLOCK_KV // 4)[None, :] + tl.zeros([BLOCK_Q, 1], tl.int32)
    q_pos = q_begin + tl.arange(0, BLOCK_Q)[:, None] + tl.zeros_like(group)
    zero = tl.zeros_like(group)
    word_0, word_1, word_2, word_3 = tl.philox(seed, group, q_pos, zero + head_idx, zero + batch_idx)
    words = tl.join(tl.join(word_0, word_2), tl.join(word_1, word_3))  # [BLOCK_Q, BLOCK_KV // 4, 2, 2] uint32
    words = tl.reshape(words, [BLOCK_Q, BLOCK_KV])
    return tl.where(words >= dropout.threshold, dropout.survivor_scale, 0.0)
