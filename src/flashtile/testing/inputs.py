"""Makes inputs for attention tests: tensors with odd strides, packed batches, and random mixes of every option.

A ``CallSpec`` is a whole call as plain numbers and words. It prints as the expression that makes it again, so a failing
random case is reproduced by pasting one line. Memory that a kernel must not read is NaN in every tensor made here.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from random import Random
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from flashtile.testing.oracle import Call

Strides = Literal["contiguous", "heads_first", "sliced", "shared_heads", "every_other"]

STRIDES: tuple[Strides, ...] = get_args(Strides)
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
LENGTHS = (0, 1, 2, 5, 7, 8, 9, 15, 16, 17, 23, 31, 32, 33, 40)
"""Sequence lengths that cross tiles of 8 and 16 in every way."""


def make_tensor(
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
    seed: int = 0,
    spread: float = 1.0,
    strides: Strides = "contiguous",
    unused_rows: int = 0,
) -> Tensor:
    """Normal random numbers in a tensor of the given shape and memory layout.

    Args:
        shape: [..., tokens, heads, dim], at least three axes unless the strides are "contiguous".
        dtype: the numbers are drawn in float64 and rounded, so the same seed gives the same numbers in every dtype.
        device: where the tensor lives, by default on torch's default device; the numbers do not depend on it.
        seed: of the numbers.
        spread: their standard deviation.
        strides: "contiguous"; "heads_first", in memory [..., heads, tokens, dim]; "sliced", a part of longer rows, as
            views into a fused qkv projection are; "shared_heads", every head the same memory (stride 0);
            "every_other", the last axis with stride 2. What lies between the numbers is NaN.
        unused_rows: this many entries at the end of the first axis are NaN.

    Example:
        >>> from flashtile.testing import make_tensor
        >>> make_tensor((1, 5, 2, 4), strides="shared_heads").stride()
        (20, 4, 0, 1)
    """
    shape = tuple(shape)
    num_heads = 1 if strides == "shared_heads" else shape[-2]
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn_shape = (*shape[:-2], num_heads, shape[-1])
    numbers = torch.randn(drawn_shape, generator=generator, dtype=torch.float64, device="cpu") * spread
    if unused_rows:
        numbers[-unused_rows:] = math.nan
    numbers = numbers.to(device=device or torch.get_default_device(), dtype=dtype)
    if strides == "contiguous":
        return numbers
    if strides == "heads_first":
        return numbers.transpose(-2, -3).contiguous().transpose(-2, -3)
    if strides == "shared_heads":
        return numbers.expand(shape)
    surroundings = numbers.new_full((*shape[:-1], 3 * shape[-1]), math.nan)
    inner = slice(shape[-1], 2 * shape[-1]) if strides == "sliced" else slice(0, 2 * shape[-1], 2)
    return surroundings[..., inner].copy_(numbers)


def cu_seqlens_of(lengths: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """The [batch + 1] int32 boundaries of packed sequences.

    Example:
        >>> from flashtile.testing import cu_seqlens_of
        >>> cu_seqlens_of([3, 0, 4]).tolist()
        [0, 3, 3, 7]
    """
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


@dataclass(frozen=True, slots=True, kw_only=True)
class CallSpec:
    """An attention call as plain numbers and words; ``build`` makes its tensors, the same ones every time.

    ``bias_axes`` and ``mask_axes`` are those letters of "bhqk" (batch, head, query, key) whose axis has its full size;
    the others have size 1, or are left out if they lead: "bk" stands for [batch, 1, 1, seqlen_kv], "qk" for
    [seqlen_q, seqlen_kv], "" for a 0-d tensor, None for no tensor.

    Example:
        >>> from flashtile.testing import CallSpec
        >>> call = CallSpec(lengths_q=(3, 5), lengths_kv=(3, 9), is_packed=True, causal=True, bias_axes="k").build()
        >>> call.q.shape, call.options["cu_seqlens_kv"].tolist(), call.options["bias"].shape
        (torch.Size([8, 1, 8]), [0, 3, 12], torch.Size([9]))
    """

    lengths_q: tuple[int, ...]
    """One length per sequence; all equal unless ``is_packed``."""
    lengths_kv: tuple[int, ...]
    is_packed: bool = False
    unused_rows: int = 0
    """Rows of the packed buffers after the last sequence."""
    unused_length: int = 0
    """How much ``max_seqlen_q`` and ``max_seqlen_kv`` exceed the longest sequence."""
    heads_kv: int = 1
    heads_per_kv: int = 1
    head_dim: int = 8
    head_dim_v: int = 8
    dtype: torch.dtype = torch.float32
    strides_q: Strides = "contiguous"
    strides_k: Strides = "contiguous"
    strides_v: Strides = "contiguous"
    strides_d_out: Strides = "contiguous"
    spread: float = 1.0
    """Standard deviation of q; a large one gives one key all the weight."""
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    scale: float | None = None
    softcap: float = 0.0
    bias_axes: str | None = None
    bias_dtype: torch.dtype = torch.float32
    bias_hides: float = 0.0
    """Share of the bias that is -inf."""
    mask_axes: str | None = None
    mask_shows: float = 0.7
    """Share of the mask that is True."""
    alibi: Literal["per head", "per sequence"] | None = None
    has_sinks: bool = False
    dropout_p: float = 0.0
    seed: int = 0

    @property
    def heads_q(self) -> int:
        return self.heads_kv * self.heads_per_kv

    def build(self, device: torch.device | str | None = None) -> Call:
        """The call's tensors and options, by default on torch's default device."""
        device = device or torch.get_default_device()
        shapes: tuple[tuple[str, tuple[int, ...], int, int, Strides], ...] = (
            ("q", self.lengths_q, self.heads_q, self.head_dim, self.strides_q),
            ("k", self.lengths_kv, self.heads_kv, self.head_dim, self.strides_k),
            ("v", self.lengths_kv, self.heads_kv, self.head_dim_v, self.strides_v),
        )
        tensors = {
            name: make_tensor(
                (*self._rows(lengths), heads, dim),
                dtype=self.dtype,
                device=device,
                seed=self.seed + place,
                spread=self.spread if name == "q" else 1.0,
                strides=strides,
                unused_rows=self.unused_rows,
            )
            for place, (name, lengths, heads, dim, strides) in enumerate(shapes)
        }
        return Call(**tensors, options=self._options(device))

    def build_upstream(self, device: torch.device | str | None = None) -> tuple[Tensor, Tensor]:
        """Gradients of out and of the lse for the call, NaN in the unused rows."""
        device = device or torch.get_default_device()
        rows = self._rows(self.lengths_q)
        d_out = make_tensor(
            (*rows, self.heads_q, self.head_dim_v),
            dtype=self.dtype,
            device=device,
            seed=self.seed + 3,
            strides=self.strides_d_out,
            unused_rows=self.unused_rows,
        )
        lse_dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        d_lse = make_tensor(
            (*rows, self.heads_q), dtype=lse_dtype, device=device, seed=self.seed + 4, unused_rows=self.unused_rows
        )
        return d_out, d_lse.transpose(-1, -2)

    def _rows(self, lengths: tuple[int, ...]) -> tuple[int, ...]:
        """The axes before the heads."""
        if self.is_packed:
            return (sum(lengths) + self.unused_rows,)
        return (len(lengths), lengths[0] if lengths else 0)

    def _longest(self, lengths: tuple[int, ...]) -> int:
        return max(lengths, default=0) + self.unused_length

    def _options(self, device: torch.device | str) -> dict[str, Any]:
        options: dict[str, Any] = {
            "causal": self.causal,
            "window": self.window,
            "scale": self.scale,
            "softcap": self.softcap,
            "dropout_p": self.dropout_p,
        }
        if self.dropout_p > 0:
            options["dropout_seed"] = self.seed
        if self.is_packed:
            options |= {
                "cu_seqlens_q": cu_seqlens_of(self.lengths_q, device),
                "cu_seqlens_kv": cu_seqlens_of(self.lengths_kv, device),
                "max_seqlen_q": self._longest(self.lengths_q),
                "max_seqlen_kv": self._longest(self.lengths_kv),
            }
        if self.bias_axes is not None:
            options["bias"] = self._bias(self.bias_axes).to(device=device, dtype=self.bias_dtype)
        if self.mask_axes is not None:
            options["mask"] = (self._uniform(self._broadcast_shape(self.mask_axes), 6) < self.mask_shows).to(device)
        if self.alibi is not None:
            slopes_shape = (self.heads_q,) if self.alibi == "per head" else (len(self.lengths_q), self.heads_q)
            options["alibi_slopes"] = self._uniform(slopes_shape, 7).float().to(device)
        if self.has_sinks:
            options["sinks"] = (4 * self._uniform((self.heads_q,), 8) - 2).to(device=device, dtype=self.dtype)
        return options

    def _bias(self, axes: str) -> Tensor:
        bias = 2 * self._uniform(self._broadcast_shape(axes), 5) - 1
        bias[self._uniform(tuple(bias.shape), 9) < self.bias_hides] = -math.inf
        if self.unused_length:  # no sequence reaches these rows and columns
            if "q" in axes:
                bias[..., -self.unused_length :, :] = math.nan
            if "k" in axes:
                bias[..., -self.unused_length :] = math.nan
        return bias

    def _broadcast_shape(self, axes: str) -> tuple[int, ...]:
        full = (len(self.lengths_q), self.heads_q, self._longest(self.lengths_q), self._longest(self.lengths_kv))
        shape = [size if letter in axes else 1 for letter, size in zip("bhqk", full, strict=True)]
        num_leading = next((place for place, letter in enumerate("bhqk") if letter in axes), 4)
        return tuple(shape[num_leading:])

    def _uniform(self, shape: tuple[int, ...], which: int) -> Tensor:
        generator = torch.Generator("cpu").manual_seed(self.seed + which)
        return torch.rand(shape, generator=generator, dtype=torch.float64, device="cpu")


def draw_spec(
    rng: Random,
    *,
    dtypes: Sequence[torch.dtype] = DTYPES,
    lengths: Sequence[int] = LENGTHS,
    max_batch: int = 3,
    max_head_dim: int = 24,
    layouts: Sequence[Literal["dense", "packed"]] = ("dense", "packed"),
    option_rate: float = 0.35,
) -> CallSpec:
    """Draws a random call: any shapes, strides and dtype, and any mix of options.

    Args:
        rng: ``random.Random(seed)``, or what hypothesis' ``st.randoms(use_true_random=False)`` draws.
        dtypes: of q, k and v.
        lengths: the sequence lengths to choose from.
        max_batch: up to so many sequences; now and then none.
        max_head_dim: largest head_dim and head_dim_v, at least 1.
        layouts: to choose from.
        option_rate: the probability of each option; 0 draws plain attention.

    Example:
        >>> from random import Random
        >>> from flashtile.testing import draw_spec
        >>> draw_spec(Random(1)) == draw_spec(Random(1))
        True
    """

    def happens(rate: float = option_rate) -> bool:
        return rng.random() < rate

    def side() -> int | None:
        return rng.choice((None, 0, 1, 4, 11, 30))

    def axes() -> str:
        return "".join(letter for letter in "bhqk" if happens(0.6))

    is_packed = rng.choice(layouts) == "packed"
    batch = rng.randint(0 if happens(0.1) else 1, max_batch)
    lengths_q, lengths_kv = (
        tuple(rng.choice(lengths) for _ in range(batch)) if is_packed else (rng.choice(lengths),) * batch
        for _ in ("q", "kv")
    )
    if happens(0.4):
        lengths_kv = lengths_q
    head_dim = rng.randint(1, max_head_dim)
    dtype = rng.choice(dtypes)
    return CallSpec(
        lengths_q=lengths_q,
        lengths_kv=lengths_kv,
        is_packed=is_packed,
        unused_rows=rng.choice((0, 1, 20)) if is_packed else 0,
        unused_length=rng.choice((0, 0, 13)) if is_packed else 0,
        heads_kv=rng.randint(1, 2),
        heads_per_kv=rng.randint(1, 3),
        head_dim=head_dim,
        head_dim_v=head_dim if happens(0.6) else rng.randint(1, max_head_dim),
        dtype=dtype,
        strides_q=rng.choice(STRIDES),
        strides_k=rng.choice(STRIDES),
        strides_v=rng.choice(STRIDES),
        strides_d_out=rng.choice(STRIDES),
        spread=rng.choice((1.0, 1.0, 10.0)),
        causal=happens(0.4),
        window=(side(), side()) if happens() else None,
        scale=rng.choice((0.0, 0.3, -0.5)) if happens() else None,
        softcap=rng.choice((2.0, 30.0)) if happens() else 0.0,
        bias_axes=axes() if happens() else None,
        bias_dtype=rng.choice((dtype, torch.float32)),
        bias_hides=rng.choice((0.0, 0.3)),
        mask_axes=axes() if happens() else None,
        mask_shows=rng.choice((0.2, 0.8)),
        alibi=rng.choice(("per head", "per sequence")) if happens() else None,
        has_sinks=happens(),
        dropout_p=rng.choice((0.1, 0.6)) if happens() else 0.0,
        seed=rng.randint(0, 2**31),
    )
