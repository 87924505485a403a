"""The memory meter counts to the byte, so the memory tests that rest on it can be believed."""

import pytest
import torch

from flashtile.testing import peak_extra_bytes

MIB = 2**20


def test_counts_one_allocation_to_the_byte() -> None:
    assert peak_extra_bytes(lambda: torch.zeros(12345, dtype=torch.float64)) == 12345 * 8


def test_peak_is_the_largest_live_total_not_the_sum() -> None:
    def run() -> None:
        for _ in range(5):
            block = torch.ones(3 * MIB, dtype=torch.uint8)
            del block

    assert peak_extra_bytes(run) == 3 * MIB


def test_peak_counts_what_was_released_before_the_end() -> None:
    def run() -> torch.Tensor:
        kept = torch.empty(MIB, dtype=torch.uint8)
        passing = torch.empty(4 * MIB, dtype=torch.uint8)
        del passing
        last = torch.empty(2 * MIB, dtype=torch.uint8)
        del last
        return kept

    assert peak_extra_bytes(run) == 5 * MIB


def test_sees_the_allocations_inside_operators_and_autograd() -> None:
    x = torch.randn(256, 256, requires_grad=True)

    def run() -> None:
        torch.exp(x).sum().backward()

    matrix = 256 * 256 * 4
    # exp's result, kept for the backward, the gradient of the sum, and x.grad: three matrices at most, two at least
    assert 2 * matrix <= peak_extra_bytes(run) <= 3 * matrix + 4096


def test_many_small_allocations_are_replayed_in_order() -> None:
    def run() -> None:
        for size in range(2000):
            torch.empty(size, dtype=torch.uint8)

    assert peak_extra_bytes(run) == 1999


@pytest.mark.gpu
def test_counts_on_the_gpu() -> None:
    assert peak_extra_bytes(lambda: torch.zeros(MIB, device="cuda"), "cuda") == 4 * MIB
