"""The Hopper planner: which tiles, what it declines and in which words, on devices that need not be here."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import flashtile
from flashtile import UnsupportedProblem, dispatch
from flashtile.backends import gpu
from flashtile.backends.hopper import constants, plan
from flashtile.spec import devices, masks, sizes
from flashtile.spec.devices import DEVICES
from flashtile.spec.problem import AttentionProblem

H200, H100 = DEVICES["h200"], DEVICES["h100"]
PLAIN: dict[str, Any] = {"seqlen_q": 1024, "heads_q": 8, "head_dim": 128}
SETTINGS = ("FLASHTILE_BACKEND", "FLASHTILE_STRICT")

TAKEN: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "float16": {"dtype": torch.float16},
    "window": {"window": (100, None)},
    "both sides of a window": {"window": (7, 3)},
    "ALiBi": {"has_alibi": True},
    "sinks": {"has_sinks": True, "gradients": ("q", "k", "v", "sinks")},
    "softcap": {"softcap": 20.0},
    "softcap, wide, inference": {"softcap": 20.0, "head_dim": 256, "gradients": ()},
    "deterministic inference": {"deterministic": True, "gradients": ()},
    "grouped heads": {"heads_kv": 2},
    "one key/value head": {"heads_kv": 1},
    "lse": {"with_lse": True},
    "head_dim 1": {"head_dim": 1},
    "head_dim 256": {"head_dim": 256},
    "head_dim 192 with 128": {"head_dim": 192, "head_dim_v": 128},
    "odd widths": {"head_dim": 33, "head_dim_v": 100},
    "one query": {"seqlen_q": 1, "seqlen_kv": 5000, "causal": True},
    "more queries than keys": {"seqlen_q": 900, "seqlen_kv": 7, "causal": True},
    "the longest": {"seqlen_q": plan.LONGEST, "heads_q": 1},
    "everything": {
        "causal": True,
        "window": (50, 0),
        "softcap": 20.0,
        "has_alibi": True,
        "has_sinks": True,
        "heads_kv": 4,
        "with_lse": True,
    },
}

DECLINED: dict[str, tuple[dict[str, Any], str]] = {
    "float32": ({"dtype": torch.float32}, "multiplies float16 and bfloat16, not float32"),
    "float64": ({"dtype": torch.float64}, "multiplies float16 and bfloat16, not float64"),
    "head_dim": ({"head_dim": 257, "head_dim_v": 64}, "takes head_dim up to 256, and head_dim is 257"),
    "head_dim_v": ({"head_dim_v": 320}, "takes head_dim up to 256, and head_dim_v is 320"),
    "seqlen_q": ({"seqlen_q": 2**30 + 1, "seqlen_kv": 8}, "up to 1,073,741,824 tokens, and seqlen_q is 1,073,741,825"),
    "seqlen_kv": ({"seqlen_kv": 2**30 + 1}, "up to 1,073,741,824 tokens, and seqlen_kv is 1,073,741,825"),
    "no query": ({"seqlen_q": 0, "seqlen_kv": 8}, "takes no empty tensors"),
    "no key": ({"seqlen_kv": 0}, "takes no empty tensors"),
    "no sequence": ({"batch": 0}, "takes no empty tensors"),
    "bias": ({"bias_shape": (1024,)}, "has no kernel with a bias"),
    "mask": ({"mask_shape": (1, 1, 1024, 1024)}, "has no kernel with a boolean mask"),
    "dropout": ({"dropout_p": 0.1}, "has no kernel with dropout"),
    "scale 0": ({"scale": 0.0}, "has no kernel with a scale that is not positive"),
    "negative scale": ({"scale": -0.5}, "has no kernel with a scale that is not positive"),
    "deterministic gradients": ({"deterministic": True}, "deterministic=True asks for a fixed one"),
    "softcap and wide": ({"softcap": 20.0, "head_dim": 192}, "no backward with a softcap for head_dim above 128"),
    "softcap and wide values": ({"softcap": 20.0, "head_dim_v": 129}, "softcap for head_dim above 128"),
}


@pytest.fixture(autouse=True)
def neutral_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SETTINGS:
        monkeypatch.delenv(name, raising=False)


def posed(**changes: Any) -> AttentionProblem:
    return sizes.pose(**(PLAIN | changes))


# --- what it takes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", [H200, H100], ids=lambda device: device.name)
@pytest.mark.parametrize("changes", TAKEN.values(), ids=TAKEN)
def test_what_is_taken(changes: dict[str, Any], device: devices.DeviceSpec) -> None:
    problem = posed(**changes)
    assert plan.rejects(problem, device) == ()
    chosen = dispatch.choose(problem, device)
    assert (chosen.backend, dict(chosen.rejected).keys()) == ("hopper", {"cpu"})
    assert chosen.reason and chosen.forward.reason and chosen.backward.reason


@pytest.mark.parametrize(("changes", "words"), DECLINED.values(), ids=DECLINED)
def test_what_is_declined_and_why(changes: dict[str, Any], words: str) -> None:
    problem = posed(**changes)
    (reason,) = plan.rejects(problem, H200)
    assert words in reason
    with pytest.raises(UnsupportedProblem) as caught:
        dispatch.choose(problem, H200, "hopper")
    assert caught.value.reasons == {"hopper": (reason,)}
    chosen = dispatch.choose(problem, H200)
    assert chosen.backend != "hopper" and dict(chosen.rejected)["hopper"] == (reason,)


def test_every_reason_is_told_at_once() -> None:
    changes = {"dtype": torch.float32, "head_dim": 512, "softcap": 3.0, "dropout_p": 0.5, "deterministic": True}
    assert len(plan.rejects(posed(**changes, mask_shape=(1024,), scale=-1.0), DEVICES["t4"])) == 9


@pytest.mark.parametrize("device", [device for name, device in DEVICES.items() if name not in ("h100", "h200")])
def test_other_devices_are_declined_by_name(device: devices.DeviceSpec) -> None:
    """Also the newer ones: wgmma, which these kernels multiply with, exists for compute capability 9.0 alone."""
    (reason,) = plan.rejects(posed(), device)
    assert "compute capability 9.0" in reason and device.name in reason
    assert dispatch.choose(posed(), device).backend != "hopper"


@pytest.mark.parametrize(("has_gpu", "has_triton"), [(True, True), (True, False), (False, True), (False, False)])
def test_a_missing_triton_is_declined_where_there_is_a_gpu(
    has_gpu: bool, has_triton: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda _name: object() if has_triton else None)
    gpu.lacks_triton.cache_clear()
    try:
        reasons = plan.rejects(posed(), H200)
    finally:
        gpu.lacks_triton.cache_clear()
    assert len(reasons) == (has_gpu and not has_triton)
    assert all("pip install triton" in reason for reason in reasons)


def test_a_call_on_this_machines_cpu_names_what_is_missing() -> None:
    q, k, v = torch.zeros(3, 1, 8, 2, 64, dtype=torch.bfloat16).unbind()
    with pytest.raises(UnsupportedProblem, match=r"hopper: runs on Hopper GPUs .*these tensors are on cpu"):
        flashtile.attention(q, k, v, backend="hopper")


# --- what a person is shown -------------------------------------------------------------------------------------------


def test_explain_shows_the_choice_on_an_h200() -> None:
    explanation = flashtile.explain(**PLAIN, causal=True, device="h200")
    assert [verdict.backend for verdict in explanation.verdicts if verdict.is_chosen] == ["hopper"]
    assert "kernel hopper/forward" in str(explanation) and "kernel hopper/backward" in str(explanation)


@pytest.mark.parametrize("name", ["float32", "bias", "mask", "dropout", "deterministic gradients", "softcap and wide"])
def test_explain_shows_why_triton_runs_instead(name: str) -> None:
    changes, words = DECLINED[name]
    explanation = flashtile.explain(**(PLAIN | changes), device="h200")
    assert [verdict.backend for verdict in explanation.verdicts if verdict.is_chosen] == ["triton"]
    (declined,) = [verdict for verdict in explanation.verdicts if verdict.backend == "hopper"]
    assert any(words in reason for reason in declined.reasons)
    assert words in " ".join(str(explanation).split())


# --- tiles ------------------------------------------------------------------------------------------------------------


def test_the_tables_have_a_row_for_every_problem() -> None:
    found = {max(plan.widths(posed(head_dim=head_dim))) for head_dim in range(1, plan.LARGEST_HEAD_DIM + 1)}
    assert set(plan._FORWARD) == {(width, is_causal) for width in found for is_causal in (False, True)}
    kernels = {
        plan.backward_kernel(posed(head_dim=width, softcap=softcap)) for width in found for softcap in (0.0, 20.0)
    }
    assert set(plan._BACKWARD) == {(kernel, is_causal) for kernel in kernels for is_causal in (False, True)}
    for steps in (*plan._FORWARD.values(), *plan._BACKWARD.values()):
        lengths = [longest for longest, _ in steps]
        assert lengths == sorted(set(lengths)) and lengths[-1] == plan.LONGEST


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_the_plan_is_the_tables_row(head_dim: int, is_causal: bool) -> None:
    made = plan.plan(posed(head_dim=head_dim, causal=is_causal, seqlen_q=100), H200)
    assert made.forward.tiles is plan._FORWARD[head_dim, is_causal][0][1]
    backward = plan._BACKWARD[plan.backward_kernel(posed(head_dim=head_dim)), is_causal]
    assert made.backward.tiles is backward[0][1]
    narrower = posed(head_dim=head_dim - 1, head_dim_v=5, causal=is_causal, seqlen_q=100)
    assert plan.plan(narrower, H200).forward.tiles == made.forward.tiles
    for longest, tiles in plan._FORWARD[head_dim, is_causal]:
        longer = posed(head_dim=head_dim, causal=is_causal, seqlen_q=longest)
        assert plan.plan(longer, H200).forward.tiles is tiles
    for longest, tiles in backward:
        longer = posed(head_dim=head_dim, causal=is_causal, seqlen_q=longest, batch=64)  # too many to be split
        assert plan.plan(longer, H200).backward.tiles is tiles


@pytest.mark.parametrize(
    ("head_dim", "head_dim_v", "expected"),
    [(1, 1, (64, 64)), (64, 65, (64, 128)), (100, 8, (128, 64)), (192, 128, (256, 128)), (256, 129, (256, 256))],
)
def test_tiles_are_as_wide_as_the_next_power_of_two(head_dim: int, head_dim_v: int, expected: tuple[int, int]) -> None:
    assert plan.widths(posed(head_dim=head_dim, head_dim_v=head_dim_v)) == expected


@pytest.mark.parametrize("tiles", [tiles for steps in plan._FORWARD.values() for _, tiles in steps], ids=str)
def test_tiles_of_queries_are_whole_consumers(tiles: plan.ForwardTiles) -> None:
    assert tiles.num_consumers * constants.ROWS == tiles.block_q
    block = tiles.block_q
    for seqlen, expected in ((1, 1), (block - 1, 1), (block, 1), (block + 1, 2), (7 * block + 1, 8)):
        assert plan.num_shares(posed(seqlen_q=seqlen, batch=3), tiles) == expected * 8 * 3


@pytest.mark.parametrize("seqlen_kv", [1, 64, 65, 128, 129, 5000])
@pytest.mark.parametrize("head_dim", [128, 256])
def test_the_backward_has_a_program_for_each_tile_of_keys(head_dim: int, seqlen_kv: int) -> None:
    problem = posed(batch=3, heads_q=8, heads_kv=2, head_dim=head_dim, seqlen_kv=seqlen_kv)
    kernel = plan.plan(problem, H200).backward
    assert isinstance(kernel.tiles, plan.BackwardTiles)
    per_tile = 3 * 2 * kernel.tiles.num_splits
    num_tiles = kernel.grid[0] // per_tile
    assert kernel.grid == (num_tiles * per_tile,)
    assert (num_tiles - 1) * kernel.tiles.block_kv < seqlen_kv <= num_tiles * kernel.tiles.block_kv


@pytest.mark.parametrize(("seqlen_kv", "expected"), [(1, 6), (128, 6), (129, 12), (22 * 128, 132), (5000, 132)])
def test_programs_of_narrow_heads_take_further_tiles_of_keys(seqlen_kv: int, expected: int) -> None:
    problem = posed(batch=3, heads_q=2, head_dim=64, seqlen_q=100, seqlen_kv=seqlen_kv)  # too few queries to be split
    assert plan.plan(problem, H200).backward.grid == (expected,)


def test_tiles_of_64_keys_are_for_few_queries_and_keys() -> None:
    def block_kv(**changes: int) -> int:
        return plan.plan(
            posed(**({"head_dim": 64, "causal": True, "seqlen_q": 512} | changes)), H200
        ).forward.tiles.block_kv

    assert block_kv() == block_kv(seqlen_q=300) == 64
    assert block_kv(seqlen_kv=513) == block_kv(seqlen_q=513, seqlen_kv=512) == block_kv(causal=False) == 128


@pytest.mark.parametrize("seqlen", [1, 700, 16384])
@pytest.mark.parametrize("batch", [1, 40])
def test_the_forward_never_has_more_programs_than_shares_or_multiprocessors(batch: int, seqlen: int) -> None:
    problem = posed(batch=batch, seqlen_q=seqlen)
    kernel = plan.plan(problem, H200).forward
    num_shares = -(-seqlen // kernel.tiles.block_q) * 8 * batch
    assert 1 <= kernel.grid[0] <= min(num_shares, H200.num_sms)


@pytest.mark.parametrize("heads_per_kv", [2, 8, 200])
@pytest.mark.parametrize("changes", [{}, {"causal": True}, {"softcap": 3.0, "with_lse": True}], ids=str)
def test_for_one_query_heads_that_share_keys_are_rows(changes: dict[str, Any], heads_per_kv: int) -> None:
    problem = posed(batch=3, heads_q=4 * heads_per_kv, heads_kv=4, seqlen_q=1, seqlen_kv=5000, **changes)
    computed = plan.forward_problem(problem)
    sizes = (computed.batch, computed.seqlen_q, computed.heads_q, computed.heads_kv, computed.heads_per_kv)
    assert sizes == (3, heads_per_kv, 4, 4, 1)
    kernel = plan.plan(problem, H200).forward
    assert isinstance(kernel.tiles, plan.ForwardTiles)
    num_shares = -(-heads_per_kv // kernel.tiles.block_q) * 4 * 3 * kernel.tiles.num_splits
    assert kernel.grid == (min(num_shares, H200.num_sms),)
    assert f"{heads_per_kv} heads that share K and V are rows" in kernel.reason


@pytest.mark.parametrize(
    "changes",
    [
        {"seqlen_q": 2},
        {"heads_kv": 8},
        {"has_alibi": True},
        {"has_sinks": True},
        {"window": (100, None)},
    ],
    ids=str,
)
def test_what_tells_heads_or_positions_apart_is_computed_as_it_is(changes: dict[str, Any]) -> None:
    problem = posed(**{"seqlen_q": 1, "seqlen_kv": 500, "heads_kv": 2, **changes})
    assert plan.forward_problem(problem) is problem
    assert "rows of a tile" not in plan.plan(problem, H200).forward.reason


# --- few queries, many keys -------------------------------------------------------------------------------------------


def parts(**changes: Any) -> int:
    """Into how many parts the plan for an H200 cuts the keys."""
    tiles = plan.plan(posed(**(PLAIN | changes)), H200).forward.tiles
    assert isinstance(tiles, plan.ForwardTiles)
    return tiles.num_splits


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"seqlen_kv": 16384}, 16),
        ({"seqlen_kv": 16385}, 15),  # 129 tiles, 9 in each part
        ({"seqlen_kv": 4096}, 8),  # of 512 keys
        ({"seqlen_kv": 16384, "causal": True}, 16),
        ({"seqlen_kv": 16384, "head_dim": 256}, 16),
        ({"seqlen_kv": 16384, "head_dim": 40}, 16),
        ({"seqlen_kv": 16384, "has_sinks": True, "heads_q": 8}, 16),
        ({"seqlen_kv": 16384, "has_sinks": True}, 4),  # 32 shares, of whose heads none are rows of a tile
        ({"seqlen_kv": 2**20, "heads_q": 1, "heads_kv": 1}, 131),  # 8,192 tiles, 63 in each part
        ({"seqlen_kv": 16384, "seqlen_q": 128, "heads_q": 8}, 8),  # of 16 keys for each query
        ({"seqlen_kv": 16384, "seqlen_q": 64, "heads_q": 8}, 16),
        ({"seqlen_kv": 16384, "seqlen_q": 64, "heads_q": 8, "window": (900, 100)}, 1),
        ({"seqlen_kv": 16384, "seqlen_q": 64, "heads_q": 8, "window": (9000, 100)}, 8),
    ],
    ids=str,
)
def test_how_many_parts_keys_are_cut_into(changes: dict[str, Any], expected: int) -> None:
    assert parts(**({"seqlen_q": 1, "heads_q": 32, "heads_kv": 8} | changes)) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"seqlen_kv": 512},
        {"seqlen_kv": 2047},
        {"seqlen_kv": 16384, "heads_q": 67, "heads_kv": 67},
        {"seqlen_kv": 16384, "seqlen_q": 1100, "heads_q": 8},
        {"seqlen_kv": 4096, "seqlen_q": 128, "heads_q": 8},
    ],
    ids=str,
)
def test_keys_of_short_sequences_and_of_many_shares_are_not_split(changes: dict[str, Any]) -> None:
    assert parts(**({"seqlen_q": 1, "heads_q": 8, "heads_kv": 8} | changes)) == 1


def test_keys_of_packed_sequences_are_not_split() -> None:
    q, k = (torch.zeros(tokens, 8, 128, dtype=torch.bfloat16, device="meta") for tokens in (4, 40000))
    boundaries = torch.zeros(5, dtype=torch.int32, device="meta")
    explanation = flashtile.explain(
        q, k, k, cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries, max_seqlen_q=1, max_seqlen_kv=20000
    )
    tiles = plan.plan(explanation.problem, H200).forward.tiles
    assert isinstance(tiles, plan.ForwardTiles) and tiles.num_splits == 1


@pytest.mark.parametrize("seqlen_q", [1, 3, 100, 700])
@pytest.mark.parametrize("seqlen_kv", [700, 5000, 40000])
def test_a_batch_is_split_as_one_sequence_is(seqlen_kv: int, seqlen_q: int) -> None:
    """Else a sequence's result would depend on how many there are beside it."""
    sizes = {"seqlen_q": seqlen_q, "seqlen_kv": seqlen_kv}
    assert {parts(batch=batch, **sizes) for batch in (1, 2, 17, 1000)} == {parts(**sizes)}


