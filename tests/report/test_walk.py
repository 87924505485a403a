"""The tile walk's numbers: each step follows from the one before by the rule that the page explains."""

from __future__ import annotations

import json
import math
from itertools import pairwise

import pytest
import torch

from flashtile.report import walk
from flashtile.report.walk import HEAD_DIM, MASKS, SEQLEN, TILES, Step, Walk
from flashtile.spec import masks

pytestmark = pytest.mark.parametrize("name", MASKS)


def values_of(found: Walk, step: Step) -> torch.Tensor:
    return found.values[step.kv_tile_idx * TILES.block_kv : (step.kv_tile_idx + 1) * TILES.block_kv]


def test_every_step_follows_from_the_one_before_by_the_online_softmax(name: str) -> None:
    found = walk.take(name)
    for step in found.steps:
        before, after = step.before, step.after
        torch.testing.assert_close(after.row_max, torch.maximum(before.row_max, step.s.amax(dim=-1)))
        row_sum = before.row_sum * step.rescale + step.p.sum(dim=-1)
        torch.testing.assert_close(after.row_sum, row_sum)
        acc = before.out * (before.row_sum * step.rescale)[:, None] + step.p @ values_of(found, step)
        torch.testing.assert_close(after.out, acc / row_sum[:, None])


def test_rows_begin_with_nothing_and_end_exact(name: str) -> None:
    found = walk.take(name)
    for q_tile_idx in range(SEQLEN // TILES.block_q):
        steps = [step for step in found.steps if step.q_tile_idx == q_tile_idx]
        assert bool((steps[0].before.row_max == -math.inf).all()) and not steps[0].before.row_sum.any()
        for step, following in pairwise(steps):
            assert torch.equal(step.after.out, following.before.out)
            assert step.error.max() > 1e-3, "not exact before the last tile, or the walk would show nothing"
        rows = slice(q_tile_idx * TILES.block_q, (q_tile_idx + 1) * TILES.block_q)
        torch.testing.assert_close(steps[-1].after.out.double(), found.exact[rows], atol=walk.ROUNDING, rtol=0)
        assert steps[-1].error.max() < walk.ROUNDING


def test_the_walk_visits_each_tile_that_the_mask_leaves_something_of(name: str) -> None:
    found = walk.take(name)
    counted = masks.count_tiles(
        MASKS[name], seqlen_q=SEQLEN, seqlen_kv=SEQLEN, block_q=TILES.block_q, block_kv=TILES.block_kv
    )
    kinds = [kind for row in found.kinds for kind in row]
    assert (kinds.count("full"), kinds.count("partial"), kinds.count("empty")) == (
        counted.full,
        counted.partial,
        counted.empty,
    )
    visible = found.scores > -math.inf
    for q_tile_idx, row in enumerate(found.kinds):
        for kv_tile_idx, kind in enumerate(row):
            tile = visible[
                q_tile_idx * TILES.block_q : (q_tile_idx + 1) * TILES.block_q,
                kv_tile_idx * TILES.block_kv : (kv_tile_idx + 1) * TILES.block_kv,
            ]
            assert kind == ("full" if tile.all() else "partial" if tile.any() else "empty")
    assert [(step.q_tile_idx, step.kv_tile_idx) for step in found.steps] == [
        (q_tile_idx, kv_tile_idx)
        for q_tile_idx, row in enumerate(found.kinds)
        for kv_tile_idx, kind in enumerate(row)
        if kind != "empty"
    ]


def test_the_counters_end_at_the_whole_matrix_and_at_the_visited_tiles(name: str) -> None:
    found = walk.take(name)
    tile = TILES.block_q * TILES.block_kv
    assert [step.scores_computed for step in found.steps] == [tile * (idx + 1) for idx in range(len(found.steps))]
    assert found.steps[-1].scores_of_naive == SEQLEN * SEQLEN
    assert found.numbers_kept == tile + TILES.block_q * (2 + HEAD_DIM)
    assert max(step.scores_computed for step in walk.take("causal").steps) < SEQLEN * SEQLEN


def test_the_walk_is_worth_watching(name: str) -> None:
    steps = walk.take(name).steps
    later = [step for step in steps if bool((step.before.row_max > -math.inf).all())]
    assert any(bool((step.rescale < 0.7).any()) for step in later), "a maximum that rises"
    assert any(bool((step.rescale == 1).any()) for step in later), "and one that stays"


def test_json_has_every_number_and_no_infinity(name: str) -> None:
    document = json.loads(json.dumps(walk.as_json(), allow_nan=False))
    stored, found = document["walks"][name], walk.take(name)
    assert len(stored["steps"]) == len(found.steps)
    for row, step in zip(stored["steps"], found.steps, strict=True):
        assert row["s"] == [[None if x == -math.inf else x for x in line] for line in step.s.tolist()]
        assert row["out"] == step.after.out.tolist()
        assert row["row_sum"] == step.after.row_sum.tolist()
    assert stored["exact"] == found.exact.tolist()
