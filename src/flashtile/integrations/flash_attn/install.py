"""Puts flashtile's flash_attn under the name ``flash_attn``, for code that cannot be edited."""

from __future__ import annotations

import sys
from importlib import import_module

from flashtile.errors import NameTaken

_OURS = "flashtile.integrations.flash_attn"
_THEIRS = "flash_attn"
_MODULES = (
    "",
    ".bert_padding",
    ".flash_attn_interface",
    ".layers",
    ".layers.rotary",
    ".modules",
    ".modules.mha",
)


def install() -> None:
    """From now on ``import flash_attn`` gives flashtile's, in this process.

    Call it before anything imports flash_attn. Calling it again changes nothing. It adds no distribution, so code that
    asks ``importlib.metadata`` for flash-attn's version still finds none (Hugging Face transformers does).

    Raises:
        NameTaken: the real flash_attn is loaded.
    """
    for name in _loaded():
        if not sys.modules[name].__name__.startswith(_OURS):
            raise NameTaken(
                f"{name} is loaded already, from {getattr(sys.modules[name], '__file__', None)}, and code may hold on "
                "to its functions. Remedy: call install() before the first import of flash_attn, or do without one of "
                "the two"
            )
    sys.modules.update({_THEIRS + suffix: import_module(_OURS + suffix) for suffix in _MODULES})


def uninstall() -> None:
    """Undoes ``install``; what was imported meanwhile keeps working. Does nothing if nothing is installed."""
    for name in _loaded():
        if sys.modules[name].__name__.startswith(_OURS):
            del sys.modules[name]


def _loaded() -> list[str]:
    """The modules under flash_attn's name; None stands there for a module that must not be imported."""
    return [name for name in sys.modules if name.split(".")[0] == _THEIRS and sys.modules[name] is not None]
