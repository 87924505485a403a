"""Results files of any kind: JSON with a versioned schema, written atomically and checked against it when read."""

from __future__ import annotations

import json
import math
import types
from collections.abc import Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from flashtile.bench.environment import Environment
from flashtile.bench.files import write_whole
from flashtile.errors import InvalidArgument


class InvalidResults(InvalidArgument):
    """A file that is no results file of ours, is damaged, or comes from a newer flashtile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """What every results file records of its run; each benchmark's is a subclass with rows of its own."""

    benchmark: ClassVar[str]
    """``flashtile bench BENCHMARK`` writes such files."""
    version: ClassVar[int]
    """Raised whenever a field is removed or changes its meaning, or one is added that older files need: they are read
    as having the default of each field that they lack."""

    environment: Environment
    created_utc: str
    """ISO 8601."""
    budget_s: float
    """Time for each case."""
    is_complete: bool
    """False while the run goes on, and for good if it was interrupted."""

    @classmethod
    def schema(cls) -> str:
        """What the file calls itself."""
        return f"flashtile.bench.{cls.benchmark}"


D = TypeVar("D", bound=Document)


def to_json(document: Document) -> str:
    """The text that ``load`` reads."""
    head = {"schema": document.schema(), "version": document.version}
    return json.dumps({**head, **asdict(document)}, indent=1, allow_nan=False) + "\n"


def save(path: Path, document: Document) -> None:
    """Writes the file whole or not at all: readers and a Ctrl-C never see half of it."""
    write_whole(path, to_json(document))


def load(path: Path, kinds: Sequence[type[D]]) -> D:
    """Reads a results file of one of ``kinds`` and checks it.

    Raises:
        InvalidResults: the file cannot be read, is none of these, lacks or has unknown fields, contradicts itself, or
            is newer.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise _invalid(path, f"{type(error).__name__}: {error}", "a readable JSON file") from error
    schema = content.pop("schema", None) if isinstance(content, dict) else None
    kind = next((kind for kind in kinds if kind.schema() == schema), None)
    if kind is None:
        raise _invalid(path, f"schema {schema!r}", " or ".join(f"schema {kind.schema()!r}" for kind in kinds))
    version = content.pop("version", None)
    if type(version) is not int or version != kind.version:
        is_newer = type(version) is int and version > kind.version
        remedy = "upgrade flashtile to read it" if is_newer else "run the benchmark again with this flashtile"
        raise _invalid(path, f"schema version {version!r}", f"version {kind.version}", remedy)
    try:
        return _decode(kind, content, "results")
    except _Mismatch as mismatch:
        remedy = f"write it anew with 'flashtile bench {kind.benchmark} --out FILE'"
        raise _invalid(path, mismatch.got, mismatch.wanted, remedy) from None


def _invalid(
    path: Path, got: str, wanted: str, remedy: str = "name a file that 'flashtile bench' wrote"
) -> InvalidResults:
    return InvalidResults(str(path), got=got, wanted=wanted, remedy=remedy)


# --- from JSON to the dataclasses, by their annotations ---------------------------------------------------------------


class _Mismatch(Exception):
    def __init__(self, got: str, wanted: str) -> None:
        self.got = got
        self.wanted = wanted
        super().__init__(got, wanted)


def _decode(annotation: Any, value: Any, where: str) -> Any:
    """``value`` as the annotation has it; raises _Mismatch naming the place otherwise."""
    if is_dataclass(annotation):
        return _decode_dataclass(annotation, value, where)
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        wanted = next(argument for argument in arguments if argument is not type(None))
        return None if value is None else _decode(wanted, value, where)
    if origin is Literal:
        if value in arguments and isinstance(value, str):
            return value
        raise _Mismatch(f"{where} = {_shown(value)}", f"one of {', '.join(arguments)}")
    if origin is tuple and isinstance(value, list):
        return tuple(_decode(arguments[0], item, f"{where}[{idx}]") for idx, item in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {name: _decode(arguments[1], item, f"{where}[{name!r}]") for name, item in value.items()}
    if annotation is float and type(value) in (int, float) and math.isfinite(value):
        return float(value)
    if annotation in (int, bool, str) and type(value) is annotation and (annotation is not int or _is_int64(value)):
        return value
    wanted = {tuple: "a list", dict: "an object", float: "a finite number"}.get(origin or annotation)
    raise _Mismatch(f"{where} = {_shown(value)}", wanted or f"a {annotation.__name__}")


def _decode_dataclass(cls: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise _Mismatch(f"{where} = {_shown(value)}", "an object")
    known = {field.name for field in fields(cls)}
    needed = {field.name for field in fields(cls) if field.default is MISSING}
    for problem, names in (("without", needed - value.keys()), ("with the unknown", value.keys() - known)):
        if names:
            raise _Mismatch(f"{where} {problem} {', '.join(sorted(names))}", f"the fields of {cls.__name__}")
    hints = get_type_hints(cls)
    decoded = {name: _decode(hints[name], item, f"{where}.{name}") for name, item in value.items()}
    try:
        return cls(**decoded)
    except ValueError as error:  # what a row of ours checks of itself
        raise _Mismatch(f"{where} {error}", "fields that agree") from None


def _is_int64(value: Any) -> bool:
    """Nothing that is counted has more digits, and arithmetic with floats fails on numbers that have many more."""
    return -(2**63) <= value < 2**63


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
