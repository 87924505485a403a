"""The numerics contract to the letter, on problems large enough for the naive formula's error to be typical."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from runners import FUSED, RUNNERS, TILED_16BIT, Runner, check

from flashtile.testing import DTYPES, CallSpec

ORDINARY = CallSpec(lengths_q=(130,) * 2, lengths_kv=(201,) * 2, heads_kv=2, heads_per_kv=2, head_dim=64, head_dim_v=64)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (40, 10)},
    "softcap": {"softcap": 20.0, "spread": 4.0},
    "bias": {"bias_axes": "hqk"},
    "mask": {"mask_axes": "bhqk"},
    "alibi": {"alibi": "per head"},
    "sinks": {"has_sinks": True},
    "dropout": {"dropout_p": 0.2},
    "large logits": {"spread": 8.0},
    "all at once": {
        "window": (90, 4),
        "softcap": 15.0,
        "bias_axes": "qk",
        "bias_hides": 0.1,
        "mask_axes": "bk",
        "alibi": "per sequence",
        "has_sinks": True,
        "dropout_p": 0.1,
    },
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("runner", RUNNERS)
def test_error_is_at_most_twice_the_naive_formulas(runner: Runner, options: dict[str, Any], dtype: torch.dtype) -> None:
    check(runner, replace(ORDINARY, dtype=dtype, bias_dtype=dtype, **options), is_small=False)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_16_bit_products_stay_in_the_budget(options: dict[str, Any]) -> None:
    spec = replace(ORDINARY, dtype=torch.bfloat16, bias_dtype=torch.bfloat16, **options)
    check(TILED_16BIT, spec, is_small=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("causal", [False, True])
def test_torchs_fused_op_stays_in_the_budget(causal: bool, dtype: torch.dtype) -> None:
    spec = replace(ORDINARY, lengths_kv=ORDINARY.lengths_q, causal=causal, dtype=dtype)
    check(FUSED, spec, is_small=False, has_d_lse=False)
