"""The table of wrong calls that ``test_validation.py`` makes, and the right calls that they start from."""

from __future__ import annotations

import fractions
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import flashtile

BATCH, SEQLEN_Q, SEQLEN_KV, HEADS_Q, HEADS_KV, HEAD_DIM, HEAD_DIM_V = 2, 6, 7, 4, 2, 8, 5
TOKENS_Q, TOKENS_KV = 10, 12
LSE_TWIN: dict[Callable[..., Any], Callable[..., Any]] = {
    flashtile.attention: flashtile.attention_with_lse,
    flashtile.attention_varlen: flashtile.attention_varlen_with_lse,
}


@dataclass(slots=True, kw_only=True)
class Call:
    """A function and the keyword arguments it is about to get; q, k, v among them."""

    function: Callable[..., Any]
    arguments: dict[str, Any]

    def run(self) -> Any:
        return self.function(**self.arguments)

    def with_lse(self) -> Call:
        """The same call of the function that also returns the lse."""
        return Call(function=LSE_TWIN[self.function], arguments=self.arguments)


@dataclass(frozen=True, slots=True, kw_only=True)
class WrongCall:
    """One row of the table."""

    id: str
    make: Callable[[], Call]
    argument: str
    """The argument that the error must blame."""
    in_remedy: str
    """A word that the remedy must contain."""


def dense(**changes: Any) -> Call:
    """A right call of ``attention``, with some arguments replaced."""
    arguments: dict[str, Any] = {
        "q": torch.randn(BATCH, SEQLEN_Q, HEADS_Q, HEAD_DIM),
        "k": torch.randn(BATCH, SEQLEN_KV, HEADS_KV, HEAD_DIM),
        "v": torch.randn(BATCH, SEQLEN_KV, HEADS_KV, HEAD_DIM_V),
    }
    return Call(function=flashtile.attention, arguments=arguments | changes)


def packed(**changes: Any) -> Call:
    """A right call of ``attention_varlen``, with some arguments replaced."""
    arguments: dict[str, Any] = {
        "q": torch.randn(TOKENS_Q, HEADS_Q, HEAD_DIM),
        "k": torch.randn(TOKENS_KV, HEADS_KV, HEAD_DIM),
        "v": torch.randn(TOKENS_KV, HEADS_KV, HEAD_DIM_V),
        "cu_seqlens_q": boundaries(0, 4, TOKENS_Q),
        "cu_seqlens_kv": boundaries(0, 7, TOKENS_KV),
        "max_seqlen_q": 6,
        "max_seqlen_kv": 7,
    }
    return Call(function=flashtile.attention_varlen, arguments=arguments | changes)


def boundaries(*entries: int) -> Tensor:
    return torch.tensor(entries, dtype=torch.int32)


def q_like(dtype: torch.dtype) -> Tensor:
    return torch.ones(BATCH, SEQLEN_Q, HEADS_Q, HEAD_DIM).to(dtype)


def nested(layout: torch.layout = torch.strided, dtype: torch.dtype = torch.float32) -> Tensor:
    rows = [torch.ones(length, HEADS_Q, HEAD_DIM, dtype=dtype) for length in (SEQLEN_Q, SEQLEN_Q - 1)]
    return torch.nested.nested_tensor(rows, layout=layout)


def quantized() -> Tensor:
    return torch.quantize_per_tensor(q_like(torch.float32), 0.1, 0, torch.qint8)


# (id, the call, the argument to blame, a word in the remedy)
_Row = tuple[str, Callable[[], Call], str, str]

