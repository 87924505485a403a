"""Checks of the plain Python options of a call: flags, numbers and windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashtile.errors import invalid
from flashtile.spec.problem import MaskSpec

LARGEST, SMALLEST = torch.finfo(torch.float32).max, torch.finfo(torch.float32).tiny
"""Scale and softcap lie within the normal range of float32, in which every kernel computes with them."""


def check_mask_spec(*, causal: bool, window: Sequence[int | None] | None) -> MaskSpec:
    """Causal attention is a window whose right end is 0; both together take the narrower right end."""
    check_flag("causal", causal)
    left, right = _check_window(window)
    if causal:
        right = 0
    return MaskSpec(left=left, right=right)


def _check_window(window: Sequence[int | None] | None) -> tuple[int | None, int | None]:
    if window is None:
        return None, None
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise invalid(
            "window",
            got=describe(window),
            wanted="a pair (left, right), or None",
            remedy="pass window=(left, right) in tokens, None on a side for unlimited",
        )
    for side, reach in zip(("left", "right"), window, strict=True):
        if reach is None:
            continue
        if not _is_integer(reach) or not 0 <= reach < 2**63:
            raise invalid(
                "window",
                got=f"{side} = {describe(reach)}",
                wanted="an integer >= 0, or None for unlimited",
                remedy=f"pass None instead of a negative number to leave the {side} side unlimited",
            )
    return window[0], window[1]


def check_scale(scale: float | None, head_dim: int) -> float:
    if scale is None:
        return head_dim**-0.5
    if not _is_number(scale) or not -LARGEST <= scale <= LARGEST:
        raise invalid(
            "scale",
            got=describe(scale),
            wanted="a number within float32's range, or None for head_dim ** -0.5",
            remedy="pass scale=float(...), or leave it out",
        )
    return float(scale)


def check_softcap(softcap: float) -> float:
    if not _is_number(softcap) or not (softcap == 0 or SMALLEST <= softcap <= LARGEST):
        raise invalid(
            "softcap",
            got=describe(softcap),
            wanted="0 for no cap, or a positive number within float32's range",
            remedy="pass softcap=0.0 to switch it off, or the positive cap of your model, such as 50.0",
        )
    return float(softcap)


def check_dropout_p(dropout_p: float) -> float:
    if not _is_number(dropout_p) or not 0 <= dropout_p < 1:
        raise invalid(
            "dropout_p",
            got=describe(dropout_p),
            wanted="a probability in [0, 1)",
            remedy="pass the probability of dropping an attention weight; 0.0 switches dropout off",
        )
    return float(dropout_p)


def check_flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise invalid(name, got=describe(value), wanted="True or False", remedy=f"pass {name}=bool(...)")


def check_count(name: str, value: Any, *, minimum: int) -> Any:
    """``value`` if it is an int (symbolic while torch traces) of at least ``minimum``."""
    if not _is_integer(value) or not minimum <= value < 2**63:
        raise invalid(
            name,
            got=describe(value),
            wanted=f"an integer >= {minimum}",
            remedy=f"pass {name} as a Python int, not as a tensor: reading a tensor would synchronise the device",
        )
    return value


def check_divides(name: str, number: Any, of: str, total: int) -> None:
    """Raises InvalidArgument unless ``number`` is a count that divides ``total``, the value of ``of``."""
    check_count(name, number, minimum=1)
    if total % number != 0:
        raise invalid(
            name, got=f"{number} beside {of} = {total}", wanted=f"a divisor of {of}", remedy=f"change {name} or {of}"
        )


def _is_integer(value: Any) -> bool:
    return isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, torch.SymFloat, torch.SymInt)) and not isinstance(value, bool)


def describe(value: Any) -> str:
    """A value as error texts show it."""
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {list(value.shape)}"
    try:
        text = repr(value)
    except ValueError:  # Python refuses to print integers of thousands of digits
        text = "a number too long to print"
    return f"{text if len(text) <= 80 else text[:77] + '...'} ({type(value).__name__})"
