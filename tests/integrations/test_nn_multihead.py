"""MultiheadAttention: every option and kind of padding against the formula, one sequence at a time; wrong arguments."""

from __future__ import annotations

import copy
import pickle
from functools import partial
from typing import Any

import pytest
import torch
from nn_cases import (
    BATCH,
    D_MODEL,
    DEVICES,
    MASKS,
    N_HEAD,
    OPTIONS,
    SEQLEN,
    assert_same,
    inputs_of,
    mask_of,
    multihead_of,
    one_by_one,
    with_gradients,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flashtile import InvalidArgument, UnsupportedProblem
from flashtile.nn import KVCache, MultiheadAttention, Packing, Rotary

CROSS = [options for options in OPTIONS if "rotary" not in options]
# Rotary angles are float32; everything else is float64 here.
TOLERANCE = {True: 2e-6, False: 1e-10}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("padding", MASKS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_padded_batch_gives_what_its_sequences_give_alone(options: dict[str, Any], padding: str, device: str) -> None:
    """Padding is NaN: neither results nor gradients may see it, and its own gradient is 0."""
    module, mask = multihead_of(options, device=device), mask_of(MASKS[padding], device)
    x = inputs_of(mask)
    expected = with_gradients(module, lambda: one_by_one(module, mask, x), x)
    for pad_mask in (mask, Packing.of(mask), Packing.without_reading(mask)):
        found = with_gradients(module, lambda pad_mask=pad_mask: module(x, pad_mask=pad_mask), x)
        assert_same(found, expected, TOLERANCE["rotary" in options])
        assert not found["out"][~mask].any() and not found["input 0"][~mask].any()
    if padding == "none":
        assert_same(with_gradients(module, lambda: module(x), x), expected, TOLERANCE["rotary" in options])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("padding", "padding_kv"), [("left", "right"), ("right", None), (None, "holes"), (None, None)])
@pytest.mark.parametrize("options", CROSS, ids=str)
def test_cross_attention(options: dict[str, Any], padding: str | None, padding_kv: str | None, device: str) -> None:
    module = multihead_of({**options, "d_key": 12, "d_value": 20}, device=device)
    mask = mask_of(MASKS[padding or "none"], device)
    mask_kv = mask_of(MASKS[padding_kv or "none"], device)[:, :7]
    x, key, value = inputs_of(mask), inputs_of(mask_kv, 12, seed=1), inputs_of(mask_kv, 20, seed=2)
    masks = {"pad_mask": mask if padding else None, "pad_mask_kv": mask_kv if padding_kv else None}
    found = with_gradients(module, lambda: module(x, key, value, **masks), x, key, value)
    expected = with_gradients(module, lambda: one_by_one(module, mask, x, mask_kv, key, value), x, key, value)
    assert_same(found, expected, 1e-10)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("padding", "padding_kv"), [("left", "right"), ("right", None), (None, "holes"), (None, None)])
@pytest.mark.parametrize("options", CROSS, ids=str)
def test_a_memory_gives_what_its_source_gives(
    options: dict[str, Any], padding: str | None, padding_kv: str | None, device: str
) -> None:
    """Gradients too, those of two calls with one memory being the sum of theirs."""
    module = multihead_of({**options, "d_key": 12, "d_value": 20}, device=device)
    mask = mask_of(MASKS[padding or "none"], device)
    mask_kv = mask_of(MASKS[padding_kv or "none"], device)[:, :7]
    x, key, value = inputs_of(mask), inputs_of(mask_kv, 12, seed=1), inputs_of(mask_kv, 20, seed=2)
    pad_mask, pad_mask_kv = mask if padding else None, mask_kv if padding_kv else None

    def remembered() -> Tensor:
        memory = module.new_memory(key, value, pad_mask_kv=pad_mask_kv)
        return module(x, memory, pad_mask=pad_mask) + module(2 * x, memory, pad_mask=pad_mask)

    def projected_twice() -> Tensor:
        masks = {"pad_mask": pad_mask, "pad_mask_kv": pad_mask_kv}
        return module(x, key, value, **masks) + module(2 * x, key, value, **masks)

    found = with_gradients(module, remembered, x, key, value)
    assert_same(found, with_gradients(module, projected_twice, x, key, value), 1e-10)


