"""The objects that flow through the library: frozen, slotted, hashable, and free of tensors where they say so."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

from flashtile.backends.base import KernelPlan, Plan, TileConfig
from flashtile.spec import devices
from flashtile.spec.operands import Operands
from flashtile.spec.problem import DIFFERENTIABLE, AttentionProblem, MaskSpec

OPTIONS: dict[str, Any] = {
    "mask": MaskSpec(left=3, right=0),
    "scale": 0.25,
    "softcap": 20.0,
    "dropout_p": 0.1,
    "gradients": frozenset({"q", "bias"}),
    "deterministic": True,
}


def dense_operands(**changes: Any) -> Operands:
    good = {"q": torch.zeros(2, 5, 6, 8), "k": torch.zeros(2, 7, 3, 8), "v": torch.zeros(2, 7, 3, 4)}
    return Operands(**good | changes)


def packed_operands(**changes: Any) -> Operands:
    good = {
        "q": torch.zeros(11, 6, 8),
        "k": torch.zeros(13, 3, 8),
        "v": torch.zeros(13, 3, 4),
        "cu_seqlens_q": torch.tensor([0, 4, 4, 9], dtype=torch.int32),
        "cu_seqlens_kv": torch.tensor([0, 1, 6, 13], dtype=torch.int32),
    }
    return Operands(**good | changes)


def dense_problem(**changes: Any) -> AttentionProblem:
    return dataclasses.replace(AttentionProblem.of(dense_operands(), **OPTIONS), **changes)


def packed_problem(**changes: Any) -> AttentionProblem:
    problem = AttentionProblem.of(packed_operands(), **OPTIONS, max_seqlen_q=5, max_seqlen_kv=7)
    return dataclasses.replace(problem, **changes)


KERNEL = KernelPlan(
    kernel="tiled",
    tiles=TileConfig(block_q=64, block_kv=64),
    grid=(4,),
    shared_memory_bytes=1024,
    reason="a test",
)
VALUES = [
    MaskSpec(),
    dense_problem(),
    TileConfig(block_q=64, block_kv=32),
    KERNEL,
    Plan(backend="cpu", forward=KERNEL, backward=KERNEL, reason="a test", rejected=(("gpu", ("no GPU",)),)),
    devices.DEVICES["h200"],
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
class TestValueObjects:
    def test_is_frozen(self, value: Any) -> None:
        for field in dataclasses.fields(value):
            with pytest.raises(dataclasses.FrozenInstanceError):
                setattr(value, field.name, getattr(value, field.name))

    def test_has_slots_and_takes_no_new_attribute(self, value: Any) -> None:
        assert not hasattr(value, "__dict__")
        assert set(type(value).__slots__) == {field.name for field in dataclasses.fields(value)}

    def test_takes_keywords_only(self, value: Any) -> None:
        assert all(field.kw_only for field in dataclasses.fields(value))

    def test_equal_values_have_equal_hashes_and_survive_pickling(self, value: Any) -> None:
        for other in (dataclasses.replace(value), pickle.loads(pickle.dumps(value))):
            assert other is not value
            assert other == value
            assert hash(other) == hash(value)

    def test_holds_neither_tensor_nor_device(self, value: Any) -> None:
        for field in dataclasses.fields(value):
            assert not isinstance(getattr(value, field.name), (Tensor, torch.device))


@pytest.mark.parametrize("change", [field.name for field in dataclasses.fields(AttentionProblem)])
def test_every_field_of_a_problem_tells_two_problems_apart(change: str) -> None:
    problem = dense_problem()
    others: dict[str, Any] = {
        "layout": "varlen",
        "dtype": torch.bfloat16,
        "mask": MaskSpec(left=4, right=0),
        "bias_shape": (1, 1, 5, 7),
        "mask_shape": (1, 1, 1, 7),
        "gradients": frozenset(),
        "has_alibi": True,
        "has_sinks": True,
        "deterministic": False,
    }
    value = others[change] if change in others else getattr(problem, change) + 1
    assert dataclasses.replace(problem, **{change: value}) != problem


def test_dense_sizes_are_read_off_the_operands() -> None:
    problem = AttentionProblem.of(dense_operands(), **OPTIONS)
    assert problem.layout == "dense"
    assert (problem.batch, problem.seqlen_q, problem.seqlen_kv) == (2, 5, 7)
    assert (problem.tokens_q, problem.tokens_kv) == (10, 14)
    assert (problem.heads_q, problem.heads_kv, problem.heads_per_kv) == (6, 3, 2)
    assert (problem.head_dim, problem.head_dim_v) == (8, 4)
    assert problem.out_shape == (2, 5, 6, 4)
    assert problem.lse_shape == (2, 6, 5)
    assert {name: getattr(problem, name) for name in OPTIONS} == OPTIONS


def test_packed_sizes_are_read_off_the_operands() -> None:
    problem = packed_problem()
    assert problem.layout == "varlen"
    assert (problem.batch, problem.seqlen_q, problem.seqlen_kv) == (3, 5, 7)
    assert (problem.tokens_q, problem.tokens_kv) == (11, 13)
    assert problem.out_shape == (11, 6, 4)
    assert problem.lse_shape == (6, 11)


def test_absent_operands_leave_no_trace_and_present_ones_do() -> None:
    bare = AttentionProblem.of(dense_operands(), **OPTIONS)
    assert (bare.bias_shape, bare.mask_shape, bare.has_alibi, bare.has_sinks) == (None, None, False, False)
    operands = dense_operands(
        bias=torch.zeros(6, 1, 7),
        mask=torch.ones((), dtype=torch.bool),
        alibi_slopes=torch.zeros(6),
        sinks=torch.zeros(6),
    )
    full = AttentionProblem.of(operands, **OPTIONS)
    assert (full.bias_shape, full.mask_shape) == ((1, 6, 1, 7), (1, 1, 1, 1))
    assert (full.has_alibi, full.has_sinks) == (True, True)


@pytest.mark.parametrize("size", ["batch", "seqlen_q", "seqlen_kv", "tokens_q", "tokens_kv"])
def test_a_size_of_zero_makes_a_problem_empty(size: str) -> None:
    assert not dense_problem().is_empty and not packed_problem().is_empty
    assert dense_problem(**{size: 0}).is_empty
    assert packed_problem(**{size: 0}).is_empty


@pytest.mark.parametrize(
    ("dtype", "accumulation"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_statistics_are_float32_unless_the_inputs_are_float64(dtype: torch.dtype, accumulation: torch.dtype) -> None:
    assert dense_problem(dtype=dtype).accumulation_dtype == accumulation


@pytest.mark.parametrize(
    ("mask", "is_causal", "is_unlimited"),
    [
        (MaskSpec(), False, True),
        (MaskSpec(right=0), True, False),
        (MaskSpec(left=0, right=0), True, False),
        (MaskSpec(left=0), False, False),
        (MaskSpec(right=1), False, False),
    ],
)
def test_mask_spec_says_what_it_is(mask: MaskSpec, is_causal: bool, is_unlimited: bool) -> None:
    assert (mask.is_causal, mask.is_unlimited) == (is_causal, is_unlimited)


def test_operands_are_frozen_slotted_and_name_every_differentiable_tensor() -> None:
    operands = dense_operands()
    with pytest.raises(dataclasses.FrozenInstanceError):
        operands.q = operands.k  # pyright: ignore[reportAttributeAccessIssue] -- the point of the test
    assert not hasattr(operands, "__dict__")
    assert set(DIFFERENTIABLE) <= {field.name for field in dataclasses.fields(Operands)}
