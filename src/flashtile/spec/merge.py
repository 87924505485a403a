"""The lse contract, and the merge of partial results that rests on it.

``lse`` is the natural logarithm of the softmax denominator of a row: ``log(sum_j exp(s_j))``, plus ``exp(sink)`` inside
the sum if the head has a sink. It is float32 (float64 for float64 inputs), [batch, heads_q, seqlen_q] for dense and
[heads_q, tokens_q] for packed operands. A row that sees neither a key nor a sink has ``out = 0`` and ``lse = -inf``.
So (out, lse) over one set of keys and (out, lse) over another set determine (out, lse) over their union.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flashtile.errors import invalid
from flashtile.spec.options import describe
from flashtile.spec.problem import DTYPES

LSE_DTYPES = (torch.float32, torch.float64)


def guarded(log_value: Tensor) -> Tensor:
    """The tensor with ``-inf`` replaced by 0, so that ``exp(-inf - guarded(-inf))`` is 0 and not NaN."""
    return log_value.masked_fill(log_value == -math.inf, 0.0)


def merge_attention(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Combines attention over two disjoint sets of keys into attention over their union.

    Args:
        out_a, out_b: [batch, seqlen_q, heads_q, head_dim_v] or [tokens_q, heads_q, head_dim_v].
        lse_a, lse_b: [batch, heads_q, seqlen_q] or [heads_q, tokens_q], as ``attention_with_lse`` returns them.
            If the heads have sinks, exactly one of the two parts may have been computed with them.

    Returns:
        (out, lse) of the same shapes and dtypes, both differentiable with respect to all four arguments.

    Raises:
        InvalidArgument: shapes that do not belong together.

    Cost: reads both parts once. Numerics: computed in the lse's dtype, no overflow for any finite lse.

    Source: the rescaling step of online softmax (Milakov and Gimelshein 2018, "Online normalizer calculation for
    softmax", algorithm 3), applied to whole partial results.

    Example:
        >>> import torch, flashtile
        >>> q, k, v = torch.randn(3, 1, 8, 2, 16).unbind()
        >>> left = flashtile.attention_with_lse(q, k[:, :5], v[:, :5])
        >>> right = flashtile.attention_with_lse(q, k[:, 5:], v[:, 5:])
        >>> out, lse = flashtile.merge_attention(*left, *right)
        >>> torch.allclose(out, flashtile.attention(q, k, v), atol=1e-5)
        True
    """
    _check_part("a", out_a, lse_a)
    _check_part("b", out_b, lse_b)
    for name, first, second in (("lse_a", out_a, lse_a), ("out_b", out_a, out_b), ("lse_b", out_a, lse_b)):
        if second.device != first.device:
            raise invalid(
                name, got=f"a tensor on {second.device}", wanted=f"all four on {first.device}", remedy="move it there"
            )
    for name, first, second in (("out_b", out_a, out_b), ("lse_b", lse_a, lse_b)):
        if second.shape != first.shape or second.dtype != first.dtype:
            raise invalid(
                name,
                got=describe(second),
                wanted=f"what {name[:-1]}a is, {describe(first)}",
                remedy="merge partial results of the same queries, as attention_with_lse returned them",
            )
    shift = guarded(torch.maximum(lse_a, lse_b).detach())
    weight_a, weight_b = torch.exp(lse_a - shift), torch.exp(lse_b - shift)
    total = weight_a + weight_b
    sees_nothing = total == 0
    total = total.masked_fill(sees_nothing, 1.0)
    lse = (shift + torch.log(total)).masked_fill(sees_nothing, -math.inf)
    out = out_a * _per_row(weight_a / total) + out_b * _per_row(weight_b / total)
    return out.to(out_a.dtype), lse


def _per_row(weight: Tensor) -> Tensor:
    """[..., heads, rows] -> [..., rows, heads, 1], to scale an output."""
    return weight.transpose(-1, -2).unsqueeze(-1)


def _check_part(part: str, out: Tensor, lse: Tensor) -> None:
    for name, value, dtypes in ((f"out_{part}", out, DTYPES), (f"lse_{part}", lse, LSE_DTYPES)):
        is_plain = isinstance(value, Tensor) and value.layout == torch.strided and not value.is_nested
        if not is_plain or value.dtype not in dtypes:
            raise invalid(
                name,
                got=f"layout {value.layout}" if isinstance(value, Tensor) and not is_plain else describe(value),
                wanted="a strided tensor, " + " or ".join(str(dtype) for dtype in dtypes),
                remedy="pass what attention_with_lse returned",
            )
    expected = (*out.shape[:-3], out.shape[-2], out.shape[-3]) if out.dim() in (3, 4) else None
    if tuple(lse.shape) != expected:
        raise invalid(
            f"lse_{part}",
            got=f"shape {list(lse.shape)} beside out_{part} of shape {list(out.shape)}",
            wanted="out [batch, seqlen_q, heads_q, head_dim_v] with lse [batch, heads_q, seqlen_q], "
            "or out [tokens_q, heads_q, head_dim_v] with lse [heads_q, tokens_q]",
            remedy="pass out and lse as attention_with_lse returned them",
        )