@pytest.mark.parametrize("seqlen_q", [1, 2, 64, 128, 500])
@pytest.mark.parametrize("seqlen_kv", [600, 1024, 5000, 16384, 2**20])
@pytest.mark.parametrize("heads", [1, 3, 8, 66])
def test_no_part_is_short_and_shares_of_a_sequence_fit_on_the_gpu(heads: int, seqlen_kv: int, seqlen_q: int) -> None:
    problem = posed(heads_q=heads, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv)
    tiles = plan.plan(problem, H200).forward.tiles
    assert isinstance(tiles, plan.ForwardTiles)
    num_tiles = -(-seqlen_kv // tiles.block_kv)
    tiles_of_a_part = -(-num_tiles // tiles.num_splits)
    if tiles.num_splits > 1:
        assert plan.num_shares(problem, tiles) <= H200.num_sms
        assert tiles_of_a_part * tiles.block_kv >= max(512, 16 * min(seqlen_q, tiles.block_q))
        assert (tiles.num_splits - 1) * tiles_of_a_part < num_tiles


def test_the_plan_says_that_keys_are_split_and_what_puts_them_together() -> None:
    shape: dict[str, Any] = {
        "batch": 2,
        "seqlen_q": 1,
        "seqlen_kv": 16384,
        "heads_q": 32,
        "heads_kv": 8,
        "head_dim": 128,
    }
    explanation = flashtile.explain(**shape, gradients=(), device="h200")
    assert explanation.plan is not None
    forward = explanation.plan.forward
    assert forward.grid == (132,) and "keys in 16 parts" in forward.reason
    (combine,) = forward.companions
    assert (combine.kernel, combine.grid) == ("combine", (2, 8, 4))
    assert forward.shared_memory_bytes < plan.plan(posed(), H200).forward.shared_memory_bytes  # no tile of the output
    assert "forward: kernel hopper/combine, tiles 1 x 32, grid 2 x 8 x 4" in str(explanation)
    held = {term.what: term.num_bytes for term in explanation.costs[0].tiled.extra}
    assert held["out, lse of parts"] == 16 * 2 * 32 * 129 * 4
    assert not plan.plan(posed(), H200).forward.companions


@pytest.mark.parametrize(("seqlen_q", "rows"), [(1, 1), (15, 1), (16, 4), (128, 4)])
def test_many_rows_are_combined_several_at_a_time(seqlen_q: int, rows: int) -> None:
    """The same compiled kernel for any number of parts, or a new length would compile one."""
    for seqlen_kv in (8192, 16384, 2**20):
        (combine,) = plan.plan(posed(seqlen_q=seqlen_q, seqlen_kv=seqlen_kv), H200).forward.companions
        assert (combine.tiles.block_q, combine.tiles.block_kv) == (rows, 32 // rows)
        assert combine.grid == (1, 8, -(-seqlen_q // rows))


# --- short calls ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "chosen"),
    [
        ({"seqlen_q": 128, "seqlen_kv": 128, "causal": True}, "triton"),
        ({"seqlen_q": 129, "seqlen_kv": 129, "causal": True}, "hopper"),
        ({"seqlen_q": 64, "seqlen_kv": 128}, "triton"),
        ({"seqlen_q": 65, "seqlen_kv": 128}, "hopper"),
        ({"seqlen_q": 1, "seqlen_kv": 129}, "hopper"),
        ({"seqlen_q": 128, "seqlen_kv": 128, "head_dim": 64, "head_dim_v": 64}, "triton"),
        ({"seqlen_q": 64, "seqlen_kv": 64, "head_dim": 256, "head_dim_v": 256}, "hopper"),
        ({"seqlen_q": 64, "seqlen_kv": 64, "softcap": 5.0, "gradients": ()}, "hopper"),
        ({"seqlen_q": 64, "seqlen_kv": 64, "has_sinks": True}, "hopper"),
    ],
    ids=str,
)
def test_short_calls_are_tritons(changes: dict[str, Any], chosen: str) -> None:
    problem = posed(**changes)
    made = [dispatch.choose(replace(problem, batch=batch), H200) for batch in (1, 100)]
    assert [each.backend for each in made] == [chosen, chosen]
    assert dispatch.choose(problem, H200, "hopper").backend == "hopper"
    assert dict(made[0].rejected).keys() == {"cpu"}
    verdicts = dispatch.fastest_first(problem)
    assert (verdicts.index("triton") < verdicts.index("hopper")) == (chosen == "triton")
    assert sorted(verdicts) == sorted(dispatch.BACKENDS)


# --- the backward -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tiles", [tiles for steps in plan._BACKWARD.values() for _, tiles in steps], ids=str)
def test_the_backward_works_on_tiles_of_one_warpgroups_rows(tiles: plan.BackwardTiles) -> None:
    """The statistics of the backward come in whole blocks of rows."""
    assert tiles.block_q == constants.ROWS and tiles.block_kv % constants.ROWS == 0
    assert constants.STATISTICS_ROWS % tiles.block_q == 0


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"seqlen_q": 8192, "heads_q": 1}, 2),  # 64 tiles
        ({"seqlen_q": 8192, "heads_q": 1, "head_dim": 64}, 2),
        ({"seqlen_q": 8192, "heads_q": 2}, 1),  # as many tiles as SMs
        ({"seqlen_q": 2048, "heads_q": 32, "heads_kv": 8, "causal": True}, 2),  # the longest share has twice the mean
        ({"seqlen_q": 2048, "heads_q": 32, "heads_kv": 8, "causal": True, "batch": 3}, 1),
        ({"seqlen_q": 2048, "heads_q": 32, "heads_kv": 8, "causal": True, "has_alibi": True}, 2),
        ({"seqlen_q": 512, "heads_q": 8}, 1),  # eight steps each
        ({"seqlen_q": 20000, "seqlen_kv": 64, "heads_q": 1}, 8),
        ({"seqlen_q": 64, "seqlen_kv": 20000, "heads_q": 1}, 1),
    ],
)
def test_tiles_are_split_where_sms_would_have_nothing_to_do(changes: dict[str, Any], expected: int) -> None:
    made = plan.plan(posed(**changes), H200).backward
    assert isinstance(made.tiles, plan.BackwardTiles)
    assert made.tiles.num_splits == expected
    assert (f"the queries of a tile in {expected} parts" in made.reason) == (expected > 1)


