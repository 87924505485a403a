"""Results of all three benchmarks, made up so that each part of the report has something to say."""

from __future__ import annotations

from dataclasses import replace

from flashtile.bench.baselines import FLASHTILE, FLEX, NAIVE, SDPA, SDPA_CUDNN
from flashtile.bench.cases import BenchCase
from flashtile.bench.environment import Environment
from flashtile.bench.models.cases import SIZES, LimitCase, Mode, ModelCase
from flashtile.bench.results import (
    Ceilings,
    IoResults,
    IoRow,
    KernelResults,
    KernelRow,
    LimitRow,
    ModelResults,
    ModelRow,
)
from flashtile.bench.timing import Timing

ENVIRONMENT = Environment(
    device="cuda",
    device_name="A GPU",
    num_threads=16,
    platform="Linux x86_64",
    versions={"python": "3.12.3", "torch": "2.11.0", "flashtile": "0.1.0"},
    commit="abcdef0123456789" + "0" * 24,
    commit_is_dirty=False,
)
CREATED = "2026-01-02T03:04:05+00:00"
CALL = BenchCase(
    direction="forward",
    dtype="bfloat16",
    head_dim=128,
    seqlen=1024,
    is_causal=True,
    batch=4,
    heads_q=16,
    heads_kv=16,
)
MODEL = ModelCase(mode="train", size="small", shape=SIZES["small"], seqlen=512, batch=2, dtype="bfloat16")


def timing(median_ms: float) -> Timing:
    return Timing(median_ms=median_ms, q25_ms=0.99 * median_ms, q75_ms=1.02 * median_ms, rounds=9)


# --- kernels ----------------------------------------------------------------------------------------------------------

SPEEDS = {FLASHTILE: 400.0, FLEX: 320.0, SDPA_CUDNN: 500.0, NAIVE: 40.0}
"""TFLOP/s of the forward."""


def _kernel_row(case: BenchCase, peer: str) -> KernelRow:
    tflops = SPEEDS[peer] * (1.0 if case.direction == "forward" else 0.8) * (case.seqlen / 1024) ** 0.1
    scores = 2 * case.batch * case.heads_q * case.seqlen**2 * 2 if peer == NAIVE else 0
    return KernelRow(
        case=case,
        peer=peer,
        status="ok",
        timing=timing(case.seqlen / tflops),
        tflops=tflops,
        percent_of_ceiling=tflops / 8,
        peak_extra_bytes=17_000_000 + scores,
        difference=0.0 if peer == FLASHTILE else 0.003,
        kernel="triton/forward" if peer == FLASHTILE else None,
    )


def kernels() -> KernelResults:
    plain = [
        replace(CALL, direction=direction, seqlen=seqlen, is_causal=is_causal)
        for direction in ("forward", "backward")
        for is_causal in (False, True)
        for seqlen in (1024, 4096)
    ]
    bias = replace(CALL, option="bias", heads_kv=4)
    return KernelResults(
        environment=ENVIRONMENT,
        created_utc=CREATED,
        budget_s=1.0,
        is_complete=True,
        ceilings=Ceilings(matmul_tflops={"bfloat16": 800.0}, copy_gb_per_s=4300.0),
        missing_peers={"xformers": "xformers is not installed"},
        rows=(
            *(_kernel_row(case, peer) for case in plain for peer in SPEEDS),
            *(_kernel_row(bias, peer) for peer in (FLASHTILE, FLEX)),
            KernelRow(case=bias, peer=SDPA_CUDNN, status="unavailable", reason="takes no bias as it is called here"),
            KernelRow(case=bias, peer=NAIVE, status="out_of_memory", reason="needs at least 9 GiB: not tried"),
        ),
    )


# --- models -----------------------------------------------------------------------------------------------------------


