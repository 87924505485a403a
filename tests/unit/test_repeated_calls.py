"""A call that comes again is not checked and planned again, and nobody can tell but by the clock."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import flashtile
from flashtile import InvalidArgument, UnsupportedProblem, repeats
from flashtile.spec import validation


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "_known", {})


@pytest.fixture
def num_checks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each call that was checked."""
    checks, check_call = [], validation.check_call

    def counted(*args: Any, **kwargs: Any) -> Any:
        checks.append(1)
        return check_call(*args, **kwargs)

    monkeypatch.setattr(validation, "check_call", counted)
    return checks


def qkv(seqlen: int = 7, **like: Any) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, 2, seqlen, 4, 16, generator=torch.Generator().manual_seed(seqlen)).to(**like).unbind()
    return q, k, v


CUTS = torch.tensor([0, 3, 7], dtype=torch.int32)


def packed(cuts: Tensor = CUTS, **options: Any) -> Tensor:
    q, k, v = (tensor[0] for tensor in qkv())
    return flashtile.attention_varlen(
        q, k, v, cu_seqlens_q=cuts, cu_seqlens_kv=cuts, max_seqlen_q=4, max_seqlen_kv=4, **options
    )


# --- what is short ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "scale": 0.3, "softcap": 5.0, "window": (3, None)},
        {"bias": torch.randn(2, 1, 7, 7), "mask": torch.ones(7, 7).tril().bool()},
        {"alibi_slopes": torch.rand(4), "sinks": torch.rand(4)},
        {"backend": "naive"},
    ],
    ids=lambda options: " ".join(options) or "plain",
)
@pytest.mark.parametrize("function", [flashtile.attention, flashtile.attention_with_lse])
def test_the_second_call_is_not_checked_and_gives_the_same(
    function: Any, options: dict[str, Any], num_checks: list[int]
) -> None:
    first = function(*qkv(), **options)
    other = tuple(tensor.clone() for tensor in qkv())
    second = function(*other, **options)
    assert len(num_checks) == 1
    for found, expected in zip(second, first, strict=True):
        assert torch.equal(found, expected)


def test_new_values_are_computed_from(num_checks: list[int]) -> None:
    """What is remembered holds no tensor of the first call."""
    q, k, v = qkv()
    sinks = torch.rand(4)
    flashtile.attention(q, k, v, sinks=sinks)
    again = flashtile.attention(q, k, -v, sinks=sinks - 3)
    assert len(num_checks) == 1
    torch.testing.assert_close(again, flashtile.attention(q, k, -v, sinks=sinks - 3, backend="naive"))


def test_packed_sequences_are_remembered_and_their_boundaries_read_every_time(num_checks: list[int]) -> None:
    first = packed()
    moved = packed(torch.tensor([0, 4, 7], dtype=torch.int32))
    assert len(num_checks) == 1 and not torch.equal(first, moved)
    with pytest.raises(InvalidArgument, match="cu_seqlens_q"):
        packed(torch.tensor([0, 4, 99], dtype=torch.int32))


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "_MAX_KNOWN", 3)
    for seqlen in range(1, 10):
        flashtile.attention(*qkv(seqlen))
        assert len(repeats._known) <= 3


