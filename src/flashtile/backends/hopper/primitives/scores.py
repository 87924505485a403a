"""What happens to a tile of raw products before the softmax: scale, softcap, ALiBi, masks. Only this file knows them.

Scores come out as powers of two, after multiplication with ``unit_log2``: without softcap and ALiBi the scale is left
to the exponential, where the multiplication costs nothing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental.gluon import language as gl

from flashtile.backends.hopper.primitives.gluon_compat import jit
from flashtile.backends.hopper.primitives.masking import is_visible, is_visible_by_key, place_in
from flashtile.backends.hopper.primitives.online_softmax import INF, LOG2_E


class HeadRules(NamedTuple):
    """The score rules of one query head of one sequence; its ALiBi slope is in powers of two per token."""

    rules: Any
    sequence: Any
    slope_log2: Any


@jit
def unit_log2(rules):
    """What turns the scores of ``scored`` into powers of two; positive."""
    if rules.softcap is None and rules.alibi is None:
        return rules.scale_log2
    else:
        return 1.0


@jit
def scored(product, head, q_pos, kv_pos, is_masked):
    """The scores of a tile of products.

    Args:
        product: float32; ``q_pos`` and ``kv_pos`` broadcast to its shape.
        is_masked: whether the window hides pairs of the tile, or the sequence ends in it.
    """
    sequence = head.sequence
    s, _capped = capped_and_biased(product, head, q_pos + (sequence.seqlen_kv - sequence.seqlen_q) - kv_pos)
    if is_masked:
        s = gl.where(is_visible(head.rules.window, q_pos, kv_pos, sequence.seqlen_q, sequence.seqlen_kv), s, -INF)
    return s


@jit
def scored_by_key(product, head, q_begin, kv_begin, is_masked):
    """(scores, tanh) of a tile of products with keys as rows and queries as columns, from two positions on.

    ``tanh`` is that of the softcap, which its gradient needs, or the product. The masks differ from those of ``scored``
    in how they are computed: see ``Place``. In the forward that was no faster.
    """
    sequence = head.sequence
    place = place_in(product)
    first_gap = q_begin + (sequence.seqlen_kv - sequence.seqlen_q) - kv_begin
    gap = (place.own_col + (place.thread_col - place.row + first_gap)).reshape(product.shape)
    s, capped = capped_and_biased(product, head, gl.convert_layout(gap, product.type.layout))
    if is_masked:
        visible = is_visible_by_key(
            head.rules.window, q_begin, kv_begin, sequence.seqlen_q, sequence.seqlen_kv, product
        )
        s = gl.where(visible, s, -INF)
    return s, capped


@jit
def capped_and_biased(product, head, gap):
    """(scores, tanh) without masks; ``gap`` is how far a query's last key is behind a key, for ALiBi."""
    rules = head.rules
    s, capped, to_log2 = product, product, rules.scale_log2
    if rules.softcap is not None:
        capped = tanh(product * rules.softcap.scale_by_cap)
        s, to_log2 = capped, rules.softcap.cap * LOG2_E
    if rules.softcap is not None or rules.alibi is not None:
        # Fused products are spelled out, for forward and backward to round alike: else all p add up to 1 + e.
        added = gl.zeros_like(s)
        if rules.alibi is not None:
            added = -gl.abs(gap.to(gl.float32)) * head.slope_log2
        s = gl.fma(s, gl.to_tensor(to_log2), added)
    return s, capped


@jit
def probabilities(s, unit_log2, lse_log2):
    """Of scores from ``scored`` with queries as columns, whose lse is known."""
    return gl.exp2(gl.fma(s, gl.to_tensor(unit_log2), -gl.expand_dims(lse_log2, 0)))


@jit
def slope_log2(rules, batch_idx, head_idx):
    """The head's ALiBi slope, in powers of two per token; 0 without ALiBi."""
    if rules.alibi is None:
        return 0.0
    else:
        offset = batch_idx * rules.alibi.batch_stride + head_idx * rules.alibi.head_stride
        return gl.load(rules.alibi.ptr + offset).to(gl.float32) * LOG2_E


@jit
def tanh(x):
    """tanh, to float32's precision at 0 too, where 1 - 2 / (exp(2 x) + 1) would lose it."""
    square = x * x
    series = 1.0 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835))))
    direct = 1.0 - 2.0 / (gl.exp2(x * (2.0 * LOG2_E)) + 1.0)
    return gl.where(square < 0.0625, x * series, direct)