def _model_rows(case: ModelCase) -> tuple[ModelRow, ...]:
    """At 512 tokens 30 ms beside the naive formula's 10 ms of attention, growing quadratically; tiles take a fifth."""
    rest_ms = 30.0 * case.seqlen / 512
    attention_ms = {NAIVE: 10.0 * (case.seqlen / 512) ** 2, SDPA: 3.0 * (case.seqlen / 512) ** 2}
    attention_ms[FLASHTILE] = attention_ms[NAIVE] / 5
    naive_ms = rest_ms + attention_ms[NAIVE]
    state, scores = 2_000_000_000, 400_000_000 * (case.seqlen // 512) ** 2
    rows = []
    for peer in (FLASHTILE, NAIVE, SDPA):
        if peer == NAIVE and case.seqlen >= 8192:
            rows.append(ModelRow(case=case, peer=peer, status="out_of_memory", reason="CUDA out of memory."))
            continue
        ms = rest_ms + attention_ms[peer]
        peak = state + 500_000_000 + (scores if peer == NAIVE else 0)
        rows.append(
            ModelRow(
                case=case,
                peer=peer,
                status="ok",
                timing=timing(ms),
                peak_bytes=peak,
                state_bytes=state,
                attention_ms=attention_ms[peer],
                attention_share=attention_ms[peer] / ms,
                difference=0.0,
                speedup_over_naive=naive_ms / ms if case.seqlen < 8192 else None,
                speedup_over_sdpa=(rest_ms + attention_ms[SDPA]) / ms,
                memory_ratio_to_naive=(state + 500_000_000 + scores) / peak if case.seqlen < 8192 else None,
            )
        )
    return tuple(rows)


def models(
    *,
    modes: tuple[Mode, ...] = ("train", "decode"),
    sizes: tuple[str, ...] = ("small",),
    seqlens: tuple[int, ...] = (512, 4096, 8192),
) -> ModelResults:
    cases = [
        replace(MODEL, mode=mode, size=size, shape=SIZES[size], seqlen=seqlen)
        for mode in modes
        for size in sizes
        for seqlen in seqlens
    ]
    limit = LimitCase(size="small", shape=SIZES["small"], axis="batch", other=1024, dtype="bfloat16")
    return ModelResults(
        environment=ENVIRONMENT,
        created_utc=CREATED,
        budget_s=1.0,
        is_complete=True,
        rows=tuple(row for case in cases for row in _model_rows(case)),
        limits=(
            LimitRow(
                case=limit, peer=FLASHTILE, status="tried", largest=100, too_large=103, memory_bytes=150_000_000_000
            ),
            LimitRow(case=limit, peer=NAIVE, status="extrapolated", largest=50, memory_bytes=150_000_000_000),
            LimitRow(
                case=replace(limit, axis="seqlen", other=1), peer=SDPA, status="failed", reason="nobody says how much"
            ),
        ),
    )


# --- io ---------------------------------------------------------------------------------------------------------------


def io(*, is_counted: bool = True) -> IoResults:
    rows = []
    for seqlen in (1024, 4096):
        case = replace(CALL, seqlen=seqlen)
        for peer, scores, ms in ((FLASHTILE, 0, 0.5), (NAIVE, 1000 * seqlen**2, 4.0)):
            predicted = {"q, k, v, out": 16_000 * seqlen, "scores": scores}
            total = sum(predicted.values())
            rows.append(
                IoRow(
                    case=case,
                    peer=peer,
                    status="ok",
                    timing=timing(ms * seqlen / 1024),
                    predicted=predicted,
                    counted_bytes=round(1.1 * total) if is_counted else None,
                    bound_bytes=2 * total,
                )
            )
    return IoResults(
        environment=ENVIRONMENT,
        created_utc=CREATED,
        budget_s=1.0,
        is_complete=True,
        copy_gb_per_s=4300.0,
        counter="ncu 2025.3" if is_counted else None,
        no_counter_reason=None if is_counted else "ncu is not installed",
        rows=tuple(rows),
    )
