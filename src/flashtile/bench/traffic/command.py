"""``flashtile bench io``: its options, and what they ask for."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, get_args

import torch

from flashtile.bench import arguments, kernels, timing
from flashtile.bench.arguments import Effort
from flashtile.bench.cases import BenchCase, Grid
from flashtile.bench.labels import filtered
from flashtile.bench.results import IoResults
from flashtile.bench.session import Benchmark, Report
from flashtile.bench.traffic import measuring
from flashtile.bench.traffic.peers import PEERS
from flashtile.spec import accounting

_EFFORT = Effort(cpu_s=1.0, cuda_s=0.5, quick_s=0.5, min_rounds=3, quick_min_rounds=3)
_DIRECTIONS = get_args(accounting.Direction)
_CPU_GRID = Grid(
    directions=_DIRECTIONS,
    dtypes=("float32",),
    head_dims=(64,),
    seqlens=(256, 512, 1024, 2048),
    hidden_size=512,
    tokens=1,
)
_CUDA_GRID = Grid(
    directions=_DIRECTIONS,
    dtypes=("bfloat16",),
    head_dims=(64,),
    seqlens=(512, 1024, 2048, 4096, 8192, 16384),
    hidden_size=1024,
    tokens=16384,
)
_GRIDS = {
    ("cpu", False): _CPU_GRID,
    ("cpu", True): replace(_CPU_GRID, seqlens=(256, 1024)),
    ("cuda", False): _CUDA_GRID,
    ("cuda", True): replace(_CUDA_GRID, seqlens=(1024, 8192)),
}


def add_arguments(benchmarks: Any) -> argparse.ArgumentParser:
    """Adds ``io`` to the benchmarks and returns its parser."""
    parser = benchmarks.add_parser(
        "io",
        help="what attention moves between the processor and its memory, predicted and measured",
        description="Predicts the bytes that the naive formula and tiles move between the processor and its memory, "
        "and measures them over the length of the sequence: by the GPU's own counters where Nsight Compute (ncu) is "
        "installed and allowed, and everywhere by the bound that time and the speed of a copy give. Ctrl-C keeps the "
        "finished cases.",
    )
    arguments.add_shared(parser, "io", _EFFORT, filter_example="causal and backward and not seqlen=4096")
    parser.add_argument("--dtype", nargs="+", type=arguments.dtype, metavar="DTYPE", help="bfloat16 or bf16, and so on")
    parser.add_argument("--head-dim", nargs="+", type=arguments.positive_int, metavar="N")
    parser.add_argument("--seqlen", nargs="+", type=arguments.positive_int, metavar="N", help="tokens in each sequence")
    return parser


def prepare(args: argparse.Namespace, device: torch.device) -> Benchmark[IoResults]:
    """The benchmark that the options ask for."""
    cases = _cases(args, device.type)

    def measure(report: Report) -> Iterator[IoResults]:
        clock, budget_s = timing.clock_for(device), _EFFORT.budget_s(args, device)
        empty = kernels.start(cases, PEERS, device, clock, budget_s=budget_s, commit=args.commit)
        min_rounds = _EFFORT.rounds(args)
        yield from measuring.run(empty, cases, PEERS, device, clock, min_rounds=min_rounds, on_progress=report)

    return Benchmark(kind=IoResults, cases=cases, measure=measure, print_tables=_print)


def _print(found: IoResults) -> None:
    from flashtile.bench.traffic.table import print_results  # needs rich, which --json does not

    print_results(found)


def _cases(args: argparse.Namespace, device_type: str) -> tuple[BenchCase, ...]:
    asked = {"dtypes": args.dtype, "head_dims": args.head_dim, "seqlens": args.seqlen}
    grid = replace(_GRIDS[device_type, args.quick], **{axis: tuple(values) for axis, values in asked.items() if values})
    cases = grid.cases()
    return filtered(cases, args.filter) if args.filter is not None else cases