_QKV_KINDS: list[_Row] = [
    ("q-none", lambda: dense(q=None), "q", "torch.as_tensor(q)"),
    ("k-list", lambda: dense(k=[[[[1.0] * 8] * 2] * 70] * 20), "k", "torch.as_tensor(k)"),
    ("v-numpy", lambda: dense(v=np.zeros((2, 7, 2, 5), dtype=np.float32)), "v", "torch.as_tensor(v)"),
    ("q-number", lambda: dense(q=1.5), "q", "torch.as_tensor(q)"),
    ("q-class", lambda: dense(q=Tensor), "q", "torch.as_tensor(q)"),
    ("q-tuple-of-tensors", lambda: dense(q=(torch.zeros(1), torch.zeros(1))), "q", "torch.as_tensor(q)"),
    ("packed-k-none", lambda: packed(k=None), "k", "torch.as_tensor(k)"),
    ("q-sparse-coo", lambda: dense(q=q_like(torch.float32).to_sparse()), "q", "to_dense"),
    ("k-sparse-csr", lambda: dense(k=torch.eye(4).to_sparse_csr()), "k", "to_dense"),
    ("q-mkldnn", lambda: dense(q=q_like(torch.float32).to_mkldnn()), "q", "to_dense"),
    ("q-nested-strided", lambda: dense(q=nested()), "q", "to_padded_tensor"),
    ("q-nested-jagged", lambda: dense(q=nested(torch.jagged)), "q", "to_padded_tensor"),
    ("k-nested-strided", lambda: dense(k=nested()), "k", "to_padded_tensor"),
    ("packed-q-nested", lambda: packed(q=nested()), "q", "to_padded_tensor"),
    ("q-quantized", lambda: dense(q=quantized()), "q", "to(torch.bfloat16)"),
]

_QKV_SHAPES: list[_Row] = [
    ("q-scalar", lambda: dense(q=torch.tensor(1.0)), "q", "[batch, seqlen, heads, head_dim]"),
    ("q-three-axes", lambda: dense(q=torch.zeros(6, 4, 8)), "q", "attention_varlen"),
    ("k-two-axes", lambda: dense(k=torch.zeros(7, 8)), "k", "[batch, seqlen, heads, head_dim]"),
    ("v-five-axes", lambda: dense(v=torch.zeros(1, 2, 7, 2, 5)), "v", "[batch, seqlen, heads, head_dim]"),
    ("packed-q-four-axes", lambda: packed(q=torch.zeros(2, 5, 4, 8)), "q", "flashtile.attention "),
    ("packed-v-two-axes", lambda: packed(v=torch.zeros(12, 5)), "v", "[tokens, heads, head_dim]"),
    ("k-head-dim", lambda: dense(k=torch.zeros(2, 7, 2, 16)), "k", "axis order"),
    ("packed-k-head-dim", lambda: packed(k=torch.zeros(12, 2, 4)), "k", "axis order"),
    ("k-head-count", lambda: dense(k=torch.zeros(2, 7, 3, 8), v=torch.zeros(2, 7, 3, 5)), "k", "axis order"),
    ("more-kv-heads-than-q-heads", lambda: dense(k=torch.zeros(2, 7, 8, 8), v=torch.zeros(2, 7, 8, 5)), "k", "axis"),
    ("heads-before-sequence", lambda: dense(k=torch.zeros(2, 2, 7, 8), v=torch.zeros(2, 2, 7, 5)), "k", "axis order"),
    ("v-one-key-short", lambda: dense(v=torch.zeros(2, 6, 2, 5)), "v", "exactly one value"),
    ("v-broadcast-length", lambda: dense(v=torch.zeros(2, 1, 2, 5)), "v", "exactly one value"),
    ("v-head-count", lambda: dense(v=torch.zeros(2, 7, 1, 5)), "v", "exactly one value"),
    ("v-batch", lambda: dense(v=torch.zeros(1, 7, 2, 5)), "v", "exactly one value"),
    ("packed-v-one-token-short", lambda: packed(v=torch.zeros(11, 2, 5)), "v", "exactly one value"),
    ("k-batch", lambda: dense(k=torch.zeros(1, 7, 2, 8), v=torch.zeros(1, 7, 2, 5)), "k", "expand"),
    ("kv-batch-zero", lambda: dense(k=torch.zeros(0, 7, 2, 8), v=torch.zeros(0, 7, 2, 5)), "k", "expand"),
    ("q-no-heads", lambda: dense(q=torch.zeros(2, 6, 0, 8)), "q", "only batch and sequence"),
    ("k-no-heads", lambda: dense(k=torch.zeros(2, 7, 0, 8), v=torch.zeros(2, 7, 0, 5)), "k", "only batch and sequence"),
    (
        "no-head-dim",
        lambda: dense(q=torch.zeros(2, 6, 4, 0), k=torch.zeros(2, 7, 2, 0)),
        "q",
        "only batch and sequence",
    ),
    ("v-no-head-dim", lambda: dense(v=torch.zeros(2, 7, 2, 0)), "v", "only batch and sequence"),
]

