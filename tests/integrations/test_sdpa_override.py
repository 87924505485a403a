"""``sdpa.override``: what torch's attention takes gives torch's numbers, and what flashtile cannot serve is torch's."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.attention.bias import causal_lower_right, causal_upper_left
from torch.nn.functional import scaled_dot_product_attention as bound_before
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from flashtile import UnsupportedProblem, functional
from flashtile.integrations import sdpa

attend: Any = F.scaled_dot_product_attention
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The options of each call that flashtile served."""
    calls: list[dict[str, Any]] = []
    attention = functional.attention

    def recorded(*tensors: Tensor, **options: Any) -> Tensor:
        calls.append(options)
        return attention(*tensors, **options)

    monkeypatch.setattr(functional, "attention", recorded)
    return calls


def leaves(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64, device: str = "cpu") -> list[Tensor]:
    generator = torch.Generator().manual_seed(len(shapes) + sum(map(sum, shapes)))
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [tensor.to(device, dtype).requires_grad_() for tensor in drawn]


def run(attention: Callable[..., Tensor], tensors: list[Tensor], **options: Any) -> list[Tensor]:
    """The output and the gradients of all tensors (and of ``attn_mask``, if it has one)."""
    out = attention(*tensors, **options)
    mask = options.get("attn_mask")
    wanted = [*tensors, mask] if isinstance(mask, Tensor) and mask.requires_grad else tensors
    return [out, *torch.autograd.grad(out, wanted, torch.linspace(-1, 1, out.numel()).to(out).view_as(out))]


def assert_as_torch(tensors: list[Tensor], served: list[dict[str, Any]], **options: Any) -> None:
    expected = run(attend, tensors, **options)
    assert served == []
    with sdpa.override():
        found = run(attend, tensors, **options)
    assert len(served) == 1
    torch.testing.assert_close(found, expected)


# --- what torch takes ------------------------------------------------------------------------------------------------

SHAPES: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]] = {
    "four axes": ((2, 3, 7, 8), (2, 3, 9, 8), (2, 3, 9, 8)),
    "three axes": ((4, 7, 8), (4, 9, 8), (4, 9, 8)),
    "two axes": ((7, 8), (9, 8), (9, 8)),
    "five axes": ((2, 2, 3, 7, 8), (2, 2, 3, 9, 8), (2, 2, 3, 9, 8)),
    "head_dim_v": ((2, 3, 7, 8), (2, 3, 9, 8), (2, 3, 9, 5)),
    "batch broadcasts": ((2, 3, 7, 8), (1, 3, 9, 8), (1, 3, 9, 8)),
    "query's batch broadcasts": ((1, 3, 7, 8), (4, 3, 9, 8), (4, 3, 9, 8)),
    "one key head": ((2, 3, 7, 8), (2, 1, 9, 8), (2, 1, 9, 8)),
    "one query": ((2, 3, 1, 8), (2, 3, 9, 8), (2, 3, 9, 8)),
    "more queries": ((2, 3, 9, 8), (2, 3, 7, 8), (2, 3, 7, 8)),
}


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shapes", SHAPES)
def test_shapes(shapes: str, is_causal: bool, served: list[dict[str, Any]]) -> None:
    assert_as_torch(leaves(*SHAPES[shapes]), served, is_causal=is_causal)


@pytest.mark.parametrize(("seqlen_q", "seqlen_kv"), [(5, 5), (3, 8), (8, 3), (1, 6), (6, 1)])
def test_is_causal_is_aligned_top_left(seqlen_q: int, seqlen_kv: int, served: list[dict[str, Any]]) -> None:
    """PT#108108: flash_attn and flashtile align bottom-right, torch top-left."""
    tensors = leaves((1, 2, seqlen_q, 8), (1, 2, seqlen_kv, 8), (1, 2, seqlen_kv, 8))
    with sdpa.override():
        out = attend(*tensors, is_causal=True)
    visible = torch.ones(seqlen_q, seqlen_kv, dtype=torch.bool).tril()
    torch.testing.assert_close(out, attend(*tensors, attn_mask=visible))
    assert all(options["mask"] is None for options in served), "no mask is needed for this"


