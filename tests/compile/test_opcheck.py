"""torch's own checks of the registered ops: schema, autograd registration, fake kernels, and ahead-of-time tracing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compile_cases import CASES, dense_case
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

OPS = ("flashtile::attention_forward", "flashtile::attention_backward")
CHECKED = (
    "dense, plain",
    "dense, causal",
    "dense, all a fused kernel takes",
    "dense, window",
    "dense, bias",
    "dense, sinks",
    "dense, dropout seeded by a tensor",
    "dense, everything",
    "dense, everything, naive",
    "dense, no key at all",
    "packed, plain",
    "packed, without lse",
    "packed, everything",
    "packed, naive",
)


class RecordOps(TorchDispatchMode):
    """Keeps the arguments of the flashtile ops that run inside it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, tuple[Any, ...]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "flashtile":
            self.calls[func.name()] = args
        return func(*args, **(kwargs or {}))


def recorded_arguments(name: str, op: str) -> tuple[Any, ...]:
    """What a real call and its backward pass give to the op."""
    with RecordOps() as recorder:
        CASES[name].run()
    assert set(recorder.calls) == set(OPS)
    return tuple(arg.detach().clone() if isinstance(arg, Tensor) else arg for arg in recorder.calls[op])


def registered(op: str) -> Any:
    return getattr(torch.ops.flashtile, op.split("::")[1]).default


@pytest.mark.parametrize("name", CHECKED)
def test_forward(name: str) -> None:
    op = registered(OPS[0])
    arguments = recorded_arguments(name, OPS[0])
    for argument, declared in zip(arguments, op._schema.arguments, strict=True):
        if isinstance(argument, Tensor) and declared.name in ("q", "k", "v", "bias", "sinks"):
            argument.requires_grad_()
    torch.library.opcheck(op, arguments)


@pytest.mark.parametrize("name", CHECKED)
def test_backward(name: str) -> None:
    torch.library.opcheck(registered(OPS[1]), recorded_arguments(name, OPS[1]))


@pytest.mark.parametrize("op", OPS)
def test_fake_kernels_state_the_shapes_dtypes_and_strides_of_the_real_ones(op: str) -> None:
    """For inputs of every floating dtype, and for strides that no allocator would choose."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        case = dense_case(dtype=dtype, seqlen_q=7, heads_kv=4, head_dim_v=8)
        strided = {name: tensor.transpose(1, 2).contiguous().transpose(1, 2) for name, tensor in case.tensors.items()}
        with RecordOps() as recorder:
            out, lse = case.call({name: tensor.requires_grad_() for name, tensor in strided.items()}, {})
            (out.double().sum() + lse.double().sum()).backward()
        arguments = tuple(arg.detach() if isinstance(arg, Tensor) else arg for arg in recorder.calls[op])
        torch.library.opcheck(registered(op), arguments, test_utils="test_faketensor")


def test_the_ops_mutate_nothing_and_alias_nothing() -> None:
    for op in OPS:
        schema = registered(op)._schema
        assert not schema.is_mutable
        assert all(value.alias_info is None for value in (*schema.arguments, *schema.returns))
