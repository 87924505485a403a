"""Attention written down a second time, for tests: one sequence at a time, autograd for the gradients, any precision.

In float64 it is the oracle that kernels are measured against. In the dtype of the inputs it is "the naive formula in
the same dtype": scores, softmax and products are all rounded to it, as people write attention without a kernel.

It shares nothing with the backends and computes positions, masks and sums with arithmetic of its own, so that a mistake
in theirs shows. Two definitions are the exception: which weights dropout drops (``flashtile.spec.dropout``), and how
small a score a bias must make to hide a pair (``flashtile.spec.masks``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from flashtile.spec import dropout, masks

OPTIONS = frozenset(
    {"causal", "window", "scale", "softcap", "bias", "mask", "alibi_slopes", "sinks", "dropout_p", "dropout_seed"}
    | {"deterministic", "cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q", "max_seqlen_kv"}
)
"""The options of the public functions, all but ``backend``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """The arguments of one attention call; packed if ``cu_seqlens_q`` is among the options.

    ``options`` are keyword arguments of ``flashtile.attention`` or ``flashtile.attention_varlen``, except ``backend``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        unknown = sorted(self.options.keys() - OPTIONS)
        if unknown:
            raise TypeError(f"no such option of attention: {', '.join(unknown)}")

    @property
    def is_packed(self) -> bool:
        return self.options.get("cu_seqlens_q") is not None

    @property
    def differentiable(self) -> dict[str, Tensor]:
        """The tensors that can have a gradient, by name."""
        tensors = {"q": self.q, "k": self.k, "v": self.v} | {name: self.options.get(name) for name in ("bias", "sinks")}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    @property
    def out_shape(self) -> tuple[int, ...]:
        """[batch, seqlen_q, heads_q, head_dim_v], packed [tokens_q, heads_q, head_dim_v]."""
        return (*self.q.shape[:-1], self.v.shape[-1])

    @property
    def lse_shape(self) -> tuple[int, ...]:
        """[batch, heads_q, seqlen_q], packed [heads_q, tokens_q]."""
        *batch, rows, heads_q, _ = self.q.shape
        return (*batch, heads_q, rows)

    @property
    def scores_shape(self) -> tuple[int, int, int, int]:
        """[batch, heads_q, seqlen_q, seqlen_kv], packed with the longest lengths."""
        heads_q, options = self.q.shape[-2], self.options
        if self.is_packed:
            return len(options["cu_seqlens_q"]) - 1, heads_q, options["max_seqlen_q"], options["max_seqlen_kv"]
        return self.q.shape[0], heads_q, self.q.shape[1], self.k.shape[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """What a call returned, and the gradients by the name of the input they belong to."""

    out: Tensor
    lse: Tensor
    gradients: dict[str, Tensor] = field(default_factory=dict)

    def named(self) -> dict[str, Tensor]:
        """Everything under one name each: out, lse, d_q, d_k, ..."""
        return {"out": self.out, "lse": self.lse} | {f"d_{name}": grad for name, grad in self.gradients.items()}


def oracle(
    q: Tensor, k: Tensor, v: Tensor, *, dtype: torch.dtype = torch.float64, **options: Any
) -> tuple[Tensor, Tensor]:
    """Attention with every option of the public functions, computed in ``dtype`` with the scores stored.

    Differentiable with respect to q, k, v, bias and sinks.

    Args:
        q, k, v: as ``flashtile.attention`` takes them, or ``flashtile.attention_varlen`` if the options have
            ``cu_seqlens_q``.
        dtype: the precision of every step; float64 is the oracle, q.dtype the naive formula in the same dtype.
        options: keyword arguments of those functions, except ``backend``. ``dropout_p`` above 0 needs a
            ``dropout_seed``.

    Returns:
        out [batch, seqlen_q, heads_q, head_dim_v] and lse [batch, heads_q, seqlen_q], both in ``dtype``; packed
        [tokens_q, heads_q, head_dim_v] and [heads_q, tokens_q]. Rows of no sequence are 0 and -inf.

    Raises:
        TypeError: an option that the public functions do not have.

    Example:
        >>> import torch
        >>> from flashtile.testing import oracle
        >>> q, k, v = torch.randn(3, 1, 8, 2, 16).unbind()
        >>> out, lse = oracle(q, k, v, causal=True)
        >>> out.shape, lse.dtype
        (torch.Size([1, 8, 2, 16]), torch.float64)
    """
    call = Call(q=q, k=k, v=v, options=options)
    out = q.new_zeros(call.out_shape, dtype=dtype)
    lse = q.new_full(call.lse_shape, -math.inf, dtype=dtype)
    for weights in weights_of_sequences(call, dtype):
        sequence = weights.sequence
        values = per_query_head(v[sequence.kv_rows].to(dtype), heads_q=q.shape[-2])
        out[sequence.q_rows] = (weights.p * weights.dropout_factor @ values).transpose(0, 1)
        lse[sequence.lse_rows] = weights.lse
    return out, lse


def reference(
    call: Call, *, dtype: torch.dtype = torch.float64, d_out: Tensor | None = None, d_lse: Tensor | None = None
) -> Results:
    """``oracle`` and its gradients with respect to everything differentiable in the call.

    Args:
        call: the arguments; whether its tensors require a gradient does not matter.
        dtype: the precision of every step, forward and backward.
        d_out: the gradient of out, ``call.out_shape``; None stands for zeros.
        d_lse: the gradient of lse, ``call.lse_shape``; None stands for zeros.

    Returns:
        Results in ``dtype``, without gradients if ``d_out`` and ``d_lse`` are both None.

    Example:
        >>> import torch
        >>> from flashtile.testing import Call, reference
        >>> q, k, v = torch.randn(3, 1, 8, 2, 16).unbind()
        >>> results = reference(Call(q=q, k=k, v=v, options={"causal": True}), d_out=torch.ones(1, 8, 2, 16))
        >>> sorted(results.gradients)
        ['k', 'q', 'v']
    """
    leaves = {name: tensor.detach().to(dtype).requires_grad_() for name, tensor in call.differentiable.items()}
    q, k, v = (leaves[name] for name in ("q", "k", "v"))
    options = call.options | {name: leaf for name, leaf in leaves.items() if name in OPTIONS}
    with torch.enable_grad():
        out, lse = oracle(q, k, v, dtype=dtype, **options)
    if d_out is None and d_lse is None:
        return Results(out=out.detach(), lse=lse.detach())
    reached = [  # without any sequence, out and lse depend on nothing
        (result, gradient.to(dtype))
        for result, gradient in ((out, d_out), (lse, d_lse))
        if gradient is not None and result.requires_grad
    ]
    gradients = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    if reached:
        results, upstream = zip(*reached, strict=True)
        found = torch.autograd.grad(results, list(leaves.values()), upstream, materialize_grads=True)
        gradients = dict(zip(leaves, found, strict=True))
    return Results(out=out.detach(), lse=lse.detach(), gradients=gradients)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sequence:
    """Where one sequence of the batch lies: an index of dense tensors, a range of packed ones."""

    batch_idx: int
    seqlen_q: int
    seqlen_kv: int
    q_rows: int | slice
    kv_rows: int | slice
    lse_rows: int | tuple[slice, slice]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """The attention weights of one sequence, before dropout."""

    sequence: Sequence
    scores: Tensor  # [heads_q, seqlen_q, seqlen_kv], -inf where hidden
    p: Tensor  # [heads_q, seqlen_q, seqlen_kv]
    dropout_factor: Tensor | float  # 0 for a dropped pair, 1 / (1 - dropout_p) for a kept one
    lse: Tensor  # [heads_q, seqlen_q]


def weights_of_sequences(call: Call, dtype: torch.dtype) -> Iterator[Weights]:
    """The weights of every sequence of the batch, in order, computed in ``dtype``."""
    expanded = _Expanded.of(call, dtype)
    for sequence in _sequences(call):
        scores = _scores(call, expanded, sequence, dtype)
        p, lse = _softmax(scores, None if expanded.sinks is None else expanded.sinks[sequence.batch_idx])
        factor = _dropout_factor(call, sequence, p)
        yield Weights(sequence=sequence, scores=scores, p=p, dropout_factor=factor, lse=lse)


def per_query_head(rows: Tensor, *, heads_q: int) -> Tensor:
    """[seqlen_kv, heads_kv, dim] -> [heads_q, seqlen_kv, dim], each kv head repeated for its group of query heads."""
    return rows.transpose(0, 1).repeat_interleave(heads_q // rows.shape[-2], dim=0)


def _sequences(call: Call) -> Iterator[Sequence]:
    batch, _, seqlen_q, seqlen_kv = call.scores_shape
    if not call.is_packed:
        for idx in range(batch):
            yield Sequence(batch_idx=idx, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv, q_rows=idx, kv_rows=idx, lse_rows=idx)
        return
    bounds_q, bounds_kv = (call.options[name].tolist() for name in ("cu_seqlens_q", "cu_seqlens_kv"))
    for idx, (rows_q, rows_kv) in enumerate(zip(pairwise(bounds_q), pairwise(bounds_kv), strict=True)):
        yield Sequence(
            batch_idx=idx,
            seqlen_q=rows_q[1] - rows_q[0],
            seqlen_kv=rows_kv[1] - rows_kv[0],
            q_rows=slice(*rows_q),
            kv_rows=slice(*rows_kv),
            lse_rows=(slice(None), slice(*rows_q)),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Expanded:
    """The broadcast options at full size, so that autograd sums a shared entry's gradient once, at the end."""

    bias: Tensor | None  # [batch, heads_q, seqlen_q, seqlen_kv]
    mask: Tensor | None  # [batch, heads_q, seqlen_q, seqlen_kv]
    slopes: Tensor | None  # [batch, heads_q]
    sinks: Tensor | None  # [batch, heads_q]

    @classmethod
    def of(cls, call: Call, dtype: torch.dtype) -> _Expanded:
        def expand(name: str, shape: tuple[int, ...], to: torch.dtype) -> Tensor | None:
            tensor = call.options.get(name)
            return None if tensor is None else tensor.to(to).expand(shape)

        return cls(
            bias=expand("bias", call.scores_shape, dtype),
            mask=expand("mask", call.scores_shape, torch.bool),
            slopes=expand("alibi_slopes", call.scores_shape[:2], dtype),
            sinks=expand("sinks", call.scores_shape[:2], dtype),
        )


