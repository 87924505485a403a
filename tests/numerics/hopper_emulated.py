"""Runs calls through the Hopper kernels in an emulation, and compares results with the float64 oracle.

    python hopper_emulated.py SET...                 prints each call of the sets that fails, and how
    python hopper_emulated.py --mistake NAME SET...  with a mistake in the kernel, which should be found

It needs a process of its own: ``gluon_emulator`` takes Triton's place in it.
"""

from __future__ import annotations

import argparse
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from random import Random
from typing import Any

import gluon_emulator
import torch

from flashtile.backends.base import Gradients, Plan, Saved
from flashtile.backends.hopper import plan
from flashtile.spec import devices, validation
from flashtile.spec.operands import Operands
from flashtile.spec.problem import AttentionProblem
from flashtile.testing import Call, CallSpec, Results, assert_results_within_budget, draw_spec

gluon_emulator.install()
launch = import_module("flashtile.backends.hopper.launch")
forward = import_module("flashtile.backends.hopper.forward")
backward = import_module("flashtile.backends.hopper.backward")
backward_narrow = import_module("flashtile.backends.hopper.backward_narrow")
scheduling = import_module("flashtile.backends.hopper.primitives.scheduling")
vars(launch)["_counter"] = launch._counter_of_default_stream  # one for all calls

NUM_SMS = (2, 132)
"""Two programs share the work one by one; with 132 a program has one share, as short calls do on an H200."""
NUM_SMS_OF_SPLIT = (16, 132)
"""Of which each call of the set gets both: keys are split for as many programs as there are."""
LONGEST_PAUSE_S = 3e-4
PLAIN = CallSpec(
    lengths_q=(300, 300), lengths_kv=(390, 390), heads_kv=2, head_dim=128, head_dim_v=128, dtype=torch.bfloat16
)
UNKNOWN: dict[str, Any] = {"bias_axes": None, "mask_axes": None, "dropout_p": 0.0, "scale": None}
"""Options that the backend declines."""


def wide(head_dim: int, /, **changes: Any) -> CallSpec:
    return replace(PLAIN, **({"head_dim": head_dim, "head_dim_v": head_dim} | changes))


def edges() -> Iterator[CallSpec]:
    """Lengths around every tile of the table."""
    for (width, is_causal), steps in plan._FORWARD.items():
        for block_q, block_kv in {(tiles.block_q, tiles.block_kv) for _, tiles in steps}:
            for seqlen_q in (1, block_q - 1, 2 * block_q + 1):
                for seqlen_kv in (1, block_kv, block_kv + 1, 3 * block_kv + 1):
                    yield wide(width, lengths_q=(seqlen_q,), lengths_kv=(seqlen_kv,), causal=is_causal)


def turns() -> Iterator[CallSpec]:
    """Three consumers that take turns; some have fewer tiles than others, or none."""
    for options in ({}, {"causal": True}, {"window": (10, None)}):
        for seqlen in (1100, 1153, 1344):
            yield wide(64, lengths_q=(seqlen,), lengths_kv=(777,), heads_kv=1, **options)
    lengths_q, lengths_kv = (1100, 1, 0, 193, 64), (1100, 5, 70, 0, 300)
    yield wide(64, lengths_q=lengths_q, lengths_kv=lengths_kv, is_packed=True, heads_kv=1, causal=True)


def packed() -> Iterator[CallSpec]:
    """Sequences that end within tiles, before memory that is NaN."""
    lengths_q, lengths_kv = (65, 0, 64, 1, 193, 300, 5), (128, 64, 0, 129, 200, 63, 300)
    for head_dim in (64, 128, 256):
        spec = wide(head_dim, lengths_q=lengths_q, lengths_kv=lengths_kv, is_packed=True, unused_rows=70)
        yield replace(spec, unused_length=90, causal=True)
        yield replace(spec, has_sinks=True, window=(70, 10), strides_k="sliced")


