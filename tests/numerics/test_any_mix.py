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
from runners import BACKENDS, RUNNERS, TILED_16BIT, Backend, Runner, check, nearest

from flashtile.testing import CallSpec, draw_spec

RANDOMS = st.randoms(use_true_random=False)


def check_drawn(runner: Runner, spec: CallSpec, rng: Random) -> None:
    """Checks the call with gradients of out and lse, mostly, or of one of them alone."""
    spec = nearest(runner, spec)
    has_d_out, has_d_lse = rng.choice(((True, True), (True, True), (True, False), (False, True)))
    note(f"{spec}, has_d_out={has_d_out}, has_d_lse={has_d_lse}")
    check(runner, spec, has_d_out=has_d_out, has_d_lse=has_d_lse)


@pytest.mark.parametrize("runner", RUNNERS)
@given(rng=RANDOMS)
def test_any_mix_of_options(runner: Runner, rng: Random) -> None:
    check_drawn(runner, draw_spec(rng), rng)


@given(rng=RANDOMS)
def test_any_mix_of_options_with_16_bit_products(rng: Random) -> None:
    check_drawn(TILED_16BIT, draw_spec(rng, dtypes=(torch.bfloat16,)), rng)


@pytest.mark.parametrize("backend", BACKENDS)
@given(rng=RANDOMS)
def test_plain_calls(backend: Backend, rng: Random) -> None:
    """Where the CPU's planner may choose torch's fused op."""
    lengths = (1, 2, 7, 31, 32, 33, 127, 257)
    spec = draw_spec(rng, lengths=lengths, layouts=("dense",), option_rate=0.0)
    spec = nearest(backend, replace(spec, head_dim_v=spec.head_dim, scale=rng.choice((None, 0.3, -0.5, 0.0))))
    note(repr(spec))
    check(backend, spec, has_d_lse=False)
