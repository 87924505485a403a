"""The peers: right results, honest reasons."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from flashtile.bench.baselines import FLEX, PEERS, SDPA, Peer, flex_options, import_problem
from flashtile.bench.cases import OPTIONS, BenchCase, Option
from flashtile.bench.tensors import CaseTensors

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
CASE = BenchCase(
    direction="backward",
    dtype="float64",
    head_dim=8,
    seqlen=24,
    is_causal=True,
    batch=2,
    heads_q=4,
    heads_kv=4,
)
BY_NAME = {peer.name: peer for peer in PEERS}
ON_CPU = [peer for peer in PEERS if peer.unavailable_reason(CASE, CPU) is None]


@pytest.fixture(autouse=True)
def fresh_imports() -> None:
    import_problem.cache_clear()


def formula(tensors: CaseTensors) -> torch.Tensor:
    """An independent statement of attention, by einsum in float64 and pair by pair."""
    case = tensors.case
    q = tensors.q.double()
    k, v = (x.double().repeat_interleave(case.heads_q // case.heads_kv, dim=2) for x in (tensors.k, tensors.v))
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) * case.head_dim**-0.5
    if tensors.bias is not None:
        s = s + tensors.bias.double()
    i, j = torch.meshgrid(*[torch.arange(case.seqlen, device=q.device)] * 2, indexing="ij")
    if tensors.alibi_slopes is not None:
        s = s - tensors.alibi_slopes.double()[:, None, None] * (i - j).abs()
    is_visible = tensors.mask if tensors.mask is not None else torch.ones_like(i, dtype=torch.bool)
    if case.is_causal:
        is_visible = is_visible & (j <= i)
    if case.option == "window":
        is_visible = is_visible & ((i - j).abs() <= case.seqlen // 4)
    return torch.einsum("bhqk,bkhd->bqhd", s.masked_fill(~is_visible, -torch.inf).softmax(-1), v)


def test_names_are_distinct() -> None:
    assert len(BY_NAME) == len(PEERS)


def test_flashtile_naive_and_sdpa_run_on_a_cpu() -> None:
    assert [peer.name for peer in ON_CPU] == ["flashtile", "naive", "sdpa"]


@pytest.mark.parametrize("peer", ON_CPU, ids=lambda peer: peer.name)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("heads_kv", [4, 2])
def test_peer_computes_attention_and_its_gradients(peer: Peer, is_causal: bool, option: Option, heads_kv: int) -> None:
    tensors = CaseTensors.random(replace(CASE, is_causal=is_causal, option=option, heads_kv=heads_kv), CPU)
    inputs = (tensors.q, tensors.k, tensors.v)
    expected = formula(tensors)
    out = peer.prepare(tensors)(*inputs)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out, inputs, tensors.d_out), torch.autograd.grad(expected, inputs, tensors.d_out)
    )


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("heads_kv", [4, 2])
def test_flex_is_told_the_same_case(is_causal: bool, option: Option, heads_kv: int) -> None:
    case = replace(CASE, direction="forward", dtype="float32", seqlen=160, is_causal=is_causal, option=option)
    tensors = CaseTensors.random(replace(case, heads_kv=heads_kv), CPU)
    options = flex_options(tensors)
    needs_block_mask = is_causal or option in ("mask", "window")
    assert (options["block_mask"] is not None) == needs_block_mask
    assert (options["score_mod"] is not None) == (option in ("bias", "alibi"))
    q, k, v = (x.transpose(1, 2) for x in (tensors.q, tensors.k, tensors.v))
    out = flex_attention(q, k, v, **options)
    assert isinstance(out, torch.Tensor)
    torch.testing.assert_close(out.transpose(1, 2).double(), formula(tensors), rtol=1e-4, atol=1e-5)


def test_the_block_mask_of_a_window_skips_blocks() -> None:
    case = replace(CASE, direction="forward", seqlen=1024, heads_q=1, heads_kv=1, option="window", is_causal=True)
    block_mask = flex_options(CaseTensors.random(case, CPU))["block_mask"]
    full, partial = block_mask.full_kv_num_blocks, block_mask.kv_num_blocks
    assert (full + partial).flatten().tolist() == [1, 2, 3, 3, 3, 3, 3, 3], (
        "a window of 256 keys touches 3 blocks of 128"
    )


def test_each_option_has_peers_that_take_it() -> None:
    reasons = {
        option: {peer.name for peer in PEERS if option in peer.options and peer.name != "flashtile"}
        for option in OPTIONS
    }
    anywhere = {"naive", SDPA, "sdpa-cudnn", "sdpa-efficient", "sdpa-math", FLEX}
    assert reasons["plain"] == {peer.name for peer in PEERS} - {"flashtile"}
    assert reasons["bias"] == reasons["mask"] == anywhere
    assert reasons["alibi"] == anywhere | {"flash-attn-2"}
    assert reasons["window"] == anywhere | {"flash-attn-2", "flash-attn-3", "flash-attn-4"}
    case = replace(CASE, option="bias")
    assert BY_NAME["sdpa-flash"].unavailable_reason(case, CUDA) == "takes no bias as it is called here"


def test_peers_for_gpus_say_so_on_a_cpu() -> None:
    reasons = {peer.name: peer.unavailable_reason(CASE, CPU) for peer in PEERS if peer not in ON_CPU}
    assert set(reasons.values()) == {"needs a GPU"}
    assert {"sdpa-flash", "sdpa-cudnn", "sdpa-efficient", "sdpa-math", "flex", "flash-attn-2"} <= set(reasons)


@pytest.mark.parametrize(
    ("peer", "package"),
    [
        ("flash-attn-2", "flash_attn"),
        ("flash-attn-3", "flash_attn_interface"),
        ("flash-attn-4", "flash_attn"),
        ("xformers", "xformers"),
    ],
)
def test_a_package_that_is_absent_is_named(peer: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [])
    monkeypatch.delitem(sys.modules, package, raising=False)
    assert BY_NAME[peer].unavailable_reason(CASE, CUDA) == f"{package} is not installed"


def test_a_package_that_is_broken_says_how(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("raise OSError('undefined symbol: _ZN3c10')")
    monkeypatch.syspath_prepend(tmp_path)
    assert BY_NAME["flash-attn-2"].unavailable_reason(CASE, CUDA) == (
        "import of flash_attn fails: undefined symbol: _ZN3c10"
    )


def test_a_package_of_another_generation_lacks_the_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "flash_attn").mkdir()
    (tmp_path / "flash_attn" / "__init__.py").write_text("def flash_attn_func(q, k, v, **options): return options, 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    half = replace(CASE, dtype="bfloat16")
    second, fourth = BY_NAME["flash-attn-2"], BY_NAME["flash-attn-4"]
    assert second.unavailable_reason(half, CUDA) is None
    assert second.unavailable_reason(CASE, CUDA) == "takes float16 and bfloat16 only"
    assert "flash_attn.cute" in (fourth.unavailable_reason(half, CUDA) or "")

    def options_of(option: Option) -> Any:
        tensors = CaseTensors.random(replace(half, option=option), CPU)
        return second.prepare(tensors)(tensors.q, tensors.k, tensors.v)  # (out, lse) becomes out

    assert options_of("plain") == {"causal": True}
    assert options_of("window") == {"causal": True, "window_size": (6, 0)}
    assert torch.equal(options_of("alibi")["alibi_slopes"], torch.tensor([2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]))
    monkeypatch.delitem(sys.modules, "flash_attn")


def test_grouped_heads_are_refused_where_they_are_not_taken() -> None:
    peer = Peer(name="x", prepare=lambda _: lambda q, _k, _v: q, takes_grouped_heads=False)
    assert peer.unavailable_reason(CASE, CPU) is None
    assert peer.unavailable_reason(replace(CASE, heads_kv=2), CPU) == "takes no grouped heads"


def test_naive_announces_the_score_matrices_it_stores() -> None:
    one_matrix = 2 * 4 * 24 * 24 * 8
    assert BY_NAME["naive"].scratch_bytes(CASE) == 4 * one_matrix
    assert BY_NAME["naive"].scratch_bytes(replace(CASE, direction="forward")) == 2 * one_matrix
    assert BY_NAME[SDPA].scratch_bytes(CASE) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
@pytest.mark.parametrize(
    ("option", "is_causal"),  # not every pair: FlexAttention compiles for seconds each time
    [("plain", False), ("plain", True), ("bias", False), ("mask", True), ("alibi", True), ("window", True)],
)
def test_peer_computes_attention_and_its_gradients_on_a_gpu(peer: Peer, option: Option, is_causal: bool) -> None:
    case = replace(CASE, is_causal=is_causal, dtype="bfloat16", head_dim=64, seqlen=256, option=option)
    if reason := peer.unavailable_reason(case, CUDA):
        pytest.skip(reason)
    tensors = CaseTensors.random(case, CUDA)
    inputs = (tensors.q, tensors.k, tensors.v)
    expected = formula(tensors)
    with peer.scope():
        out = peer.prepare(tensors)(*inputs)
        grads = torch.autograd.grad(out, inputs, tensors.d_out, retain_graph=True)
        again = torch.autograd.grad(out, inputs, tensors.d_out, retain_graph=True)
    expected_grads = torch.autograd.grad(expected, inputs, tensors.d_out.double())
    for got, wanted in zip((out, *grads, *again), (expected, *expected_grads, *expected_grads), strict=True):
        torch.testing.assert_close(got.double(), wanted.double(), rtol=0.05, atol=0.05)