MASKS = ["7 9", "1 9", "7 1", "2 1 7 9", "2 3 7 9", "1 3 1 9", "3 7 9", "2 1 1 9", "1 1 7 9"]


@pytest.mark.parametrize("kind", ["bool", "float", "float32 beside float64's cousin"])
@pytest.mark.parametrize("shape", MASKS)
def test_masks_broadcast(shape: str, kind: str, served: list[dict[str, Any]]) -> None:
    dtype = torch.float32 if kind.startswith("float32") else torch.float64
    tensors = leaves((2, 3, 7, 8), (2, 3, 9, 8), (2, 3, 9, 8), dtype=dtype)
    scores = torch.randn(*map(int, shape.split()), generator=torch.Generator().manual_seed(1), dtype=dtype)
    mask = scores > -0.5 if kind == "bool" else scores.requires_grad_()
    assert_as_torch(tensors, served, attn_mask=mask)


def test_only_the_mask_has_a_gradient(served: list[dict[str, Any]]) -> None:
    """PT#148476: with constant q, k and v the gradient of a bias was lost."""
    q, k, v = (tensor.detach() for tensor in leaves(*SHAPES["four axes"]))
    mask = torch.randn(3, 7, 9, dtype=torch.float64, requires_grad=True)
    (expected,) = torch.autograd.grad(attend(q, k, v, attn_mask=mask).square().sum(), mask)
    with sdpa.override():
        (found,) = torch.autograd.grad(attend(q, k, v, attn_mask=mask).square().sum(), mask)
    assert len(served) == 1
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("shape", [(7, 9), (4, 7, 9), (1, 7, 9), (4, 1, 9)])
def test_masks_of_three_axes(shape: tuple[int, ...], served: list[dict[str, Any]]) -> None:
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(1)) > -0.5
    assert_as_torch(leaves((4, 7, 8), (4, 9, 8), (4, 9, 8)), served, attn_mask=mask)


@pytest.mark.parametrize("shape", [(2, 5, 3, 7, 9), (2, 1, 1, 7, 9), (1, 1, 3, 1, 9), (5, 1, 7, 9), (3, 7, 9)])
def test_masks_of_several_batch_axes(shape: tuple[int, ...], served: list[dict[str, Any]]) -> None:
    mask = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    assert_as_torch(leaves((2, 5, 3, 7, 8), (2, 5, 3, 9, 8), (2, 5, 3, 9, 8)), served, attn_mask=mask)


@pytest.mark.parametrize("has_mask", [False, True])
@pytest.mark.parametrize("heads_kv", [1, 2, 6])
@pytest.mark.parametrize("num_axes", [3, 4, 5])
def test_enable_gqa(num_axes: int, heads_kv: int, has_mask: bool, served: list[dict[str, Any]]) -> None:
    lead = (2, 2)[: num_axes - 3]
    tensors = leaves((*lead, 6, 7, 8), (*lead, heads_kv, 9, 8), (*lead, heads_kv, 9, 8))
    mask = torch.ones(7, 9, dtype=torch.bool).tril(2) if has_mask else None
    assert_as_torch(tensors, served, attn_mask=mask, enable_gqa=True)


@pytest.mark.parametrize("scale", [None, 0.3, 1, 2.0])
def test_scale(scale: float | None, served: list[dict[str, Any]]) -> None:
    assert_as_torch(leaves(*SHAPES["four axes"]), served, scale=scale)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("is_causal", [False, True])
def test_dtypes(dtype: torch.dtype, is_causal: bool, device: str, served: list[dict[str, Any]]) -> None:
    tensors = leaves((2, 3, 40, 16), (2, 3, 40, 16), (2, 3, 40, 16), dtype=dtype, device=device)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    with sdpa.override():
        found = run(attend, tensors, is_causal=is_causal)
    assert len(served) == 1 and all(result.dtype == dtype for result in found)
    expected = [result.to(dtype) for result in run(bound_before, exact, is_causal=is_causal)]
    tolerance = {torch.float16: 4e-3, torch.bfloat16: 3e-2}.get(dtype, 2e-5)
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", ["bool", "-inf"])
def test_a_row_that_sees_nothing_is_zero_and_so_are_its_gradients(kind: str, served: list[dict[str, Any]]) -> None:
    """PT#103749: such rows were NaN."""
    visible = torch.ones(7, 9, dtype=torch.bool)
    visible[3] = False
    mask = visible if kind == "bool" else torch.zeros(7, 9, dtype=torch.float64).masked_fill(~visible, -torch.inf)
    tensors = leaves(*SHAPES["four axes"])
    with sdpa.override():
        out, d_q, *rest = run(attend, tensors, attn_mask=mask)
    assert len(served) == 1 and not out[:, :, 3].any() and not d_q[:, :, 3].any()
    assert all(result.isfinite().all() for result in rest)
    torch.testing.assert_close(out, attend(*tensors, attn_mask=visible))


