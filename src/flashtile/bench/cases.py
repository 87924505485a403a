"""What is measured: a case is one attention call in one direction; grids make cases, filters select among them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch

from flashtile.spec import accounting, sizes
from flashtile.spec.problem import AttentionProblem

Direction = Literal["forward", "backward", "forward+backward"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
Option = Literal["plain", "bias", "mask", "alibi", "window"]
OPTIONS: dict[Option, str] = {
    "plain": "q, k and v alone",
    "bias": "an additive bias [1, heads_q, seqlen, seqlen] in the case's dtype, the same for the whole batch; "
    "its gradient is not asked for",
    "mask": "a boolean mask [1, 1, seqlen, seqlen], the same for the whole batch and every head: the diagonal and "
    "half of the other pairs, at random",
    "alibi": "ALiBi slopes [heads_q], a geometric series as its paper has it",
    "window": "a sliding window that reaches seqlen // 4 keys to either side, to the left only if causal",
}
"""What a call carries beside q, k and v. The bias and the mask are broadcast over the batch because a model's are."""
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchCase:
    """One self-attention call in one direction; holds no tensor and no device."""

    direction: Direction
    dtype: str
    """A key of ``DTYPES``."""
    head_dim: int
    seqlen: int
    is_causal: bool
    batch: int
    heads_q: int
    heads_kv: int
    option: Option = "plain"

    def __post_init__(self) -> None:
        if min(self.head_dim, self.seqlen, self.batch, self.heads_q, self.heads_kv) < 1:
            raise ValueError("has a size below 1")

    @property
    def label(self) -> str:
        """The case in words that a filter matches, for example
        ``backward float32 head_dim=64 seqlen=1024 causal plain batch=1 heads_q=8 heads_kv=8``."""
        return (
            f"{self.direction} {self.dtype} head_dim={self.head_dim} seqlen={self.seqlen} {self.mask_name} "
            f"{self.option} batch={self.batch} heads_q={self.heads_q} heads_kv={self.heads_kv}"
        )

    @property
    def mask_name(self) -> str:
        return "causal" if self.is_causal else "full"

    @property
    def window(self) -> tuple[int, int] | None:
        """(left, right) as ``flashtile.attention`` takes it; None unless the option is ``window``."""
        if self.option != "window":
            return None
        reach = self.seqlen // 4
        return reach, 0 if self.is_causal else reach

    @property
    def bias_shape(self) -> tuple[int, ...] | None:
        return (1, self.heads_q, self.seqlen, self.seqlen) if self.option == "bias" else None

    @property
    def mask_shape(self) -> tuple[int, ...] | None:
        return (1, 1, self.seqlen, self.seqlen) if self.option == "mask" else None

    @property
    def torch_dtype(self) -> torch.dtype:
        return DTYPES[self.dtype]

    @property
    def problem(self) -> AttentionProblem:
        """What ``flashtile.attention`` makes of the call."""
        return sizes.pose(
            batch=self.batch,
            seqlen_q=self.seqlen,
            heads_q=self.heads_q,
            heads_kv=self.heads_kv,
            head_dim=self.head_dim,
            dtype=self.torch_dtype,
            causal=self.is_causal,
            window=self.window,
            bias_shape=self.bias_shape,
            mask_shape=self.mask_shape,
            has_alibi=self.option == "alibi",
            gradients=() if self.direction == "forward" else ("q", "k", "v"),
        )

    @property
    def flops(self) -> int:
        """Useful operations: those of the algorithm on the pairs that causality and window leave visible, whatever a
        peer computes. Pairs that a boolean mask hides count, because at random they leave no tile to skip."""
        parts: tuple[accounting.Direction, ...] = (
            ("forward", "backward") if self.direction == "forward+backward" else (self.direction,)
        )
        return sum(accounting.useful_flops(self.problem, part) for part in parts)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Every combination of its axes, at a fixed model width and number of tokens."""

    directions: tuple[Direction, ...]
    dtypes: tuple[str, ...]
    head_dims: tuple[int, ...]
    seqlens: tuple[int, ...]
    options: tuple[Option, ...] = ("plain",)
    heads_per_kv: tuple[int, ...] = (1,)
    """Query heads that share a key/value head; 1 is ordinary multi-head attention."""
    hidden_size: int
    """heads_q is hidden_size / head_dim, rounded down to a multiple of heads_per_kv."""
    tokens: int
    """The batch is tokens / seqlen, at least 1, so that every length costs about the same memory."""

    def cases(self) -> tuple[BenchCase, ...]:
        """The cases, slowest axis first: direction, dtype, heads per kv, head_dim, option, mask, seqlen."""
        axes = itertools.product(
            self.directions, self.dtypes, self.heads_per_kv, self.head_dims, self.options, (False, True), self.seqlens
        )
        return tuple(self._case(*point) for point in axes)

    def _case(
        self, direction: Direction, dtype: str, group: int, head_dim: int, option: Option, is_causal: bool, seqlen: int
    ) -> BenchCase:
        heads_kv = max(1, self.hidden_size // (head_dim * group))
        return BenchCase(
            direction=direction,
            dtype=dtype,
            head_dim=head_dim,
            seqlen=seqlen,
            is_causal=is_causal,
            batch=max(1, self.tokens // seqlen),
            heads_q=heads_kv * group,
            heads_kv=heads_kv,
            option=option,
        )


CPU_GRID = Grid(
    directions=("forward", "backward"),
    dtypes=("float32", "bfloat16"),
    head_dims=(64, 128),
    seqlens=(1024, 4096),
    hidden_size=512,
    tokens=1,
)
CPU_QUICK_GRID = replace(CPU_GRID, head_dims=(64,), seqlens=(1024,))
CUDA_GRID = Grid(
    directions=("forward", "backward"),
    dtypes=("bfloat16",),
    head_dims=(64, 128, 256),
    seqlens=(1024, 4096, 16384),
    hidden_size=2048,
    tokens=16384,
)
CUDA_QUICK_GRID = replace(CUDA_GRID, head_dims=(128,), seqlens=(1024, 4096))
_GRIDS = {
    ("cpu", False): CPU_GRID,
    ("cpu", True): CPU_QUICK_GRID,
    ("cuda", False): CUDA_GRID,
    ("cuda", True): CUDA_QUICK_GRID,
}
_SIZES_OF_OPTIONS = {
    "cpu": {"head_dims": (64,), "seqlens": (1024,)},
    "cuda": {"head_dims": (128,), "seqlens": (4096,)},
}
"""One size each: what an option adds to a call differs less between sizes than between options."""


def default_grids(device_type: str, *, is_quick: bool, options: Sequence[Option] | None = None) -> tuple[Grid, ...]:
    """The grids for a device type: the plain calls, then the calls that carry something more.

    Args:
        device_type: ``cpu`` or ``cuda``.
        is_quick: fewer sizes.
        options: what the calls carry; None: every option on a GPU unless ``is_quick``, else plain calls only.
    """
    if options is None:
        options = tuple(OPTIONS) if device_type == "cuda" and not is_quick else ("plain",)
    whole = _GRIDS[device_type, is_quick]
    grids = [whole] if "plain" in options else []
    if carried := tuple(option for option in OPTIONS if option in options and option != "plain"):
        grids.append(replace(whole, options=carried, **_SIZES_OF_OPTIONS[device_type]))
    return tuple(grids)
