"""``attn_implementation="flashtile"`` against "eager", on tiny models with random weights: nothing is downloaded."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

os.environ["HF_HUB_OFFLINE"] = "1"
transformers = pytest.importorskip("transformers", reason="needs the extra: pip install 'flashtile[transformers]'")

from transformers import masking_utils  # noqa: E402
from transformers.masking_utils import create_causal_mask  # noqa: E402

from flashtile import InvalidArgument, MissingExtra, UnsupportedProblem, functional  # noqa: E402
from flashtile.integrations import transformers as flashtile_transformers  # noqa: E402
from flashtile.integrations.transformers import attention as attention_module  # noqa: E402
from flashtile.integrations.transformers.attention import attention_forward  # noqa: E402
from flashtile.integrations.transformers.visibility import Visibility, attention_mask  # noqa: E402

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
GROUPED: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "head_dim": 8}
WINDOW = 4
ALTERNATING = ["sliding_attention", "full_attention"]
DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", GROUPED),
    "Mistral": ("Mistral", {**GROUPED, "sliding_window": WINDOW}),
    "Gemma2": (
        "Gemma2",
        {**GROUPED, "sliding_window": WINDOW, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 3},
    ),
    "Gemma3": ("Gemma3", {**GROUPED, "sliding_window": WINDOW, "layer_types": ALTERNATING}),
    "Qwen2": (
        "Qwen2",
        {**GROUPED, "use_sliding_window": True, "sliding_window": WINDOW, "layer_types": ALTERNATING},
    ),
    "Qwen3": ("Qwen3", GROUPED),
    "GptOss": (
        "GptOss",
        {**GROUPED, "sliding_window": WINDOW, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "DeepseekV3": (
        "DeepseekV3",
        {
            **SIZES,
            "num_key_value_heads": 4,
            "q_lora_rank": 8,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 6,
            "n_routed_experts": 2,
            "num_experts_per_tok": 1,
            "n_group": 1,
            "topk_group": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 2,
        },
    ),
    "GPT2": ("GPT2", {**SIZES, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}),
}
BATCH, SEQLEN = 3, 11


@pytest.fixture(autouse=True, scope="module")
def registered() -> None:
    flashtile_transformers.register()


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of each call that flashtile served."""
    calls: list[dict[str, Any]] = []

    def recorded(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def call(*tensors: Tensor, **options: Any) -> Tensor:
            calls.append(options)
            return function(*tensors, **options)

        return call

    for name in ("attention", "attention_varlen"):
        monkeypatch.setattr(functional, name, recorded(getattr(functional, name)))
    return calls


@pytest.fixture
def no_dense_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: Any) -> Tensor:
        raise AssertionError("a dense mask was built")

    monkeypatch.setattr(masking_utils, "sdpa_mask", refuse)


def decoder(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Any:
    family, options = DECODERS[name]
    config_class = getattr(transformers, f"{family}TextConfig", None) or getattr(transformers, f"{family}Config")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config_class(**options, tie_word_embeddings=False))
    with torch.no_grad():  # far from uniform attention, or masks would hardly matter
        for parameter_name, parameter in model.named_parameters():
            if "q_" in parameter_name or "k_" in parameter_name or "c_attn" in parameter_name:
                parameter.mul_(12)
            if "sinks" in parameter_name:
                parameter.normal_()
    return model.to(device, dtype).eval()


def tokens(device: str = "cpu", batch: int = BATCH, seqlen: int = SEQLEN) -> Tensor:
    return torch.randint(1, 64, (batch, seqlen), generator=torch.Generator().manual_seed(1)).to(device)


def padding(side: str, device: str = "cpu") -> Tensor | None:
    """[batch, seqlen]: rows of all, 7 and 3 tokens."""
    if side == "none":
        return None
    is_token = torch.arange(SEQLEN) < torch.tensor([[SEQLEN], [7], [3]])
    return (is_token.flip(-1) if side == "left" else is_token).long().to(device)


def results(model: Any, implementation: str, mask: Tensor | None, **inputs: Any) -> dict[str, Tensor]:
    """Logits of the real tokens, and the gradient of every parameter."""
    model.set_attn_implementation(implementation)
    model.zero_grad()
    logits = model(input_ids=tokens(model.device), attention_mask=mask, use_cache=False, **inputs).logits
    logits = logits[mask.bool()] if mask is not None else logits
    logits.float().log_softmax(-1).square().mean().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"logits": logits.detach(), **grads}


