"""A small attention problem, computed tile by tile with flashtile's own code: what the page's tile walk shows.

The state after a tile is what ``backends/cpu/tiled.py`` returns for the keys up to there: it runs with the walk's own
small tiles on growing prefixes of the keys. The page's script only shows these numbers; it computes none.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import torch
from torch import Tensor

from flashtile.backends.base import TileConfig
from flashtile.backends.cpu import tiled
from flashtile.spec import masks, sizes
from flashtile.spec.operands import Operands
from flashtile.spec.problem import MaskSpec
from flashtile.testing import make_tensor, oracle

SEQLEN, HEAD_DIM = 12, 4
TILES = TileConfig(block_q=4, block_kv=3)
MASKS = {"full": MaskSpec(), "causal": MaskSpec(right=0)}
ROUNDING = 1e-6
"""Largest difference from the exact result that float32 explains here."""

TileKind = Literal["full", "partial", "empty"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowState:
    """What a walk holds of some query rows: everything that it knows about the keys it has seen."""

    row_max: Tensor  # [rows] -inf before the first key
    row_sum: Tensor  # [rows] of exp(score - row_max)
    out: Tensor  # [rows, HEAD_DIM] attention over the keys so far


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One visit of a tile."""

    q_tile_idx: int
    kv_tile_idx: int
    s: Tensor  # [BLOCK_Q, BLOCK_KV] -inf where hidden
    p: Tensor  # [BLOCK_Q, BLOCK_KV] exp(s - new maximum)
    tile_max: Tensor  # [BLOCK_Q]
    rescale: Tensor  # [BLOCK_Q] exp(old maximum - new maximum)
    before: RowState
    after: RowState
    error: Tensor  # [BLOCK_Q] largest difference of ``after.out`` from the exact result
    scores_computed: int
    """By the walk so far; it keeps those of one tile."""
    scores_of_naive: int
    """That the naive formula would have computed, and kept, if it went in the same order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Walk:
    """All the visits of one mask, in order."""

    scores: Tensor  # [SEQLEN, SEQLEN] -inf where hidden
    values: Tensor  # [SEQLEN, HEAD_DIM]
    exact: Tensor  # [SEQLEN, HEAD_DIM] float64, from the oracle
    kinds: tuple[tuple[TileKind, ...], ...]
    """By query tile and kv tile."""
    steps: tuple[Step, ...]

    @property
    def numbers_kept(self) -> int:
        """By the walk at any time: one tile of scores, and per row a maximum, a sum and an output."""
        return TILES.block_q * (TILES.block_kv + 2 + HEAD_DIM)


@cache
def take(mask_name: str) -> Walk:
    """The walk under one of ``MASKS``; the tensors are shared, leave them as they are."""
    mask, (q, k, v) = MASKS[mask_name], operands()
    positions = torch.arange(SEQLEN)
    scores = q[0, :, 0] @ k[0, :, 0].T * HEAD_DIM**-0.5
    scores = scores.masked_fill(~masks.is_visible(mask, positions[:, None], positions, 0), -math.inf)
    exact = oracle(q, k, v, causal=mask.is_causal)[0][0, :, 0]
    states = [_state_after(mask, scores, end) for end in range(0, SEQLEN + 1, TILES.block_kv)]
    kinds = tile_kinds(mask, seqlen=SEQLEN, tiles=TILES)
    steps: list[Step] = []
    for q_tile_idx in range(SEQLEN // TILES.block_q):
        rows = _rows(q_tile_idx)
        for kv_tile_idx, kind in enumerate(kinds[q_tile_idx]):
            if kind != "empty":
                steps.append(
                    _step(
                        scores=scores,
                        exact=exact,
                        place=(q_tile_idx, kv_tile_idx),
                        before=_rows_of(states[kv_tile_idx], rows),
                        after=_rows_of(states[kv_tile_idx + 1], rows),
                        num_before=len(steps),
                    )
                )
    return Walk(scores=scores, values=v[0, :, 0], exact=exact, kinds=kinds, steps=tuple(steps))


def tile_kinds(mask: MaskSpec, *, seqlen: int, tiles: TileConfig) -> tuple[tuple[TileKind, ...], ...]:
    """What a mask leaves of each tile of a square score matrix, by query tile and kv tile."""
    kinds: list[tuple[TileKind, ...]] = []
    for begin in range(0, seqlen, tiles.block_q):
        lengths = {"seqlen_q": seqlen, "seqlen_kv": seqlen}
        found = masks.kv_tiles(
            mask, **lengths, q_begin=begin, q_end=min(begin + tiles.block_q, seqlen), block_kv=tiles.block_kv
        )
        kinds.append(
            tuple(
                "full" if found.is_full(tile_idx) else "partial" if found.begin <= tile_idx < found.end else "empty"
                for tile_idx in range(-(-seqlen // tiles.block_kv))
            )
        )
    return tuple(kinds)


def operands() -> tuple[Tensor, Tensor, Tensor]:
    """q, k and v, [1, SEQLEN, 1, HEAD_DIM] float32.

    Random, from a draw in which maxima rise and outputs converge step by step, which not every draw shows so well.
    Rounded to one decimal, so that one can follow by hand.
    """
    shape = (1, SEQLEN, 1, HEAD_DIM)
    q, k, v = (make_tensor(shape, seed=seed, spread=spread) for seed, spread in ((108, 1.2), (109, 1.0), (110, 1.0)))
    return q.round(decimals=1), k.round(decimals=1), v.round(decimals=1)


def as_json() -> dict[str, Any]:
    """What the page embeds: every number that it shows; None stands for minus infinity."""
    return {
        "block_q": TILES.block_q,
        "block_kv": TILES.block_kv,
        "seqlen": SEQLEN,
        "head_dim": HEAD_DIM,
        "rounding": ROUNDING,
        "numbers_of_naive": SEQLEN * SEQLEN,
        "walks": {name: _walk_as_json(take(name)) for name in MASKS},
    }


# --- the states -------------------------------------------------------------------------------------------------------


def _state_after(mask: MaskSpec, scores: Tensor, end: int) -> RowState:
    """Of every row after the keys ``[0, end)``, by the tiled algorithm itself."""
    q, k, v = operands()
    problem = sizes.pose(
        seqlen_q=SEQLEN,
        seqlen_kv=end,
        heads_q=1,
        head_dim=HEAD_DIM,
        dtype=q.dtype,
        # Masks are aligned to the last key. On a prefix, the diagonal lies as much further to the right.
        window=None if mask.right is None else (None, mask.right + SEQLEN - end),
        gradients=(),
    )
    out, lse = tiled.forward(problem, Operands(q=q, k=k[:, :end], v=v[:, :end]), TILES, problem.accumulation_dtype)
    row_max = scores[:, :end].amax(dim=-1) if end > 0 else scores.new_full((SEQLEN,), -math.inf)
    row_sum = torch.exp(lse[0, 0] - row_max).nan_to_num(nan=0.0)  # a row that has seen nothing: exp(-inf - -inf)
    return RowState(row_max=row_max, row_sum=row_sum, out=out[0, :, 0])


def _rows_of(state: RowState, rows: slice) -> RowState:
    return RowState(row_max=state.row_max[rows], row_sum=state.row_sum[rows], out=state.out[rows])


def _step(
    *, scores: Tensor, exact: Tensor, place: tuple[int, int], before: RowState, after: RowState, num_before: int
) -> Step:
    q_tile_idx, kv_tile_idx = place
    rows = _rows(q_tile_idx)
    s = scores[rows, kv_tile_idx * TILES.block_kv : (kv_tile_idx + 1) * TILES.block_kv]
    tiles_passed = q_tile_idx * (SEQLEN // TILES.block_kv) + kv_tile_idx + 1
    return Step(
        q_tile_idx=q_tile_idx,
        kv_tile_idx=kv_tile_idx,
        s=s,
        p=torch.exp(s - after.row_max[:, None]),
        tile_max=s.amax(dim=-1),
        rescale=torch.exp(before.row_max - after.row_max),
        before=before,
        after=after,
        error=(after.out.double() - exact[rows]).abs().amax(dim=-1),
        scores_computed=(num_before + 1) * s.numel(),
        scores_of_naive=tiles_passed * s.numel(),
    )


def _rows(q_tile_idx: int) -> slice:
    return slice(q_tile_idx * TILES.block_q, (q_tile_idx + 1) * TILES.block_q)


# --- for the page -----------------------------------------------------------------------------------------------------


def _walk_as_json(walk: Walk) -> dict[str, Any]:
    return {
        "numbers_kept": walk.numbers_kept,
        "hidden": (walk.scores == -math.inf).tolist(),
        "kinds": walk.kinds,
        "exact": _numbers(walk.exact),
        "steps": [
            {
                "q_tile": step.q_tile_idx,
                "kv_tile": step.kv_tile_idx,
                "kind": walk.kinds[step.q_tile_idx][step.kv_tile_idx],
                "scores_computed": step.scores_computed,
                "scores_of_naive": step.scores_of_naive,
                "s": _numbers(step.s),
                "p": _numbers(step.p),
                "old_max": _numbers(step.before.row_max),
                "tile_max": _numbers(step.tile_max),
                "new_max": _numbers(step.after.row_max),
                "rescale": _numbers(step.rescale),
                "row_sum": _numbers(step.after.row_sum),
                "out": _numbers(step.after.out),
                "error": _numbers(step.error),
            }
            for step in walk.steps
        ],
    }


def _numbers(tensor: Tensor) -> Any:
    """Nested lists; JSON has no infinity."""

    def plain(value: Any) -> Any:
        return [plain(item) for item in value] if isinstance(value, list) else value if math.isfinite(value) else None

    return plain(tensor.tolist())
