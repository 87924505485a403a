"""Calls of the public functions, one for each option and with all of them, that the tests in this folder compile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import flashtile

DIFFERENTIABLE_OPTIONS = ("bias", "sinks")


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A public function, the tensors that it is differentiated by, and its other arguments."""

    function: Callable[..., Any]
    tensors: dict[str, Tensor]
    """q, k, v, and those of the options that have a gradient; leaves that require none yet."""
    options: dict[str, Any] = field(default_factory=dict)

    def leaves(self) -> dict[str, Tensor]:
        """Fresh copies of the tensors, each requiring a gradient."""
        return {name: tensor.detach().clone().requires_grad_() for name, tensor in self.tensors.items()}

    def call(self, tensors: dict[str, Tensor], options: dict[str, Any]) -> tuple[Tensor, ...]:
        """The outputs, one or two of them."""
        outputs = self.function(**tensors, **options)
        return outputs if isinstance(outputs, tuple) else (outputs,)

    def run(self, call: Callable[..., tuple[Tensor, ...]] | None = None) -> dict[str, Tensor]:
        """Outputs and gradients under their names; ``call`` is ``self.call`` or a compiled twin of it."""
        leaves = self.leaves()
        outputs = (call or self.call)(leaves, self.options)
        weighted_sum(outputs).backward()
        gradients = {
            f"d_{name}": torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()
        }
        return dict(zip(("out", "lse"), (output.detach() for output in outputs), strict=False)) | gradients


def weighted_sum(outputs: tuple[Tensor, ...]) -> Tensor:
    """A number whose gradient differs from element to element; rows without keys have an lse of -inf and no weight."""
    generator = torch.Generator().manual_seed(11)
    total = torch.zeros((), dtype=torch.float64)
    for output in outputs:
        weights = torch.rand(output.shape, generator=generator, dtype=torch.float64)
        total = total + (output.double().nan_to_num(neginf=0.0) * weights).sum()
    return total


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, msg=lambda text, name=name: f"{name}: {text}")


def dense_case(
    function: Callable[..., Any] = flashtile.attention_with_lse,
    *,
    seqlen_q: int = 6,
    seqlen_kv: int = 7,
    heads_kv: int = 2,
    head_dim_v: int = 5,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Case:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    qkv = {
        "q": draw(2, seqlen_q, 4, 8),
        "k": draw(2, seqlen_kv, heads_kv, 8),
        "v": draw(2, seqlen_kv, heads_kv, head_dim_v),
    }
    return _case(function, qkv, options)


def packed_case(
    function: Callable[..., Any] = flashtile.attention_varlen_with_lse,
    *,
    lengths_q: tuple[int, ...] = (4, 0, 6),
    lengths_kv: tuple[int, ...] = (5, 3, 7),
    spare_tokens: int = 2,
    **options: Any,
) -> Case:
    """Packed sequences, with ``spare_tokens`` rows after the last that belong to none."""
    generator = torch.Generator().manual_seed(6)
    tokens_q, tokens_kv = sum(lengths_q) + spare_tokens, sum(lengths_kv) + spare_tokens

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    qkv = {"q": draw(tokens_q, 4, 8), "k": draw(tokens_kv, 2, 8), "v": draw(tokens_kv, 2, 5)}
    packing = {
        "cu_seqlens_q": boundaries(lengths_q),
        "cu_seqlens_kv": boundaries(lengths_kv),
        "max_seqlen_q": max(lengths_q),
        "max_seqlen_kv": max(lengths_kv),
    }
    return _case(function, qkv, packing | options)


def boundaries(lengths: tuple[int, ...]) -> Tensor:
    return torch.nn.functional.pad(torch.tensor(lengths).cumsum(0, dtype=torch.int32), (1, 0))


def merge_case() -> Case:
    """Two parts, one of whose rows has seen nothing."""
    out_a, out_b = torch.randn(2, 2, 6, 4, 5, generator=torch.Generator().manual_seed(7)).unbind()
    lse_a, lse_b = torch.randn(2, 2, 4, 6, generator=torch.Generator().manual_seed(8)).unbind()
    return Case(
        function=flashtile.merge_attention, tensors={"out_a": out_a, "lse_a": lse_a, "out_b": out_b, "lse_b": lse_b}
    )


def _case(function: Callable[..., Any], tensors: dict[str, Tensor], options: dict[str, Any]) -> Case:
    differentiable = {name: options.pop(name) for name in DIFFERENTIABLE_OPTIONS if name in options}
    return Case(function=function, tensors=tensors | differentiable, options=options)


def _option_tensors() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(9)
    return {
        "bias": torch.randn(4, 1, 7, generator=generator),
        "mask": torch.rand(2, 1, 6, 7, generator=generator) > 0.2,
        "alibi_slopes": torch.rand(4, generator=generator),
        "sinks": torch.randn(4, generator=generator),
    }


def everything() -> dict[str, Any]:
    """Every option at once; the tensors fit ``dense_case`` and, but for the mask's batch, ``packed_case``."""
    return {
        **_option_tensors(),
        "causal": True,
        "window": (4, None),
        "scale": 0.3,
        "softcap": 5.0,
        "dropout_p": 0.3,
        "dropout_seed": 7,
        "deterministic": True,
    }


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (2, 1)},
    "window open to the left": {"window": (None, 1)},
    "scale": {"scale": 0.3},
    "softcap": {"softcap": 2.0},
    **{name: {name: tensor} for name, tensor in _option_tensors().items()},
    "slopes per sequence": {"alibi_slopes": torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]])},
    "dropout": {"dropout_p": 0.4, "dropout_seed": 3},
    "dropout seeded by a tensor": {"dropout_p": 0.4, "dropout_seed": torch.tensor(-3)},
    "deterministic": {"deterministic": True},
    "naive": {"backend": "naive", "causal": True},
    "everything": everything(),
    "everything, naive": everything() | {"backend": "naive"},
}


def _cases() -> dict[str, Case]:
    packed_everything = everything() | {"mask": everything()["mask"][:1]}
    return {
        **{f"dense, {name}": dense_case(**options) for name, options in OPTIONS.items()},
        "dense, without lse": dense_case(flashtile.attention, causal=True),
        "dense, all a fused kernel takes": dense_case(
            flashtile.attention, seqlen_q=7, heads_kv=4, head_dim_v=8, causal=True
        ),
        "dense, no key at all": dense_case(seqlen_kv=0),
        "packed, plain": packed_case(),
        "packed, without lse": packed_case(flashtile.attention_varlen, causal=True),
        "packed, everything": packed_case(**packed_everything),
        "packed, naive": packed_case(backend="naive", causal=True),
        "merge": merge_case(),
    }


CASES = _cases()
