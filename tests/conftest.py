"""What every test shares: threads, hypothesis profiles, the rule for tests that need a GPU, and ``--failures-to``."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path

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


class FailuresFile:
    """Tells of a failure as soon as it is there: runs on a lent GPU may be stopped before pytest's summary."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            with self.path.open("a") as file:
                file.write(f"{report.nodeid} ({report.when})\n{report.longreprtext}\n\n")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--failures-to", type=Path, help="write each failure to the end of this file, at once")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--failures-to")
    if path is not None and not hasattr(config, "workerinput"):  # xdist's workers report to the one process that writes
        config.pluginmanager.register(FailuresFile(path))