_QKV_DTYPES_AND_DEVICES: list[_Row] = [
    ("q-int", lambda: dense(q=q_like(torch.int64)), "q", "to(torch.bfloat16)"),
    ("q-uint8", lambda: dense(q=q_like(torch.uint8)), "q", "to(torch.bfloat16)"),
    ("q-bool", lambda: dense(q=q_like(torch.bool)), "q", "to(torch.bfloat16)"),
    ("q-complex", lambda: dense(q=q_like(torch.complex64)), "q", "to(torch.bfloat16)"),
    ("q-float8", lambda: dense(q=q_like(torch.float8_e4m3fn)), "q", "to(torch.bfloat16)"),
    ("v-float8", lambda: dense(v=torch.zeros(2, 7, 2, 5).to(torch.float8_e5m2)), "v", "to(torch.bfloat16)"),
    ("packed-q-int", lambda: packed(q=torch.ones(10, 4, 8, dtype=torch.int32)), "q", "to(torch.bfloat16)"),
    ("k-other-dtype", lambda: dense(k=torch.zeros(2, 7, 2, 8, dtype=torch.float16)), "k", "k.to(torch.float32)"),
    ("v-other-dtype", lambda: dense(v=torch.zeros(2, 7, 2, 5, dtype=torch.float64)), "v", "v.to(torch.float32)"),
    ("q-other-dtype", lambda: dense(q=q_like(torch.bfloat16)), "k", "k.to(torch.bfloat16)"),
    ("k-other-device", lambda: dense(k=torch.zeros(2, 7, 2, 8, device="meta")), "k", "k.to('cpu')"),
    ("v-other-device", lambda: dense(v=torch.zeros(2, 7, 2, 5, device="meta")), "v", "v.to('cpu')"),
    ("q-other-device", lambda: dense(q=q_like(torch.float32).to("meta")), "k", "k.to('meta')"),
]