@settings(max_examples=100)
@given(data=st.data())
def test_any_mix(data: st.DataObject) -> None:
    draw = data.draw
    lead = draw(st.sampled_from([(), (1,), (2,), (2, 3)]))
    heads_kv, group = draw(st.integers(1, 2)), draw(st.integers(1, 2))
    seqlen_q, seqlen_kv, head_dim, head_dim_v = (draw(st.integers(1, 9)) for _ in range(4))
    tensors = leaves(
        (*lead, heads_kv * group, seqlen_q, head_dim),
        (*lead, heads_kv, seqlen_kv, head_dim),
        (*lead, heads_kv, seqlen_kv, head_dim_v),
    )
    options: dict[str, Any] = {"enable_gqa": group > 1 or draw(st.booleans())}
    if draw(st.booleans()):
        options["scale"] = draw(st.sampled_from([0.1, 1.0, 3.0]))
    kind = draw(st.sampled_from(["none", "causal", "bool", "float"]))
    if kind == "causal":
        options["is_causal"] = True
    elif kind != "none":
        full = (*lead, heads_kv * group, seqlen_q, seqlen_kv)
        shape = [draw(st.sampled_from([1, size])) for size in full][draw(st.integers(0, len(full) - 2)) :]
        mask = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        options["attn_mask"] = mask > 0 if kind == "bool" else mask.requires_grad_()
    if not lead and not options["enable_gqa"]:  # three axes are [batch, seqlen, dim], so heads are a batch
        options.pop("enable_gqa")
    expected = run(attend, tensors, **options)
    with sdpa.override(strict=True):
        torch.testing.assert_close(run(attend, tensors, **options), expected)


@pytest.mark.parametrize("device", DEVICES)
def test_dropout_drops_what_it_should_and_repeats_with_torch_s_seed(device: str) -> None:
    q, k = (torch.zeros(2, 3, 64, 8, device=device) for _ in range(2))
    v = torch.eye(64, device=device).expand(2, 3, 64, 64)

    def weights() -> Tensor:
        torch.manual_seed(3)
        with sdpa.override():
            return attend(q, k, v, dropout_p=0.25) * 64

    found = weights()
    torch.testing.assert_close(found.unique(), torch.tensor([0.0, 4 / 3], device=device))
    assert abs(found.bool().double().mean().item() - 0.75) < 0.02
    assert torch.equal(found, weights())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_autocast_casts_as_torch_does(has_bias: bool, device: str, served: list[dict[str, Any]]) -> None:
    tensors = leaves((2, 3, 20, 16), (2, 3, 20, 16), (2, 3, 20, 16), dtype=torch.float32, device=device)
    mask = torch.randn(20, 20, device=device) if has_bias else None
    with torch.autocast(device, dtype=torch.bfloat16):
        expected = attend(*tensors, attn_mask=mask)
        with sdpa.override():
            found = attend(*tensors, attn_mask=mask)
    assert len(served) == 1
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("lengths", [(5, 5), (3, 8)])
def test_causal_biases_need_no_mask(lengths: tuple[int, int], served: list[dict[str, Any]]) -> None:
    seqlen_q, seqlen_kv = lengths
    tensors = leaves((1, 2, seqlen_q, 8), (1, 2, seqlen_kv, 8), (1, 2, seqlen_kv, 8))
    for bias, diagonal in ((causal_upper_left(*lengths), 0), (causal_lower_right(*lengths), seqlen_kv - seqlen_q)):
        with sdpa.override():
            out = attend(*tensors, attn_mask=bias)
        visible = torch.ones(lengths, dtype=torch.bool).tril(diagonal)
        torch.testing.assert_close(out, attend(*tensors, attn_mask=visible))
    assert [options["mask"] for options in served] == [None, None]


