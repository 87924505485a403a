"""The Triton planner: which tiles, and what it declines, on devices that need not be here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flashtile.backends.triton import plan, tiles
from flashtile.spec import devices, sizes
from flashtile.spec.problem import AttentionProblem

H200 = devices.by_name("h200")


def posed(**changes: Any) -> AttentionProblem:
    call: dict[str, Any] = {"seqlen_q": 128, "heads_q": 4, "head_dim": 64}
    return sizes.pose(**(call | changes))


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "expected"),
    [
        (1, 1, (16, 16)),
        (24, 24, (32, 32)),
        (40, 3, (64, 64)),
        (16, 32, (32, 32)),
        (8, 40, (64, 64)),
        (128, 16, (128, 64)),
        (192, 128, (256, 128)),
        (512, 1, (512, 64)),
    ],
)
def test_tiles_below_64_are_as_wide_as_each_other(head_dim: int, head_dim_v: int, expected: tuple[int, int]) -> None:
    assert tiles.widths(posed(head_dim=head_dim, head_dim_v=head_dim_v)) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, "full"),
        ({"causal": True}, "ordinary"),
        ({"heads_kv": 1}, "full"),
        ({"bias_shape": (1, 4, 128, 128)}, "bias"),
        ({"bias_shape": (1, 4, 128, 128), "causal": True}, "bias"),
        ({"bias_shape": (1, 4, 128, 128), "window": (8, 0)}, "ordinary"),
        ({"mask_shape": (1, 1, 128, 128), "heads_kv": 1}, "ordinary"),
        ({"mask_shape": (1, 1, 128, 128), "softcap": 20.0}, "ordinary"),
        ({"has_alibi": True}, "alibi"),
        ({"has_alibi": True, "dropout_p": 0.1}, "ordinary"),
    ],
)
def test_special_cases_have_one_option_and_nothing_else(changes: dict[str, Any], expected: str) -> None:
    assert tiles.special_case(posed(**changes)) == expected


def test_a_special_row_is_used() -> None:
    found = tiles.tiles_for(posed(head_dim=128), "sm_90")["forward"]
    assert (found.block_q, found.block_kv) == (128, 128)
    assert tiles.tiles_for(posed(head_dim=128, causal=True), "sm_90")["forward"].block_kv == 64


@pytest.mark.parametrize(("version", "num_stages"), [((0, 0), 3), ((3, 6), 3), ((3, 9), 2), ((4, 0), 2)])
def test_newer_tritons_have_rows_of_their_own(
    version: tuple[int, int], num_stages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "triton_version", lambda: version)
    assert tiles.tiles_for(posed(head_dim=128, has_alibi=True), "sm_90")["backward_kv"].num_stages == num_stages
    assert tiles.tiles_for(posed(head_dim=128), "sm_90")["backward_kv"].num_stages == 3
    assert tiles.tiles_for(posed(head_dim=128, has_alibi=True), "sm_80")["backward_kv"].num_stages == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"dtype": torch.float64}, "not float64"),
        ({"head_dim": 513}, "head_dim up to 512"),
        ({"seqlen_q": 2**30 + 1}, "sequences up to"),
        ({"heads_q": 2**19}, "elements in all heads"),
    ],
)
def test_what_is_declined_and_why(changes: dict[str, Any], words: str) -> None:
    reasons = plan.rejects(posed(**changes), H200)
    assert reasons and all(words in reason for reason in reasons)