def assert_close(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    assert found.keys() == expected.keys()
    for name, want in expected.items():
        error = (found[name] - want).abs().max() / want.abs().max().clamp(min=1e-3)
        assert error < tolerance, f"{name}: {error:.1e}"


# --- decoders --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", DECODERS)
def test_logits_and_gradients(name: str, side: str, served: list[dict[str, Any]]) -> None:
    model, mask = decoder(name), padding(side)
    expected = results(model, "eager", mask)
    assert served == []
    found = results(model, "flashtile", mask)
    assert len(served) == 2
    assert_close(found, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("name", DECODERS)
def test_logits_and_gradients_on_a_gpu(name: str, side: str, dtype: torch.dtype) -> None:
    mask = padding(side, "cuda")
    exact = results(decoder(name, "cuda"), "eager", mask)
    rough = results(decoder(name, "cuda", dtype), "eager", mask)
    found = results(decoder(name, "cuda", dtype), "flashtile", mask)
    for key, want in exact.items():
        scale = want.abs().max().clamp(min=1e-3)
        error, allowed = ((other[key].float() - want).abs().max() / scale for other in (found, rough))
        assert error <= 2 * allowed + torch.finfo(dtype).eps, f"{key}: {error:.1e}, eager {allowed:.1e}"


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma2", "GptOss"])
@pytest.mark.usefixtures("no_dense_mask")
def test_causality_windows_and_padding_need_no_dense_mask(name: str, side: str, served: list[dict[str, Any]]) -> None:
    model, mask = decoder(name), padding(side)
    model.set_attn_implementation("flashtile")
    model(input_ids=tokens(), attention_mask=mask)
    for options in served:
        assert options["window"][1] == 0
        assert options["mask"] is None if mask is None else options["mask"].shape == (BATCH, 1, 1, SEQLEN)
    windows = {options["window"][0] for options in served}
    assert windows == {"Llama": {None}, "Mistral": {WINDOW - 1}}.get(name, {None, WINDOW - 1})


def test_the_future_is_not_seen() -> None:
    """HF#45811: an attention function without a mask function loses causality without a word."""
    model, ids = decoder("Llama"), tokens()
    model.set_attn_implementation("flashtile")
    changed = ids.clone()
    changed[:, 6:] = 5
    before, after = (model(input_ids=each).logits for each in (ids, changed))
    torch.testing.assert_close(before[:, :6], after[:, :6])
    assert (before[:, 6:] - after[:, 6:]).abs().max() > 1e-3


def test_a_window_of_w_reaches_back_w_tokens_itself_included() -> None:
    """HF#39408: the window was one token too wide."""
    model, ids = decoder("Mistral"), tokens()
    model.config.num_hidden_layers = 1
    model.model.layers = model.model.layers[:1]
    model.set_attn_implementation("flashtile")
    last = model(input_ids=ids).logits[:, -1]
    for back, reached in ((WINDOW - 1, True), (WINDOW, False)):
        changed = ids.clone()
        changed[:, -1 - back] = (changed[:, -1 - back] + 1) % 63 + 1
        difference = (model(input_ids=changed).logits[:, -1] - last).abs().max()
        assert (difference > 1e-4) == reached


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma2", "Gemma3", "Qwen2", "GptOss", "DeepseekV3"])
def test_generation(name: str, cache: str, device: str, served: list[dict[str, Any]]) -> None:
    model = decoder(name, device)
    options = {
        "attention_mask": padding("left", device),
        "max_new_tokens": 8,
        "do_sample": False,
        "disable_compile": True,
    }
    found = {}
    for implementation in ("eager", "flashtile"):
        model.set_attn_implementation(implementation)
        found[implementation] = model.generate(tokens(device), cache_implementation=cache, **options)
    assert served and found["eager"].shape == (BATCH, SEQLEN + 8)
    assert torch.equal(found["eager"], found["flashtile"])


def test_a_cache_that_continues_with_several_tokens() -> None:
    """As in assisted decoding: fewer queries than keys, aligned bottom-right (PT#108108)."""
    for name in ("Llama", "Gemma2"):
        model, ids = decoder(name), tokens()
        logits = {}
        for implementation in ("eager", "flashtile"):
            model.set_attn_implementation(implementation)
            cache = model(input_ids=ids[:, :5], use_cache=True).past_key_values
            logits[implementation] = model(input_ids=ids[:, 5:], past_key_values=cache).logits
        torch.testing.assert_close(logits["flashtile"], logits["eager"], atol=2e-5, rtol=1e-4)


# --- packed sequences ------------------------------------------------------------------------------------------------

LENGTHS = (4, 1, 6)


def packed(device: str = "cpu") -> tuple[Tensor, dict[str, Any], dict[str, Any]]:
    """(ids of sequences one after the other, position_ids, what DataCollatorWithFlattening adds)."""
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None].to(device)
    cu = torch.tensor([0, 4, 5, 11], dtype=torch.int32, device=device)
    described = {"cu_seq_lens_q": cu, "cu_seq_lens_k": cu, "max_length_q": 6, "max_length_k": 6}
    return tokens(device, batch=1), {"position_ids": positions}, described


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("is_described", [False, True], ids=["position_ids", "boundaries too"])
@pytest.mark.parametrize("name", ["Llama", "Mistral", "Gemma2", "GptOss"])
def test_packed_sequences_are_separate_ones(
    name: str, is_described: bool, device: str, served: list[dict[str, Any]], request: pytest.FixtureRequest
) -> None:
    if name == "GptOss" and not is_described:
        pytest.skip(
            "transformers does not tell GptOss's mask the positions: the sequences see each other, in eager too"
        )
    model = decoder(name, device)
    ids, positions, described = packed(device)
    model.set_attn_implementation("eager")
    expected = torch.cat([model(input_ids=part, use_cache=False).logits for part in ids.split(LENGTHS, dim=1)], dim=1)
    model.set_attn_implementation("flashtile")
    request.getfixturevalue("no_dense_mask")
    found = model(input_ids=ids, use_cache=False, **positions, **(described if is_described else {})).logits
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert all(("cu_seqlens_q" in options) == (is_described or device == "cpu") for options in served)
    found.square().sum().backward()


def test_boundaries_without_a_mask() -> None:
    """As vision towers call their layers."""
    q, k, v = qkv(11, 11)
    _, _, described = packed()
    out, _ = attention_forward(layer(), q, k, v, None, is_causal=False, sliding_window=None, **described)
    parts = [
        nn.functional.scaled_dot_product_attention(*part)
        for part in zip(*(x.split(LENGTHS, 2) for x in (q, k, v)), strict=True)
    ]
    torch.testing.assert_close(out, torch.cat(parts, dim=2).transpose(1, 2))


def test_a_packed_batch_of_several_rows() -> None:
    model, ids = decoder("Mistral"), tokens(batch=2)
    positions = torch.stack([torch.cat([torch.arange(a), torch.arange(SEQLEN - a)]) for a in (3, 5)])
    expected = results_of(model, "eager", ids, positions)
    torch.testing.assert_close(results_of(model, "flashtile", ids, positions), expected, atol=2e-5, rtol=1e-4)


def results_of(model: Any, implementation: str, ids: Tensor, positions: Tensor) -> Tensor:
    model.set_attn_implementation(implementation)
    return model(input_ids=ids, position_ids=positions, use_cache=False).logits


# --- other architectures ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_bert_sees_both_sides_but_no_padding(side: str, served: list[dict[str, Any]], request: Any) -> None:
    torch.manual_seed(0)
    config = transformers.BertConfig(**SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = transformers.BertForMaskedLM(config)
    mask = padding(side)
    expected = results_of_encoder(model, "eager", mask)
    request.getfixturevalue("no_dense_mask")
    assert_close(results_of_encoder(model, "flashtile", mask), expected)
    assert len(served) == 2 and {options["window"] for options in served} == {(None, None)}


def results_of_encoder(model: Any, implementation: str, mask: Tensor | None) -> dict[str, Tensor]:
    model.set_attn_implementation(implementation)
    model.zero_grad()
    logits = model(input_ids=tokens(), attention_mask=mask).logits
    logits = logits[mask.bool()] if mask is not None else logits
    logits.square().mean().backward()
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"logits": logits.detach(), **grads}


def test_a_window_on_both_sides() -> None:
    torch.manual_seed(0)
    config = transformers.ModernBertConfig(
        **SIZES, local_attention=6, global_attn_every_n_layers=2, cls_token_id=1, sep_token_id=2
    )
    model = transformers.ModernBertForMaskedLM(config).eval()
    mask = padding("right")
    assert_close(results_of_encoder(model, "flashtile", mask), results_of_encoder(model, "eager", mask))


@pytest.mark.parametrize("is_padded", [False, True])
def test_t5_has_a_relative_bias_with_a_gradient(is_padded: bool, served: list[dict[str, Any]]) -> None:
    if not transformers.T5ForConditionalGeneration._can_set_attn_implementation():
        pytest.skip(f"the T5 of transformers {transformers.__version__} does not call the attention interface")
    mask = padding("right") if is_padded else None
    gradients, generated = {}, []
    for implementation in ("eager", "flashtile"):
        config = transformers.T5Config(
            vocab_size=64,
            d_model=32,
            d_kv=8,
            d_ff=48,
            num_layers=2,
            num_heads=4,
            dropout_rate=0.0,
            decoder_start_token_id=0,
        )
        torch.manual_seed(0)
        model = transformers.T5ForConditionalGeneration._from_config(config, attn_implementation=implementation)
        model(input_ids=tokens(), attention_mask=mask, labels=tokens()[:, :7].contiguous()).loss.backward()
        assert len(served) == (0 if implementation == "eager" else 6), (
            "encoder, decoder and cross-attention, two layers"
        )
        gradients[implementation] = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        options: dict[str, Any] = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
        generated.append(model.generate(tokens(), **options))
    assert any("relative_attention_bias" in name for name in gradients["flashtile"])
    assert_close(gradients["flashtile"], gradients["eager"])
    assert torch.equal(*generated)


def test_chunked_attention_is_a_mask() -> None:
    torch.manual_seed(0)
    config = transformers.Llama4TextConfig(
        **GROUPED, attention_chunk_size=4, num_local_experts=2, intermediate_size_mlp=48, no_rope_layers=[1, 1]
    )
    model = transformers.Llama4ForCausalLM(config).eval()
    for side in ("none", "left"):
        mask = padding(side)
        assert_close(results(model, "flashtile", mask), results(model, "eager", mask))


# --- masks of the user -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bool", "float"])
@pytest.mark.parametrize("rows", [1, SEQLEN])
def test_a_mask_with_four_axes_is_the_whole_truth(kind: str, rows: int) -> None:
    """As for "eager": nothing is added to it, causality neither."""
    model = decoder("Mistral")
    visible = torch.rand(BATCH, 1, rows, SEQLEN, generator=torch.Generator().manual_seed(1)) < 0.7
    visible[..., 0] = True
    added = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    expected = results_with_mask(model, "eager", added)
    found = results_with_mask(model, "flashtile", visible if kind == "bool" else added)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def results_with_mask(model: Any, implementation: str, mask: Tensor) -> Tensor:
    model.set_attn_implementation(implementation)
    return model(input_ids=tokens(), attention_mask=mask, use_cache=False).logits


def layer(**attributes: Any) -> nn.Module:
    module = nn.Module()
    for name, value in attributes.items():
        setattr(module, name, value)
    return module


def qkv(seqlen_q: int = 5, seqlen_kv: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return tuple(torch.randn(1, 2, length, 8, generator=generator) for length in (seqlen_q, seqlen_kv, seqlen_kv))  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("attributes", "options", "is_causal"),
    [
        ({}, {}, True),
        ({"is_causal": False}, {}, False),
        ({"is_causal": False}, {"is_causal": True}, True),
        ({"is_causal": True}, {"is_causal": False}, False),
    ],
)
def test_without_a_mask_the_layer_says_whether_it_is_causal(
    attributes: dict[str, Any], options: dict[str, Any], is_causal: bool
) -> None:
    out, weights = attention_forward(layer(**attributes), *qkv(), None, **options)
    expected = nn.functional.scaled_dot_product_attention(*qkv(), is_causal=is_causal)
    torch.testing.assert_close(out, expected.transpose(1, 2))
    assert weights is None


def test_a_causal_layer_without_a_mask_and_with_other_lengths_is_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"attention_mask: got None in a causal layer with 3 queries and 5 keys"):
        attention_forward(layer(), *qkv(3, 5), None)
    attention_forward(layer(), *qkv(1, 5), None)  # one query is the last one


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"alibi_like": torch.ones(2)}, "alibi_like"),
        ({"output_attentions": True}, "output_attentions"),
        ({"head_mask": torch.ones(2)}, "head_mask"),
        ({"sinks": torch.ones(1, 2, 5, 1)}, "sinks"),
        ({"cache": object()}, "cache"),
        ({"dropout": 1.5}, "dropout_p"),
        ({"attention_mask": torch.ones(1, 5, dtype=torch.bool)}, "attention_mask"),
        ({"cu_seq_lens_q": torch.tensor([0, 5])}, "cu_seq_lens_q"),
    ],
)
def test_an_option_that_is_not_honoured_is_an_error(options: dict[str, Any], named: str) -> None:
    mask = options.pop("attention_mask", None)
    with pytest.raises(InvalidArgument, match=f"^{named}: "):
        attention_forward(layer(), *qkv(), mask, **options)