def test_a_meta_tensor_gets_its_shape() -> None:
    q, k, v = (torch.empty(2, 3, length, 8, device="meta") for length in (7, 9, 9))
    with sdpa.override(strict=True):
        assert attend(q, k, v).shape == q.shape


# --- what is left to torch -------------------------------------------------------------------------------------------


def left_to_torch() -> dict[str, Callable[[], tuple[tuple[Tensor, ...], dict[str, Any]]]]:
    q, k, v = leaves((2, 4, 7, 8), (2, 4, 9, 8), (2, 4, 9, 8))
    nested = torch.nested.nested_tensor([torch.ones(5, 4, 8), torch.ones(3, 4, 8)], layout=torch.jagged).transpose(1, 2)
    return {
        "nested": lambda: ((nested, nested, nested), {}),
        "dropout_p=1": lambda: ((q, k, v), {"dropout_p": 1.0}),
        "other value heads": lambda: ((q, k, v[:, :1]), {"enable_gqa": True}),
    }


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("name", left_to_torch())
def test_what_flashtile_cannot_serve_is_torch_s_or_an_error(name: str, served: list[dict[str, Any]]) -> None:
    tensors, options = left_to_torch()[name]()
    expected = attend(*tensors, **options)
    with sdpa.override():
        found = attend(*tensors, **options)
    assert served == []
    assert torch.equal(*(out.values() if out.is_nested else out for out in (found, expected)))
    with (
        pytest.raises(UnsupportedProblem, match="leaves this scaled_dot_product_attention to torch"),
        sdpa.override(strict=True),
    ):
        attend(*tensors, **options)


def wrong_calls() -> dict[str, tuple[tuple[Tensor, ...], dict[str, Any]]]:
    q, k, v = leaves((2, 4, 7, 8), (2, 4, 9, 8), (2, 4, 9, 8))
    mask = torch.ones(7, 9, dtype=torch.bool)
    return {
        "is_causal and attn_mask": ((q, k, v), {"is_causal": True, "attn_mask": mask}),
        "fewer key heads without enable_gqa": ((q, k[:, :2], v[:, :2]), {}),
        "heads that do not divide": ((q, k[:, :3], v[:, :3]), {"enable_gqa": True}),
        "integer mask": ((q, k, v), {"attn_mask": mask.long()}),
        "mask that does not broadcast": ((q, k, v), {"attn_mask": mask[:5]}),
        "other dtypes": ((q, k.float(), v), {}),
        "integers": ((q.long(), k.long(), v.long()), {}),
        "other head_dim": ((q, k[..., :4], v), {}),
        "other number of keys": ((q, k[:, :, :4], v), {}),
        "one axis": ((q[0, 0, 0], k[0, 0, 0], v[0, 0, 0]), {}),
        "unknown option": ((q, k, v), {"softcap": 3.0}),
        "batches that do not broadcast": ((q, k[:1].expand(3, -1, -1, -1), v[:1].expand(3, -1, -1, -1)), {}),
        "negative dropout": ((q, k, v), {"dropout_p": -0.5}),
        "no tensor": ((q, k.tolist(), v), {}),  # type: ignore[dict-item]
    }


def outcome(tensors: tuple[Tensor, ...], options: dict[str, Any]) -> Tensor | type[Exception]:
    try:
        return attend(*tensors, **options)
    except (RuntimeError, TypeError, ValueError) as error:
        return type(error)


@pytest.mark.parametrize("name", wrong_calls())
def test_a_wrong_call_has_torch_s_outcome_and_strictly_is_an_error(name: str) -> None:
    """torch's CPU kernels take some of these without a word; that is torch's to say."""
    tensors, options = wrong_calls()[name]
    expected = outcome(tensors, options)
    with sdpa.override():
        found = outcome(tensors, options)
    assert found is expected if isinstance(expected, type) else isinstance(found, Tensor)
    with pytest.raises((UnsupportedProblem, TypeError)), sdpa.override(strict=True):
        attend(*tensors, **options)