_MASKS: list[_Row] = [
    ("causal-int", lambda: dense(causal=1), "causal", "bool"),
    ("causal-zero", lambda: dense(causal=0), "causal", "bool"),
    ("causal-string", lambda: dense(causal="False"), "causal", "bool"),
    ("causal-none", lambda: dense(causal=None), "causal", "bool"),
    ("causal-tensor", lambda: dense(causal=torch.tensor(True)), "causal", "bool"),
    ("window-negative-left", lambda: dense(window=(-1, 0)), "window", "None"),
    ("window-negative-right", lambda: packed(window=(0, -1)), "window", "None"),
    ("window-int", lambda: dense(window=4), "window", "(left, right)"),
    ("window-zero", lambda: dense(window=0), "window", "(left, right)"),
    ("window-one", lambda: dense(window=(4,)), "window", "(left, right)"),
    ("window-three", lambda: dense(window=(4, 4, 4)), "window", "(left, right)"),
    ("window-empty", lambda: dense(window=()), "window", "(left, right)"),
    ("window-string", lambda: dense(window="44"), "window", "(left, right)"),
    ("window-set", lambda: dense(window={3, 4}), "window", "(left, right)"),
    ("window-tensor", lambda: dense(window=torch.tensor([4, 4])), "window", "(left, right)"),
    ("window-numpy", lambda: dense(window=np.array([4, 4])), "window", "(left, right)"),
    ("window-bool", lambda: dense(window=(True, False)), "window", "None"),
    ("window-float", lambda: dense(window=(4.0, 0)), "window", "None"),
    ("window-nan", lambda: dense(window=(math.nan, 0)), "window", "None"),
    ("window-infinite", lambda: dense(window=(math.inf, 0)), "window", "None"),
    ("window-of-tensors", lambda: dense(window=(torch.tensor(3), None)), "window", "None"),
    ("window-beyond-64-bits", lambda: dense(window=(2**64, 0)), "window", "None"),
    ("window-of-a-million-digits", lambda: dense(window=(-(10**5000), 0)), "window", "None"),
    ("mask-float", lambda: dense(mask=torch.zeros(6, 7)), "mask", "bias="),
    ("mask-int", lambda: dense(mask=torch.ones(6, 7, dtype=torch.int64)), "mask", "mask.bool()"),
    ("mask-uint8", lambda: packed(mask=torch.ones(6, 7, dtype=torch.uint8)), "mask", "mask.bool()"),
    ("mask-numpy", lambda: dense(mask=np.ones((6, 7), dtype=bool)), "mask", "torch.as_tensor(mask)"),
    ("mask-true", lambda: dense(mask=True), "mask", "torch.as_tensor(mask)"),
    ("mask-key-padding", lambda: dense(mask=torch.ones(2, 7, dtype=torch.bool)), "mask", "[:, None, None, :]"),
    ("mask-length", lambda: dense(mask=torch.ones(6, 8, dtype=torch.bool)), "mask", "axes of size 1"),
    ("mask-kv-heads", lambda: dense(mask=torch.ones(2, 6, 7, dtype=torch.bool)), "mask", "axes of size 1"),
    ("mask-empty", lambda: dense(mask=torch.ones(0, dtype=torch.bool)), "mask", "axes of size 1"),
    ("mask-device", lambda: dense(mask=torch.ones(6, 7, dtype=torch.bool, device="meta")), "mask", "mask.to('cpu')"),
    ("mask-sparse", lambda: dense(mask=torch.ones(6, 7, dtype=torch.bool).to_sparse()), "mask", "to_dense"),
    ("mask-nested", lambda: dense(mask=nested(dtype=torch.bool)), "mask", "to_padded_tensor"),
]

_BIASES: list[_Row] = [
    ("bias-bool", lambda: dense(bias=torch.ones(6, 7, dtype=torch.bool)), "bias", "mask="),
    ("bias-int", lambda: dense(bias=torch.ones(6, 7, dtype=torch.int64)), "bias", "bias.to(q.dtype)"),
    ("bias-complex", lambda: dense(bias=torch.ones(6, 7, dtype=torch.complex64)), "bias", "bias.to(q.dtype)"),
    ("bias-float8", lambda: dense(bias=torch.ones(6, 7).to(torch.float8_e4m3fn)), "bias", "bias.to(q.dtype)"),
    ("bias-list", lambda: dense(bias=[[0.0] * 7] * 6), "bias", "torch.as_tensor(bias)"),
    ("bias-number", lambda: dense(bias=0.5), "bias", "torch.as_tensor(bias)"),
    ("bias-five-axes", lambda: dense(bias=torch.zeros(1, 1, 1, 6, 7)), "bias", "axes of size 1"),
    ("bias-transposed", lambda: dense(bias=torch.zeros(7, 6)), "bias", "axes of size 1"),
    ("bias-batch", lambda: dense(bias=torch.zeros(3, 1, 6, 7)), "bias", "axes of size 1"),
    ("bias-one-short", lambda: dense(bias=torch.zeros(6)), "bias", "axes of size 1"),
    ("bias-of-the-packed-batch", lambda: packed(bias=torch.zeros(TOKENS_Q, TOKENS_KV)), "bias", "axes of size 1"),
    ("bias-device", lambda: dense(bias=torch.zeros(6, 7, device="meta")), "bias", "bias.to('cpu')"),
    ("bias-sparse", lambda: dense(bias=torch.zeros(6, 7).to_sparse()), "bias", "to_dense"),
    ("bias-nested", lambda: dense(bias=nested()), "bias", "to_padded_tensor"),
    ("alibi-scalar", lambda: dense(alibi_slopes=torch.tensor(0.5)), "alibi_slopes", "one slope per query head"),
    ("alibi-kv-heads", lambda: dense(alibi_slopes=torch.ones(2)), "alibi_slopes", "one slope per query head"),
    ("alibi-transposed", lambda: dense(alibi_slopes=torch.ones(4, 2)), "alibi_slopes", "one slope per query head"),
    ("alibi-broadcast-batch", lambda: dense(alibi_slopes=torch.ones(1, 4)), "alibi_slopes", "one slope per query head"),
    ("alibi-int", lambda: dense(alibi_slopes=torch.ones(4, dtype=torch.int64)), "alibi_slopes", "one slope"),
    ("alibi-list", lambda: dense(alibi_slopes=[0.5] * 4), "alibi_slopes", "torch.as_tensor"),
    ("alibi-gradient", lambda: dense(alibi_slopes=torch.ones(4, requires_grad=True)), "alibi_slopes", "detach()"),
    ("alibi-device", lambda: packed(alibi_slopes=torch.ones(4, device="meta")), "alibi_slopes", ".to('cpu')"),
    ("alibi-nested", lambda: dense(alibi_slopes=nested()), "alibi_slopes", "to_padded_tensor"),
    ("sinks-kv-heads", lambda: dense(sinks=torch.zeros(2)), "sinks", "one sink logit per query head"),
    ("sinks-two-axes", lambda: dense(sinks=torch.zeros(2, 4)), "sinks", "one sink logit per query head"),
    ("sinks-broadcast", lambda: packed(sinks=torch.zeros(1)), "sinks", "one sink logit per query head"),
    ("sinks-int", lambda: dense(sinks=torch.zeros(4, dtype=torch.int32)), "sinks", "one sink logit per query head"),
    ("sinks-number", lambda: dense(sinks=0.0), "sinks", "torch.as_tensor(sinks)"),
    ("sinks-device", lambda: dense(sinks=torch.zeros(4, device="meta")), "sinks", "sinks.to('cpu')"),
    ("sinks-nested", lambda: dense(sinks=nested()), "sinks", "to_padded_tensor"),
]

