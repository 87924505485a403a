"""explain(): both forms, every device, its text, its JSON, and the rules about where tiles are not faster."""

from __future__ import annotations

import doctest
import importlib
import json
import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest
import torch

import flashtile
from flashtile import dispatch
from flashtile.errors import InvalidArgument
from flashtile.spec import sizes, units, validation
from flashtile.spec.devices import DEVICES
from flashtile.spec.problem import AttentionProblem

MAIN: dict[str, Any] = {"seqlen_q": 16384, "heads_q": 16, "head_dim": 128, "causal": True}
NO_TRITON: dict[str, Any] = {**MAIN, "dtype": torch.float64}
"""What the Triton kernels do not take, so a GPU runs the naive formula."""
SMALL: dict[str, Any] = {"batch": 2, "seqlen_q": 24, "heads_q": 4, "head_dim": 16, "dtype": torch.float32}

untyped_explain: Any = flashtile.explain  # for calls that are wrong on purpose


def qkv(*, requires_grad: bool = True) -> list[torch.Tensor]:
    return [torch.randn(2, 24, 4, 16, requires_grad=requires_grad) for _ in range(3)]


# --- the two forms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sized", "tensors"),
    [
        ({}, {}, {}),
        ({"causal": True, "softcap": 3.0}, {}, {}),
        ({"window": (3, None), "scale": 0.5, "dropout_p": 0.25, "deterministic": True}, {}, {}),
        (
            {"with_lse": True},
            {"bias_shape": (4, 24, 24), "has_alibi": True, "gradients": ("q", "k", "v", "bias")},
            {"bias": torch.zeros(4, 24, 24, requires_grad=True), "alibi_slopes": torch.zeros(4)},
        ),
        (
            {},
            {"mask_shape": (24,), "has_sinks": True},
            {"mask": torch.ones(24, dtype=torch.bool), "sinks": torch.zeros(4)},
        ),
    ],
    ids=["plain", "causal softcap", "window dropout", "bias alibi lse", "mask sinks"],
)
def test_sizes_and_tensors_pose_the_same_problem(
    options: dict[str, Any], sized: dict[str, Any], tensors: dict[str, Any]
) -> None:
    from_sizes = flashtile.explain(**SMALL, **options, **sized, device="cpu")
    from_tensors = flashtile.explain(*qkv(), **options, **tensors)
    assert replace(from_sizes, device=from_tensors.device) == from_tensors  # of CPUs the table has a guess alone


def test_the_tensor_form_poses_what_the_call_itself_poses() -> None:
    q, k, v = qkv()
    problem, _ = validation.check_call(
        q,
        k,
        v,
        causal=True,
        window=None,
        scale=None,
        softcap=0.0,
        bias=None,
        mask=None,
        alibi_slopes=None,
        sinks=None,
        dropout_p=0.0,
        dropout_seed=None,
        deterministic=False,
        wants_lse=False,
    )
    assert flashtile.explain(q, k, v, causal=True).problem == problem


def test_gradients_follow_requires_grad() -> None:
    assert [cost.direction for cost in flashtile.explain(*qkv(requires_grad=False)).costs] == ["forward"]
    assert [cost.direction for cost in flashtile.explain(*qkv()).costs] == ["forward", "backward"]
    with torch.no_grad():
        assert len(flashtile.explain(*qkv()).costs) == 1
        assert len(flashtile.explain(**SMALL).costs) == 2  # sizes ask for gradients by name


def test_packed_tensors_are_explained_with_their_lengths() -> None:
    lengths = [4, 0, 6, 1]
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)
    q, k, v = torch.randn(3, 12, 4, 16).unbind()
    explanation = flashtile.explain(
        *(q, k, v), cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=8, max_seqlen_kv=8, causal=True
    )
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    assert explanation.costs[0].useful_flops == 2 * (16 + 16) * 4 * pairs
    assert explanation.plan is not None and explanation.plan.forward.kernel == "tiled"
    assert not [note for note in explanation.notes if "Lengths unknown" in note]
    assert "12 x 12 packed tokens" in str(explanation)


