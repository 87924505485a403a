"""Measures how much memory a call needs beyond what was live before it, and poisons memory that nobody initialised."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_extra_bytes(run: Callable[[], object], device: torch.device | str = "cpu") -> int:
    """The largest number of bytes that ``run()`` holds at one time beyond what was live before it.

    What ``run`` returns counts, because it is live when ``run`` ends. Call ``run`` once beforehand if its first call
    compiles or caches something. On a CPU, memory that a library allocates behind torch's back is not seen, and
    releasing what was live before does not lower the count.

    Args:
        run: called exactly once, without arguments.
        device: the device whose memory is meant.

    Returns:
        Bytes, exact: on a CPU summed over the profiler's allocation events in order, on a GPU from the caching
        allocator's statistics, with sizes rounded up as the allocator does (to 512 bytes).

    Example:
        >>> import torch
        >>> from flashtile.testing import peak_extra_bytes
        >>> peak_extra_bytes(lambda: torch.zeros(1024, dtype=torch.float64))
        8192
    """
    device = torch.device(device)
    if device.type == "cpu":
        return _peak_on_cpu(run)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _peak_on_cpu(run: Callable[[], object]) -> int:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler would log to the terminal otherwise
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recording:
        run()
    recorded: Any = recording.profiler  # neither torch's public interface nor its type stubs show the events' sizes
    events = [event for event in recorded.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.device_type().name == "CPU":
            live += event.nbytes()  # negative when memory is released
            peak = max(peak, live)
    return peak


@contextmanager
def poisoned_allocations() -> Iterator[None]:
    """Within the context, ``torch.empty`` and its likes return NaN (the largest value for integers), never old data.

    A kernel that reads memory which nobody wrote, or leaves part of its output unwritten, then returns NaN every time
    instead of a wrong number now and then. Process-wide, like the torch switches it sets.

    Example:
        >>> import torch
        >>> from flashtile.testing import poisoned_allocations
        >>> with poisoned_allocations():
        ...     torch.empty(2)
        tensor([nan, nan])
    """
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    was_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    switches: Any = torch.utils.deterministic  # a module whose attribute torch's type stubs do not know
    was_filling = switches.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch fills memory in deterministic mode only
    switches.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was_deterministic, warn_only=was_warn_only)
        switches.fill_uninitialized_memory = was_filling