def one_query() -> Iterator[CallSpec]:
    """Heads that share K and V as rows of a tile: views of q and of the output."""
    for head_dim, heads_per_kv in ((64, 2), (128, 5), (40, 130), (256, 4), (33, 3)):
        spec = wide(head_dim, lengths_q=(1, 1), lengths_kv=(200, 200), heads_per_kv=heads_per_kv)
        yield spec
        yield replace(spec, causal=True, strides_q="heads_first", lengths_kv=(65, 65))
        yield replace(spec, heads_kv=1, softcap=3.0, strides_q="every_other")
        yield replace(spec, lengths_q=(1,), lengths_kv=(390,), has_sinks=True)


def split() -> Iterator[CallSpec]:
    """Few queries and many keys, whose parts are shares of their own; some have nothing to see."""
    for head_dim in (40, 64, 128, 256):
        spec = wide(head_dim, lengths_q=(1,), lengths_kv=(900,), heads_kv=1)
        yield replace(spec, heads_per_kv=3)
        yield replace(spec, lengths_q=(1,) * 5, lengths_kv=(641,) * 5)  # more shares than programs
        yield replace(spec, heads_per_kv=2, has_sinks=True, alibi="per head")
        yield replace(spec, lengths_q=(33,), causal=True, has_sinks=True, softcap=5.0)
        yield replace(spec, lengths_q=(20,), window=(250, None), heads_per_kv=2)
        yield replace(spec, lengths_q=(20,), window=(400, 100), strides_q="heads_first")
        yield replace(spec, lengths_q=(150,), causal=True)
        yield replace(spec, lengths_q=(500,), lengths_kv=(270,), causal=True)  # the first see nothing
        yield replace(spec, lengths_q=(70,), spread=1000.0, dtype=torch.float16)
    yield wide(64, lengths_q=(1200,), lengths_kv=(700,), heads_kv=1, causal=True, has_sinks=True)  # three consumers


def huge() -> Iterator[CallSpec]:
    """Maxima that grow from tile to tile."""
    for head_dim in (64, 128, 256):
        yield wide(head_dim, spread=100.0, dtype=torch.float16)
        yield wide(head_dim, spread=1000.0, causal=True, has_sinks=True)


def mixes() -> Iterator[CallSpec]:
    """Random ones, always the same."""
    rng = Random(0)
    blocks = {block for steps in plan._FORWARD.values() for _, tiles in steps for block in (tiles.block_q, 64)}
    lengths = sorted({0, 1, 2, 40, 300, 700} | {block + offset for block in blocks for offset in (-1, 0, 1)})
    dtypes = (torch.float16, torch.bfloat16)
    for _ in range(40):
        spec = draw_spec(rng, dtypes=dtypes, lengths=lengths, max_head_dim=plan.LARGEST_HEAD_DIM)
        yield replace(spec, **UNKNOWN)


def gradients() -> Iterator[CallSpec]:
    """Calls whose backward is run too: each of its kernels, dense and packed."""
    for head_dim in (64, 128, 256):
        spec = wide(head_dim, lengths_q=(130,), lengths_kv=(200,), heads_kv=1, heads_per_kv=2)
        yield replace(spec, causal=True, has_sinks=True)
        yield replace(spec, window=(70, 10), softcap=0.0 if head_dim > 128 else 5.0, alibi="per head")
        lengths_q, lengths_kv = (65, 0, 1, 130), (128, 64, 0, 70)
        yield replace(spec, lengths_q=lengths_q, lengths_kv=lengths_kv, is_packed=True, unused_rows=9, causal=True)
        yield replace(spec, lengths_q=(1,), heads_kv=2, heads_per_kv=3)
        if head_dim < 256:  # tiles that are partial, full and partial again
            yield replace(spec, lengths_q=(400,), lengths_kv=(390,), window=(180, 40))


def further_shares() -> Iterator[CallSpec]:
    """Backward calls of many more tiles of keys than programs; some have no keys, some no queries that see them."""
    spec = wide(64, lengths_q=(130,) * 3, lengths_kv=(200,) * 3, heads_kv=3)
    yield replace(spec, causal=True)
    yield replace(spec, lengths_q=(70,) * 3, lengths_kv=(390,) * 3, heads_kv=2, heads_per_kv=2, window=(70, 10))
    yield replace(spec, lengths_q=(300,) * 3, lengths_kv=(65,) * 3, alibi="per head", has_sinks=True)
    lengths_q, lengths_kv = (65, 0, 1, 130, 40), (128, 64, 0, 70, 300)
    yield replace(spec, lengths_q=lengths_q, lengths_kv=lengths_kv, is_packed=True, unused_rows=9, causal=True)
    yield replace(spec, lengths_q=lengths_q, lengths_kv=lengths_kv, is_packed=True, unused_length=90, window=(33, 20))