# --- where it reaches, and where it ends -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "attention",
    [
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
        lambda q, k, v: torch.nn.functional.scaled_dot_product_attention(q, k, v),
        bound_before,
        torch.ops.aten.scaled_dot_product_attention,
        torch.ops.aten.scaled_dot_product_attention.default,
    ],
    ids=["F", "full name", "imported before", "packet", "overload"],
)
def test_every_name_is_reached(attention: Callable[..., Tensor], served: list[dict[str, Any]]) -> None:
    tensors = leaves(*SHAPES["four axes"])
    with sdpa.override():
        attention(*tensors)
    assert len(served) == 1
    attention(*tensors)
    assert len(served) == 1


def test_blocks_nest(served: list[dict[str, Any]]) -> None:
    tensors = leaves(*SHAPES["four axes"])
    with sdpa.override():
        with sdpa.override(strict=True), pytest.raises(UnsupportedProblem):
            attend(*tensors, dropout_p=1.0)
        attend(*tensors, dropout_p=1.0)
        assert served == []
        attend(*tensors)
        assert len(served) == 1
    attend(*tensors)
    assert len(served) == 1


def test_one_block_object_may_be_entered_again(served: list[dict[str, Any]]) -> None:
    tensors, block = leaves(*SHAPES["four axes"]), sdpa.override()
    with block, block:
        attend(*tensors)
    with block:
        attend(*tensors)
    attend(*tensors)
    assert len(served) == 2


def test_an_exception_ends_the_block(served: list[dict[str, Any]]) -> None:
    with pytest.raises(ZeroDivisionError), sdpa.override():
        _ = 1 / 0
    attend(*leaves(*SHAPES["four axes"]))
    assert served == []


def test_it_belongs_to_its_thread(served: list[dict[str, Any]]) -> None:
    tensors = leaves(*SHAPES["four axes"])
    seen: list[int] = []

    def elsewhere() -> None:
        attend(*tensors)
        seen.append(len(served))
        with sdpa.override():
            attend(*tensors)
        seen.append(len(served))

    with sdpa.override():
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert seen == [0, 1]


class Counting(TorchFunctionMode):
    calls = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        type(self).calls += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_inside", [False, True])
def test_other_modes_keep_working(is_inside: bool, served: list[dict[str, Any]]) -> None:
    tensors, Counting.calls = leaves(*SHAPES["four axes"]), 0
    first, second = (sdpa.override(), Counting()) if is_inside else (Counting(), sdpa.override())
    with first, second, torch.device("cpu"):
        attend(*tensors)
    assert len(served) == 1 and Counting.calls >= 1


# --- modules that call it --------------------------------------------------------------------------------------------


@pytest.fixture(params=["training", "inference"])
def is_training(request: pytest.FixtureRequest) -> Iterator[bool]:
    with torch.set_grad_enabled(request.param == "training"):
        yield request.param == "training"


@pytest.mark.parametrize("kind", ["plain", "padding", "causal", "float mask"])
@pytest.mark.parametrize("module", ["attention", "layer", "encoder", "decoder"])
def test_torch_s_transformer_modules(module: str, kind: str, is_training: bool, served: list[dict[str, Any]]) -> None:
    """In inference torch would run them in one fused op of its own."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"d_model": 16, "nhead": 4, "dim_feedforward": 32, "dropout": 0.0, "batch_first": True}
    x, memory = torch.randn(2, 6, 16), torch.randn(2, 6, 16)
    mask = nn.Transformer.generate_square_subsequent_mask(6) if kind in ("causal", "float mask") else None
    padding = torch.tensor([[False] * 6, [False] * 4 + [True] * 2]) if kind == "padding" else None
    is_causal = kind == "causal"
    made: nn.Module
    if module == "attention":
        made = nn.MultiheadAttention(16, 4, batch_first=True)

        def call() -> Tensor:
            return made(x, x, x, key_padding_mask=padding, attn_mask=mask, is_causal=is_causal, need_weights=False)[0]

    elif module == "decoder":
        made = nn.TransformerDecoderLayer(**sizes)

        def call() -> Tensor:
            return made(x, memory, tgt_mask=mask, tgt_key_padding_mask=padding, tgt_is_causal=is_causal)

    else:
        made = nn.TransformerEncoderLayer(**sizes)
        if module == "encoder":
            made = nn.TransformerEncoder(made, 2, enable_nested_tensor=False)

        def call() -> Tensor:
            options = {"is_causal": is_causal, "src_key_padding_mask": padding}
            return made(x, **{"mask" if module == "encoder" else "src_mask": mask}, **options)

    made.train(is_training)
    rows = ~padding if padding is not None else torch.ones(2, 6, dtype=torch.bool)

    def results() -> list[Tensor]:
        out = call()[rows]
        return [out, *torch.autograd.grad(out.square().sum(), list(made.parameters()))] if is_training else [out]

    expected = results()
    with sdpa.override(strict=True):
        found = results()
    assert len(served) == {"encoder": 2, "decoder": 2}.get(module, 1)
    torch.testing.assert_close(found, expected)


def test_attention_weights_are_torch_s(served: list[dict[str, Any]]) -> None:
    attention, x = nn.MultiheadAttention(16, 4, batch_first=True), torch.randn(2, 6, 16)
    expected = attention(x, x, x, need_weights=True)
    with sdpa.override():
        torch.testing.assert_close(attention(x, x, x, need_weights=True), expected)
    assert served == []


class Block(nn.Module):
    """Self-attention as people write it."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 4)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))


