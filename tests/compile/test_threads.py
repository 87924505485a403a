"""Concurrent calls, as DataParallel and servers make them, give what the same calls give one after the other."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from compile_cases import CASES, assert_same
from torch import Tensor

NUM_THREADS = 4
NAMES = (
    "dense, all a fused kernel takes",
    "dense, everything",
    "packed, everything",
    "dense, everything, naive",
    "packed, without lse",
    "merge",
)


def test_concurrent_calls_equal_serial_calls() -> None:
    """Each thread starts with another case, so different problems are planned and run at the same time."""
    expected = {name: CASES[name].run() for name in NAMES}
    start = Barrier(NUM_THREADS)

    def work(thread_idx: int) -> list[tuple[str, dict[str, Tensor]]]:
        start.wait()
        order = [NAMES[(thread_idx + step) % len(NAMES)] for step in range(2 * len(NAMES))]
        return [(name, CASES[name].run()) for name in order]

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        results = [
            result for future in [pool.submit(work, idx) for idx in range(NUM_THREADS)] for result in future.result()
        ]
    assert len(results) == NUM_THREADS * 2 * len(NAMES)
    for name, found in results:
        assert_same(found, expected[name])


@pytest.mark.parametrize("name", ["dense, everything", "packed, everything"])
def test_threads_may_share_the_tensors_they_differentiate(name: str) -> None:
    case = CASES[name]
    leaves = case.leaves()

    def work(_: int) -> dict[str, Tensor]:
        outputs = case.call(leaves, case.options)
        gradients = torch.autograd.grad(outputs[0].sum(), list(leaves.values()))
        return dict(zip(leaves, gradients, strict=True))

    expected = work(0)
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        for found in pool.map(work, range(2 * NUM_THREADS)):
            assert_same(found, expected)


def test_grad_mode_of_one_thread_does_not_leak_into_another() -> None:
    case = CASES["dense, everything"]
    start = Barrier(NUM_THREADS)

    def work(thread_idx: int) -> bool:
        with torch.set_grad_enabled(thread_idx % 2 == 0):
            start.wait()
            return all(case.call(case.leaves(), case.options)[0].requires_grad for _ in range(5))

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        assert list(pool.map(work, range(NUM_THREADS))) == [True, False, True, False]
