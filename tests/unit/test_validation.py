"""Wrong calls, each of which must raise InvalidArgument that names the argument, what it got, what is wanted, a remedy.

The table is in ``wrong_calls.py``. Nothing may crash, pass silently, raise anything else, or touch its inputs.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from wrong_calls import WRONG_CALLS, Call, WrongCall, dense, packed

import flashtile
from flashtile import FlashtileError, InvalidArgument

LONGEST_TEXT = 600
"""Characters; an error that prints a whole array hides what it says."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning"),
    pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning"),
]


def fingerprint(value: Any) -> Any:
    """What must be the same after the call; tensors without readable values are watched by their version."""
    if isinstance(value, Tensor):
        known = (value._version, value.dtype, value.layout, value.requires_grad)
        if value.layout != torch.strided or value.is_nested or value.is_quantized or value.device.type != "cpu":
            return known
        raw = value.detach().contiguous().flatten().view(torch.uint8)
        return *known, value.shape, value.stride(), raw.tolist()
    if isinstance(value, np.ndarray):
        return value.tolist()
    return copy.deepcopy(value) if isinstance(value, (list, set)) else id(value)


def check_refusal(wrong: WrongCall, call: Call) -> None:
    before = {name: fingerprint(value) for name, value in call.arguments.items()}
    with pytest.raises(InvalidArgument) as caught:
        call.run()
    error = caught.value
    text = str(error)
    assert isinstance(error, ValueError) and isinstance(error, FlashtileError)
    assert error.argument == wrong.argument
    assert error.got and error.wanted and error.remedy
    assert text == f"{error.argument}: got {error.got}; wanted {error.wanted}. Remedy: {error.remedy}"
    assert wrong.in_remedy in error.remedy
    assert len(text) <= LONGEST_TEXT
    assert {name: fingerprint(value) for name, value in call.arguments.items()} == before


@pytest.mark.parametrize("wrong", WRONG_CALLS, ids=lambda wrong: wrong.id)
def test_a_wrong_call_is_refused_with_a_remedy(wrong: WrongCall) -> None:
    check_refusal(wrong, wrong.make())


@pytest.mark.parametrize("wrong", WRONG_CALLS[::5], ids=lambda wrong: wrong.id)
def test_the_function_with_the_lse_refuses_the_same(wrong: WrongCall) -> None:
    check_refusal(wrong, wrong.make().with_lse())


@pytest.mark.parametrize("wrong", WRONG_CALLS[::7], ids=lambda wrong: wrong.id)
def test_a_wrong_call_is_refused_when_gradients_are_wanted_too(wrong: WrongCall) -> None:
    call = wrong.make()
    for name in ("q", "k", "v"):
        tensor = call.arguments[name]
        if isinstance(tensor, Tensor) and tensor.is_leaf and tensor.is_floating_point():
            tensor.requires_grad_()
    check_refusal(wrong, call)


def test_the_table_is_long_and_its_names_are_unique() -> None:
    assert len(WRONG_CALLS) >= 60
    assert len({wrong.id for wrong in WRONG_CALLS}) == len(WRONG_CALLS)


@pytest.mark.parametrize("base", [dense, packed])
def test_the_calls_that_the_table_starts_from_are_right(base: Any) -> None:
    call = base()
    out = call.run()
    assert out.shape[:-1] == call.arguments["q"].shape[:-1] and out.shape[-1] == call.arguments["v"].shape[-1]
    assert not bool(out.isnan().any())


RIGHT_BUT_UNUSUAL: dict[str, Any] = {
    "window as a list": lambda: dense(window=[2, 0]),
    "window wider than any sequence": lambda: dense(window=(2**62, 2**62)),
    "window with neither side": lambda: dense(window=(None, None)),
    "negative scale": lambda: dense(scale=-1.0),
    "zero scale": lambda: dense(scale=0),
    "scale as a numpy float64": lambda: dense(scale=np.float64(0.5)),
    "softcap as an int": lambda: dense(softcap=30),
    "dropout of an int zero": lambda: dense(dropout_p=0),
    "dropout of almost one": lambda: dense(dropout_p=1 - 2**-40, dropout_seed=0),
    "dropout of almost zero": lambda: dense(dropout_p=5e-324, dropout_seed=0),
    "seed at the lower end": lambda: dense(dropout_p=0.5, dropout_seed=-(2**63)),
    "seed at the upper end": lambda: dense(dropout_p=0.5, dropout_seed=2**63 - 1),
    "seed without dropout": lambda: dense(dropout_seed=3),
    "bias without axes": lambda: dense(bias=torch.zeros(())),
    "mask without axes": lambda: dense(mask=torch.tensor(True)),
    "bias in another dtype": lambda: dense(bias=torch.zeros(6, 7, dtype=torch.float64)),
    "sinks of minus infinity": lambda: dense(sinks=torch.full((4,), -math.inf)),
    "max_seqlen larger than the longest": lambda: packed(max_seqlen_q=1000, max_seqlen_kv=10**6),
    "non-contiguous cu_seqlens": lambda: packed(cu_seqlens_q=torch.tensor([0, 9, 4, 9, 10, 9], dtype=torch.int32)[::2]),
    "an expanded k": lambda: dense(k=torch.randn(1, 7, 1, 8).expand(2, 7, 2, 8)),
    "a parameter": lambda: dense(q=torch.nn.Parameter(torch.randn(2, 6, 4, 8))),
    "a lazily negated view": lambda: dense(
        q=torch.complex(torch.randn(2, 6, 4, 8), torch.ones(2, 6, 4, 8)).conj().imag
    ),
}