def test_checkpointing_computes_the_same_again(served: list[dict[str, Any]]) -> None:
    torch.manual_seed(0)
    block, x = Block(), torch.randn(2, 6, 16, requires_grad=True)
    (expected,) = torch.autograd.grad(block(x).square().sum(), x)
    with sdpa.override():
        out = checkpoint(block, x, use_reentrant=False)
        (found,) = torch.autograd.grad(out.square().sum(), x)
    assert len(served) == 2
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("where", ["around", "inside"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_without_a_graph_break(where: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    block, x = Block(), torch.randn(2, 6, 16, requires_grad=True)
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph.print_readable(print_output=False))
        return torch._dynamo.lookup_backend("aot_eager")(graph, example_inputs)

    def inside(x: Tensor) -> Tensor:
        with sdpa.override():
            return block(x)

    expected = block(x)
    compiled = torch.compile(inside if where == "inside" else block, fullgraph=True, backend=backend, dynamic=dynamic)
    with sdpa.override() if where == "around" else torch.enable_grad():
        found = compiled(x)
    assert "flashtile.attention_forward" in graphs[-1]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(
        torch.autograd.grad(found.square().sum(), x), torch.autograd.grad(expected.square().sum(), x)
    )
    if where == "around":
        compiled(x)
        assert "flashtile" not in graphs[-1], "outside the block it is torch's again"
    torch._dynamo.reset()


def test_a_compiled_module_of_torch() -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    attention, x = nn.MultiheadAttention(16, 4, batch_first=True), torch.randn(2, 6, 16)

    def call(x: Tensor) -> Tensor:
        return attention(x, x, x, need_weights=False)[0]

    expected = call(x)
    with sdpa.override(strict=True):
        torch.testing.assert_close(torch.compile(call, fullgraph=True, backend="aot_eager")(x), expected)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
def test_vmap_over_a_batch(served: list[dict[str, Any]]) -> None:
    tensors = [tensor.detach() for tensor in leaves(*SHAPES["five axes"])]
    expected = attend(*tensors)
    with sdpa.override():
        found = torch.vmap(attend)(*tensors)
    assert len(served) == 1
    torch.testing.assert_close(found, expected)


@pytest.mark.gpu
def test_no_host_synchronisation() -> None:
    tensors = leaves((2, 4, 64, 32), (2, 2, 96, 32), (2, 2, 96, 32), dtype=torch.bfloat16, device="cuda")
    mask = torch.ones(2, 1, 1, 96, dtype=torch.bool, device="cuda")

    def step(**options: Any) -> None:
        with sdpa.override(strict=True):
            attend(*tensors, enable_gqa=True, **options).sum().backward()

    calls: list[dict[str, Any]] = [{}, {"is_causal": True}, {"attn_mask": mask}, {"dropout_p": 0.1}]
    for options in calls:
        step(**options)  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        for options in calls:
            step(**options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
