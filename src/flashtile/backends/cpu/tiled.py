"""FlashAttention in plain torch: the textbook of the algorithm.

Forward (FlashAttention-2, algorithm 1). Softmax needs the maximum and the sum of a whole row of scores, but both can be
kept up to date while the row streams by. For each tile of queries we hold

    row_max  the largest score so far,
    row_sum  the sum of exp(score - row_max) so far,
    acc      the sum of exp(score - row_max) * v so far,

and when a tile of keys raises the maximum, one factor, exp(old_max - new_max), brings the old sums to the new scale. In
the end out = acc / row_sum and lse = row_max + log(row_sum). Only one tile of scores exists at any time.

Backward (algorithm 2). The scores were never stored, so each tile is computed again; lse makes the probabilities exact
at once, p = exp(s - lse), without a running maximum. With delta = rowsum(out * d_out) - d_lse the chain rule through
the softmax is d_s = p * (d_p - delta), and the rest are products of tiles. The outer loop runs over tiles of keys, so
that their d_k and d_v are summed on the spot; only d_q gathers its shares in memory. They are summed as transposes
(``_t``), for d_o.T @ p takes less time than p.T @ d_o, which turns the larger tile.

Tiles of one sequence are [heads, rows, columns]. ``_by_kv_head`` folds the query heads that share a kv head into the
rows, so grouped-query attention is one larger product and k, v are not repeated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from flashtile.backends.base import Gradients, Saved, TileConfig
from flashtile.backends.cpu.addressing import sequences
from flashtile.backends.cpu.scores import ScoreRules, Tile
from flashtile.backends.cpu.scratch import Scratch
from flashtile.spec import masks
from flashtile.spec.merge import guarded
from flashtile.spec.operands import Operands
from flashtile.spec.problem import AttentionProblem

LOG2_E = math.log2(math.e)


def forward(
    problem: AttentionProblem, operands: Operands, blocks: TileConfig, products: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(out, lse) of ``problem.out_shape`` and ``problem.lse_shape``; ``products`` is the dtype of matrix operands."""
    out = operands.q.new_zeros(problem.out_shape)
    lse = operands.q.new_full(problem.lse_shape, -math.inf, dtype=problem.accumulation_dtype)
    for sequence in sequences(problem, operands):
        rules = ScoreRules(problem=problem, operands=operands, sequence=sequence)
        _forward_sequence(rules, blocks, products, sequence.q_rows(out), sequence.lse_rows(lse))
    return out, lse


def _forward_sequence(rules: ScoreRules, blocks: TileConfig, products: torch.dtype, out: Tensor, lse: Tensor) -> None:
    """Fills out [heads_q, seqlen_q, head_dim_v] and lse [heads_q, seqlen_q]."""
    problem, operands, sequence = rules.problem, rules.operands, rules.sequence
    heads_q, heads_kv, scratch = problem.heads_q, problem.heads_kv, Scratch(problem.accumulation_dtype)
    q_all, k_all, v_all = sequence.q_rows(operands.q), sequence.kv_rows(operands.k), sequence.kv_rows(operands.v)

    for rows in _slices(0, sequence.seqlen_q, blocks.block_q):
        q = _by_kv_head(scratch.cast("q", q_all[:, rows], products), heads_kv)
        row_max, row_sum = _statistics_of_sinks(problem, operands, rows)  # [heads_q, BLOCK_Q, 1]
        acc = scratch.zeros("acc", (*row_sum.shape[:2], problem.head_dim_v))  # [heads_q, BLOCK_Q, head_dim_v]

        for tile in _tiles_of_rows(rules, rows, blocks):
            k = scratch.cast("k", k_all[:, tile.cols], products)  # [heads_kv, BLOCK_KV, head_dim]
            v = scratch.cast("v", v_all[:, tile.cols], products)
            s = _by_q_head(scratch.product("s", q, k.mT), heads_q)  # [heads_q, BLOCK_Q, BLOCK_KV]
            s = rules.biased_and_masked(rules.scaled_and_capped(s), tile)

            new_max = torch.maximum(row_max, s.amax(dim=-1, keepdim=True))
            shift = guarded(new_max)  # a row that has seen no key yet is shifted by 0, not by -inf
            p = _exp_(s, minus=shift)
            rescale = torch.exp(row_max - shift)
            row_sum = row_sum * rescale + p.sum(dim=-1, keepdim=True)
            p = _by_kv_head(scratch.cast("p", rules.dropped(p, tile), products), heads_kv)
            acc.mul_(rescale).add_(_by_q_head(scratch.product("share", p, v), heads_q))
            row_max = new_max

        out[:, rows] = acc.div_(row_sum.masked_fill(row_sum == 0, 1.0))
        lse[:, rows] = (guarded(row_max) + torch.log(row_sum)).squeeze(-1)


