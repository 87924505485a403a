"""Compiles in several processes what a run will need, into the disk caches that the run then finds filled.

FlexAttention takes seconds to compile for each shape and direction, one after the other, while a GPU's host has cores
to spare. Nothing here decides a figure: without it the run's first calls take longer, and what fails here fails again,
with its reason, when the run comes to it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from multiprocessing.pool import Pool
from typing import Any

import torch

from flashtile.bench import baselines, kernels, timing
from flashtile.bench.baselines import Peer
from flashtile.bench.cases import BenchCase
from flashtile.bench.tensors import CaseTensors

_Job = tuple[BenchCase, str, str]
"""(case, name of the peer, device): what travels to a process. Peers themselves do not; they hold functions."""

MAX_S = 180.0
"""A help that takes longer is none."""
_MAX_PROCESSES, _MIN_JOBS = 12, 8
"""Each process takes about half a GiB of the GPU's memory while it lives, and ten seconds to start."""


def default_num_processes(num_jobs: int) -> int:
    """As many as there are jobs and cores for; 0 where starting them takes longer than it saves."""
    return 0 if num_jobs < _MIN_JOBS else min(num_jobs, _MAX_PROCESSES, max(1, (os.cpu_count() or 1) - 2))


def jobs(cases: Sequence[BenchCase], peers: Sequence[Peer], device: torch.device) -> tuple[_Job, ...]:
    """The first calls that wait for a compiler; those of a backward, which take longest, first."""
    return tuple(
        (case, peer.name, str(device))
        for case in sorted(cases, key=lambda case: case.direction == "forward")
        for peer in peers
        if peer.compiles and peer.unavailable_reason(case, device) is None
    )


def run(
    todo: Sequence[_Job], num_processes: int, *, on_done: Callable[[int], None] = lambda _: None, max_s: float = MAX_S
) -> list[str]:
    """Does the jobs and gives their memory back; to be called from the main thread, which alone can take Ctrl-C.

    Args:
        todo: from ``jobs``.
        num_processes: at least 1.
        on_done: called with the number of jobs that are done.
        max_s: seconds after which the rest is left undone.

    Returns:
        One line for each job that failed or was left undone.
    """
    outcomes: list[str | None] = []
    deadline = time.monotonic() + max_s
    with _processes(num_processes) as pool:  # leaving it ends the processes
        results = pool.imap_unordered(_first_call, todo)
        try:
            for num_done in range(1, len(todo) + 1):
                outcomes.append(results.next(timeout=max(0.0, deadline - time.monotonic())))
                on_done(num_done)
        except multiprocessing.TimeoutError:
            outcomes.append(f"{len(todo) - len(outcomes)} of {len(todo)} first calls were left after {max_s:g} s")
    pool.join()
    return [outcome for outcome in outcomes if outcome is not None]


def _processes(num_processes: int) -> Pool:
    """Processes that Ctrl-C does not reach: the first one ends them."""
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)  # what a process ignores, those that it starts ignore too
    try:
        return context.Pool(num_processes, initializer=_prepare_process)
    finally:
        signal.signal(signal.SIGINT, handler)


def _prepare_process() -> None:
    torch.set_num_threads(1)
    settings: Any = import_module("torch._inductor.config")
    settings.compile_threads = 1  # or each process would start a pool of its own


def _first_call(job: _Job) -> str | None:
    """Runs one peer on one case once; the failure as a line of text, None if there is none."""
    case, name, device = job
    try:
        _call_once(next(peer for peer in baselines.PEERS if peer.name == name), case, torch.device(device))
    except Exception as error:
        return f"{name}, {case.label}: {type(error).__name__}: {error}"
    finally:
        timing.release_memory()
    return None


def _call_once(peer: Peer, case: BenchCase, device: torch.device) -> None:
    tensors = CaseTensors.random(case, device)
    with peer.scope():
        kernels.runner(peer.prepare(tensors), case.direction, tensors)()
