"""Tests that take a backend or a kernel run with its device as torch's default, so none of them names a device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def default_device(request: pytest.FixtureRequest) -> Iterator[None]:
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    under_test = parameters.get("backend") or parameters.get("runner")
    with torch.device("cpu" if under_test is None else under_test.device):
        yield
