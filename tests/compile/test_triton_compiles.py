"""Every row of the Triton tile tables compiles for its GPU family, without spilling, into the memory that it has.

No GPU is needed: a process of its own compiles for a target (``triton_variants.py``). ``pytest -rP`` shows the figures.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from variants_process import NEWEST, as_table, check_memory, needs_newest, variants

from flashtile.backends.triton.tiles import FAMILIES, KERNELS

MOST_SPILLED_BY_RARE_CALLS = 1024
"""Bytes, of kernels that have to address every element on its own, or read one number as a bias."""
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


def test_heads_of_odd_sizes(tmp_path: Path) -> None:
    """What cannot be copied ahead is stored where it is used: the way on which ptxas once forgot an address."""
    found = variants("triton_variants.py", "sm_90", "odd heads", "0", cache=tmp_path)
    check_memory(
        found, as_table(found, COLUMNS), most_shared=FAMILIES["sm_90"], most_spilled=MOST_SPILLED_BY_RARE_CALLS
    )


@pytest.mark.parametrize("family", ["sm_80", "sm_90", "gfx942"])
def test_scales_that_are_not_positive(family: str, tmp_path: Path) -> None:
    """Kernels take a bias of 0 then, and its tile the room in shared memory that a call without options has not."""
    found = variants("triton_variants.py", family, "negative scales", "0", cache=tmp_path)
    most_shared, most_spilled = FAMILIES[family], MOST_SPILLED_BY_RARE_CALLS
    check_memory(found, as_table(found, COLUMNS), most_shared=most_shared, most_spilled=most_spilled)


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
