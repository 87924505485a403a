"""Poses a problem by its sizes alone, for everything that plans or reckons without tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from flashtile.errors import InvalidArgument
from flashtile.spec import validation
from flashtile.spec.problem import DIFFERENTIABLE, AttentionProblem


def pose(
    *,
    batch: int = 1,
    seqlen_q: int,
    seqlen_kv: int | None = None,
    heads_q: int,
    heads_kv: int | None = None,
    head_dim: int,
    head_dim_v: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    causal: bool = False,
    window: Sequence[int | None] | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    bias_shape: Sequence[int] | None = None,
    mask_shape: Sequence[int] | None = None,
    has_alibi: bool = False,
    has_sinks: bool = False,
    dropout_p: float = 0.0,
    deterministic: bool = False,
    with_lse: bool = False,
    gradients: Iterable[str] = ("q", "k", "v"),
) -> AttentionProblem:
    """The problem of a dense call with these sizes; ``flashtile.explain`` says what each argument means.

    The sizes become tensors of the meta device, which have no data, so the one checker checks them as it checks a call.
    """
    seqlen_kv = seqlen_q if seqlen_kv is None else seqlen_kv
    heads_kv = heads_q if heads_kv is None else heads_kv
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    _check_sizes(batch=batch, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv, heads_q=heads_q, heads_kv=heads_kv)
    validation.check_count("head_dim", head_dim, minimum=1)
    validation.check_count("head_dim_v", head_dim_v, minimum=1)
    for name, flag in (("has_alibi", has_alibi), ("has_sinks", has_sinks), ("with_lse", with_lse)):
        validation.check_flag(name, flag)
    wanted = _check_gradients(gradients, has_bias=bias_shape is not None, has_sinks=has_sinks)
    _check_dtype(dtype)

    def tensor(name: str, shape: Sequence[int], dtype: torch.dtype = dtype) -> Tensor:
        return _without_data(name, shape, dtype).requires_grad_(name in wanted)

    with torch.enable_grad():
        problem, _ = validation.check_call(
            tensor("q", (batch, seqlen_q, heads_q, head_dim)),
            tensor("k", (batch, seqlen_kv, heads_kv, head_dim)),
            tensor("v", (batch, seqlen_kv, heads_kv, head_dim_v)),
            causal=causal,
            window=window,
            scale=scale,
            softcap=softcap,
            bias=None if bias_shape is None else tensor("bias", bias_shape),
            mask=None if mask_shape is None else tensor("mask", mask_shape, torch.bool),
            alibi_slopes=tensor("alibi_slopes", (heads_q,), torch.float32) if has_alibi else None,
            sinks=tensor("sinks", (heads_q,), torch.float32) if has_sinks else None,
            dropout_p=dropout_p,
            dropout_seed=0,
            deterministic=deterministic,
            wants_lse=with_lse,
        )
    return problem


def _check_sizes(*, batch: int, seqlen_q: int, seqlen_kv: int, heads_q: int, heads_kv: int) -> None:
    for name, size in {"batch": batch, "seqlen_q": seqlen_q, "seqlen_kv": seqlen_kv}.items():
        validation.check_count(name, size, minimum=0)
    for name, size in {"heads_q": heads_q, "heads_kv": heads_kv}.items():
        validation.check_count(name, size, minimum=1)
    if heads_q % heads_kv != 0:
        raise InvalidArgument(
            "heads_kv",
            got=f"{heads_kv} beside heads_q = {heads_q}",
            wanted="a divisor of heads_q",
            remedy="pass the number of key/value heads; leave it out if it equals heads_q",
        )


def _without_data(name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    if isinstance(shape, str) or not isinstance(shape, Sequence):
        raise InvalidArgument(
            name, got=repr(shape), wanted="a shape: a sequence of integers", remedy="pass for example (1, 1, 512, 512)"
        )
    sizes = [validation.check_count(f"a size of {name}", size, minimum=0) for size in shape]
    if math.prod(sizes) >= 2**59:
        raise InvalidArgument(
            name, got=f"shape {sizes}", wanted="fewer than 2**59 elements", remedy="check the sizes for a typing error"
        )
    return torch.empty(sizes, dtype=dtype, device="meta")


def _check_dtype(dtype: Any) -> None:
    if dtype not in validation.DTYPES:
        raise InvalidArgument(
            "dtype",
            got=repr(dtype),
            wanted="torch.float16, torch.bfloat16, torch.float32 or torch.float64",
            remedy="pass the dtype of q, k and v",
        )


def _check_gradients(gradients: Any, *, has_bias: bool, has_sinks: bool) -> frozenset[str]:
    possible = [name for name in DIFFERENTIABLE if (name != "bias" or has_bias) and (name != "sinks" or has_sinks)]
    names = None if isinstance(gradients, str) or not isinstance(gradients, Iterable) else list(gradients)
    if names is None or any(name not in possible for name in names):
        raise InvalidArgument(
            "gradients",
            got=repr(gradients),
            wanted="a collection of names out of " + ", ".join(repr(name) for name in possible),
            remedy="pass () for inference; a bias or sinks have a gradient only if the problem has them",
        )
    return frozenset(names)
