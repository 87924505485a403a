"""What one rounding of every summand can change in each result: an error that no kernel can be blamed for.

Every result of attention is a sum, and a sum of large terms that cancel is as uncertain as its terms, however small it
is. The terms are those of the textbook, ``out = sum p v``, ``d_s = p (d_p - delta)``, ``d_q = scale * sum d_s k``, with
every sign dropped, so that nothing cancels. A score stands in an exponent, so its rounding counts in proportion to its
size.
"""

from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor

from flashtile.testing.oracle import Call, Weights, per_query_head, weights_of_sequences


def rounding_errors(
    call: Call,
    *,
    d_out: Tensor | None = None,
    d_lse: Tensor | None = None,
    scores_dtype: torch.dtype = torch.float32,
) -> dict[str, float]:
    """One rounding of the summands of each result of a call, as one absolute error per result.

    Args:
        call: the arguments.
        d_out: the gradient of out; None stands for zeros.
        d_lse: the gradient of lse; None stands for zeros.
        scores_dtype: what a kernel rounds a score to, where the inputs are not finer.

    Returns:
        Absolute errors by result: out, lse, d_q, d_k, d_v, and d_bias and d_sinks if the call has them.
    """
    d_out = call.q.new_zeros(call.out_shape) if d_out is None else d_out
    d_lse = call.q.new_zeros(call.lse_shape) if d_lse is None else d_lse
    largest: dict[str, float] = defaultdict(float)  # the largest sum of absolute summands, by result
    largest_score = 0.0
    d_bias = torch.zeros(call.scores_shape, dtype=torch.float64, device=call.q.device)
    d_sinks = torch.zeros(call.scores_shape[1], dtype=torch.float64, device=call.q.device)
    for weights in weights_of_sequences(call, torch.float64):
        sums = _sums_of_summands(call, weights, d_out, d_lse)
        d_bias[weights.sequence.batch_idx, :, : weights.sequence.seqlen_q, : weights.sequence.seqlen_kv] = sums.pop(
            "d_s"
        )
        d_sinks += sums.pop("d_sinks")
        largest_score = max(largest_score, _largest(sums.pop("s")))
        for name, values in sums.items():
            largest[name] = max(largest[name], _largest(values))
    if call.options.get("bias") is not None:
        bias_shape = call.options["bias"].shape
        largest["d_bias"] = _largest(d_bias.sum_to_size(bias_shape) if bias_shape else d_bias.sum())
    if call.options.get("sinks") is not None:
        largest["d_sinks"] = _largest(d_sinks)

    eps = torch.finfo(call.q.dtype).eps
    eps_of_scores = min(eps, torch.finfo(scores_dtype).eps)
    return {name: (eps + eps_of_scores * largest_score) * total for name, total in largest.items()}


def _sums_of_summands(call: Call, weights: Weights, d_out: Tensor, d_lse: Tensor) -> dict[str, Tensor]:
    """For one sequence, every result with all signs dropped; gradients of bias and sinks before sums over sequences."""
    sequence, heads_q, heads_kv = weights.sequence, call.q.shape[-2], call.k.shape[-2]
    scale = call.options.get("scale")
    scale = call.q.shape[-1] ** -0.5 if scale is None else abs(scale)
    q, d_o = (tensor[sequence.q_rows].double().abs().transpose(0, 1) for tensor in (call.q, d_out))
    k, v = (per_query_head(t[sequence.kv_rows].double().abs(), heads_q=heads_q) for t in (call.k, call.v))
    finite_lse = weights.lse.masked_fill(weights.lse.isinf(), 0.0)
    finite_scores = weights.scores.masked_fill(weights.scores.isinf(), 0.0)

    p_dropped = weights.p * weights.dropout_factor
    d_p = d_o @ v.mT * weights.dropout_factor
    delta = (weights.p * d_p).sum(dim=-1) + d_lse[sequence.lse_rows].double().abs()
    d_s = weights.p * (d_p + delta[..., None])
    sinks = call.options.get("sinks")
    p_sink = torch.zeros_like(delta)
    if sinks is not None:
        p_sink = torch.exp(sinks.double()[:, None] - finite_lse).masked_fill(weights.lse.isinf(), 0.0)

    def per_kv_head(grad: Tensor) -> Tensor:
        return grad.unflatten(0, (heads_kv, heads_q // heads_kv)).sum(1)

    return {
        "s": torch.cat([(scale * q @ k.mT).flatten(), finite_scores.abs().flatten(), finite_lse.abs().flatten()]),
        "out": p_dropped @ v,
        "lse": finite_lse.abs() + 1,
        "d_q": scale * d_s @ k,
        "d_k": per_kv_head(scale * d_s.mT @ q),
        "d_v": per_kv_head(p_dropped.mT @ d_o),
        "d_s": d_s,
        "d_sinks": (p_sink * delta).sum(dim=-1),
    }


def _largest(values: Tensor) -> float:
    return values.max().item() if values.numel() else 0.0
