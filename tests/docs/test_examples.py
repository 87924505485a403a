"""Every script under examples/ runs on a CPU; each compares itself with what it replaces."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).resolve().parents[2] / "examples").glob("*.py"))
NEEDS = {"transformers_model.py": "transformers"}


@pytest.mark.parametrize("script", EXAMPLES, ids=[script.name for script in EXAMPLES])
def test_example_runs(script: Path, tmp_path: Path) -> None:
    needed = NEEDS.get(script.name)
    if needed is not None and find_spec(needed) is None:
        pytest.skip(f"needs the extra: pip install 'flashtile[{needed}]'")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, cwd=tmp_path, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "flashtile" in done.stdout
