"""From cases and peers to rows: what is measured, what is refused, what is checked."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flashtile.bench import environment, kernels, timing
from flashtile.bench.baselines import FLASHTILE, NAIVE, PEERS, SDPA, Peer
from flashtile.bench.cases import DIRECTIONS, OPTIONS, BenchCase, Direction, Option
from flashtile.bench.formula import AttentionFn
from flashtile.bench.results import KernelResults, KernelRow
from flashtile.bench.tensors import CaseTensors
from flashtile.bench.timing import CpuClock

CPU = torch.device("cpu")
CASE = BenchCase(
    direction="forward",
    dtype="float32",
    head_dim=16,
    seqlen=32,
    is_causal=True,
    batch=1,
    heads_q=2,
    heads_kv=2,
)
ON_CPU = [peer for peer in PEERS if peer.unavailable_reason(CASE, CPU) is None]
UNUSABLE = "has NaN or infinite values"
NAIVE_PEER = next(peer for peer in PEERS if peer.name == NAIVE)


@pytest.fixture(autouse=True)
def cheap_ceilings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "matmul_ceiling_tflops", lambda *_: 2.0)
    monkeypatch.setattr(timing, "copy_ceiling_gb_per_s", lambda *_: 3.0)


def run(peers: list[Peer], *cases: BenchCase) -> KernelResults:
    empty = kernels.start(cases, peers, CPU, CpuClock(), budget_s=1e-3)
    return list(kernels.run(empty, cases, peers, CPU, CpuClock(), min_rounds=2))[-1]


def fake(name: str, attend: AttentionFn | None = None, prepare: Callable[[], AttentionFn] | None = None) -> Peer:
    """A peer made of one function; by default it does what torch does, so that its result is right."""
    sdpa = next(peer for peer in PEERS if peer.name == SDPA)

    def default(tensors: CaseTensors) -> AttentionFn:
        return prepare() if prepare else attend or sdpa.prepare(tensors)

    return Peer(name=name, prepare=default)


def only(results: KernelResults, peer: str) -> KernelRow:
    (row,) = [row for row in results.rows if row.peer == peer]
    return row


def fail(error: BaseException) -> AttentionFn:
    def attend(_q: Tensor, _k: Tensor, _v: Tensor) -> Tensor:
        raise error

    return attend


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_direction_gives_a_full_row_for_everyone(direction: Direction) -> None:
    results = run(ON_CPU, replace(CASE, direction=direction))
    assert results.is_complete
    assert [row.peer for row in results.rows] == [FLASHTILE, NAIVE, SDPA]
    for row in results.rows:
        assert row.status == "ok" and row.reason is None
        assert row.timing is not None and row.timing.rounds >= 2
        assert row.tflops == pytest.approx(row.case.flops / row.timing.median_ms * 1e-9)
        assert row.tflops and row.percent_of_ceiling == pytest.approx(100 * row.tflops / 2.0)
        assert row.peak_extra_bytes is not None and row.peak_extra_bytes > 0
        assert row.difference is not None and row.difference < 1e-5
        naive, sdpa = (only(results, name).timing for name in (NAIVE, SDPA))
        assert naive and row.speedup_over_naive == naive.median_ms / row.timing.median_ms
        assert sdpa and row.speedup_over_sdpa == sdpa.median_ms / row.timing.median_ms


def test_flashtile_rows_say_which_kernel_ran_and_why() -> None:
    results = run(ON_CPU, CASE)
    row = only(results, FLASHTILE)
    assert row.kernel is not None and row.kernel.startswith("cpu/")
    assert row.kernel_reason
    assert only(results, SDPA).kernel is None


def test_naive_memory_is_that_of_its_score_matrices() -> None:
    case = replace(CASE, seqlen=512)
    results = run(ON_CPU, case)
    naive, ours = (only(results, name).peak_extra_bytes for name in (NAIVE, FLASHTILE))
    assert naive is not None and naive >= NAIVE_PEER.scratch_bytes(case)
    assert ours is not None and ours < naive / 2


def test_the_backward_is_timed_without_its_forward() -> None:
    forwards: list[bool] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        forwards.append(True)
        return q + k + v

    results = run([fake("x", attend)], replace(CASE, direction="backward"))
    timed = only(results, "x").timing
    assert timed is not None and timed.rounds >= 2
    assert len(forwards) == 2, "one for the graph that is kept, one for the memory of both"


def test_everyone_gets_the_same_tensors() -> None:
    seen: list[tuple[int, ...]] = []

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen.append((q.data_ptr(), k.data_ptr(), v.data_ptr()))
        return q.clone()

    run([fake("a", attend), fake("b", attend)], CASE)
    assert len(set(seen)) == 1
    tensors = CaseTensors.random(CASE, CPU)
    assert tensors.q.shape == (1, 32, 2, 16) and not tensors.q.requires_grad
    assert tensors.q.std() > 0.5 and not torch.equal(tensors.q, tensors.k)


def test_a_refusal_is_a_row_with_the_reason_and_torch_s_warnings() -> None:
    def attend(_q: Tensor, _k: Tensor, _v: Tensor) -> Tensor:
        for text in (
            "Flash attention kernel not used because:",
            "Memory Efficient attention has been runtime disabled.",
            "Flash attention requires\n  half precision",
        ):
            warnings.warn(f"{text} (Triggered internally at /torch/sdp_utils.cpp:986.)", stacklevel=1)
        raise RuntimeError("No available kernel. Aborting execution.")

    results = run([*ON_CPU, fake("picky", attend)], CASE)
    row = only(results, "picky")
    assert (row.status, row.timing) == ("refused", None)
    assert row.reason == (
        "RuntimeError: No available kernel. Aborting execution.; Flash attention requires half precision"
    )
    assert only(results, SDPA).status == "ok"


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_out_of_memory_is_a_row_and_the_others_go_on(direction: Direction) -> None:
    greedy = fake("greedy", lambda _q, _k, _v: torch.empty(2**60))
    results = run([greedy, *ON_CPU], replace(CASE, direction=direction), replace(CASE, direction=direction, seqlen=33))
    rows = [row for row in results.rows if row.peer == "greedy"]
    assert [row.status for row in rows] == ["out_of_memory"] * 2
    assert all("memory" in (row.reason or "") for row in rows)
    assert [row.status for row in results.rows].count("ok") == 6


def test_out_of_memory_in_a_later_round_is_a_row_too() -> None:
    calls: list[None] = []

    def attend(q: Tensor, _k: Tensor, _v: Tensor) -> Tensor:
        calls.append(None)
        if len(calls) == 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return q.clone()

    row = only(run([fake("leaky", attend)], CASE), "leaky")
    assert (row.status, row.reason) == ("out_of_memory", "CUDA out of memory")


def test_inputs_that_do_not_fit_are_rows() -> None:
    results = run(ON_CPU, replace(CASE, seqlen=2**50))
    assert {row.status for row in results.rows} == {"out_of_memory"}
    assert len(results.rows) == 3


def test_a_formula_that_cannot_fit_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "available_host_bytes", lambda: 1000)
    results = run(ON_CPU, CASE)
    naive, ours = only(results, NAIVE), only(results, FLASHTILE)
    assert naive.status == "out_of_memory"
    assert naive.reason == "needs at least 16.0 KiB, 1000 B are free: not tried"
    assert ours.status == "ok" and ours.speedup_over_naive is None and ours.speedup_over_sdpa is not None


@pytest.mark.parametrize("value", [0.0, math.nan, math.inf])
def test_a_wrong_result_is_not_timed(value: float) -> None:
    results = run([*ON_CPU, fake("wrong", lambda q, _k, _v: torch.full_like(q, value))], CASE)
    row = only(results, "wrong")
    assert (row.status, row.timing) == ("wrong_result", None)
    assert row.reason == ("differs from flashtile by 1 of the largest magnitude" if value == 0 else UNUSABLE)
    assert row.difference == (1.0 if value == 0 else None)


def test_a_result_that_is_not_finite_judges_nobody() -> None:
    broken = Peer(name=FLASHTILE, prepare=lambda _: lambda q, _k, _v: torch.full_like(q, math.nan))
    results = run([broken, NAIVE_PEER, fake("right")], CASE)
    assert [(row.peer, row.status, row.reason) for row in results.rows] == [
        (FLASHTILE, "wrong_result", UNUSABLE),
        (NAIVE, "ok", None),
        ("right", "ok", None),
    ]


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_every_option_is_measured_and_agreed_on(option: Option, direction: Direction) -> None:
    results = run(ON_CPU, replace(CASE, option=option, direction=direction))
    assert [(row.status, row.reason) for row in results.rows] == [("ok", None)] * 3
    assert all(row.difference is not None and row.difference < 1e-5 for row in results.rows)


def test_who_takes_no_option_has_a_row_that_says_so() -> None:
    picky = Peer(name="picky", prepare=NAIVE_PEER.prepare, options=("plain",))
    results = run([picky], CASE, replace(CASE, option="bias"))
    assert [(row.status, row.reason) for row in results.rows] == [
        ("ok", None),
        ("unavailable", "takes no bias as it is called here"),
    ]
    assert results.missing_peers == {}


def test_the_greedy_come_last_and_flashtile_first() -> None:
    called: list[str] = []

    def watched(name: str, scratch_bytes: int) -> Peer:
        def prepare(tensors: CaseTensors) -> AttentionFn:
            called.append(name)
            return NAIVE_PEER.prepare(tensors)

        return Peer(name=name, prepare=prepare, scratch_bytes=lambda _: scratch_bytes)

    results = run([watched("b", 2), watched("c", 3), watched(FLASHTILE, 4), watched("a", 1)], CASE)
    assert called == [FLASHTILE, "a", "b", "c"]
    assert [row.peer for row in results.rows] == ["b", "c", FLASHTILE, "a"]


def test_a_wrong_gradient_is_not_timed() -> None:
    formula = NAIVE_PEER.prepare(CaseTensors.random(CASE, CPU))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = formula(q, k, v)
        return out.detach() + (q - q.detach())

    results = run([*ON_CPU, fake("wrong", attend)], replace(CASE, direction="backward"))
    row = only(results, "wrong")
    assert row.status == "refused", "k and v have no gradient at all"
    half_right = fake("half", lambda q, k, v: attend(q, k, v) + 0 * (k + v))
    assert only(run([*ON_CPU, half_right], replace(CASE, direction="backward")), "half").status == "wrong_result"


def test_who_takes_no_case_at_all_is_listed_once_and_has_no_rows() -> None:
    absent = Peer(name="absent", prepare=lambda _: fail(AssertionError()), needs_gpu=True)
    picky = Peer(name="picky", prepare=NAIVE_PEER.prepare, dtypes=("float32",))
    results = run([absent, picky], CASE, replace(CASE, dtype="bfloat16"))
    assert results.missing_peers == {"absent": "needs a GPU"}
    assert [(row.peer, row.status, row.reason) for row in results.rows] == [
        ("picky", "ok", None),
        ("picky", "unavailable", "takes float32 only"),
    ]


def test_rows_of_finished_cases_come_out_before_an_interrupt() -> None:
    def prepare(tensors: CaseTensors) -> AttentionFn:
        return fail(KeyboardInterrupt()) if tensors.case.seqlen == 33 else NAIVE_PEER.prepare(tensors)

    cases = [CASE, replace(CASE, seqlen=33), replace(CASE, seqlen=34)]
    peers = [Peer(name="x", prepare=prepare)]
    results = kernels.start(cases, peers, CPU, CpuClock(), budget_s=1e-3)
    seen: list[KernelResults] = []
    with pytest.raises(KeyboardInterrupt):
        seen.extend(kernels.run(results, cases, peers, CPU, CpuClock(), min_rounds=1))
    assert [row.case for found in seen for row in found.rows] == [CASE]
    assert not seen[-1].is_complete


def test_progress_names_the_running_case() -> None:
    cases = [CASE, replace(CASE, seqlen=33)]
    seen: list[tuple[BenchCase, float]] = []
    results = kernels.start(cases, ON_CPU, CPU, CpuClock(), budget_s=1e-3)
    for _ in kernels.run(
        results, cases, ON_CPU, CPU, CpuClock(), min_rounds=1, on_progress=lambda *step: seen.append(step)
    ):
        assert seen[-1][1] == 1.0
    assert list(dict.fromkeys(case for case, _ in seen)) == cases
    assert seen[0] == (CASE, 0.0)


def test_ceilings_are_measured_for_each_dtype_once() -> None:
    results = run(ON_CPU, CASE, replace(CASE, dtype="bfloat16"), replace(CASE, seqlen=40))
    assert results.ceilings.matmul_tflops == {"float32": 2.0, "bfloat16": 2.0}
    assert results.ceilings.copy_gb_per_s == 3.0
