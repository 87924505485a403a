"""The exception tree: what each is, what it says, and that it survives the way home from another process."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest

import flashtile
from flashtile import FallbackRefused, FlashtileError, InvalidArgument, MissingExtra, UnsupportedProblem
from flashtile.errors import NameTaken

REASONS = {"cpu": ("runs on CPU tensors only", "and twice so"), "naive": ("is switched off",)}
EVERY_KIND: list[FlashtileError] = [
    InvalidArgument("q", got="3 axes", wanted="4 axes", remedy="reshape it"),
    UnsupportedProblem("No allowed backend takes this:", REASONS),
    FallbackRefused("Strict mode refuses:", REASONS),
    MissingExtra("rich", "bench"),
    NameTaken("flash_attn is loaded already"),
]


@pytest.mark.parametrize("error", EVERY_KIND, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_pickling_keeps_type_text_and_attributes(error: FlashtileError, protocol: int) -> None:
    found = pickle.loads(pickle.dumps(error, protocol=protocol))
    assert type(found) is type(error)
    assert str(found) == str(error)
    assert vars(found) == vars(error)
    assert {name: getattr(found, name) for name in public_attributes(error)} == public_attributes(error)


@pytest.mark.parametrize("error", EVERY_KIND, ids=lambda error: type(error).__name__)
@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy])
def test_copies_keep_type_text_and_attributes(
    error: FlashtileError, duplicate: Callable[[FlashtileError], FlashtileError]
) -> None:
    found = duplicate(error)
    assert (type(found), str(found), public_attributes(found)) == (type(error), str(error), public_attributes(error))


def public_attributes(error: FlashtileError) -> dict[str, object]:
    names = ("argument", "got", "wanted", "remedy", "headline", "reasons", "package", "extra")
    return {name: getattr(error, name) for name in names if hasattr(error, name)}


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (InvalidArgument, ValueError),
        (UnsupportedProblem, NotImplementedError),
        (FallbackRefused, UnsupportedProblem),
        (MissingExtra, ImportError),
    ],
)
def test_each_kind_is_caught_as_its_builtin_and_as_ours(kind: type[Exception], builtin: type[Exception]) -> None:
    assert issubclass(kind, builtin)
    assert issubclass(kind, FlashtileError)
    assert getattr(flashtile, kind.__name__) is kind


def test_the_text_of_a_wrong_argument_has_four_parts() -> None:
    error = InvalidArgument("window", got="-1", wanted="an integer >= 0", remedy="pass None for unlimited")
    assert str(error) == "window: got -1; wanted an integer >= 0. Remedy: pass None for unlimited"
    assert (error.argument, error.got, error.wanted, error.remedy) == (
        "window",
        "-1",
        "an integer >= 0",
        "pass None for unlimited",
    )


def test_the_text_of_an_unsupported_problem_has_each_backends_reasons() -> None:
    error = UnsupportedProblem("No allowed backend takes this:", REASONS)
    headline, cpu, naive = str(error).splitlines()
    assert headline == "No allowed backend takes this:"
    assert cpu.strip() == "cpu: runs on CPU tensors only; and twice so"
    assert naive.strip() == "naive: is switched off"


def test_the_reasons_are_a_copy() -> None:
    reasons = dict(REASONS)
    error = UnsupportedProblem("No:", reasons)
    reasons.clear()
    assert error.reasons == REASONS


def test_a_missing_extra_says_how_to_get_it() -> None:
    error = MissingExtra("rich", "bench")
    assert "rich" in str(error) and "pip install 'flashtile[bench]'" in str(error)
