"""What the tests of ``flashtile.nn``'s attention modules share: masks, options, a module written down a second time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flashtile.nn import MultiheadAttention, Rotary
from flashtile.testing import oracle

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
BATCH, SEQLEN, D_MODEL, N_HEAD = 4, 9, 32, 4

MASKS: dict[str, list[str]] = {
    "right": ["xxxxxxxxx", "xxxxx....", "x........", "xxxxxxxx."],
    "left": ["xxxxxxxxx", "....xxxxx", "........x", ".xxxxxxxx"],
    "none": ["xxxxxxxxx"] * 4,
    "holes": ["xx..xxx.x", ".x.x.x.x.", "x.......x", "xxxx.xxxx"],
    "empty rows": [".........", "xxxx.....", ".........", "..xxx...."],
    "nothing": ["........."] * 4,
}
"""A row per sequence, an x per token."""

OPTIONS: list[dict[str, Any]] = [
    {},
    {"causal": True, "n_head_kv": 2},
    {"window": (2, 1), "n_head_kv": 1},
    {"causal": True, "window": (3, None), "scale": 0.2},
    {"rotary": Rotary(), "causal": True},
    {"rotary": Rotary(dim=4, base=50.0, interleaved=True), "window": (1, None), "n_head_kv": 2},
    {"softcap": 0.5, "qkv_bias": False},
    {"head_dim": 6, "out_bias": False, "n_head_kv": 2},
]
"""Of MultiheadAttention."""


def mask_of(rows: list[str], device: str = "cpu") -> Tensor:
    return torch.tensor([[token == "x" for token in row] for row in rows], device=device)


def inputs_of(mask: Tensor, width: int = D_MODEL, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """[batch, seqlen, width] on the mask's device, NaN where there is no token; requires a gradient."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*mask.shape, width, generator=generator, dtype=torch.float64).to(mask.device, dtype)
    return x.masked_fill(~mask[..., None], torch.nan).requires_grad_()


def multihead_of(options: dict[str, Any], *, device: str = "cpu", dtype: torch.dtype = torch.float64) -> Any:
    torch.manual_seed(1)
    return MultiheadAttention(D_MODEL, N_HEAD, **options).to(device, dtype)


def one_by_one(
    module: MultiheadAttention, mask: Tensor, x: Tensor, mask_kv: Tensor | None = None, *sources: Tensor
) -> Tensor:
    """The module's output from the formula, each sequence alone without its padding, zeros elsewhere."""
    out = torch.zeros(x.shape, dtype=x.dtype, device=x.device)
    mask_kv = mask if mask_kv is None else mask_kv
    for idx, (is_token, is_key) in enumerate(zip(mask, mask_kv, strict=True)):
        key, value = (source[idx, is_key] for source in (sources or (x, x)))
        out = out.index_put(
            (torch.tensor(idx), is_token.nonzero()[:, 0]), formula(module, x[idx, is_token], key, value)
        )
    return out


def formula(module: MultiheadAttention, x: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """x [seqlen, d_model], key and value [seqlen_kv, ...] -> like x: projections, rotation, oracle, projection."""
    q, k, v = (
        projection(source).unflatten(-1, (projection.out_features // module.head_dim, module.head_dim))[None]
        for projection, source in ((module.q_proj, x), (module.k_proj, key), (module.v_proj, value))
    )
    if module.rotary is not None:
        q, k = (rotated(heads, module.rotary) for heads in (q, k))
    names = ("causal", "window", "scale", "softcap")
    out, _ = oracle(q, k, v, **{name: getattr(module, name) for name in names})
    return module.out_proj(out[0].flatten(1))


def rotated(x: Tensor, rotary: Rotary) -> Tensor:
    """x [1, seqlen, heads, head_dim]: each pair of coordinates as a complex number, times exp(i * position * speed)."""
    dim = rotary.dim or x.shape[-1]
    pairs = torch.arange(dim, device=x.device)
    pairs = pairs.reshape(-1, 2).T if rotary.interleaved else pairs.reshape(2, -1)  # [real and imaginary, dim / 2]
    speeds = rotary.base ** (-torch.arange(0, dim, 2, dtype=torch.float64, device=x.device) / dim)
    angles = torch.arange(x.shape[1], device=x.device)[:, None, None] * speeds  # [seqlen, 1, dim / 2]
    turned = torch.complex(x[..., pairs[0]], x[..., pairs[1]]) * torch.exp(1j * angles)
    return x.index_copy(-1, pairs.flatten(), torch.cat([turned.real, turned.imag], dim=-1))


def with_gradients(module: nn.Module, function: Callable[[], Tensor], *inputs: Tensor) -> dict[str, Tensor]:
    """What ``function`` returns, and the gradients of a fixed weighted sum of it by what they belong to."""
    out = function()
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    leaves = {f"input {idx}": x for idx, x in enumerate(inputs)} | dict(module.named_parameters())
    found = torch.autograd.grad(out, list(leaves.values()), weights.to(out.device, out.dtype), materialize_grads=True)
    return {"out": out.detach(), **dict(zip(leaves, found, strict=True))}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    for name in expected:
        torch.testing.assert_close(
            found[name], expected[name], rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )
