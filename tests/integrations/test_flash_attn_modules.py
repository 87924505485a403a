"""flash_attn's modules: parameters, every option against the formula, padding, packing, and generation with a cache."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flash_attn_calls import DEVICES
from torch import Tensor

import flashtile.integrations.flash_attn as flash_attn
from flashtile import InvalidArgument, UnsupportedProblem
from flashtile.integrations.flash_attn.bert_padding import pad_input, unpad_input
from flashtile.integrations.flash_attn.layers.rotary import RotaryEmbedding
from flashtile.integrations.flash_attn.modules.mha import MHA, FlashCrossAttention, FlashSelfAttention
from flashtile.nn.alibi import alibi_slopes
from flashtile.testing import oracle

OPTIONS: list[dict[str, Any]] = [
    {},
    {"causal": True, "softmax_scale": 0.2},
    {"num_heads_kv": 2},
    {"num_heads_kv": 1, "causal": True, "rotary_emb_dim": 8, "rotary_emb_base": 50.0},
    {"rotary_emb_dim": 4, "rotary_emb_interleaved": True},
    {"rotary_emb_dim": 8, "rotary_emb_scale_base": 8.0, "causal": True},
    {"use_alibi": True, "causal": True},
    {"use_alibi": True, "num_heads_kv": 2},
    {"window_size": (2, 1)},
    {"qkv_proj_bias": False, "out_proj_bias": False},
    {"dwconv": True, "num_heads_kv": 2},
    {"checkpointing": True, "causal": True},
    {"use_flash_attn": True, "fused_bias_fc": True, "window_size": (3, 0)},
]
CACHEABLE = [options for options in OPTIONS if options.get("causal")]
EMBED, HEADS = 32, 4


def module_of(options: dict[str, Any], **more: Any) -> MHA:
    torch.manual_seed(1)
    return MHA(EMBED, HEADS, **options, **more).double()


def formula(module: MHA, options: dict[str, Any], x: Tensor, x_kv: Tensor | None = None, **masks: Any) -> Tensor:
    """The module written down: projections, convolution, rotation, the oracle, projection."""
    projected = {}
    for name, source in {"qkv": x, "q": x, "kv": x if x_kv is None else x_kv}.items():
        if hasattr(module, f"W{name}"):
            y = getattr(module, f"W{name}")(source)
            if options.get("dwconv"):
                conv, padded = getattr(module, f"dwconv_{name}"), torch.nn.functional.pad(y, (0, 0, 2, 0))
                windows = padded.unfold(1, 3, 1)  # a token and the two before it
                y = (windows * conv.weight[:, 0]).sum(-1) + conv.bias
            projected[name] = y.unflatten(-1, (-1, EMBED // HEADS))
    heads_kv = options.get("num_heads_kv", HEADS)
    if "qkv" in projected:
        q, k, v = projected["qkv"].split((HEADS, heads_kv, heads_kv), dim=2)
    else:
        q, (k, v) = projected["q"], projected["kv"].split((heads_kv, heads_kv), dim=2)
    if options.get("rotary_emb_dim"):
        rotary = RotaryEmbedding(
            options["rotary_emb_dim"],
            options.get("rotary_emb_base", 10000.0),
            options.get("rotary_emb_interleaved", False),
            options.get("rotary_emb_scale_base"),
        )
        q, k, _ = rotary(torch.cat((q, k, v), dim=2), num_heads_q=HEADS).split((HEADS, heads_kv, heads_kv), dim=2)
    left, right = options.get("window_size", (-1, -1))
    out, _ = oracle(
        q,
        k,
        v,
        causal=options.get("causal", False),
        scale=options.get("softmax_scale"),
        window=(None if left < 0 else left, None if right < 0 else right),
        alibi_slopes=alibi_slopes(HEADS).to(x.device) if options.get("use_alibi") else None,
        **masks,
    )
    return module.out_proj(out.flatten(2))


def assert_same_with_gradients(module: MHA, found: Tensor, expected: Tensor, *inputs: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    weights = torch.randn_like(found)
    leaves = (*inputs, *module.parameters())
    gradients = [torch.autograd.grad(out, leaves, weights, allow_unused=True) for out in (found, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_self_attention(options: dict[str, Any], device: str) -> None:
    module = module_of(options).to(device)
    x = torch.randn(2, 9, EMBED, dtype=torch.float64, device=device, requires_grad=True)
    assert_same_with_gradients(module, module(x), formula(module, options, x), x)


@pytest.mark.parametrize("options", [o for o in OPTIONS if "rotary_emb_dim" not in o], ids=str)
def test_cross_attention(options: dict[str, Any]) -> None:
    module = module_of(options, cross_attn=True)
    x, x_kv = (torch.randn(2, n, EMBED, dtype=torch.float64, requires_grad=True) for n in (5, 8))
    assert_same_with_gradients(module, module(x, x_kv), formula(module, options, x, x_kv), x, x_kv)
    torch.testing.assert_close(module(x), module(x, x))
    if not options.get("dwconv"):
        alone = module(x_kv, mixer_subset=slice(-1, None))
        torch.testing.assert_close(alone, module(x_kv[:, -1:], x_kv))


@pytest.mark.parametrize("options", [o for o in OPTIONS if "dwconv" not in o], ids=str)
def test_packed_and_masked_batches_are_the_sequences_alone(options: dict[str, Any]) -> None:
    module, lengths = module_of(options), (9, 2, 5)
    x = torch.randn(3, 9, EMBED, dtype=torch.float64)
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    tokens, indices, cu_seqlens, max_seqlen, _ = unpad_input(x, mask)
    packed = pad_input(module(tokens, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen), indices, 3, 9)
    for row, length in enumerate(lengths):
        torch.testing.assert_close(packed[row, :length], module(x[row : row + 1, :length])[0])
    masked = module(x, key_padding_mask=mask)
    torch.testing.assert_close(masked, formula(module, options, x, mask=mask[:, None, None]))


def test_packed_cross_attention() -> None:
    module = module_of({"causal": True, "num_heads_kv": 2}, cross_attn=True)
    x, x_kv = torch.randn(7, EMBED, dtype=torch.float64), torch.randn(9, EMBED, dtype=torch.float64)
    cu_q, cu_k = torch.tensor([0, 3, 7], dtype=torch.int32), torch.tensor([0, 5, 9], dtype=torch.int32)
    out = module(x, x_kv, cu_seqlens=cu_q, max_seqlen=4, cu_seqlens_k=cu_k, max_seqlen_k=5)
    for rows, rows_kv in ((slice(0, 3), slice(0, 5)), (slice(3, 7), slice(5, 9))):
        torch.testing.assert_close(out[rows], module(x[None, rows], x_kv[None, rows_kv])[0])
    torch.testing.assert_close(
        module(x, cu_seqlens=cu_q, max_seqlen=4),
        module(x, x, cu_seqlens=cu_q, max_seqlen=4, cu_seqlens_k=cu_q, max_seqlen_k=4),
    )


def test_names_of_parameters() -> None:
    def shapes(**options: Any) -> dict[str, tuple[int, ...]]:
        return {name: tuple(value.shape) for name, value in MHA(EMBED, HEADS, **options).state_dict().items()}

    out = {"out_proj.weight": (32, 32), "out_proj.bias": (32,)}
    assert shapes() == {"Wqkv.weight": (96, 32), "Wqkv.bias": (96,), **out}
    assert shapes(num_heads_kv=1, use_alibi=True, rotary_emb_dim=8) == {
        "Wqkv.weight": (48, 32),
        "Wqkv.bias": (48,),
        **out,
    }
    assert shapes(cross_attn=True, num_heads_kv=2, qkv_proj_bias=False) == {
        "Wq.weight": (32, 32),
        "Wkv.weight": (32, 32),
        **out,
    }
    names = shapes(cross_attn=True, dwconv=True)
    assert {"dwconv_q.weight", "dwconv_q.bias", "dwconv_kv.weight", "dwconv_kv.bias"} < names.keys()
    assert shapes(dwconv=True)["dwconv_qkv.weight"] == (96, 1, 3)
    children = {name for name, _ in MHA(EMBED, HEADS, rotary_emb_dim=8).named_children()}
    assert children == {"Wqkv", "rotary_emb", "inner_attn", "inner_cross_attn", "out_proj"}


def test_return_residual() -> None:
    module, x = module_of({"return_residual": True}), torch.randn(1, 4, EMBED, dtype=torch.float64)
    out, residual = module(x)
    assert residual is x and out.shape == x.shape


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_acts_while_training_only(checkpointing: bool) -> None:
    module = module_of({"dropout": 0.5, "checkpointing": checkpointing})
    x = torch.randn(1, 8, EMBED, dtype=torch.float64, requires_grad=True)
    plain = formula(module, {}, x)
    torch.testing.assert_close(module.eval()(x), plain)
    module.train()
    torch.manual_seed(4)
    out = module(x)
    assert not torch.allclose(out, plain)
    torch.manual_seed(4)
    torch.testing.assert_close(module(x), out)
    numeric = torch.autograd.gradcheck(lambda x: [torch.manual_seed(4), module(x)][1], x, fast_mode=True)
    assert numeric  # the recomputed attention drops what the forward dropped


@pytest.mark.parametrize("cast", ["bfloat16", "half"])
def test_slopes_keep_their_precision(cast: str) -> None:
    module = getattr(MHA(24, 12, use_alibi=True), cast)()
    assert module.out_proj.weight.dtype != torch.float32
    assert torch.equal(module.inner_attn.alibi_slopes, alibi_slopes(12))


# --- generation -------------------------------------------------------------------------------------------------------


def params_of(**more: Any) -> SimpleNamespace:
    """The attributes of flash_attn's InferenceParams."""
    return SimpleNamespace(
        max_seqlen=16,
        max_batch_size=3,
        seqlen_offset=0,
        batch_size_offset=0,
        key_value_memory_dict={},
        lengths_per_sample=None,
        **more,
    )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", CACHEABLE, ids=str)
