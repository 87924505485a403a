"""Results files of all three benchmarks: whatever a document holds comes back, and no other kind does."""

from __future__ import annotations

import json
import tempfile
import types
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashtile.bench import documents, results
from flashtile.bench.cases import BenchCase
from flashtile.bench.documents import Document, InvalidResults
from flashtile.bench.results import (
    KINDS,
    IoResults,
    IoRow,
    KernelResults,
    KernelRow,
    LimitRow,
    ModelResults,
    ModelRow,
)
from flashtile.bench.timing import Timing

TEXT = st.text(alphabet="aé<&\"'\\\n\u2028", max_size=4)
AGREEING: dict[Any, tuple[dict[str, st.SearchStrategy[Any]], ...]] = {}
"""Fields that depend on each other or on what can be, for the classes that check theirs."""


def anything(annotation: Any) -> st.SearchStrategy[Any]:
    """Values of an annotation of ours."""
    if annotation in AGREEING:
        return st.one_of(*(fields_of(annotation, **some) for some in AGREEING[annotation]))
    if is_dataclass(annotation):
        return fields_of(annotation)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return st.one_of(*(st.none() if argument is type(None) else anything(argument) for argument in arguments))
    if origin is Literal:
        return st.sampled_from(arguments)
    if origin is tuple:
        return st.lists(anything(arguments[0]), max_size=2).map(tuple)
    if origin is dict:
        return st.dictionaries(TEXT, anything(arguments[1]), max_size=2)
    return {
        float: st.floats(allow_nan=False, allow_infinity=False),
        int: st.integers(0, 2**62),
        bool: st.booleans(),
        str: TEXT,
    }[annotation]


def fields_of(cls: Any, **chosen: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Instances, with some fields chosen."""
    hints = get_type_hints(cls)
    return st.builds(cls, **{one.name: chosen.get(one.name, anything(hints[one.name])) for one in fields(cls)})


AGREEING[Timing] = (dict.fromkeys(("median_ms", "q25_ms", "q75_ms"), st.floats(1e-9, 1e9)),)
AGREEING[BenchCase] = (dict.fromkeys(("head_dim", "seqlen", "batch", "heads_q", "heads_kv"), st.integers(1, 2**62)),)
TIMED = {"status": st.just("ok"), "timing": anything(Timing)}
UNTIMED = {"status": st.sampled_from(["refused", "out_of_memory"]), "timing": st.none()}
AGREEING.update(dict.fromkeys((KernelRow, ModelRow, IoRow), (TIMED, UNTIMED)))
AGREEING[LimitRow] = (
    {"status": st.just("failed"), "largest": st.none()},
    {"status": st.just("tried"), "largest": st.integers(0, 100)},
)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15)
@given(data=st.data())
def test_every_document_comes_back(kind: type[Document], data: st.DataObject) -> None:
    document = data.draw(anything(kind))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        documents.save(path, document)
        assert results.load(path) == results.load(path, kind) == document
        for other in set(KINDS) - {kind}:
            with pytest.raises(InvalidResults, match=rf"schema '{kind.schema()}'; wanted schema '{other.schema()}'"):
                results.load(path, other)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=3)
@given(data=st.data())
def test_a_damaged_document_is_refused_by_name(kind: type[Document], data: st.DataObject) -> None:
    """A null where none may be: the text names the place."""
    content = json.loads(documents.to_json(data.draw(anything(kind))))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "results.json"
        for name in set(content) - {"schema", "version", "counter", "no_counter_reason"}:
            path.write_text(json.dumps({**content, name: None}), encoding="utf-8")
            with pytest.raises(InvalidResults, match=rf"results\.{name} = None"):
                results.load(path)


def test_schemas_are_told_apart_by_name() -> None:
    assert [kind.schema() for kind in KINDS] == [f"flashtile.bench.{name}" for name in ("kernels", "models", "io")]
    assert {kind.version for kind in (KernelResults, ModelResults, IoResults)} == {1}


def test_a_foreign_file_is_told_every_schema(tmp_path: Path) -> None:
    path = tmp_path / "foreign.json"
    path.write_text('{"schema": "somebody.else"}')
    with pytest.raises(InvalidResults, match=r"'flashtile.bench.kernels' or schema 'flashtile.bench.models' or schema"):
        results.load(path)
