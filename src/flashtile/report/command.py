"""``flashtile report``: results files in, one HTML page out."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from flashtile.bench import results
from flashtile.bench.files import write_whole
from flashtile.bench.results import IoResults, KernelResults, ModelResults, Results
from flashtile.errors import require
from flashtile.report import explanation, output, page
from flashtile.report.kernels import section as kernels
from flashtile.report.models import section as models
from flashtile.report.page import Section
from flashtile.report.traffic import section as traffic


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of ``flashtile report``."""
    parser.description = (
        "Writes one HTML page, whole in itself, from results files of 'flashtile bench': a summary, charts, tables "
        "that sort, where every figure comes from, and how the algorithm works. Several files become several sections."
    )
    parser.epilog = "example: flashtile report out/bench_kernels_cpu.json -o report.html"
    parser.add_argument(
        "files",
        nargs="*",
        type=Path,
        metavar="RESULTS.json",
        help="what 'flashtile bench' wrote; without any, the page explains and shows no figures",
    )
    parser.add_argument(
        "-o",
        "--out",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="default: report.html; an earlier page of flashtile's is replaced, any other file is not",
    )


def run(args: argparse.Namespace) -> int:
    """Writes the page.

    Returns:
        0.

    Raises:
        InvalidArgument: a file is not one of ours, or the page cannot be written; nothing is written then.
        MissingExtra: a package of the ``bench`` extra is not installed.
    """
    require("matplotlib", "jinja2", "markdown_it", "pygments", extra="bench")
    output.check("--out", args.out)
    write_whole(args.out, document(args.files))
    if not args.files:
        print("No results were given: the page explains, and shows no figures. They come from 'flashtile bench'.")
    print(f"Report: {args.out.resolve()}")
    return 0


def document(paths: Sequence[Path]) -> str:
    """The page of some results files.

    Args:
        paths: the files; one that is named twice counts once.

    Raises:
        InvalidResults: a file cannot be read, is none of ours, or is newer; the text names it.
        MissingExtra: a package of the ``bench`` extra is not installed.
    """
    unique = list({path.resolve(): path for path in paths}.values())
    found = [(name, results.load(path)) for name, path in zip(_names(unique), unique, strict=True)]
    found.sort(key=lambda item: _place(item[1]))
    sections = [_section(name, f"run-{number}", of) for number, (name, of) in enumerate(found, 1)]
    return page.render("report/report.html", sections=sections, explanation=explanation.html())


def _place(of: Results) -> tuple[bool, int]:
    """GPUs first; then what people ask about first. Runs alike stay in the order in which they were named."""
    return of.environment.device == "cpu", (ModelResults, KernelResults, IoResults).index(type(of))


def _section(source: str, anchor: str, of: Results) -> Section:
    if isinstance(of, ModelResults):
        return models.section(source, anchor, of)
    if isinstance(of, IoResults):
        return traffic.section(source, anchor, of)
    return kernels.section(source, anchor, of)


def _names(paths: Sequence[Path]) -> list[str]:
    """What the page calls each file: its name; where two have the same, the path as it was given."""
    counts = Counter(path.name for path in paths)
    return [path.name if counts[path.name] == 1 else str(path) for path in paths]
