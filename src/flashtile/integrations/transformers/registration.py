"""Makes ``attn_implementation="flashtile"`` known to transformers: attention, masks and the name itself."""

from __future__ import annotations

import functools
from typing import Any

from flashtile.errors import MissingExtra, UnsupportedProblem
from flashtile.integrations.transformers.attention import attention_forward
from flashtile.integrations.transformers.visibility import attention_mask

NAME = "flashtile"
KEY = "exact_tiles"
"""What a model's config holds: transformers takes any name with "flash" in it for the flash_attn package, loads that
from the hub, and withholds masks that flashtile serves."""
OLDEST = (5, 4)
_ROUTES = ("_supports_sdpa", "_supports_flash_attn", "_supports_flex_attn", "_supports_attention_backend")


def register() -> None:
    """Lets every model of this process be made or loaded with ``attn_implementation="flashtile"``.

    Padding on either side, packed sequences, sliding windows, softcap, sinks, relative biases, grouped heads, dropout
    and key/value caches are served; a model that passes an option that flashtile does not know raises, and so does
    asking for ``output_attentions``. Calling it again changes nothing.

    Raises:
        MissingExtra: transformers is not installed.
        UnsupportedProblem: this version of transformers is too old; later, when a model is made: its class does not
            call the attention interface, so that the choice could not take effect.

    Example:
        >>> from flashtile.integrations import transformers as flashtile_transformers
        >>> flashtile_transformers.register()
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1)
        >>> model = LlamaForCausalLM._from_config(config, attn_implementation="flashtile")
    """
    try:
        import transformers
    except ImportError:
        raise MissingExtra("transformers", "transformers") from None
    if tuple(map(int, transformers.__version__.split(".")[:2])) < OLDEST:
        raise UnsupportedProblem(
            f"flashtile knows the attention interface of transformers {OLDEST[0]}.{OLDEST[1]} and newer, and this is "
            f"{transformers.__version__}. Remedy: pip install 'flashtile[transformers]'",
            {},
        )
    for name in (NAME, KEY):
        transformers.AttentionInterface.register(name, attention_forward)
        transformers.AttentionMaskInterface.register(name, attention_mask)
    check = transformers.PreTrainedModel._check_and_adjust_attn_implementation
    if not hasattr(check, "knows_flashtile"):
        transformers.PreTrainedModel._check_and_adjust_attn_implementation = _knowing_flashtile(check)


def _knowing_flashtile(check: Any) -> Any:
    """transformers' check of an implementation's name, with ours settled before it."""

    @functools.wraps(check)
    def adjusted(self: Any, attn_implementation: str | None, *args: Any, **kwargs: Any) -> str:
        if attn_implementation not in (NAME, KEY):
            return check(self, attn_implementation, *args, **kwargs)
        if not any(getattr(self, route, False) for route in _ROUTES) or not self._can_set_attn_implementation():
            raise UnsupportedProblem(
                f"{type(self).__name__} computes attention itself, not through transformers' attention interface, so "
                f'attn_implementation="{NAME}" could not take effect. Remedy: attn_implementation="eager".',
                {},
            )
        return KEY

    adjusted.knows_flashtile = True  # type: ignore[attr-defined]
    return adjusted