_NUMBERS: list[_Row] = [
    ("scale-nan", lambda: dense(scale=math.nan), "scale", "float"),
    ("scale-infinite", lambda: dense(scale=math.inf), "scale", "float"),
    ("scale-minus-infinite", lambda: packed(scale=-math.inf), "scale", "float"),
    ("scale-beyond-float32", lambda: dense(scale=1e39), "scale", "float"),
    ("scale-huge-int", lambda: dense(scale=10**400), "scale", "float"),
    ("scale-of-a-million-digits", lambda: dense(scale=10**5000), "scale", "float"),
    ("scale-string", lambda: dense(scale="0.125"), "scale", "float"),
    ("scale-bool", lambda: dense(scale=True), "scale", "float"),
    ("scale-complex", lambda: dense(scale=1j), "scale", "float"),
    ("scale-fraction", lambda: dense(scale=fractions.Fraction(1, 8)), "scale", "float"),
    ("scale-tensor", lambda: dense(scale=torch.tensor(0.125)), "scale", "float"),
    ("softcap-negative", lambda: dense(softcap=-1.0), "softcap", "0.0"),
    ("softcap-nan", lambda: dense(softcap=math.nan), "softcap", "0.0"),
    ("softcap-infinite", lambda: dense(softcap=math.inf), "softcap", "0.0"),
    ("softcap-none", lambda: dense(softcap=None), "softcap", "0.0"),
    ("softcap-string", lambda: packed(softcap="50"), "softcap", "0.0"),
    ("softcap-bool", lambda: dense(softcap=False), "softcap", "0.0"),
    ("softcap-tensor", lambda: dense(softcap=torch.tensor(50.0)), "softcap", "0.0"),
    ("softcap-beyond-float32", lambda: dense(softcap=1e300), "softcap", "0.0"),
    ("softcap-zero-in-float32", lambda: dense(softcap=1e-46), "softcap", "0.0"),
    ("softcap-huge-int", lambda: dense(softcap=10**400), "softcap", "0.0"),
    ("dropout-negative", lambda: dense(dropout_p=-0.1), "dropout_p", "0.0"),
    ("dropout-one", lambda: dense(dropout_p=1.0), "dropout_p", "0.0"),
    ("dropout-percent", lambda: packed(dropout_p=10), "dropout_p", "0.0"),
    ("dropout-nan", lambda: dense(dropout_p=math.nan), "dropout_p", "0.0"),
    ("dropout-string", lambda: dense(dropout_p="0.1"), "dropout_p", "0.0"),
    ("dropout-none", lambda: dense(dropout_p=None), "dropout_p", "0.0"),
    ("dropout-bool", lambda: dense(dropout_p=False), "dropout_p", "0.0"),
    ("dropout-tensor", lambda: dense(dropout_p=torch.tensor(0.1)), "dropout_p", "0.0"),
    ("dropout-huge-int", lambda: dense(dropout_p=10**5000), "dropout_p", "0.0"),
    ("seed-float", lambda: dense(dropout_p=0.1, dropout_seed=1.5), "dropout_seed", "Python int"),
    ("seed-float-without-dropout", lambda: dense(dropout_seed=1.5), "dropout_seed", "Python int"),
    ("seed-bool", lambda: dense(dropout_p=0.1, dropout_seed=True), "dropout_seed", "Python int"),
    ("seed-string", lambda: dense(dropout_p=0.1, dropout_seed="7"), "dropout_seed", "Python int"),
    ("seed-too-large", lambda: dense(dropout_p=0.1, dropout_seed=2**63), "dropout_seed", "2**63"),
    ("seed-too-small", lambda: dense(dropout_p=0.1, dropout_seed=-(2**63) - 1), "dropout_seed", "2**63"),
    ("seed-generator", lambda: dense(dropout_p=0.1, dropout_seed=torch.Generator()), "dropout_seed", "None"),
    ("seed-int32", lambda: dense(dropout_seed=torch.tensor(1, dtype=torch.int32)), "dropout_seed", "0-d int64"),
    ("seed-float-tensor", lambda: dense(dropout_seed=torch.tensor(1.0)), "dropout_seed", "0-d int64"),
    ("seed-one-axis", lambda: packed(dropout_seed=torch.tensor([1])), "dropout_seed", "0-d int64"),
    ("seed-per-sequence", lambda: dense(dropout_seed=torch.tensor([1, 2])), "dropout_seed", "0-d int64"),
    ("seed-device", lambda: dense(dropout_seed=torch.tensor(1, device="meta")), "dropout_seed", "to('cpu')"),
    ("deterministic-int", lambda: dense(deterministic=1), "deterministic", "bool"),
    ("deterministic-none", lambda: packed(deterministic=None), "deterministic", "bool"),
    ("backend-unknown", lambda: dense(backend="cutlass"), "backend", "auto"),
    ("backend-upper-case", lambda: dense(backend="CPU"), "backend", "auto"),
    ("backend-empty", lambda: dense(backend=""), "backend", "auto"),
    ("backend-none", lambda: dense(backend=None), "backend", "auto"),
    ("backend-list", lambda: packed(backend=["cpu"]), "backend", "auto"),
    ("backend-device", lambda: dense(backend=torch.device("cpu")), "backend", "auto"),
]

