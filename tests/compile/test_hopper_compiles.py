"""Every row of the Hopper tile tables compiles for sm_90a into what the kernels' design says, and hardly spills.

No GPU is needed: a process of its own compiles for a target (``hopper_variants.py``). ``pytest -rP`` shows the figures.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from variants_process import NEWEST, as_table, check_memory, needs_newest, variants

from flashtile.spec import devices

MOST_SPILLED = 120
"""Bytes. The rows of the causal backward for 128 and for 64 spill more than 64: around their loops, which read few of
them."""
MOST_READ_IN_A_LOOP = 7
"""Words of spilled registers at one step of a loop with products: each of an instruction among some 600."""
MOST_SPILLED_WITH_OPTIONS = 1024
"""Bytes that rarer calls may spill."""
MOST_SPILLED_WHERE_SPLIT = 136
"""Bytes that plain calls may spill whose backward splits its tiles of keys."""
MOST_BESIDE_TILES = 5 * 1024
"""Bytes of shared memory beyond the tiles that the planner counts: barriers, single numbers, and what tiles of results
pass through to lie in rows."""
PRODUCTS = {
    "attention_forward": (2, 2),
    "attention_backward_narrow": (3, 2),
    "attention_backward": (4, 2),
    "attention_backward_wide": (3.5, 2),
}
"""How often a program holds a product of two tiles that is as deep, or as wide, as a head of K; and as one of V.

Forward: Q @ K.T before the loop and in it; P @ V in it and behind it. Backward: Q @ K.T, dS @ K, dS.T @ Q; d_out @ V.T,
P.T @ d_out; who is a step behind with dS @ K has it behind the loop too. What is not here multiplies no tiles.
"""
PRODUCTS_OF_TWO_LOOPS = {"attention_backward_narrow": (5, 4)}
"""The same where each product in the loop is in two of them."""
COLUMNS = {
    "variant": 24,
    "kernel": 26,
    "block_q": 9,
    "block_kv": 10,
    "registers": 11,
    "spills": 8,
    "shared": 9,
    "hgmma": 7,
    "seconds": 9,
}


def compile_all(
    variant_set: str, cache: Path, *, most_spilled: int = MOST_SPILLED, triton_path: Path | None = None
) -> list[dict[str, Any]]:
    """Compiles a set of variants, prints and checks what their kernels need and are made of."""
    found = variants("hopper_variants.py", variant_set, cache=cache, triton_path=triton_path)
    table = as_table(found, COLUMNS)
    print(table)
    for row in found:
        assert row["relaunch"], f"parameters that are not known: {row}"
        assert not row["unused_barriers"], f"memory of barriers that is given away in {row}"
        assert not row["warnings"], f"ptxas serialises the asynchronous products of {row}"
        products = PRODUCTS_OF_TWO_LOOPS if row["two_loops"] else PRODUCTS
        of_k, of_v = products.get(row["kernel"], (0, 0))
        columns = of_k * row["width"] + of_v * row["width_v"]
        assert row["multiplications"] == row["block_q"] * row["block_kv"] * columns, f"other products in {row}"
        assert variant_set != "tables" or triton_path or row["read_in_a_loop"] <= MOST_READ_IN_A_LOOP, row
    check_memory(found, table, most_shared=devices.by_name("h200").shared_memory_bytes, most_spilled=most_spilled)
    return found


def test_every_row_of_the_tables(tmp_path: Path) -> None:
    found = compile_all("tables", tmp_path)
    for has_two_loops, products in ((False, PRODUCTS), (True, PRODUCTS_OF_TWO_LOOPS)):
        assert products.keys() <= {row["kernel"] for row in found if row["two_loops"] == has_two_loops}
    for row in found:
        if row["kernel"] in PRODUCTS:
            assert 0 <= row["shared"] - row["planned_shared"] <= MOST_BESIDE_TILES, f"the planner miscounts {row}"


def test_split_keys(tmp_path: Path) -> None:
    found = compile_all("split", tmp_path, most_spilled=MOST_SPILLED)
    assert {row["kernel"] for row in found} == {"attention_forward", "attention_combine"}
    for row in found:
        if row["kernel"] == "attention_forward":
            assert 0 <= row["shared"] - row["planned_shared"] <= MOST_BESIDE_TILES, f"the planner miscounts {row}"


def test_split_queries(tmp_path: Path) -> None:
    found = compile_all("split queries", tmp_path, most_spilled=MOST_SPILLED_WITH_OPTIONS)
    backward = [row for row in found if row["kernel"].startswith("attention_backward")]
    assert {row["kernel"] for row in backward} == PRODUCTS.keys() - {"attention_forward"}
    for row in backward:
        assert row["is_split"], row
        assert "options" in row["variant"] or row["spills"] <= MOST_SPILLED_WHERE_SPLIT, row
        assert 0 <= row["shared"] - row["planned_shared"] <= MOST_BESIDE_TILES, f"the planner miscounts {row}"


@pytest.mark.parametrize("variant_set", ["options", "packed", "mixes", "long", "split mixes"])
def test_options(variant_set: str, tmp_path: Path) -> None:
    compile_all(variant_set, tmp_path, most_spilled=MOST_SPILLED_WITH_OPTIONS)


def test_a_new_length_or_batch_compiles_nothing(tmp_path: Path) -> None:
    found = compile_all("lengths", tmp_path, most_spilled=MOST_SPILLED_WITH_OPTIONS)
    of_tiles = ("kernel", "two_loops", "stores_first_rows", "is_split")
    counts = Counter((row["variant"].split()[0], *(row[name] for name in of_tiles)) for row in found)
    assert set(counts.values()) == {1}, "a length or the batch became a compile-time number"
    for of_some in ("two_loops", "is_split"):
        assert {row[of_some] for row in found} == {False, True}


@needs_newest
@pytest.mark.parametrize("variant_set", ["tables", "mixes", "split"])
def test_with_the_newest_triton(variant_set: str, tmp_path: Path) -> None:
    most_spilled = MOST_SPILLED_WITH_OPTIONS if variant_set == "mixes" else MOST_SPILLED
    compile_all(variant_set, tmp_path, most_spilled=most_spilled, triton_path=NEWEST)
