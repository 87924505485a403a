"""What is measured: a case is one attention call in one direction; grids make cases, filters select among them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from flashtile.errors import InvalidArgument
from flashtile.spec import accounting, sizes
from flashtile.spec.problem import AttentionProblem

Direction = Literal["forward", "backward", "forward+backward"]
DIRECTIONS: tuple[Direction, ...] = get_args(Direction)
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

    @property
    def label(self) -> str:
        """The case in words that ``Filter`` matches, for example
        ``backward float32 head_dim=64 seqlen=1024 causal batch=1 heads_q=8 heads_kv=8``."""
        return (
            f"{self.direction} {self.dtype} head_dim={self.head_dim} seqlen={self.seqlen} {self.mask_name} "
            f"batch={self.batch} heads_q={self.heads_q} heads_kv={self.heads_kv}"
        )

    @property
    def mask_name(self) -> str:
        return "causal" if self.is_causal else "full"

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
            gradients=() if self.direction == "forward" else ("q", "k", "v"),
        )

    @property
    def flops(self) -> int:
        """Useful operations: visible pairs only, and those of the algorithm, whatever a peer computes."""
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
    heads_per_kv: tuple[int, ...] = (1,)
    """Query heads that share a key/value head; 1 is ordinary multi-head attention."""
    hidden_size: int
    """heads_q is hidden_size / head_dim, rounded down to a multiple of heads_per_kv."""
    tokens: int
    """The batch is tokens / seqlen, at least 1, so that every length costs about the same memory."""

    def cases(self) -> tuple[BenchCase, ...]:
        """The cases, slowest axis first: direction, dtype, heads per kv, head_dim, mask, seqlen."""
        axes = itertools.product(
            self.directions, self.dtypes, self.heads_per_kv, self.head_dims, (False, True), self.seqlens
        )
        return tuple(
            self._case(direction, dtype, group, head_dim, is_causal, seqlen)
            for direction, dtype, group, head_dim, is_causal, seqlen in axes
        )

    def _case(
        self, direction: Direction, dtype: str, group: int, head_dim: int, is_causal: bool, seqlen: int
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
        )


CPU_GRID = Grid(
    directions=("forward", "backward"),
    dtypes=("float32", "bfloat16"),
    head_dims=(64, 128),
    seqlens=(1024, 4096),
    hidden_size=512,
    tokens=1,
)
CPU_QUICK_GRID = Grid(
    directions=("forward", "backward"),
    dtypes=("float32", "bfloat16"),
    head_dims=(64,),
    seqlens=(1024,),
    hidden_size=512,
    tokens=1,
)
CUDA_GRID = Grid(
    directions=("forward", "backward"),
    dtypes=("bfloat16",),
    head_dims=(64, 128, 256),
    seqlens=(512, 1024, 2048, 4096, 8192, 16384),
    hidden_size=2048,
    tokens=16384,
)
CUDA_QUICK_GRID = Grid(
    directions=("forward", "backward"),
    dtypes=("bfloat16",),
    head_dims=(128,),
    seqlens=(1024, 4096),
    hidden_size=2048,
    tokens=16384,
)


def default_grid(device_type: str, *, is_quick: bool) -> Grid:
    """The grid for a device type, ``cpu`` or ``cuda``."""
    if device_type == "cuda":
        return CUDA_QUICK_GRID if is_quick else CUDA_GRID
    return CPU_QUICK_GRID if is_quick else CPU_GRID


def filtered(cases: Sequence[BenchCase], expression: str) -> tuple[BenchCase, ...]:
    """The cases whose label has every word of ``expression``.

    Args:
        cases: what to select from.
        expression: words of ``BenchCase.label`` joined by ``and``, each optionally after ``not``. Words match whole:
            ``forward`` does not select ``forward+backward``.

    Raises:
        InvalidArgument: a word that no case has, or a combination that selects nothing.

    Example:
        >>> from flashtile.bench.cases import CPU_GRID, filtered
        >>> len(filtered(CPU_GRID.cases(), "causal and head_dim=64 and not backward"))
        4
    """
    known = {word for case in cases for word in case.label.split()}
    selected = cases
    for term in (part.split() for part in expression.replace(" and ", "\n").split("\n")):
        is_wanted, words = (False, term[1:]) if term[:1] == ["not"] else (True, term)
        if len(words) != 1 or words[0] not in known:
            raise InvalidArgument(
                "--filter",
                got=f"{' '.join(term)!r} in {expression!r}",
                wanted="words joined by 'and', each optionally after 'not', out of: " + ", ".join(sorted(known)),
                remedy="for example --filter 'causal and not float32'; --head-dim, --seqlen, --dtype and --direction "
                "change what is in the grid",
            )
        selected = [case for case in selected if (words[0] in case.label.split()) == is_wanted]
    if not selected:
        raise InvalidArgument(
            "--filter",
            got=repr(expression),
            wanted="a filter that selects at least one case",
            remedy="drop a term: each of its words occurs, but in no case together",
        )
    return tuple(selected)
