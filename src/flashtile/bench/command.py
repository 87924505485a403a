"""``flashtile bench``: three benchmarks behind one command."""

from __future__ import annotations

import argparse

from flashtile.bench import kernels_command, session
from flashtile.bench.models import command as models_command
from flashtile.bench.traffic import command as io_command


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds each benchmark and its options to the parser of ``flashtile bench``."""
    benchmarks = parser.add_subparsers(dest="benchmark", metavar="BENCHMARK", required=True)
    for module in (kernels_command, models_command, io_command):
        module.add_arguments(benchmarks).set_defaults(prepare=module.prepare)


def run(args: argparse.Namespace) -> int:
    """Runs the benchmark that ``add_arguments`` parsed; returns and raises as ``session.run``."""
    return session.run(args, args.prepare)
