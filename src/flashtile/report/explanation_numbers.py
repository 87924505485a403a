"""Every number in the text of the explanation, computed by the code that the text explains."""

from __future__ import annotations

import math
from typing import Any, TypedDict

import torch

import flashtile
from flashtile.backends.base import Plan
from flashtile.backends.triton.tiles import GpuTiles
from flashtile.explain import Explanation
from flashtile.explain.remarks import CALL_S
from flashtile.report import walk
from flashtile.report.walk import TILES, Walk
from flashtile.spec import accounting, dropout, masks
from flashtile.spec.accounting import Comparison
from flashtile.spec.problem import AttentionProblem, MaskSpec

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
    (forward, backward), problem, plan = explained.costs, explained.problem, explained.plan
    assert plan is not None, "the Triton backend takes the problem on every machine"
    device, scores = explained.device, accounting.score_matrix_bytes(explained.problem)
    score_traffic = 4 * scores  # written, read by the softmax, written as probabilities, read again
    return {
        "problem": problem,
        "device": device,
        "forward": forward,
        "backward": backward,
        "score_bytes": scores,
        "score_numbers": TOKENS * TOKENS,
        "operand_numbers": TOKENS * HEAD_DIM,
        "score_traffic": score_traffic,
        "score_share": score_traffic / forward.naive.traffic_bytes,
        "naive_steps": [
            {"what": term.what, "num_bytes": term.num_bytes, "seconds": term.num_bytes / device.bytes_per_s}
            for term in forward.naive.traffic
        ],
        "balance": device.flops_per_s(problem.dtype) / device.bytes_per_s,
        "naive_intensity": forward.naive.flops / forward.naive.traffic_bytes,
        "tiled_intensity": forward.tiled.flops / forward.tiled.traffic_bytes,
        "example": _example(),
        "walk": {"seqlen": walk.SEQLEN, "block_q": TILES.block_q, "block_kv": TILES.block_kv},
        **_tiling(problem, plan),
        "lengths": [_length(_explain(tokens)) for tokens in LENGTHS],
        "call_s": CALL_S,
        "layer_width": LAYER_WIDTH,
        "amdahl": _amdahl(),
        **_recomputation(problem, backward, scores, device.bytes_per_s, device.flops_per_s(problem.dtype)),
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


# --- time and memory --------------------------------------------------------------------------------------------------


def _tiling(problem: AttentionProblem, plan: Plan) -> dict[str, Any]:
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


def _recomputation(
    problem: AttentionProblem, backward: Comparison, scores: int, bytes_per_s: float, flops_per_s: float
) -> dict[str, Any]:
    flops_of_product = 2 * accounting.all_pairs(problem) * HEADS * HEAD_DIM
    return {
        "recompute_s": flops_of_product / flops_per_s,
        "reread_s": scores / bytes_per_s,
        "products": {
            "textbook": round(backward.naive.flops / flops_of_product),
            "tiled": round(backward.tiled.flops / flops_of_product),
        },
    }


# --- masks, padding, dropout ------------------------------------------------------------------------------------------

_CAUSAL, _WINDOW = MaskSpec(right=0), MaskSpec(left=255, right=0)
_MAP_TOKENS, _MAP_BLOCK = 1024, 128


def _masks() -> dict[str, Any]:
    plan = _explain(TOKENS, causal=True).plan
    assert plan is not None
    tiles = plan.forward.tiles
    rows = []
    for what, mask in (("none", MaskSpec()), ("causal", _CAUSAL), ("causal, the last 256 keys", _WINDOW)):
        found = masks.count_tiles(
            mask, seqlen_q=TOKENS, seqlen_kv=TOKENS, block_q=tiles.block_q, block_kv=tiles.block_kv
        )
        rows.append({"what": what, "tiles": found, "share": found.visited / (found.visited + found.empty)})
    drawn = [("causal", _tile_map(_CAUSAL)), ("and the last 256 keys", _tile_map(_WINDOW))]
    gap = " " * 4
    width = max(len(line) for title, lines in drawn for line in (title, *lines))
    lines = [
        gap.join(line.ljust(width) for line in level).rstrip()
        for level in zip(*([t, *m] for t, m in drawn), strict=True)
    ]
    return {
        "masks": rows,
        "mask_tiles": tiles,
        "tile_maps": "\n".join(lines),
        "map_tokens": _MAP_TOKENS,
        "map_block": _MAP_BLOCK,
    }


def _tile_map(mask: MaskSpec) -> list[str]:
    """One line for each tile of queries."""
    lines = []
    for q_begin in range(0, _MAP_TOKENS, _MAP_BLOCK):
        tiles = masks.kv_tiles(
            mask,
            seqlen_q=_MAP_TOKENS,
            seqlen_kv=_MAP_TOKENS,
            q_begin=q_begin,
            q_end=q_begin + _MAP_BLOCK,
            block_kv=_MAP_BLOCK,
        )
        signs = (
            "■" if tiles.is_full(tile_idx) else "◩" if tiles.begin <= tile_idx < tiles.end else "·"
            for tile_idx in range(_MAP_TOKENS // _MAP_BLOCK)
        )
        lines.append(" ".join(signs))
    return lines


def _packed() -> dict[str, Any]:
    padded = len(PACKED_LENGTHS) * max(PACKED_LENGTHS) ** 2
    pairs = sum(masks.visible_pairs(MaskSpec(), seqlen_q=tokens, seqlen_kv=tokens) for tokens in PACKED_LENGTHS)
    return {"lengths": PACKED_LENGTHS, "padded": padded, "pairs": pairs, "share": pairs / padded}


def _dropout() -> dict[str, Any]:
    dropout_p, seed, num_keys, block_kv = 0.25, torch.tensor(42), walk.SEQLEN, TILES.block_kv

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


_BOUND = f"{walk.ROUNDING:.0e}".replace("e-0", "e-")


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
        "tolerance": _BOUND,
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
                error=f"below {_BOUND}" if error < walk.ROUNDING else f"{error:.3f}",
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
