"""Results files as the page docs/performance.md; ``scripts/performance_page.py`` writes it."""

from __future__ import annotations

import html
from collections.abc import Container, Iterable, Mapping, Sequence
from statistics import geometric_mean

from flashtile.bench.baselines import FLASHTILE
from flashtile.bench.cases import BenchCase
from flashtile.bench.results import KernelResults, KernelRow
from flashtile.bench.summary import (
    WORDS,
    Speedups,
    gaps,
    listed,
    options_used,
    peer_title,
    rivals,
    speedups,
    three_digits,
    where_and_by_whom,
    where_slower,
)

_HEAD = """\
# Performance

`make performance` writes this page from the files under `benchmarks/results/`, and a test holds it to them. What is
measured: `flashtile bench kernels`.

How to read the tables:

- Every peer gets the same tensors, and its result is checked against another's before it is timed. In each round every
  peer runs once, in changing order; figures are medians over the rounds. Ratios are taken within one run only.
- The column flashtile has TFLOP/s. A peer's column has the peer's TFLOP/s and, behind it, flashtile's speed as a
  multiple of the peer's: above 1 flashtile is faster. What is **bold** is below 1, even if it rounds to 1.00.
- Operations are those of the pairs that causality and window leave visible, whatever a peer computes; a backward has
  2.5 times those of its forward, and is timed without it.
- FlexAttention is compiled for the very shape, and its block mask is made beforehand. So are the dense masks of peers
  that take nothing else: causality, window, mask, ALiBi and bias in one.
- `-`: the peer does not take the option as it is called here. The gaps below each run's tables have every reason.
"""


def page(files: Mapping[str, KernelResults], *, with_pictures: Container[str] = ()) -> str:
    """The whole page.

    Args:
        files: results by the name of their file under ``benchmarks/results/``.
        with_pictures: names of those that a picture beside the page shows: ``picture_of``.

    Returns:
        Markdown that depends on nothing but its arguments; runs on GPUs come first.
    """
    ordered = sorted(files.items(), key=lambda item: (item[1].environment.device == "cpu", item[0]))
    return "\n".join([_HEAD, *(_run(name, results, name in with_pictures) for name, results in ordered)])


def picture_of(name: str) -> str:
    """The name of the picture of a results file."""
    return f"performance_{name.removesuffix('.json')}.svg"


def _run(name: str, results: KernelResults, has_picture: bool) -> str:
    timed = rivals(results)
    known = {peer: ratios for peer in timed if (ratios := speedups(results, peer))}
    parts = [
        f"## {_escaped(where_and_by_whom(results))}",
        _conditions(name, results),
        *([f"![Speed over the sequence length, from {name}]({picture_of(name)})"] if has_picture else []),
        "### Where flashtile is slower",
        _bullets(f"{_title(peer)}: {where_slower(ratios)}" for peer, ratios in known.items())
        or "Nothing to compare with.",
        "### Geometric means of flashtile's speed over each peer's",
        _means(known),
        *_tables(results, timed, known),
    ]
    if missing := gaps(results):
        parts += ["### Gaps", _bullets(_escaped(line) for line in missing)]
    return "\n\n".join(parts) + "\n"


def _conditions(name: str, results: KernelResults) -> str:
    environment, ceilings = results.environment, results.ceilings
    commit = "no known commit" if environment.commit is None else f"commit {environment.commit[:12]}"
    products = [f"{three_digits(rate)} TFLOP/s in {dtype}" for dtype, rate in ceilings.matmul_tflops.items()]
    lines = [
        f"Result: [{name}](../benchmarks/results/{name}), {results.created_utc[:10]}, {commit}"
        + (" with changes on top" if environment.commit_is_dirty else "")
        + ("." if results.is_complete else "; the run was interrupted, and only its finished cases are here."),
        "Software: " + ", ".join(f"{part} {version}" for part, version in environment.versions.items()) + ".",
        f"Ceilings in the same run: matrix product {listed(products)}; copy {three_digits(ceilings.copy_gb_per_s)} "
        f"GB/s. About {results.budget_s:g} s for each case; {environment.num_threads} host threads.",
        *(f"Option {_escaped(line)}" for line in options_used(results)),
    ]
    return _bullets(lines)


def _means(known: Mapping[str, Speedups]) -> str:
    """One row for each direction, dtype and option; a cell says how many cases it is the mean of."""
    groups = dict.fromkeys(_group(case) for ratios in known.values() for case in ratios)
    rows = []
    for group in groups:
        of_group = [[ratio for case, ratio in ratios.items() if _group(case) == group] for ratios in known.values()]
        rows.append(
            [*group, *(f"{_multiple(geometric_mean(some))} ({len(some)})" if some else "" for some in of_group)]
        )
    return _table(["direction", "dtype", "option", *map(_title, known)], rows, num_words=3)


def _group(case: BenchCase) -> tuple[str, str, str]:
    return case.direction, case.dtype, case.option


def _tables(results: KernelResults, timed: Sequence[str], known: Mapping[str, Speedups]) -> list[str]:
    """A heading and a table for each direction and dtype, and for the calls with options."""
    of_title: dict[str, list[BenchCase]] = {}
    for case in dict.fromkeys(row.case for row in results.rows):
        title = f"{case.direction.capitalize()}, {case.dtype}"
        of_title.setdefault(title if case.option == "plain" else f"{title}, with options", []).append(case)
    rows = {(row.case, row.peer): row for row in results.rows}
    parts = []
    for title, cases in of_title.items():
        body = [
            [
                f"{case.mask_name}" if case.option == "plain" else f"{case.option}, {case.mask_name}",
                str(case.head_dim),
                str(case.seqlen),
                str(case.batch),
                _heads(case),
                *(_cell(rows.get((case, peer)), known.get(peer, {}).get(case)) for peer in (FLASHTILE, *timed)),
            ]
            for case in cases
        ]
        heading = ["call", "head_dim", "tokens", "batch", "heads", FLASHTILE, *map(_title, timed)]
        parts += [f"### {title}", _table(heading, body, num_words=1)]
    return parts


def _heads(case: BenchCase) -> str:
    return str(case.heads_q) if case.heads_q == case.heads_kv else f"{case.heads_q}/{case.heads_kv}"


def _cell(row: KernelRow | None, speedup: float | None) -> str:
    if row is None:
        return ""
    if row.tflops is None:
        return WORDS[row.status]
    return three_digits(row.tflops) if speedup is None else f"{three_digits(row.tflops)} · {_multiple(speedup)}"


# --- Markdown ---------------------------------------------------------------------------------------------------------


def _title(peer: str) -> str:
    return _escaped(peer_title(peer))


def _multiple(ratio: float) -> str:
    """Bold exactly if it is below 1, also where two digits do not show it."""
    return f"**{ratio:.2f}x**" if ratio < 1 else f"{ratio:.2f}x"


def _bullets(lines: Iterable[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


def _table(heading: Sequence[str], rows: Sequence[Sequence[str]], *, num_words: int) -> str:
    """The first ``num_words`` columns hold words, the others figures, which stand to the right."""
    rule = ["---"] * num_words + ["---:"] * (len(heading) - num_words)
    return "\n".join("| " + " | ".join(row) + " |" for row in (heading, rule, *rows))


def _escaped(text: str) -> str:
    return html.escape(text, quote=False).replace("|", "\\|")
