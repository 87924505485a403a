"""FlashAttention against NaiveAttention, which has the same parameters; the public names of ``flashtile.nn``."""

from __future__ import annotations

import inspect
import subprocess
import sys
import types
from typing import Any

import pytest
import torch
from nn_cases import BATCH, D_MODEL, DEVICES, MASKS, N_HEAD, SEQLEN, assert_same, inputs_of, mask_of, with_gradients
from torch import nn

import flashtile.nn
from flashtile import InvalidArgument
from flashtile.nn import FlashAttention, MultiheadAttention, NaiveAttention, Packing
from flashtile.testing import assert_within_budget

OPTIONS: list[dict[str, Any]] = [
    {},
    {"causal": True, "bias": False},
    {"n_head_kv": 2, "window": (2, 1)},
    {"n_head_kv": 1, "causal": True, "window": (3, None)},
]
PUBLIC = [
    "FlashAttention",
    "KVCache",
    "Memory",
    "MultiheadAttention",
    "NaiveAttention",
    "Packing",
    "Rotary",
    "alibi_slopes",
    "apply_rotary",
    "rotary_cos_sin",
    "xpos_decay",
]


def pair_of(device: str, dtype: torch.dtype, **options: Any) -> tuple[FlashAttention, NaiveAttention]:
    torch.manual_seed(5)
    flash = FlashAttention(D_MODEL, N_HEAD, device=device, dtype=dtype, **options)
    naive = NaiveAttention(D_MODEL, N_HEAD, device=device, dtype=dtype, **options)
    naive.load_state_dict(flash.state_dict())
    return flash, naive


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("padding", [None, *MASKS])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_both_give_the_same(options: dict[str, Any], padding: str | None, device: str) -> None:
    """Padding is NaN: neither may see it, and its gradient is 0."""
    flash, naive = pair_of(device, torch.float64, **options)
    mask = mask_of(MASKS[padding or "none"], device)
    x = inputs_of(mask)
    expected = with_gradients(naive, lambda: naive(x, mask), x)
    assert not expected["out"][~mask].any() and not expected["input 0"][~mask].any()
    for pad_mask in (mask, Packing.of(mask)) if padding else (None,):
        assert_same(with_gradients(flash, lambda pad_mask=pad_mask: flash(x, pad_mask), x), expected, 1e-10)
        assert torch.equal(naive(x, pad_mask), expected["out"])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_it_is_as_exact_as_the_formula(dtype: torch.dtype, device: str) -> None:
    flash, naive = pair_of(device, dtype, causal=True)
    mask = mask_of(MASKS["right"], device)
    x = inputs_of(mask, dtype=dtype)
    exact = NaiveAttention(D_MODEL, N_HEAD, causal=True, device=device, dtype=torch.float64)
    exact.load_state_dict(flash.state_dict())
    results = [
        with_gradients(module, lambda module=module: module(x.to(module.q_proj.weight.dtype), mask), x)
        for module in (flash, naive, exact)
    ]
    for name, actual in results[0].items():
        # What is added to all keys alike moves no probability: its gradient is exactly 0, and rounded like the next.
        scale = results[2]["v_proj.bias" if name == "k_proj.bias" else name].abs().max().item()
        floor = 2 * torch.finfo(dtype).eps * scale  # the projections round as well, in an order of their own
        assert_within_budget(actual, exact=results[2][name], naive=results[1][name], floor=floor, name=name)


@pytest.mark.parametrize("made", [FlashAttention, NaiveAttention])
def test_dropout_acts_while_training_only(made: type[nn.Module]) -> None:
    plain, module = made(D_MODEL, N_HEAD), made(D_MODEL, N_HEAD, dropout_p=0.5)
    module.load_state_dict(plain.state_dict())
    x, mask = torch.randn(BATCH, SEQLEN, D_MODEL), mask_of(MASKS["right"])
    assert torch.equal(module.eval()(x, mask), plain(x, mask))
    assert not torch.allclose(module.train()(x, mask), plain(x, mask))


def test_dropout_keeps_the_mean() -> None:
    """Of many draws, both keep on average what they keep without dropout."""
    flash, naive = pair_of("cpu", torch.float64, dropout_p=0.5)
    x = torch.randn(1, 6, D_MODEL, dtype=torch.float64)
    expected = flash.eval()(x)
    for module in (flash, naive):
        mean = module.train()(x.expand(800, -1, -1)).mean(0)
        assert (mean - expected).abs().max() < 0.15 * expected.abs().max()


def test_every_module_loads_every_other() -> None:
    modules = [made(D_MODEL, N_HEAD, n_head_kv=2) for made in (FlashAttention, NaiveAttention, MultiheadAttention)]
    x = torch.randn(2, 5, D_MODEL)
    for source in modules:
        for target in modules:
            target.load_state_dict(source.state_dict())
            torch.testing.assert_close(target(x), source(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("made", [FlashAttention, NaiveAttention])
@pytest.mark.parametrize(
    ("options", "arguments", "words"),
    [
        ({"n_head": 5}, {}, "^n_head: got 5 beside d_model = 32"),
        ({"n_head_kv": 3}, {}, "^n_head_kv: got 3"),
        ({"window": 3}, {}, "^window: got 3"),
        ({"dropout_p": 2}, {}, "^dropout_p: got 2"),
        ({"bias": 1}, {}, "^bias: got 1"),
        ({}, {"x": torch.randn(5, D_MODEL)}, "^x: got"),
        ({}, {"x": torch.randn(2, 5, D_MODEL).double()}, "^x: got torch.float64 beside parameters of torch.float32"),
        ({}, {"pad_mask": torch.zeros(2, 5)}, "^pad_mask: got a torch.float32 tensor.*True = a token"),
        ({}, {"pad_mask": torch.ones(5, dtype=torch.bool)}, "^pad_mask: got"),
    ],
)
def test_wrong_arguments(made: Any, options: dict[str, Any], arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        made(**{"d_model": D_MODEL, "n_head": N_HEAD, **options})(**{"x": torch.randn(2, 5, D_MODEL), **arguments})


def test_all_is_exact() -> None:
    visible = {name for name, value in vars(flashtile.nn).items() if not isinstance(value, types.ModuleType)}
    assert sorted(flashtile.nn.__all__) == flashtile.nn.__all__ == PUBLIC
    assert {name for name in visible if not name.startswith("_")} == set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_documented_with_an_example(name: str) -> None:
    text = inspect.getdoc(getattr(flashtile.nn, name))
    assert text and text.splitlines()[0].endswith(".") and ">>> " in text


def test_importing_flashtile_does_not_import_its_modules() -> None:
    code = "import sys, flashtile; print([name for name in sys.modules if name.startswith('flashtile.nn')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
