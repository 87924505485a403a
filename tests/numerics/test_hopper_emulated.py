"""The Hopper kernels against the float64 oracle, without the GPU: their Python is executed by ``gluon_emulator``.

What Gluon's compiler makes of them is not seen here: ``test_hopper.py`` runs that on an H200, and
``tests/compile/test_hopper_compiles.py`` looks at it.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("hopper_emulated.py")


def emulate(*arguments: str) -> tuple[int, str]:
    """(exit code, what was printed), from a process in which nothing is Triton."""
    command = [sys.executable, "-W", "ignore", str(SCRIPT), *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    return done.returncode, done.stdout


SETS = ["edges", "turns", "packed", "one query", "split", "huge", "mixes"]
SETS_WITH_GRADIENTS = [
    "gradients",
    "two loops",
    "further shares",
    "first rows",
    "split queries",
    "split queries, two loops",
]


@pytest.mark.parametrize("calls", [*SETS, *SETS_WITH_GRADIENTS])
def test_results(calls: str) -> None:
    assert emulate(calls) == (0, "")


@pytest.mark.parametrize(
    ("mistake", "calls", "message"),
    [
        ("sums are not rescaled", "huge", "out "),
        ("turns are not passed on", "turns", "everyone waits"),
        ("rows behind a sequence are not zeroed", "packed", "NaN"),
        ("the unit's reads are not waited for", "huge", "not waited for"),
        ("no fence", "huge", "without a fence"),
        ("every part has all keys", "split", "lse "),
        ("the product of S is not waited for", "huge", "may still run"),
        ("Q is given back while it is multiplied", "gradients", "whose tile a product still reads"),
        ("shares count their steps from 0", "further shares", "everyone waits"),
        ("every split begins with the same step", "split queries", "is accessed at -"),
        ("a tile too many is stored", "first rows", "q "),
        ("the counter is not set back", "huge", "the counter of shares was left at 12"),
    ],
)
def test_mistakes_are_found(mistake: str, calls: str, message: str) -> None:
    exit_code, printed = emulate("--mistake", mistake, calls)
    assert exit_code == 1
    assert message in printed
