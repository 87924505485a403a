"""Results files: one JSON document per run, with a versioned schema, written atomically and checked when read."""

from __future__ import annotations

import json
import math
import os
import types
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from flashtile.bench.cases import BenchCase
from flashtile.bench.environment import Environment
from flashtile.bench.timing import Timing
from flashtile.errors import InvalidArgument

SCHEMA = "flashtile.bench.kernels"
VERSION = 1
"""Raised whenever a field is removed or changes its meaning, or one is added that older files need: they are read as
having the default of each field that they lack."""

Status = Literal["ok", "unavailable", "refused", "out_of_memory", "wrong_result"]


class InvalidResults(InvalidArgument):
    """A file that is no results file of ours, is damaged, or comes from a newer flashtile."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Ceilings:
    """What the device reached in the same run: large square matrix products, and a large copy."""

    matmul_tflops: dict[str, float]
    """By dtype, in 10**12 FLOP/s."""
    copy_gb_per_s: float
    """10**9 bytes/s, read plus written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelRow:
    """One peer on one case. Everything from ``timing`` to ``speedup_over_sdpa`` is None unless the status is ok."""

    case: BenchCase
    peer: str
    status: Status
    reason: str | None = None
    """Why there is no timing; None exactly if the status is ok."""
    timing: Timing | None = None
    tflops: float | None = None
    """Useful operations of the case (``BenchCase.flops``) over the median."""
    percent_of_ceiling: float | None = None
    """``tflops`` against the measured matrix product in the case's dtype."""
    peak_extra_bytes: int | None = None
    """Most memory held at one time beyond inputs. Of the direction's own call; for ``backward``, of forward and
    backward together, because what the forward leaves for the backward is its cost too."""
    difference: float | None = None
    """Largest difference from flashtile's result, or if it failed from the first peer's that is there, over that
    result's largest magnitude. Files of before the option axis have it from the naive formula's."""
    speedup_over_naive: float | None = None
    """Median of the naive formula over this median: above 1 is faster. None if naive has no timing."""
    speedup_over_sdpa: float | None = None
    kernel: str | None = None
    """Of flashtile rows: backend and kernel, for example ``cpu/tiled``."""
    kernel_reason: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelResults:
    """One run of ``flashtile bench kernels``."""

    environment: Environment
    created_utc: str
    """ISO 8601."""
    budget_s: float
    """Time for each case."""
    ceilings: Ceilings
    missing_peers: dict[str, str]
    """Peers that take none of the cases on this machine, with the reason; they have no rows."""
    is_complete: bool
    """False while the run goes on, and for good if it was interrupted."""
    rows: tuple[KernelRow, ...]


def to_json(results: KernelResults) -> str:
    """The document that ``load`` reads."""
    return json.dumps({"schema": SCHEMA, "version": VERSION, **asdict(results)}, indent=1, allow_nan=False) + "\n"


def save(path: Path, results: KernelResults) -> None:
    """Writes the file whole or not at all: readers and a Ctrl-C never see half of it."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_text(to_json(results), encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def load(path: Path) -> KernelResults:
    """Reads and checks a results file.

    Raises:
        InvalidResults: the file cannot be read, is no results file, lacks or has unknown fields, or is newer.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _invalid(path, f"{type(error).__name__}: {error}", "a readable JSON file") from error
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        found = document.get("schema") if isinstance(document, dict) else None
        raise _invalid(path, f"schema {found!r}", f"schema {SCHEMA!r}")
    version = document.get("version")
    if type(version) is not int or version != VERSION:
        is_newer = type(version) is int and version > VERSION
        remedy = "upgrade flashtile to read it" if is_newer else "run the benchmark again with this flashtile"
        raise _invalid(path, f"schema version {version!r}", f"version {VERSION}", remedy)
    content = {name: value for name, value in document.items() if name not in ("schema", "version")}
    try:
        return _decode(KernelResults, content, "results")
    except _Mismatch as mismatch:
        raise _invalid(path, mismatch.got, mismatch.wanted) from None


def _invalid(
    path: Path, got: str, wanted: str, remedy: str = "write it anew with 'flashtile bench kernels --out FILE'"
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
    if annotation in (int, bool, str) and type(value) is annotation:
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
    decoded = cls(**{name: _decode(hints[name], item, f"{where}.{name}") for name, item in value.items()})
    if isinstance(decoded, KernelRow) and (decoded.status == "ok") == (decoded.timing is None):
        raise _Mismatch(f"{where} with status {decoded.status} and timing {decoded.timing}", "a timing exactly if ok")
    return decoded


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
