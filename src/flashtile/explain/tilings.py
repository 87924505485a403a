"""From a plan to what the cost model needs to know of it: the kernels that run, their tiles and what they hold."""

from __future__ import annotations

from flashtile.backends.base import KernelPlan, Plan, TileConfig
from flashtile.backends.hopper.plan import BackwardTiles, ForwardTiles
from flashtile.backends.triton.constants import STATISTICS_ROWS
from flashtile.spec.accounting import Direction
from flashtile.spec.devices import DeviceSpec
from flashtile.spec.problem import AttentionProblem
from flashtile.spec.tiling import SplitBackward, Tiling

ASSUMED_TILES = TileConfig(block_q=128, block_kv=128)
"""What the tiled column assumes where no backend that tiles takes the problem."""

_GRADIENTS_OF = {"backward_kv": {"k", "v"}, "backward_q": {"q"}, "bias_gradient": {"bias"}}
"""Kernels that run only if one of these gradients is wanted."""

_TILES_OF_ALL_HEADS = {"forward": 2, "backward": 4}
"""Score tiles per head that ``backends/cpu/tiled.py`` holds at once; measured, as are the next two."""
_TILES_FOR_DROPOUT = 5
_TILES_FOR_SOFTCAP = {"forward": 0, "backward": 2}

_TILES_OF_A_CORE = {"forward": 1, "backward": 2}
"""Score tiles that torch's fused op holds per core; 16-bit inputs add one for what they are converted into."""


def launched(kernel: KernelPlan, problem: AttentionProblem) -> tuple[KernelPlan, ...]:
    """The kernel and its companions, less those whose gradients nobody wants."""

    def runs(one: KernelPlan) -> bool:
        wanted = _GRADIENTS_OF.get(one.kernel)
        return wanted is None or bool(wanted & problem.gradients)

    return tuple(filter(runs, (kernel, *kernel.companions)))


def tiling(problem: AttentionProblem, device: DeviceSpec, plan: Plan | None, direction: Direction) -> Tiling:
    """The plan's tiles if it has any, else the assumed ones."""
    kernel = None
    if plan is not None and plan.backend != "naive":
        kernel = plan.forward if direction == "forward" else plan.backward
    tiles = ASSUMED_TILES if kernel is None else kernel.tiles
    heap_tiles, sequences_at_once = _held_on_cpu(problem, device, kernel, direction)
    return Tiling(
        block_q=tiles.block_q,
        block_kv=tiles.block_kv,
        is_assumed=kernel is None,
        num_programs=device.num_sms,
        cache_bytes=device.l2_bytes,
        heap_tiles=heap_tiles,
        sequences_at_once=sequences_at_once,
        split=None if kernel is None else _split(kernel, problem),
        num_parts=tiles.num_splits if isinstance(tiles, ForwardTiles | BackwardTiles) else 1,
        row_statistics=("lse_log2", "delta") if plan is not None and plan.backend == "hopper" else ("delta",),
    )


def _held_on_cpu(
    problem: AttentionProblem, device: DeviceSpec, kernel: KernelPlan | None, direction: Direction
) -> tuple[int, int | None]:
    """(heap_tiles, sequences_at_once): our tiles hold several of every head, one sequence after the other.

    torch's fused op holds some per core and sums d_q up in place.
    """
    if kernel is not None and kernel.kernel == "torch_fused":
        return device.num_sms * (_TILES_OF_A_CORE[direction] + (problem.dtype.itemsize == 2)), 0
    is_ours = kernel.kernel in ("tiled", "tiled_16bit") if kernel is not None else device.kind == "cpu"
    if not is_ours:
        return 0, None
    per_head = _TILES_OF_ALL_HEADS[direction]
    per_head += _TILES_FOR_DROPOUT * (problem.dropout_p > 0) + _TILES_FOR_SOFTCAP[direction] * (problem.softcap > 0)
    return problem.heads_q * per_head, 1


def _split(kernel: KernelPlan, problem: AttentionProblem) -> SplitBackward | None:
    """How the kernel's companions share the gradients; None if it computes them all."""
    companions = {companion.kernel: companion for companion in kernel.companions}
    if "backward_q" not in companions:
        return None
    d_bias = companions.get("bias_gradient") if "bias" in problem.gradients else None
    return SplitBackward(
        q_tiles=_pair(companions["backward_q"].tiles),
        bias_tiles=None if d_bias is None else _pair(d_bias.tiles),
        bias_shares=1 if d_bias is None else d_bias.grid[-1],
        rows_block=STATISTICS_ROWS,
    )


def _pair(tiles: TileConfig) -> tuple[int, int]:
    return tiles.block_q, tiles.block_kv
