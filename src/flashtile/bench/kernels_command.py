"""``flashtile bench kernels``: its options, and what they ask for."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from flashtile.bench import arguments, baselines, compile_ahead, kernels, timing
from flashtile.bench.arguments import Effort
from flashtile.bench.baselines import FLASHTILE, Peer
from flashtile.bench.cases import DIRECTIONS, OPTIONS, BenchCase, default_grids
from flashtile.bench.labels import filtered
from flashtile.bench.results import KernelResults
from flashtile.bench.session import Benchmark, Report

_EFFORT = Effort(cpu_s=5.0, cuda_s=1.0, quick_s=1.0, min_rounds=5, quick_min_rounds=3)


def add_arguments(benchmarks: Any) -> argparse.ArgumentParser:
    """Adds ``kernels`` to the benchmarks and returns its parser."""
    parser = benchmarks.add_parser(
        "kernels",
        help="one attention call beside every peer that is installed",
        description="Times one attention call beside every peer that is installed: interleaved rounds, medians with "
        "spread, peak memory, and the device's own ceilings measured in the same run. Without further options: a grid "
        "that suits the device. Ctrl-C keeps the finished cases.",
        epilog="What --options may name: " + "; ".join(f"{name}: {what}" for name, what in OPTIONS.items()) + ".",
    )
    arguments.add_shared(parser, "kernels", _EFFORT, filter_example="causal and head_dim=64 and not backward")
    parser.add_argument("--dtype", nargs="+", type=arguments.dtype, metavar="DTYPE", help="bfloat16 or bf16, and so on")
    parser.add_argument("--head-dim", nargs="+", type=arguments.positive_int, metavar="N")
    parser.add_argument("--seqlen", nargs="+", type=arguments.positive_int, metavar="N", help="tokens in each sequence")
    parser.add_argument(
        "--heads-per-kv",
        nargs="+",
        type=arguments.positive_int,
        metavar="N",
        help="query heads that share a key/value head",
    )
    parser.add_argument("--direction", nargs="+", choices=DIRECTIONS, metavar="DIRECTION", help=", ".join(DIRECTIONS))
    parser.add_argument(
        "--options",
        nargs="+",
        type=arguments.some_of("an option", tuple(OPTIONS)),
        metavar="OPTION",
        help=f"what the calls carry: {', '.join(OPTIONS)}, with commas or spaces between them (default: all on a GPU, "
        "plain on a CPU and with --quick)",
    )
    names = tuple(peer.name for peer in baselines.PEERS)
    parser.add_argument(
        "--peers",
        nargs="+",
        type=arguments.some_of("a peer", names),
        metavar="PEER",
        help=f"whom to measure beside flashtile, out of {', '.join(names)} (default: all that are here)",
    )
    parser.add_argument(
        "--compile-processes",
        type=arguments.count,
        metavar="N",
        help="processes that fill the compilers' disk caches before the measurement, 0 for none (default: by the "
        "number of cases and cores on a GPU, none on a CPU)",
    )
    return parser


def prepare(args: argparse.Namespace, device: torch.device) -> Benchmark[KernelResults]:
    """The benchmark that the options ask for."""
    cases = _cases(args, device.type)

    def measure(report: Report) -> Iterator[KernelResults]:
        _compile_ahead(args, cases, device)
        clock, peers = timing.clock_for(device), _peers(args)
        budget_s = _EFFORT.budget_s(args, device)
        empty = kernels.start(cases, peers, device, clock, budget_s=budget_s, commit=args.commit)
        min_rounds = _EFFORT.rounds(args)
        yield from kernels.run(empty, cases, peers, device, clock, min_rounds=min_rounds, on_progress=report)

    return Benchmark(kind=KernelResults, cases=cases, measure=measure, print_tables=_print)


def _print(found: KernelResults) -> None:
    from flashtile.bench.table import print_results  # needs rich, which --json does not

    print_results(found)


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
    """flashtile and those that are named: without it the others would have nobody to be compared with."""
    wanted = {FLASHTILE, *(name for group in args.peers for name in group)} if args.peers else None
    return tuple(peer for peer in baselines.PEERS if wanted is None or peer.name in wanted)


def _compile_ahead(args: argparse.Namespace, cases: Sequence[BenchCase], device: torch.device) -> None:
    jobs = compile_ahead.jobs(cases, _peers(args), device)
    num_processes = args.compile_processes
    if num_processes is None:
        num_processes = compile_ahead.default_num_processes(len(jobs)) if device.type == "cuda" else 0
    if num_processes and jobs:
        print(f"Compiling ahead: {len(jobs)} first calls in {num_processes} processes", file=sys.stderr, flush=True)
        for failure in compile_ahead.run(jobs, num_processes):
            print(f"  {failure}", file=sys.stderr)
