"""Consumers that take turns on the tensor cores: one issues its products while another is at its softmax.

A turn is passed around by named barriers of 256 threads: 128 that wait for it and 128 that pass it on.
"""

from __future__ import annotations

from triton.experimental.gluon import language as gl

from flashtile.backends.hopper.primitives.gluon_compat import constexpr_function, inline_asm, jit
from flashtile.backends.hopper.primitives.layouts import number_layout

FIRST_BARRIER = 8
"""The hardware has 16 named barriers; Triton takes the first ones, one for each partition."""


@constexpr_function
def next_in_turn(part, num_parts, is_in_turn):
    """The consumer after ``part``; ``None`` if they take no turns."""
    return (part + 1) % num_parts if is_in_turn else None


@jit
def first_turn(part: gl.constexpr, NUM_PARTS: gl.constexpr):
    """Before any other: the last consumer passes a turn to the first one."""
    if part == NUM_PARTS - 1:
        pass_turn(0)


@jit
def take_turn(part: gl.constexpr):
    """Waits until the consumer before this one has passed the turn on."""
    _run(_sync(part))


@jit
def pass_turn(part: gl.constexpr):
    """Passes the turn on to consumer ``part``."""
    _run(_arrive(part))


@jit
def _run(ASM: gl.constexpr):
    per_thread = gl.arange(0, 128, number_layout(4))
    inline_asm(ASM, "=r,r", [per_thread], dtype=gl.int32, is_pure=False, pack=1)


@constexpr_function
def _sync(part):
    return f"bar.sync {FIRST_BARRIER + part}, 256; mov.b32 $0, $1;"


@constexpr_function
def _arrive(part):
    return f"bar.arrive {FIRST_BARRIER + part}, 256; mov.b32 $0, $1;"
