"""The dropout contract: Philox-4x32-10 to the bit, and a mask that depends on the seed and the positions alone."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flashtile.spec import dropout

WORD = 2**32
words = st.integers(0, WORD - 1)
seeds = st.integers(-(2**63), 2**63 - 1)


def reference_philox(counter: tuple[int, int, int, int], key: tuple[int, int]) -> tuple[int, int, int, int]:
    """Philox-4x32-10 in Python's unbounded integers, written from the paper's section 3.3."""
    left_0, right_0, left_1, right_1 = counter[0], counter[1], counter[2], counter[3]
    for round_idx in range(10):
        round_key = [(key[half] + round_idx * (0x9E3779B9, 0xBB67AE85)[half]) % WORD for half in (0, 1)]
        high_0, low_0 = divmod(0xD2511F53 * left_0, WORD)
        high_1, low_1 = divmod(0xCD9E8D57 * left_1, WORD)
        left_0, right_0, left_1, right_1 = (
            high_1 ^ right_0 ^ round_key[0],
            low_1,
            high_0 ^ right_1 ^ round_key[1],
            low_0,
        )
    return left_0, right_0, left_1, right_1


def philox(counter: tuple[int, ...], seed: int) -> tuple[int, ...]:
    c0, c1, c2, c3 = (torch.tensor(word) for word in counter)
    return tuple(int(word) for word in dropout.philox_4x32((c0, c1, c2, c3), torch.tensor(seed)))


def signed(seed: int) -> int:
    """The int64 with the bit pattern of an unsigned 64-bit key."""
    return seed - 2**64 if seed >= 2**63 else seed


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF, 0xFFFFFFFF), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_published_known_answers(counter: tuple[int, ...], key: tuple[int, int], expected: tuple[int, ...]) -> None:
    assert philox(counter, signed(key[1] << 32 | key[0])) == expected
    assert reference_philox((counter[0], counter[1], counter[2], counter[3]), key) == expected


@given(counter=st.tuples(words, words, words, words), seed=seeds)
def test_philox_equals_unbounded_integers(counter: tuple[int, int, int, int], seed: int) -> None:
    assert philox(counter, seed) == reference_philox(counter, (seed % WORD, (seed >> 32) % WORD))


def test_philox_broadcasts_its_counter_words() -> None:
    columns, rows = torch.arange(3), torch.arange(2)[:, None]
    found = dropout.philox_4x32((columns, rows, torch.tensor(5), torch.tensor(7)), torch.tensor(-11))
    for word_idx, word in enumerate(found):
        assert word.shape == (2, 3)
        for row in range(2):
            for column in range(3):
                expected = reference_philox((column, row, 5, 7), (-11 % WORD, (-11 >> 32) % WORD))
                assert int(word[row, column]) == expected[word_idx]


def keep(
    *, seed: int = 1234, dropout_p: float = 0.5, batch: int = 2, heads: int = 3, q_pos: Tensor, kv: tuple[int, int]
) -> Tensor:
    """keep_mask of a whole batch, [batch, heads, len(q_pos), keys]."""
    return dropout.keep_mask(
        torch.tensor(seed),
        dropout_p=dropout_p,
        batch_idx=torch.arange(batch)[:, None, None, None],
        head_idx=torch.arange(heads)[:, None, None],
        q_pos=q_pos[:, None],
        kv_begin=kv[0],
        kv_end=kv[1],
    )


def expected_keep(*, seed: int, dropout_p: float, batch_idx: int, head_idx: int, q_idx: int, kv_idx: int) -> bool:
    """One pair of the contract, from the reference generator."""
    key = (seed % WORD, (seed >> 32) % WORD)
    return reference_philox((kv_idx // 4, q_idx, head_idx, batch_idx), key)[kv_idx % 4] >= math.floor(dropout_p * WORD)


@given(
    seed=seeds,
    dropout_p=st.floats(0, 1, exclude_max=True),
    q_begin=st.sampled_from([0, 7, 2**31 - 2, 2**31 + 5, 2**32 - 4]),
    kv_begin=st.sampled_from([0, 1, 3, 6, 2**31 - 1, 2**31 + 3, 2**33 + 2]),
    num_kv=st.integers(0, 9),
)
def test_every_pair_follows_the_contract(seed: int, dropout_p: float, q_begin: int, kv_begin: int, num_kv: int) -> None:
    q_pos = torch.arange(q_begin, q_begin + 3)
    found = keep(seed=seed, dropout_p=dropout_p, q_pos=q_pos, kv=(kv_begin, kv_begin + num_kv))
    assert found.dtype == torch.bool and found.shape == (2, 3, 3, num_kv)
    for batch_idx, head_idx, row, column in torch.cartesian_prod(
        *(torch.arange(size) for size in found.shape)
    ).tolist():
        assert bool(found[batch_idx, head_idx, row, column]) == expected_keep(
            seed=seed,
            dropout_p=dropout_p,
            batch_idx=batch_idx,
            head_idx=head_idx,
            q_idx=q_begin + row,
            kv_idx=kv_begin + column,
        )


@given(
    cuts=st.lists(st.integers(1, 49), max_size=6, unique=True),
    row_cut=st.integers(1, 22),
    dropout_p=st.sampled_from([0.1, 0.5, 0.9]),
)
def test_the_mask_does_not_depend_on_the_tiling(cuts: list[int], row_cut: int, dropout_p: float) -> None:
    q_pos = torch.arange(23)
    whole = keep(dropout_p=dropout_p, q_pos=q_pos, kv=(0, 50))
    boundaries = [0, *sorted(cuts), 50]
    tiled = [
        torch.cat(
            [keep(dropout_p=dropout_p, q_pos=rows, kv=(begin, end)) for begin, end in pairwise(boundaries)],
            dim=-1,
        )
        for rows in (q_pos[:row_cut], q_pos[row_cut:])
    ]
    assert torch.equal(torch.cat(tiled, dim=-2), whole)


@pytest.mark.parametrize("dropout_p", [0.01, 0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("seed", [0, -1, 2**63 - 1])
def test_the_drop_rate_is_binomial(dropout_p: float, seed: int) -> None:
    dropped = ~keep(seed=seed, dropout_p=dropout_p, q_pos=torch.arange(160), kv=(0, 160))
    for some in (dropped, *dropped.flatten(0, 1)):  # all together, and each head of each sequence
        deviation = math.sqrt(some.numel() * dropout_p * (1 - dropout_p))
        assert abs(int(some.sum()) - some.numel() * dropout_p) < 5 * deviation


def test_masks_of_different_heads_sequences_seeds_rows_and_keys_are_independent() -> None:
    masks = {
        seed: keep(seed=seed, dropout_p=0.5, q_pos=torch.arange(128), kv=(0, 128)) for seed in (0, 1, 2**32, -1, -2)
    }
    base = masks[0]
    pairs = {
        "heads": (base[:, 0], base[:, 1]),
        "sequences": (base[0], base[1]),
        "head and sequence swapped": (base[0, 1], base[1, 0]),
        "rows": (base[..., :-1, :], base[..., 1:, :]),
        "keys": (base[..., :-1], base[..., 1:]),
        "rows and keys swapped": (base, base.mT),
        **{f"seed {seed}": (base, other) for seed, other in masks.items() if seed != 0},
        "seeds -1 and -2": (masks[-1], masks[-2]),
    }
    for what, (one, other) in pairs.items():
        agreement = float((one == other).float().mean())
        assert abs(agreement - 0.5) < 5 * 0.5 / math.sqrt(one.numel()), (what, agreement)


@given(seed=seeds)
def test_no_dropout_keeps_everything(seed: int) -> None:
    assert bool(keep(seed=seed, dropout_p=0.0, q_pos=torch.arange(16), kv=(3, 40)).all())


def test_a_larger_probability_drops_a_superset() -> None:
    probabilities = [0.0, 1e-12, 0.1, 0.5, 0.9, 1 - 2**-33, math.nextafter(1, 0)]
    kept = [keep(dropout_p=dropout_p, q_pos=torch.arange(64), kv=(0, 64)) for dropout_p in probabilities]
    for more, fewer in pairwise(kept):
        assert not bool((fewer & ~more).any())


@pytest.mark.parametrize(
    ("dropout_p", "threshold"), [(0.0, 0), (2**-33, 0), (2**-32, 1), (0.5, 2**31), (1 - 2**-32, WORD - 1)]
)
def test_the_threshold_is_the_floor_and_fits_in_a_word(dropout_p: float, threshold: int) -> None:
    assert dropout.drop_threshold(dropout_p) == threshold
    assert dropout.drop_threshold(math.nextafter(1, 0)) < WORD
