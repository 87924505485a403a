"""What ``import flashtile`` costs and brings, and that its public names are documented with examples that run."""

from __future__ import annotations

import doctest
import importlib
import inspect
import json
import re
import statistics
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import TypedDict

import pytest

import flashtile

PUBLIC = [
    "FallbackRefused",
    "FlashtileError",
    "InvalidArgument",
    "MissingExtra",
    "UnsupportedProblem",
    "attention",
    "attention_varlen",
    "attention_varlen_with_lse",
    "attention_with_lse",
    "doctor",
    "explain",
    "merge_attention",
    "support_matrix",
    "warmup",
]
NEVER_IMPORTED = ["triton", "matplotlib", "rich", "jinja2", "PIL", "transformers", "hypothesis", "pytest"]
SECONDS_ALLOWED = 0.3
NOISE_ALLOWANCE = 2.0  # the machine may be doing something else; the figure itself is printed
MEASURE = """
import json, sys, time
import torch
before = set(sys.modules)
begin = time.perf_counter()
import flashtile
seconds = time.perf_counter() - begin
print(json.dumps({"seconds": seconds, "new": sorted(set(sys.modules) - before), "all": sorted(sys.modules)}))
"""


class FreshImport(TypedDict):
    """What ``MEASURE`` prints."""

    seconds: float
    new: list[str]
    all: list[str]


@pytest.fixture(scope="module")
def fresh_imports() -> list[FreshImport]:
    """Five imports, each in a process of its own."""
    commands = [[sys.executable, "-W", "ignore", "-c", MEASURE]] * 5
    outputs = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for command in commands]
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def top_level(modules: list[str]) -> set[str]:
    return {name.split(".")[0] for name in modules}


@pytest.mark.parametrize("package", NEVER_IMPORTED)
def test_importing_flashtile_imports_no(package: str, fresh_imports: list[FreshImport]) -> None:
    assert package not in top_level(fresh_imports[0]["all"])


def test_importing_flashtile_imports_no_third_party_package_but_torch(
    fresh_imports: list[FreshImport],
) -> None:
    beyond_torch = top_level(fresh_imports[0]["new"]) - set(sys.stdlib_module_names)
    assert beyond_torch <= {"flashtile", "torch"}


def test_importing_flashtile_loads_no_kernel(fresh_imports: list[FreshImport]) -> None:
    loaded = [name for name in fresh_imports[0]["new"] if name.startswith("flashtile.backends.")]
    assert loaded and not [name for name in loaded if name.endswith((".launch", ".tiled", ".fused", ".formula"))]


def test_importing_flashtile_is_quick(fresh_imports: list[FreshImport]) -> None:
    seconds = statistics.median(run["seconds"] for run in fresh_imports)
    print(f"import flashtile: {seconds:.3f} s beyond torch (median of {len(fresh_imports)})")
    assert seconds < SECONDS_ALLOWED * NOISE_ALLOWANCE


def test_the_command_line_module_needs_no_extra() -> None:
    script = "import sys, flashtile.cli; print(*sorted(m for m in sys.modules if '.' not in m))"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, check=True)
    assert not {"triton", "matplotlib", "rich", "jinja2"} & set(done.stdout.split())


def test_all_is_exact() -> None:
    assert sorted(flashtile.__all__) == flashtile.__all__ == PUBLIC


def test_nothing_else_is_public() -> None:
    visible = {name for name, value in vars(flashtile).items() if not isinstance(value, types.ModuleType)}
    assert {name for name in visible if not name.startswith("_")} == set(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_is_documented_where_it_is_used_from(name: str) -> None:
    value = getattr(flashtile, name)
    assert not isinstance(value, types.ModuleType)
    text = inspect.getdoc(value)
    assert text and len(text.splitlines()[0]) <= 120
    assert text.splitlines()[0].endswith(".")
    if inspect.isfunction(value):
        assert "Example:" in text and ">>> " in text
        assert all(parameter.annotation is not parameter.empty for parameter in signature(value))
        assert inspect.signature(value).return_annotation is not inspect.Signature.empty


def signature(function: object) -> Iterator[inspect.Parameter]:
    assert callable(function)
    yield from inspect.signature(function).parameters.values()


@pytest.mark.parametrize("name", ["attention", "attention_with_lse", "attention_varlen", "attention_varlen_with_lse"])
def test_everything_after_the_tensors_is_keyword_only_and_documented(name: str) -> None:
    parameters = list(signature(getattr(flashtile, name)))
    assert [parameter.name for parameter in parameters[:3]] == ["q", "k", "v"]
    assert {parameter.kind for parameter in parameters[3:]} == {inspect.Parameter.KEYWORD_ONLY}
    documented = f"{flashtile.attention.__doc__}{flashtile.attention_varlen.__doc__}"
    assert not [p.name for p in parameters if not re.search(rf"^ {{8}}[\w, ]*\b{p.name}\b[\w, ]*:", documented, re.M)]


def test_dense_and_packed_functions_share_their_options_and_defaults() -> None:
    def options(name: str) -> dict[str, object]:
        return {p.name: p.default for p in signature(getattr(flashtile, name)) if p.default is not p.empty}

    assert (
        options("attention")
        == options("attention_with_lse")
        == options("attention_varlen")
        == options("attention_varlen_with_lse")
    )


@pytest.mark.parametrize("module", ["flashtile.functional", "flashtile.spec.merge"])
def test_the_examples_in_docstrings_run(module: str) -> None:
    examples = [test for test in doctest.DocTestFinder().find(importlib.import_module(module)) if test.examples]
    assert examples
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for example in examples:
        runner.run(example)
    assert runner.tries >= 3
    assert runner.failures == 0


def test_the_first_call_loads_no_compiler() -> None:
    """Loading torch's compiler takes seconds, so eager attention must not do it."""
    code = (
        "import sys, torch, flashtile\n"
        "q = torch.randn(1, 8, 2, 16, requires_grad=True)\n"
        "flashtile.attention(q, q, q, softcap=5.0).sum().backward()\n"
        "print([name for name in ('triton', 'torch._dynamo', 'torch._inductor') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
