"""Random steps of generation with a cache, and what they should do, computed one sequence and one key at a time."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from flashtile.testing import oracle

NEVER_READ = 10**6
"""What a block table holds where no block is needed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """Arguments of ``flash_attn_with_kvcache``, and where in the caches each key of each sequence lies."""

    arguments: dict[str, Any]
    lengths: list[int]
    """Keys of each sequence before the step, left padding included."""
    begins: list[int]
    num_new: int

    def place(self, sequence: int, position: int) -> tuple[int, int]:
        table, rows = self.arguments.get("block_table"), self.arguments.get("cache_batch_idx")
        if table is not None:
            page_size = self.arguments["k_cache"].shape[1]
            return int(table[sequence, position // page_size]), position % page_size
        return (sequence if rows is None else int(rows[sequence])), position

    def on(self, device: str) -> dict[str, Any]:
        """Copies of the arguments on a device."""
        return {
            name: value.to(device, copy=True) if isinstance(value, Tensor) else value
            for name, value in self.arguments.items()
        }


def draw_step(rng: Random, dtypes: tuple[torch.dtype, ...]) -> Step:
    """A random step; caches are NaN wherever no sequence has a key."""
    generator = torch.Generator().manual_seed(rng.randint(0, 2**31))
    dtype, batch = rng.choice(dtypes), rng.randint(1, 3)
    heads_k, group, head_dim = rng.randint(1, 2), rng.randint(1, 3), rng.choice((4, 6, 16))
    num_new, seqlen_q, capacity = rng.choice((0, 1, 1, 3)), rng.randint(1, 4), rng.choice((8, 13))
    lengths = [rng.randint(0, capacity - num_new) for _ in range(batch)]

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    def integers(numbers: Any) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32)

    arguments: dict[str, Any] = {"q": draw(batch, seqlen_q, heads_k * group, head_dim)}
    how = rng.choice(("tensor", "tensor", "int", "none"))
    if how == "int":
        lengths = [lengths[0]] * batch
    elif how == "none" and num_new == 0:
        lengths = [capacity] * batch
    if how == "int":
        arguments["cache_seqlens"] = lengths[0]
    elif how == "tensor" or num_new > 0:
        arguments["cache_seqlens"] = integers(lengths)
    begins = [0] * batch
    if rng.random() < 0.3:
        begins = [rng.randint(0, length) for length in lengths]
        arguments["cache_leftpad"] = integers(begins)

    shape = (batch + rng.choice((0, 2)), capacity)
    if rng.random() < 0.4:
        page_size = rng.choice((1, 3, 5))
        arguments["block_table"] = _block_table(rng, lengths, num_new, page_size, -(-capacity // page_size))
        shape = (int(batch * -(-capacity // page_size)) + 2, page_size)
        if "cache_seqlens" not in arguments:
            arguments["cache_seqlens"] = integers(lengths)
    elif rng.random() < 0.3:
        arguments["cache_batch_idx"] = integers(rng.sample(range(shape[0]), batch))
    for name in ("k_cache", "v_cache"):
        arguments[name] = torch.full((*shape, heads_k, head_dim), torch.nan, dtype=dtype)
    if num_new > 0:
        arguments |= {"k": draw(batch, num_new, heads_k, head_dim), "v": draw(batch, num_new, heads_k, head_dim)}
        if rng.random() < 0.5:
            angles = 6 * torch.rand(24, rng.choice((head_dim, 2)) // 2, generator=generator, dtype=torch.float64)
            arguments |= {"rotary_cos": angles.cos().to(dtype), "rotary_sin": angles.sin().to(dtype)}
            arguments["rotary_interleaved"] = rng.random() < 0.5
    step = Step(arguments=arguments | _options(rng, arguments["q"]), lengths=lengths, begins=begins, num_new=num_new)
    for sequence in range(batch):
        for position in range(begins[sequence], lengths[sequence]):
            for name in ("k_cache", "v_cache"):
                arguments_at = step.arguments[name][step.place(sequence, position)]
                arguments_at.copy_(draw(heads_k, head_dim))
    return step


def _options(rng: Random, q: Tensor) -> dict[str, Any]:
    batch, heads = q.shape[0], q.shape[2]
    options: dict[str, Any] = {}
    if rng.random() < 0.5:
        options["causal"] = True
    if rng.random() < 0.3:
        options["window_size"] = (rng.choice((-1, 0, 3)), rng.choice((-1, 0, 2)))
    if rng.random() < 0.3:
        options["softcap"] = 2.0
    if rng.random() < 0.3:
        options["softmax_scale"] = 0.4
    if rng.random() < 0.4:
        shape = rng.choice(((heads,), (batch, heads)))
        options["alibi_slopes"] = torch.rand(shape, generator=torch.Generator().manual_seed(rng.randint(0, 999)))
    if rng.random() < 0.2:
        options["num_splits"] = rng.choice((1, 4))
    return options


def _block_table(rng: Random, lengths: list[int], num_new: int, page_size: int, per_sequence: int) -> Tensor:
    """Blocks in any order, none shared; an unusable number wherever none is needed."""
    free = list(range(len(lengths) * per_sequence + 2))
    rng.shuffle(free)
    table = torch.full((len(lengths), per_sequence), NEVER_READ, dtype=torch.int32)
    for sequence, length in enumerate(lengths):
        for block in range(-(-(length + num_new) // page_size)):
            table[sequence, block] = free.pop()
    return table


def expected(step: Step, dtype: torch.dtype) -> dict[str, Tensor]:
    """out, lse and both caches after the step, computed in ``dtype`` but for the caches, which keep theirs."""
    given = step.arguments
    q, caches = given["q"], {name: given[name].clone() for name in ("k_cache", "v_cache")}
    is_local = given.get("window_size", (-1, -1)) != (-1, -1)
    moves = given.get("causal", False) or is_local
    left, right = given.get("window_size", (-1, -1))
    slopes = given.get("alibi_slopes")
    outs, lses = [], []
    for sequence, (begin, length) in enumerate(zip(step.begins, step.lengths, strict=True)):
        queries = torch.stack([turned(row, length + i * moves, given, dtype) for i, row in enumerate(q[sequence])])
        for i in range(step.num_new):
            place = step.place(sequence, length + i)
            caches["k_cache"][place] = turned(given["k"][sequence, i], length + i, given, dtype).to(q.dtype)
            caches["v_cache"][place] = given["v"][sequence, i]
        places = [step.place(sequence, position) for position in range(begin, length + step.num_new)]
        keys, values = (
            torch.stack([cache[place] for place in places]) if places else cache[0, :0] for cache in caches.values()
        )
        out, lse = oracle(
            queries.to(q.dtype)[None],
            keys[None],
            values[None],
            dtype=dtype,
            causal=given.get("causal", False),
            window=(None if left < 0 else left, None if right < 0 else right),
            softcap=given.get("softcap", 0.0),
            scale=given.get("softmax_scale"),
            alibi_slopes=slopes if slopes is None or slopes.dim() == 1 else slopes[sequence],
        )
        outs.append(out)
        lses.append(lse)
    return {"out": torch.cat(outs), "lse": torch.cat(lses), **caches}


def turned(row: Tensor, position: int, given: dict[str, Any], dtype: torch.dtype) -> Tensor:
    """One token's heads [heads, head_dim], its pairs of coordinates multiplied as complex numbers."""
    if "rotary_cos" not in given:
        return row
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    factor = torch.complex(given["rotary_cos"][position].to(wide), given["rotary_sin"][position].to(wide))
    rotary_dim, row = 2 * len(factor), row.to(wide)
    head = row[:, :rotary_dim]
    if given["rotary_interleaved"]:
        pairs = torch.complex(head[:, 0::2], head[:, 1::2]) * factor
        head = torch.view_as_real(pairs).flatten(1)
    else:
        pairs = torch.complex(head[:, : rotary_dim // 2], head[:, rotary_dim // 2 :]) * factor
        head = torch.cat([pairs.real, pairs.imag], dim=1)
    return torch.cat([head, row[:, rotary_dim:]], dim=1)
