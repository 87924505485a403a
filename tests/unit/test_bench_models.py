"""``bench models`` from cases to rows: what is measured, does not fit, is wrong, and is kept after an interrupt."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from flashtile.bench import environment, timing
from flashtile.bench.baselines import FLASHTILE, NAIVE, SDPA
from flashtile.bench.formula import AttentionFn, naive_attention
from flashtile.bench.models import measuring, workloads
from flashtile.bench.models.cases import GRIDS, MODES, LimitCase, Mode, ModelCase
from flashtile.bench.models.peers import PEERS, ModelPeer
from flashtile.bench.models.workloads import Training
from flashtile.bench.results import ModelResults, ModelRow
from flashtile.bench.timing import CpuClock
from flashtile.bench.transformer import ModelShape

CPU = torch.device("cpu")
SHAPE = ModelShape(layers=2, d_model=32, heads=2, vocabulary=61)
CASE = ModelCase(mode="train", size="tiny", shape=SHAPE, seqlen=24, batch=2, dtype="float32")
FUNCTIONS = {peer.name: peer.make for peer in PEERS}


def run(*cases: ModelCase | LimitCase, peers: Sequence[ModelPeer] = PEERS) -> ModelResults:
    return list(results_of(*cases, peers=peers))[-1]


def results_of(*cases: ModelCase | LimitCase, peers: Sequence[ModelPeer] = PEERS) -> Iterator[ModelResults]:
    empty = measuring.start(CPU, budget_s=1e-3)
    return measuring.run(empty, cases, peers, CPU, CpuClock(), min_rounds=2)


def only(results: ModelResults, peer: str) -> ModelRow:
    (row,) = [row for row in results.rows if row.peer == peer]
    return row


def failing(error: BaseException, *, after: int = 0) -> Callable[[], AttentionFn]:
    """Makes functions that are right for some calls and then raise."""

    def make() -> AttentionFn:
        right, num_calls = FUNCTIONS[NAIVE](), 0

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            nonlocal num_calls
            num_calls += 1
            if num_calls > after:
                raise error
            return right(q, k, v)

        return attend

    return make


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_gives_a_full_row_for_everyone(mode: Mode) -> None:
    results = run(replace(CASE, mode=mode))
    assert results.is_complete
    assert [row.peer for row in results.rows] == [FLASHTILE, NAIVE, SDPA]
    naive = only(results, NAIVE)
    for row in results.rows:
        assert row.status == "ok" and row.reason is None
        assert row.timing is not None and row.timing.rounds >= 2 and naive.timing is not None
        assert row.peak_bytes is not None and row.state_bytes is not None and naive.peak_bytes is not None
        assert 0 < row.state_bytes < row.peak_bytes
        assert row.attention_ms is not None and row.attention_ms > 0
        assert row.attention_share is not None and 0 < row.attention_share < 1
        assert row.amdahl_limit == pytest.approx(1 / (1 - row.attention_share))
        assert row.difference is not None and row.difference < 1e-4
        assert row.speedup_over_naive == pytest.approx(naive.timing.median_ms / row.timing.median_ms)
        assert row.memory_ratio_to_naive == pytest.approx(naive.peak_bytes / row.peak_bytes)
    assert only(results, SDPA).speedup_over_sdpa == 1.0


def test_the_peak_of_a_training_step_has_the_naive_probabilities_of_every_layer() -> None:
    case = replace(CASE, seqlen=256, batch=1)
    results = run(case)
    naive, tiled = (only(results, peer).peak_bytes for peer in (NAIVE, FLASHTILE))
    assert naive is not None and tiled is not None
    assert naive - tiled > case.score_matrix_bytes * SHAPE.layers


def test_the_state_of_training_is_weights_sums_and_tokens() -> None:
    workload = Training(CASE, CPU)
    num_weights = sum(weight.numel() for weight in workload.model.parameters())
    num_tensors = len(list(workload.model.parameters()))
    tokens = CASE.batch * (CASE.seqlen + 1) * 8
    assert workload.state_bytes == 3 * 4 * num_weights + 4 * num_tensors + tokens  # AdamW counts its steps


def test_steps_change_no_weight_and_leave_no_gradient() -> None:
    workload = Training(CASE, CPU)
    before = [weight.detach().clone() for weight in workload.model.parameters()]
    expected = workload.probe(FUNCTIONS[NAIVE]())
    workload.run(FUNCTIONS[NAIVE]())
    for weight, old in zip(workload.model.parameters(), before, strict=True):
        assert weight.grad is None and torch.equal(weight, old)
    assert all(map(torch.equal, workload.probe(FUNCTIONS[NAIVE]()), expected))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fault", ["mask", "heads", "scale"])
def test_a_wrong_attention_function_shows(mode: Mode, fault: str) -> None:
    if (mode, fault) == ("decode", "mask"):
        pytest.skip("a single query sees every key")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if fault == "mask":
            return naive_attention(q, k, v)
        right = FUNCTIONS[NAIVE]()
        return right(q, k, v.flip(2)) if fault == "heads" else right(0.5 * q, k, v)

    case = replace(CASE, mode=mode, seqlen=512, batch=1)
    results = run(case, peers=[*PEERS, ModelPeer(name="wrong", make=lambda: attend)])
    row = only(results, "wrong")
    assert row.status == "wrong_result" and row.reason is not None and "differs from flashtile" in row.reason
    assert row.difference is not None and row.difference > 0.1, "visible in bfloat16 too"


@pytest.mark.parametrize("after", [0, 5, 9], ids=["first", "third", "timed"])
@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
    ids=["full-gpu", "full-main-memory"],
)
def test_out_of_memory_in_one_peer_is_its_row_and_nothing_else(error: Exception, after: int) -> None:
    peers = [ModelPeer(name="greedy", make=failing(error, after=after)), *PEERS]
    results = run(CASE, peers=peers)
    row = only(results, "greedy")
    assert row.status == "out_of_memory" and row.reason is not None and row.reason[:20] in str(error)
    assert row.timing is row.peak_bytes is None
    assert [row.status for row in results.rows] == ["out_of_memory", "ok", "ok", "ok"]


def test_another_error_is_a_refusal() -> None:
    results = run(CASE, peers=[ModelPeer(name="picky", make=failing(TypeError("no such heads"))), *PEERS])
    assert only(results, "picky").status == "refused"
    assert only(results, "picky").reason == "TypeError: no such heads"


def test_a_model_that_cannot_fit_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "available_host_bytes", lambda: CASE.least_bytes - 1)
    monkeypatch.setattr(workloads, "build", lambda *_: pytest.fail("it was tried"))
    results = run(CASE)
    assert {row.status for row in results.rows} == {"out_of_memory"}
    assert all(row.reason is not None and "not tried" in row.reason for row in results.rows)


def test_a_model_that_does_not_fit_is_a_row_for_everyone(monkeypatch: pytest.MonkeyPatch) -> None:
    def build(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(workloads, "build", build)
    results = run(CASE, replace(CASE, mode="decode"))
    assert [row.reason for row in results.rows] == ["the model alone does not fit"] * 6
    assert results.is_complete


def test_naive_scores_that_cannot_fit_are_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(CASE, seqlen=4096, batch=1)
    monkeypatch.setattr(environment, "available_host_bytes", lambda: case.score_matrix_bytes)
    assert case.least_bytes < case.score_matrix_bytes
    peers = [
        ModelPeer(name=peer.name, make=failing(TypeError(peer.name)), scratch_bytes=peer.scratch_bytes)
        for peer in PEERS
    ]
    results = run(case, peers=peers)
    assert {row.peer: row.status for row in results.rows} == {
        FLASHTILE: "refused",
        NAIVE: "out_of_memory",
        SDPA: "refused",
    }


@pytest.mark.parametrize("mode", MODES)
def test_the_lower_bound_of_memory_is_below_what_a_model_takes(mode: Mode) -> None:
    case = replace(CASE, mode=mode)
    peak_bytes = only(run(case), FLASHTILE).peak_bytes
    assert peak_bytes is not None and 0.1 * peak_bytes < case.least_bytes <= peak_bytes


def test_ctrl_c_keeps_the_finished_cases() -> None:
    peers = [*PEERS[:2], ModelPeer(name=SDPA, make=lambda: interrupting)]

    def interrupting(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[1] == 16:
            raise KeyboardInterrupt
        return PEERS[2].make()(q, k, v)

    going_on = results_of(CASE, replace(CASE, seqlen=16), replace(CASE, seqlen=8), peers=peers)
    finished = next(going_on)
    assert not finished.is_complete and {row.case for row in finished.rows} == {CASE}
    with pytest.raises(KeyboardInterrupt):
        next(going_on)


def test_progress_names_each_case_and_rises() -> None:
    told: list[tuple[str, float]] = []
    cases = (CASE, LimitCase(size="tiny", shape=SHAPE, axis="batch", other=16, dtype="float32"))
    empty = measuring.start(CPU, budget_s=1e-3)
    list(
        measuring.run(
            empty,
            cases,
            PEERS,
            CPU,
            CpuClock(),
            min_rounds=1,
            on_progress=lambda case, share: told.append((case.label, share)),
        )
    )
    assert list(dict.fromkeys(label for label, _ in told)) == [case.label for case in cases]
    shares = [share for label, share in told if label == CASE.label]
    assert shares == sorted(shares) and shares[0] == 0.0 and shares[-1] == 1.0


# --- the grids --------------------------------------------------------------------------------------------------------


def test_the_gpu_s_grid_has_every_model_and_length_in_every_mode() -> None:
    cases = GRIDS["cuda"].cases()
    assert set(get_args(Mode)) == set(MODES)
    assert {(case.mode, case.size, case.seqlen) for case in cases} == {
        (mode, size, seqlen)
        for mode in MODES
        for size in ("small", "medium", "large")
        for seqlen in (128, 512, 1024, 2048, 4096, 8192, 16384)
    }
    assert all(case.batch * case.seqlen == 16384 for case in cases if case.mode == "train")
    assert {case.batch for case in cases if case.mode == "prefill"} == {1}
    assert [case.axis for case in GRIDS["cuda"].limit_cases()] == ["batch", "seqlen"] * 3
    assert replace(GRIDS["cuda"], has_limits=False).limit_cases() == ()


def test_labels_are_unique_words() -> None:
    labels = [case.label for grid in GRIDS.values() for case in (*grid.cases(), *grid.limit_cases())]
    assert len(set(labels)) == len(labels)
    assert "train small layers=12 seqlen=512 batch=32 bfloat16" in labels
    assert "limits large largest-seqlen batch=1 bfloat16" in labels


@pytest.mark.gpu
@pytest.mark.parametrize("mode", MODES)
def test_a_small_model_on_a_gpu(mode: Mode) -> None:
    device = torch.device("cuda")
    case = replace(CASE, mode=mode, dtype="bfloat16", seqlen=256, shape=replace(SHAPE, d_model=128))
    empty = measuring.start(device, budget_s=0.1)
    (results,) = measuring.run(empty, [case], PEERS, device, timing.clock_for(device), min_rounds=2)
    assert [row.status for row in results.rows] == ["ok"] * 3
