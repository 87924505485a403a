"""The section of a results file of ``flashtile bench kernels``."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import geometric_mean

from flashtile.bench import summary
from flashtile.bench.baselines import FLASHTILE, NAIVE
from flashtile.bench.results import KernelResults, KernelRow
from flashtile.bench.summary import in_words, listed, peer_title, three_digits, times
from flashtile.report import provenance
from flashtile.report.kernels import charts, tables
from flashtile.report.kernels.run import Run, by_direction, plain
from flashtile.report.page import Headline, Part, Point, Section
from flashtile.spec.units import in_decimal_bytes

_HOW = (
    Point(term="Peers", text="every one gets the same tensors, and its result is checked before it is timed."),
    Point(
        term="Times",
        text="in each round every peer runs once, in changing order; a figure is the median over the rounds. Ratios "
        "are taken within one run only.",
    ),
    Point(
        term="Operations",
        text="those of the pairs that causality and window leave visible, whatever a peer computes; a backward has "
        "2.5 times those of its forward, and is timed without it.",
    ),
    Point(
        term="Memory",
        text="the most that is held at one time beyond the inputs, by torch's own account; for a backward that of "
        "forward and backward together, because what the forward leaves for it is its cost too.",
    ),
    Point(
        term="The ceiling",
        text="a large square matrix product in the same dtype, timed in the same run on the same device.",
    ),
)


def section(source: str, anchor: str, results: KernelResults) -> Section:
    """What one run shows.

    Args:
        source: the name of its file.
        anchor: the section's address on the page.
        results: the run.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    run = Run(source=source, results=results)
    compared = tuple(Point(term=peer_title(peer), text=summary.where_slower(of)) for peer, of in run.known.items())
    return Section(
        anchor=anchor,
        title=f"Attention kernels on {summary.where_and_by_whom(results)}",
        origin=provenance.origin(source, results.environment, results.created_utc),
        summary=_summary(run),
        lead=_lead(run),
        warnings=_warnings(run),
        headlines=_headlines(run),
        parts=(
            Part(
                heading="flashtile's speed as a multiple of each peer's",
                note="A dot is a case; the upright bar is the geometric mean, written beside it. Left of 1x flashtile "
                "is slower.",
                charts=charts.ratios(run),
            ),
            Part(heading="Where flashtile is slower", points=compared),
            Part(heading="Over the sequence length", note=_note_on_lengths(run), views=charts.views(run)),
            Part(heading="Every case", tables=(tables.comparison(results, run.known),) if run.cases else ()),
            Part(
                heading=f"Every measurement ({len(results.rows)})",
                tables=(tables.measurements(results),) if results.rows else (),
                is_folded=True,
            ),
            Part(
                heading="Not measured, and why",
                points=tuple(Point(term="", text=line) for line in summary.gaps(results)),
                is_folded=True,
            ),
            Part(heading="How it was measured", points=_HOW, is_folded=True),
        ),
        facts=_facts(source, results),
    )


# --- in words ---------------------------------------------------------------------------------------------------------


def _lead(run: Run) -> str:
    cases = run.cases
    if not cases:
        return "No case was finished."
    lengths = sorted({case.seqlen for case in cases})
    span = f"{lengths[0]:,} to {lengths[-1]:,}" if len(lengths) > 1 else f"{lengths[0]:,}"
    dtypes = listed(list(dict.fromkeys(case.dtype for case in cases)))
    head_dims = listed([str(size) for size in sorted({case.head_dim for case in cases})])
    directions = listed(list(dict.fromkeys(case.direction for case in cases)))
    options = [case.option for case in cases if case.option != "plain"]
    carried = f", {len(options)} of them with {listed(list(dict.fromkeys(options)))}" if options else ""
    beside = listed([peer_title(peer) for peer in run.peers[1:]])
    return (
        f"{len(cases)} attention calls{carried}: {directions}, {dtypes}, head_dim {head_dims}, sequences of {span} "
        f"tokens" + (f", each timed beside {beside}." if beside else ".")
    )


def _summary(run: Run) -> str:
    """The result in sentences: against the naive formula, then who is behind flashtile and who is ahead."""
    if not run.known:
        return "There is nothing to compare flashtile with in this run."
    sentences = []
    if NAIVE in run.known:
        saved = _most_memory_saved(run)
        memory = f", with up to {times(_memory_ratio(*saved))} less memory" if saved else ""
        speed = _in_directions(run.means(NAIVE), of=" the naive formula's speed")
        sentences.append(f"{speed}{memory}.")
    others = {peer: run.means(peer) for peer in run.known if peer != NAIVE}
    for begin, belongs in (
        ("Faster than", lambda means: min(means) >= 1),
        ("Faster or slower, by direction, than", lambda means: min(means) < 1 <= max(means)),
        ("Slower than", lambda means: max(means) < 1),
    ):
        named = [f"{peer_title(peer)} ({_in_directions(of)})" for peer, of in others.items() if belongs(of.values())]
        if named:
            sentences.append(f"{begin} {listed(named)}.")
    return " ".join([*sentences, "Geometric means of flashtile's speed over the other's, for calls without options."])


