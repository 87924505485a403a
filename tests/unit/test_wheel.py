"""The wheel that users install: pure Python, complete, and needing torch alone."""

from __future__ import annotations

import shutil
import subprocess
import sys
from email.parser import Parser
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "src")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, because setuptools leaves its build directory beside the sources; needs no network."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(
                ROOT / name, source / name, ignore=shutil.ignore_patterns("*.egg-info", "__pycache__", "*.pyc")
            )
        else:
            shutil.copy(ROOT / name, source)
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--no-cache-dir", "--wheel-dir", str(target))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", *options, str(source)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    (built,) = target.iterdir()
    return built


def read(wheel: Path, suffix: str) -> str:
    with ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(suffix)]
        return archive.read(name).decode()


def test_it_is_pure_python_for_every_platform(wheel: Path) -> None:
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "Root-Is-Purelib: true" in read(wheel, ".dist-info/WHEEL")


def test_it_holds_every_source_file_and_nothing_else(wheel: Path) -> None:
    package = ROOT / "src" / "flashtile"
    files = [path for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    expected = {f"flashtile/{path.relative_to(package).as_posix()}" for path in files}
    assert {"flashtile/py.typed", "flashtile/__init__.py"} < expected
    assert any(name.endswith("/page.html") for name in expected)
    with ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert found == expected


def test_it_requires_torch_alone(wheel: Path) -> None:
    metadata = Parser().parsestr(read(wheel, ".dist-info/METADATA"))
    requirements = metadata.get_all("Requires-Dist", [])
    assert [requirement for requirement in requirements if "extra ==" not in requirement] == ["torch>=2.11"]
    assert metadata["Requires-Python"] == ">=3.10"


def test_it_installs_the_command_and_the_licence(wheel: Path) -> None:
    assert "flashtile = flashtile.cli:main" in read(wheel, ".dist-info/entry_points.txt")
    assert "Apache License" in read(wheel, "/LICENSE")
