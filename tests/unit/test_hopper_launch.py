"""Which counter of shares a call on Hopper takes; no GPU is needed to say that."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from flashtile.backends.hopper import launch, plan
from flashtile.spec import sizes
from flashtile.spec.devices import DEVICES

OTHER_STREAM = 0x5500


class Streams:
    """Stands for the current streams of GPUs that are not there, by their handles."""

    def __init__(self) -> None:
        self.current: dict[int, int] = {}

    def __call__(self, index: int) -> int:
        return self.current.get(index, 0)


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[Streams]:
    found = Streams()
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", found, raising=False)
    monkeypatch.setattr(launch, "_new_counter", lambda _device: torch.zeros(1, dtype=torch.int32))
    monkeypatch.setattr(launch, "result_maker", lambda *_: lambda: (torch.zeros(1), torch.zeros(1)))
    caches = (launch._results_of, launch._counter_of_default_stream, launch._unread_counter)
    for cache in caches:
        cache.cache_clear()
    yield found
    for cache in caches:
        cache.cache_clear()


def counter(index: int | None = 0, **changes: Any) -> Tensor:
    """What a call on a GPU, or on a CPU, hands to its kernel; many shares for each program."""
    shape: dict[str, Any] = {"seqlen_q": 5000, "heads_q": 8, "head_dim": 128}
    problem = sizes.pose(**(shape | changes))
    made = plan.plan(problem, DEVICES["h200"])
    device = torch.device("cpu") if index is None else torch.device("cuda", index)
    return launch._results_of(problem, made, device)()[2]


@pytest.mark.usefixtures("streams")
def test_calls_on_the_default_stream_share_a_counter() -> None:
    first = counter()
    assert first.tolist() == [0]
    assert counter() is first and counter(seqlen_q=9000, causal=True) is first
    assert counter(index=1) is not first and counter(index=1) is counter(index=1)


def test_each_call_on_another_stream_has_its_own(streams: Streams) -> None:
    """Of the same form as calls on the default stream before and after it, whose counter is not made meanwhile."""
    streams.current[0] = OTHER_STREAM
    others = [counter() for _ in range(3)]
    assert launch._counter_of_default_stream.cache_info().currsize == 0
    streams.current[0] = 0
    shared = counter()
    streams.current[0] = OTHER_STREAM
    others += [counter() for _ in range(3)]
    streams.current[0] = 0
    assert counter() is shared
    assert len({id(each) for each in (shared, *others)}) == 7 and all(each.tolist() == [0] for each in others)


def test_the_stream_of_the_tensors_gpu_is_what_counts(streams: Streams) -> None:
    streams.current[1] = OTHER_STREAM
    assert counter(index=0) is counter(index=0)
    assert counter(index=1) is not counter(index=1)


@pytest.mark.usefixtures("streams")
def test_a_cpu_has_no_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda _index: pytest.fail("asked"), raising=False)
    assert counter(index=None) is not counter(index=None)


@pytest.mark.usefixtures("streams")
def test_without_further_shares_none_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_new_counter", lambda _device: pytest.fail("made"))
    assert counter(index=None, seqlen_q=100) is counter(index=None, seqlen_q=100)