def test_generation_gives_what_one_pass_gives(options: dict[str, Any], device: str) -> None:
    module = module_of(options, layer_idx=7).float().to(device)
    x = torch.randn(2, 11, EMBED, device=device)
    params, outs = params_of(), []
    for size in (4, 1, 3, 1, 1, 1):
        outs.append(module(x[:, params.seqlen_offset : params.seqlen_offset + size], inference_params=params))
        params.seqlen_offset += size
    torch.testing.assert_close(torch.cat(outs, dim=1), module(x), rtol=1e-4, atol=1e-5)
    assert params.key_value_memory_dict[7].shape == (3, 16, 2, options.get("num_heads_kv", HEADS), 8)


def test_prompts_of_different_lengths() -> None:
    """Prompts padded on the right are followed by tokens at their own positions, in the second half of the cache."""
    options = {"causal": True, "rotary_emb_dim": 8, "num_heads_kv": 2}
    module, lengths = module_of(options, layer_idx=0), torch.tensor([0, 5, 3], dtype=torch.int32)
    x = torch.randn(2, 6, EMBED, dtype=torch.float64)
    params = params_of()
    params.batch_size_offset, params.lengths_per_sample = 1, lengths
    params.key_value_memory_dict[0] = module.allocate_inference_cache(3, 16)
    module(x[:, :5], inference_params=params)
    params.seqlen_offset = 5
    step = module(x[:, 5:], inference_params=params)
    for row, length in enumerate((5, 3)):
        whole = torch.cat([x[row : row + 1, :length], x[row : row + 1, 5:]], dim=1)
        torch.testing.assert_close(step[row, 0], module(whole)[0, -1])


