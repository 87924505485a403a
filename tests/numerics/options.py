"""Each option of a call alone, and each unusual shape and layout, as changes of a ``CallSpec``."""

from __future__ import annotations

from typing import Any

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (9, 4)},
    "left window": {"window": (9, None)},
    "grouped heads": {"heads_per_kv": 3},
    "softcap": {"softcap": 1.5},
    "ALiBi per head": {"alibi": "per head"},
    "ALiBi per sequence": {"alibi": "per sequence", "causal": True},
    "sinks": {"has_sinks": True},
    "dropout": {"dropout_p": 0.3},
    "mask": {"mask_axes": "bhqk"},
    "padding mask": {"mask_axes": "bk"},
    "negative scale": {"scale": -0.3},
    "zero scale": {"scale": 0.0, "causal": True},
    "wider values": {"head_dim": 8, "head_dim_v": 40},
    "narrower values": {"head_dim": 40, "head_dim_v": 3},
    "head_dim 100": {"head_dim": 100, "head_dim_v": 100},
    "head_dim 1": {"head_dim": 1, "head_dim_v": 1},
    "rows of one number": {"head_dim": 1, "head_dim_v": 1, "heads_kv": 1, "heads_per_kv": 1},
    "strides": {"strides_q": "every_other", "strides_k": "heads_first", "strides_v": "shared_heads"},
    "strides of d_out": {"strides_d_out": "heads_first"},
    "one query": {"lengths_q": (1, 1), "heads_per_kv": 4, "causal": True},
    "more queries than keys": {"lengths_q": (55, 55), "lengths_kv": (20, 20), "causal": True},
    "no keys": {"lengths_kv": (0, 0), "has_sinks": True},
    "packed": {"is_packed": True, "lengths_q": (7, 0, 33, 16), "lengths_kv": (9, 5, 33, 0)},
    "packed, unused rows": {"is_packed": True, "unused_rows": 9, "unused_length": 4, "causal": True, "bias_axes": "qk"},
}
OPTIONS |= {
    f"bias over {axes or 'nothing'}": {"bias_axes": axes} for axes in ("", "k", "qk", "bk", "hqk", "bhqk", "hq")
}
