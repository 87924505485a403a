"""The only checker: turns what a person passed into Operands and an AttentionProblem, or says what is wrong with it.

Structure (ranks, shapes, dtypes, devices, option ranges) is checked for every call. Values inside tensors are checked
by ``check_values``, which reads them, so it runs on CPU tensors and, on request only, on a GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from flashtile.errors import invalid
from flashtile.spec.dropout import draw_seed
from flashtile.spec.operands import Operands
from flashtile.spec.options import (
    check_count,
    check_dropout_p,
    check_flag,
    check_mask_spec,
    check_scale,
    check_softcap,
    describe,
)
from flashtile.spec.problem import DIFFERENTIABLE, DTYPES, AttentionProblem

DENSE_AXES = "[batch, seqlen, heads, head_dim]"
PACKED_AXES = "[tokens, heads, head_dim]"


def check_call(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: Sequence[int | None] | None,
    scale: float | None,
    softcap: float,
    bias: Tensor | None,
    mask: Tensor | None,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    dropout_p: float,
    dropout_seed: int | Tensor | None,
    deterministic: bool,
    wants_lse: bool,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_kv: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_kv: int | None = None,
    is_packed: bool = False,
) -> tuple[AttentionProblem, Operands]:
    """Checks one call of a public function and states it as (problem, operands)."""
    _check_qkv(q, k, v, rank=3 if is_packed else 4)
    if is_packed:
        cu_seqlens_q = _check_cu_seqlens("cu_seqlens_q", cu_seqlens_q, q)
        cu_seqlens_kv = _check_cu_seqlens("cu_seqlens_kv", cu_seqlens_kv, q)
        if cu_seqlens_q.shape != cu_seqlens_kv.shape:
            raise invalid(
                "cu_seqlens_kv",
                got=f"{cu_seqlens_kv.shape[0]} entries beside {cu_seqlens_q.shape[0]} in cu_seqlens_q",
                wanted="as many entries as cu_seqlens_q (batch + 1)",
                remedy="give every sequence a query range and a key range; either may be empty",
            )
        seqlen_q = check_count("max_seqlen_q", max_seqlen_q, minimum=0)
        seqlen_kv = check_count("max_seqlen_kv", max_seqlen_kv, minimum=0)
        batch = cu_seqlens_q.shape[0] - 1
    else:
        batch, seqlen_q, seqlen_kv = q.shape[0], q.shape[1], k.shape[1]
    heads_q = q.shape[-2]
    scores_shape = (batch, heads_q, seqlen_q, seqlen_kv)

    _check_bias(bias, q, scores_shape)
    _check_mask(mask, q, scores_shape)
    _check_alibi(alibi_slopes, q, batch, heads_q)
    _check_sinks(sinks, q, heads_q)
    mask_spec = check_mask_spec(causal=causal, window=window)
    check_flag("deterministic", deterministic)
    dropout_p = check_dropout_p(dropout_p)
    operands = Operands(
        q=q,
        k=k,
        v=v,
        bias=bias,
        mask=mask,
        alibi_slopes=alibi_slopes,
        sinks=sinks,
        dropout_seed=_check_seed(dropout_seed, dropout_p, q.device),
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_kv=cu_seqlens_kv,
    )
    problem = AttentionProblem.of(
        operands,
        mask=mask_spec,
        scale=check_scale(scale, q.shape[-1]),
        softcap=check_softcap(softcap),
        dropout_p=dropout_p,
        gradients=_wanted_gradients(operands, wants_lse=wants_lse),
        deterministic=deterministic,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_kv=max_seqlen_kv,
    )
    return problem, operands


# --- tensors ---------------------------------------------------------------------------------------------------------


def _check_qkv(q: Tensor, k: Tensor, v: Tensor, *, rank: int) -> None:
    axes = DENSE_AXES if rank == 4 else PACKED_AXES
    shape_q = _check_one_of_qkv("q", q, rank=rank, axes=axes)
    dtype, device = q.dtype, q.device
    shape_k = _check_one_of_qkv("k", k, rank=rank, axes=axes)
    _check_like_q("k", k, dtype, device)
    shape_v = _check_one_of_qkv("v", v, rank=rank, axes=axes)
    _check_like_q("v", v, dtype, device)
    if shape_k[:-1] != shape_v[:-1]:
        raise invalid(
            "v",
            got=f"shape {list(shape_v)} beside k of shape {list(shape_k)}",
            wanted="every axis but the last equal to k's",
            remedy="give each key exactly one value; only head_dim_v may differ from head_dim",
        )
    if shape_q[-1] != shape_k[-1]:
        raise invalid(
            "k",
            got=f"head_dim {shape_k[-1]} beside q's {shape_q[-1]}",
            wanted="the head_dim of q",
            remedy=f"check the axis order: the layout is {axes}",
        )
    if rank == 4 and shape_q[0] != shape_k[0]:
        raise invalid(
            "k",
            got=f"batch {shape_k[0]} beside q's {shape_q[0]}",
            wanted="the batch size of q",
            remedy="expand k and v to q's batch; strides of 0 are fine, nothing is copied",
        )
    if shape_q[-2] % shape_k[-2] != 0:
        raise invalid(
            "k",
            got=f"{shape_k[-2]} heads beside {shape_q[-2]} in q",
            wanted="heads_q divisible by heads_kv",
            remedy=f"check the axis order: the layout is {axes}, with heads after the sequence",
        )


def _check_one_of_qkv(name: str, value: Any, *, rank: int, axes: str) -> torch.Size:
    """The shape of what must be a floating-point tensor of the layout."""
    tensor = _check_strided_tensor(name, value)
    shape = tensor.shape
    if len(shape) != rank:
        other = "attention_varlen" if rank == 4 else "attention"
        raise invalid(
            name,
            got=f"{len(shape)} axes, shape {list(shape)}",
            wanted=f"{rank} axes, {axes}",
            remedy=f"reshape it to {axes}, or call flashtile.{other} for the other layout",
        )
    if tensor.dtype not in DTYPES:
        raise invalid(
            name,
            got=str(tensor.dtype),
            wanted="float16, bfloat16, float32 or float64",
            remedy=f"convert it first, for example {name}.to(torch.bfloat16)",
        )
    if shape[-1] == 0 or shape[-2] == 0:
        label = "head_dim" if shape[-1] == 0 else "heads"
        raise invalid(
            name,
            got=f"{label} = 0, shape {list(shape)}",
            wanted=f"{label} >= 1",
            remedy="only batch and sequence lengths may be 0",
        )
    return shape


def _check_like_q(name: str, tensor: Tensor, dtype: torch.dtype, device: torch.device) -> None:
    if tensor.dtype != dtype:
        raise invalid(
            name,
            got=f"{tensor.dtype} beside q of {dtype}",
            wanted="one dtype for q, k and v",
            remedy=f"pass {name}.to({dtype})",
        )
    _check_device(name, tensor, device)


def _check_cu_seqlens(name: str, value: Any, q: Tensor) -> Tensor:
    cu_seqlens = _check_strided_tensor(name, value)
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise invalid(
            name,
            got=describe(cu_seqlens),
            wanted="a 1-d int32 tensor of batch + 1 entries, starting with 0",
            remedy="torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))",
        )
    _check_device(name, cu_seqlens, q.device)
    return cu_seqlens


def _check_bias(bias: Tensor | None, q: Tensor, scores_shape: tuple[Any, ...]) -> None:
    if bias is None:
        return
    _check_strided_tensor("bias", bias)
    if bias.dtype not in DTYPES:
        boolean = bias.dtype == torch.bool
        raise invalid(
            "bias",
            got=f"{bias.dtype} tensor",
            wanted="float16, bfloat16, float32 or float64, added to the scores",
            remedy="pass a boolean mask as mask=, True = may attend" if boolean else "pass bias.to(q.dtype)",
        )
    _check_device("bias", bias, q.device)
    _check_broadcast("bias", bias, scores_shape)


def _check_mask(mask: Tensor | None, q: Tensor, scores_shape: tuple[Any, ...]) -> None:
    if mask is None:
        return
    _check_strided_tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise invalid(
            "mask",
            got=f"{mask.dtype} tensor",
            wanted="a torch.bool tensor, True = may attend",
            remedy="pass an additive mask as bias=, or mask.bool() if nonzero means may attend",
        )
    _check_device("mask", mask, q.device)
    _check_broadcast("mask", mask, scores_shape)


def _check_alibi(slopes: Tensor | None, q: Tensor, batch: int, heads_q: int) -> None:
    if slopes is None:
        return
    _check_strided_tensor("alibi_slopes", slopes)
    if slopes.dtype not in DTYPES or tuple(slopes.shape) not in ((heads_q,), (batch, heads_q)):
        raise invalid(
            "alibi_slopes",
            got=describe(slopes),
            wanted=f"a floating-point tensor [heads_q] = [{heads_q}] or [batch, heads_q] = [{batch}, {heads_q}]",
            remedy="pass one slope per query head",
        )
    _check_device("alibi_slopes", slopes, q.device)
    if slopes.requires_grad and torch.is_grad_enabled():
        raise invalid(
            "alibi_slopes",
            got="a tensor that requires a gradient",
            wanted="constant slopes",
            remedy="pass alibi_slopes.detach(), or build the term yourself and pass it as bias=, which has a gradient",
        )


def _check_sinks(sinks: Tensor | None, q: Tensor, heads_q: int) -> None:
    if sinks is None:
        return
    _check_strided_tensor("sinks", sinks)
    if sinks.dtype not in DTYPES or tuple(sinks.shape) != (heads_q,):
        raise invalid(
            "sinks",
            got=describe(sinks),
            wanted=f"a floating-point tensor [heads_q] = [{heads_q}]",
            remedy="pass one sink logit per query head",
        )
    _check_device("sinks", sinks, q.device)


def _check_seed(seed: int | Tensor | None, dropout_p: float, device: torch.device) -> Tensor | None:
    """The seed as a 0-d int64 tensor on the device; drawn from torch's generator if dropout needs one."""
    remedy = (
        "pass a Python int below 2**63, a 0-d int64 tensor on q's device, or None to draw one from torch's generator"
    )
    wanted = "an int, a 0-d int64 tensor, or None"
    if isinstance(seed, Tensor):
        if seed.dim() != 0 or seed.dtype != torch.int64:
            raise invalid("dropout_seed", got=describe(seed), wanted=wanted, remedy=remedy)
        _check_device("dropout_seed", seed, device)
        return seed if dropout_p > 0 else None
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not -(2**63) <= seed < 2**63):
        raise invalid("dropout_seed", got=describe(seed), wanted=wanted, remedy=remedy)
    if dropout_p == 0:
        return None
    if seed is None:
        return draw_seed(device)
    return torch.full((), seed, dtype=torch.int64, device=device)


