"""Every number in the text of the explanation, computed by the code that the text explains."""

from __future__ import annotations

import math
from typing import Any, TypedDict

import torch

import flashtile
from flashtile.backends.base import Plan, Saved, TileConfig
from flashtile.backends.cpu import tiled
from flashtile.backends.cpu.plan import TILES as CPU_TILES
from flashtile.backends.triton.tiles import GpuTiles
from flashtile.explain import Explanation
from flashtile.explain.remarks import CALL_S
from flashtile.report import walk
from flashtile.report.walk import TILES, Walk
from flashtile.spec import accounting, dropout, masks, sizes
from flashtile.spec.accounting import Comparison
from flashtile.spec.operands import Operands
from flashtile.spec.problem import MaskSpec
from flashtile.testing import Call, make_tensor, reference

HEADS, TOKENS, HEAD_DIM, DEVICE = 16, 4096, 128, "h200"
"""The problem that most of the text is about; bfloat16, no mask."""

LENGTHS = (128, 512, 1024, 4096, 16384, 65536)
LAYER_WIDTH = HEADS * HEAD_DIM
PACKED_LENGTHS = (4096, 1500, 700, 300)
SHARES, SPEEDUPS = (0.1, 0.3, 0.5, 0.7, 0.9), (2.0, 4.0, 8.0, math.inf)
QUERY = 6
"""The row of the tile walk that the text follows."""


def facts() -> dict[str, Any]:
    """What ``explanation.md`` names."""
    explained = _explain(TOKENS)
    forward, backward = explained.costs
    return {
        "problem": explained.problem,
        "device": explained.device,
        "forward": forward,
        "backward": backward,
        **_traffic(explained, forward),
        "example": _example(),
        "walk": {"seqlen": walk.SEQLEN, "block_q": TILES.block_q, "block_kv": TILES.block_kv},
        **_tiling(explained),
        "lengths": [_length(_explain(tokens)) for tokens in LENGTHS],
        "call_s": CALL_S,
        "layer_width": LAYER_WIDTH,
        "amdahl": _amdahl(),
        **_recomputation(explained, backward),
        "gradient_tolerance": _checked_gradients(),
        **_masks(),
        "packed": _packed(),
        "dropout": _dropout(),
        "merge": _merge(),
    }


def _explain(tokens: int, **options: Any) -> Explanation:
    # Named, because what "auto" means can be set for a process.
    return flashtile.explain(
        seqlen_q=tokens, heads_q=HEADS, head_dim=HEAD_DIM, device=DEVICE, backend="triton", **options
    )


def _plan(explained: Explanation) -> Plan:
    assert explained.plan is not None, "the Triton backend takes these problems on every machine"
    return explained.plan


# --- time and memory --------------------------------------------------------------------------------------------------


def _traffic(explained: Explanation, forward: Comparison) -> dict[str, Any]:
    device, scores = explained.device, accounting.score_matrix_bytes(explained.problem)
    score_traffic = 4 * scores  # written, read by the softmax, written as probabilities, read again
    return {
        "score_bytes": scores,
        "score_numbers": TOKENS * TOKENS,
        "operand_numbers": TOKENS * HEAD_DIM,
        "score_traffic": score_traffic,
        "score_share": score_traffic / forward.naive.traffic_bytes,
        "naive_steps": [
            {"what": term.what, "num_bytes": term.num_bytes, "seconds": term.num_bytes / device.bytes_per_s}
            for term in forward.naive.traffic
        ],
        "balance": device.flops_per_s(explained.problem.dtype) / device.bytes_per_s,
        "naive_intensity": forward.naive.flops / forward.naive.traffic_bytes,
        "tiled_intensity": forward.tiled.flops / forward.tiled.traffic_bytes,
    }


