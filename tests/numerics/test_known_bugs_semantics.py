"""Bugs that other attention kernels shipped with, and that a test here keeps out: what an option means.

Docstrings cite the report where it has a number: FA flash-attention, PT PyTorch, XF xformers, HF transformers,
TR Triton.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from runners import BACKENDS, Backend, finest_dtype
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from flashtile.testing import Call, CallSpec, make_tensor


def visible_keys(backend: Backend, *, seqlen_q: int, seqlen_kv: int, **options: Any) -> list[list[int]]:
    """Which keys each query gives weight to: with one-hot values, out is the weights."""
    q = torch.zeros(1, seqlen_q, 1, 4)
    k = torch.zeros(1, seqlen_kv, 1, 4)
    v = torch.eye(seqlen_kv)[None, :, None, :]
    weights = backend.forward(Call(q=q, k=k, v=v, options=options))[0, :, 0]
    return [row.nonzero().flatten().tolist() for row in weights]


@pytest.mark.parametrize("backend", BACKENDS)
def test_causal_is_aligned_at_the_bottom_right(backend: Backend) -> None:
    """FA#1778: with seqlen_q != seqlen_kv the last query sees the last key."""
    assert visible_keys(backend, seqlen_q=2, seqlen_kv=5, causal=True) == [[0, 1, 2, 3], [0, 1, 2, 3, 4]]
    assert visible_keys(backend, seqlen_q=5, seqlen_kv=2, causal=True) == [[], [], [], [0], [0, 1]]


@pytest.mark.parametrize(("seqlen_q", "seqlen_kv"), [(6, 6), (3, 8), (8, 3)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_torchs_causal_is_aligned_at_the_top_left(backend: Backend, seqlen_q: int, seqlen_kv: int) -> None:
    """PT#108108: ``is_causal`` of torch shows key j to query i for j <= i: as a mask it is ours."""
    q, k, v = (
        make_tensor((1, length, 2, 8), seed=seed) for seed, length in enumerate((seqlen_q, seqlen_kv, seqlen_kv))
    )
    top_left = torch.ones(seqlen_q, seqlen_kv, dtype=torch.bool).tril()
    ours = backend.forward(Call(q=q, k=k, v=v, options={"mask": top_left}))
    by_heads = [x.transpose(1, 2) for x in (q, k, v)]
    torchs = scaled_dot_product_attention(by_heads[0], by_heads[1], by_heads[2], is_causal=True).transpose(1, 2)
    torch.testing.assert_close(ours, torchs)
    bottom_right = backend.forward(Call(q=q, k=k, v=v, options={"causal": True}))
    assert torch.allclose(bottom_right, torchs, atol=1e-5) == (seqlen_q == seqlen_kv)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_window_includes_both_ends(backend: Backend) -> None:
    """HF#39408: window (left, 0) shows left + 1 keys, not left."""
    assert visible_keys(backend, seqlen_q=5, seqlen_kv=5, window=(2, 0)) == [
        [0],
        [0, 1],
        [0, 1, 2],
        [1, 2, 3],
        [2, 3, 4],
    ]
    assert visible_keys(backend, seqlen_q=3, seqlen_kv=5, window=(1, 1)) == [[1, 2, 3], [2, 3, 4], [3, 4]]
    assert visible_keys(backend, seqlen_q=3, seqlen_kv=3, window=(0, 0)) == [[0], [1], [2]]
    assert visible_keys(backend, seqlen_q=2, seqlen_kv=4, window=(None, 1)) == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert visible_keys(backend, seqlen_q=2, seqlen_kv=4, window=(1, None)) == [[1, 2, 3], [2, 3]]
    assert visible_keys(backend, seqlen_q=2, seqlen_kv=4, window=(1, 9), causal=True) == [[1, 2], [2, 3]]


OPTIONS: dict[str, dict[str, Any]] = {
    "causal": {"causal": True},
    "window": {"window": (3, 2)},
    "scale": {"scale": 1.0},
    "softcap": {"softcap": 0.5},
    "bias": {"bias_axes": "hqk"},
    "mask": {"mask_axes": "bhqk"},
    "alibi": {"alibi": "per head"},
    "sinks": {"has_sinks": True},
    "dropout": {"dropout_p": 0.3},
}
SPEC = CallSpec(lengths_q=(12,), lengths_kv=(17,), heads_kv=2, heads_per_kv=2, head_dim=16, head_dim_v=16)


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_no_option_is_dropped_silently(backend: Backend, option: str, is_packed: bool) -> None:
    """Every option changes out, alone and on top of all the others."""
    plain = replace(SPEC, is_packed=is_packed)
    together: dict[str, Any] = {key: value for options in OPTIONS.values() for key, value in options.items()}
    others = {key: value for key, value in together.items() if key not in OPTIONS[option]}
    if option == "causal":
        others["window"] = (3, None)  # the window's right end would hide nothing more than causal does
    for base in ({}, others):
        without = backend.forward(replace(plain, **base).build())
        with_option = backend.forward(replace(plain, **base, **OPTIONS[option]).build())
        assert not torch.allclose(with_option, without, atol=1e-3), f"{option} changed nothing beside {sorted(base)}"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", [{"alibi": "per head"}, {"causal": True}, {"window": (5, 0)}, {"has_sinks": True}])
def test_decoding_step_equals_the_last_row(backend: Backend, options: dict[str, Any]) -> None:
    """FA#907: ALiBi (and masks) of one query over a cache of keys equal those of the last row in training."""
    spec = replace(SPEC, lengths_q=(17,), dtype=finest_dtype(backend), **options)
    call = spec.build()
    whole, whole_lse = backend.forward_with_lse(call)
    step, step_lse = backend.forward_with_lse(replace(call, q=call.q[:, -1:]))
    torch.testing.assert_close(step, whole[:, -1:])
    torch.testing.assert_close(step_lse, whole_lse[:, :, -1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_alibi_is_the_distance_to_the_diagonal(backend: Backend) -> None:
    """The bias that ALiBi stands for, written out: -slope * |i + seqlen_kv - seqlen_q - j|."""
    call = replace(SPEC, dtype=finest_dtype(backend)).build()
    slopes = torch.tensor([0.5, 0.25, 1.0, 0.0])
    i, j = torch.arange(12)[:, None], torch.arange(17)
    bias = -slopes[:, None, None].to(call.q.dtype) * (i + 5 - j).abs()
    by_slopes, by_bias = (
        backend.forward(replace(call, options=options)) for options in ({"alibi_slopes": slopes}, {"bias": bias})
    )
    torch.testing.assert_close(by_slopes, by_bias)


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_equals_dense(backend: Backend) -> None:
    """A packed call of equal lengths is the dense call, with every option that both take."""
    options: dict[str, Any] = {key: value for each in OPTIONS.values() for key, value in each.items()}
    spec = replace(SPEC, lengths_q=(12, 12), lengths_kv=(17, 17), dtype=finest_dtype(backend), **options)

    def packed_rows(lse: Tensor) -> Tensor:
        return lse.transpose(0, 1).flatten(1)

    dense_out, dense_lse = backend.forward_with_lse(spec.build())
    packed = replace(spec, is_packed=True).build()
    out, lse = backend.forward_with_lse(packed)
    torch.testing.assert_close(out, dense_out.flatten(0, 1))
    torch.testing.assert_close(lse, packed_rows(dense_lse))