def _scores(call: Call, expanded: _Expanded, sequence: Sequence, dtype: torch.dtype) -> Tensor:
    """The final scores of one sequence, hidden pairs at -inf: [heads_q, seqlen_q, seqlen_kv]."""
    heads_q, head_dim = call.q.shape[-2:]
    softcap, scale = call.options.get("softcap", 0.0), call.options.get("scale")
    cropped = (sequence.batch_idx, slice(None), slice(sequence.seqlen_q), slice(sequence.seqlen_kv))
    q = call.q[sequence.q_rows].to(dtype).transpose(0, 1)
    k = per_query_head(call.k[sequence.kv_rows].to(dtype), heads_q=heads_q)

    s = q @ k.transpose(1, 2) * (1 / math.sqrt(head_dim) if scale is None else scale)
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    if expanded.bias is not None:
        s = s + expanded.bias[cropped]
        s = s.masked_fill(s <= masks.HIDDEN_BELOW, -math.inf)
    distance = _distance_to_diagonal(sequence, call.q.device)
    if expanded.slopes is not None:
        s = s - expanded.slopes[sequence.batch_idx][:, None, None] * distance.abs().to(dtype)
    hidden = _hidden_by_position(call, distance)
    if expanded.mask is not None:
        hidden = hidden | ~expanded.mask[cropped]
    return s.masked_fill(hidden, -math.inf)


