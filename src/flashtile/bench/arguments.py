"""The options that the commands of ``flashtile bench`` share, and the types of all their options' values."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from flashtile.bench.cases import DTYPES


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """What a benchmark spends on each case unless it is told otherwise."""

    cpu_s: float
    cuda_s: float
    quick_s: float
    min_rounds: int
    quick_min_rounds: int

    def budget_s(self, args: argparse.Namespace, device: torch.device) -> float:
        """The seconds that were asked for, else the default."""
        default = self.quick_s if args.quick else {"cpu": self.cpu_s, "cuda": self.cuda_s}[device.type]
        return args.budget_s or default

    def rounds(self, args: argparse.Namespace) -> int:
        """Rounds to measure even if that takes longer."""
        return self.quick_min_rounds if args.quick else self.min_rounds


def add_shared(parser: argparse.ArgumentParser, benchmark: str, effort: Effort, *, filter_example: str) -> None:
    """Adds what every benchmark takes: the device, how long, which cases, and where the results go."""
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    parser.add_argument("--quick", action="store_true", help="a small grid with little time for each case")
    parser.add_argument(
        "--filter",
        metavar="WORDS",
        help=f"keep the cases whose label has all these words, for example {filter_example!r}",
    )
    parser.add_argument(
        "--budget-s",
        type=positive_float,
        metavar="SECONDS",
        help=f"time for each case; more makes the medians steadier (default: {effort.cpu_s:g} on a CPU, "
        f"{effort.cuda_s:g} on a GPU, {effort.quick_s:g} with --quick)",
    )
    parser.add_argument(
        "--commit",
        type=commit,
        metavar="SHA",
        help="what to record as the commit where the package lies in no git checkout; elsewhere git is believed",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help=f"results file, rewritten after every case (default: out/bench_{benchmark}_DEVICE.json; with --json, "
        "none)",
    )
    parser.add_argument("--json", action="store_true", help="print the results file instead of tables")


# --- types of values --------------------------------------------------------------------------------------------------


def dtype(text: str) -> str:
    short = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32", "fp64": "float64"}
    name = short.get(text, text)
    if name not in DTYPES:
        raise argparse.ArgumentTypeError(f"{text!r} is none of {', '.join([*DTYPES, *short])}")
    return name


def some_of(what: str, known: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    """A type for names with commas between them."""

    def parse(text: str) -> tuple[str, ...]:
        names = tuple(text.strip(",").split(","))
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not {what}; they are {', '.join(known)}")
        return names

    return parse


def commit(text: str) -> str:
    if not re.fullmatch("[0-9a-f]{40}", text):
        raise argparse.ArgumentTypeError(
            f"{text!r} is no commit; wanted the 40 hexadecimal digits of git rev-parse HEAD"
        )
    return text


def count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def positive_int(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def positive_float(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number of seconds")
    return value
