"""What happens to a tile of raw products q @ k.T before the softmax: scale, softcap, bias and ALiBi, masks.

Only this file knows these options. Scores become powers of two by multiplication with ``unit_log2``, which the
exponential does at no cost: that is the scale, unless softcap, bias and ALiBi want it first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from flashtile.backends.triton.primitives.addressing import row_pointer
from flashtile.backends.triton.primitives.dropout import survivors
from flashtile.backends.triton.primitives.masking import is_visible
from flashtile.backends.triton.primitives.online_softmax import INF, LOG2_E

MIDDLE_FLOAT_BITS = tl.constexpr(0x4B400000)
"""Those of MIDDLE_FLOAT, 1.5 * 2**23."""


class HeadRules(NamedTuple):
    """The score rules as they apply to one query head of one sequence."""

    rules: Any
    sequence: Any
    head_idx: Any


class Tile(NamedTuple):
    """Where a tile of scores lies within its sequence, and whether the window leaves every pair of it visible."""

    q_begin: Any
    kv_begin: Any
    is_full: Any


@triton.jit
def unit_log2(rules):
    """What turns the scores of ``scored`` into powers of two; positive."""
    if rules.softcap is None and rules.bias is None and rules.alibi is None:
        return rules.scale_log2
    elif rules.scale is None:
        return 1.0
    else:
        return LOG2_E


@triton.jit
def _unit(rules):
    """What natural scores are multiplied with where softcap, bias and ALiBi change them: 1, or at once log2(e)."""
    if rules.scale is None:
        return LOG2_E
    else:
        return 1.0


@triton.jit
def scored(
    product,
    head,
    tile,
    TRANSPOSED: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_KV: tl.constexpr,
):
    """(scores, tanh) of a tile of products; ``tanh`` is that of the softcap, which its gradient needs, or the product.

    Args:
        product: [BLOCK_Q, BLOCK_KV] float32, or [BLOCK_KV, BLOCK_Q] if TRANSPOSED.
    """
    rules, sequence = head.rules, head.sequence
    q_pos = tile.q_begin + tl.arange(0, BLOCK_Q)
    kv_pos = tile.kv_begin + tl.arange(0, BLOCK_KV)
    if TRANSPOSED:
        q_pos, kv_pos = q_pos[None, :], kv_pos[:, None]
    else:
        q_pos, kv_pos = q_pos[:, None], kv_pos[None, :]

    s, capped, factor = product, product, rules.scale_log2 if rules.scale is None else rules.scale
    if rules.softcap is not None:
        capped = tanh(product * rules.softcap.scale_by_cap)
        s, factor = capped, rules.softcap.cap * _unit(rules)
    if rules.softcap is not None or rules.bias is not None or rules.alibi is not None:
        # Fused products are spelled out, for forward and backward to round alike: else all p add up to 1 + e.
        added = 0.0
        if rules.bias is not None:
            added = pair_tile(rules.bias, head, tile, TRANSPOSED, BLOCK_Q, BLOCK_KV).to(tl.float32) * _unit(rules)
        if rules.alibi is not None:
            if rules.near is not None:
                distance = near_distances(head, tile, BLOCK_Q, BLOCK_KV)
            else:
                distance = tl.abs((q_pos + (sequence.seqlen_kv - sequence.seqlen_q) - kv_pos).to(tl.float32))
            added = tl.fma(distance, -slope(head), added)
        s = tl.fma(s, factor, added)
    if rules.mask is not None:
        s = tl.where(pair_tile(rules.mask, head, tile, TRANSPOSED, BLOCK_Q, BLOCK_KV) != 0, s, -INF)
    if not tile.is_full:
        s = tl.where(is_visible(rules.window, q_pos, kv_pos, sequence.seqlen_q, sequence.seqlen_kv), s, -INF)
    return s, capped


@triton.jit
def through_cap(d_s, capped, rules):
    """The gradient of the scaled products from that of the scores: tanh' = 1 - tanh ** 2."""
    if rules.softcap is not None:
        d_s *= 1.0 - capped * capped
    return d_s


@triton.jit
def survival(head, tile, TRANSPOSED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr):
    """The tile of factors that dropout puts on the probabilities; only for rules with dropout."""
    dropout, batch_idx = head.rules.dropout, head.sequence.batch_idx
    factors = survivors(dropout, batch_idx, head.head_idx, tile.q_begin, tile.kv_begin, BLOCK_Q, BLOCK_KV)
    return tl.trans(factors) if TRANSPOSED else factors


@triton.jit
def slope(head):
    """The head's ALiBi slope, in the unit of the scores."""
    alibi = head.rules.alibi
    offset = head.sequence.batch_idx * alibi.batch_stride + head.head_idx * alibi.head_stride
    return tl.load(alibi.ptr + offset).to(tl.float32) * _unit(head.rules)


@triton.jit
def near_distances(head, tile, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr):
    """[BLOCK_Q, BLOCK_KV] how far each key is from where its query is aligned, if that is below ``FARTHEST_NEAR``.

    Differences of two floats around MIDDLE_FLOAT, which are exact: one instruction for each pair instead of a
    subtraction and a conversion, which takes as long as two. What changes from tile to tile is added to the columns;
    else the compiler would compute them all before the loop and keep them in registers.
    """
    q_idx, kv_idx = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_KV)
    shift = tile.q_begin - tile.kv_begin + (head.sequence.seqlen_kv - head.sequence.seqlen_q)
    return tl.abs(near_float(q_idx[:, None]) - near_float((kv_idx - shift)[None, :]))


@triton.jit
def near_float(number):
    """MIDDLE_FLOAT + number in float32, for integers below ``FARTHEST_NEAR``: neighbouring floats are 1 apart there."""
    return (number + MIDDLE_FLOAT_BITS).to(tl.float32, bitcast=True)


@triton.jit
def tanh(x):
    """tanh, to float32's precision at 0 too, where 1 - 2 / (exp(2 x) + 1) would lose it."""
    square = x * x
    series = 1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    direct = 1.0 - 2.0 / (tl.exp2(x * (2.0 * LOG2_E)) + 1.0)
    return tl.where(square < 0.0625, x * series, direct)


@triton.jit
def pair_tile(matrix, head, tile, TRANSPOSED: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_KV: tl.constexpr):
    """The tile of a bias or mask that belongs to a tile of scores, 0 where it has no elements.

    Keys beyond the end of a packed sequence are read where the matrix has some, and hidden later: a bound that is a
    multiple of 16 lets one instruction read many elements.
    """
    q_idx, kv_idx = tl.arange(0, BLOCK_Q), tl.arange(0, BLOCK_KV)
    if TRANSPOSED:
        q_idx, kv_idx = q_idx[None, :], kv_idx[:, None]
    else:
        q_idx, kv_idx = q_idx[:, None], kv_idx[None, :]
    ptr = row_pointer(matrix, head.sequence.batch_idx, head.head_idx, tile.q_begin)
    ptr += tl.cast(tile.kv_begin, tl.int64) * matrix.col_stride
    exists = (tile.q_begin + q_idx < head.sequence.seqlen_q) & (tile.kv_begin + kv_idx < matrix.num_cols)
    offsets = q_idx.to(tl.int64) * matrix.row_stride + kv_idx.to(tl.int64) * matrix.col_stride
    return tl.load(ptr + offsets, mask=exists, other=0)
