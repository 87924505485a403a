"""The dropout contract: which probabilities are dropped is a pure function of the seed and the position.

Source: Philox-4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). For the pair
(query position ``i``, key position ``j``) of head ``h`` in sequence ``b``:

* key: the low and the high 32 bits of the 64-bit seed;
* counter: ``(j // 4, i, h, b)``, each 32 bits;
* the pair owns word ``j % 4`` of the four output words, and is dropped if that word is below ``floor(p * 2**32)``.

``i`` and ``j`` count from the start of their own sequence and ``h`` counts query heads, so the mask does not depend on
the backend, the tiling, the padding, the device, or on what else is in the batch except the index ``b``.
"""

from __future__ import annotations

import torch
from torch import Tensor

KV_PER_CALL = 4
NUM_ROUNDS = 10
_MULTIPLIER_0, _MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
_WEYL_0, _WEYL_1 = 0x9E3779B9, 0xBB67AE85
_WORD = 0xFFFFFFFF


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Ten rounds of Philox-4x32 on int64 tensors that hold 32-bit words.

    Args:
        counter: four int64 tensors, broadcastable against each other, values in [0, 2**32).
        seed: 0-d int64 tensor; its bit pattern is the 64-bit key.
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    key_0, key_1 = seed & _WORD, (seed >> 32) & _WORD
    for _ in range(NUM_ROUNDS):
        product_0, product_1 = c0 * _MULTIPLIER_0, c2 * _MULTIPLIER_1  # wraps modulo 2**64, which keeps every bit
        c0, c1, c2, c3 = (
            (product_1 >> 32) & _WORD ^ c1 ^ key_0,
            product_1 & _WORD,
            (product_0 >> 32) & _WORD ^ c3 ^ key_1,
            product_0 & _WORD,
        )
        key_0, key_1 = (key_0 + _WEYL_0) & _WORD, (key_1 + _WEYL_1) & _WORD
    return c0, c1, c2, c3


def draw_seed(device: torch.device) -> Tensor:
    """A seed from torch's generator for the device: 0-d int64, on the device."""
    return torch.randint(0, 2**63 - 1, (), dtype=torch.int64, device=device)


def drop_threshold(dropout_p: float) -> int:
    """Words below this 32-bit integer drop their pair."""
    return int(dropout_p * 2**32)


def keep_mask(
    seed: Tensor, *, dropout_p: float, batch_idx: Tensor, head_idx: Tensor, q_pos: Tensor, kv_begin: int, kv_end: int
) -> Tensor:
    """True where the probability survives, for keys ``[kv_begin, kv_end)``.

    Args:
        seed: 0-d int64 tensor.
        batch_idx, head_idx, q_pos: int64 tensors that broadcast against each other and end in an axis of size 1, on
            which the keys are laid out; for example [batch, 1, 1, 1], [heads, 1, 1], [seqlen_q, 1].

    Returns:
        Boolean tensor, the broadcast shape with the last axis ``kv_end - kv_begin`` long.
    """
    first_group = kv_begin // KV_PER_CALL
    groups = torch.arange(first_group, -(-kv_end // KV_PER_CALL), device=seed.device)
    words = torch.stack(philox_4x32((groups, q_pos, head_idx, batch_idx), seed), dim=-1)
    words = words.flatten(-2)  # [..., keys of whole groups]
    skipped = kv_begin - first_group * KV_PER_CALL
    return words[..., skipped : skipped + kv_end - kv_begin] >= drop_threshold(dropout_p)
