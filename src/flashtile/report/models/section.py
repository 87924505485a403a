"""The section of a results file of ``flashtile bench models``."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import geometric_mean

from flashtile.bench import summary
from flashtile.bench.baselines import FLASHTILE, NAIVE, SDPA
from flashtile.bench.models import claims
from flashtile.bench.models.cases import ModelCase
from flashtile.bench.models.summary import conditions, findings
from flashtile.bench.results import ModelResults
from flashtile.bench.summary import listed, peer_title, times
from flashtile.report import provenance
from flashtile.report.models import charts, tables
from flashtile.report.models.run import IN_WORDS, Run
from flashtile.report.page import Headline, Part, Point, Section


def section(source: str, anchor: str, results: ModelResults) -> Section:
    """What one run shows; arguments and errors as ``kernels.section.section``."""
    run = Run(source=source, results=results)
    told = conditions(results)[1:]
    return Section(
        anchor=anchor,
        title=f"Whole transformers on {results.environment.device_name}",
        origin=provenance.origin(source, results.environment, results.created_utc),
        summary=_summary(run),
        lead=_lead(run),
        warnings=() if results.is_complete else (provenance.INTERRUPTED,),
        headlines=_headlines(run),
        parts=(
            Part(
                heading="What people quote, and what was measured",
                note="The claims go around without a source, a GPU or a batch; what can be judged elsewhere are their "
                "ratios.",
                tables=(tables.verdicts(claims.judged(results)),) if results.rows else (),
            ),
            Part(
                heading="Over the sequence length",
                note="Attention's share of the naive time decides how much faster a model can become: the dashed line "
                "is Amdahl's limit, the speed-up if attention took no time at all. Time and memory are on logarithmic "
                "scales.",
                views=charts.views(run),
            ),
            Part(heading="Every model", tables=(tables.comparison(results),) if results.rows else ()),
            Part(
                heading="The largest training step that fits",
                tables=(tables.limits(results.limits),) if results.limits else (),
            ),
            Part(
                heading="What to know about it", points=tuple(Point(term="", text=line) for line in findings(results))
            ),
            Part(
                heading=f"Every measurement ({len(results.rows)})",
                tables=(tables.measurements(results),) if results.rows else (),
                is_folded=True,
            ),
            Part(
                heading="Not measured, and why",
                points=tuple(Point(term="", text=line) for line in summary.row_gaps(results.rows)),
                is_folded=True,
            ),
            Part(
                heading="How it was measured",
                points=tuple(Point(term="", text=line) for line in told),
                is_folded=True,
            ),
        ),
        facts={
            **provenance.facts(source, results.environment, results.created_utc),
            "time": f"about {results.budget_s:g} s for each case",
        },
    )


# --- in words ---------------------------------------------------------------------------------------------------------


def _lead(run: Run) -> str:
    if not run.cases:
        return "The largest training steps that fit." if run.results.limits else "No case was finished."
    lengths = sorted({case.seqlen for case in run.cases})
    span = f"{lengths[0]:,} to {lengths[-1]:,}" if len(lengths) > 1 else f"{lengths[0]:,}"
    sizes = {case.size: case.shape.layers for case in run.cases}
    named = listed([f"{size}: {layers} layers" for size, layers in sizes.items()])
    return (
        f"Decoder-only transformers ({named}) at {span} tokens, in "
        f"{listed(list(dict.fromkeys(case.dtype for case in run.cases)))}: "
        f"{listed([IN_WORDS[mode] for mode in run.modes])}. Nothing but the attention function differs."
    )


def _summary(run: Run) -> str:
    sentences = []
    for mode in run.modes:
        of = [pair for pair in run.pairs if pair.case.mode == mode]
        if of:
            speeds, saved = [pair.speedup for pair in of], max(pair.memory_ratio for pair in of)
            memory = f", with up to {times(saved)} less memory" if saved >= 1.05 else ""
            sentences.append(
                f"{IN_WORDS[mode].capitalize()}: {_span(speeds)} as fast as with the naive formula{memory}."
            )
    if run.speedups_over_sdpa:
        sentences.append(f"{_span(run.speedups_over_sdpa)} as fast as with {peer_title(SDPA)}.")
    only_ours = [
        case
        for case in run.cases
        if (case, FLASHTILE) in run.rows
        and run.rows[case, FLASHTILE].status == "ok"
        and (case, NAIVE) in run.rows
        and run.rows[case, NAIVE].status == "out_of_memory"
    ]
    if only_ours:
        sentences.append(f"In {len(only_ours)} cases the naive formula ran out of memory and flashtile did not.")
    for axis, what in (("seqlen", "sequence: {} as long"), ("batch", "batch: {} as large")):
        growths = [growth for case, growth in run.growths.items() if case.axis == axis]
        if growths:
            span = " to ".join(dict.fromkeys(times(growth) for growth in (min(growths), max(growths))))
            sentences.append(f"The largest {what.format(span)} as with the naive formula, to train.")
    return " ".join(sentences) or "There is nothing to compare flashtile with in this run."


def _span(ratios: Sequence[float]) -> str:
    return f"{min(ratios):.2f}x to {max(ratios):.2f}x"


def _headlines(run: Run) -> tuple[Headline, ...]:
    shown = []
    for mode in run.modes:
        of = [pair for pair in run.pairs if pair.case.mode == mode]
        if best := max(of, key=lambda pair: pair.speedup, default=None):
            shown.append(
                Headline(
                    value=times(best.speedup),
                    label=f"the naive formula's speed, {IN_WORDS[mode]}, at most",
                    detail=_place(best.case),
                    is_behind=best.speedup < 1,
                )
            )
    if run.pairs:
        best = max(run.pairs, key=lambda pair: pair.memory_ratio)
        shown.append(
            Headline(
                value=f"{times(best.memory_ratio)} less",
                label="memory than with the naive formula, at most",
                detail=f"{best.tiled.peak_mb:,.0f} MB instead of {best.naive.peak_mb:,.0f} MB: {best.case.mode}, "
                f"{_place(best.case)}",
                is_behind=best.memory_ratio < 1,
            )
        )
    if growths := {case: growth for case, growth in run.growths.items() if case.axis == "seqlen"}:
        case, growth = max(growths.items(), key=lambda each: each[1])
        largest = {row.peer: row.largest for row in run.results.limits if row.case == case}
        shown.append(
            Headline(
                value=times(growth),
                label="the length of the longest sequence that can be trained, at most",
                detail=f"{largest[FLASHTILE]:,} tokens instead of {largest[NAIVE]:,}: {case.size}, batch {case.other}",
                is_behind=growth < 1,
            )
        )
    if ratios := run.speedups_over_sdpa:
        mean = geometric_mean(ratios)
        shown.append(
            Headline(
                value=f"{mean:.2f}x",
                label=f"the speed with {peer_title(SDPA)}",
                detail=f"geometric mean of {len(ratios)} cases; {_span(ratios)}",
                is_behind=mean < 1,
            )
        )
    return tuple(shown)


def _place(case: ModelCase) -> str:
    return f"{case.size}, {case.seqlen:,} tokens, batch {case.batch}"
