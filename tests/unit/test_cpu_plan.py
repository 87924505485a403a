"""Which CPU kernel is planned for which problem."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from flashtile.backends.cpu import plan as cpu
from flashtile.spec import devices
from flashtile.spec.sizes import pose

WITH_FAST_BFLOAT16 = replace(devices.DEVICES["cpu"], flops_per_s_16bit=8.0, flops_per_s_32bit=4.0)
WITHOUT = replace(WITH_FAST_BFLOAT16, flops_per_s_16bit=4.0)
LONG: dict[str, Any] = {"seqlen_q": cpu.LONG, "heads_q": cpu.FEW_HEADS, "head_dim": cpu.WIDE}


@pytest.mark.parametrize(
    ("sizes", "kernel", "tiles"),
    [
        ({}, "tiled_16bit", cpu.TILES_16BIT),
        ({"causal": True, "softcap": 3.0, "dropout_p": 0.1}, "tiled_16bit", cpu.TILES_16BIT),
        ({"heads_q": cpu.FEW_HEADS + 1}, "tiled_16bit", cpu.TILES_16BIT_MANY_HEADS),
        ({"heads_q": 1, "seqlen_kv": cpu.LONG * cpu.FEW_HEADS}, "tiled_16bit", cpu.TILES_16BIT),
        ({"heads_q": cpu.FEW_HEADS - 1}, "torch_fused", cpu.TILES),
        ({"seqlen_kv": cpu.LONG - 1}, "torch_fused", cpu.TILES),
        ({"head_dim": cpu.WIDE - 1}, "torch_fused", cpu.TILES),
        ({"dtype": torch.float16}, "torch_fused", cpu.TILES),
        ({"dtype": torch.float32}, "torch_fused", cpu.TILES),
        ({"dtype": torch.float32, "softcap": 3.0}, "tiled", cpu.TILES),
        ({"seqlen_kv": cpu.LONG - 1, "softcap": 3.0}, "tiled", cpu.TILES),
    ],
    ids=str,
)
def test_the_kernel_and_its_tiles(sizes: dict[str, Any], kernel: str, tiles: object) -> None:
    plan = cpu.plan(pose(**LONG | sizes), WITH_FAST_BFLOAT16)
    for direction in (plan.forward, plan.backward):
        assert (direction.kernel, direction.tiles) == (kernel, tiles)


def test_slow_bfloat16_is_not_multiplied_in_tiles() -> None:
    assert cpu.plan(pose(**LONG), WITHOUT).forward.kernel == "torch_fused"