# --- what does not go together ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "arguments", "error", "words"),
    [
        ({}, {"x_kv": 1}, InvalidArgument, "x_kv: .*cross_attn=True"),
        ({}, {"mixer_subset": 1}, InvalidArgument, "mixer_subset: .*cross_attn=True"),
        ({}, {"cu_seqlens_k": 1}, InvalidArgument, "cu_seqlens_k: .*cross_attn=True"),
        ({}, {"key_padding_mask": 1, "cu_seqlens": 1}, UnsupportedProblem, "cu_seqlens together with key_padding_mask"),
        ({"dwconv": True}, {"cu_seqlens": 1}, UnsupportedProblem, "cu_seqlens together with dwconv"),
        ({"layer_idx": 0}, {"inference_params": 1, "key_padding_mask": 1}, UnsupportedProblem, "inference_params"),
        ({"layer_idx": 0, "cross_attn": True}, {"inference_params": 1}, UnsupportedProblem, "cross_attn"),
        ({"layer_idx": 0, "dwconv": True}, {"inference_params": 1}, UnsupportedProblem, "dwconv"),
        ({}, {"inference_params": 1}, InvalidArgument, "layer_idx: got None"),
        ({}, {"key_padding_mask": torch.ones(1, 4)}, InvalidArgument, "key_padding_mask: .*torch.bool"),
        ({}, {"key_padding_mask": torch.ones(2, 5) > 0}, InvalidArgument, "key_padding_mask: got shape"),
    ],
)
def test_arguments_that_do_not_go_together(
    options: dict[str, Any], arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    x = torch.randn(1, 4, EMBED)
    with pytest.raises(error, match=words):
        MHA(EMBED, HEADS, **options)(x, **arguments)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"embed_dim": 30}, InvalidArgument, "num_heads: got 4 beside embed_dim = 30"),
        ({"num_heads_kv": 3}, InvalidArgument, "num_heads_kv: got 3 beside num_heads = 4"),
        ({"num_heads_kv": 0}, InvalidArgument, "num_heads_kv: got 0"),
        ({"rotary_emb_dim": 8, "cross_attn": True}, UnsupportedProblem, "rotary_emb_dim"),
        ({"rotary_emb_dim": 3}, InvalidArgument, "dim: got 3"),
        ({"window_size": (None, 3)}, InvalidArgument, "window_size: got"),
        ({"bias": True}, TypeError, "bias"),
    ],
    ids=str,
)
def test_constructors_refuse(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        MHA(**{"embed_dim": EMBED, "num_heads": HEADS, **options})


# --- FlashSelfAttention, FlashCrossAttention --------------------------------------------------------------------------


@pytest.mark.parametrize("is_packed", [False, True])
def test_inner_modules_pass_on_every_option(is_packed: bool) -> None:
    options: dict[str, Any] = {"softmax_scale": 0.3, "window_size": (4, 2), "alibi_slopes": torch.rand(2)}
    cu_seqlens = torch.tensor([0, 4, 10], dtype=torch.int32)
    qkv = torch.randn(10, 3, 2, 8) if is_packed else torch.randn(2, 10, 3, 2, 8)
    q, kv = qkv.select(-3, 0), qkv.narrow(-3, 1, 2)
    packing = {"cu_seqlens": cu_seqlens, "max_seqlen": 6} if is_packed else {}
    packing_k = {"cu_seqlens_k": cu_seqlens, "max_seqlen_k": 6} if is_packed else {}
    for causal in (False, True):
        if is_packed:
            expected = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 6, causal=causal, **options)
        else:
            expected = flash_attn.flash_attn_qkvpacked_func(qkv, causal=causal, **options)
        for override in (None, not causal):
            own = causal if override is None else override
            self_attention = FlashSelfAttention(causal=own, **options)
            cross_attention = FlashCrossAttention(causal=own, **options)
            given = {} if override is None else {"causal": causal}
            torch.testing.assert_close(self_attention(qkv, **given, **packing), expected)
            torch.testing.assert_close(cross_attention(q, kv, **given, **packing, **packing_k), expected)


def test_packed_inner_modules_need_both_boundaries() -> None:
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(InvalidArgument, match=r"^max_seqlen: got None"):
        FlashSelfAttention()(torch.randn(4, 3, 2, 8), cu_seqlens=cu_seqlens)
    q, kv = torch.randn(4, 2, 8), torch.randn(4, 2, 2, 8)
    with pytest.raises(InvalidArgument, match=r"^cu_seqlens_k: got None"):
        FlashCrossAttention()(q, kv, cu_seqlens=cu_seqlens, max_seqlen=4)
    with pytest.raises(InvalidArgument, match=r"^cu_seqlens: got None"):
        FlashCrossAttention()(q, kv, cu_seqlens_k=cu_seqlens, max_seqlen_k=4)
    with pytest.raises(InvalidArgument, match=r"^max_seqlen: got None"):
        FlashCrossAttention()(q, kv, cu_seqlens=cu_seqlens, cu_seqlens_k=cu_seqlens, max_seqlen_k=4)
    with pytest.raises(InvalidArgument, match=r"^max_seqlen: got None"):
        MHA(EMBED, HEADS, rotary_emb_dim=8, rotary_emb_scale_base=4.0)(torch.randn(4, EMBED), cu_seqlens=cu_seqlens)
