"""spec/masks.py against brute force: every tile and pair classified from the dense boolean matrix of the contract."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flashtile.spec import masks
from flashtile.spec.masks import TileRange
from flashtile.spec.problem import MaskSpec

lengths = st.integers(0, 40)
blocks = st.integers(1, 17)
reaches = st.none() | st.integers(0, 45)
specs = st.builds(MaskSpec, left=reaches, right=reaches)


def dense(mask: MaskSpec, seqlen_q: int, seqlen_kv: int) -> Tensor:
    """The contract, pair by pair: i + seqlen_kv - seqlen_q - left <= j <= i + seqlen_kv - seqlen_q + right."""
    visible = torch.zeros(seqlen_q, seqlen_kv, dtype=torch.bool)
    for q_idx in range(seqlen_q):
        aligned = q_idx + seqlen_kv - seqlen_q
        for kv_idx in range(seqlen_kv):
            sees_left = mask.left is None or kv_idx >= aligned - mask.left
            sees_right = mask.right is None or kv_idx <= aligned + mask.right
            visible[q_idx, kv_idx] = sees_left and sees_right
    return visible


def tile_indices(length: int, block: int) -> range:
    return range(-(-length // block))


def check_tiles(found: TileRange, columns: Tensor, block: int) -> None:
    """``columns`` [rows, length] is the visible matrix of the rows of one tile, cut into column tiles of ``block``."""
    length = columns.shape[1]
    cut = {idx: columns[:, idx * block : (idx + 1) * block] for idx in tile_indices(length, block)}
    holds_something = [idx for idx, tile in cut.items() if bool(tile.any())]
    is_full = [idx for idx, tile in cut.items() if tile.shape[1] == block and bool(tile.all())]
    assert list(range(found.begin, found.end)) == holds_something
    assert [idx for idx in cut if found.is_full(idx)] == is_full
    assert 0 <= found.begin <= found.end and found.full_begin <= found.full_end
    if is_full:
        assert found.begin <= found.full_begin and found.full_end <= found.end


def visible_kv(mask: MaskSpec, *, seqlen_q: int, seqlen_kv: int, q_idx: int) -> tuple[int, int]:
    """The half-open range of keys that query ``q_idx`` sees; empty ranges have begin == end."""
    aligned = q_idx + seqlen_kv - seqlen_q
    begin = 0 if mask.left is None else min(max(aligned - mask.left, 0), seqlen_kv)
    end = seqlen_kv if mask.right is None else min(max(aligned + mask.right + 1, 0), seqlen_kv)
    return begin, max(begin, end)


@given(mask=specs, seqlen_q=lengths, seqlen_kv=lengths, block_q=blocks, block_kv=blocks)
def test_kv_tiles_are_exact(mask: MaskSpec, seqlen_q: int, seqlen_kv: int, block_q: int, block_kv: int) -> None:
    visible = dense(mask, seqlen_q, seqlen_kv)
    for q_begin in range(0, seqlen_q, block_q):
        q_end = min(q_begin + block_q, seqlen_q)
        found = masks.kv_tiles(
            mask, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv, q_begin=q_begin, q_end=q_end, block_kv=block_kv
        )
        check_tiles(found, visible[q_begin:q_end], block_kv)


@given(mask=specs, seqlen_q=lengths, seqlen_kv=lengths, block_q=blocks, block_kv=blocks)
def test_q_tiles_are_exact(mask: MaskSpec, seqlen_q: int, seqlen_kv: int, block_q: int, block_kv: int) -> None:
    visible = dense(mask, seqlen_q, seqlen_kv)
    for kv_begin in range(0, seqlen_kv, block_kv):
        kv_end = min(kv_begin + block_kv, seqlen_kv)
        found = masks.q_tiles(
            mask, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv, kv_begin=kv_begin, kv_end=kv_end, block_q=block_q
        )
        check_tiles(found, visible[:, kv_begin:kv_end].T, block_q)


@given(mask=specs, seqlen_q=lengths, seqlen_kv=lengths, block_q=blocks, block_kv=blocks)
def test_count_tiles_counts_each_tile_once(
    mask: MaskSpec, seqlen_q: int, seqlen_kv: int, block_q: int, block_kv: int
) -> None:
    visible = dense(mask, seqlen_q, seqlen_kv)
    counts = {"full": 0, "partial": 0, "empty": 0}
    for q_idx in tile_indices(seqlen_q, block_q):
        for kv_idx in tile_indices(seqlen_kv, block_kv):
            rows, cols = (
                slice(q_idx * block_q, (q_idx + 1) * block_q),
                slice(kv_idx * block_kv, (kv_idx + 1) * block_kv),
            )
            tile = visible[rows, cols]
            is_whole = tile.shape[1] == block_kv
            kind = "full" if is_whole and bool(tile.all()) else "partial" if bool(tile.any()) else "empty"
            counts[kind] += 1
    found = masks.count_tiles(mask, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv, block_q=block_q, block_kv=block_kv)
    assert {"full": found.full, "partial": found.partial, "empty": found.empty} == counts
    assert found.visited == counts["full"] + counts["partial"]


@given(mask=specs, seqlen_q=lengths, seqlen_kv=lengths)
def test_visible_pairs_counts_the_dense_matrix(mask: MaskSpec, seqlen_q: int, seqlen_kv: int) -> None:
    expected = int(dense(mask, seqlen_q, seqlen_kv).sum())
    assert masks.visible_pairs(mask, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv) == expected


@given(mask=specs, seqlen_q=lengths, seqlen_kv=lengths)
def test_visible_kv_is_the_range_of_each_row(mask: MaskSpec, seqlen_q: int, seqlen_kv: int) -> None:
    visible = dense(mask, seqlen_q, seqlen_kv)
    for q_idx in range(seqlen_q):
        begin, end = visible_kv(mask, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv, q_idx=q_idx)
        assert 0 <= begin <= end <= seqlen_kv
        assert list(range(begin, end)) == visible[q_idx].nonzero().flatten().tolist()


@given(mask=specs, seqlen_q=lengths, seqlen_kv=lengths)
def test_is_visible_is_the_dense_matrix(mask: MaskSpec, seqlen_q: int, seqlen_kv: int) -> None:
    found = masks.is_visible(mask, torch.arange(seqlen_q)[:, None], torch.arange(seqlen_kv), seqlen_kv - seqlen_q)
    assert found.dtype == torch.bool and found.shape == (seqlen_q, seqlen_kv)
    assert torch.equal(found, dense(mask, seqlen_q, seqlen_kv))


@given(mask=specs, sizes=st.lists(st.tuples(lengths, lengths), min_size=1, max_size=4))
def test_is_visible_takes_one_offset_per_sequence(mask: MaskSpec, sizes: list[tuple[int, int]]) -> None:
    longest_q, longest_kv = (max(axis) for axis in zip(*sizes, strict=True))
    offsets = torch.tensor([seqlen_kv - seqlen_q for seqlen_q, seqlen_kv in sizes])[:, None, None]
    found = masks.is_visible(mask, torch.arange(longest_q)[:, None], torch.arange(longest_kv), offsets)
    for sequence, (seqlen_q, seqlen_kv) in zip(found, sizes, strict=True):
        assert torch.equal(sequence[:seqlen_q, :seqlen_kv], dense(mask, seqlen_q, seqlen_kv))


@given(mask=specs, seqlen_q=lengths, seqlen_kv=lengths, shift=st.sampled_from([2**31, 2**33 + 5]))
def test_positions_beyond_32_bits_keep_their_meaning(mask: MaskSpec, seqlen_q: int, seqlen_kv: int, shift: int) -> None:
    q_pos, kv_pos = torch.arange(seqlen_q)[:, None] + shift, torch.arange(seqlen_kv) + shift
    found = masks.is_visible(mask, q_pos, kv_pos, seqlen_kv - seqlen_q)
    assert torch.equal(found, dense(mask, seqlen_q, seqlen_kv))


@given(mask=specs, extra_kv=st.integers(-(2**20), 2**20), block=st.sampled_from([64, 128, 512]))
def test_long_sequences_stay_consistent(mask: MaskSpec, extra_kv: int, block: int) -> None:
    """Where no dense matrix fits in memory: closed forms against sums of rows at 2**21 tokens."""
    seqlen_q = 2**21
    seqlen_kv = seqlen_q + extra_kv
    sizes = {"seqlen_q": seqlen_q, "seqlen_kv": seqlen_kv}
    window = (seqlen_kv if mask.left is None else mask.left) + (seqlen_kv if mask.right is None else mask.right) + 1
    assert masks.visible_pairs(mask, **sizes) <= seqlen_q * min(window, seqlen_kv)
    for q_begin in (0, seqlen_q // 2, seqlen_q - block):
        tiles = masks.kv_tiles(mask, **sizes, q_begin=q_begin, q_end=q_begin + block, block_kv=block)
        rows = [visible_kv(mask, **sizes, q_idx=q_idx) for q_idx in range(q_begin, q_begin + block)]
        seen = [(begin, end) for begin, end in rows if begin < end]
        assert (tiles.begin < tiles.end) == bool(seen)
        if seen:
            assert tiles.begin == min(begin for begin, _ in seen) // block
            assert tiles.end == -(-max(end for _, end in seen) // block)


def test_causal_is_bottom_right_aligned_and_the_window_includes_both_ends() -> None:
    causal = masks.is_visible(MaskSpec(right=0), torch.arange(2)[:, None], torch.arange(4), 2)
    assert causal.tolist() == [[True, True, True, False], [True, True, True, True]]
    window = masks.is_visible(MaskSpec(left=1, right=1), torch.arange(4)[:, None], torch.arange(4), 0)
    assert window.tolist() == [
        [True, True, False, False],
        [True, True, True, False],
        [False, True, True, True],
        [False, False, True, True],
    ]


def test_half_of_a_long_causal_matrix_is_skipped() -> None:
    count = masks.count_tiles(MaskSpec(right=0), seqlen_q=4096, seqlen_kv=4096, block_q=128, block_kv=128)
    assert (count.full, count.partial, count.empty) == (31 * 32 // 2, 32, 31 * 32 // 2)
