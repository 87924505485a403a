"""One run of any benchmark: progress, Ctrl-C, the results file and what is printed."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic

import torch

from flashtile.bench import documents, environment
from flashtile.bench.documents import D, Document, InvalidResults
from flashtile.bench.files import check_place
from flashtile.bench.labels import Labelled
from flashtile.errors import InvalidArgument, MissingExtra

EXIT_INTERRUPTED = 130
"""What shells report for a program ended by Ctrl-C."""

Report = Callable[[Labelled, float], None]
"""(running case, share of it that is done)"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark(Generic[D]):
    """What a benchmark brings, so that ``run`` can run it."""

    kind: type[D]
    """Of the results."""
    cases: Sequence[Labelled]
    """In the order in which they are measured."""
    measure: Callable[[Report], Iterator[D]]
    """Yields the results after each case, those of the cases before included."""
    print_tables: Callable[[D], None]
    """Needs rich, which is imported when it is called."""


def run(args: argparse.Namespace, prepare: Callable[[argparse.Namespace, torch.device], Benchmark[Any]]) -> int:
    """Runs a benchmark with the options of ``arguments.add_shared`` and prints what it found.

    Returns:
        0, or 130 after Ctrl-C.

    Raises:
        InvalidArgument: an option that this machine or the benchmark cannot serve.
        MissingExtra: tables are wanted and rich is not installed; ``--json`` works without it.
    """
    has_rich = importlib.util.find_spec("rich") is not None
    if not (args.json or has_rich):
        raise MissingExtra("rich", "bench")
    device = environment.find_device(args.device)
    benchmark = prepare(args, device)
    out = args.out or (None if args.json else Path("out") / f"bench_{benchmark.kind.benchmark}_{device.type}.json")
    if out is not None:
        _check_writable(out, benchmark.kind)

    found: Document | None = None
    num_finished = 0
    try:
        with _progress(len(benchmark.cases), is_drawn=has_rich and sys.stderr.isatty()) as report:
            for current in benchmark.measure(report):
                found, num_finished = current, num_finished + 1
                if out is not None:
                    documents.save(out, current)
    except KeyboardInterrupt:
        print(f"Interrupted; {num_finished} of {len(benchmark.cases)} cases are finished and kept.", file=sys.stderr)
    if found is None:
        return EXIT_INTERRUPTED
    if args.json:
        sys.stdout.write(documents.to_json(found))
    else:
        benchmark.print_tables(found)
    if out is not None:
        documents.save(out, found)  # once more: the interrupt may have come before the last case was written
        print(f"Results are in {out}", file=sys.stderr)
    return 0 if found.is_complete else EXIT_INTERRUPTED


def _check_writable(out: Path, kind: type[Document]) -> None:
    """Finds out before the measurement whether its results can be kept, and refuses to replace anything else."""
    if out.exists():
        try:
            documents.load(out, (kind,))
        except InvalidResults as error:
            raise InvalidArgument(
                "--out",
                got=f"{out}, which exists and is no results file of this benchmark and version ({error.got})",
                wanted=f"a new file, or results of 'flashtile bench {kind.benchmark}' to replace",
                remedy="choose another name, or delete the file if nobody needs it",
            ) from error
    check_place("--out", out)


# --- progress on stderr -----------------------------------------------------------------------------------------------


@contextmanager
def _progress(num_cases: int, *, is_drawn: bool) -> Iterator[Report]:
    """A bar with the time left where somebody watches, else a line for each case."""
    if not is_drawn:
        yield _line_reporter(num_cases)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.percentage:3.0f}%"), BarColumn(), TimeElapsedColumn(), "left", TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.description}"), console=Console(stderr=True)) as progress:
        task = progress.add_task("getting ready", total=num_cases)
        started: list[Labelled] = []

        def report(case: Labelled, share: float) -> None:
            if case not in started:
                started.append(case)
            num_before = len(started) - 1
            progress.update(task, completed=num_before + share, description=f"{len(started)}/{num_cases} {case.label}")

        yield report


def _line_reporter(num_cases: int) -> Report:
    started: list[Labelled] = []

    def report(case: Labelled, _share: float) -> None:
        if case not in started:
            started.append(case)
            print(f"[{len(started)}/{num_cases}] {case.label}", file=sys.stderr, flush=True)

    return report