# --- what is another call ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"seqlen": 8},
        {"dtype": torch.bfloat16},
        {"causal": False},
        {"scale": 0.25},
        {"window": (2, 0)},
        {"softcap": 1.0},
        {"deterministic": True},
        {"backend": "naive"},
        {"sinks": torch.zeros(4)},
        {"bias": torch.zeros(1, 1, 1, 1)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_call_is_checked(change: dict[str, Any], num_checks: list[int]) -> None:
    flashtile.attention(*qkv(), causal=True)
    like = {name: change[name] for name in ("seqlen", "dtype") if name in change}
    options: dict[str, Any] = {"causal": True} | {name: change[name] for name in change if name not in like}
    flashtile.attention(*qkv(**like), **options)
    assert len(num_checks) == 2


@pytest.mark.parametrize("wrong", [{"causal": 1}, {"deterministic": 0}, {"softcap": False}, {"backend": "fastest"}])
def test_a_wrong_argument_that_equals_a_right_one_is_still_wrong(wrong: dict[str, Any]) -> None:
    flashtile.attention(*qkv(), causal=True, deterministic=False, softcap=0.0)
    options: dict[str, Any] = {"causal": True, "deterministic": False, "softcap": 0.0} | wrong
    with pytest.raises(InvalidArgument):
        flashtile.attention(*qkv(), **options)


def test_a_wrong_call_is_wrong_every_time() -> None:
    q, k, v = qkv()
    wrong: dict[str, Any] = {"dropout_p": torch.zeros(2)}
    with pytest.raises(InvalidArgument, match="dropout_p"):
        flashtile.attention(q, k, v, **wrong)
    for _ in range(2):
        with pytest.raises(InvalidArgument):
            flashtile.attention(q, k[:, :, :3], v)
        with pytest.raises(InvalidArgument):
            flashtile.attention(q.to_sparse(), k, v)


def test_options_that_cannot_be_hashed_are_taken_too() -> None:
    options: dict[str, Any] = {"window": [2, 0]}
    first, second = (flashtile.attention(*qkv(), **options) for _ in range(2))
    assert torch.equal(first, second)
    assert not repeats._known


def test_dropout_draws_new_weights_every_time() -> None:
    first, second = (flashtile.attention(*qkv(), dropout_p=0.5) for _ in range(2))
    assert not torch.equal(first, second)


def test_the_environment_is_asked_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    flashtile.attention(*qkv())
    monkeypatch.setenv("FLASHTILE_BACKEND", "fastest")
    with pytest.raises(InvalidArgument, match="FLASHTILE_BACKEND"):
        flashtile.attention(*qkv())


# --- who has to see the registered op ---------------------------------------------------------------------------------


def gradients(*tensors: Tensor, wants_lse: bool = False, **options: Any) -> tuple[Tensor, ...]:
    """Of a sum of the results, for every tensor and option that requires one."""
    leaves = [tensor for tensor in (*tensors, *options.values()) if isinstance(tensor, Tensor) and tensor.requires_grad]
    out, lse = flashtile.attention_with_lse(*tensors, **options)
    total = out.square().sum()
    return torch.autograd.grad(total + lse.sum() if wants_lse else total, leaves)


@pytest.mark.parametrize("wants_lse", [False, True], ids=["out", "out and lse"])
def test_gradients_are_those_of_the_first_call(wants_lse: bool, num_checks: list[int]) -> None:
    options: dict[str, Any] = {"bias": torch.randn(1, 1, 7, 7), "sinks": torch.rand(4), "softcap": 4.0}
    for each in ("bias", "sinks"):
        options[each].requires_grad_()
    q, k, v = (tensor.requires_grad_() for tensor in qkv())
    first = gradients(q, k, v, wants_lse=wants_lse, **options)
    second = gradients(q, k, v, wants_lse=wants_lse, **options)
    assert len(num_checks) == 1 and len(first) == 5
    for found, expected in zip(second, first, strict=True):
        assert torch.equal(found, expected)


def test_other_gradients_are_another_call(num_checks: list[int]) -> None:
    q, k, v = qkv()
    for wanted in ([q], [q, v], [q, v]):
        for tensor in wanted:
            tensor.requires_grad_()
        assert len(gradients(q, k, v)) == len(wanted)
    with torch.no_grad():
        assert not flashtile.attention(q, k, v).requires_grad
    assert len(num_checks) == 3 and not flashtile.attention(*qkv()).requires_grad


def test_second_derivatives_are_refused_every_time() -> None:
    q, k, v = (tensor.requires_grad_() for tensor in qkv())
    for _ in range(2):
        (d_q,) = torch.autograd.grad(flashtile.attention(q, k, v).square().sum(), q, create_graph=True)
        with pytest.raises(UnsupportedProblem, match="no derivative"):
            d_q.sum().backward()


def test_recomputed_and_offloaded_calls_have_the_same_gradients() -> None:
    q, k, v = (tensor.requires_grad_() for tensor in qkv())
    expected = gradients(q, k, v)
    for _ in range(2):
        out = checkpoint(flashtile.attention, q, k, v, use_reentrant=False)
        found = torch.autograd.grad(out.square().sum(), (q, k, v))
        with torch.autograd.graph.save_on_cpu():
            offloaded = flashtile.attention(q, k, v)
        for each in (found, torch.autograd.grad(offloaded.square().sum(), (q, k, v))):
            torch.testing.assert_close(each, expected)


def test_what_changed_in_place_before_the_backward_is_told() -> None:
    q, k, v = (tensor.requires_grad_() for tensor in qkv())
    for _ in range(2):
        doubled = q * 2
        out = flashtile.attention(doubled, k, v)
        doubled.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


def test_negated_views_are_read_as_what_they_are() -> None:
    q, k, v = qkv()
    expected = flashtile.attention(-q, k, v)
    flashtile.attention(q, k, v)
    negated = torch.ops.aten._neg_view.default(q)
    assert negated.is_neg() and torch.equal(flashtile.attention(negated, k, v), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_precision_of_float32_is_part_of_its_calls(dtype: torch.dtype, num_checks: list[int]) -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for precision in ("ieee", "tf32", "ieee"):
            torch.backends.cuda.matmul.fp32_precision = precision
            flashtile.attention(*qkv(dtype=dtype))
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    assert len(num_checks) == (2 if dtype is torch.float32 else 1)


def test_strides_are_part_of_a_call() -> None:
    q, k, v = qkv()
    expected = flashtile.attention(q, k, v)
    moved = q.transpose(1, 2).contiguous().transpose(1, 2)
    assert moved.stride() != q.stride() and torch.equal(flashtile.attention(moved, k, v), expected)


class _Names(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_dispatch_modes_see_the_op() -> None:
    for _ in range(2):
        flashtile.attention(*qkv())
        with _Names() as mode:
            flashtile.attention(*qkv())
        assert "flashtile.attention_forward.default" in mode.names


def test_function_modes_see_the_op() -> None:
    class Names(TorchFunctionMode):
        names: list[str]

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    mode = Names()
    mode.names = []
    flashtile.attention(*qkv())
    with mode:
        flashtile.attention(*qkv())
    assert "flashtile.attention_forward.default" in mode.names


@pytest.mark.parametrize("backend", ["cpu", "naive"])
def test_a_default_device_is_nobody_who_looks(backend: str, num_checks: list[int]) -> None:
    leaves = [tensor.requires_grad_() for tensor in qkv()]
    call = partial(flashtile.attention, *leaves, causal=True, softcap=5.0, backend=backend)
    expected = torch.autograd.grad(call().sum(), leaves)
    with torch.device("meta"):
        found = torch.autograd.grad(call().sum(), leaves)
    assert len(num_checks) == 1 and all(map(torch.equal, found, expected))


def test_profilers_see_the_op() -> None:
    flashtile.attention(*qkv())
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        flashtile.attention(*qkv())
    assert "flashtile::attention_forward" in profiled.key_averages().table()


def test_subclasses_see_the_op() -> None:
    class Named(Tensor):
        seen: ClassVar[list[str]] = []

        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            cls.seen.append(str(func))
            return super().__torch_function__(func, types, args, kwargs or {})

    q, k, v = qkv()
    bias = torch.zeros(7, 7)
    for named in ((q.as_subclass(Named), bias), (q, bias.as_subclass(Named))):
        Named.seen.clear()
        for _ in range(2):
            flashtile.attention(q, k, v, bias=bias)
            flashtile.attention(named[0], k, v, bias=named[1])
        assert Named.seen.count("flashtile.attention_forward.default") == 2


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms_and_tangents_go_the_long_way() -> None:
    q, k, v = qkv()
    expected = flashtile.attention(q, k, v)
    one_by_one = torch.vmap(lambda q, k, v: flashtile.attention(q[None], k[None], v[None])[0])
    torch.testing.assert_close(one_by_one(q, k, v), expected)
    with forward_ad.dual_level(), pytest.raises(UnsupportedProblem, match="forward-mode"):
        flashtile.attention(forward_ad.make_dual(q, torch.ones_like(q)), k, v)
