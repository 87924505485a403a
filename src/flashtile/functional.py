"""The public functions: attention on dense and on packed tensors, with and without the lse."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flashtile import dispatch, ops, repeats
from flashtile.spec import validation


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    deterministic: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Exact softmax attention, without ever storing the score matrix.

    Args:
        q: [batch, seqlen_q, heads_q, head_dim]; float16, bfloat16, float32 or float64; any strides.
        k: [batch, seqlen_kv, heads_kv, head_dim], same dtype and device; heads_kv divides heads_q (GQA, MQA).
        v: [batch, seqlen_kv, heads_kv, head_dim_v]; head_dim_v may differ from head_dim.
        causal: query i sees keys j <= i + seqlen_kv - seqlen_q (bottom-right alignment).
        window: (left, right); query i sees keys from i + seqlen_kv - seqlen_q - left to ... + right, both inclusive;
            None on a side means unlimited.
        scale: factor on q @ k.T; default head_dim ** -0.5.
        softcap: c > 0 replaces scores s by c * tanh(s / c) before bias and masks; 0 means none.
        bias: floating point, added to the scores; broadcasts to [batch, heads_q, seqlen_q, seqlen_kv]; differentiable.
            Where it brings a score to half of float32's smallest number or below, the pair is hidden, as with -inf.
        mask: boolean, True = may attend; broadcasts to [batch, heads_q, seqlen_q, seqlen_kv].
        alibi_slopes: [heads_q] or [batch, heads_q]; adds -slope * |i + seqlen_kv - seqlen_q - j|.
        sinks: [heads_q]; adds exp(sink) to the softmax denominator of its head; differentiable.
        dropout_p: probability of dropping an attention weight; survivors are scaled by 1 / (1 - p).
        dropout_seed: int or 0-d int64 tensor; the same seed drops the same weights everywhere. None draws one from
            torch's generator.
        deterministic: ask for a bitwise repeatable backward (the forward always is).
        backend: "auto", or a backend's name; see ``flashtile.explain`` and ``flashtile.support_matrix``.

    Returns:
        [batch, seqlen_q, heads_q, head_dim_v] in q's dtype. A row that sees no key is 0.

    Raises:
        InvalidArgument: a wrong argument; a ValueError that names it, what it got, what was wanted and the remedy.
        UnsupportedProblem: the backend asked for by name does not take the call, and says why.

    Cost: forward 2 * (head_dim + head_dim_v) FLOPs per visible (query, key) pair and head, backward 2.5 times that;
    memory beyond the output is the lse, linear in seqlen_q.

    Numerics: softmax statistics and accumulators are float32 (float64 for float64 inputs). The error against float64 is
    at most twice that of the naive formula in the same dtype.

    Source: Dao et al. 2022, "FlashAttention", algorithms 1 and 4; Dao 2023, "FlashAttention-2", algorithms 1 and 2
    (its m, l, L are our row_max, row_sum, lse; its B_r, B_c are our block_q, block_kv).

    Example:
        >>> import torch, flashtile
        >>> q = torch.randn(2, 128, 8, 64)
        >>> k, v = torch.randn(2, 2, 128, 2, 64).unbind()
        >>> flashtile.attention(q, k, v, causal=True).shape
        torch.Size([2, 128, 8, 64])
    """
    return _attend(
        q,
        k,
        v,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        bias=bias,
        mask=mask,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        deterministic=deterministic,
        backend=backend,
        wants_lse=False,
        is_packed=False,
    )[0]


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    deterministic: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``attention``, returning also the log-sum-exp of the scores; both outputs are differentiable.

    Takes what ``attention`` takes.

    Returns:
        out: [batch, seqlen_q, heads_q, head_dim_v] in q's dtype.
        lse: [batch, heads_q, seqlen_q] float32 (float64 for float64 inputs): the natural logarithm of the softmax
            denominator, sink included; -inf for a row that sees neither key nor sink.

    Raises, Cost, Numerics, Source: as ``attention``.

    Example:
        >>> import torch, flashtile
        >>> q, k, v = torch.randn(3, 1, 8, 2, 16).unbind()
        >>> out, lse = flashtile.attention_with_lse(q, k, v)
        >>> lse.shape
        torch.Size([1, 2, 8])
    """
    return _attend(
        q,
        k,
        v,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        bias=bias,
        mask=mask,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        deterministic=deterministic,
        backend=backend,
        wants_lse=True,
        is_packed=False,
    )


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_q: int,
    max_seqlen_kv: int,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    deterministic: bool = False,
    backend: str = "auto",
) -> Tensor:
    """``attention`` over sequences of different lengths, packed one after the other without padding.

    Args:
        q: [tokens_q, heads_q, head_dim].
        k: [tokens_kv, heads_kv, head_dim].
        v: [tokens_kv, heads_kv, head_dim_v].
        cu_seqlens_q: [batch + 1] int32; sequence b owns the query rows cu_seqlens_q[b] to cu_seqlens_q[b + 1].
        cu_seqlens_kv: [batch + 1] int32, the same for keys and values. Sequences may be empty; rows after the last
            boundary belong to no sequence, are never read, and come back as 0.
        max_seqlen_q, max_seqlen_kv: the longest sequence, or more.
        The rest is as for ``attention``. Bias and mask broadcast to [batch, heads_q, max_seqlen_q, max_seqlen_kv], and
        positions count from the start of each sequence.

    Returns:
        [tokens_q, heads_q, head_dim_v] in q's dtype.

    Raises, Cost, Numerics, Source: as ``attention``. On CPU tensors the boundaries are checked too; on a GPU only with
    FLASHTILE_CHECK_VALUES=1, because reading them would synchronise.

    Example:
        >>> import torch, flashtile
        >>> q, k, v = torch.randn(3, 10, 2, 16).unbind()
        >>> cu = torch.tensor([0, 4, 10], dtype=torch.int32)
        >>> out = flashtile.attention_varlen(
        ...     q, k, v, cu_seqlens_q=cu, cu_seqlens_kv=cu, max_seqlen_q=6, max_seqlen_kv=6, causal=True)
        >>> out.shape
        torch.Size([10, 2, 16])
    """
    return _attend(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_kv=cu_seqlens_kv,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_kv=max_seqlen_kv,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        bias=bias,
        mask=mask,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        deterministic=deterministic,
        backend=backend,
        wants_lse=False,
        is_packed=True,
    )[0]


def attention_varlen_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    max_seqlen_q: int,
    max_seqlen_kv: int,
    causal: bool = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    deterministic: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``attention_varlen``, returning also the log-sum-exp of the scores; both outputs are differentiable.

    Takes what ``attention_varlen`` takes.

    Returns:
        out: [tokens_q, heads_q, head_dim_v] in q's dtype.
        lse: [heads_q, tokens_q] float32 (float64 for float64 inputs), as ``attention_with_lse`` defines it.

    Raises, Cost, Numerics, Source: as ``attention``.

    Example:
        >>> import torch, flashtile
        >>> q, k, v = torch.randn(3, 10, 2, 16).unbind()
        >>> cu = torch.tensor([0, 4, 10], dtype=torch.int32)
        >>> out, lse = flashtile.attention_varlen_with_lse(
        ...     q, k, v, cu_seqlens_q=cu, cu_seqlens_kv=cu, max_seqlen_q=6, max_seqlen_kv=6)
        >>> lse.shape
        torch.Size([2, 10])
    """
    return _attend(
        q,
        k,
        v,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_kv=cu_seqlens_kv,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_kv=max_seqlen_kv,
        causal=causal,
        window=window,
        scale=scale,
        softcap=softcap,
        bias=bias,
        mask=mask,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        deterministic=deterministic,
        backend=backend,
        wants_lse=True,
        is_packed=True,
    )


def _attend(q: Tensor, k: Tensor, v: Tensor, *, backend: str, **call: Any) -> tuple[Tensor, Tensor]:
    key = repeats.key(q, k, v, backend, call)
    if key is not None and (known := repeats.find(key)) is not None:
        return repeats.run(known, q, k, v, backend, call)
    dispatch.check_backend(backend)
    problem, operands = validation.check_call(q, k, v, **call)
    results = ops.attention(problem, operands, backend)
    if key is not None:
        repeats.remember(key, problem, operands, backend)
    return results
