"""Which of Triton's two assemblers makes our kernels, and that nobody else's are touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from variants_process import NEWEST, needs_newest, variants

OLDER, NEWER = "ptxas", "ptxas-blackwell"
OF_THE_OLDER = {"ptx_version": 88}


def states(cache: Path, triton_path: Path | None = None) -> dict[str, dict[str, Any]]:
    found = variants("assembler_states.py", cache=cache, triton_path=triton_path)
    assert len({each.pop("key") for each in found}) == 1, "the cache's key depends on who compiles first"
    return {each.pop("case"): each for each in found}


@needs_newest
def test_the_newest_triton_takes_the_older_one_for_ours_alone(tmp_path: Path) -> None:
    found = states(tmp_path, NEWEST)
    for case in ("inside", "twice inside"):
        assert found[case] == {"taken": OLDER, "options": OF_THE_OLDER}, case
    for case in ("once more", "inside, in another thread"):
        assert found[case]["taken"] == OLDER, case
    for case in ("outside", "behind", "behind an interrupt", "beside another thread"):
        assert found[case]["taken"] == NEWER, case
    assert found["another GPU"]["options"] == {}


@needs_newest
def test_who_has_chosen_one_keeps_it(tmp_path: Path) -> None:
    found = states(tmp_path, NEWEST)
    for case in ("chosen by a knob", "chosen by a variable"):
        assert found[case] == {"taken": NEWER, "options": {}}, case


def test_an_older_triton_is_left_alone(tmp_path: Path) -> None:
    for case, found in states(tmp_path).items():
        assert found["taken"] == OLDER, case
        assert not found["options"], case
