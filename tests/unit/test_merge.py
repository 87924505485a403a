"""What merge_attention refuses; its numbers are tested with the numerics."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flashtile

ROWS, HEADS = 6, 4


def parts(**changes: Any) -> dict[str, Any]:
    """Arguments of a good call, with some of them replaced."""
    good: dict[str, Any] = {
        "out_a": torch.randn(2, ROWS, HEADS, 5),
        "lse_a": torch.randn(2, HEADS, ROWS),
        "out_b": torch.randn(2, ROWS, HEADS, 5),
        "lse_b": torch.randn(2, HEADS, ROWS),
    }
    return good | changes


def of_both(change: Callable[[Tensor], Any], *names: str) -> dict[str, Any]:
    good = parts()
    return parts(**{name: change(good[name]) for name in names})


WRONG: dict[str, tuple[Callable[[], dict[str, Any]], str]] = {
    "out of integers": (lambda: of_both(Tensor.int, "out_a"), "out_a"),
    "complex out": (lambda: parts(out_a=torch.zeros(2, ROWS, HEADS, 5, dtype=torch.complex64)), "out_a"),
    "boolean lse": (lambda: of_both(Tensor.bool, "lse_b"), "lse_b"),
    "out is None": (lambda: parts(out_b=None), "out_b"),
    "lse is None": (lambda: parts(lse_a=None), "lse_a"),
    "out is a list": (lambda: parts(out_a=[[1.0]]), "out_a"),
    "lse is a number": (lambda: parts(lse_b=0.0), "lse_b"),
    "whole results in place of (out, lse)": (lambda: parts(out_a=(1, 2)), "out_a"),
    "out and lse swapped": (
        lambda: parts(out_a=torch.zeros(2, HEADS, ROWS), lse_a=torch.zeros(2, ROWS, HEADS, 5)),
        "lse_a",
    ),
    "lse [batch, seqlen_q, heads_q]": (lambda: parts(lse_a=torch.zeros(2, ROWS, HEADS)), "lse_a"),
    "lse with a trailing axis": (lambda: parts(lse_b=torch.zeros(2, HEADS, ROWS, 1)), "lse_b"),
    "lse padded to a tile": (lambda: parts(lse_a=torch.zeros(2, HEADS, 128)), "lse_a"),
    "lse of another batch": (lambda: parts(lse_b=torch.zeros(1, HEADS, ROWS)), "lse_b"),
    "lse of fewer heads": (lambda: parts(lse_b=torch.zeros(2, 1, ROWS)), "lse_b"),
    "packed lse beside dense out": (lambda: parts(lse_a=torch.zeros(HEADS, 2 * ROWS)), "lse_a"),
    "two axes": (lambda: parts(out_a=torch.zeros(ROWS, 5), lse_a=torch.zeros(ROWS)), "lse_a"),
    "five axes": (
        lambda: parts(out_a=torch.zeros(1, 2, ROWS, HEADS, 5), lse_a=torch.zeros(1, 2, HEADS, ROWS)),
        "lse_a",
    ),
    "parts of different queries": (
        lambda: parts(out_b=torch.zeros(2, 3, HEADS, 5), lse_b=torch.zeros(2, HEADS, 3)),
        "out_b",
    ),
    "a part that would broadcast": (
        lambda: parts(out_b=torch.zeros(1, ROWS, HEADS, 5), lse_b=torch.zeros(1, HEADS, ROWS)),
        "out_b",
    ),
    "parts of different head_dim_v": (lambda: parts(out_b=torch.zeros(2, ROWS, HEADS, 1)), "out_b"),
    "dense beside packed": (
        lambda: parts(out_b=torch.zeros(2 * ROWS, HEADS, 5), lse_b=torch.zeros(HEADS, 2 * ROWS)),
        "out_b",
    ),
    "outs of different dtypes": (lambda: of_both(Tensor.half, "out_b"), "out_b"),
    "lse of different dtypes": (lambda: of_both(Tensor.double, "lse_b"), "lse_b"),
    "lse in half precision": (lambda: of_both(Tensor.bfloat16, "lse_a", "lse_b"), "lse_a"),
    "float8": (lambda: of_both(lambda out: out.to(torch.float8_e4m3fn), "out_a", "out_b"), "out_a"),
    "parts on different devices": (lambda: of_both(lambda part: part.to("meta"), "out_b", "lse_b"), "out_b"),
    "lse on another device": (lambda: of_both(lambda part: part.to("meta"), "lse_a"), "lse_a"),
    "sparse out": (lambda: of_both(Tensor.to_sparse, "out_a"), "out_a"),
    "sparse lse": (lambda: of_both(Tensor.to_sparse, "lse_b"), "lse_b"),
    "nested out": (lambda: parts(out_a=torch.nested.nested_tensor([torch.zeros(ROWS, HEADS, 5)] * 2)), "out_a"),
}


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_parts_are_named(wrong: str) -> None:
    make, argument = WRONG[wrong]
    arguments = make()
    with pytest.raises(flashtile.InvalidArgument) as caught:
        flashtile.merge_attention(**arguments)
    error = caught.value
    assert isinstance(error, ValueError)
    assert error.argument == argument
    assert error.got and error.wanted and error.remedy
    assert all(text in str(error) for text in (argument, error.got, error.wanted, error.remedy))


@pytest.mark.parametrize("missing", ["out_a", "lse_a", "out_b", "lse_b"])
def test_all_four_arguments_are_required(missing: str) -> None:
    arguments = parts()
    del arguments[missing]
    with pytest.raises(TypeError, match=missing):
        flashtile.merge_attention(**arguments)


@pytest.mark.parametrize("out_dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_dtypes_that_attention_returns_come_back(out_dtype: torch.dtype) -> None:
    arguments = parts()
    for name in ("out_a", "out_b"):
        arguments[name] = arguments[name].to(out_dtype)
    out, lse = flashtile.merge_attention(**arguments)
    assert (out.dtype, lse.dtype) == (out_dtype, torch.float32)
    assert (out.shape, lse.shape) == (arguments["out_a"].shape, arguments["lse_a"].shape)


@pytest.mark.parametrize("shape", [(0, ROWS, HEADS, 5), (2, 0, HEADS, 5), (0, HEADS, 5)])
def test_empty_parts_merge(shape: tuple[int, ...]) -> None:
    *rows, heads, _ = shape
    out, lse = torch.zeros(shape), torch.zeros(*rows[:-1], heads, rows[-1])
    merged_out, merged_lse = flashtile.merge_attention(out, lse, out, lse)
    assert (merged_out.shape, merged_lse.shape) == (out.shape, lse.shape)


def test_the_arguments_are_left_as_they_were() -> None:
    arguments = parts()
    before = {name: part.clone() for name, part in arguments.items()}
    flashtile.merge_attention(**arguments)
    assert all(torch.equal(arguments[name], part) for name, part in before.items())