def _wanted_gradients(operands: Operands, *, wants_lse: bool) -> frozenset[str]:
    if not torch.is_grad_enabled():
        return frozenset()
    tensors = [(name, getattr(operands, name)) for name in DIFFERENTIABLE]
    wanted = [name for name, tensor in tensors if tensor is not None and tensor.requires_grad]
    return frozenset([*wanted, "lse"] if wanted and wants_lse else wanted)


def _check_broadcast(name: str, tensor: Tensor, scores_shape: tuple[Any, ...]) -> None:
    fits = tensor.dim() <= 4 and all(
        have in (1, want) for have, want in zip(reversed(tensor.shape), reversed(scores_shape), strict=False)
    )
    if not fits:
        raise invalid(
            name,
            got=f"shape {list(tensor.shape)}",
            wanted=f"a shape that broadcasts to [batch, heads_q, seqlen_q, seqlen_kv] = {list(scores_shape)}",
            remedy=f"insert axes of size 1, for example {name}[:, None, None, :] for [batch, seqlen_kv]",
        )


def _check_strided_tensor(name: str, value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise invalid(
            name,
            got=describe(value),
            wanted="a torch.Tensor",
            remedy=f"convert it, for example torch.as_tensor({name})",
        )
    if value.is_nested:
        raise invalid(
            name,
            got="a nested tensor",
            wanted="a strided tensor",
            remedy=f"pass torch.nested.to_padded_tensor({name}, 0.0), or pack the sequences for attention_varlen",
        )
    if value.layout != torch.strided:
        raise invalid(name, got=f"layout {value.layout}", wanted="a strided tensor", remedy=f"pass {name}.to_dense()")
    return value


def _check_device(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.device != device:
        raise invalid(
            name,
            got=f"a tensor on {tensor.device}",
            wanted=f"the device of q, {device}",
            remedy=f"pass {name}.to({str(device)!r})",
        )


# --- values inside tensors --------------------------------------------------------------------------------------------


def check_values(problem: AttentionProblem, operands: Operands) -> None:
    """Reads the packed boundaries and checks them. On a GPU this synchronises, so callers decide when it runs."""
    for name, cu_seqlens, tokens, longest in (
        ("cu_seqlens_q", operands.cu_seqlens_q, problem.tokens_q, problem.seqlen_q),
        ("cu_seqlens_kv", operands.cu_seqlens_kv, problem.tokens_kv, problem.seqlen_kv),
    ):
        if cu_seqlens is None:
            continue
        boundaries = cu_seqlens.tolist()
        lengths = [end - begin for begin, end in pairwise(boundaries)]
        if boundaries[0] != 0:
            raise invalid(
                name,
                got=f"first entry {boundaries[0]}",
                wanted="first entry 0",
                remedy="torch.nn.functional.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))",
            )
        if lengths and min(lengths) < 0:
            sequence = next(idx for idx, length in enumerate(lengths) if length < 0)
            raise invalid(
                name,
                got=f"{boundaries[sequence]} followed by {boundaries[sequence + 1]} (sequence {sequence})",
                wanted="entries that never decrease",
                remedy="pass cumulative lengths, not the lengths themselves",
            )
        if boundaries[-1] > tokens:
            raise invalid(
                name,
                got=f"last entry {boundaries[-1]} for a buffer of {tokens} tokens",
                wanted="a last entry no larger than the number of tokens",
                remedy="check that the packed tensor and the boundaries belong together",
            )
        if lengths and max(lengths) > longest:
            raise invalid(
                name.replace("cu_seqlens", "max_seqlen"),
                got=str(longest),
                wanted=f"at least {max(lengths)}, the longest sequence in {name}",
                remedy="pass the longest sequence length; a larger number is fine",
            )