def first_rows() -> Iterator[CallSpec]:
    """Backward calls some of whose first rows see keys of the first tile alone: their d_q is stored, not added."""
    for head_dim in (64, 128, 256):
        spec = wide(head_dim, lengths_q=(200,) * 2, lengths_kv=(200,) * 2, heads_kv=1, heads_per_kv=2)
        yield replace(spec, causal=True)
        yield replace(spec, lengths_q=(150,) * 2, causal=True, has_sinks=True)
        yield replace(spec, lengths_q=(330,) * 2, causal=True)
        yield replace(spec, window=(20, 3))
        yield replace(spec, lengths_kv=(60,) * 2)


def split_queries() -> Iterator[CallSpec]:
    """Backward calls of few keys and heads: the steps of a tile are shares of several programs, some without any."""
    for head_dim in (64, 128, 256):
        spec = wide(head_dim, lengths_q=(530,), lengths_kv=(200,), heads_kv=1)
        yield spec
        yield replace(spec, lengths_kv=(530,), causal=True, has_sinks=True)
        yield replace(spec, lengths_q=(190,) * 2, lengths_kv=(130,) * 2, heads_kv=2, heads_per_kv=3, causal=True)
        yield replace(spec, window=(70, 300), heads_per_kv=2, alibi="per head")
        if head_dim < 256:
            yield replace(spec, softcap=5.0, causal=True, lengths_kv=(300,))


SETS: dict[str, Callable[[], Iterator[CallSpec]]] = {
    "edges": edges,
    "turns": turns,
    "packed": packed,
    "one query": one_query,
    "split": split,
    "huge": huge,
    "mixes": mixes,
    "gradients": gradients,
    "two loops": gradients,
    "further shares": further_shares,
    "first rows": first_rows,
    "split queries": split_queries,
    "split queries, two loops": split_queries,
}
MISTAKES: dict[str, dict[str, Any]] = {
    "sums are not rescaled": {"rescaled_if_needed": lambda acc, _rescale: acc},
    "turns are not passed on": {"pass_turn": lambda _part: None},
    "rows behind a sequence are not zeroed": {"zero_rows_from": lambda *_: None},
    "the unit's reads are not waited for": {"tma": types.SimpleNamespace(store_wait=lambda _: None)},
    "every part has all keys": {"part_of": lambda tiles, *_: tiles},
    "no fence": {"fence_async_shared": lambda: None},
    "shares count their steps from 0": {"steps_and_shares": lambda work: (0, work.num_before + 1)},
    "the product of S is not waited for": {
        "warpgroup_mma_wait": lambda most, deps, wait=forward.warpgroup_mma_wait: wait(2 * most, deps=deps)
    },
    "Q is given back while it is multiplied": {
        "release_previous": lambda channel, step: backward.release(channel, step)
    },
    "a tile too many is stored": {
        "num_stored_rows": lambda problem, tiles: (plan.num_stored_rows(problem, tiles) or 0) + tiles.block_q
    },
    "every split begins with the same step": {
        "tile_and_head": lambda work, _call, step: (work.tiles.end - 1 - step, work.kv_head_idx)
    },
    "the counter is not set back": {
        "next_share": lambda schedule: (
            scheduling.gl.num_programs(0) + scheduling.gl.atomic_add(schedule.counter, 1, sem="relaxed")
        )
    },
}
"""Mistake -> names of the kernels' modules that make it."""


