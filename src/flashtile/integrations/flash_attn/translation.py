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

_INTEGERS = (torch.int32, torch.int64)

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


def check_tensor(name: str, value: Any, axes: str, *, dtypes: tuple[torch.dtype, ...] = ()) -> Tensor:
    """``value`` if it is a tensor with as many axes as ``axes`` names, and one of the dtypes if there are any."""
    if not isinstance(value, Tensor):
        got, remedy = describe(value), f"pass a tensor, for example torch.as_tensor({name})"
    elif value.is_nested:
        got, remedy = "a nested tensor", f"pass torch.nested.to_padded_tensor({name}, 0.0)"
    elif value.dim() != axes.count(",") + 1:
        got, remedy = describe(value), f"check the axes of {name}"
    elif dtypes and value.dtype not in dtypes:
        got, remedy = describe(value), f"pass {name}.to({dtypes[0]})"
    else:
        return value
    of = f"a {' or '.join(str(dtype) for dtype in dtypes)} tensor" if dtypes else "a tensor"
    raise invalid(name, got=got, wanted=f"{of} {axes}", remedy=remedy)


def check_packed(name: str, value: Any, axes: str) -> Tensor:
    """``value`` if it is a tensor of ``axes``, of which the last but two has the size that stands there."""
    *_, num_parts, _, _ = axes.strip("[]").split(", ")
    if check_tensor(name, value, axes).shape[-3] != int(num_parts):
        raise invalid(
            name,
            got=describe(value),
            wanted=f"a tensor {axes}",
            remedy=f"torch.stack {num_parts} tensors along dim={value.dim() - 3}",
        )
    return value


def check_per_sequence(name: str, value: Any, *, batch: int, device: torch.device, axes: str = "[batch]") -> Tensor:
    """``value`` if it is a tensor of integers with an entry, or a row, for each sequence of the batch."""
    check_tensor(name, value, axes, dtypes=_INTEGERS)
    if value.shape[0] != batch or value.device != device:
        raise invalid(
            name,
            got=f"{value.shape[0]} entries on {value.device}",
            wanted=f"{batch}, one for each sequence, on {device}",
            remedy=f"make {name} for this very batch, on the device of the other tensors",
        )
    return value


def check_position(name: str, value: Any, *, batch: int, device: torch.device) -> Any:
    """``value`` if it is an int >= 0 for all sequences, or a tensor with one for each."""
    if isinstance(value, Tensor):
        return check_per_sequence(name, value, batch=batch, device=device)
    if not isinstance(value, (int, torch.SymInt)) or isinstance(value, bool) or value < 0:
        raise invalid(
            name,
            got=describe(value),
            wanted="an int >= 0 for all sequences, or an int32 tensor [batch]",
            remedy="count from the start of each sequence",
        )
    return value


def may_read(tensor: Tensor) -> bool:
    """Whether its values may be checked: where that does not make a GPU wait, or by request."""
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or settings.checks_values_on_gpu()
