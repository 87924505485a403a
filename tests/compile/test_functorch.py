"""torch.func on attention: each transform is right, or an error; none may be silently wrong."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compile_cases import dense_case
from torch import Tensor
from torch.autograd import forward_ad

import flashtile

pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
OPTIONS: dict[str, dict[str, Any]] = {
    "fused": {"head_dim_v": 8},
    "tiled": {"softcap": 3.0, "causal": True},
    "naive": {"causal": True, "backend": "naive"},
}
VARIANTS = pytest.mark.parametrize("variant", OPTIONS)
CLEAR = r"functorch|forward.?mode|attention_backward|[Bb]atching rule"
"""What the text of an error must contain to tell the reader what is not supported."""


def tensors_and_options(variant: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    case = dense_case(dtype=torch.float64, **OPTIONS[variant])
    return case.tensors, case.options


def right_or_clear_error(found: Callable[[], Any], expected: Any) -> None:
    result, refusal = None, None
    try:
        result = found()
    except (RuntimeError, NotImplementedError) as error:
        refusal = str(error)
    if refusal is None:
        torch.testing.assert_close(result, expected)
    else:
        assert re.search(CLEAR, refusal), f"an unclear error: {refusal}"


def loss_of(variant: str) -> tuple[Callable[..., Tensor], tuple[Tensor, ...]]:
    """A number as a function of (q, k, v), and where to take its derivatives."""
    tensors, options = tensors_and_options(variant)

    def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flashtile.attention(q, k, v, **options).square().sum()

    return loss, tuple(tensors.values())


def reverse_mode(loss: Callable[..., Tensor], at: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    leaves = [tensor.detach().clone().requires_grad_() for tensor in at]
    return torch.autograd.grad(loss(*leaves), leaves)


@VARIANTS
def test_grad(variant: str) -> None:
    loss, at = loss_of(variant)
    right_or_clear_error(lambda: torch.func.grad(loss, argnums=(0, 1, 2))(*at), reverse_mode(loss, at))


@VARIANTS
def test_vjp(variant: str) -> None:
    loss, at = loss_of(variant)
    right_or_clear_error(
        lambda: torch.func.vjp(loss, *at)[1](torch.ones((), dtype=torch.float64)), reverse_mode(loss, at)
    )


@VARIANTS
def test_jvp(variant: str) -> None:
    loss, at = loss_of(variant)
    tangents = tuple(torch.randn_like(tensor) for tensor in at)
    directional = sum(
        ((gradient * tangent).sum() for gradient, tangent in zip(reverse_mode(loss, at), tangents, strict=True)),
        torch.zeros((), dtype=torch.float64),
    )
    right_or_clear_error(lambda: torch.func.jvp(loss, at, tangents)[1], directional)


@VARIANTS
def test_forward_mode_with_dual_tensors(variant: str) -> None:
    loss, (q, k, v) = loss_of(variant)
    tangent = torch.randn_like(k)
    directional = (reverse_mode(loss, (q, k, v))[1] * tangent).sum()

    def found() -> Tensor | None:
        with forward_ad.dual_level():
            dual = loss(q, forward_ad.make_dual(k, tangent), v)
            return forward_ad.unpack_dual(dual).tangent

    right_or_clear_error(found, directional)


@pytest.mark.parametrize("operand", ["bias", "sinks", "alibi_slopes"])
def test_forward_mode_through_an_option(operand: str) -> None:
    tensors, _ = tensors_and_options("tiled")
    value = torch.randn(4, dtype=torch.float64)
    at = value.reshape(4, 1, 1) if operand == "bias" else value

    def loss(option: Tensor) -> Tensor:
        arguments: dict[str, Any] = tensors | {operand: option}
        return flashtile.attention(**arguments).square().sum()

    step = 1e-6
    numeric = (loss(at + step) - loss(at - step)) / (2 * step)

    def found() -> Tensor:
        derivative = torch.func.jvp(loss, (at,), (torch.ones_like(at),))[1]
        return numeric if torch.isclose(derivative, numeric, rtol=1e-4) else derivative

    right_or_clear_error(found, numeric)


@VARIANTS
def test_jacobians(variant: str) -> None:
    tensors, options = tensors_and_options(variant)

    def few_outputs(q: Tensor) -> Tensor:
        return flashtile.attention(q, tensors["k"], tensors["v"], **options)[0, :2, 0, :2]

    expected = torch.autograd.functional.jacobian(few_outputs, tensors["q"])
    right_or_clear_error(lambda: torch.func.jacrev(few_outputs)(tensors["q"]), expected)
    right_or_clear_error(lambda: torch.func.jacfwd(few_outputs)(tensors["q"]), expected)


@VARIANTS
def test_second_derivatives(variant: str) -> None:
    loss, (q, k, v) = loss_of(variant)

    def gradient_sum(q: Tensor) -> Tensor:
        return torch.func.grad(loss)(q, k, v).sum()

    attempts: tuple[Callable[[], Any], ...] = (
        lambda: torch.func.hessian(loss)(q, k, v),
        lambda: torch.func.grad(gradient_sum)(q),
        lambda: torch.func.jvp(gradient_sum, (q,), (q,)),
    )
    for attempt in attempts:
        with pytest.raises((RuntimeError, NotImplementedError), match=CLEAR):
            attempt()


# --- vmap -------------------------------------------------------------------------------------------------------------


@VARIANTS
@pytest.mark.parametrize("mapped", [("q",), ("k",), ("q", "k", "v")])
def test_vmap_over_tensors(variant: str, mapped: tuple[str, ...]) -> None:
    tensors, options = tensors_and_options(variant)
    stacks = {name: torch.stack([tensors[name], -2 * tensors[name], tensors[name] + 1]) for name in mapped}

    def call(*values: Tensor) -> tuple[Tensor, Tensor]:
        return flashtile.attention_with_lse(**tensors | dict(zip(mapped, values, strict=True)), **options)

    found = torch.vmap(call)(*stacks.values())
    loop = [call(*values) for values in zip(*stacks.values(), strict=True)]
    torch.testing.assert_close(found, tuple(torch.stack(outputs) for outputs in zip(*loop, strict=True)))


@VARIANTS
def test_gradients_through_vmap(variant: str) -> None:
    tensors, options = tensors_and_options(variant)

    def call(q: Tensor, k: Tensor) -> Tensor:
        out, lse = flashtile.attention_with_lse(q, k, tensors["v"], **options)
        return out.square().sum() + lse.nan_to_num(neginf=0.0).sin().sum()

    def gradients(mapped: bool) -> tuple[Tensor, ...]:
        qs = torch.stack([tensors["q"], -2 * tensors["q"]]).requires_grad_()
        k = tensors["k"].clone().requires_grad_()
        values = torch.vmap(call, in_dims=(0, None))(qs, k) if mapped else torch.stack([call(q, k) for q in qs])
        return torch.autograd.grad(values.sum(), (qs, k))

    right_or_clear_error(lambda: gradients(True), gradients(False))


@VARIANTS
def test_batched_gradients(variant: str) -> None:
    tensors, options = tensors_and_options(variant)
    q = tensors["q"].clone().requires_grad_()
    out = flashtile.attention(q, tensors["k"], tensors["v"], **options)
    d_outs = torch.randn(3, *out.shape, dtype=torch.float64)
    expected = torch.stack([torch.autograd.grad(out, q, d_out, retain_graph=True)[0] for d_out in d_outs])
    right_or_clear_error(
        lambda: torch.autograd.grad(out, q, d_outs, is_grads_batched=True, retain_graph=True)[0], expected
    )


def test_per_sample_gradients() -> None:
    loss, (q, k, v) = loss_of("tiled")
    qs = torch.stack([q, 2 * q])
    expected = torch.stack([reverse_mode(loss, (q, k, v))[0] for q in qs])
    right_or_clear_error(lambda: torch.vmap(torch.func.grad(loss), in_dims=(0, None, None))(qs, k, v), expected)


def test_vmap_over_seeds_and_masks() -> None:
    q, k, v = torch.randn(3, 1, 9, 2, 8).unbind()
    seeds = torch.tensor([0, 5, -1])
    masks = torch.rand(3, 9, 9) > 0.4

    def call(seed: Tensor, mask: Tensor) -> Tensor:
        return flashtile.attention(q, k, v, mask=mask, dropout_p=0.5, dropout_seed=seed)

    expected = torch.stack([call(seed, mask) for seed, mask in zip(seeds, masks, strict=True)])
    torch.testing.assert_close(torch.vmap(call)(seeds, masks), expected)


def test_vmap_asks_what_randomness_means() -> None:
    qs = torch.randn(2, 1, 9, 2, 8)

    def call(q: Tensor) -> Tensor:
        return flashtile.attention(q, q, q, dropout_p=0.5)

    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(call)(qs)
    twins = torch.vmap(call, randomness="same")(torch.stack([qs[0], qs[0]]))
    assert torch.equal(twins[0], twins[1])
    strangers = torch.vmap(call, randomness="different")(torch.stack([qs[0], qs[0]]))
    assert not torch.equal(strangers[0], strangers[1])


def test_merging_is_plain_torch_and_differentiates_both_ways() -> None:
    out_a, out_b = torch.randn(2, 1, 3, 2, 4, dtype=torch.float64).unbind()
    lse_a, lse_b = torch.randn(2, 1, 2, 3, dtype=torch.float64).unbind()

    def merged(lse_a: Tensor) -> Tensor:
        return flashtile.merge_attention(out_a, lse_a, out_b, lse_b)[0]

    expected = torch.autograd.functional.jacobian(merged, lse_a)
    torch.testing.assert_close(torch.func.jacrev(merged)(lse_a), expected)
    torch.testing.assert_close(torch.func.jacfwd(merged)(lse_a), expected)