def test_a_memory_is_projected_once_and_without_its_padding() -> None:
    module = multihead_of({})
    rows: list[int] = []
    module.k_proj.register_forward_hook(lambda _module, _inputs, out: rows.append(out.shape[:-1].numel()))
    mask = mask_of(MASKS["right"])
    memory = module.new_memory(inputs_of(mask), pad_mask_kv=mask)
    for _ in range(3):
        module(torch.randn(len(mask), 1, D_MODEL).double(), memory)
    assert rows == [int(mask.sum())] and memory.batch == len(mask)


def test_a_key_alone_is_the_value_too() -> None:
    module, x, memory = multihead_of({}), torch.randn(2, 3, D_MODEL).double(), torch.randn(2, 5, D_MODEL).double()
    torch.testing.assert_close(module(x, memory), module(x, memory, memory))


@pytest.mark.parametrize("options", [{}, {"rotary": Rotary(), "causal": True}], ids=str)
def test_the_query_as_key_is_self_attention(options: dict[str, Any]) -> None:
    module, mask = multihead_of(options), mask_of(MASKS["left"])
    x = inputs_of(mask)
    expected = module(x, pad_mask=mask)
    assert torch.equal(module(x, x, pad_mask=mask), expected)
    assert torch.equal(module(x, x, x, pad_mask=mask), expected)


@pytest.mark.parametrize("padding", [None, "left", "holes"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_values_of_their_own(options: dict[str, Any], padding: str | None) -> None:
    """Positions added to queries and keys alone, as detectors do: the one mask serves all three."""
    module, mask = multihead_of({**options, "d_value": 12}), mask_of(MASKS[padding or "none"])
    x, value = inputs_of(mask), inputs_of(mask, 12, seed=1)
    pad_mask = mask if padding else None
    expected = with_gradients(module, lambda: one_by_one(module, mask, x, mask, x, value), x, value)
    for key in (x, None):
        found = with_gradients(module, lambda key=key: module(x, key, value, pad_mask=pad_mask), x, value)
        assert_same(found, expected, TOLERANCE["rotary" in options])


@pytest.mark.parametrize("batch", [0, 1])
@pytest.mark.parametrize("seqlen", [0, 3])
def test_batches_of_nothing(batch: int, seqlen: int) -> None:
    module, x = multihead_of({"rotary": Rotary()}), torch.randn(batch, seqlen, D_MODEL, dtype=torch.float64)
    mask = torch.ones(batch, seqlen, dtype=torch.bool)
    assert module(x, pad_mask=mask).shape == module(x).shape == x.shape


# --- dropout, dtypes, copies ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pad_mask", [None, mask_of(MASKS["holes"])], ids=["dense", "padded"])
def test_dropout_acts_while_training_only(pad_mask: Tensor | None) -> None:
    plain, module = multihead_of({}), multihead_of({"dropout_p": 0.5})
    x = torch.randn(BATCH, SEQLEN, D_MODEL, dtype=torch.float64)
    expected = plain(x, pad_mask=pad_mask)
    assert torch.equal(module.eval()(x, pad_mask=pad_mask), expected)
    module.train()
    torch.manual_seed(4)
    dropped = module(x, pad_mask=pad_mask)
    assert not torch.allclose(dropped, expected)
    torch.manual_seed(4)
    assert torch.equal(module(x, pad_mask=pad_mask), dropped)


def test_activation_checkpointing_drops_what_the_forward_dropped() -> None:
    module, x, mask = multihead_of({"dropout_p": 0.3}), inputs_of(mask_of(MASKS["left"])), mask_of(MASKS["left"])
    gradients = []
    for run in (module, partial(checkpoint, module, use_reentrant=False)):
        torch.manual_seed(4)
        gradients.append(torch.autograd.grad(run(x, pad_mask=mask).square().sum(), x))
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("padding", ["none", "left"])
def test_dtypes(padding: str, dtype: torch.dtype, device: str) -> None:
    """Rounded parameters and inputs; the result is close to what float64 makes of them."""
    module, mask = (
        multihead_of({"causal": True, "rotary": Rotary()}, device=device, dtype=dtype),
        mask_of(MASKS[padding], device),
    )
    x = inputs_of(mask, dtype=dtype)
    exact = copy.deepcopy(module).double()
    found = with_gradients(module, lambda: module(x, pad_mask=mask), x)
    expected = with_gradients(exact, lambda: one_by_one(exact, mask, x.double()))
    assert {tensor.dtype for tensor in found.values()} == {dtype}
    tolerance = 20 * torch.finfo(dtype).eps
    assert_same({name: tensor.double() for name, tensor in found.items()}, expected, tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("pad", [False, True])
def test_autocast(pad: bool, device: str) -> None:
    module = multihead_of({"rotary": Rotary()}, device=device, dtype=torch.float32)
    mask = mask_of(MASKS["right" if pad else "none"], device)
    x = inputs_of(mask, dtype=torch.float32)
    pad_mask = mask if pad else None
    with torch.autocast(device, torch.bfloat16):
        found = with_gradients(module, lambda: module(x, pad_mask=pad_mask), x)
    assert found["out"].dtype == torch.bfloat16
    assert found["q_proj.weight"].dtype == found["input 0"].dtype == torch.float32
    expected = with_gradients(module, lambda: module(x, pad_mask=pad_mask), x)
    assert_same({name: tensor.float() for name, tensor in found.items()}, expected, 0.1)


def test_factory_arguments() -> None:
    module = MultiheadAttention(8, 2, device="meta", dtype=torch.bfloat16)
    assert {(p.device.type, p.dtype) for p in module.parameters()} == {("meta", torch.bfloat16)}
    assert module(torch.empty(2, 5, 8, device="meta", dtype=torch.bfloat16)).shape == (2, 5, 8)


def test_copies_and_pickles() -> None:
    module = multihead_of({"rotary": Rotary(dim=4), "causal": True, "window": (2, 0)})
    x = torch.randn(1, 6, D_MODEL, dtype=torch.float64)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), module(x))
        assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in module.parameters()}


