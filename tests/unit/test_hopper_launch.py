"""What the launcher of the Hopper kernels remembers of a call; no GPU is needed to say what it would launch."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import flashtile
from flashtile.backends.gpu import COMPILER_OPTIONS
from flashtile.backends.hopper import launch
from flashtile.backends.hopper.launcher import MOST_FORMS, Launcher
from flashtile.spec import validation

PARAMETERS = inspect.signature(flashtile.attention).parameters.values()
OPTIONS: dict[str, Any] = {
    each.name: each.default for each in PARAMETERS if each.kind is each.KEYWORD_ONLY and each.name != "backend"
} | {"causal": True}


def form(**options: Any) -> tuple[Any, ...]:
    q, k, v = (torch.zeros(2, 30, 1, 64, dtype=torch.bfloat16) for _ in range(3))
    problem, operands = validation.check_call(q, k, v, **(OPTIONS | options), wants_lse=False, is_packed=False)
    return launch._form(problem, None, (operands.q, operands.k, operands.v), operands)


def test_a_form_is_found_again() -> None:
    assert form() == form() and hash(form()) == hash(form())


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({}, {"alibi_slopes": torch.ones(1)}),
        ({"alibi_slopes": torch.ones(1)}, {"alibi_slopes": torch.ones(2, 1)}),
        ({"alibi_slopes": torch.ones(1)}, {"alibi_slopes": torch.ones(2)[1:]}),
        ({"sinks": torch.ones(1)}, {"sinks": torch.ones(1, dtype=torch.bfloat16)}),
        ({}, {"causal": False}),
    ],
    ids=["absent", "one for each sequence", "address", "dtype", "rule"],
)
def test_what_is_compiled_in_tells_forms_apart(one: dict[str, Any], other: dict[str, Any]) -> None:
    """One head makes a stride of 1, which Triton compiles in: slopes for each sequence then read beyond shared ones."""
    assert form(**one) != form(**other)


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


def test_the_second_call_of_a_form_goes_straight_to_the_compiled_kernel() -> None:
    kernel = Kernel()
    launcher = Launcher(kernel)
    for number in (1, 2, 3):
        launcher("form", (5,), (number,), BLOCK=64)
    assert kernel.found == [((5,), (1,), {"BLOCK": 64, "num_warps": 4, **COMPILER_OPTIONS})]
    assert kernel.launched == [((5, 1, 1), (2, 64)), ((5, 1, 1), (3, 64))]


def test_forms_are_not_kept_without_end() -> None:
    kernel = Kernel()
    launcher = Launcher(kernel)
    for number in range(MOST_FORMS + 1):
        launcher(number, (1,), (), BLOCK=64)
    assert len(launcher._compiled) == 1