def backward(
    problem: AttentionProblem,
    operands: Operands,
    saved: Saved,
    d_out: Tensor,
    d_lse: Tensor | None,
    blocks: TileConfig,
    products: torch.dtype,
) -> Gradients:
    """The gradients that ``problem.gradients`` names; ``products`` is the dtype of matrix operands."""
    grads = {name: _zeros(getattr(operands, name), problem.dtype) for name in ("q", "k", "v")}
    for name in ("bias", "sinks"):  # summed over sequences and tiles, so kept in the dtype of sums until the end
        if name in problem.gradients:
            grads[name] = _zeros(getattr(operands, name), problem.accumulation_dtype)
    for sequence in sequences(problem, operands):
        rules = ScoreRules(problem=problem, operands=operands, sequence=sequence)
        _backward_sequence(rules, blocks, products, saved, d_out, d_lse, grads)
    return Gradients(
        **{name: grad.to(getattr(operands, name).dtype) for name, grad in grads.items() if name in problem.gradients}
    )


def _backward_sequence(
    rules: ScoreRules,
    blocks: TileConfig,
    products: torch.dtype,
    saved: Saved,
    d_out: Tensor,
    d_lse: Tensor | None,
    grads: dict[str, Tensor],
) -> None:
    """Fills one sequence's rows of the gradients of q, k and v, and adds to those of bias and sinks."""
    problem, operands, sequence = rules.problem, rules.operands, rules.sequence
    dtype, heads_q, heads_kv = problem.accumulation_dtype, problem.heads_q, problem.heads_kv
    q_all, k_all, v_all = sequence.q_rows(operands.q), sequence.kv_rows(operands.k), sequence.kv_rows(operands.v)
    d_out_all, lse_all = sequence.q_rows(d_out), guarded(sequence.lse_rows(saved.lse))[..., None]
    delta_all = _delta(rules, blocks, saved, d_out, d_lse)  # [heads_q, seqlen_q, 1], like lse_all
    d_q_all, scratch = _zeros(q_all, dtype), Scratch(dtype)

    for cols in _slices(0, sequence.seqlen_kv, blocks.block_kv):
        k = scratch.cast("k", k_all[:, cols], products)  # [heads_kv, BLOCK_KV, head_dim]
        v = scratch.cast("v", v_all[:, cols], products)
        d_k_t, d_v_t = scratch.zeros("d_k_t", k.mT.shape), scratch.zeros("d_v_t", v.mT.shape)  # like k.mT and v.mT

        for tile in _tiles_of_cols(rules, cols, blocks):
            rows = tile.rows
            q = _by_kv_head(scratch.cast("q", q_all[:, rows], products), heads_kv)
            d_o = _by_kv_head(scratch.cast("d_o", d_out_all[:, rows], products), heads_kv)
            s = _by_q_head(scratch.product("s", q, k.mT), heads_q)  # [heads_q, BLOCK_Q, BLOCK_KV]
            s = rules.scaled_and_capped(s)
            slope = rules.slope_of_cap(s)
            p = _exp_(rules.biased_and_masked(s, tile), minus=lse_all[:, rows])
            p_dropped = _by_kv_head(scratch.cast("p", rules.dropped(p, tile), products), heads_kv)
            d_v_t += scratch.product("share", d_o.mT, p_dropped)
            d_p = rules.dropped(_by_q_head(scratch.product("d_p", d_o, v.mT), heads_q), tile)
            d_s = p.mul_(d_p.sub_(delta_all[:, rows]))
            if "bias" in problem.gradients:
                rules.add_bias_gradient(grads["bias"], d_s, tile)
            d_s = d_s if slope is None else d_s.mul_(slope)
            d_s = _by_kv_head(scratch.cast("p", d_s, products), heads_kv)  # in the memory of p, which has done its work
            d_k_t += scratch.product("share", q.mT, d_s)
            d_q_all[:, rows].add_(_by_q_head(scratch.product("share", d_s, k), heads_q))  # += would copy it onto itself

        sequence.kv_rows(grads["k"])[:, cols] = d_k_t.mT.mul_(problem.scale)  # s = scale * q @ k.T
        sequence.kv_rows(grads["v"])[:, cols] = d_v_t.mT

    sequence.q_rows(grads["q"])[:] = d_q_all.mul_(problem.scale)
    if operands.sinks is not None and "sinks" in problem.gradients:
        # A sink is one more key, with a score and no value: its d_p is 0, so d_s = p * (0 - delta).
        p_sink = torch.exp(operands.sinks.to(dtype)[:, None, None] - lse_all)
        grads["sinks"] -= (p_sink * delta_all).sum(dim=(1, 2))