def test_packed_sequences_are_not_split() -> None:
    q = torch.zeros(8192, 1, 128, dtype=torch.bfloat16, device="meta", requires_grad=True)
    boundaries = torch.zeros(2, dtype=torch.int32, device="meta")
    problem = flashtile.explain(
        q, q, q, cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries, max_seqlen_q=8192, max_seqlen_kv=8192
    ).problem
    tiles = plan.plan(problem, H200).backward.tiles
    assert isinstance(tiles, plan.BackwardTiles) and tiles.num_splits == 1


@settings(max_examples=100, deadline=None)
@given(
    seqlen_q=st.integers(1, 9000),
    seqlen_kv=st.integers(1, 9000),
    window=st.tuples(*[st.one_of(st.none(), st.integers(0, 3000))] * 2),
    heads_kv=st.integers(1, 4),
    heads_per_kv=st.integers(1, 4),
    head_dim=st.sampled_from([64, 128, 256]),
)
def test_splits_are_neither_too_short_nor_too_many(
    seqlen_q: int,
    seqlen_kv: int,
    window: tuple[int | None, int | None],
    heads_kv: int,
    heads_per_kv: int,
    head_dim: int,
) -> None:
    heads = {"heads_q": heads_kv * heads_per_kv, "heads_kv": heads_kv}
    problem = posed(seqlen_q=seqlen_q, seqlen_kv=seqlen_kv, window=window, head_dim=head_dim, **heads)
    made = plan.plan(problem, H200).backward
    assert isinstance(made.tiles, plan.BackwardTiles)
    steps = plan.steps_of_tiles(problem, made.tiles)
    num_splits, num_shares = made.tiles.num_splits, len(steps) * heads_kv
    assert num_splits == 1 or max(steps) >= plan.FEWEST_STEPS * num_splits
    assert num_splits == 1 or num_shares <= plan.MOST_SHARES_PER_SM * H200.num_sms
    assert made.grid[0] in (num_shares * num_splits, H200.num_sms)