def test_parameters() -> None:
    def shapes(**options: Any) -> dict[str, tuple[int, ...]]:
        return {name: tuple(p.shape) for name, p in MultiheadAttention(32, 4, **options).state_dict().items()}

    weights = {"q_proj.weight": (32, 32), "k_proj.weight": (32, 32), "v_proj.weight": (32, 32)}
    biases = {"q_proj.bias": (32,), "k_proj.bias": (32,), "v_proj.bias": (32,)}
    assert shapes() == {**weights, **biases, "out_proj.weight": (32, 32), "out_proj.bias": (32,)}
    assert shapes(qkv_bias=False, out_bias=False, rotary=Rotary()) == {**weights, "out_proj.weight": (32, 32)}
    assert shapes(n_head_kv=1, head_dim=6, d_key=5, qkv_bias=False, out_bias=False) == {
        "q_proj.weight": (24, 32),
        "k_proj.weight": (6, 5),
        "v_proj.weight": (6, 5),
        "out_proj.weight": (32, 24),
    }


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, ""),
        ({"n_head_kv": 4, "head_dim": 8}, ""),
        ({"n_head_kv": 2, "causal": True, "dropout_p": 0.1}, ", n_head_kv=2, causal=True, dropout_p=0.1"),
        ({"head_dim": 6, "window": (3, None), "scale": 1.0}, ", head_dim=6, window=(3, None), scale=1.0"),
    ],
)
def test_repr_shows_what_is_not_the_default(options: dict[str, Any], text: str) -> None:
    assert MultiheadAttention(D_MODEL, N_HEAD, **options).extra_repr() == "d_model=32, n_head=4" + text


