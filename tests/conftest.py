"""What every test shares: the number of threads, hypothesis profiles, and the rule for tests that need a GPU."""

from __future__ import annotations

import os
from importlib import import_module

import pytest
import torch
from hypothesis import HealthCheck, settings

# The tensors of most tests are too small to share between threads, and ``pytest -n`` would oversubscribe the cores.
torch.set_num_threads(1)

# Triton's own functions are interpreted or compiled as it was when they were first imported, and libraries that some
# tests use import them; see ``numerics/runners.py``.
if not torch.cuda.is_available():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        for module in ("triton.language", "triton.experimental.gluon"):
            import_module(module)

# HYPOTHESIS_PROFILE picks one: "default" draws the same examples every time, "thorough" draws new ones, and many.
SLOW_DRAWS = (HealthCheck.too_slow, HealthCheck.data_too_large)
settings.register_profile("quick", deadline=None, max_examples=30, suppress_health_check=SLOW_DRAWS)
settings.register_profile(
    "default", deadline=None, max_examples=300, derandomize=True, suppress_health_check=SLOW_DRAWS
)
settings.register_profile("thorough", deadline=None, max_examples=5000, suppress_health_check=SLOW_DRAWS)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA GPU, and torch sees none here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)
