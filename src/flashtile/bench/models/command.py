"""``flashtile bench models``: its options, and what they ask for."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from flashtile.bench import arguments, timing
from flashtile.bench.arguments import Effort
from flashtile.bench.labels import filtered
from flashtile.bench.models import measuring, peers
from flashtile.bench.models.cases import GRIDS, MODES, QUICK_AXES, SIZES, LimitCase, ModelCase
from flashtile.bench.results import ModelResults
from flashtile.bench.session import Benchmark, Report

_EFFORT = Effort(cpu_s=1.0, cuda_s=1.5, quick_s=0.5, min_rounds=3, quick_min_rounds=2)
_LIMITS = "limits"


def add_arguments(benchmarks: Any) -> argparse.ArgumentParser:
    """Adds ``models`` to the benchmarks and returns its parser."""
    parser = benchmarks.add_parser(
        "models",
        help="whole transformers in training and inference, and the claims that people quote",
        description="Times whole decoder-only transformers with the naive formula, flashtile and torch's SDPA as their "
        "attention: a training step, a prefill, one more token. Time, peak memory, the share of attention, the largest "
        "batch and length that fit; beside them what people claim. Ctrl-C keeps the finished cases.",
        epilog="The modes: "
        + "; ".join(f"{mode}: {what}" for mode, what in MODES.items())
        + f"; {_LIMITS}: the largest batch and the longest sequence whose training step fits.",
    )
    arguments.add_shared(parser, "models", _EFFORT, filter_example="train and small and seqlen=512")
    modes = (*MODES, _LIMITS)
    parser.add_argument(
        "--mode", nargs="+", choices=modes, metavar="MODE", help=f"out of {', '.join(modes)} (default: all)"
    )
    parser.add_argument(
        "--size",
        nargs="+",
        choices=tuple(SIZES),
        metavar="SIZE",
        help="; ".join(f"{name}: {shape.layers} layers of width {shape.d_model}" for name, shape in SIZES.items())
        + " (default: all but tiny on a GPU, tiny on a CPU)",
    )
    parser.add_argument("--seqlen", nargs="+", type=arguments.positive_int, metavar="N", help="tokens in each sequence")
    parser.add_argument(
        "--batch",
        type=arguments.positive_int,
        metavar="N",
        help="sequences (default: one prompt; to train and to decode, as many as suit the device and the length)",
    )
    parser.add_argument(
        "--dtype", type=arguments.dtype, metavar="DTYPE", help="default: bfloat16 on a GPU, float32 on a CPU"
    )
    return parser


def prepare(args: argparse.Namespace, device: torch.device) -> Benchmark[ModelResults]:
    """The benchmark that the options ask for."""
    cases = _cases(args, device.type)

    def measure(report: Report) -> Iterator[ModelResults]:
        empty = measuring.start(device, budget_s=_EFFORT.budget_s(args, device), commit=args.commit)
        clock, min_rounds = timing.clock_for(device), _EFFORT.rounds(args)
        yield from measuring.run(empty, cases, peers.PEERS, device, clock, min_rounds=min_rounds, on_progress=report)

    return Benchmark(kind=ModelResults, cases=cases, measure=measure, print_tables=_print)


def _print(found: ModelResults) -> None:
    from flashtile.bench.models.table import print_results  # needs rich, which --json does not

    print_results(found)


def _cases(args: argparse.Namespace, device_type: str) -> tuple[ModelCase | LimitCase, ...]:
    grid = replace(GRIDS[device_type], **(QUICK_AXES[device_type] if args.quick else {}))
    modes = tuple(args.mode or (*MODES, _LIMITS))
    asked = {
        "modes": tuple(mode for mode in MODES if mode in modes),
        "has_limits": _LIMITS in modes,
        "sizes": tuple(args.size or grid.sizes),
        "seqlens": tuple(args.seqlen or grid.seqlens),
        "batch": args.batch,
        "dtype": args.dtype or grid.dtype,
    }
    grid = replace(grid, **asked)
    cases = (*grid.cases(), *grid.limit_cases())
    return filtered(cases, args.filter) if args.filter is not None else cases