# --- wrong arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"d_model": 30}, "^n_head: got 4 beside d_model = 30"),
        ({"d_model": 0}, "^d_model: got 0"),
        ({"n_head": 0}, "^n_head: got 0"),
        ({"n_head": 2.0}, "^n_head: got 2.0"),
        ({"n_head_kv": 3}, "^n_head_kv: got 3 beside n_head = 4"),
        ({"n_head_kv": 0}, "^n_head_kv: got 0"),
        ({"head_dim": 0}, "^head_dim: got 0"),
        ({"d_key": 0}, "^d_key: got 0"),
        ({"d_value": -1}, "^d_value: got -1"),
        ({"causal": 1}, "^causal: got 1"),
        ({"window": 4}, "^window: got 4"),
        ({"window": (-1, 0)}, "^window: got left = -1"),
        ({"scale": "1"}, "^scale: got '1'"),
        ({"softcap": -1.0}, "^softcap: got -1.0"),
        ({"dropout_p": 1.0}, "^dropout_p: got 1.0"),
        ({"qkv_bias": None}, "^qkv_bias: got None"),
        ({"out_bias": 1}, "^out_bias: got 1"),
        ({"rotary": 64}, "^rotary: got 64"),
        ({"rotary": Rotary(dim=10)}, "^rotary: got 10 turning coordinates in heads of 8"),
        ({"rotary": Rotary(), "head_dim": 7}, "^rotary: got 7 turning coordinates in heads of 7"),
    ],
)
def test_constructors_refuse(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        MultiheadAttention(**{"d_model": D_MODEL, "n_head": N_HEAD, **options})


@pytest.mark.parametrize(
    ("options", "words"),
    [({"dim": 3}, "^dim: got 3"), ({"base": 0}, "^base: got 0"), ({"interleaved": 1}, "^interleaved: got 1")],
)
def test_rotary_refuses(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        Rotary(**options)


X = torch.randn(2, 5, D_MODEL)
MASK = torch.ones(2, 5, dtype=torch.bool)
MEMORY = MultiheadAttention(D_MODEL, N_HEAD).new_memory(X)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"query": X[0]}, r"^query: got .*shape \[5, 32\].*wanted a tensor \[batch, seqlen, 32\]"),
        ({"query": X[..., :8]}, "^query: got"),
        ({"query": [1, 2]}, "^query: got"),
        ({"query": X.bfloat16()}, "^query: got torch.bfloat16 beside parameters of torch.float32"),
        ({"key": X[..., :8]}, "^key: got"),
        ({"key": X[:1]}, "^key: got batch 1 beside the query's 2"),
        ({"key": X.clone(), "value": X[:, :4]}, r"^value: got \[batch, seqlen\] = \[2, 4\]"),
        ({"pad_mask": MASK.float()}, r"^pad_mask: got a torch.float32 tensor.*True = a token.*additive_mask == 0"),
        ({"pad_mask": MASK.long()}, r"^pad_mask: got a torch.int64 tensor.*attention_mask == 1"),
        ({"pad_mask": MASK[:, :4]}, r"^pad_mask: got .*shape \[2, 4\]; wanted .*\[2, 5\]"),
        ({"pad_mask": [3, 5]}, "^pad_mask: got"),
        ({"pad_mask": MASK.to("meta")}, "^pad_mask: got a tensor on meta"),
        ({"pad_mask": Packing.full(2, 6)}, r"^pad_mask: got the packing of a batch \[2, 6\]"),
        ({"pad_mask_kv": MASK}, "^pad_mask_kv: got .*pass it as pad_mask"),
        ({"key": X.clone(), "pad_mask_kv": MASK.int()}, "^pad_mask_kv: got a torch.int32 tensor"),
        ({"key": MEMORY, "value": X}, "^value: got .*wanted None beside a Memory.*new_memory"),
        ({"key": MEMORY, "pad_mask_kv": MASK}, "^pad_mask_kv: got .*wanted None beside a Memory"),
        (
            {"key": MultiheadAttention(D_MODEL, 2).new_memory(X)},
            r"^key: got a Memory of .* = \[2, 16\].*layer, \[4, 8\]",
        ),
        ({"key": MEMORY, "query": X[:1]}, "^key: got batch 2 beside the query's 1"),
        ({"cache": 3}, "^cache: got 3"),
        ({"cache": KVCache(3, 8, heads_kv=4, head_dim=8)}, "^cache: got KVCache.3, 8.*wanted a KVCache of 2 sequences"),
        ({"cache": KVCache(2, 8, heads_kv=4, head_dim=8)}, "^cache: got a call that records gradients"),
    ],
)
def test_calls_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        MultiheadAttention(D_MODEL, N_HEAD)(**{"query": X, **arguments})


@pytest.mark.parametrize(
    ("options", "arguments", "words"),
    [
        ({"rotary": Rotary()}, {"key": X.clone()}, "rotary turns positions of one sequence"),
        ({"rotary": Rotary()}, {"key": MEMORY}, "rotary turns positions of one sequence"),
        ({}, {"key": X.clone(), "cache": KVCache(2, 8, heads_kv=4, head_dim=8)}, "cache holds keys of the query's own"),
    ],
)
def test_what_does_not_go_together(options: dict[str, Any], arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(UnsupportedProblem, match=words), torch.no_grad():
        MultiheadAttention(D_MODEL, N_HEAD, **options)(X, **arguments)
