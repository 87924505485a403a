"""What a launcher remembers of the calls that came before; no GPU is needed to say what it would launch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from flashtile.backends.base import Gradients, Saved
from flashtile.backends.gpu import COMPILER_OPTIONS
from flashtile.backends.launcher import (
    MOST_FORMS,
    KernelLauncher,
    given_to_backward,
    operands_of,
    relaunches,
    shortest,
    shortest_backward,
)
from flashtile.backends.relaunch import Relaunch
from flashtile.spec.operands import FIELDS, Operands, tensors_of


class Kernel:
    """Stands for a jitted function, and for its compiled form: counts who was called."""

    def __init__(self) -> None:
        self.found: list[Any] = []
        self.launched: list[Any] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **constants: Any) -> Compiled:
            self.found.append((grid, arguments, constants))
            return Compiled(self)

        return run


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.kernel.launched.append((grid, arguments))


def call(launcher: KernelLauncher, key: Any, *tensors: Tensor | None, block: int = 64) -> Any:
    return launcher(key, (5,), tensors, lambda *tensors: (*tensors, 7), num_warps=4, BLOCK=block)


def test_the_second_call_of_a_form_goes_straight_to_the_compiled_kernel() -> None:
    kernel = Kernel()
    launcher = KernelLauncher(kernel)
    tensors = [torch.full((3,), number) for number in (1, 2, 3)]
    for tensor in tensors:
        call(launcher, "key", tensor)
    assert kernel.found == [((5,), (tensors[0], 7), {"BLOCK": 64, "num_warps": 4, **COMPILER_OPTIONS})]
    assert kernel.launched == [((5, 1, 1), (tensor, 7, 64)) for tensor in tensors[1:]]


@pytest.mark.parametrize(
    "other",
    [
        None,
        torch.zeros(4, 2),
        torch.zeros(2, 2).T.contiguous().T,
        torch.zeros(2, 2, dtype=torch.bfloat16),
        torch.zeros(5)[1:].view(2, 2),
    ],
    ids=["absent", "size", "strides", "dtype", "address"],
)
def test_tensors_tell_forms_apart(other: Tensor | None) -> None:
    kernel = Kernel()
    launcher = KernelLauncher(kernel)
    first = torch.zeros(2, 2)
    for tensor in (first, first, other, other):
        call(launcher, "key", first, tensor)
    assert len(kernel.found) == 2


def test_keys_and_constants_tell_forms_apart() -> None:
    kernel = Kernel()
    launcher = KernelLauncher(kernel)
    for key, block in (("one", 64), ("other", 64), ("one", 32), ("one", 64)):
        call(launcher, key, torch.zeros(1), block=block)
    assert len(kernel.found) == 3


class Ready:
    """Stands for a launch through the driver."""

    is_being_watched = False

    def __init__(self) -> None:
        self.launched: list[Any] = []

    def is_watched(self) -> bool:
        return self.is_being_watched

    def __call__(self, tensors: Any) -> None:
        self.launched.append(tensors)


@pytest.fixture
def ready(monkeypatch: pytest.MonkeyPatch) -> Ready:
    made = Ready()
    monkeypatch.setattr(Relaunch, "of", lambda *_: made)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: None)
    return made


def test_from_the_second_on_the_driver_is_asked_alone(ready: Ready) -> None:
    kernel = Kernel()
    launcher = KernelLauncher(kernel)
    found = [call(launcher, "key", torch.zeros(1)) for _ in range(4)]
    assert (len(kernel.found), len(kernel.launched), len(ready.launched)) == (1, 0, 3)
    assert found == [None, ready, ready, ready]


def test_who_asks_triton_to_be_told_of_launches_is_told(ready: Ready) -> None:
    ready.is_being_watched = True
    kernel = Kernel()
    launcher = KernelLauncher(kernel)
    assert [call(launcher, "key", torch.zeros(1)) for _ in range(4)] == [None] * 4
    assert (len(kernel.found), len(kernel.launched), len(ready.launched)) == (1, 3, 0)


def test_forms_are_not_kept_without_end() -> None:
    kernel = Kernel()
    launcher = KernelLauncher(kernel)
    for number in range(MOST_FORMS + 1):
        call(launcher, number, torch.zeros(1))
    assert len(launcher._compiled) == 1


def test_operands_are_taken_apart_and_put_together() -> None:
    tensors = tuple(torch.zeros(number) for number in range(10))
    operands, others = operands_of((*tensors, "more"))
    assert others == ("more",) and tensors_of(operands) == tensors
    schema = torch.ops.flashtile.attention_forward.default._schema
    assert tuple(argument.name for argument in schema.arguments)[: len(FIELDS)] == FIELDS


# --- the shortest way -------------------------------------------------------------------------------------------------


def qkv(offset: int = 0) -> tuple[Tensor, ...]:
    return tuple(torch.zeros(64 + offset, dtype=torch.bfloat16)[offset:] for _ in range(3))


def test_the_shortest_way_makes_results_and_launches(ready: Ready) -> None:
    q, k, v = qkv()
    sinks = torch.zeros(4)
    results = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    run = shortest(
        cast(Any, ready), Operands(q=q, k=k, v=v, sinks=sinks), lambda: results, lambda _: pytest.fail("not this way")
    )
    others = qkv()
    assert run is not None and run(*others, None, None, None, sinks) == results[:2]
    assert ready.launched == [(*others, None, None, None, sinks, None, None, None, *results)]


@pytest.mark.parametrize("change", ["q", "sinks", "hooks", "device"])
def test_what_is_not_alike_goes_another_way(change: str, ready: Ready, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = qkv()
    sinks, moved = torch.zeros(4), torch.zeros(5)[1:]
    taken: list[Operands] = []

    def otherwise(operands: Operands) -> tuple[Tensor, Tensor]:
        taken.append(operands)
        return q, k

    run = shortest(
        cast(Any, ready), Operands(q=q, k=k, v=v, sinks=sinks), lambda: pytest.fail("not this way"), otherwise
    )
    ready.is_being_watched = change == "hooks"
    if change == "device":
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert run is not None
    run(qkv(1)[0] if change == "q" else q, k, v, None, None, None, moved if change == "sinks" else sinks)
    assert len(taken) == 1 and not ready.launched and taken[0].k is k and taken[0].bias is None


def test_without_a_launch_there_is_no_shortest_way() -> None:
    q, k, v = qkv()
    assert shortest(None, Operands(q=q, k=k, v=v), tuple, lambda _: (q, k)) is None


# --- that of a backward -----------------------------------------------------------------------------------------------


def backward_call(**changes: Any) -> tuple[Operands, Saved, Tensor | None, Tensor | None]:
    """(operands, saved, d_out, d_lse), of which some are others."""
    q, k, v = (torch.zeros(2, 4, 8, dtype=torch.bfloat16) for _ in range(3))
    others = {"sinks": torch.zeros(4), "out": torch.zeros(2, 4, 8), "lse": torch.zeros(2, 4)}
    given: dict[str, Any] = {"q": q, "k": k, "v": v, "d_out": torch.zeros(2, 4, 8), "d_lse": None, **others, **changes}
    operands = Operands(**{name: given[name] for name in ("q", "k", "v", "sinks")})
    return operands, Saved(out=given["out"], lse=given["lse"]), given["d_out"], given["d_lse"]


Backward = Callable[[Operands, Saved, Tensor | None, Tensor | None], Gradients]
MADE = (torch.zeros(7),)


def shortest_of(ready: Ready, call: Any, launched_with: Any = None, taken: list[Any] | None = None) -> Backward | None:
    """The shortest way for calls like one; what goes another way is added to a list, or wrong."""
    given = given_to_backward(*call)

    def otherwise(*call: Any) -> Gradients:
        assert taken is not None, "not this way"
        taken.append(call)
        return Gradients()

    return shortest_backward(
        cast(Any, ready),
        given,
        (*(launched_with or given), *MADE),
        lambda: MADE,
        lambda given, made: Gradients(q=given[0], k=made[0]),
        otherwise,
    )


def test_the_shortest_backward_launches_with_what_it_is_given(ready: Ready) -> None:
    second = backward_call()
    run = shortest_of(ready, backward_call())
    assert run is not None
    found = run(*second)
    assert found.q is second[0].q and found.k is MADE[0]
    (launched,) = ready.launched
    assert [id(each) for each in launched] == [id(each) for each in (*given_to_backward(*second), *MADE)]


@pytest.mark.parametrize(
    "changes",
    [
        {"d_out": torch.zeros(()).expand(2, 4, 8)},
        {"d_out": None},
        {"d_lse": torch.zeros(2, 4)},
        {"k": torch.zeros(65, dtype=torch.bfloat16)[1:].view(2, 4, 8)},
        {"out": torch.zeros(2, 8, 4).mT},
        {"sinks": torch.zeros(5)[1:]},
    ],
    ids=["strides", "no d_out", "a d_lse", "address", "strides of what was saved", "address of an option"],
)
def test_another_backward_goes_another_way(changes: dict[str, Any], ready: Ready) -> None:
    taken: list[Any] = []
    run = shortest_of(ready, backward_call(), taken=taken)
    changed = backward_call(**changes)
    assert run is not None
    run(*changed)
    assert taken == [changed] and not ready.launched


@pytest.mark.parametrize("change", ["hooks", "device"])
def test_a_backward_somebody_looks_at_goes_another_way(
    change: str, ready: Ready, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Any] = []
    call = backward_call()
    run = shortest_of(ready, call, taken=taken)
    ready.is_being_watched = change == "hooks"
    if change == "device":
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert run is not None
    run(*call)
    assert taken == [call] and not ready.launched


@pytest.mark.parametrize("why", ["no launch", "a copy", "packed"])
def test_backwards_that_have_no_shortest_way(why: str, ready: Ready) -> None:
    operands, saved, d_out, d_lse = backward_call()
    if why == "packed":
        operands = replace(operands, cu_seqlens_q=torch.zeros(3), cu_seqlens_kv=torch.zeros(3))
    call = operands, saved, d_out, d_lse
    copied = (operands.q.clone(), *given_to_backward(*call)[1:]) if why == "a copy" else None
    assert shortest_of(cast(Any, None) if why == "no launch" else ready, call, copied) is None


def test_all_launches_have_to_be_known(ready: Ready) -> None:
    one = cast(Any, ready)
    assert relaunches([one]) is one and relaunches([one, None]) is None
    both = relaunches([one, one])
    assert both is not None
    both(("tensors",))
    assert ready.launched == [("tensors",)] * 2
