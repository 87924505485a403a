"""Which tiles the Hopper kernels run with, and what they decline. Imports no Triton: plans are made on any machine."""

from __future__ import annotations

import heapq
from dataclasses import dataclass, replace

import torch

from flashtile.backends import gpu
from flashtile.backends.base import KernelPlan, Plan, TileConfig
from flashtile.backends.hopper.constants import PARTS, ROWS
from flashtile.spec import masks, units
from flashtile.spec.devices import DeviceSpec
from flashtile.spec.problem import AttentionProblem

CAPABILITY = (9, 0)
DTYPES = (torch.float16, torch.bfloat16)
LARGEST_HEAD_DIM = 256
LONGEST = 2**30
"""Positions, and sums of two of them, are 32-bit integers in the kernels."""
FEWEST_KEYS = 512
FEWEST_KEYS_PER_QUERY = 16
"""Of a part of the keys of so many queries: at most an eighth of the bytes of K and V is then written and read as
float32 results of parts."""
FEWEST_PARTS = 4
"""That many such parts keys must have to be split: fewer keys are soon read by one program."""
MANY_ROWS, COMBINED_ROWS = 16, 4
"""So many queries of a head are combined several at a time; not by how many parts there are, which lengths decide."""
SHORT = 128
"""Queries and keys up to which Triton's kernels may be the faster ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardTiles(TileConfig):
    """``block_q`` is 64 rows for each consumer."""

    num_stages: int
    """Slots for tiles of K, and of V."""
    is_in_turn: bool = False
    """Whether the consumers take turns on the tensor cores."""
    is_head_by_head: bool = False
    """Whether causal calls finish one head after the other, and not groups of heads whose K and V the cache holds."""
    share_of_l2: int = 1
    """Of such a group: a half, a quarter..., as 2, 4..."""
    most_keys: int = LONGEST
    """That a call may have for these tiles."""
    num_splits: int = 1
    """The parts that the keys of a share are cut into, each a share of its own."""

    @property
    def num_consumers(self) -> int:
        return self.block_q // ROWS


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardTiles(TileConfig):
    """``block_kv`` is 64 rows for each of two consumers, or for both where each has one of d_k and d_v."""

    num_stages: int
    """Slots for tiles of Q, and of d_out."""
    has_two_loops: bool = False
    """Whether tiles that are visible everywhere have a loop without masks; more code, which short calls pay for."""
    stores_first_rows: bool = False
    """Whether d_q of rows that see one tile of keys is stored, not added to zeros; more code in the loop."""
    num_splits: int = 1
    """The parts that the steps of a tile of keys are split into, each a share of its own."""


_SHORT_FULL = ForwardTiles(block_q=128, block_kv=128, num_stages=3, is_in_turn=True)
_SHORTEST_CAUSAL = ForwardTiles(block_q=128, block_kv=64, num_stages=6, share_of_l2=4, most_keys=512)
_SHORT_CAUSAL = ForwardTiles(block_q=128, block_kv=128, num_stages=3, share_of_l2=4)
_LONG = ForwardTiles(block_q=192, block_kv=128, num_stages=3, is_in_turn=True)
_MIDDLE = ForwardTiles(block_q=128, block_kv=128, num_stages=2, share_of_l2=4)
_MIDDLE_LONG = ForwardTiles(block_q=128, block_kv=128, num_stages=2, is_head_by_head=True)
_WIDE = ForwardTiles(block_q=128, block_kv=64, num_stages=2, is_head_by_head=True)

_FORWARD: dict[tuple[int, bool], tuple[tuple[int, ForwardTiles], ...]] = {
    (64, False): ((1024, _SHORT_FULL), (LONGEST, _LONG)),
    (64, True): ((512, _SHORTEST_CAUSAL), (1024, _SHORT_CAUSAL), (LONGEST, _LONG)),
    (128, False): ((LONGEST, _MIDDLE),),
    (128, True): ((1024, _MIDDLE), (LONGEST, _MIDDLE_LONG)),
    (256, False): ((LONGEST, _WIDE),),
    (256, True): ((LONGEST, _WIDE),),
}
"""(width of the wider head, is causal) -> tiles for up to so many queries; see docs/kernels/hopper_forward.md."""

SPLITS = (2, 4, 8)
"""Into how many parts the backward may split its tiles of keys."""
MOST_SHARES_PER_SM = 2
"""With more tiles for each SM it does not."""
FEWEST_STEPS = 4
"""That the longest tile has for each part."""
STEPS_OF_A_START = 4
"""What a share does before and after its steps takes as long as so many."""
STEPS_OF_SPLITS = 5
"""So do the passes for d_k and d_v."""

_NARROW_BACKWARD = BackwardTiles(block_q=64, block_kv=128, num_stages=3)
_MIDDLE_BACKWARD = BackwardTiles(block_q=64, block_kv=128, num_stages=2)
_WIDE_BACKWARD = BackwardTiles(block_q=64, block_kv=64, num_stages=2, stores_first_rows=True)

_BACKWARD: dict[tuple[str, bool], tuple[tuple[int, BackwardTiles], ...]] = {
    ("backward_narrow", False): ((1024, _NARROW_BACKWARD), (LONGEST, replace(_NARROW_BACKWARD, has_two_loops=True))),
    ("backward_narrow", True): ((LONGEST, replace(_NARROW_BACKWARD, stores_first_rows=True)),),
    ("backward", False): ((LONGEST, _MIDDLE_BACKWARD),),
    ("backward", True): ((512, replace(_MIDDLE_BACKWARD, stores_first_rows=True)), (LONGEST, _MIDDLE_BACKWARD)),
    ("backward_wide", False): ((LONGEST, _WIDE_BACKWARD),),
    ("backward_wide", True): ((LONGEST, _WIDE_BACKWARD),),
}
"""(kernel, is causal) -> tiles for up to so many queries; measured in docs/kernels/hopper_backward.md."""


def rejects(problem: AttentionProblem, device: DeviceSpec) -> tuple[str, ...]:
    reasons = list(_rejects_device(device))
    if problem.dtype not in DTYPES:
        reasons.append(f"multiplies float16 and bfloat16, not {units.dtype_name(problem.dtype)}")
    for name, head_dim in (("head_dim", problem.head_dim), ("head_dim_v", problem.head_dim_v)):
        if head_dim > LARGEST_HEAD_DIM:
            reasons.append(f"takes head_dim up to {LARGEST_HEAD_DIM}, and {name} is {head_dim}")
    for name, length in (("seqlen_q", problem.seqlen_q), ("seqlen_kv", problem.seqlen_kv)):
        if length > LONGEST:
            reasons.append(f"takes sequences up to {LONGEST:,} tokens, and {name} is {length:,}")
    if problem.is_empty:
        reasons.append("takes no empty tensors")
    if problem.deterministic and problem.gradients:
        reasons.append(
            "adds up d_q in an order that changes from run to run, and deterministic=True asks for a fixed one"
        )
    if max(widths(problem)) > 128 and problem.softcap > 0 and problem.gradients:
        reasons.append("has no backward with a softcap for head_dim above 128")
    lacking = {
        "a bias": problem.bias_shape is not None,
        "a boolean mask": problem.mask_shape is not None,
        "dropout": problem.dropout_p > 0,
        "a scale that is not positive": problem.scale <= 0,
    }
    reasons += [f"has no kernel with {name}" for name, is_asked in lacking.items() if is_asked]
    return tuple(reasons)


def is_slower_than_triton(problem: AttentionProblem) -> bool:
    """Whether Triton's kernels take a short call's time on a GPU down; see docs/kernels/hopper_forward.md.

    The batch does not matter, for a sequence's result not to depend on how many there are beside it.
    """
    width, is_causal = max(widths(problem)), problem.mask.right is not None
    has_options = problem.has_alibi or problem.has_sinks or problem.softcap > 0 or problem.mask.left is not None
    if problem.layout == "varlen" or has_options or width > 128 or problem.is_empty:  # not measured
        return False
    few_rows = is_causal or width <= 64 or problem.seqlen_q <= ROWS
    return few_rows and max(problem.seqlen_q, problem.seqlen_kv) <= SHORT


def _rejects_device(device: DeviceSpec) -> tuple[str, ...]:
    if device.kind != "cuda" or device.compute_capability != CAPABILITY:
        return (f"runs on Hopper GPUs (compute capability 9.0), these tensors are on {device.name}",)
    if gpu.lacks_triton():
        return ("Triton is not installed; torch's GPU wheels bring it on Linux, else: pip install triton",)
    return ()


def plan(problem: AttentionProblem, device: DeviceSpec) -> Plan:
    forward, backward = _forward(problem, device), _backward(problem, device)
    return Plan(backend="hopper", forward=forward, backward=backward, reason="Gluon kernels for Hopper")


def widths(problem: AttentionProblem) -> tuple[int, int]:
    """(BLOCK_D, BLOCK_DV), the widths of tiles that hold a head."""
    width, width_v = (max(64, 1 << (head_dim - 1).bit_length()) for head_dim in (problem.head_dim, problem.head_dim_v))
    return width, width_v


def forward_problem(problem: AttentionProblem) -> AttentionProblem:
    """What the forward computes: for a single query, heads that share K and V are so many queries of one head.

    So K and V are read once for a group, and not once for each of its heads. Not with what tells heads or positions
    apart.
    """
    tells_apart = problem.has_alibi or problem.has_sinks or not problem.mask.is_unlimited
    if problem.layout == "varlen" or problem.seqlen_q != 1 or problem.heads_per_kv == 1 or tells_apart:
        return problem
    return replace(
        problem,
        seqlen_q=problem.heads_per_kv,
        tokens_q=problem.batch * problem.heads_per_kv,
        heads_q=problem.heads_kv,
    )


def _forward(problem: AttentionProblem, device: DeviceSpec) -> KernelPlan:
    computed = forward_problem(problem)
    tiles = _forward_tiles(computed)
    reason = f"{tiles.num_consumers} warpgroups of {ROWS} rows, {tiles.num_stages} stages"
    if computed is not problem:
        reason += f"; {problem.heads_per_kv} heads that share K and V are rows of a tile"
    companions: tuple[KernelPlan, ...] = ()
    if (parts := num_splits(computed, tiles, device)) > 1:
        tiles = replace(tiles, num_splits=parts)
        reason += f"; keys in {parts} parts"
        companions = (_combine(computed, tiles),)
    return KernelPlan(
        kernel="forward",
        tiles=tiles,
        grid=(min(num_shares(computed, tiles), device.num_sms),),
        shared_memory_bytes=forward_shared_memory_bytes(computed, tiles),
        reason=reason,
        companions=companions,
    )


def _combine(computed: AttentionProblem, tiles: ForwardTiles) -> KernelPlan:
    """A program reads ``PARTS`` parts at a time: of one row or, of many rows, which have fewer, of several."""
    rows = 1 if computed.seqlen_q < MANY_ROWS else COMBINED_ROWS
    parts = PARTS // rows
    return KernelPlan(
        kernel="combine",
        tiles=TileConfig(block_q=rows, block_kv=parts),
        grid=(computed.batch, computed.heads_q, -(-computed.seqlen_q // rows)),
        shared_memory_bytes=0,
        reason=f"{tiles.num_splits} parts of each row, {rows} x {parts} at a time",
    )


def _forward_tiles(problem: AttentionProblem) -> ForwardTiles:
    steps = _FORWARD[max(widths(problem)), problem.mask.right is not None]
    return next(
        tiles for longest, tiles in steps if problem.seqlen_q <= longest and problem.seqlen_kv <= tiles.most_keys
    )


def _backward(problem: AttentionProblem, device: DeviceSpec) -> KernelPlan:
    kernel = backward_kernel(problem)
    steps = _BACKWARD[kernel, problem.mask.right is not None]
    tiles = next(tiles for longest, tiles in steps if problem.seqlen_q <= longest)
    keys = f"{ROWS} keys" + (" each" if tiles.block_kv > ROWS else ", one for d_k and one for d_v")
    num_shares = -(-problem.seqlen_kv // tiles.block_kv) * problem.heads_kv * problem.batch
    reason = f"2 warpgroups of {keys}, {tiles.num_stages} stages"
    if (num_splits := num_backward_splits(problem, tiles, device)) > 1:
        tiles = replace(tiles, num_splits=num_splits)
        num_shares *= num_splits
        reason += f"; the queries of a tile in {num_splits} parts"
    return KernelPlan(
        kernel=kernel,
        tiles=tiles,
        grid=(min(num_shares, device.num_sms) if takes_further_shares(kernel) else num_shares,),
        shared_memory_bytes=backward_shared_memory_bytes(problem, tiles),
        reason=reason,
    )


def num_backward_splits(problem: AttentionProblem, tiles: BackwardTiles, device: DeviceSpec) -> int:
    """Into how many parts the steps of each tile of keys are split: what a model of the GPU's time takes for fastest.

    d_k and d_v are then added up in memory, which costs two more passes: so only where SMs would have nothing to do.
    Packed sequences, whose lengths nobody knows but the GPU, are not split. See docs/kernels/hopper_backward.md.
    """
    num_heads = problem.batch * problem.heads_kv
    num_shares = -(-problem.seqlen_kv // tiles.block_kv) * num_heads
    if problem.layout == "varlen" or num_shares > MOST_SHARES_PER_SM * device.num_sms:
        return 1
    steps = steps_of_tiles(problem, tiles)

    def time(num_splits: int) -> float:
        """In steps: until the last SM is done, if whoever is done first takes the next share."""
        sms = [0.0] * device.num_sms
        for num_steps in steps:
            for _ in range(num_heads * num_splits):
                heapq.heapreplace(sms, sms[0] + num_steps / num_splits + STEPS_OF_A_START)
        return max(sms) + (STEPS_OF_SPLITS if num_splits > 1 else 0)

    most = max(steps, default=0) // FEWEST_STEPS
    return min((1, *(num for num in SPLITS if num <= most)), key=time)


def steps_of_tiles(problem: AttentionProblem, tiles: BackwardTiles) -> list[int]:
    """How many steps each tile of keys of a dense call has: tiles of queries that see any of it, for each head."""
    seqlen_q, seqlen_kv = problem.seqlen_q, problem.seqlen_kv
    steps = []
    for begin in range(0, seqlen_kv, tiles.block_kv):
        end = min(begin + tiles.block_kv, seqlen_kv)
        visited = masks.q_tiles(
            problem.mask, seqlen_q=seqlen_q, seqlen_kv=seqlen_kv, kv_begin=begin, kv_end=end, block_q=tiles.block_q
        )
        steps.append((visited.end - visited.begin) * problem.heads_per_kv)
    return steps


def backward_kernel(problem: AttentionProblem) -> str:
    """By the width of the heads; tanh needs the registers that K and V of narrow ones would take."""
    width = max(widths(problem))
    if width <= 64 and not problem.softcap:
        return "backward_narrow"
    return "backward" if width <= 128 else "backward_wide"


def num_stored_rows(problem: AttentionProblem, tiles: BackwardTiles) -> int | None:
    """How many rows of queries, from the first one on, see keys of the first tile alone: whole tiles of them.

    The program of that tile is the only one that has their d_q, and visits them all. ``None`` where it adds d_q as the
    others do: by the tile tables, and for packed sequences, each of which would have a number of its own.
    """
    if not tiles.stores_first_rows or problem.layout == "varlen":
        return None
    offset, left, right = problem.seqlen_kv - problem.seqlen_q, problem.mask.left, problem.mask.right
    if right is None:
        num_rows = problem.seqlen_q if problem.seqlen_kv <= tiles.block_kv else 0
    elif offset + right < 0:  # the first rows see nothing, and nobody visits them
        num_rows = 0
    else:
        num_rows = max(0, tiles.block_kv - offset - right) // ROWS * ROWS
    if left is not None:  # nor those that are so far behind the first tile
        num_rows = min(num_rows, max(0, min(tiles.block_kv, problem.seqlen_kv) - offset + left))
    return num_rows


def takes_further_shares(kernel: str) -> bool:
    """Whether programs of a backward kernel take a further tile of keys when they are done with one.

    It loads the first tiles of a share while the one before is stored, and takes registers that the others lack.
    """
    return kernel == "backward_narrow"


def num_shares(computed: AttentionProblem, tiles: ForwardTiles) -> int:
    """Blocks of queries in all heads, of what ``forward_problem`` says, times the parts of their keys."""
    return -(-computed.seqlen_q // tiles.block_q) * computed.heads_q * computed.batch * tiles.num_splits


def num_splits(computed: AttentionProblem, tiles: ForwardTiles, device: DeviceSpec) -> int:
    """Into how many parts the keys of a share are cut: as many as give each SM at most one share of a sequence.

    A sequence decides alone, for its result not to depend on how many there are beside it. So packed ones, whose
    lengths nobody knows but the GPU, are not split. See docs/kernels/hopper_forward.md.
    """
    if computed.layout == "varlen":
        return 1
    left, right = computed.mask.left, computed.mask.right
    num_queries, num_keys = min(computed.seqlen_q, tiles.block_q), computed.seqlen_kv
    if left is not None and right is not None:
        num_keys = min(num_keys, left + num_queries + right)
    fewest_keys = max(FEWEST_KEYS, FEWEST_KEYS_PER_QUERY * num_queries)
    if num_keys < FEWEST_PARTS * fewest_keys:
        return 1
    most = min(device.num_sms * computed.batch // num_shares(computed, tiles), num_keys // fewest_keys)
    num_tiles = -(-num_keys // tiles.block_kv)
    tiles_of_a_part = -(-num_tiles // max(most, 1))
    return -(-num_tiles // tiles_of_a_part)


def order_of_heads(computed: AttentionProblem, tiles: ForwardTiles, device: DeviceSpec) -> tuple[int, int]:
    """(alone, group): the forward finishes so many heads one after the other, the others in groups of so many.

    Under a causal mask the tiles of a group come by what there is to do, the most first. Where heads come one by one,
    the last of them are a group, for all SMs to end together. Without causality order does not matter.
    """
    num_heads = computed.batch * computed.heads_q
    if computed.mask.right is None:
        return 0, 1
    if tiles.is_head_by_head:
        num_tiles = -(-computed.seqlen_q // tiles.block_q)
        group = min(num_heads, 2 * -(-device.num_sms // num_tiles))
        return num_heads - group, group
    bytes_per_head = computed.seqlen_kv * (computed.head_dim + computed.head_dim_v) * computed.dtype.itemsize
    cache = device.l2_bytes // tiles.share_of_l2
    largest = max(1, cache // max(bytes_per_head, 1)) * computed.heads_per_kv
    num_groups = -(-num_heads // largest)
    return 0, -(-num_heads // num_groups)


def heads_together(problem: AttentionProblem, num_kv_tiles: int, device: DeviceSpec) -> int:
    """How many kv heads the backward ends with together, so many that each SM has a tile; see ``Order``."""
    if problem.mask.right is None:
        return 1
    return min(problem.batch * problem.heads_kv, -(-device.num_sms // num_kv_tiles))


def num_q_slots(problem: AttentionProblem) -> int:
    """How many tiles of Q each consumer has, so that the next one is there in time."""
    return 2 if widths(problem)[0] <= 128 else 1


def out_columns(problem: AttentionProblem, tiles: ForwardTiles) -> int:
    """The columns of the output that go through shared memory at a time; 0 if it goes straight.

    As packed ones do, and those of parts of the keys.
    """
    if problem.layout == "varlen" or problem.head_dim_v % 8 or tiles.num_splits > 1:
        return 0
    return min(widths(problem)[1], 128)


def forward_shared_memory_bytes(problem: AttentionProblem, tiles: ForwardTiles) -> int:
    (width, width_v), itemsize = widths(problem), problem.dtype.itemsize
    columns_q = num_q_slots(problem) * width + out_columns(problem, tiles)
    return (tiles.block_q * columns_q + tiles.num_stages * tiles.block_kv * (width + width_v)) * itemsize


def backward_shared_memory_bytes(problem: AttentionProblem, tiles: BackwardTiles) -> int:
    """K and V, the slots of Q and d_out with their two numbers per row, and four squares of P and dS."""
    (width, width_v), itemsize = widths(problem), problem.dtype.itemsize
    parts = tiles.block_kv // ROWS
    columns = (parts + tiles.num_stages) * (width + width_v) + 4 * ROWS
    return ROWS * (columns * itemsize + 2 * tiles.num_stages * 4)
