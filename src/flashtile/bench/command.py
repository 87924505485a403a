"""``flashtile bench``: arguments, progress, Ctrl-C and files around ``kernels.run``."""

from __future__ import annotations

import argparse
import importlib.util
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch

from flashtile.bench import baselines, compile_ahead, environment, kernels, results
from flashtile.bench.baselines import Peer
from flashtile.bench.cases import DIRECTIONS, DTYPES, OPTIONS, BenchCase, default_grids, filtered
from flashtile.bench.results import KernelResults
from flashtile.bench.timing import clock_for
from flashtile.errors import InvalidArgument, MissingExtra

EXIT_INTERRUPTED = 130
"""What shells report for a program ended by Ctrl-C."""

_DEFAULT_BUDGET_S = {"cpu": 5.0, "cuda": 1.0}
_QUICK_BUDGET_S = 1.0
_MIN_ROUNDS, _QUICK_MIN_ROUNDS = 5, 3

Report = Callable[[BenchCase, float], None]
"""(running case, share of it that is done)"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds ``kernels`` and its options to the parser of ``flashtile bench``."""
    benchmarks = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    parser = benchmarks.add_parser(
        "kernels",
        help="one attention call beside every peer that is installed",
        description="Times one attention call beside every peer that is installed: interleaved rounds, medians with "
        "spread, peak memory, and the device's own ceilings measured in the same run. Without further options: a grid "
        "that suits the device. Ctrl-C keeps the finished cases.",
        epilog="What --options may name: " + "; ".join(f"{name}: {what}" for name, what in OPTIONS.items()) + ".",
    )
    _add_grid_arguments(parser)
    names = tuple(peer.name for peer in baselines.PEERS)
    parser.add_argument(
        "--peers",
        nargs="+",
        type=_some_of("a peer", names),
        metavar="PEER",
        help=f"whom to measure, out of {', '.join(names)} (default: all that are here)",
    )
    parser.add_argument(
        "--budget-s",
        type=_positive_float,
        metavar="SECONDS",
        help="time for each case; more makes the medians steadier (default: "
        f"{_DEFAULT_BUDGET_S['cpu']:g} on a CPU, {_DEFAULT_BUDGET_S['cuda']:g} on a GPU, "
        f"{_QUICK_BUDGET_S:g} with --quick)",
    )
    parser.add_argument(
        "--compile-processes",
        type=_count,
        metavar="N",
        help="processes that fill the compilers' disk caches before the measurement, 0 for none (default: by the "
        "number of cases and cores on a GPU, none on a CPU)",
    )
    parser.add_argument(
        "--commit",
        type=_commit,
        metavar="SHA",
        help="what to record as the commit where the package lies in no git checkout; elsewhere git is believed",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="results file, rewritten after every case (default: out/bench_kernels_DEVICE.json; with --json, none)",
    )
    parser.add_argument("--json", action="store_true", help="print the results file instead of tables")


