"""The largest batch and the longest sequence whose training step fits: tried on a GPU, extrapolated on a CPU.

Either way the activations of a few small steps are measured first, and a line or parabola goes through them: they are
linear in the batch, and in the length linear with tiles and quadratic without. A GPU then tries what the curve
promises, a little more or a little less, until success and failure are close together. On a CPU a step that is too
large would not fail but end the process, so nothing beyond the small ones is tried.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial

import torch

from flashtile.bench import environment, timing
from flashtile.bench.models.cases import LimitCase, ModelCase
from flashtile.bench.models.peers import ModelPeer
from flashtile.bench.models.workloads import Training
from flashtile.bench.results import LimitRow
from flashtile.bench.timing import Failure

_GRANULARITY = {"batch": 1, "seqlen": 128}
_POINTS = {"batch": (2, 4), "seqlen": (256, 512, 1024)}
"""Where activations are measured. They are linear in the batch."""
_CLOSE = 0.03
"""Success and failure are close together when they differ by this share."""
_SEARCH_BUDGETS = 4.0
"""A search that took so many times the budget of a case stops where it is."""
_LARGEST = 2**24
"""Nothing grows beyond, whatever a curve through small steps promises."""


def find(
    case: LimitCase,
    peers: Sequence[ModelPeer],
    device: torch.device,
    *,
    budget_s: float,
    on_share: Callable[[float], None],
) -> tuple[LimitRow, ...]:
    """A row for each peer; ``on_share`` is called with the share of them that is done."""
    rows = []
    for peer_idx, peer in enumerate(peers):
        on_share(peer_idx / len(peers))
        try:
            rows.append(_find(case, peer, device, budget_s=budget_s))
        except Exception as error:
            failure = Failure.of(error)
            rows.append(LimitRow(case=case, peer=peer.name, status="failed", reason=failure.reason))
        timing.release_memory()
    return tuple(rows)


def _find(case: LimitCase, peer: ModelPeer, device: torch.device, *, budget_s: float) -> LimitRow:
    deadline = time.perf_counter() + _SEARCH_BUDGETS * budget_s
    points = _POINTS[case.axis]
    if (reason := environment.lack_of_memory(case.at(points[-1]).least_bytes, device)) is not None:
        return LimitRow(case=case, peer=peer.name, status="failed", reason=reason)
    training = Training(case.at(points[0]), device)
    training.run(peer.make())  # what the first call compiles or keeps is no cost of a step
    timing.release_memory()
    free_bytes = environment.available_bytes(device)
    if free_bytes is None:
        return LimitRow(case=case, peer=peer.name, status="failed", reason="nobody says how much memory is free")
    row = partial(LimitRow, case=case, peer=peer.name, memory_bytes=training.state_bytes + free_bytes)
    peaks = [training.resized(case.at(value)).activation_bytes(peer.make()) for value in points]
    granularity = _GRANULARITY[case.axis]

    def is_promised(value: int) -> bool:
        return extrapolated(points, peaks, value) <= free_bytes

    promised, _ = largest(is_promised, points[-1], granularity=granularity, closeness=0.0)
    if device.type != "cuda":
        return row(status="extrapolated", largest=promised)

    def fits(value: int) -> bool:
        return _fits(training, peer, case.at(value), device)

    def is_over() -> bool:
        return time.perf_counter() > deadline

    found, too_large = largest(
        fits, max(promised, granularity), granularity=granularity, closeness=_CLOSE, is_over=is_over
    )
    return row(status="tried", largest=found, too_large=too_large)


def _fits(training: Training, peer: ModelPeer, case: ModelCase, device: torch.device) -> bool:
    try:
        training.resized(case).run(peer.make())
        torch.cuda.synchronize(device)
        is_fitting = True
    except Exception as error:
        if not timing.is_out_of_memory(error):
            raise
        is_fitting = False
    timing.release_memory()  # outside the except block, which keeps the exception's frames and their tensors alive
    return is_fitting


# --- arithmetic -------------------------------------------------------------------------------------------------------


def extrapolated(points: Sequence[int], values: Sequence[float], at: int) -> float:
    """The line through two points, or the parabola through three, at ``at``; of a parabola that bends down, the line
    through its ends."""
    x0, x1, x2 = points[0], points[1], points[-1]
    y0, y1, y2 = values[0], values[1], values[-1]
    slope = (y2 - y0) / (x2 - x0)
    bend = 0.0 if x1 == x2 else (slope - (y1 - y0) / (x1 - x0)) / (x2 - x1)
    return y0 + slope * (at - x0) + max(bend, 0.0) * (at - x0) * (at - x2)


def largest(
    fits: Callable[[int], bool],
    guess: int,
    *,
    granularity: int,
    closeness: float,
    is_over: Callable[[], bool] = lambda: False,
) -> tuple[int, int | None]:
    """(the largest multiple of ``granularity`` known to fit, or 0; the smallest known not to, or None).

    Strides away from ``guess`` that double until one end of the bracket is found, then bisection.

    Args:
        fits: whether a value does; if one does, every smaller one does.
        guess: where to begin.
        granularity: only its multiples are tried.
        closeness: good enough is a bracket no wider than this share of its lower end, or than ``granularity``.
        is_over: asked before each further try; the bracket as it is then is the answer.
    """
    low, high = 0, None
    value = max(guess // granularity, 1)  # counted in multiples of granularity from here on
    stride = max(1, round(closeness * value))
    while not (low and is_over()):
        if fits(value * granularity):
            low = value
        else:
            high = value
        if high is None:
            if low * granularity >= _LARGEST:
                break
            value, stride = low + stride, 2 * stride
        elif low == 0 and high > 1:
            value, stride = max(1, high - stride), 2 * stride
        elif high - low <= max(1, closeness * low):
            break
        else:
            value = (low + high) // 2
    return low * granularity, None if high is None else high * granularity
