"""The environment variables: read at each call, checked, and listed where they are documented."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import flashtile
from flashtile import InvalidArgument, settings

FLAGS = {"FLASHTILE_STRICT": settings.is_strict, "FLASHTILE_CHECK_VALUES": settings.checks_values_on_gpu}


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize(("value", "expected"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_flags_are_zero_or_one(name: str, value: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(name, raising=False)
    if value is not None:
        monkeypatch.setenv(name, value)
    assert FLAGS[name]() is expected


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("value", ["yes", "true", "2", " 1", "-1", "on"])
def test_anything_else_is_an_error_that_names_the_variable(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidArgument) as caught:
        FLAGS[name]()
    assert caught.value.argument == name
    assert repr(value) in caught.value.got
    assert name in caught.value.remedy


@pytest.mark.parametrize(
    ("value", "expected"),
    [(None, "auto"), ("", "auto"), ("auto", "auto"), ("naive", "naive"), ("nonsense", "nonsense")],
)
def test_the_default_backend_is_what_the_variable_says(
    value: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLASHTILE_BACKEND", raising=False)
    if value is not None:
        monkeypatch.setenv("FLASHTILE_BACKEND", value)
    assert settings.default_backend() == expected


@pytest.mark.parametrize(("value", "expected"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_triton_is_interpreted_if_its_own_variable_is_1(
    value: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if value is not None:
        monkeypatch.setenv("TRITON_INTERPRET", value)
    assert settings.interprets_triton() is expected


def test_every_variable_that_the_code_reads_is_in_the_table() -> None:
    package = Path(flashtile.__file__).parent
    read = {
        name
        for path in package.rglob("*.py")
        for name in re.findall(r"FLASHTILE_[A-Z_]+", path.read_text(encoding="utf-8"))
    }
    documented = set(re.findall(r"``(FLASHTILE_[A-Z_]+)``", settings.__doc__ or ""))
    assert read == documented
    assert len(documented) <= 6


def test_only_settings_reads_the_environment() -> None:
    """Of what a call of a public function runs; the tools above it may look at the machine."""
    package = Path(flashtile.__file__).parent
    names = ("errors", "settings", "functional", "ops", "dispatch")
    core = [*(package / f"{name}.py" for name in names), *package.glob("spec/*.py"), *package.glob("backends/**/*.py")]
    readers = [
        path.relative_to(package).as_posix()
        for path in core
        if re.search(r"\bos\.environ\b|\bgetenv\b", path.read_text(encoding="utf-8"))
    ]
    assert readers == ["settings.py"]