def _delta(rules: ScoreRules, blocks: TileConfig, saved: Saved, d_out: Tensor, d_lse: Tensor | None) -> Tensor:
    """rowsum(out * d_out) - d_lse of one sequence: [heads_q, seqlen_q, 1]."""
    sequence, dtype = rules.sequence, rules.problem.accumulation_dtype
    out, d_out = sequence.q_rows(saved.out), sequence.q_rows(d_out)
    delta = out.new_zeros((*out.shape[:2], 1), dtype=dtype)
    for rows in _slices(0, sequence.seqlen_q, blocks.block_q):
        delta[:, rows] = (out[:, rows].to(dtype) * d_out[:, rows].to(dtype)).sum(dim=-1, keepdim=True)
    return delta if d_lse is None else delta - sequence.lse_rows(d_lse)[..., None]


def _tiles_of_rows(rules: ScoreRules, rows: slice, blocks: TileConfig) -> Iterator[Tile]:
    """The tiles in which these query rows see anything, in order: what the forward visits."""
    mask, sequence = rules.problem.mask, rules.sequence
    lengths = {"seqlen_q": sequence.seqlen_q, "seqlen_kv": sequence.seqlen_kv}
    seen = masks.kv_tiles(mask, **lengths, q_begin=rows.start, q_end=rows.stop, block_kv=1)
    for cols in _slices(seen.begin, seen.end, blocks.block_kv):
        tile = Tile(rows=rows, cols=cols, is_full=seen.is_full(cols.start) and seen.is_full(cols.stop - 1))
        if not rules.hides(tile):
            yield tile


def _tiles_of_cols(rules: ScoreRules, cols: slice, blocks: TileConfig) -> Iterator[Tile]:
    """The tiles in which anything sees these keys, in order: what the backward visits."""
    mask, sequence = rules.problem.mask, rules.sequence
    lengths = {"seqlen_q": sequence.seqlen_q, "seqlen_kv": sequence.seqlen_kv}
    seen = masks.q_tiles(mask, **lengths, kv_begin=cols.start, kv_end=cols.stop, block_q=1)
    for rows in _slices(seen.begin, seen.end, blocks.block_q):
        tile = Tile(rows=rows, cols=cols, is_full=seen.is_full(rows.start) and seen.is_full(rows.stop - 1))
        if not rules.hides(tile):
            yield tile


def _statistics_of_sinks(problem: AttentionProblem, operands: Operands, rows: slice) -> tuple[Tensor, Tensor]:
    """(row_max, row_sum) before the first key: those of the sink if there is one, else of the empty set."""
    shape = (problem.heads_q, rows.stop - rows.start, 1)
    if operands.sinks is None:
        return operands.q.new_full(shape, -math.inf, dtype=problem.accumulation_dtype), operands.q.new_zeros(
            shape, dtype=problem.accumulation_dtype
        )
    row_max = operands.sinks.to(problem.accumulation_dtype)[:, None, None].expand(shape)
    return row_max, torch.exp(row_max - guarded(row_max))


def _exp_(s: Tensor, *, minus: Tensor) -> Tensor:
    """exp(s - minus) in place, as a power of two: torch's vectorised exp2 takes a quarter of the time of its exp."""
    return s.sub_(minus).mul_(LOG2_E).exp2_()


def _slices(begin: int, end: int, block: int) -> Iterator[slice]:
    return (slice(start, min(start + block, end)) for start in range(begin, end, block))


def _by_kv_head(tile: Tensor, heads_kv: int) -> Tensor:
    """[heads_q, rows, n] -> [heads_kv, heads_per_kv * rows, n]"""
    return tile.reshape(heads_kv, -1, tile.shape[-1])


def _by_q_head(tile: Tensor, heads_q: int) -> Tensor:
    """[heads_kv, heads_per_kv * rows, n] -> [heads_q, rows, n]"""
    return tile.view(heads_q, -1, tile.shape[-1])


def _zeros(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(like.shape, dtype=dtype, device=like.device)
