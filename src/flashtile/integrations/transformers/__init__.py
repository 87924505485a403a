"""Hugging Face transformers on flashtile: ``register()`` once, then ``attn_implementation="flashtile"``."""

from flashtile.integrations.transformers.registration import NAME, register

__all__ = ["NAME", "register"]