@pytest.mark.parametrize("name", ["position_bias", "padding"])
def test_boundaries_beside_what_contradicts_them_are_an_error(name: str) -> None:
    _, _, described = packed()
    mask = visibility(padded=True) if name == "padding" else None
    options = {"position_bias": torch.ones(1, 2, 11, 11)} if name == "position_bias" else {}
    with pytest.raises(InvalidArgument, match=r"^cu_seq_lens_q: got boundaries of packed sequences beside"):
        attention_forward(layer(), *qkv(11, 11), mask, **described, **options)


def test_harmless_options_are_let_through() -> None:
    expected, _ = attention_forward(layer(), *qkv(), None)
    harmless = dict.fromkeys(attention_module._HARMLESS, 3)
    found, _ = attention_forward(layer(), *qkv(), None, **harmless, output_attentions=False, something_new=None)
    assert torch.equal(found, expected)


def test_dropout_in_training_only(served: list[dict[str, Any]]) -> None:
    family, options = DECODERS["Llama"]
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**options, attention_dropout=0.3))
    model.set_attn_implementation("flashtile")
    for is_training in (True, False):
        model.train(is_training)(input_ids=tokens())
    assert [call["dropout_p"] for call in served] == [0.3, 0.3, 0.0, 0.0], family


def test_mixed_dtypes_under_autocast() -> None:
    query, key, value = qkv()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = attention_forward(layer(), query, key.bfloat16(), value.bfloat16(), None)
    assert out.dtype == torch.bfloat16
    with pytest.raises(InvalidArgument, match=r"^k: "):
        attention_forward(layer(), query, key.bfloat16(), value.bfloat16(), None)


