"""Fills the kernels' arguments from operands and plan, and launches them. Reads no tensor value on the host."""

from __future__ import annotations

import math
from collections.abc import Hashable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from flashtile.backends.base import Gradients, Plan, Saved, TileConfig
from flashtile.backends.gpu import Heads, Sequences, device_of
from flashtile.backends.hopper import arguments
from flashtile.backends.hopper.arguments import tma_ready
from flashtile.backends.hopper.backward import attention_backward
from flashtile.backends.hopper.backward_narrow import attention_backward_narrow
from flashtile.backends.hopper.backward_wide import attention_backward_wide
from flashtile.backends.hopper.constants import LOG2_E, ROWS, STATISTICS_ROWS, SUM_ROWS
from flashtile.backends.hopper.forward import attention_forward
from flashtile.backends.hopper.launcher import MOST_FORMS, Launcher
from flashtile.backends.hopper.plan import (
    BackwardTiles,
    ForwardTiles,
    heads_per_group,
    heads_together,
    num_q_slots,
    num_q_tiles,
    out_columns,
    widths,
)
from flashtile.backends.hopper.statistics import attention_row_statistics, attention_scale_d_q
from flashtile.spec import devices
from flashtile.spec.operands import Operands
from flashtile.spec.problem import AttentionProblem

_FORWARD = Launcher(attention_forward)
_ROW_STATISTICS = Launcher(attention_row_statistics)
_SCALE_D_Q = Launcher(attention_scale_d_q)

_BACKWARD: dict[str, tuple[Launcher, dict[str, int]]] = {
    "backward_narrow": (
        Launcher(attention_backward_narrow),
        {"CONSUMER_REGISTERS": 200, "D_Q_REGISTERS": 88, "LOADER_REGISTERS": 24},
    ),
    "backward": (Launcher(attention_backward), {"CONSUMER_REGISTERS": 240, "LOADER_REGISTERS": 24}),
    "backward_wide": (Launcher(attention_backward_wide), {"CONSUMER_REGISTERS": 240, "LOADER_REGISTERS": 24}),
}
"""Kernel -> itself, and the registers of its partitions' threads."""

_REGISTERS = {2: (240, 24), 3: (160, 32)}
"""By the number of consumers: registers of a consumer's threads and of the loader's; in all 64 Ki for an SM."""


class _Fixed(NamedTuple):
    """What every forward of one problem on one device has in common, and need not find out again."""

    widths: tuple[int, int]
    out_columns: int
    heads: Heads
    heads_per_group: int
    has_more_shares: bool
    constants: dict[str, int | bool]


@lru_cache(maxsize=MOST_FORMS)
def _fixed(problem: AttentionProblem, tiles: ForwardTiles, num_programs: int, device: torch.device) -> _Fixed:
    consumer_registers, loader_registers = _REGISTERS[tiles.num_consumers]
    return _Fixed(
        widths=widths(problem),
        out_columns=out_columns(problem),
        heads=Heads(problem.heads_q, problem.heads_per_kv),
        heads_per_group=heads_per_group(problem, devices.detect(device)),
        has_more_shares=num_q_tiles(problem, tiles) * problem.heads_q * problem.batch > num_programs,
        constants={
            "HEAD_DIM_V": problem.head_dim_v,
            "BLOCK_KV": tiles.block_kv,
            "NUM_CONSUMERS": tiles.num_consumers,
            "NUM_Q_SLOTS": num_q_slots(problem),
            "NUM_STAGES": tiles.num_stages,
            "ORDERED": tiles.is_ordered,
            "IN_TURN": tiles.is_in_turn,
            "CONSUMER_REGISTERS": consumer_registers,
            "LOADER_REGISTERS": loader_registers,
        },
    )


