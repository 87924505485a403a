"""``torch.nn.MultiheadAttention`` against the modules that load its state dict: outputs, gradients, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nn_cases import DEVICES, MASKS, assert_same, inputs_of, mask_of, with_gradients
from torch import Tensor, nn

from flashtile import InvalidArgument, UnsupportedProblem
from flashtile.nn import FlashAttention, MultiheadAttention, NaiveAttention

D_MODEL, N_HEAD = 32, 4
CONFIGURATIONS: list[dict[str, Any]] = [
    {},
    {"bias": False},
    {"kdim": 12},
    {"kdim": 12, "vdim": 20},
    {"vdim": 20, "bias": False},
]


def torch_module(**options: Any) -> nn.MultiheadAttention:
    torch.manual_seed(2)
    module = nn.MultiheadAttention(D_MODEL, N_HEAD, batch_first=True, dtype=torch.float64, **options)
    for name, parameter in module.named_parameters():
        if "bias" in name:  # torch starts with zeros, which would hide a bias that went to the wrong place
            nn.init.normal_(parameter)
    return module


def in_torch_names(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """Results and gradients of one of our modules, stacked as torch has its parameters."""
    named = {name: value for name, value in results.items() if "_proj" not in name or name.startswith("out_proj")}
    weights = [results[f"{name}_proj.weight"] for name in "qkv"]
    if len({weight.shape for weight in weights}) == 1:
        named["in_proj_weight"] = torch.cat(weights)
    else:
        named |= {f"{name}_proj_weight": weight for name, weight in zip("qkv", weights, strict=True)}
    if "q_proj.bias" in results:
        named["in_proj_bias"] = torch.cat([results[f"{name}_proj.bias"] for name in "qkv"])
    return named


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("padding", [None, "right", "left", "holes"])
@pytest.mark.parametrize("options", CONFIGURATIONS, ids=str)
def test_cross_attention(options: dict[str, Any], padding: str | None, device: str) -> None:
    theirs = torch_module(**options).to(device)
    ours = MultiheadAttention.from_torch(theirs)
    mask = mask_of(MASKS[padding or "none"], device)
    x = inputs_of(torch.ones(len(mask), 5, dtype=torch.bool, device=device))
    key, value = (torch.nan_to_num(inputs_of(mask, width, seed=3)).detach() for width in (theirs.kdim, theirs.vdim))
    leaves = (x, key.requires_grad_(), value.requires_grad_())
    masks = (mask, ~mask) if padding else (None, None)
    found = with_gradients(ours, lambda: ours(*leaves, pad_mask_kv=masks[0]), *leaves)
    expected = with_gradients(
        theirs, lambda: theirs(*leaves, key_padding_mask=masks[1], need_weights=False)[0], *leaves
    )
    assert_same(in_torch_names(found), expected, 1e-10)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize("made", [MultiheadAttention, FlashAttention, NaiveAttention])
def test_self_attention(made: type[nn.Module], padding: str, causal: bool, device: str) -> None:
    """Where there are tokens: torch's padded positions see the tokens, and so has their output."""
    theirs = torch_module().to(device)
    ours = made(D_MODEL, N_HEAD, causal=causal).to(device, torch.float64)
    ours.load_state_dict(theirs.state_dict())
    mask = mask_of(MASKS[padding], device)
    x = torch.nan_to_num(inputs_of(mask)).detach().requires_grad_()
    hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=device).triu(1) if causal else None
    masks = {"key_padding_mask": ~mask, "attn_mask": hidden, "need_weights": False}

    def on_tokens(out: Tensor) -> Tensor:
        return torch.where(mask[..., None], out, 0.0)

    found = with_gradients(ours, lambda: ours(x, pad_mask=mask), x)
    expected = with_gradients(theirs, lambda: on_tokens(theirs(x, x, x, **masks)[0]), x)
    if causal and padding == "left":  # torch's softmax of padding that sees nothing is NaN, and so are all gradients
        found, expected = ({"out": results["out"]} for results in (found, expected))
    else:
        found = in_torch_names(found)
    assert_same(found, expected, 1e-10)