def visibility(*, padded: bool = False, **options: Any) -> Any:
    config = transformers.LlamaConfig(**GROUPED)
    config._attn_implementation = "flashtile"
    embeds = torch.zeros(BATCH, SEQLEN, 32)
    mask = padding("left") if padded else None
    return create_causal_mask(config, embeds, attention_mask=mask, past_key_values=None, **options)


def test_code_that_takes_it_for_a_mask_gets_the_mask() -> None:
    seen: Any = visibility()
    dense = torch.ones(SEQLEN, SEQLEN, dtype=torch.bool).tril().expand(BATCH, 1, -1, -1)
    assert type(seen) is Visibility
    assert torch.equal(seen.dense(), dense) and torch.equal(seen[:, :, :3], dense[:, :, :3])
    assert (seen.shape, seen.ndim, seen.dtype) == (dense.shape, 4, torch.bool)
    where: Any = torch.where
    assert torch.equal(where(seen, 1.0, 2.0), where(dense, 1.0, 2.0))
    assert torch.equal(seen.to(torch.float32), dense.float())
    again = attention_mask(
        q_length=5, kv_length=5, mask_function=masking_utils.causal_mask_function, attention_mask=seen
    )
    assert again is seen


def test_a_composed_mask_is_dense() -> None:
    composed = visibility(or_mask_function=lambda _b, _h, q, kv: (q < 4) & (kv < 4))
    assert isinstance(composed, Tensor) and bool(composed[0, 0, 0, 3]) and not bool(composed[0, 0, 4, 5])


