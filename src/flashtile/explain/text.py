"""An Explanation as text for people and as JSON for programs."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch

from flashtile.explain import tilings
from flashtile.spec import accounting, units
from flashtile.spec.accounting import Comparison, Cost, Roofline, Term
from flashtile.spec.devices import DeviceSpec
from flashtile.spec.problem import DIFFERENTIABLE, AttentionProblem

if TYPE_CHECKING:
    from flashtile.explain import Explanation

WIDTH = 108
"""Columns; the device line needs them."""


def lines(explanation: Explanation) -> Iterator[str]:
    """The text that ``print(explanation)`` shows."""
    yield from _heading(explanation.problem, explanation.costs)
    yield _device_line(explanation.problem, explanation.device)
    yield from ("", "Backends")
    yield from _backend_lines(explanation)
    for cost in explanation.costs:
        yield from ("", *_cost_lines(cost))
    tiling = explanation.costs[0].tiling
    if tiling.is_assumed:
        yield f"  * assuming tiles of {tiling.block_q} x {tiling.block_kv}: this plan has none"
    for title, remarks in (("Where tiles are not faster", explanation.not_faster), ("Notes", explanation.notes)):
        if remarks:
            yield from ("", title)
        for remark in remarks:
            yield from _wrapped("  - ", remark)


def _wrapped(label: str, text: str) -> list[str]:
    """``text`` beside its label, in as many lines as it takes."""
    return textwrap.wrap(text, WIDTH, initial_indent=label, subsequent_indent=" " * len(label))


def _heading(problem: AttentionProblem, costs: Sequence[Comparison]) -> Iterator[str]:
    lengths = f"seqlen {problem.seqlen_q:,}" + ("" if _is_square(problem) else f" x {problem.seqlen_kv:,}")
    if problem.layout == "varlen":
        lengths = f"{problem.tokens_q:,} x {problem.tokens_kv:,} packed tokens, longest {lengths}"
    heads = f"{problem.heads_q}" + ("" if problem.heads_per_kv == 1 else f" over {problem.heads_kv}")
    dims = f"{problem.head_dim}" + ("" if problem.head_dim == problem.head_dim_v else f"/{problem.head_dim_v}")
    yield (
        f"Problem   batch {problem.batch:,}, {lengths}, heads {heads}, head_dim {dims}, "
        f"{units.dtype_name(problem.dtype)}"
    )
    yield from _wrapped("Options   ", ", ".join(_options(problem)) or "none")
    num_pairs = accounting.all_pairs(problem) * problem.heads_q
    if num_pairs > 0:
        useful = " and ".join(f"{units.in_flops(cost.useful_flops)} {cost.direction}" for cost in costs)
        visible = costs[0].useful_flops / (num_pairs * accounting.flops_per_pair(problem, "forward"))
        yield f"Work      {useful} for the visible pairs, {visible:.1%} of all"


def _device_line(problem: AttentionProblem, device: DeviceSpec) -> str:
    version = f" (sm_{''.join(map(str, device.compute_capability))})" if device.compute_capability else ""
    return (
        f"Device    {device.name}{version}: {device.num_sms} {'cores' if device.kind == 'cpu' else 'SMs'}, "
        f"{device.flops_per_s(problem.dtype) / 1e12:.3g} TFLOP/s in {units.dtype_name(problem.dtype)}, "
        f"{device.bytes_per_s / 1e9:,.0f} GB/s, {units.in_bytes(device.l2_bytes)} cache, "
        f"{units.in_bytes(device.memory_bytes)} memory{' (a guess)' if device.is_guess else ''}"
    )


def _is_square(problem: AttentionProblem) -> bool:
    return problem.seqlen_q == problem.seqlen_kv


def _options(problem: AttentionProblem) -> Iterator[str]:
    mask = problem.mask
    if mask.is_causal:
        yield "causal" if mask.left is None else f"causal, {mask.left} back"
    elif not mask.is_unlimited:
        back, ahead = ("unlimited" if reach is None else f"{reach}" for reach in (mask.left, mask.right))
        yield f"window {back} back, {ahead} ahead"
    for name, value in (
        ("softcap", problem.softcap),
        ("bias", problem.bias_shape and list(problem.bias_shape)),
        ("mask", problem.mask_shape and list(problem.mask_shape)),
        ("ALiBi", problem.has_alibi),
        ("sinks", problem.has_sinks),
        ("dropout", problem.dropout_p),
        ("deterministic", problem.deterministic),
    ):
        if value:
            yield name if value is True else f"{name} {value}"
    if problem.gradients:
        yield f"gradients of {', '.join(name for name in (*DIFFERENTIABLE, 'lse') if name in problem.gradients)}"


def _backend_lines(explanation: Explanation) -> Iterator[str]:
    plan = explanation.plan
    if explanation.refusal is not None:
        yield from _wrapped("  ", explanation.refusal.rstrip(":"))
    width = max(len(verdict.backend) for verdict in explanation.verdicts)
    for verdict in explanation.verdicts:
        if plan is not None and verdict.is_chosen:
            status, why = "chosen", plan.reason
        elif verdict.reasons:
            status, why = "declines", "; ".join(verdict.reasons)
        else:
            slower = ", which is too short for it to be the faster one" if verdict.is_slower else ""
            status, why = "accepts", f"would take the problem too{slower}"
        yield from _wrapped(f"  {verdict.backend:<{width}}  {status:<8}  ", why)
    if plan is None:
        return
    for cost in explanation.costs:
        planned = plan.forward if cost.direction == "forward" else plan.backward
        for kernel in tilings.launched(planned, explanation.problem):
            yield (
                f"  {cost.direction}: kernel {plan.backend}/{kernel.kernel}, tiles {kernel.tiles.block_q:,} x "
                f"{kernel.tiles.block_kv:,}, grid {' x '.join(f'{size:,}' for size in kernel.grid)}"
            )
    if explanation.copies:
        yield from _wrapped("  copies first: ", "; ".join(explanation.copies))


def _cost_lines(cost: Comparison) -> Iterator[str]:
    naive, tiled = cost.naive, cost.tiled
    rows = [
        (cost.direction.capitalize(), "naive", "tiled*" if cost.tiling.is_assumed else "tiled", "ratio"),
        ("  FLOPs", units.in_flops(naive.flops), units.in_flops(tiled.flops), _ratio(naive.flops, tiled.flops)),
        _total_row("  bytes moved", naive.traffic_bytes, tiled.traffic_bytes),
        *_term_rows(naive.traffic, tiled.traffic),
        _total_row("  extra memory held", naive.extra_bytes, tiled.extra_bytes),
        *_term_rows(naive.extra, tiled.extra),
        (
            "  least time (roofline)",
            units.in_seconds(cost.naive_time.seconds),
            units.in_seconds(cost.tiled_time.seconds),
            _ratio(cost.naive_time.seconds, cost.tiled_time.seconds),
        ),
        ("  set by", cost.naive_time.binds, cost.tiled_time.binds, ""),
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for row in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True)]
        yield "   ".join((f"{row[0]:<{widths[0]}}", *cells)).rstrip()


def _total_row(title: str, naive: int, tiled: int) -> tuple[str, str, str, str]:
    return title, units.in_bytes(naive), units.in_bytes(tiled), _ratio(naive, tiled)


def _term_rows(naive: Sequence[Term], tiled: Sequence[Term]) -> Iterator[tuple[str, str, str, str]]:
    columns = [{term.what: units.in_bytes(term.num_bytes) for term in terms} for terms in (naive, tiled)]
    for what in dict.fromkeys((*columns[0], *columns[1])):
        yield f"    {what}", columns[0].get(what, ""), columns[1].get(what, ""), ""


def _ratio(naive: float, tiled: float) -> str:
    if tiled == 0:
        return ""
    ratio = naive / tiled
    if ratio >= 10_000:
        return ">9999x"
    return f"{ratio:.0f}x" if ratio >= 100 else f"{ratio:.1f}x"


def as_json(value: Any) -> Any:
    """``value`` as dicts, lists, strings, numbers and None."""
    if dataclasses.is_dataclass(value):
        fields = {field.name: as_json(getattr(value, field.name)) for field in dataclasses.fields(value)}
        if isinstance(value, Cost):
            fields |= {"traffic_bytes": value.traffic_bytes, "extra_bytes": value.extra_bytes}
        if isinstance(value, Roofline):
            fields |= {"seconds": value.seconds, "binds": value.binds}
        return fields
    if isinstance(value, torch.dtype):
        return units.dtype_name(value)
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, (tuple, list)):
        return [as_json(item) for item in value]
    return value