@pytest.mark.parametrize("unusual", RIGHT_BUT_UNUSUAL)
@pytest.mark.parametrize("backend", ["auto", "naive"])
def test_right_calls_are_not_refused(unusual: str, backend: str) -> None:
    call = RIGHT_BUT_UNUSUAL[unusual]()
    if backend == "naive" and unusual.startswith("max_seqlen"):
        call.arguments["max_seqlen_kv"] = 1000  # the naive formula pads to it
    call.arguments["backend"] = backend
    assert not bool(call.run().isnan().any())


@pytest.mark.parametrize("function", [flashtile.attention, flashtile.attention_with_lse])
def test_options_are_keyword_only(function: Any) -> None:
    q, k, v = torch.zeros(3, 1, 4, 1, 8).unbind()
    with pytest.raises(TypeError, match="positional"):
        function(q, k, v, True)


@pytest.mark.parametrize("name", ["is_causal", "attn_mask", "dropout", "window_size", "cu_seqlens_q"])
def test_unknown_options_are_type_errors(name: str) -> None:
    call = dense()
    call.arguments[name] = None
    with pytest.raises(TypeError, match=name):
        call.run()


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_kv", "max_seqlen_q", "max_seqlen_kv", "v"])
def test_missing_arguments_are_type_errors(name: str) -> None:
    call = packed()
    del call.arguments[name]
    with pytest.raises(TypeError, match=name):
        call.run()


def test_slopes_that_require_a_gradient_pass_where_no_gradient_is_taken() -> None:
    call = dense(alibi_slopes=torch.ones(4, requires_grad=True))
    with torch.no_grad():
        assert call.run().shape == (2, 6, 4, 5)


def test_tensors_without_values_are_not_read() -> None:
    """Tensors on "meta" have shapes alone, so boundaries cannot be checked and shapes must come back."""
    call = packed()
    call.arguments = {
        name: value.to("meta") if isinstance(value, Tensor) else value for name, value in call.arguments.items()
    }
    out = call.run()
    assert out.device.type == "meta" and out.shape == (10, 4, 5)


WRONG_TENSORS = ["q-three-axes", "k-other-dtype", "v-one-key-short", "k-head-count", "mask-float", "cu-decreasing"]
WRONG_OPTIONS = ["window-negative-left", "scale-nan", "dropout-one", "seed-float", "backend-unknown"]


def by_id(name: str) -> WrongCall:
    return next(wrong for wrong in WRONG_CALLS if wrong.id == name)


@pytest.mark.parametrize("name", [*WRONG_TENSORS, *WRONG_OPTIONS])
def test_a_wrong_call_in_compiled_code_is_refused_as_in_eager(name: str) -> None:
    torch._dynamo.reset()
    wrong = by_id(name)
    call = wrong.make()
    with pytest.raises(InvalidArgument) as caught:
        torch.compile(call.run, backend="eager")()
    assert caught.value.argument == wrong.argument
    assert wrong.in_remedy in str(caught.value)


@pytest.mark.parametrize(
    ("name", "dynamic"),
    [(name, dynamic) for name in WRONG_TENSORS for dynamic in (False, True)]
    + [(name, False) for name in WRONG_OPTIONS],
)
def test_with_fullgraph_the_compilers_error_still_contains_the_remedy(name: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    wrong = by_id(name)
    call = wrong.make()
    with pytest.raises(Exception, match=wrong.argument) as caught:
        torch.compile(call.run, backend="eager", fullgraph=True, dynamic=dynamic)()
    assert wrong.in_remedy in str(caught.value)