def test_packed_tensors_without_data_are_bounded_from_above() -> None:
    q, k, v = torch.empty(3, 12, 4, 16, device="meta").unbind()
    cu_seqlens = torch.empty(3, dtype=torch.int32, device="meta")
    explanation = flashtile.explain(
        *(q, k, v), cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=8, max_seqlen_kv=8, device="h200"
    )
    assert [note for note in explanation.notes if "Lengths unknown" in note]
    assert explanation.costs[0].useful_flops == 2 * (16 + 16) * 4 * 2 * 8 * 8


def test_wrong_boundaries_are_named() -> None:
    q, k, v = torch.randn(3, 12, 4, 16).unbind()
    cu_seqlens = torch.tensor([0, 8, 5], dtype=torch.int32)
    with pytest.raises(InvalidArgument, match="cu_seqlens_q"):
        flashtile.explain(
            *(q, k, v), cu_seqlens_q=cu_seqlens, cu_seqlens_kv=cu_seqlens, max_seqlen_q=8, max_seqlen_kv=8
        )


def test_explaining_runs_nothing_and_draws_nothing() -> None:
    q, k, v = qkv()
    before = torch.get_rng_state()
    flashtile.explain(q, k, v, dropout_p=0.5)
    assert torch.equal(before, torch.get_rng_state())
    enormous = flashtile.explain(seqlen_q=2**20, heads_q=128, head_dim=128, causal=True, device="h200")
    assert enormous.costs[0].naive.extra_bytes > 2**48  # nothing of this was allocated


