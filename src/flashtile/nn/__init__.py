"""Attention modules, and what surrounds attention in a model: rotary embedding, padding, key/value caches."""

from flashtile.nn.alibi import alibi_slopes
from flashtile.nn.attention import FlashAttention, NaiveAttention
from flashtile.nn.kv_cache import KVCache
from flashtile.nn.memory import Memory
from flashtile.nn.multihead import MultiheadAttention
from flashtile.nn.padding import Packing
from flashtile.nn.rotary import Rotary, apply_rotary, rotary_cos_sin, xpos_decay

__all__ = [
    "FlashAttention",
    "KVCache",
    "Memory",
    "MultiheadAttention",
    "NaiveAttention",
    "Packing",
    "Rotary",
    "alibi_slopes",
    "apply_rotary",
    "rotary_cos_sin",
    "xpos_decay",
]