# --- training and compiling ------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_gradient_checkpointing() -> None:
    model, mask = decoder("Gemma2").train(), padding("left")
    expected = results(model, "flashtile", mask)
    model.gradient_checkpointing_enable()
    assert_close(results(model, "flashtile", mask), expected)


@pytest.fixture
def forget_compiled_code() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("forget_compiled_code")
@pytest.mark.parametrize("side", ["none", "left"])
@pytest.mark.parametrize("name", ["Llama", "Mistral"])
def test_compiled_without_a_graph_break(name: str, side: str) -> None:
    model, mask = decoder(name), padding(side)
    expected = results(model, "eager", mask)
    model.set_attn_implementation("flashtile")
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    compiled: Any = torch.compile(model, fullgraph=True, backend=backend)
    compiled.set_attn_implementation = lambda _: None
    found = results(compiled, "flashtile", mask)
    targets = [str(node.target) for node in graphs[-1].graph.nodes]
    assert targets.count("flashtile.attention_forward.default") == 2
    assert_close({name.removeprefix("_orig_mod."): value for name, value in found.items()}, expected)


@pytest.mark.usefixtures("forget_compiled_code")
def test_a_compiled_packed_batch() -> None:
    model = decoder("Llama")
    ids, positions, _ = packed()
    expected = results_of(model, "eager", ids, positions["position_ids"])
    model.set_attn_implementation("flashtile")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compiled(input_ids=ids, use_cache=False, **positions).logits
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


