"""The picture of a kernel run: what is in it, and that any file name leaves it a well-formed document."""

from __future__ import annotations

from dataclasses import replace
from xml.etree import ElementTree

from measured import SPEEDS, kernels

from flashtile.bench.summary import peer_title
from flashtile.report.kernels.picture import picture
from flashtile.report.kernels.run import Run

SVG = "{http://www.w3.org/2000/svg}"


def texts(drawn: str) -> list[str]:
    return ["".join(element.itertext()) for element in ElementTree.fromstring(drawn).iter(f"{SVG}text")]


def test_every_peer_direction_and_head_dim_is_named() -> None:
    drawn = picture(Run("a.json", kernels()))
    assert drawn is not None
    found = texts(drawn)
    for word in (*map(peer_title, SPEEDS), "Forward, causal", "Backward, full", "Speed, head_dim 128", "1k", "4k"):
        assert word in found, word


def test_a_run_of_one_length_has_none() -> None:
    run = kernels()
    rows = tuple(row for row in run.rows if row.case.seqlen == 1024)
    assert picture(Run("a.json", replace(run, rows=rows))) is None
    assert picture(Run("a.json", replace(run, rows=()))) is None


def test_file_names_are_escaped() -> None:
    drawn = picture(Run('<b> & "c".json', kernels()))
    assert drawn is not None
    title = ElementTree.fromstring(drawn).find(f"{SVG}title")
    assert title is not None and title.text is not None and '<b> & "c".json' in title.text
