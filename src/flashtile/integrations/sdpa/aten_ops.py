"""torch's flash attention ops, as its dispatcher calls them on CUDA, computed by flashtile.

Signatures, layouts and results are those of the ops' schemas (aten/src/ATen/native/native_functions.yaml): causal and
windows are aligned bottom-right as flashtile's, the lse is float32 [batch, heads, seqlen_q], packed [heads, tokens_q].
torch's random state carries flashtile's dropout seed from the forward to the backward.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashtile import ops
from flashtile.errors import UnsupportedProblem
from flashtile.spec import validation
from flashtile.spec.operands import Operands
from flashtile.spec.problem import AttentionProblem

_HARMLESS = ("num_splits",)
"""Options of newer torch versions that ask for no other numbers; of the rest, any but None is refused."""


def flash_attention_forward(
    query: Tensor,  # [batch, seqlen_q, heads_q, head_dim], packed [tokens_q, heads_q, head_dim]
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    **options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """aten::_flash_attention_forward -> (out, lse, rng_state, unused, debug_mask)."""
    if return_debug_mask:
        raise _unsupported("return_debug_mask")
    seed = torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=query.device) if dropout_p > 0 else None
    packing = _Packing(cum_seq_q, cum_seq_k, max_q, max_k)
    problem, operands = _stated((query, key, value), packing, dropout_p, seed, is_causal, options)
    out, lse = ops.attention(problem, operands, "auto")
    return _in_layout_of(query, out), lse, *_random_state(seed, query.device), query.new_empty(0)


def flash_attention_forward_into(out: Tensor, query: Tensor, *inputs: Any, **options: Any) -> Tensor:
    """aten::_flash_attention_forward_no_dropout_inplace: fills ``out``, returns the lse."""
    computed, lse, *_ = flash_attention_forward(query, *inputs, **options)
    out.copy_(computed)
    return lse


def flash_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    rng_state: Tensor,
    unused: Tensor,  # noqa: ARG001 -- in the op's signature
    **options: Any,
) -> tuple[Tensor, ...]:
    """aten::_flash_attention_backward -> (d_query, d_key, d_value)."""
    seed = _seed_in(rng_state) if dropout_p > 0 else None
    packing = _Packing(cum_seq_q, cum_seq_k, max_q, max_k)
    problem, operands = _stated((query, key, value), packing, dropout_p, seed, is_causal, options)
    problem = replace(problem, gradients=frozenset({"q", "k", "v"}))
    grads = ops.gradients(problem, operands, out, logsumexp, grad_out, "auto")
    return tuple(_in_layout_of(tensor, grad) for tensor, grad in zip((query, key, value), grads, strict=True))


def sdpa_forward(
    query: Tensor,  # [batch, heads_q, seqlen_q, head_dim]
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """aten::_scaled_dot_product_flash_attention -> (out, lse, -, -, max_q, max_k, rng_state, unused, debug_mask)."""
    lengths = query.shape[2], key.shape[2]
    q, k, v = _transposed(query, key, value)
    out, lse, *state = flash_attention_forward(
        q, k, v, None, None, *lengths, dropout_p, is_causal, return_debug_mask, scale=scale
    )
    return *_transposed(out), lse, None, None, *lengths, *state


def sdpa_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    *rest: Any,
    **scale: Any,
) -> tuple[Tensor, ...]:
    """aten::_scaled_dot_product_flash_attention_backward -> (d_query, d_key, d_value)."""
    d_out, q, k, v, o = _transposed(grad_out, query, key, value, out)
    return _transposed(*flash_attention_backward(d_out, q, k, v, o, logsumexp, *rest, **scale))


KERNELS: dict[str, Callable[..., Any]] = {
    "_flash_attention_forward": flash_attention_forward,
    "_flash_attention_forward_no_dropout_inplace": flash_attention_forward_into,
    "_flash_attention_backward": flash_attention_backward,
    "_scaled_dot_product_flash_attention": sdpa_forward,
    "_scaled_dot_product_flash_attention_backward": sdpa_backward,
}
"""What is registered under torch's op names; older versions of torch lack some."""


class _Packing(NamedTuple):
    cu_seqlens_q: Tensor | None
    cu_seqlens_kv: Tensor | None
    max_seqlen_q: int
    max_seqlen_kv: int


def _stated(
    qkv: tuple[Tensor, Tensor, Tensor],
    packing: _Packing,
    dropout_p: float,
    seed: Tensor | None,
    is_causal: bool,
    options: dict[str, Any],
) -> tuple[AttentionProblem, Operands]:
    """The call as flashtile states it."""
    scale, left, right = (options.pop(name, None) for name in ("scale", "window_size_left", "window_size_right"))
    for name, value in options.items():
        if value is not None and name not in _HARMLESS:
            raise _unsupported(name)
    is_packed = packing.cu_seqlens_q is not None
    return validation.check_call(
        *qkv,
        causal=is_causal,
        window=tuple(None if reach is None or reach < 0 else reach for reach in (left, right)),
        scale=scale,
        softcap=0.0,
        bias=None,
        mask=None,
        alibi_slopes=None,
        sinks=None,
        dropout_p=dropout_p,
        dropout_seed=seed,
        deterministic=torch.are_deterministic_algorithms_enabled(),
        wants_lse=True,
        is_packed=is_packed,
        **(packing._asdict() if is_packed else {}),
    )


def _unsupported(option: str) -> UnsupportedProblem:
    return UnsupportedProblem(
        f"flashtile as torch's flash attention lacks {option}: call flashtile.integrations.sdpa.restore() first.", {}
    )


def _random_state(seed: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
    """(rng_state, unused) in the dtypes of torch's schemas, the seed in the first; nobody reads it without dropout."""
    if torch.version.hip is not None:
        state = torch.empty((), dtype=torch.int64, device=device) if seed is None else seed
        return state, torch.empty((), dtype=torch.int64, device=device)
    state = torch.empty(2, dtype=torch.int64, device=device) if seed is None else seed.expand(2).contiguous()
    return state.view(torch.uint64), torch.empty((), dtype=torch.uint64, device=device)


def _seed_in(rng_state: Tensor) -> Tensor:
    return rng_state if rng_state.dim() == 0 else rng_state.view(torch.int64)[0]


def _transposed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Heads and sequence exchanged: views."""
    return tuple(tensor.transpose(1, 2) for tensor in tensors)


def _in_layout_of(like: Tensor, result: Tensor) -> Tensor:
    """The result with the strides that ``torch.empty_like(like)`` has: compiled code was promised those."""
    if torch.empty_like(like, device="meta").stride() == result.stride():
        return result
    return torch.empty_like(like).copy_(result)
