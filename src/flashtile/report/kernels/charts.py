"""The charts in the section of a kernel run: ratios to each peer, speed and memory over the sequence length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import geometric_mean

from flashtile.bench import plots
from flashtile.bench.baselines import FLASHTILE
from flashtile.bench.cases import BenchCase
from flashtile.bench.plots import Axis, Bars, Line, Ratios
from flashtile.bench.results import KernelRow
from flashtile.bench.summary import peer_title, three_digits
from flashtile.report import charts
from flashtile.report.charts import Plot
from flashtile.report.kernels.run import Run
from flashtile.report.page import Chart, Row, View
from flashtile.spec.units import in_decimal_bytes

Figure = Callable[[KernelRow], float | None]


def ratios(run: Run) -> tuple[Chart, ...]:
    """A chart for each direction, with a row for each peer; calls with options have rows of their own."""
    drawn = []
    for direction in dict.fromkeys(case.direction for case in run.cases):
        rows = []
        for peer, known in run.known.items():
            for ending, is_plain in (("", True), (" + options", False)):
                of = [
                    ratio
                    for case, ratio in known.items()
                    if case.direction == direction and (case.option == "plain") == is_plain
                ]
                if of:
                    rows.append(Ratios(label=peer_title(peer) + ending, values=of, mean=geometric_mean(of)))
        if rows:
            title = f"{run.source}: flashtile's speed as a multiple of each peer's, {direction}"
            svg = plots.ratio_chart(rows, title=title, x_label="flashtile's speed / the peer's")
            drawn.append(Chart(heading=direction.capitalize(), svg=svg, caption=""))
    return tuple(drawn)


_Group = tuple[str, bool, str, int]


def _group(case: BenchCase) -> _Group:
    return case.direction, not case.is_causal, case.dtype, case.heads_q // case.heads_kv


def views(run: Run) -> tuple[View, ...]:
    """One view for each direction, mask, dtype and grouping of heads, causal ones first; calls without options."""
    cases = [case for case in run.cases if case.option == "plain"]
    directions = list(dict.fromkeys(case.direction for case in cases))
    groups = sorted({_group(case) for case in cases}, key=lambda group: (directions.index(group[0]), *group[1:]))
    has_dtypes = len({dtype for _, _, dtype, _ in groups}) > 1
    shown = []
    for group in groups:
        direction, is_full, dtype, heads_per_kv = group
        words = [direction, "full" if is_full else "causal", *([dtype] if has_dtypes else [])]
        if heads_per_kv > 1:
            words.append(f"{heads_per_kv} heads per kv head")
        name = ", ".join(words)
        rows = _rows(run, name, [case for case in cases if _group(case) == group])
        if rows:
            shown.append(View(name=name.capitalize(), rows=rows))
    return tuple(shown)


def _rows(run: Run, name: str, cases: Sequence[BenchCase]) -> tuple[Row, ...]:
    """Speed in one row, memory in the next, a chart for each head_dim; bars if there is a single length."""
    if len({case.seqlen for case in cases}) == 1:
        return _bars(run, name, cases)
    by_head_dim = [[case for case in cases if case.head_dim == size] for size in sorted({c.head_dim for c in cases})]
    return charts.rows([_speed(run, name, of) for of in by_head_dim], [_memory(run, name, of) for of in by_head_dim])


def _speed(run: Run, name: str, cases: Sequence[BenchCase]) -> Plot:
    ceiling = run.results.ceilings.matmul_tflops.get(cases[0].dtype)
    return Plot(
        heading=f"Speed, head_dim {cases[0].head_dim}",
        title=f"{run.source}: speed over sequence length, {name}, head_dim {cases[0].head_dim}",
        lines=_lines(run, cases, _tflops),
        y=Axis(label="TFLOP/s", starts_at_zero=True, whole=ceiling, whole_label="% of a matrix product"),
    )


def _memory(run: Run, name: str, cases: Sequence[BenchCase]) -> Plot:
    return Plot(
        heading=f"Memory, head_dim {cases[0].head_dim}",
        title=f"{run.source}: memory over sequence length, {name}, head_dim {cases[0].head_dim}",
        lines=_lines(run, cases, _peak_bytes),
        y=Axis(label="beyond the inputs", is_log=True, format_tick=in_decimal_bytes),
    )


def _lines(run: Run, cases: Sequence[BenchCase], figure: Figure) -> list[Line]:
    """One for each peer that has such a figure; flashtile's comes last, so that it lies on top."""
    lines = []
    for peer in (*run.peers[1:], FLASHTILE):
        points = [(case.seqlen, figure(run.rows[case, peer])) for case in cases if (case, peer) in run.rows]
        lines.append(charts.line_of(peer, peer_title(peer), points, peers=run.peers))
    return [line for line in lines if line is not None]


def _bars(run: Run, name: str, cases: Sequence[BenchCase]) -> tuple[Row, ...]:
    where = f"at {cases[0].seqlen:,} tokens"
    wanted: tuple[tuple[str, str, Figure, Callable[[float], str]], ...] = (
        ("Speed", "TFLOP/s", _tflops, three_digits),
        ("Memory", "bytes beyond the inputs", _peak_bytes, in_decimal_bytes),
    )
    drawn = []
    for what, x_label, figure, format_value in wanted:
        series = []
        for peer in run.peers:
            rows = [run.rows.get((case, peer)) for case in cases]
            values = [None if row is None else figure(row) for row in rows]
            if any(value is not None for value in values):
                color_idx = charts.color_idx_of(peer, run.peers)
                series.append(Bars(label=peer_title(peer), values=values, color_idx=color_idx))
        if series:
            svg = plots.bar_chart(
                series,
                [f"head_dim {case.head_dim}" for case in cases],
                title=f"{run.source}: {what.lower()} {where}, {name}",
                x_label=x_label,
                format_value=format_value,
            )
            drawn.append(Chart(heading=f"{what} {where}", svg=svg, caption=""))
    return (Row(charts=tuple(drawn)),) if drawn else ()


def _tflops(row: KernelRow) -> float | None:
    return row.tflops


def _peak_bytes(row: KernelRow) -> float | None:
    return row.peak_extra_bytes