def _tiling(explained: Explanation) -> dict[str, Any]:
    problem, plan = explained.problem, _plan(explained)
    tiles, itemsize, sum_itemsize = plan.forward.tiles, problem.dtype.itemsize, problem.accumulation_dtype.itemsize
    assert isinstance(tiles, GpuTiles)
    streamed = (tiles.num_stages, tiles.block_kv, HEAD_DIM)
    held = (
        ("a tile of q", (tiles.block_q, HEAD_DIM), itemsize, "shared memory"),
        (f"{tiles.num_stages} tiles of k, one in use, the next on its way", streamed, itemsize, "shared memory"),
        (f"{tiles.num_stages} tiles of v", streamed, itemsize, "shared memory"),
        ("a tile of scores, which becomes p", (tiles.block_q, tiles.block_kv), sum_itemsize, "registers"),
        ("acc", (tiles.block_q, HEAD_DIM), sum_itemsize, "registers"),
        ("row_max and row_sum", (2, tiles.block_q), sum_itemsize, "registers"),
    )
    return {
        "tiles": tiles,
        "on_chip": [
            {
                "what": what,
                "numbers": " × ".join(map(str, shape)),
                "num_bytes": math.prod(shape) * item_bytes,
                "where": where,
            }
            for what, shape, item_bytes, where in held
        ],
        "shared_memory": plan.forward.shared_memory_bytes,
        "num_q_tiles": -(-TOKENS // tiles.block_q),
        "kv_bytes": 2 * TOKENS * HEAD_DIM * itemsize,
        "cpu_tiles": CPU_TILES,
    }


def _length(explained: Explanation) -> dict[str, Any]:
    problem, forward = explained.problem, explained.costs[0]
    tokens = problem.seqlen_q
    return {
        "tokens": tokens,
        "score_bytes": accounting.score_matrix_bytes(problem),
        "naive_bytes": forward.naive.traffic_bytes,
        "tiled_bytes": forward.tiled.traffic_bytes,
        "naive_s": forward.naive_time.seconds,
        "tiled_s": forward.tiled_time.seconds,
        "ratio": forward.naive_time.seconds / forward.tiled_time.seconds,
        "share": forward.useful_flops / (forward.useful_flops + _flops_of_other_products(tokens)),
    }


def _flops_of_other_products(tokens: int) -> int:
    """Of a transformer layer beside attention: four square projections, and an MLP that is four times as wide."""
    return 2 * tokens * (4 + 2 * 4) * LAYER_WIDTH**2


def _amdahl() -> dict[str, Any]:
    return {
        "speedups": ["infinitely fast" if math.isinf(speedup) else f"{speedup:g}x as fast" for speedup in SPEEDUPS],
        "rows": [
            {"share": share, "wholes": [1 / (1 - share + share / speedup) for speedup in SPEEDUPS]} for share in SHARES
        ],
    }


def _recomputation(explained: Explanation, backward: Comparison) -> dict[str, Any]:
    problem, device = explained.problem, explained.device
    flops_of_product = 2 * accounting.all_pairs(problem) * HEADS * HEAD_DIM
    return {
        "recompute_s": flops_of_product / device.flops_per_s(problem.dtype),
        "reread_s": accounting.score_matrix_bytes(problem) / device.bytes_per_s,
        "products": {
            "textbook": round(backward.naive.flops / flops_of_product),
            "tiled": round(backward.tiled.flops / flops_of_product),
        },
    }


def _checked_gradients() -> str:
    """What the gradients of the walk's problem stay below in their distance from the oracle's."""
    q, k, v = walk.operands()
    operands, d_out = Operands(q=q, k=k, v=v), make_tensor(q.shape, seed=7)
    problem = sizes.pose(seqlen_q=walk.SEQLEN, heads_q=1, head_dim=walk.HEAD_DIM, dtype=q.dtype)
    out, lse = tiled.forward(problem, operands, TILES, q.dtype)
    found = tiled.backward(problem, operands, Saved(out=out, lse=lse), d_out, None, TILES, q.dtype)
    exact = reference(Call(q=q, k=k, v=v), d_out=d_out).gradients
    bound = 10 * walk.ROUNDING
    for name, gradient in (("q", found.q), ("k", found.k), ("v", found.v)):
        assert gradient is not None
        torch.testing.assert_close(gradient.double(), exact[name], atol=bound, rtol=0)
    return _power_of_ten(bound)


# --- masks, padding, dropout ------------------------------------------------------------------------------------------

_CAUSAL, _WINDOW = MaskSpec(right=0), MaskSpec(left=255, right=0)
_MAP_TOKENS, _MAP_TILES = 1024, TileConfig(block_q=128, block_kv=128)
_SIGNS = {"full": "■", "partial": "◩", "empty": "·"}


def _masks() -> dict[str, Any]:
    tiles = _plan(_explain(TOKENS, causal=True)).forward.tiles
    rows = []
    for what, mask in (("none", MaskSpec()), ("causal", _CAUSAL), ("causal, the last 256 keys", _WINDOW)):
        found = masks.count_tiles(
            mask, seqlen_q=TOKENS, seqlen_kv=TOKENS, block_q=tiles.block_q, block_kv=tiles.block_kv
        )
        rows.append({"what": what, "tiles": found, "share": found.visited / (found.visited + found.empty)})
    return {
        "masks": rows,
        "mask_tiles": tiles,
        "tile_maps": _side_by_side(
            ["causal", *_tile_map(_CAUSAL)], ["and the last 256 keys", *_tile_map(_WINDOW)], gap=" " * 4
        ),
        "map_tokens": _MAP_TOKENS,
        "map_tiles": _MAP_TILES,
    }


def _tile_map(mask: MaskSpec) -> list[str]:
    """One line for each tile of queries."""
    kinds = walk.tile_kinds(mask, seqlen=_MAP_TOKENS, tiles=_MAP_TILES)
    return [" ".join(_SIGNS[kind] for kind in row) for row in kinds]


def _side_by_side(left: list[str], right: list[str], *, gap: str) -> str:
    width = max(map(len, left))
    return "\n".join(f"{a:<{width}}{gap}{b}" for a, b in zip(left, right, strict=True))


def _packed() -> dict[str, Any]:
    padded = len(PACKED_LENGTHS) * max(PACKED_LENGTHS) ** 2
    pairs = sum(masks.visible_pairs(MaskSpec(), seqlen_q=tokens, seqlen_kv=tokens) for tokens in PACKED_LENGTHS)
    return {"lengths": PACKED_LENGTHS, "padded": padded, "pairs": pairs, "share": pairs / padded}


def _dropout() -> dict[str, Any]:
    dropout_p, seed, num_keys, block_kv = 0.25, torch.tensor(4), walk.SEQLEN, TILES.block_kv

    def kept(kv_begin: int, kv_end: int) -> str:
        zero = torch.zeros(1, dtype=torch.int64)
        keep = dropout.keep_mask(
            seed,
            dropout_p=dropout_p,
            batch_idx=zero,
            head_idx=zero,
            q_pos=torch.tensor([QUERY]),
            kv_begin=kv_begin,
            kv_end=kv_end,
        )
        return " ".join(str(int(is_kept)) for is_kept in keep.tolist())

    whole = kept(0, num_keys)
    tiles = [kept(begin, begin + block_kv) for begin in range(0, num_keys, block_kv)]
    assert " ".join(tiles) == whole, "dropout does not depend on the tiling"
    return {
        "p": dropout_p,
        "seed": seed.item(),
        "seed_bytes": seed.element_size(),
        "query": QUERY,
        "num_keys": num_keys,
        "block_kv": block_kv,
        "whole": whole,
        "tiles": " | ".join(tiles),
        "mask_bytes": HEADS * TOKENS * TOKENS,
    }


# --- one row of the walk ----------------------------------------------------------------------------------------------


def _power_of_ten(number: float) -> str:
    return f"{number:.0e}".replace("e-0", "e-")


class _Row(TypedDict):
    """The state of ``QUERY`` after one tile; acc and out of its first component."""

    which: str
    scores: list[float]
    old_max: float
    new_max: float
    rescale: float
    row_sum: float
    acc: float
    out: float
    whole_row: list[float]
    error: str


def _example() -> dict[str, Any]:
    found = walk.take("full")
    s, v, exact = found.scores[QUERY].double(), found.values.double(), found.exact[QUERY]
    p = torch.exp(s - s.max())
    rows = _example_rows(found)
    assert abs(rows[-1]["row_sum"] - p.sum().item()) < walk.ROUNDING * 10
    assert abs(rows[-1]["out"] - exact[0].item()) < walk.ROUNDING
    return {
        "query": QUERY,
        "num_keys": walk.SEQLEN,
        "block_kv": TILES.block_kv,
        "head_dim": walk.HEAD_DIM,
        "rows": rows,
        "exact": exact.tolist(),
        "tolerance": _power_of_ten(walk.ROUNDING),
        "whole_max": s.max().item(),
        "whole_sum": p.sum().item(),
        "whole_acc": (p @ v)[0].item(),
        "whole_out": exact[0].item(),
        "by_hand": _by_hand(rows[1], rows[2], _steps_of_query(found)[2]),
    }


def _example_rows(found: Walk) -> list[_Row]:
    rows: list[_Row] = []
    for step in _steps_of_query(found):
        before, after, row = step.before, step.after, QUERY % TILES.block_q
        error = step.error[row].item()
        rows.append(
            _Row(
                which=_keys(step.kv_tile_idx * TILES.block_kv, (step.kv_tile_idx + 1) * TILES.block_kv),
                scores=step.s[row].tolist(),
                old_max=before.row_max[row].item(),
                new_max=after.row_max[row].item(),
                rescale=step.rescale[row].item(),
                row_sum=after.row_sum[row].item(),
                acc=(after.out[row, 0] * after.row_sum[row]).item(),
                out=after.out[row, 0].item(),
                whole_row=after.out[row].tolist(),
                error=f"below {_power_of_ten(walk.ROUNDING)}" if error < walk.ROUNDING else f"{error:.3f}",
            )
        )
    return rows


def _by_hand(before: _Row, after: _Row, step: walk.Step) -> dict[str, Any]:
    """What adds up to a row_sum."""
    return {
        "which": after["which"],
        "old_sum": before["row_sum"],
        "rescale": after["rescale"],
        "terms": step.p[QUERY % TILES.block_q].tolist(),
        "new_sum": after["row_sum"],
    }


def _steps_of_query(found: Walk) -> list[walk.Step]:
    return [step for step in found.steps if step.q_tile_idx == QUERY // TILES.block_q]


def _merge() -> dict[str, Any]:
    q, k, v = walk.operands()
    halves = ((0, walk.SEQLEN // 2), (walk.SEQLEN // 2, walk.SEQLEN))
    results = [flashtile.attention_with_lse(q, k[:, begin:end], v[:, begin:end]) for begin, end in halves]
    out, lse = flashtile.merge_attention(*results[0], *results[1])
    whole_out, whole_lse = flashtile.attention_with_lse(q, k, v)
    torch.testing.assert_close(out, whole_out)
    return {
        "parts": [
            {
                "which": _keys(begin, end),
                "lse": part_lse[0, 0, QUERY].item(),
                "weight": torch.exp(part_lse - lse)[0, 0, QUERY].item(),
                "out": part_out[0, QUERY, 0, 0].item(),
            }
            for (begin, end), (part_out, part_lse) in zip(halves, results, strict=True)
        ],
        "lse": lse[0, 0, QUERY].item(),
        "out": out[0, QUERY, 0, 0].item(),
        "whole_lse": whole_lse[0, 0, QUERY].item(),
        "whole_out": whole_out[0, QUERY, 0, 0].item(),
    }


def _keys(begin: int, end: int) -> str:
    return f"{begin}–{end - 1}"