# --- registration ----------------------------------------------------------------------------------------------------


def test_every_way_to_choose_it(served: list[dict[str, Any]], tmp_path: Any) -> None:
    config = transformers.LlamaConfig(**GROUPED)
    made = transformers.LlamaForCausalLM._from_config(config, attn_implementation="flashtile")
    made.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="flashtile")
    switched = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    switched.set_attn_implementation("flashtile")
    for model in (made, loaded, switched):
        served.clear()
        model(input_ids=tokens())
        assert len(served) == 2
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert plain.config._attn_implementation == "sdpa", "a saved model does not depend on flashtile"


def test_parts_of_a_model_choose_for_themselves() -> None:
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4, "spatial_merge_size": 2}
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    config = transformers.Qwen2VLConfig(text_config={**GROUPED, "rope_parameters": rope}, vision_config=vision)
    choice = {"text_config": "flashtile", "vision_config": "eager"}
    model = transformers.Qwen2VLForConditionalGeneration._from_config(config, attn_implementation=choice)
    found = (model.config.text_config._attn_implementation, model.config.vision_config._attn_implementation)
    assert found == ("exact_tiles", "eager")


def test_registering_twice_changes_nothing() -> None:
    before = transformers.PreTrainedModel._check_and_adjust_attn_implementation
    flashtile_transformers.register()
    assert transformers.PreTrainedModel._check_and_adjust_attn_implementation is before


def test_other_names_are_transformers_own() -> None:
    with pytest.raises(ValueError, match="tiles"):
        transformers.LlamaForCausalLM._from_config(transformers.LlamaConfig(**GROUPED), attn_implementation="tiles")
    assert transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED)).config._attn_implementation == "sdpa"


def test_a_model_that_would_ignore_the_choice_says_so() -> None:
    """Falcon has attention classes of its own."""
    with pytest.raises(UnsupportedProblem, match="FalconForCausalLM computes attention itself"):
        transformers.FalconForCausalLM._from_config(transformers.FalconConfig(**SIZES), attn_implementation="flashtile")


def test_an_old_version_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.3.0")
    with pytest.raises(UnsupportedProblem, match=r"5\.4 and newer, and this is 5\.3\.0"):
        flashtile_transformers.register()


def test_without_transformers_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(MissingExtra, match=r"flashtile\[transformers\]"):
        flashtile_transformers.register()


# --- on a GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("side", ["none", "left"])
def test_no_host_synchronisation(side: str) -> None:
    """In our functions; transformers itself reads position_ids to find packed sequences, so they are given a cache."""
    model, ids, mask = decoder("Gemma2", "cuda", torch.bfloat16), tokens("cuda"), padding(side, "cuda")
    model.set_attn_implementation("flashtile")
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            logits = model(input_ids=ids, attention_mask=mask, past_key_values=transformers.DynamicCache()).logits
            logits.float().square().mean().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_cuda_graphs_of_a_static_cache_follow_the_lengths() -> None:
    """HF#45323: a replayed graph kept the lengths it was captured with.

    In float32: compiled layers round otherwise, which in bfloat16 now and then swaps two tokens that are as likely.
    """
    model = decoder("Llama", "cuda", torch.float32)
    model.set_attn_implementation("flashtile")
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": "static"}
    compile_config = transformers.CompileConfig(mode="reduce-overhead", fullgraph=True)
    for seqlen in (5, 11):
        ids = tokens("cuda", seqlen=seqlen)
        expected = model.generate(ids, disable_compile=True, **options)
        assert torch.equal(model.generate(ids, compile_config=compile_config, **options), expected)
