"""What the window leaves of a tile of scores on the CPU."""

from __future__ import annotations

import math

import pytest
import torch

from flashtile.backends.cpu.addressing import sequences
from flashtile.backends.cpu.scores import ScoreRules, Tile
from flashtile.spec import masks
from flashtile.spec.operands import Operands
from flashtile.spec.problem import AttentionProblem, MaskSpec

SEQLEN_Q, SEQLEN_KV = 20, 33


@pytest.mark.parametrize("there", [1.0, math.inf, math.nan])
@pytest.mark.parametrize(("left", "right"), [(None, 0), (None, -3), (4, None), (4, 0), (6, 3)])
def test_a_hidden_pair_is_at_minus_infinity_whatever_its_score(
    left: int | None, right: int | None, there: float
) -> None:
    mask = MaskSpec(left=left, right=right)
    q, kv = torch.zeros(1, SEQLEN_Q, 2, 4), torch.zeros(1, SEQLEN_KV, 2, 4)
    operands = Operands(q=q, k=kv, v=kv)
    problem = AttentionProblem.of(
        operands, mask=mask, scale=1.0, softcap=0.0, dropout_p=0.0, gradients=frozenset(), deterministic=False
    )
    rules = ScoreRules(problem=problem, operands=operands, sequence=next(sequences(problem, operands)))
    for tile in (
        Tile(rows=slice(3, 17), cols=slice(7, 30), is_full=False),
        Tile(rows=slice(5, 19), cols=slice(9, 32), is_full=False),  # as far from the diagonal: shares the mask above
        Tile(rows=slice(0, 20), cols=slice(0, 33), is_full=False),
    ):
        q_pos, kv_pos = (torch.arange(part.start, part.stop) for part in (tile.rows, tile.cols))
        visible = masks.is_visible(mask, q_pos[:, None], kv_pos, SEQLEN_KV - SEQLEN_Q).expand(2, -1, -1)
        found = rules.biased_and_masked(torch.where(visible, 2.0, there), tile)
        torch.testing.assert_close(found, torch.where(visible, 2.0, -math.inf), rtol=0, atol=0)
