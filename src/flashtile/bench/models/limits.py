"""The largest batch and the longest sequence whose training step fits: tried on a GPU, extrapolated on a CPU.

Either way the activations of a few small steps are measured first, and a line or parabola goes through them: they are
linear in the batch, and in the length linear with tiles and quadratic without. A GPU then tries what the curve
promises; what that took makes a better curve, until success and failure are close together. On a CPU a step that is too
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
_SEARCH_BUDGETS = 20.0
"""A search that took so many times the budget of a case stops where it is; steps this large take long."""
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
    granularity = _GRANULARITY[case.axis]
    peaks = {value: training.resized(case.at(value)).activation_bytes(peer.make()) for value in points}

    def promised() -> int:
        """By the curve through the largest steps that ran."""
        known = sorted(peaks)[-3:]
        values = [peaks[value] for value in known]
        return largest(lambda value: extrapolated(known, values, value) <= free_bytes, granularity)

    if device.type != "cuda":
        return row(status="extrapolated", largest=promised())

    def runs(value: int) -> bool:
        peak = _peak(training, peer, case.at(value))
        if peak is not None:
            peaks[value] = peak
        return peak is not None

    def is_over() -> bool:
        return time.perf_counter() > deadline

    found, too_large = bracket(runs, promised, points[-1], granularity=granularity, closeness=_CLOSE, is_over=is_over)
    return row(status="tried", largest=found, too_large=too_large)


def _peak(training: Training, peer: ModelPeer, case: ModelCase) -> int | None:
    """Bytes that a whole step takes beyond the state; None if there is no room for it."""
    try:
        peak = training.resized(case).step_bytes(peer.make())
    except Exception as error:
        if not timing.is_out_of_memory(error):
            raise
        peak = None
    timing.release_memory()  # outside the except block, which keeps the exception's frames and their tensors alive
    return peak


# --- arithmetic -------------------------------------------------------------------------------------------------------


def extrapolated(points: Sequence[int], values: Sequence[float], at: int) -> float:
    """The line through two points, or the parabola through three, at ``at``; of a parabola that bends down, the line
    through its ends."""
    x0, x1, x2 = points[0], points[1], points[-1]
    y0, y1, y2 = values[0], values[1], values[-1]
    slope = (y2 - y0) / (x2 - x0)
    bend = 0.0 if x1 == x2 else (slope - (y1 - y0) / (x1 - x0)) / (x2 - x1)
    return y0 + slope * (at - x0) + max(bend, 0.0) * (at - x0) * (at - x2)


def largest(fits: Callable[[int], bool], granularity: int) -> int:
    """The largest multiple of ``granularity`` below ``_LARGEST`` that fits; 0 if none does.

    Args:
        fits: whether a value does; if one does, every smaller one does.
    """
    low, high = 0, _LARGEST // granularity  # counted in multiples of granularity
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle * granularity):
            low = middle
        else:
            high = middle
    return low * granularity


def bracket(
    fits: Callable[[int], bool],
    promised: Callable[[], int],
    low: int,
    *,
    granularity: int,
    closeness: float,
    is_over: Callable[[], bool] = lambda: False,
) -> tuple[int, int | None]:
    """(the largest known to fit, the smallest known not to, or None if the time was up before one was found).

    Args:
        fits: whether a value does; if one does, every smaller one does.
        promised: the largest that should, by all that was tried so far.
        low: fits, and so does all that is smaller.
        granularity: only its multiples are tried.
        closeness: good enough is a bracket no wider than this share of its lower end, or than ``granularity``.
        is_over: asked before each further try.
    """

    def little(value: int) -> int:
        return max(granularity, int(closeness * value) // granularity * granularity)

    high, steps_back = None, 1
    while low < _LARGEST and (high is None or high - low > little(low)):
        value = max(promised() // granularity * granularity, low + little(low))  # a little beyond the end shows it
        if high is not None:
            middle = (low + high) // (2 * granularity) * granularity
            value = max(low + granularity, min(value, max(middle, high - steps_back * little(high))))
        if fits(value):
            low, steps_back = value, 1
        else:
            high, steps_back = value, steps_back if high is None else 2 * steps_back
        if is_over():
            break
    return low, high