def _in_directions(means: Mapping[str, float], *, of: str = "") -> str:
    """For example ``8.14x forward and 2.78x backward``; ``of`` is said once, where it belongs."""
    first, *others = means.items()
    return listed([f"{first[1]:.2f}x{of} {first[0]}", *(f"{mean:.2f}x {direction}" for direction, mean in others)])


def _warnings(run: Run) -> tuple[str, ...]:
    found = [] if run.results.is_complete else [provenance.INTERRUPTED]
    num_wrong = sum(row.peer == FLASHTILE and row.status == "wrong_result" for row in run.results.rows)
    if num_wrong:
        found.append(f"flashtile's result was wrong in {num_wrong} of {len(run.cases)} cases. This is a bug.")
    return tuple(found)


def _most_memory_saved(run: Run) -> tuple[KernelRow, KernelRow] | None:
    """(naive's row, flashtile's) of the case in which the naive peak is the largest multiple of flashtile's."""
    pairs = [(run.rows.get((case, NAIVE)), run.rows.get((case, FLASHTILE))) for case in run.cases]
    known = [(naive, ours) for naive, ours in pairs if naive and ours and _memory_ratio(naive, ours) > 1]
    return max(known, key=lambda pair: _memory_ratio(*pair), default=None)


def _memory_ratio(naive: KernelRow, ours: KernelRow) -> float:
    """0 where it is not known."""
    if not naive.peak_extra_bytes or not ours.peak_extra_bytes:
        return 0.0
    return naive.peak_extra_bytes / ours.peak_extra_bytes


def _headlines(run: Run) -> tuple[Headline, ...]:
    shown = []
    for direction, of in by_direction(plain(run.known.get(NAIVE, {}))).items():
        mean = geometric_mean(of.values())
        shown.append(
            Headline(
                value=times(mean),
                label=f"the naive formula's speed, {direction}",
                detail=f"geometric mean of {len(of)} calls; {min(of.values()):.2f}x to {max(of.values()):.2f}x",
                is_behind=mean < 1,
            )
        )
    if saved := _most_memory_saved(run):
        naive, ours = saved
        shown.append(
            Headline(
                value=f"{times(_memory_ratio(naive, ours))} less",
                label="memory than the naive formula, at most",
                detail=f"{in_decimal_bytes(ours.peak_extra_bytes or 0)} instead of "
                f"{in_decimal_bytes(naive.peak_extra_bytes or 0)}: {ours.case.direction}, {ours.case.seqlen:,} tokens",
            )
        )
    others = {peer: geometric_mean(plain(of).values()) for peer, of in run.known.items() if peer != NAIVE}
    if others:
        fastest = min(others, key=lambda peer: others[peer])
        shown.append(
            Headline(
                value=f"{others[fastest]:.2f}x",
                label=f"the speed of {peer_title(fastest)}, the fastest peer here",
                detail=_in_directions(run.means(fastest)),
                is_behind=others[fastest] < 1,
            )
        )
    shares = [(row.percent_of_ceiling, row.case) for row in run.results.rows if row.peer == FLASHTILE]
    if best := max(
        ((share, case) for share, case in shares if share is not None), key=lambda pair: pair[0], default=None
    ):
        shown.append(
            Headline(value=f"{best[0]:.0f}%", label="of a matrix product's speed, at best", detail=in_words(best[1]))
        )
    return tuple(shown)


def _facts(source: str, results: KernelResults) -> dict[str, str]:
    products = [f"{three_digits(rate)} TFLOP/s in {dtype}" for dtype, rate in results.ceilings.matmul_tflops.items()]
    return {
        **provenance.facts(source, results.environment, results.created_utc),
        "ceilings": f"matrix product {listed(products)}; copy {three_digits(results.ceilings.copy_gb_per_s)} GB/s",
        "time": f"about {results.budget_s:g} s for each case",
        **{f"option {line.partition(': ')[0]}": line.partition(": ")[2] for line in summary.options_used(results)},
    }


def _note_on_lengths(run: Run) -> str:
    tokens = {case.batch * case.seqlen for case in run.cases}
    constant = (
        f" Every call has {tokens.pop():,} tokens in all: the longer its sequences, the fewer of them."
        if len(tokens) == 1 and len({case.seqlen for case in run.cases}) > 1
        else ""
    )
    return (
        "Calls without options. The scale at the right of a chart of speed is in percent of the measured matrix "
        f"product; memory is on a logarithmic scale. Where lines coincide, flashtile's lies on top.{constant}"
    )
