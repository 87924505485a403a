"""Every row of the Triton tile tables compiles for its GPU family, without spilling, into the memory that it has.

No GPU is needed: a process of its own compiles for a target (``triton_variants.py``). ``pytest -rP`` shows the figures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flashtile.backends.triton.tiles import FAMILIES, KERNELS

MOST_SPILLED_BYTES = 64
SCRIPT = Path(__file__).with_name("triton_variants.py")
NEWEST = Path(sys.prefix) / "triton-newest"
"""Where ``make`` puts the newest Triton that flashtile supports; the oldest is the environment's own."""


def compile_all(family: str, kernel: str, columns: str, path: Path | None, cache: Path) -> str:
    """Compiles the rows of the columns, checks and returns their needs as a table."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    command = [sys.executable, str(SCRIPT), family, kernel, columns]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) >= 5, done.stdout
    lines = [f"{'inputs':<16}{'width':>6}{'column':>16}{'registers':>10}{'spills':>8}{'shared':>9}"]
    lines += [
        f"{row['dtype']:<16}{row['width']:>6}{row['column']:>16}{row['registers']:>10}{row['spills']:>8}{row['shared']:>9}"
        for row in found
    ]
    table = "\n".join(lines)
    assert all(row["spills"] <= MOST_SPILLED_BYTES for row in found), table
    assert all(row["shared"] <= FAMILIES[family] for row in found), table
    return table


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", ["sm_80", "sm_90", "gfx942"])
def test_every_row_fits(family: str, kernel: str, tmp_path: Path) -> None:
    print(compile_all(family, kernel, "0,1,2", None, tmp_path))


def test_every_subset_of_the_options(tmp_path: Path) -> None:
    """Triton 3.6 forgot compile-time numbers of some options where others were missing; the interpreter does not."""
    print(compile_all("sm_90", "mixes", "0", None, tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_sequences_with_every_option(family: str, tmp_path: Path) -> None:
    print(compile_all(family, "packed", "2", None, tmp_path))


@pytest.mark.skipif(not NEWEST.exists(), reason=f"no newest Triton in {NEWEST}: `make check` installs it")
@pytest.mark.parametrize("family", ["sm_80", "sm_90", "gfx942"])
def test_packed_sequences_with_the_newest_triton(family: str, tmp_path: Path) -> None:
    print(compile_all(family, "packed", "2", NEWEST, tmp_path))