# --- the L2 cache -----------------------------------------------------------------------------------------------------


def order_of_heads(problem: AttentionProblem) -> tuple[int, int]:
    tiles = plan.plan(problem, H200).forward.tiles
    assert isinstance(tiles, plan.ForwardTiles)
    return plan.order_of_heads(problem, tiles, H200)


def test_without_causality_heads_are_not_grouped() -> None:
    assert order_of_heads(posed()) == (0, 1)
    assert order_of_heads(posed(window=(100, None))) == (0, 1)


@pytest.mark.parametrize("seqlen_kv", [1, 1000, 16384, 131072, 2**20])
@pytest.mark.parametrize("seqlen_q", [16, 2000])
@pytest.mark.parametrize(("heads_q", "heads_kv"), [(16, 16), (16, 2), (16, 1)])
def test_the_keys_and_values_of_a_group_fit_into_the_cache(
    heads_q: int, heads_kv: int, seqlen_q: int, seqlen_kv: int
) -> None:
    """Short calls take a quarter of it."""
    changes: dict[str, Any] = {"heads_q": heads_q, "heads_kv": heads_kv, "seqlen_q": seqlen_q, "seqlen_kv": seqlen_kv}
    alone, group = order_of_heads(posed(batch=4, head_dim=64, causal=True, **changes))
    cache = H200.l2_bytes // (4 if seqlen_q <= 1024 else 1)
    bytes_per_kv_head = seqlen_kv * 2 * 64 * 2
    num_kv_heads = -(-group // (heads_q // heads_kv))
    assert alone == 0 and 1 <= group <= 4 * heads_q
    assert num_kv_heads == 1 or num_kv_heads * bytes_per_kv_head <= cache
    fits_whole = 4 * heads_kv * bytes_per_kv_head <= cache // 2
    assert group == 4 * heads_q or not fits_whole


@pytest.mark.parametrize(("head_dim", "seqlen"), [(128, 1025), (128, 16384), (256, 2), (256, 1024), (256, 2**20)])
@pytest.mark.parametrize("batch", [1, 100])
def test_heads_that_come_one_by_one_end_with_two_tiles_for_each_multiprocessor(
    batch: int, head_dim: int, seqlen: int
) -> None:
    alone, group = order_of_heads(posed(batch=batch, head_dim=head_dim, seqlen_q=seqlen, causal=True))
    assert alone + group == batch * 8 and group >= 1
    num_tiles = -(-seqlen // 128)
    assert alone == 0 or group * num_tiles >= 2 * H200.num_sms
    assert group <= 2 or (group - 2) * num_tiles < 2 * H200.num_sms


@pytest.mark.parametrize("num_kv_tiles", [1, 4, 32, 131, 132, 133, 10_000])
@pytest.mark.parametrize("batch", [1, 100])
def test_the_backward_ends_with_heads_that_give_every_multiprocessor_a_tile(batch: int, num_kv_tiles: int) -> None:
    problem = posed(batch=batch, heads_q=8, heads_kv=2, causal=True)
    together = plan.heads_together(problem, num_kv_tiles, H200)
    assert 1 <= together <= 2 * batch
    assert together == 2 * batch or together * num_kv_tiles >= H200.num_sms
    assert together == 1 or (together - 1) * num_kv_tiles < H200.num_sms
    assert plan.heads_together(posed(batch=batch), num_kv_tiles, H200) == 1


@settings(max_examples=300, deadline=None)
@given(
    seqlen_q=st.integers(1, 400),
    seqlen_kv=st.integers(1, 400),
    window=st.tuples(*[st.one_of(st.none(), st.integers(0, 300))] * 2),
    is_causal=st.booleans(),
    head_dim=st.sampled_from([64, 128, 256]),
)
def test_rows_whose_gradient_is_stored_belong_to_the_first_tile_of_keys(
    seqlen_q: int, seqlen_kv: int, window: tuple[int | None, int | None], is_causal: bool, head_dim: int
) -> None:
    """Each tile of them is visited with that tile of keys, and with no other."""
    problem = posed(seqlen_q=seqlen_q, seqlen_kv=seqlen_kv, window=window, causal=is_causal, head_dim=head_dim)
    tiles = plan.plan(problem, H200).backward.tiles
    assert isinstance(tiles, plan.BackwardTiles)
    num_rows = plan.num_stored_rows(problem, tiles)
    assert (num_rows is not None) == tiles.stores_first_rows
    for key_tile in range(-(-seqlen_kv // tiles.block_kv)):
        begin = key_tile * tiles.block_kv
        visited = masks.q_tiles(
            problem.mask,
            seqlen_q=seqlen_q,
            seqlen_kv=seqlen_kv,
            kv_begin=begin,
            kv_end=min(begin + tiles.block_kv, seqlen_kv),
            block_q=tiles.block_q,
        )
        for tile_idx in range(-(-min(num_rows or 0, seqlen_q) // tiles.block_q)):
            assert (visited.begin <= tile_idx < visited.end) == (key_tile == 0)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"head_dim": 64}, None),
        ({"head_dim": 64, "causal": True}, 128),
        ({"causal": True, "seqlen_q": 512}, 128),
        ({"causal": True, "seqlen_q": 513}, None),
        ({"head_dim": 256}, 0),
        ({"head_dim": 256, "causal": True}, 64),
        ({"head_dim": 256, "seqlen_kv": 64}, 1024),
        ({"head_dim": 256, "causal": True, "seqlen_kv": 1023}, 0),
        ({"head_dim": 64, "causal": True, "seqlen_kv": 1025}, 64),
        ({"head_dim": 64, "window": (0, 70)}, 0),
        ({"head_dim": 64, "window": (0, 64)}, 64),
    ],
)
def test_how_many_rows_are_stored(changes: dict[str, Any], expected: int | None) -> None:
    problem = posed(**changes)
    tiles = plan.plan(problem, H200).backward.tiles
    assert isinstance(tiles, plan.BackwardTiles)
    assert plan.num_stored_rows(problem, tiles) == expected


# --- shared memory ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("head_dim_v", [64, 128, 256])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_tiles_fit_into_shared_memory(head_dim: int, head_dim_v: int, is_causal: bool) -> None:
    """``tests/compile/test_hopper_compiles.py`` holds the planner's figure against the compiled kernel's."""
    made = plan.plan(posed(head_dim=head_dim, head_dim_v=head_dim_v, causal=is_causal), H200)
    tiles = made.forward.tiles
    assert isinstance(tiles, plan.ForwardTiles)
    at_least = tiles.block_q * head_dim + tiles.num_stages * tiles.block_kv * (head_dim + head_dim_v)
    assert 2 * at_least <= made.forward.shared_memory_bytes < H200.shared_memory_bytes


def test_packed_sequences_are_taken() -> None:
    q = torch.zeros(100, 8, 128, dtype=torch.bfloat16, device="meta")
    boundaries = torch.zeros(3, dtype=torch.int32, device="meta")
    explanation = flashtile.explain(
        q, q, q, cu_seqlens_q=boundaries, cu_seqlens_kv=boundaries, max_seqlen_q=60, max_seqlen_kv=60
    )
    assert explanation.problem.layout == "varlen"
    assert plan.rejects(explanation.problem, H200) == ()


def test_causality_is_what_the_specification_makes_of_the_call() -> None:
    """One query at the end sees every key, causal or not: the planner goes by what can be seen."""
    one_query = posed(seqlen_q=1, seqlen_kv=500, causal=True)
    assert one_query.mask.right is None
    assert plan.plan(one_query, H200).forward.tiles is plan._FORWARD[128, False][0][1]