def forward(problem: AttentionProblem, operands: Operands, plan: Plan) -> tuple[Tensor, Tensor]:
    tiles = plan.forward.tiles
    assert isinstance(tiles, ForwardTiles), "the planner of this backend makes these"
    q, k, v = tma_ready(operands.q), tma_ready(operands.k), tma_ready(operands.v)
    fixed = _fixed(problem, tiles, plan.forward.grid[0], q.device)
    out = q.new_empty(problem.out_shape)
    lse = q.new_empty(problem.lse_shape, dtype=torch.float32)
    if problem.layout == "varlen":  # rows that belong to no sequence
        out.zero_()
        lse.fill_(-math.inf)
    width, width_v = fixed.widths
    with device_of(q):
        _FORWARD(
            _form(problem, tiles, (q, k, v), operands),
            plan.forward.grid,
            (
                arguments.descriptor(q, ROWS, width),
                arguments.descriptor(k, tiles.block_kv, width),
                arguments.descriptor(v, tiles.block_kv, width_v),
                arguments.descriptor(out, ROWS, fixed.out_columns) if fixed.out_columns else None,
                arguments.matrix(out),
                lse,
                lse.shape[-1],
                operands.sinks,
                arguments.score_rules(problem, operands),
                Sequences(operands.cu_seqlens_q, operands.cu_seqlens_kv),
                fixed.heads,
                problem.batch,
                fixed.heads_per_group,
                # Counts the shares that programs take after their first one; without any, zeros are not worth a kernel.
                (torch.zeros if fixed.has_more_shares else torch.empty)(1, dtype=torch.int32, device=q.device),
                problem.seqlen_q,
                problem.seqlen_kv,
            ),
            **fixed.constants,
        )
    return out, lse