def test_explaining_loads_neither_a_kernel_nor_triton() -> None:
    script = (
        "import sys, flashtile; flashtile.explain(seqlen_q=64, heads_q=2, head_dim=32, device='h200'); "
        "print([name for name in sys.modules if name.split('.')[0] == 'triton' or name.endswith('.launch')])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["flashtile.explain", "flashtile.support", "flashtile.doctor"])
def test_the_examples_in_docstrings_run(module: str) -> None:
    failures, attempts = doctest.testmod(importlib.import_module(module))
    assert attempts >= 2 and failures == 0


# --- the answer -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", validation.DTYPES, ids=units.dtype_name)
def test_every_device_of_the_table_answers_from_here(device: str, dtype: torch.dtype) -> None:
    explanation = flashtile.explain(**MAIN, dtype=dtype, device=device)
    assert explanation.device == DEVICES[device]
    assert explanation.plan == dispatch.choose(explanation.problem, DEVICES[device])
    for cost in explanation.costs:
        assert 0 < cost.tiled_time.seconds < cost.naive_time.seconds
        assert 20 * cost.tiled.extra_bytes < cost.naive.extra_bytes


def test_the_verdicts_are_the_backends_own() -> None:
    explanation = flashtile.explain(**MAIN, device="h200")
    assert [verdict.backend for verdict in explanation.verdicts] == list(dispatch.BACKENDS)
    for verdict in explanation.verdicts:
        asked = dispatch.BACKENDS[verdict.backend].rejects(explanation.problem, explanation.device)
        assert verdict.reasons == asked
    assert [verdict.backend for verdict in explanation.verdicts if verdict.is_chosen] == ["hopper"]
    fallback = flashtile.explain(**NO_TRITON, device="h200")
    assert [verdict.backend for verdict in fallback.verdicts if verdict.is_chosen] == ["naive"]


def test_a_problem_too_short_for_the_usual_backend_says_so() -> None:
    short = flashtile.explain(seqlen_q=64, heads_q=4, head_dim=64, causal=True, device="h200")
    assert [verdict.backend for verdict in short.verdicts if verdict.is_chosen] == ["triton"]
    assert [verdict.backend for verdict in short.verdicts if verdict.is_slower] == ["hopper"]
    text = str(short)
    assert text.index("triton  chosen") < text.index("hopper  accepts") and "too short for it" in text
    assert not any(verdict.is_slower for verdict in flashtile.explain(**MAIN, device="h200").verdicts)


def test_a_backend_that_declines_is_an_answer_and_no_exception() -> None:
    explanation = flashtile.explain(**MAIN, device="h200", backend="cpu")
    assert explanation.plan is None
    assert explanation.refusal is not None and "h200" in explanation.refusal
    assert "runs on CPU tensors only" in str(explanation)
    assert json.loads(json.dumps(explanation.to_dict()))["plan"] is None


def test_strict_mode_is_an_answer_and_no_exception(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLASHTILE_STRICT", "1")
    explanation = flashtile.explain(**NO_TRITON, device="h200")
    assert explanation.plan is None
    assert "FLASHTILE_STRICT" in str(explanation)
    assert flashtile.explain(**MAIN, device="h200").plan is not None


def test_the_plans_tiles_are_used_and_assumed_ones_are_marked() -> None:
    on_cpu = flashtile.explain(**MAIN, has_sinks=True, dtype=torch.float32, device="cpu")
    assert on_cpu.plan is not None
    tiling = on_cpu.costs[0].tiling
    assert (tiling.block_q, tiling.block_kv) == (on_cpu.plan.forward.tiles.block_q, on_cpu.plan.forward.tiles.block_kv)
    assert not tiling.is_assumed and "tiled*" not in str(on_cpu)
    on_gpu = flashtile.explain(**NO_TRITON, device="h200")
    assert on_gpu.costs[0].tiling.is_assumed and "* assuming tiles" in str(on_gpu)


def test_the_tiles_of_each_triton_kernel_are_used() -> None:
    explanation = flashtile.explain(**MAIN, device="h200", backend="triton")
    assert explanation.plan is not None
    for cost, kernel in zip(explanation.costs, (explanation.plan.forward, explanation.plan.backward), strict=True):
        assert (cost.tiling.block_q, cost.tiling.block_kv) == (kernel.tiles.block_q, kernel.tiles.block_kv)
        assert not cost.tiling.is_assumed and cost.tiling.heap_tiles == 0
    forward, backward = explanation.costs
    (d_q,) = [kernel for kernel in explanation.plan.backward.companions if kernel.kernel == "backward_q"]
    assert forward.tiling.split is None and backward.tiling.split is not None
    assert backward.tiling.split.q_tiles == (d_q.tiles.block_q, d_q.tiles.block_kv)


@pytest.mark.parametrize("gradients", [("q", "k", "v"), ("bias",), ("q",), ("v", "bias")], ids=str)
def test_the_text_names_every_kernel_that_the_backward_launches(gradients: tuple[str, ...]) -> None:
    explanation = flashtile.explain(**MAIN, bias_shape=(16, 1, 16384), gradients=gradients, device="h200")
    assert explanation.plan is not None
    planned = explanation.plan.backward
    wanted = {"row_statistics"}
    wanted |= {"backward_kv"} if {"k", "v"} & set(gradients) else set()
    wanted |= {"backward_q"} if "q" in gradients else set()
    wanted |= {"bias_gradient"} if "bias" in gradients else set()
    lines = {
        f"  backward: kernel triton/{kernel.kernel}, tiles {kernel.tiles.block_q} x {kernel.tiles.block_kv}, "
        f"grid {' x '.join(f'{size:,}' for size in kernel.grid)}"
        for kernel in (planned, *planned.companions)
        if kernel.kernel in wanted
    }
    assert {line for line in str(explanation).splitlines() if line.startswith("  backward: kernel")} == lines


def test_the_price_of_a_backward_without_atomics_is_told() -> None:
    def note(**options: Any) -> str:
        return next((note for note in flashtile.explain(**options).notes if "computed twice" in note), "")

    assert "seven products instead of five" in note(**MAIN, device="h200", backend="triton")
    assert "once more" not in note(**MAIN, device="h200", backend="triton")
    assert "once more" in note(**MAIN, device="h200", bias_shape=(16384,), gradients=("q", "k", "v", "bias"))
    assert not note(**MAIN, device="h200", gradients=())
    assert not note(**MAIN, device="h200") and not note(**MAIN, device="cpu") and not note(**NO_TRITON, device="h200")


def test_copies_are_those_that_the_chosen_backend_makes() -> None:
    q, k, v = qkv()
    assert flashtile.explain(q, k, v).copies == ()
    k_transposed = k.detach().transpose(1, 3).contiguous().transpose(1, 3)
    (copied,) = flashtile.explain(q, k_transposed, v).copies
    assert copied.startswith("k,") and str(k_transposed.stride(-1)) in copied
    assert flashtile.explain(q, k_transposed, v, softcap=1.0).copies == ()  # our own tiles take any strides
    naive = flashtile.explain(*(tensor.bfloat16() for tensor in (q, k, v)), backend="naive").copies
    assert "q in float32" in naive and "k and v in float32" in naive[1]


def test_numbers_of_the_main_example() -> None:
    explanation = flashtile.explain(**MAIN, device="h200", backend="triton")
    forward, backward = explanation.costs
    visible = 16384 * 16385 // 2
    assert forward.useful_flops == 4 * 128 * 16 * visible
    assert backward.useful_flops == 2.5 * forward.useful_flops
    assert backward.tiled.flops == pytest.approx(7 / 5 * backward.useful_flops, rel=0.01)
    assert (forward.tiled.extra_bytes, backward.tiled.extra_bytes) == (16 * 16384 * 4, 2 * 16 * 16384 * 4)
    assert forward.naive.flops == 4 * 128 * 16 * 16384**2
    scores = 16 * 16384**2 * 4
    assert forward.naive.traffic_bytes == pytest.approx(4 * scores, rel=0.01)
    operands = 16384 * 16 * 128 * 2
    assert forward.tiled.traffic_bytes == 4 * operands + 16384 * 16 * 4
    assert forward.naive_time.binds == "memory" and forward.tiled_time.binds == "compute"


# --- text and JSON ----------------------------------------------------------------------------------------------------


def test_the_text_says_everything_that_was_asked_for() -> None:
    text = str(flashtile.explain(**MAIN, device="h200", backend="triton"))
    for wanted in (
        *("batch 1, seqlen 16,384, heads 16, head_dim 128, bfloat16", "causal, gradients of q, k, v"),
        *("1.10 TFLOP forward", "50.0% of all", "132 SMs, 989 TFLOP/s in bfloat16, 4,800 GB/s"),
        *("triton  chosen    Triton kernels", "cpu     declines  runs on CPU tensors only"),
        *("naive   accepts   would take the problem too", "kernel triton/backward_q, tiles 128 x 64"),
        *("16.0 GiB", "least time (roofline)", "14.4 ms", "1.12 ms", "12.9x", "memory", "compute"),
        *("extra memory held", "lse_log2, delta", "2.00 MiB", "d_q: read k, v once (the cache holds them)"),
    ):
        assert wanted in text, f"{wanted!r} is not in\n{text}"
    naive = str(flashtile.explain(**NO_TRITON, device="h200"))
    for wanted in ("naive   chosen    the textbook formula", "Where tiles are not faster", "Nothing is faster today"):
        assert wanted in naive, f"{wanted!r} is not in\n{naive}"


@pytest.mark.parametrize("device", ["cpu", "h200"])
def test_the_text_is_aligned_and_no_wider_than_a_terminal(device: str) -> None:
    everything: dict[str, Any] = {
        "bias_shape": (16, 1, 20000),
        "mask_shape": (1, 20000),
        "has_alibi": True,
        "has_sinks": True,
        "window": (None, 7),
        "dropout_p": 0.1,
        "softcap": 30.0,
        "with_lse": True,
        "deterministic": True,
        "seqlen_kv": 20000,
        "heads_kv": 4,
        "head_dim_v": 64,
    }
    text = str(flashtile.explain(**{**MAIN, **everything, "causal": False}, device=device))
    lines = text.splitlines()
    assert all(line == line.rstrip() for line in lines)
    assert max(map(len, lines)) <= 110
    header = next(line for line in lines if line.startswith("Forward"))
    rows = [line for line in lines if line.startswith(("  FLOPs", "  bytes moved", "  extra memory", "  least time"))]
    assert len(rows) == 8
    assert {len(line) for line in rows[:4]} == {len(header)}
    for option in ("window unlimited back, 7 ahead", "ALiBi", "sinks", "softcap 30.0", "dropout 0.1", "deterministic"):
        assert option in text
    assert "heads 16 over 4" in text and "head_dim 128/64" in text and "seqlen 16,384 x 20,000" in text


def test_json_has_every_field_and_survives_a_round_trip() -> None:
    explanation = flashtile.explain(**MAIN, device="h200", has_sinks=True, backend="triton")
    found = explanation.to_dict()
    assert json.loads(json.dumps(found)) == found
    assert found["problem"]["dtype"] == "bfloat16" and found["problem"]["gradients"] == ["k", "q", "v"]
    assert found["device"]["name"] == "h200" and found["plan"]["backend"] == "triton"
    companions = [kernel["kernel"] for kernel in found["plan"]["backward"]["companions"]]
    assert companions == ["row_statistics", "backward_q"]
    for cost, as_json in zip(explanation.costs, found["costs"], strict=True):
        assert as_json["naive"]["traffic_bytes"] == cost.naive.traffic_bytes
        assert as_json["tiled"]["extra_bytes"] == cost.tiled.extra_bytes
        assert as_json["tiled_time"]["seconds"] == cost.tiled_time.seconds
        assert as_json["naive_time"]["binds"] == cost.naive_time.binds
    assert found["verdicts"][0]["reasons"] == ["runs on CPU tensors only, these are on h200"]


@pytest.mark.parametrize(
    ("formatted", "text"),
    [
        (units.in_bytes(0), "0 B"),
        (units.in_bytes(1023), "1023 B"),
        (units.in_bytes(1536), "1.50 KiB"),
        (units.in_bytes(64.3 * 2**30), "64.3 GiB"),
        (units.in_bytes(257 * 2**20), "257 MiB"),
        (units.in_bytes(2**70), "1,024 EiB"),
        (units.in_flops(1.1e12), "1.10 TFLOP"),
        (units.in_seconds(0.0144), "14.4 ms"),
        (units.in_seconds(2), "2.00 s"),
        (units.in_seconds(3.2e-6), "3.20 us"),
        (units.in_seconds(0), "0.00 ns"),
        (units.dtype_name(torch.bfloat16), "bfloat16"),
    ],
)
def test_numbers_are_formatted_for_people(formatted: str, text: str) -> None:
    assert formatted == text


# --- where tiles are not faster ---------------------------------------------------------------------------------------

LONG: dict[str, Any] = {"batch": 4, "seqlen_q": 8192, "heads_q": 32, "head_dim": 128}
DECODE: dict[str, Any] = {**LONG, "batch": 1, "seqlen_q": 1, "seqlen_kv": 65536}
SHORT: dict[str, Any] = {**LONG, "seqlen_q": 128, "batch": 1}
WIDE: dict[str, Any] = {**LONG, "head_dim": 1024}
RULES: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    ("naive plan", "Nothing is faster today", {**NO_TRITON, "device": "h200"}, {**LONG, "device": "h200"}),
    ("too wide for Triton", "Nothing is faster today", {**WIDE, "device": "h200"}, {**WIDE, "device": "cpu"}),
    (
        "torch's own op",
        "torch's own fused CPU op",
        {**LONG, "device": "cpu", "dtype": torch.float32},
        {**LONG, "device": "cpu", "dtype": torch.float32, "has_sinks": True},
    ),
    ("scores in the cache", "fits into the cache", {**SHORT, "device": "h200"}, {**LONG, "device": "h200"}),
    ("decoding", "Reading q, k and v is", {**DECODE, "device": "h200"}, {**LONG, "device": "h200"}),
    (
        "bias as large as the scores",
        "Bias and mask are",
        {**LONG, "device": "h200", "bias_shape": (4, 32, 8192, 8192)},
        {**LONG, "device": "h200", "bias_shape": (8192,)},
    ),
    ("a tiny call", "shorter than what a call takes", {**SHORT, "device": "h200"}, {**LONG, "device": "h200"}),
    ("few programs", "Only 32 programs", {**DECODE, "device": "h200"}, {**LONG, "device": "h200"}),
    (
        "compute binds both",
        "bound is near the tiled one",
        {**LONG, "device": "rtx4090", "dtype": torch.float64},
        {**LONG, "device": "h200"},
    ),
    ("no bfloat16", "no matrix units for bfloat16", {**LONG, "device": "t4"}, {**LONG, "device": "a100"}),
]


@pytest.mark.parametrize(
    ("words", "applies", "does_not"), [rule[1:] for rule in RULES], ids=[rule[0] for rule in RULES]
)
def test_each_rule_speaks_where_it_applies_and_nowhere_else(
    words: str, applies: dict[str, Any], does_not: dict[str, Any]
) -> None:
    assert [remark for remark in flashtile.explain(**applies).not_faster if words in remark]
    assert not [remark for remark in flashtile.explain(**does_not).not_faster if words in remark]


@pytest.mark.parametrize("empty", ["batch", "seqlen_q", "seqlen_kv"])
def test_an_empty_problem_is_explained(empty: str) -> None:
    explanation = flashtile.explain(**{**SMALL, empty: 0}, device="h200")
    assert explanation.not_faster == ("There is no (query, key) pair, so nothing is computed.",)
    assert "FLOPs" in str(explanation)


def test_a_naive_formula_that_does_not_fit_is_noted() -> None:
    too_long = flashtile.explain(**{**MAIN, "seqlen_q": 65536}, device="h200").notes
    assert [note for note in too_long if note.startswith("The naive forward does not fit")]
    assert not [note for note in flashtile.explain(**MAIN, device="h200").notes if "does not fit" in note]


# --- wrong arguments --------------------------------------------------------------------------------------------------

WRONG: list[tuple[str, dict[str, Any]]] = [
    ("batch", {"batch": -1}),
    ("batch", {"batch": 1.0}),
    ("seqlen_q", {"seqlen_q": "16k"}),
    ("seqlen_kv", {"seqlen_kv": -5}),
    ("heads_q", {"heads_q": 0}),
    ("heads_kv", {"heads_kv": 0}),
    ("heads_kv", {"heads_kv": 3}),
    ("head_dim", {"head_dim": True}),
    ("head_dim_v", {"head_dim_v": 0}),
    ("q", {"seqlen_q": 2**60}),
    ("dtype", {"dtype": torch.int8}),
    ("dtype", {"dtype": "bf16"}),
    ("causal", {"causal": 1}),
    ("window", {"window": (-1, 0)}),
    ("scale", {"scale": float("nan")}),
    ("softcap", {"softcap": -1.0}),
    ("dropout_p", {"dropout_p": 1.0}),
    ("bias", {"bias_shape": (3, 24, 24)}),
    ("bias", {"bias_shape": (1, 1, 2, 4, 24, 24)}),
    ("a size of mask", {"mask_shape": (-1,)}),
    ("mask", {"mask_shape": (24, 25)}),
    ("bias", {"bias_shape": 24}),
    ("has_alibi", {"has_alibi": torch.ones(4)}),
    ("has_sinks", {"has_sinks": None}),
    ("deterministic", {"deterministic": "yes"}),
    ("with_lse", {"with_lse": 1}),
    ("gradients", {"gradients": "qkv"}),
    ("gradients", {"gradients": True}),
    ("gradients", {"gradients": ("q", "lse")}),
    ("gradients", {"gradients": ("bias",)}),
    ("gradients", {"gradients": ("sinks",)}),
    ("backend", {"backend": "cuda"}),
    ("device", {"device": "h300"}),
    ("device", {"device": 0}),
    ("device", {"device": "cuda:99"}),
    ("device", {"device": torch.device("cuda", 99)}),
]


@pytest.mark.parametrize(("argument", "wrong"), WRONG, ids=[str(wrong)[1:-1] for _, wrong in WRONG])
def test_a_wrong_argument_is_named(argument: str, wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument) as raised:
        flashtile.explain(**{**SMALL, **wrong})
    assert raised.value.argument == argument
    assert raised.value.remedy


def test_wrong_tensors_are_named_as_attention_names_them() -> None:
    q, k, v = qkv()
    with pytest.raises(InvalidArgument) as raised:
        flashtile.explain(q, k.double(), v)
    assert raised.value.argument == "k"
    with pytest.raises(InvalidArgument) as raised:
        untyped_explain(q)
    assert raised.value.argument == "k"


def test_the_two_forms_do_not_mix() -> None:
    with pytest.raises(TypeError, match="batch"):
        untyped_explain(*qkv(), batch=2)
    with pytest.raises(TypeError, match="seqlen_q"):
        untyped_explain()


def test_posed_sizes_are_a_dense_problem() -> None:
    posed = sizes.pose(**SMALL, seqlen_kv=30, gradients=())
    assert posed == AttentionProblem(
        batch=2,
        seqlen_q=24,
        seqlen_kv=30,
        tokens_q=48,
        tokens_kv=60,
        heads_q=4,
        heads_kv=4,
        head_dim=16,
        head_dim_v=16,
        dtype=torch.float32,
        scale=0.25,
    )
    assert replace(posed, seqlen_kv=24, tokens_kv=48) == sizes.pose(**SMALL, gradients=())