_PACKED: list[_Row] = [
    ("cu-none", lambda: packed(cu_seqlens_q=None), "cu_seqlens_q", "torch.as_tensor"),
    ("cu-list", lambda: packed(cu_seqlens_kv=[0, 7, 12]), "cu_seqlens_kv", "torch.as_tensor"),
    ("cu-numpy", lambda: packed(cu_seqlens_q=np.array([0, 4, 10], dtype=np.int32)), "cu_seqlens_q", "torch.as_tensor"),
    ("cu-int64", lambda: packed(cu_seqlens_q=torch.tensor([0, 4, 10])), "cu_seqlens_q", "int32"),
    ("cu-float", lambda: packed(cu_seqlens_q=torch.tensor([0.0, 4.0, 10.0])), "cu_seqlens_q", "int32"),
    ("cu-bool", lambda: packed(cu_seqlens_q=torch.tensor([False, True, True])), "cu_seqlens_q", "int32"),
    ("cu-two-axes", lambda: packed(cu_seqlens_q=boundaries(0, 4, 10)[None]), "cu_seqlens_q", "int32"),
    ("cu-scalar", lambda: packed(cu_seqlens_q=boundaries(10)[0]), "cu_seqlens_q", "int32"),
    ("cu-empty", lambda: packed(cu_seqlens_q=boundaries()), "cu_seqlens_q", "int32"),
    ("cu-device", lambda: packed(cu_seqlens_q=boundaries(0, 4, 10).to("meta")), "cu_seqlens_q", "to('cpu')"),
    ("cu-sparse", lambda: packed(cu_seqlens_q=boundaries(0, 4, 10).to_sparse()), "cu_seqlens_q", "to_dense"),
    ("cu-nested", lambda: packed(cu_seqlens_q=nested(dtype=torch.int32)), "cu_seqlens_q", "to_padded_tensor"),
    ("cu-counts-differ", lambda: packed(cu_seqlens_kv=boundaries(0, 3, 7, 12)), "cu_seqlens_kv", "either may be empty"),
    ("cu-starts-late", lambda: packed(cu_seqlens_q=boundaries(1, 4, 10)), "cu_seqlens_q", "pad"),
    ("cu-starts-negative", lambda: packed(cu_seqlens_kv=boundaries(-1, 5, 12)), "cu_seqlens_kv", "pad"),
    ("cu-lengths", lambda: packed(cu_seqlens_q=boundaries(4, 6, 0)), "cu_seqlens_q", "pad"),
    ("cu-decreasing", lambda: packed(cu_seqlens_q=boundaries(0, 6, 4)), "cu_seqlens_q", "cumulative"),
    ("cu-decreasing-kv", lambda: packed(cu_seqlens_kv=boundaries(0, 7, 6)), "cu_seqlens_kv", "cumulative"),
    ("cu-wraps-around", lambda: packed(cu_seqlens_q=boundaries(0, 2**31 - 1, -(2**31))), "cu_seqlens_q", "cumulative"),
    ("cu-beyond-q", lambda: packed(cu_seqlens_q=boundaries(0, 5, 11)), "cu_seqlens_q", "belong together"),
    ("cu-beyond-kv", lambda: packed(cu_seqlens_kv=boundaries(0, 7, 13)), "cu_seqlens_kv", "belong together"),
    ("cu-far-beyond", lambda: packed(cu_seqlens_q=boundaries(0, 4, 2**31 - 1)), "cu_seqlens_q", "belong together"),
    ("max-none", lambda: packed(max_seqlen_q=None), "max_seqlen_q", "Python int"),
    ("max-tensor", lambda: packed(max_seqlen_q=torch.tensor(6)), "max_seqlen_q", "Python int"),
    ("max-numpy", lambda: packed(max_seqlen_kv=np.int64(7)), "max_seqlen_kv", "Python int"),
    ("max-float", lambda: packed(max_seqlen_q=6.0), "max_seqlen_q", "Python int"),
    ("max-string", lambda: packed(max_seqlen_q="6"), "max_seqlen_q", "Python int"),
    ("max-bool", lambda: packed(max_seqlen_q=True), "max_seqlen_q", "Python int"),
    ("max-negative", lambda: packed(max_seqlen_kv=-1), "max_seqlen_kv", "Python int"),
    ("max-beyond-64-bits", lambda: packed(max_seqlen_q=2**64), "max_seqlen_q", "Python int"),
    ("max-too-small", lambda: packed(max_seqlen_q=5), "max_seqlen_q", "larger number is fine"),
    ("max-too-small-kv", lambda: packed(max_seqlen_kv=6), "max_seqlen_kv", "larger number is fine"),
    ("max-zero", lambda: packed(max_seqlen_q=0), "max_seqlen_q", "larger number is fine"),
]

WRONG_CALLS = [
    WrongCall(id=name, make=make, argument=argument, in_remedy=in_remedy)
    for rows in (_QKV_KINDS, _QKV_SHAPES, _QKV_DTYPES_AND_DEVICES, _MASKS, _BIASES, _NUMBERS, _PACKED)
    for name, make, argument, in_remedy in rows
]