def _distance_to_diagonal(sequence: Sequence, device: torch.device) -> Tensor:
    """How far each key lies behind the last query's view of it: 0 on the bottom-right diagonal, negative before it."""
    from_end_q = sequence.seqlen_q - 1 - torch.arange(sequence.seqlen_q, device=device)
    from_end_kv = sequence.seqlen_kv - 1 - torch.arange(sequence.seqlen_kv, device=device)
    return from_end_q[:, None] - from_end_kv[None, :]


def _hidden_by_position(call: Call, distance: Tensor) -> Tensor:
    left, right = call.options.get("window") or (None, None)
    hidden = torch.zeros_like(distance, dtype=torch.bool)
    if call.options.get("causal", False):
        hidden = hidden | (distance > 0)
    if left is not None:
        hidden = hidden | (distance < -left)
    if right is not None:
        hidden = hidden | (distance > right)
    return hidden


def _softmax(s: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """(p [heads_q, seqlen_q, seqlen_kv], lse [heads_q, seqlen_q]); a sink is one more column that is dropped again."""
    num_keys = s.shape[-1]
    if sinks is not None:
        s = torch.cat([s, sinks[:, None, None].expand(*s.shape[:-1], 1)], dim=-1)
    sees_nothing = (s == -math.inf).all(dim=-1, keepdim=True)
    s = torch.where(sees_nothing, 0.0, s)  # softmax of nothing is NaN, and so would its gradient be
    p = torch.softmax(s, dim=-1).masked_fill(sees_nothing, 0.0)
    lse = torch.logsumexp(s, dim=-1).masked_fill(sees_nothing[..., 0], -math.inf)
    return p[..., :num_keys], lse


def _dropout_factor(call: Call, sequence: Sequence, p: Tensor) -> Tensor | float:
    """0 for a dropped pair, 1 / (1 - dropout_p) for a kept one."""
    dropout_p = call.options.get("dropout_p", 0.0)
    if dropout_p == 0:
        return 1.0
    heads_q, seqlen_q, seqlen_kv = p.shape
    keep = dropout.keep_mask(
        torch.as_tensor(call.options["dropout_seed"], dtype=torch.int64, device=p.device),
        dropout_p=dropout_p,
        batch_idx=torch.tensor(sequence.batch_idx, device=p.device),
        head_idx=torch.arange(heads_q, device=p.device)[:, None, None],
        q_pos=torch.arange(seqlen_q, device=p.device)[:, None],
        kv_begin=0,
        kv_end=seqlen_kv,
    )
    return keep.to(p.dtype) / (1 - dropout_p)