def calls(sets: list[str]) -> Iterator[tuple[str, CallSpec, int]]:
    """(set, call, number of SMs)"""
    every = {
        "split": NUM_SMS_OF_SPLIT,
        "split queries": NUM_SMS_OF_SPLIT,
        "split queries, two loops": NUM_SMS_OF_SPLIT,
        "further shares": NUM_SMS[:1],
    }
    for name in sets:
        for index, spec in enumerate(SETS[name]()):
            in_turn = NUM_SMS[index % len(NUM_SMS) :][:1]
            yield from ((name, spec, num_sms) for num_sms in every.get(name, in_turn))


def validated(call: Call, *, has_gradients: bool) -> tuple[AttentionProblem, Operands]:
    for tensor in call.differentiable.values():
        tensor.requires_grad_(has_gradients)
    absent = dict.fromkeys(("bias", "mask", "alibi_slopes", "sinks", "dropout_seed"))
    options: dict[str, Any] = absent | call.options
    return validation.check_call(
        call.q, call.k, call.v, **options, deterministic=False, wants_lse=True, is_packed=call.is_packed
    )


@contextmanager
def poisoned() -> Iterator[None]:
    """What ``poisoned_allocations`` does; the public switch that it sets would import Triton."""
    torch._C._set_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(False, warn_only=False)


def with_two_loops(made: Plan) -> Plan:
    """As long calls have it; these are too short for that."""
    if made.backward.kernel != "backward_narrow":
        return made
    tiles: Any = made.backward.tiles
    return replace(made, backward=replace(made.backward, tiles=replace(tiles, has_two_loops=True)))


def run(spec: CallSpec, num_sms: int, *, has_gradients: bool = False, has_two_loops: bool = False) -> None:
    """Asserts the numerics contract, if the backend takes the call."""
    device = replace(devices.by_name("h200"), num_sms=num_sms)
    devices.detect = lambda _device: device
    call = spec.build()
    problem, operands = validated(call, has_gradients=has_gradients)
    if plan.rejects(problem, device):
        return
    made = plan.plan(problem, device)
    if has_two_loops:
        made = with_two_loops(made)
    d_out, d_lse = spec.build_upstream() if has_gradients else (None, None)
    with poisoned(), torch.no_grad():
        out, lse = launch.forward(problem, operands, made)
        found = Gradients()
        if has_gradients:
            found = launch.backward(problem, operands, Saved(out=out, lse=lse), d_out, d_lse, made)
    named = {name: gradient for name in call.differentiable if (gradient := getattr(found, name)) is not None}
    results = Results(out=out, lse=lse, gradients=named)
    num_drawn = int(launch._counter(call.q.device))
    assert num_drawn == 0, f"the counter of shares was left at {num_drawn}"
    assert_results_within_budget(results, spec.build(), d_out=d_out, d_lse=d_lse, is_small=True)
    if spec.unused_rows:
        for name, result in {"out": out, **named}.items():
            assert name == "sinks" or bool((result[-spec.unused_rows :] == 0).all()), f"unused rows of {name} are not 0"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="+", choices=SETS)
    parser.add_argument("--mistake", choices=MISTAKES)
    parser.add_argument("--seed", type=int, default=0, help="of the order in which partitions come")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    gluon_emulator.Program.pauses = gluon_emulator.Pauses(LONGEST_PAUSE_S, seed=chosen.seed)
    for name, wrong in MISTAKES.get(chosen.mistake, {}).items():
        for module in (forward, backward, backward_narrow, launch):
            if hasattr(module, name):
                setattr(module, name, wrong)
    failures, fewest_keys = 0, (plan.FEWEST_KEYS, plan.FEWEST_KEYS_PER_QUERY)
    for name, spec, num_sms in calls(chosen.sets):
        plan.FEWEST_KEYS, plan.FEWEST_KEYS_PER_QUERY = (64, 0) if name == "split" else fewest_keys
        try:
            run(
                spec,
                num_sms,
                has_gradients=SETS[name] in (gradients, further_shares, first_rows, split_queries),
                has_two_loops=name.endswith("two loops"),
            )
        except AssertionError as error:
            failures += 1
            launch._counter.cache_clear()  # programs that failed draw no further
            print(f"{error}\n    of {spec} with {num_sms} SMs", flush=True)
            if chosen.mistake:
                break
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
