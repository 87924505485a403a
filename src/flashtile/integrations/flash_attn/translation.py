"""Between two vocabularies: flash_attn's arguments in flashtile's words, and flashtile's errors in flash_attn's."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from flashtile import settings
from flashtile.errors import InvalidArgument, invalid
from flashtile.spec.options import describe

P = ParamSpec("P")
R = TypeVar("R")

_WORDS = {
    "scale": "softmax_scale",
    "cu_seqlens_kv": "cu_seqlens_k",
    "max_seqlen_kv": "max_seqlen_k",
    "flashtile.attention_varlen": "flash_attn_varlen_func",
    "attention_varlen": "flash_attn_varlen_func",
    "flashtile.attention": "flash_attn_func",
    "as bias=": "as a bias to flashtile's own attention",
}


def in_callers_words(words: Mapping[str, str] | None = None) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes a function raise ``InvalidArgument`` with flash_attn's names for things.

    Args:
        words: further words, each with what the caller calls it; whole words only, longer ones first.
    """
    names = _WORDS | dict(words or {})
    alternatives = "|".join(re.escape(name) for name in sorted(names, key=len, reverse=True))
    ours = re.compile(rf"(?<![\w.])(?:{alternatives})(?!\w)")

    def renamed(text: str) -> str:
        return ours.sub(lambda found: names[found.group()], text)

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            try:
                return function(*args, **kwargs)
            except InvalidArgument as error:
                argument, got, wanted, remedy = map(renamed, (error.argument, error.got, error.wanted, error.remedy))
                raise invalid(argument, got=got, wanted=wanted, remedy=remedy) from None

        return call

    return decorate


def options_of(
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: tuple[int, int],
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
) -> dict[str, Any]:
    """The keyword arguments of ``flashtile.attention`` that say the same."""
    return {
        "dropout_p": dropout_p,
        "scale": softmax_scale,
        "causal": causal,
        "window": window_of(window_size),
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "deterministic": deterministic,
    }


def window_of(window_size: Any) -> tuple[int | None, int | None]:
    """A pair in which -1 means unlimited, as one in which None does."""
    is_pair = isinstance(window_size, (tuple, list)) and len(window_size) == 2
    if not is_pair or not all(_is_reach(side) for side in window_size):
        raise invalid(
            "window_size",
            got=describe(window_size),
            wanted="a pair (left, right) of integers >= -1, in tokens, -1 = unlimited",
            remedy="pass (-1, -1) for no window, (w - 1, 0) for causal attention to the last w tokens",
        )
    left, right = window_size
    return None if left == -1 else left, None if right == -1 else right


def _is_reach(side: Any) -> bool:
    return isinstance(side, (int, torch.SymInt)) and not isinstance(side, bool) and -1 <= side < 2**63


def parts_of(name: str, packed: Any, *, axes: str) -> tuple[Tensor, ...]:
    """The views q, k, v of a qkv tensor, or k, v of a kv tensor, whose axes are ``axes``: one digit says how many."""
    num_axes, num_parts = axes.count(",") + 1, next(int(letter) for letter in axes if letter.isdigit())
    is_plain = isinstance(packed, Tensor) and not packed.is_nested
    if not is_plain or packed.dim() != num_axes or packed.shape[-3] != num_parts:
        raise invalid(
            name,
            got="a nested tensor" if isinstance(packed, Tensor) and packed.is_nested else describe(packed),
            wanted=f"a tensor {axes}",
            remedy=f"torch.stack the {num_parts} tensors along dim={num_axes - 3}, or pass them one by one to a "
            "function that takes q, k and v",
        )
    return packed.unbind(-3)


def check_tensor(name: str, value: Any, axes: str, *, dtypes: tuple[torch.dtype, ...] = ()) -> Tensor:
    """``value`` if it is a tensor with as many axes as ``axes`` names, and one of the dtypes if there are any."""
    is_plain = isinstance(value, Tensor) and not value.is_nested
    if not is_plain or value.dim() != axes.count(",") + 1 or (dtypes and value.dtype not in dtypes):
        of = f"a {' or '.join(str(dtype) for dtype in dtypes)} tensor" if dtypes else "a tensor"
        raise invalid(
            name,
            got="a nested tensor" if isinstance(value, Tensor) and value.is_nested else describe(value),
            wanted=f"{of} {axes}",
            remedy=f"check the order of the axes of {name}, and its dtype",
        )
    return value


def may_read(tensor: Tensor) -> bool:
    """Whether its values may be checked: where that does not make a GPU wait, or by request."""
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or settings.checks_values_on_gpu()