def backward(
    problem: AttentionProblem, operands: Operands, saved: Saved, d_out: Tensor | None, d_lse: Tensor | None, plan: Plan
) -> Gradients:
    tiles = plan.backward.tiles
    assert isinstance(tiles, BackwardTiles), "the planner of this backend makes these"
    wanted = problem.gradients
    d_out = saved.out.new_zeros(saved.out.shape) if d_out is None else d_out
    q, k, v, d_out = (tma_ready(tensor) for tensor in (operands.q, operands.k, operands.v, d_out))
    width, width_v = widths(problem)
    num_kv_tiles = -(-problem.seqlen_kv // tiles.block_kv)
    with device_of(q):
        lse_log2, delta, d_q_sums = _row_statistics(problem, operands, saved, d_out, d_lse)
        make = torch.zeros_like if problem.layout == "varlen" else torch.empty_like  # rows of no sequence
        d_k, d_v = (make(tensor, memory_format=torch.contiguous_format) for tensor in (operands.k, operands.v))
        kernel, registers = _BACKWARD[plan.backward.kernel]
        kernel(
            _form(problem, tiles, (q, k, v, d_out), operands),
            plan.backward.grid,
            (
                arguments.descriptor(q, ROWS, width),
                arguments.descriptor(k, ROWS, width),
                arguments.descriptor(v, ROWS, width_v),
                arguments.descriptor(d_out, ROWS, width_v),
                arguments.numbers_descriptor(lse_log2, ROWS),
                arguments.numbers_descriptor(delta, ROWS),
                d_q_sums,
                d_q_sums.shape[1],
                arguments.matrix(d_k),
                arguments.matrix(d_v),
                problem.scale,
                arguments.score_rules(problem, operands),
                Sequences(operands.cu_seqlens_q, operands.cu_seqlens_kv),
                Heads(problem.heads_q, problem.heads_per_kv),
                heads_together(problem, num_kv_tiles, devices.detect(q.device)),
                problem.seqlen_q,
                problem.seqlen_kv,
            ),
            HEAD_DIM=problem.head_dim,
            HEAD_DIM_V=problem.head_dim_v,
            NUM_STAGES=tiles.num_stages,
            **registers,
        )
        d_q = _scaled(d_q_sums, problem, operands)
        d_sinks = None if operands.sinks is None else _sink_gradient(operands.sinks, lse_log2, delta)
    found = {"q": d_q, "k": d_k, "v": d_v, "sinks": d_sinks}
    return Gradients(**{name: gradient for name, gradient in found.items() if name in wanted})


def _row_statistics(
    problem: AttentionProblem, operands: Operands, saved: Saved, d_out: Tensor, d_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(lse_log2, delta, sums of d_q that are 0).

    The numbers are [batch, heads, rows] or packed [heads, rows], in whole blocks of ``STATISTICS_ROWS``, and the sums
    [batch * heads or heads, blocks of ``SUM_ROWS``, SUM_ROWS * BLOCK_D].
    """
    if problem.layout == "varlen":
        length = (-(-problem.tokens_q // STATISTICS_ROWS) + problem.batch) * STATISTICS_ROWS
        num_sum_blocks = problem.tokens_q // SUM_ROWS + problem.batch
        shape: tuple[int, ...] = (problem.heads_q, length)
    else:
        length = -(-problem.seqlen_q // STATISTICS_ROWS) * STATISTICS_ROWS
        num_sum_blocks = -(-problem.seqlen_q // ROWS) * (ROWS // SUM_ROWS)
        shape = (problem.batch, problem.heads_q, length)
    width, width_v = widths(problem)
    lse_log2, delta = (torch.empty(shape, dtype=torch.float32, device=d_out.device) for _ in range(2))
    if problem.layout == "varlen" and problem.has_sinks:  # what lies between the sequences counts nothing in their sums
        lse_log2.fill_(math.inf)
        delta.zero_()
    lines = math.prod(shape[:-1])
    d_q_sums = torch.empty((lines, num_sum_blocks, SUM_ROWS * width), dtype=torch.float32, device=d_out.device)
    block_rows = max(SUM_ROWS, min(STATISTICS_ROWS, 4096 // width_v))
    num_blocks = -(-problem.seqlen_q // STATISTICS_ROWS) * (STATISTICS_ROWS // block_rows)
    _ROW_STATISTICS(
        (*_form(problem, None, (d_out,), operands), d_lse is None),
        (num_blocks * problem.heads_q * problem.batch,),
        (
            arguments.matrix(saved.out),
            arguments.matrix(d_out),
            saved.lse.contiguous(),
            None if d_lse is None else d_lse.contiguous(),
            saved.lse.shape[-1],
            lse_log2,
            delta,
            length,
            d_q_sums,
            num_sum_blocks,
            operands.cu_seqlens_q,
            problem.heads_q,
            problem.seqlen_q,
        ),
        HEAD_DIM_V=problem.head_dim_v,
        BLOCK_D=width,
        BLOCK_DV=width_v,
        BLOCK_ROWS=block_rows,
    )
    return lse_log2, delta, d_q_sums


def _scaled(d_q_sums: Tensor, problem: AttentionProblem, operands: Operands) -> Tensor:
    """d_q from its sums: scaled, and rounded once."""
    make = torch.zeros if problem.layout == "varlen" else torch.empty  # rows of no sequence
    d_q = make(operands.q.shape, dtype=problem.dtype, device=d_q_sums.device)
    width = widths(problem)[0]
    block_rows = max(SUM_ROWS, 4096 // width)
    _SCALE_D_Q(
        _form(problem, None, (d_q,), operands),
        (-(-problem.seqlen_q // block_rows) * problem.heads_q * problem.batch,),
        (
            d_q_sums,
            d_q_sums.shape[1],
            arguments.matrix(d_q),
            problem.scale,
            operands.cu_seqlens_q,
            problem.heads_q,
            problem.seqlen_q,
        ),
        HEAD_DIM=problem.head_dim,
        BLOCK_D=width,
        BLOCK_ROWS=block_rows,
    )
    return d_q


def _sink_gradient(sinks: Tensor, lse_log2: Tensor, delta: Tensor) -> Tensor:
    """A sink is one more key, with a score and no value: its d_p is 0, so d_s = p * (0 - delta)."""
    exponent = sinks.float()[:, None] * LOG2_E - lse_log2  # [batch, heads, rows] or [heads, rows]
    per_row = exponent.exp2_().mul_(delta).neg_()
    return per_row.sum(dim=(0, 2) if per_row.dim() == 3 else 1).to(sinks.dtype)


def _form(
    problem: AttentionProblem, tiles: TileConfig | None, streams: tuple[Tensor, ...], operands: Operands
) -> tuple[Hashable, ...]:
    """All that a compiled kernel depends on; the streams have been made ready, so their addresses are aligned."""
    options = (operands.alibi_slopes, operands.sinks, operands.cu_seqlens_q, operands.cu_seqlens_kv)
    forms = (
        None if option is None else (option.dtype, option.stride(), option.data_ptr() % arguments.ALIGNMENT_BYTES)
        for option in options
    )
    return (problem, tiles, streams[0].device.index, *(stream.stride() for stream in streams), *forms)
