"""Every row of the Triton tile tables compiles for its GPU family, without spilling, into the memory that it has.

No GPU is needed: a process of its own compiles for a target (``triton_variants.py``). ``pytest -rP`` shows the figures.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from variants_process import NEWEST, as_table, check_memory, needs_newest, variants

from flashtile.backends.triton.tiles import FAMILIES, KERNELS

COLUMNS = {"dtype": 16, "width": 6, "column": 32, "registers": 10, "spills": 8, "shared": 9}


def compile_all(family: str, kernel: str, columns: str, path: Path | None, cache: Path) -> str:
    """Compiles the rows of the columns, checks and returns their needs as a table."""
    found = variants("triton_variants.py", family, kernel, columns, cache=cache, triton_path=path)
    table = as_table(found, COLUMNS)
    assert len(found) >= 5, table
    check_memory(found, table, most_shared=FAMILIES[family])
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


@needs_newest
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("family", ["sm_80", "sm_90", "gfx942"])
def test_every_row_fits_with_the_newest_triton(family: str, kernel: str, tmp_path: Path) -> None:
    print(compile_all(family, kernel, "0,1,2", NEWEST, tmp_path))


@needs_newest
@pytest.mark.parametrize("family", ["sm_80", "sm_90", "gfx942"])
def test_packed_sequences_with_the_newest_triton(family: str, tmp_path: Path) -> None:
    print(compile_all(family, "packed", "2", NEWEST, tmp_path))
