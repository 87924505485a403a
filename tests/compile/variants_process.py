"""Runs a script of this folder that compiles kernels for an absent GPU, in a process of its own, and reads its report.

The process must be its own: this one's Triton may be interpreted, and another one may be of another version.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

MOST_SPILLED_BYTES = 64
NEWEST = Path(sys.prefix) / "triton-newest"
"""Where ``make`` puts the newest Triton that flashtile supports; the oldest is the environment's own."""

needs_newest = pytest.mark.skipif(not NEWEST.exists(), reason=f"no newest Triton in {NEWEST}: `make check` installs it")


def variants(script: str, *arguments: str, cache: Path, triton_path: Path | None = None) -> list[dict[str, Any]]:
    """One report per compiled variant: the JSON lines that the script prints."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    if triton_path is not None:
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(triton_path), environment.get("PYTHONPATH"))))
    command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert found, "the script compiled nothing"
    return found


def as_table(rows: Sequence[dict[str, Any]], columns: dict[str, int]) -> str:
    """The columns of all rows, aligned to the right, each with its width."""
    lines = ["".join(f"{name:>{width}}" for name, width in columns.items())]
    lines += ["".join(f"{row[name]:>{width}}" for name, width in columns.items()) for row in rows]
    return "\n".join(lines)


def check_memory(
    rows: Sequence[dict[str, Any]], table: str, *, most_shared: int, most_spilled: int = MOST_SPILLED_BYTES
) -> None:
    """Asserts that the variants hardly spill, and fit into shared memory; a failure shows the table."""
    assert all(row["spills"] <= most_spilled for row in rows), table
    assert all(row["shared"] <= most_shared for row in rows), table
