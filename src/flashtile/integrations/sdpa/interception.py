"""``override``: every call of ``F.scaled_dot_product_attention`` inside a ``with`` block, on any device, by any name.

A torch function mode sees calls that were bound before the block began (``from torch.nn.functional import ...``),
belongs to one thread, nests, and is left on exceptions; ``torch.compile`` traces it and guards on it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from torch.overrides import TorchFunctionMode

from flashtile.errors import UnsupportedProblem
from flashtile.integrations.sdpa.translation import SdpaCall, attend, refusal

_torch_attention = F.scaled_dot_product_attention
_INTERCEPTED = (
    _torch_attention,
    torch.ops.aten.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)


def _past_the_check(function: Callable[..., Any]) -> Callable[..., Any]:
    """A Python function of torch that does not ask again whether a mode wants it: it runs with the mode still on."""
    assert isinstance(function, FunctionType)
    asked = ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic")
    names = {**function.__globals__, **dict.fromkeys(asked, lambda *_: False)}
    past = FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)
    past.__kwdefaults__ = function.__kwdefaults__
    return past


_ENTERED = {
    function: _past_the_check(function)
    for function in (F.multi_head_attention_forward, Tensor.backward, torch.autograd.grad)
}
"""Functions that call attention inside; the backward does where a checkpoint is computed again. torch switches a mode
off while it handles a function, so these go past torch's own check and run with the mode on."""


def override(*, strict: bool = False) -> AbstractContextManager[Any]:
    """Serves every ``F.scaled_dot_product_attention`` of the ``with`` block with flashtile, in this thread.

    Shapes, dtypes, broadcasting, ``is_causal`` (aligned top-left), ``enable_gqa``, autocast, gradients (that of a float
    ``attn_mask`` too) are torch's. It also reaches ``nn.MultiheadAttention`` (``need_weights=False``) and the
    transformer layers of ``torch.nn``, whose own fused fast paths torch leaves while a mode is on, and it takes the
    masks of ``torch.nn.attention.bias``. What differs from torch:

    * Which weights dropout drops: flashtile draws its own, from torch's generator.
    * A row that an ``attn_mask`` of numbers hides throughout by float32's or bfloat16's ``finfo.min`` is 0, as with
      -inf; torch returns the mean of its values.
    * With activation checkpointing, ``backward`` must be called inside the block: it computes the attention again.

    Every other torch call of the block costs a few microseconds more; compiled code costs nothing more.

    Args:
        strict: raise for what flashtile cannot serve, instead of leaving it to torch: nested tensors, tensors made of
            tensors (such as DTensor), ``dropout_p=1``, values with other heads than the keys, and wrong calls, for
            which torch has its own error texts.

    Returns:
        A context manager; blocks nest, and the innermost decides.

    Raises:
        UnsupportedProblem: inside the block, with ``strict=True``.

    Example:
        >>> import torch
        >>> from torch.nn import functional as F
        >>> from flashtile.integrations import sdpa
        >>> q, k, v = torch.randn(3, 2, 4, 128, 16).unbind()  # [batch, heads, seqlen, head_dim]
        >>> with sdpa.override():
        ...     out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        >>> torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, is_causal=True))
    """
    return _Override(strict=strict)


class _Override(TorchFunctionMode):
    def __init__(self, *, strict: bool) -> None:
        super().__init__()
        self._strict = strict

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _INTERCEPTED:
            return self._attention(*args, **kwargs)
        if func in _ENTERED:
            with self:
                return _ENTERED[func](*args, **kwargs)
        if func is Tensor.unflatten:  # the compiler traces the method, not the function
            return args[0].unflatten(*args[1:], **kwargs)
        return func(*args, **kwargs)

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        call = SdpaCall(
            query=query,
            key=key,
            value=value,
            attn_mask=attn_mask,
            dropout_p=dropout_p,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=enable_gqa,
        )
        reason = refusal(call)
        if reason is None:
            return attend(call)
        if self._strict:
            raise UnsupportedProblem(f"flashtile leaves this scaled_dot_product_attention to torch: {reason}.", {})
        return _torch_attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
