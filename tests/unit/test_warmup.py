"""``flashtile.warmup`` runs a call once, backward included, and leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flashtile
from flashtile import InvalidArgument

BOUNDARIES = torch.tensor([0, 3, 8], dtype=torch.int32)
PACKED: dict[str, Any] = {
    "cu_seqlens_q": BOUNDARIES,
    "cu_seqlens_kv": BOUNDARIES,
    "max_seqlen_q": 5,
    "max_seqlen_kv": 5,
}


def tensors(*shape: int, requires_grad: bool = True) -> list[Tensor]:
    return [torch.randn(shape, requires_grad=requires_grad) for _ in range(3)]


@pytest.mark.parametrize("with_lse", [False, True])
@pytest.mark.parametrize("is_packed", [False, True])
def test_no_gradient_and_no_random_number_is_left(is_packed: bool, with_lse: bool) -> None:
    q, k, v = tensors(8, 2, 4) if is_packed else tensors(2, 8, 2, 4)
    bias = torch.zeros(1, 2, 1, 5 if is_packed else 8, requires_grad=True)
    state = torch.get_rng_state()
    flashtile.warmup(q, k, v, bias=bias, dropout_p=0.5, with_lse=with_lse, **(PACKED if is_packed else {}))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(tensor.grad is None for tensor in (q, k, v, bias))


def test_inference_has_no_backward() -> None:
    with torch.no_grad():
        flashtile.warmup(*tensors(1, 8, 2, 4, requires_grad=False), causal=True)


def test_a_wrong_call_raises_what_the_call_would() -> None:
    q, k, v = tensors(1, 8, 2, 4)
    with pytest.raises(InvalidArgument, match="softcap"):
        flashtile.warmup(q, k, v, softcap=-1.0)
    with pytest.raises(InvalidArgument, match="q"):
        flashtile.warmup("q", k, v)  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="causl"):
        flashtile.warmup(q, k, v, causl=True)


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{}, {"causal": True, "softcap": 20.0}], ids=str)
def test_calls_of_other_lengths_compile_nothing_more(options: dict[str, Any]) -> None:
    from flashtile.backends.triton import backward, forward

    kernels = (
        forward.attention_forward,
        backward.attention_row_statistics,
        backward.attention_backward_kv,
        backward.attention_backward_q,
    )

    def compiled() -> list[int]:
        return [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]

    def draw(batch: int, seqlen: int) -> list[Tensor]:
        return [torch.randn(batch, seqlen, 4, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3)]

    flashtile.warmup(*(tensor.requires_grad_() for tensor in draw(1, 128)), backend="triton", **options)
    before = compiled()
    for batch, seqlen in ((3, 77), (1, 2), (2, 1000)):  # not one query, which causality hides nothing from
        leaves = [tensor.requires_grad_() for tensor in draw(batch, seqlen)]
        out = flashtile.attention(*leaves, backend="triton", **options)
        out.backward(torch.ones_like(out))
    assert compiled() == before
