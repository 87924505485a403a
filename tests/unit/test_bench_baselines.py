"""The peers: right results, honest reasons."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flashtile.bench.baselines import PEERS, SDPA, Peer, import_problem
from flashtile.bench.cases import BenchCase
from flashtile.bench.kernels import CaseTensors

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


def formula(case: BenchCase, tensors: CaseTensors) -> torch.Tensor:
    """An independent statement of attention, by einsum in float64."""
    q = tensors.q.double()
    k, v = (x.double().repeat_interleave(case.heads_q // case.heads_kv, dim=2) for x in (tensors.k, tensors.v))
    s = torch.einsum("bqhd,bkhd->bhqk", q, k) * case.head_dim**-0.5
    if case.is_causal:
        s = s + torch.full((case.seqlen, case.seqlen), -torch.inf, dtype=s.dtype, device=s.device).triu(1)
    return torch.einsum("bhqk,bkhd->bqhd", s.softmax(-1), v)


def test_names_are_distinct() -> None:
    assert len(BY_NAME) == len(PEERS)


def test_flashtile_naive_and_sdpa_run_on_a_cpu() -> None:
    assert [peer.name for peer in ON_CPU] == ["flashtile", "naive", "sdpa"]


@pytest.mark.parametrize("peer", ON_CPU, ids=lambda peer: peer.name)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("heads_kv", [4, 2])
def test_peer_computes_attention_and_its_gradients(peer: Peer, is_causal: bool, heads_kv: int) -> None:
    case = replace(CASE, is_causal=is_causal, heads_kv=heads_kv)
    tensors = CaseTensors.random(case, CPU)
    inputs = (tensors.q, tensors.k, tensors.v)
    expected = formula(case, tensors)
    out = peer.prepare(case, CPU)(*inputs)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(
        torch.autograd.grad(out, inputs, tensors.d_out), torch.autograd.grad(expected, inputs, tensors.d_out)
    )


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
    (tmp_path / "flash_attn" / "__init__.py").write_text("def flash_attn_func(q, k, v, causal): return q, None\n")
    monkeypatch.syspath_prepend(tmp_path)
    half = replace(CASE, dtype="bfloat16")
    second, fourth = BY_NAME["flash-attn-2"], BY_NAME["flash-attn-4"]
    assert second.unavailable_reason(half, CUDA) is None
    assert second.unavailable_reason(CASE, CUDA) == "takes float16 and bfloat16 only"
    assert "flash_attn.cute" in (fourth.unavailable_reason(half, CUDA) or "")
    q = torch.ones(1)
    assert second.prepare(half, CUDA)(q, q, q) is q, "(out, lse) becomes out"
    monkeypatch.delitem(sys.modules, "flash_attn")


def test_grouped_heads_are_refused_where_they_are_not_taken() -> None:
    peer = Peer(name="x", prepare=lambda _case, _device: lambda q, _k, _v: q, takes_grouped_heads=False)
    assert peer.unavailable_reason(CASE, CPU) is None
    assert peer.unavailable_reason(replace(CASE, heads_kv=2), CPU) == "takes no grouped heads"


def test_naive_announces_the_score_matrices_it_stores() -> None:
    one_matrix = 2 * 4 * 24 * 24 * 8
    assert BY_NAME["naive"].scratch_bytes(CASE) == 4 * one_matrix
    assert BY_NAME["naive"].scratch_bytes(replace(CASE, direction="forward")) == 2 * one_matrix
    assert BY_NAME[SDPA].scratch_bytes(CASE) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
@pytest.mark.parametrize("is_causal", [False, True])
def test_peer_computes_attention_and_its_gradients_on_a_gpu(peer: Peer, is_causal: bool) -> None:
    case = replace(CASE, is_causal=is_causal, dtype="bfloat16", head_dim=64, seqlen=256)
    if reason := peer.unavailable_reason(case, CUDA):
        pytest.skip(reason)
    tensors = CaseTensors.random(case, CUDA)
    inputs = (tensors.q, tensors.k, tensors.v)
    expected = formula(case, tensors)
    with peer.scope():
        out = peer.prepare(case, CUDA)(*inputs)
        grads = torch.autograd.grad(out, inputs, tensors.d_out, retain_graph=True)
        again = torch.autograd.grad(out, inputs, tensors.d_out, retain_graph=True)
    expected_grads = torch.autograd.grad(expected, inputs, tensors.d_out.double())
    for got, wanted in zip((out, *grads, *again), (expected, *expected_grads, *expected_grads), strict=True):
        torch.testing.assert_close(got.double(), wanted.double(), rtol=0.05, atol=0.05)
