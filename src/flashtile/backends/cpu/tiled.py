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
the softmax is d_s = p * (d_p - delta), and the rest are products of tiles.

Tiles of one sequence are [heads, rows, columns]. ``_by_kv_head`` folds the query heads that share a kv head into the
rows, so grouped-query attention is one larger product and k, v are never copied.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from flashtile.backends.base import Gradients, Saved, TileConfig
from flashtile.backends.cpu.addressing import sequences
from flashtile.backends.cpu.scores import ScoreRules, Tile
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
    heads_q, heads_kv = problem.heads_q, problem.heads_kv
    q_all, k_all, v_all = sequence.q_rows(operands.q), sequence.kv_rows(operands.k), sequence.kv_rows(operands.v)

    for rows in _slices(sequence.seqlen_q, blocks.block_q):
        q = _by_kv_head(q_all[:, rows].to(products), heads_kv)
        row_max, row_sum = _statistics_of_sinks(problem, operands, rows)  # [heads_q, BLOCK_Q, 1]
        acc = torch.zeros_like(row_sum).expand(-1, -1, problem.head_dim_v)  # [heads_q, BLOCK_Q, head_dim_v]

        for tile in _visible_tiles(rules, rows, blocks):
            k, v = k_all[:, tile.cols].to(products), v_all[:, tile.cols].to(products)  # [heads_kv, BLOCK_KV, head_dim]
            s = rules.scaled_and_capped(_by_q_head(q @ k.mT, heads_q))  # [heads_q, BLOCK_Q, BLOCK_KV]
            s = rules.biased_and_masked(s, tile)

            new_max = torch.maximum(row_max, s.amax(dim=-1, keepdim=True))
            shift = guarded(new_max)  # a row that has seen no key yet is shifted by 0, not by -inf
            p = _exp_(s.sub_(shift))
            rescale = torch.exp(row_max - shift)
            row_sum = row_sum * rescale + p.sum(dim=-1, keepdim=True)
            p = _by_kv_head(rules.dropped(p, tile).to(products), heads_kv)
            acc = acc * rescale + _by_q_head(p @ v, heads_q)
            row_max = new_max

        out[:, rows] = acc / row_sum.masked_fill(row_sum == 0, 1.0)
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
    dtype = problem.accumulation_dtype
    sums = {
        name: _zeros(getattr(operands, name), dtype) for name in problem.gradients | {"q", "k", "v"} if name != "lse"
    }
    for sequence in sequences(problem, operands):
        rules = ScoreRules(problem=problem, operands=operands, sequence=sequence)
        _backward_sequence(rules, blocks, products, saved, d_out, d_lse, sums)
    for name in ("q", "k"):  # s = scale * q @ k.T
        sums[name] *= problem.scale
    return Gradients(
        **{name: total.to(getattr(operands, name).dtype) for name, total in sums.items() if name in problem.gradients}
    )


def _backward_sequence(
    rules: ScoreRules,
    blocks: TileConfig,
    products: torch.dtype,
    saved: Saved,
    d_out: Tensor,
    d_lse: Tensor | None,
    sums: dict[str, Tensor],
) -> None:
    """Adds one sequence's share to the gradient sums."""
    problem, operands, sequence = rules.problem, rules.operands, rules.sequence
    dtype, heads_q, heads_kv = problem.accumulation_dtype, problem.heads_q, problem.heads_kv
    q_all, k_all, v_all = sequence.q_rows(operands.q), sequence.kv_rows(operands.k), sequence.kv_rows(operands.v)
    d_q_all, d_k_all, d_v_all = sequence.q_rows(sums["q"]), sequence.kv_rows(sums["k"]), sequence.kv_rows(sums["v"])
    out_all, d_out_all, lse_all = sequence.q_rows(saved.out), sequence.q_rows(d_out), sequence.lse_rows(saved.lse)

    for rows in _slices(sequence.seqlen_q, blocks.block_q):
        q = _by_kv_head(q_all[:, rows].to(products), heads_kv)
        d_o = _by_kv_head(d_out_all[:, rows].to(products), heads_kv)
        d_q = torch.zeros_like(q, dtype=dtype)
        lse = lse_all[:, rows, None]  # [heads_q, BLOCK_Q, 1]
        delta = (out_all[:, rows].to(dtype) * d_out_all[:, rows].to(dtype)).sum(dim=-1, keepdim=True)
        if d_lse is not None:
            delta = delta - sequence.lse_rows(d_lse)[:, rows, None]

        for tile in _visible_tiles(rules, rows, blocks):
            k, v = k_all[:, tile.cols].to(products), v_all[:, tile.cols].to(products)  # [heads_kv, BLOCK_KV, head_dim]
            s_capped = rules.scaled_and_capped(_by_q_head(q @ k.mT, heads_q))  # [heads_q, BLOCK_Q, BLOCK_KV]
            s = rules.biased_and_masked(s_capped, tile)
            p = _exp_(s - guarded(lse))
            d_v_all[:, tile.cols] += _by_kv_head(rules.dropped(p, tile).to(products), heads_kv).mT @ d_o
            d_p = rules.dropped(_by_q_head(d_o @ v.mT, heads_q).to(dtype), tile)
            d_s = p.mul_(d_p - delta)
            if "bias" in problem.gradients:
                rules.add_bias_gradient(sums["bias"], d_s, tile)
            d_s = _by_kv_head(rules.through_cap(d_s, s_capped).to(products), heads_kv)
            d_k_all[:, tile.cols] += d_s.mT @ q
            d_q += d_s @ k

        d_q_all[:, rows] = _by_q_head(d_q, heads_q)
        if operands.sinks is not None and "sinks" in problem.gradients:
            # A sink is one more key, with a score and no value: its d_p is 0, so d_s = p * (0 - delta).
            p_sink = torch.exp(operands.sinks.to(dtype)[:, None, None] - guarded(lse))
            sums["sinks"] -= (p_sink * delta).sum(dim=(1, 2))


def _visible_tiles(rules: ScoreRules, rows: slice, blocks: TileConfig) -> Iterator[Tile]:
    """The kv tiles that these query rows see anything of, in order."""
    sequence = rules.sequence
    kv_tiles = masks.kv_tiles(
        rules.problem.mask,
        seqlen_q=sequence.seqlen_q,
        seqlen_kv=sequence.seqlen_kv,
        q_begin=rows.start,
        q_end=rows.stop,
        block_kv=blocks.block_kv,
    )
    for tile_idx in range(kv_tiles.begin, kv_tiles.end):
        begin = tile_idx * blocks.block_kv
        cols = slice(begin, min(begin + blocks.block_kv, sequence.seqlen_kv))
        tile = Tile(rows=rows, cols=cols, is_full=kv_tiles.is_full(tile_idx))
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


def _exp_(x: Tensor) -> Tensor:
    """exp in place, as a power of two: torch's vectorised exp2 takes a quarter of the time of its exp."""
    return x.mul_(LOG2_E).exp2_()


def _slices(length: int, block: int) -> Iterator[slice]:
    for begin in range(0, length, block):
        yield slice(begin, min(begin + block, length))


def _by_kv_head(tile: Tensor, heads_kv: int) -> Tensor:
    """[heads_q, rows, n] -> [heads_kv, heads_per_kv * rows, n]"""
    return tile.reshape(heads_kv, -1, tile.shape[-1])


def _by_q_head(tile: Tensor, heads_q: int) -> Tensor:
    """[heads_kv, heads_per_kv * rows, n] -> [heads_q, rows, n]"""
    return tile.view(heads_q, -1, tile.shape[-1])


def _zeros(like: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(like.shape, dtype=dtype, device=like.device)
