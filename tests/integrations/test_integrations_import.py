"""What the integrations load, and that the examples in their docstrings run."""

from __future__ import annotations

import doctest
import importlib
import subprocess
import sys
from importlib.util import find_spec

import pytest

MODULES = ["flashtile.integrations.sdpa", "flashtile.integrations.transformers"]
EAGER_CALL = """
import torch
from torch.nn import functional as F
from flashtile.integrations import sdpa
q = torch.randn(1, 2, 8, 16, requires_grad=True)
with sdpa.override():
    F.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()
"""


def loaded_by(code: str) -> set[str]:
    """Of what is slow to load, or optional, or ours and not asked for: what the code loads."""
    watched = ["transformers", "torch._dynamo", "torch._inductor", "triton"]
    program = f"{code}\nimport sys; print(*(name for name in {watched} if name in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(done.stdout.split())


@pytest.mark.parametrize("module", MODULES)
def test_importing_one_loads_neither_transformers_nor_a_compiler(module: str) -> None:
    assert loaded_by(f"import {module}") == set()


def test_an_eager_call_in_a_block_loads_no_compiler() -> None:
    assert loaded_by(EAGER_CALL) == set()


def test_flashtile_itself_loads_none_of_them() -> None:
    code = "import sys, flashtile; print(*(name for name in sys.modules if name.startswith('flashtile.integrations')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("module", [f"{MODULES[0]}.interception", f"{MODULES[1]}.registration"])
def test_the_examples_in_docstrings_run(module: str) -> None:
    if "transformers" in module and find_spec("transformers") is None:
        pytest.skip("needs the extra: pip install 'flashtile[transformers]'")
    result = doctest.testmod(importlib.import_module(module))
    assert result.attempted >= 4 and result.failed == 0
