"""Random calls, any shapes, strides, dtype and mix of options, against the float64 oracle: results and all gradients.

A failing case prints its ``CallSpec``; ``check(runner, CallSpec(...))`` runs it again.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
import torch
from hypothesis import given, note
from hypothesis import strategies as st
from runners import FUSED, RUNNERS, TILED_16BIT, Runner, check

from flashtile.testing import draw_spec

RANDOMS = st.randoms(use_true_random=False)


@pytest.mark.parametrize("runner", RUNNERS)
@given(rng=RANDOMS)
def test_any_mix_of_options(runner: Runner, rng: Random) -> None:
    spec = draw_spec(rng)
    note(repr(spec))
    check(runner, spec)


@given(rng=RANDOMS)
def test_any_mix_of_options_with_16_bit_products(rng: Random) -> None:
    spec = draw_spec(rng, dtypes=(torch.bfloat16,))
    note(repr(spec))
    check(TILED_16BIT, spec)


@given(rng=RANDOMS)
def test_plain_calls_on_torchs_fused_op(rng: Random) -> None:
    lengths = (1, 2, 7, 31, 32, 33, 127, 257)
    spec = draw_spec(rng, lengths=lengths, min_batch=1, layouts=("dense",), option_rate=0.0)
    is_square = spec.lengths_q == spec.lengths_kv
    spec = replace(spec, head_dim_v=spec.head_dim, causal=spec.causal and is_square)
    note(repr(spec))
    check(FUSED, spec, has_d_lse=False)
