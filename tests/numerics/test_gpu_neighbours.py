"""Results while another process has its turns on the GPU: programs are laid aside in the middle of their work."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from runners import HOPPER, HOPPER_MARKS, TRITON, Backend

import flashtile
from flashtile.testing import make_tensor

NUM_CALLS = 60
HEADS = 2**14
BUSY = """
import torch
x = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
print("ready", flush=True)
while True:
    torch.mm(x, x)
    torch.cuda.synchronize()
"""


@pytest.fixture
def neighbour() -> Iterator[None]:
    """A process that multiplies matrices on the same GPU."""
    with subprocess.Popen([sys.executable, "-c", BUSY], stdout=subprocess.PIPE, text=True) as busy:
        try:
            assert busy.stdout is not None and busy.stdout.readline() == "ready\n"
            yield
        finally:
            busy.kill()


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(
    "backend",
    [pytest.param(TRITON, id="triton", marks=pytest.mark.gpu), pytest.param(HOPPER, id="hopper", marks=HOPPER_MARKS)],
)
@pytest.mark.usefixtures("neighbour")
def test_many_short_calls(backend: Backend, head_dim: int) -> None:
    """Barriers of the Hopper backward once lay where its tiles did, and came to light when it was laid aside."""
    q, k, v = (
        make_tensor((1, length, HEADS, head_dim), dtype=torch.float16, device="cuda", seed=seed).requires_grad_()
        for seed, length in enumerate((2, 3, 3))
    )
    d_out = make_tensor(q.shape, dtype=torch.float16, device="cuda", seed=9)
    expected = torch.autograd.grad(flashtile.attention(q, k, v, causal=True, backend="naive"), (q, k, v), d_out)
    for _ in range(NUM_CALLS):
        out = flashtile.attention(q, k, v, causal=True, backend=backend.name)
        found = torch.autograd.grad(out, (q, k, v), d_out)
        torch.testing.assert_close(found, expected, atol=0.05, rtol=0.02)
