"""torch.export with dynamic sizes: same numbers, and programs can be copied, saved, loaded, decomposed and trained."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compile_cases import assert_same, boundaries, dense_case, everything, packed_case
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx

import flashtile

BATCH, SEQLEN_Q, SEQLEN_KV = Dim("batch", max=64), Dim("seqlen_q", max=512), Dim("seqlen_kv", max=512)
TOKENS_Q, TOKENS_KV, BOUNDARIES = Dim("tokens_q", max=512), Dim("tokens_kv", max=512), Dim("boundaries", min=2, max=64)
is_strict = pytest.mark.parametrize("strict", [False, True], ids=["non-strict", "strict"])


class Dense(nn.Module):
    """Attention with fixed options; its sinks and slopes are part of the module's state."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.options: dict[str, Any] = {n: value for n, value in options.items() if not isinstance(value, Tensor)}
        for name, value in options.items():
            if isinstance(value, Tensor):
                self.register_buffer(name, value)

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        options: dict[str, Any] = self.options | dict(self.named_buffers())
        return flashtile.attention_with_lse(q, k, v, **options)


class HalfWindow(nn.Module):
    """A window computed from a size that is dynamic in the program."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return flashtile.attention_with_lse(q, k, v, window=(q.shape[1] // 2, 0))


class WithBias(nn.Module):
    """A bias as large as the scores, whose sizes are dynamic too."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        distance = torch.arange(k.shape[1], device=q.device) - torch.arange(q.shape[1], device=q.device)[:, None]
        return flashtile.attention_with_lse(q, k, v, bias=distance * 0.01, mask=distance < 5)


class Packed(nn.Module):
    """Packed attention that bounds the longest sequence by the number of tokens."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_kv: Tensor) -> tuple[Tensor, Tensor]:
        return flashtile.attention_varlen_with_lse(
            q,
            k,
            v,
            cu_seqlens_q=cu_q,
            cu_seqlens_kv=cu_kv,
            max_seqlen_q=q.shape[0],
            max_seqlen_kv=k.shape[0],
            causal=True,
        )


class PackedWithLengths(nn.Module):
    """Packed attention that is told the longest sequence at each call."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_kv: Tensor, longest_q: int, longest_kv: int
    ) -> tuple[Tensor, Tensor]:
        return flashtile.attention_varlen_with_lse(
            q, k, v, cu_seqlens_q=cu_q, cu_seqlens_kv=cu_kv, max_seqlen_q=longest_q, max_seqlen_kv=longest_kv
        )


def per_head_options() -> dict[str, Any]:
    """Every option whose tensors do not depend on a sequence length."""
    return {name: value for name, value in everything().items() if name not in ("bias", "mask")}


DENSE: dict[str, Callable[[], nn.Module]] = {
    "plain": Dense,
    "causal": lambda: Dense(causal=True),
    "options": lambda: Dense(**per_head_options()),
    "naive": lambda: Dense(**per_head_options(), backend="naive"),
    "bias and mask": WithBias,
    "window from a dynamic length": HalfWindow,
}


def qkv(batch: int, seqlen_q: int, seqlen_kv: int) -> tuple[Tensor, ...]:
    return torch.randn(batch, seqlen_q, 4, 8), torch.randn(batch, seqlen_kv, 2, 8), torch.randn(batch, seqlen_kv, 2, 5)


def export_dense(module: nn.Module, *, strict: bool = False) -> ExportedProgram:
    kv_sizes = {0: BATCH, 1: SEQLEN_KV}
    sizes = ({0: BATCH, 1: SEQLEN_Q}, kv_sizes, kv_sizes)
    return torch.export.export(module, qkv(3, 6, 7), dynamic_shapes=sizes, strict=strict)


def check_program(program: ExportedProgram, module: nn.Module, inputs: list[tuple[Any, ...]]) -> None:
    exported = program.module()
    for arguments in inputs:
        for found, expected in zip(exported(*arguments), module(*arguments), strict=True):
            torch.testing.assert_close(found, expected)


@is_strict
@pytest.mark.parametrize("name", DENSE)
def test_dense_with_dynamic_sizes(name: str, strict: bool) -> None:
    module = DENSE[name]()
    program = export_dense(module, strict=strict)
    nodes = [str(node.target) for node in program.graph.nodes if "flashtile" in str(node.target)]
    assert nodes == ["flashtile.attention_forward.default"]
    check_program(program, module, [qkv(3, 6, 7), qkv(2, 31, 31), qkv(5, 300, 9), qkv(4, 2, 500)])


def packed_inputs(lengths_q: tuple[int, ...], lengths_kv: tuple[int, ...]) -> tuple[Tensor, ...]:
    case = packed_case(lengths_q=lengths_q, lengths_kv=lengths_kv)
    return *case.tensors.values(), boundaries(lengths_q), boundaries(lengths_kv)


@is_strict
def test_packed_with_dynamic_tokens_and_sequences(strict: bool) -> None:
    sizes = ({0: TOKENS_Q}, {0: TOKENS_KV}, {0: TOKENS_KV}, {0: BOUNDARIES}, {0: BOUNDARIES})
    program = torch.export.export(Packed(), packed_inputs((4, 9), (5, 7)), dynamic_shapes=sizes, strict=strict)
    others = [packed_inputs((4, 0, 60), (3, 70, 2)), packed_inputs((5, 5, 5, 5), (1, 2, 3, 4))]
    check_program(program, Packed(), others)


@is_strict
def test_packed_with_dynamic_longest_lengths(strict: bool) -> None:
    sizes = ({0: TOKENS_Q}, {0: TOKENS_KV}, {0: TOKENS_KV}, {0: BOUNDARIES}, {0: BOUNDARIES}, Dim.DYNAMIC, Dim.DYNAMIC)
    arguments = (*packed_inputs((4, 9), (5, 11)), 9, 11)
    program = torch.export.export(PackedWithLengths(), arguments, dynamic_shapes=sizes, strict=strict)
    check_program(program, PackedWithLengths(), [(*packed_inputs((4, 0, 60), (3, 70, 2)), 60, 70)])
    with pytest.raises(flashtile.InvalidArgument, match="max_seqlen_q"):
        program.module()(*packed_inputs((4, 0, 60), (3, 70, 2)), 59, 70)


def test_copies_and_saved_programs_give_the_same_numbers() -> None:
    module = Dense(**per_head_options())
    program = export_dense(module)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(program), torch.export.load(buffer), program.run_decompositions()):
        check_program(twin, module, [qkv(2, 31, 9)])


def test_a_drawn_seed_is_not_frozen_into_the_program() -> None:
    exported = export_dense(Dense(dropout_p=0.5)).module()
    arguments = qkv(2, 31, 9)
    first, second = exported(*arguments)[0], exported(*arguments)[0]
    assert not torch.equal(first, second)


@pytest.mark.parametrize("trace", ["export", "strict export", "make_fx"])
def test_a_program_traced_without_gradients_can_be_trained(trace: str) -> None:
    """Tensors that required no gradient while tracing may require one later: a silent zero would be a wrong answer."""
    case = dense_case(causal=True)
    call: Callable[..., Any] = Dense(causal=True)
    if trace == "make_fx":
        call = make_fx(call)(*case.tensors.values())
    else:
        call = torch.export.export(Dense(causal=True), tuple(case.tensors.values()), strict="strict" in trace).module()
    assert_same(case.run(lambda tensors, _: call(*tensors.values())), case.run())
