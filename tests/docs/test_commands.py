"""Every command and every Python example in the documentation runs."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[tuple[str, str]]:
    return [
        (f"{page.relative_to(ROOT)}:{number}", text)
        for page in PAGES
        for number, (found, text) in enumerate(BLOCK.findall(page.read_text()))
        if found == language
    ]


SLOWEST_S = 1500
"""Of a command, on a CPU that has to do without instructions for bfloat16; with them 300 were enough."""


def commands() -> list[tuple[str, str]]:
    lines = [(place, line.split("#")[0].strip()) for place, text in blocks("bash") for line in text.splitlines()]
    return [(place, line) for place, line in lines if line]


@pytest.mark.parametrize(("place", "code"), blocks("python"), ids=[place for place, _ in blocks("python")])
def test_python_example_runs(place: str, code: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, f"{place}: {done.stderr}"


@pytest.mark.parametrize(("place", "line"), commands(), ids=[line for _, line in commands()])
def test_command_runs(place: str, line: str, tmp_path: Path) -> None:
    program, *arguments = shlex.split(line)
    if program == "make":
        # A target that would run this very suite is only expanded; what it expands to must exist.
        command = ["make", "--dry-run", "--directory", str(ROOT), *arguments]
    elif program == "flashtile":
        command = [sys.executable, "-m", "flashtile.cli", *arguments]
        if arguments[0] in ("bench", "demo"):
            command.append("--quick")
    elif program == "pip":
        command = [sys.executable, "-m", "pip", "--version"] if arguments[0] == "install" else []
    else:
        command = []
    assert command, f"{place}: this test does not know how to run {line!r}; teach it"
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False, timeout=SLOWEST_S)
    assert done.returncode == 0, f"{place}: {done.stdout}\n{done.stderr}"


def test_links_between_pages_point_at_files() -> None:
    missing = [
        f"{page.relative_to(ROOT)} -> {target}"
        for page in PAGES
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text())
        if not (page.parent / target).exists()
    ]
    assert not missing