def _add_grid_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    parser.add_argument("--dtype", nargs="+", type=_dtype, metavar="DTYPE", help="bfloat16 or bf16, and so on")
    parser.add_argument("--head-dim", nargs="+", type=_positive_int, metavar="N")
    parser.add_argument("--seqlen", nargs="+", type=_positive_int, metavar="N", help="tokens in each sequence")
    parser.add_argument(
        "--heads-per-kv", nargs="+", type=_positive_int, metavar="N", help="query heads that share a key/value head"
    )
    parser.add_argument("--direction", nargs="+", choices=DIRECTIONS, metavar="DIRECTION", help=", ".join(DIRECTIONS))
    parser.add_argument(
        "--options",
        nargs="+",
        type=_some_of("an option", tuple(OPTIONS)),
        metavar="OPTION",
        help=f"what the calls carry: {', '.join(OPTIONS)}, with commas or spaces between them (default: all on a GPU, "
        "plain on a CPU and with --quick)",
    )
    parser.add_argument("--quick", action="store_true", help="a small grid with little time for each case")
    parser.add_argument(
        "--filter",
        metavar="WORDS",
        help="keep the cases whose label has all these words, for example 'causal and head_dim=64 and not backward'",
    )


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark that ``add_arguments`` parsed and prints what it found.

    Returns:
        0, or 130 after Ctrl-C.

    Raises:
        InvalidArgument: an option that this machine or the grid cannot serve.
        MissingExtra: tables are wanted and rich is not installed; ``--json`` works without it.
    """
    has_rich = importlib.util.find_spec("rich") is not None
    if not (args.json or has_rich):
        raise MissingExtra("rich", "bench")
    device = environment.find_device(args.device)
    cases = _cases(args, device.type)
    out = args.out or (None if args.json else Path("out") / f"bench_kernels_{device.type}.json")
    if out is not None:
        _check_writable(out)

    finished: list[KernelResults] = []
    try:
        _compile_ahead(args, cases, device)
        with _progress(len(cases), is_drawn=has_rich and sys.stderr.isatty()) as report:
            for found in _measured(args, cases, device, report):
                finished[:] = [found]
                if out is not None:
                    results.save(out, found)
    except KeyboardInterrupt:
        num_finished = len({row.case for found in finished for row in found.rows})
        print(f"Interrupted; {num_finished} of {len(cases)} cases are finished and kept.", file=sys.stderr)
    for found in finished:
        _print(found, is_json=args.json)
        if out is not None:
            results.save(out, found)  # once more: the interrupt may have come before the last case was written
            print(f"Results are in {out}", file=sys.stderr)
    return 0 if finished and finished[0].is_complete else EXIT_INTERRUPTED


def _cases(args: argparse.Namespace, device_type: str) -> tuple[BenchCase, ...]:
    options = [option for group in args.options for option in group] if args.options else None
    asked = {
        "directions": args.direction,
        "dtypes": args.dtype,
        "head_dims": args.head_dim,
        "seqlens": args.seqlen,
        "heads_per_kv": args.heads_per_kv,
    }
    axes = {axis: tuple(values) for axis, values in asked.items() if values}
    grids = default_grids(device_type, is_quick=args.quick, options=options)
    cases = tuple(case for grid in grids for case in replace(grid, **axes).cases())
    return filtered(cases, args.filter) if args.filter is not None else cases


def _peers(args: argparse.Namespace) -> tuple[Peer, ...]:
    wanted = {name for group in args.peers for name in group} if args.peers else None
    return tuple(peer for peer in baselines.PEERS if wanted is None or peer.name in wanted)


def _measured(
    args: argparse.Namespace, cases: Sequence[BenchCase], device: torch.device, report: Report
) -> Iterator[KernelResults]:
    budget_s = args.budget_s or (_QUICK_BUDGET_S if args.quick else _DEFAULT_BUDGET_S[device.type])
    min_rounds = _QUICK_MIN_ROUNDS if args.quick else _MIN_ROUNDS
    peers = _peers(args)
    clock = clock_for(device)
    empty = kernels.start(cases, peers, device, clock, budget_s=budget_s, commit=args.commit)
    return kernels.run(empty, cases, peers, device, clock, min_rounds=min_rounds, on_progress=report)


def _compile_ahead(args: argparse.Namespace, cases: Sequence[BenchCase], device: torch.device) -> None:
    jobs = compile_ahead.jobs(cases, _peers(args), device)
    num_processes = args.compile_processes
    if num_processes is None:
        num_processes = compile_ahead.default_num_processes(len(jobs)) if device.type == "cuda" else 0
    if num_processes and jobs:
        print(f"Compiling ahead: {len(jobs)} first calls in {num_processes} processes", file=sys.stderr, flush=True)
        for failure in compile_ahead.run(jobs, num_processes):
            print(f"  {failure}", file=sys.stderr)


def _check_writable(out: Path) -> None:
    """Finds out before the measurement whether its results can be kept, and refuses to replace anything else."""
    if out.exists():
        try:
            results.load(out)
        except results.InvalidResults as error:
            raise InvalidArgument(
                "--out",
                got=f"{out}, which exists and is no results file of this version ({error.got})",
                wanted="a new file, or results to replace",
                remedy="choose another name, or delete the file if nobody needs it",
            ) from error
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        is_writable = os.access(out.parent, os.W_OK)
    except OSError:
        is_writable = False
    if not is_writable:
        raise InvalidArgument(
            "--out", got=str(out), wanted="a file in a folder that can be written", remedy="choose another folder"
        )


def _print(found: KernelResults, *, is_json: bool) -> None:
    if is_json:
        sys.stdout.write(results.to_json(found))
        return
    from flashtile.bench.table import print_results  # needs rich, which --json does not

    print_results(found)


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
        task = progress.add_task("measuring the device's ceilings", total=num_cases)
        started: list[BenchCase] = []

        def report(case: BenchCase, share: float) -> None:
            if case not in started:
                started.append(case)
            num_before = len(started) - 1
            progress.update(task, completed=num_before + share, description=f"{len(started)}/{num_cases} {case.label}")

        yield report


def _line_reporter(num_cases: int) -> Report:
    started: list[BenchCase] = []

    def report(case: BenchCase, _share: float) -> None:
        if case not in started:
            started.append(case)
            print(f"[{len(started)}/{num_cases}] {case.label}", file=sys.stderr, flush=True)

    return report


# --- argument types ---------------------------------------------------------------------------------------------------


def _dtype(text: str) -> str:
    short = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}
    name = short.get(text, text)
    if name not in DTYPES:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join([*DTYPES, *short])}")
    return name


def _some_of(what: str, known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """A type for names with commas between them."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.strip(",").split(","))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not {what}; they are {', '.join(known)}")
        return names

    return parse


def _commit(text: str) -> str:
    if not re.fullmatch("[0-9a-f]{40}", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no commit; wanted the 40 hexadecimal digits of git rev-parse HEAD"
        )
    return text


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def _positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return value