def test_a_model_loads_whatever_the_layer_is_called() -> None:
    theirs = nn.ModuleDict({"block": nn.ModuleDict({"attention": torch_module(), "mlp": nn.Linear(3, 2)})})
    ours = nn.ModuleDict(
        {"block": nn.ModuleDict({"attention": FlashAttention(D_MODEL, N_HEAD), "mlp": nn.Linear(3, 2)})}
    ).double()
    saved = theirs.state_dict()
    before = list(saved)
    assert str(ours.load_state_dict(saved)) == "<All keys matched successfully>"
    assert list(saved) == before
    again = {name: value.clone() for name, value in ours.state_dict().items()}
    assert str(ours.load_state_dict(again)) == "<All keys matched successfully>"


def test_what_was_loaded_with_assign_keeps_no_stacked_weight_alive() -> None:
    module = MultiheadAttention(D_MODEL, N_HEAD, device="meta")
    module.load_state_dict(torch_module().state_dict(), assign=True)
    assert module.k_proj.weight.untyped_storage().nbytes() == 8 * D_MODEL * D_MODEL


@pytest.mark.parametrize("training", [False, True])
def test_from_torch_takes_over_the_configuration(training: bool) -> None:
    theirs = torch_module(kdim=12, dropout=0.25).to(torch.bfloat16).train(training)
    ours = MultiheadAttention.from_torch(theirs, causal=True)
    assert (ours.dropout_p, ours.causal, ours.training, ours.d_key, ours.d_value) == (0.25, True, training, 12, D_MODEL)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    assert not {p.data_ptr() for p in ours.parameters()} & {p.data_ptr() for p in theirs.parameters()}


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("options", "saved", "words"),
    [
        ({}, {"add_bias_kv": True}, "bias_k, bias_v: add_bias_kv=True learns one more key"),
        ({"n_head_kv": 2}, {}, r"in_proj_weight: got 96 rows; wanted 64, those of q_proj \(32\), k_proj \(16\)"),
        ({"d_key": 12}, {}, "size mismatch for k_proj.weight"),
        ({}, {"kdim": 12}, "size mismatch for k_proj.weight"),
    ],
)
def test_state_dicts_refused(options: dict[str, Any], saved: dict[str, Any], words: str, strict: bool) -> None:
    with pytest.raises(RuntimeError, match=words):
        MultiheadAttention(D_MODEL, N_HEAD, **options).load_state_dict(
            torch_module(**saved).state_dict(), strict=strict
        )


def test_loading_is_strict() -> None:
    module, saved = MultiheadAttention(D_MODEL, N_HEAD), torch_module().state_dict()
    with pytest.raises(RuntimeError, match=r"Missing key.*q_proj.bias.*k_proj.bias.*v_proj.bias"):
        module.load_state_dict({name: value for name, value in saved.items() if name != "in_proj_bias"})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*in_proj_scale"):
        module.load_state_dict({**saved, "in_proj_scale": torch.ones(1)})
    with pytest.raises(RuntimeError, match=r"Unexpected key.*q_proj.bias"):
        MultiheadAttention(D_MODEL, N_HEAD, qkv_bias=False).load_state_dict(saved)


@pytest.mark.parametrize(
    ("module", "error", "words"),
    [
        (nn.Linear(3, 3), InvalidArgument, "^module: got Linear"),
        (nn.MultiheadAttention(8, 2), InvalidArgument, "^module: got batch_first=False.*module.batch_first = True"),
        (torch_module(add_bias_kv=True), UnsupportedProblem, "add_bias_kv=True"),
        (torch_module(add_zero_attn=True), UnsupportedProblem, "add_zero_attn=True"),
    ],
    ids=str,
)
def test_from_torch_refuses(module: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        MultiheadAttention.from_torch(module)
