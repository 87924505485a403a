"""Writes docs/performance.md and its pictures from the results of ``flashtile bench kernels``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from flashtile.bench import markdown, results
from flashtile.bench.results import KernelResults
from flashtile.report.kernels.picture import picture
from flashtile.report.kernels.run import Run

ROOT = Path(__file__).resolve().parent.parent


def kernel_results(folder: Path) -> dict[str, KernelResults]:
    """The kernel results in a folder by file name; other benchmarks' files are left out, damaged ones an error."""
    documents = {path.name: results.load(path) for path in sorted(folder.glob("*.json"))}
    return {name: found for name, found in documents.items() if isinstance(found, KernelResults)}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder to read")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "performance.md", help="page to write")
    args = parser.parse_args(argv)
    found = kernel_results(args.results)
    pictures = {name: drawn for name, each in found.items() if (drawn := picture(Run(name, each))) is not None}
    for name, drawn in pictures.items():
        (args.out.parent / markdown.picture_of(name)).write_text(drawn, encoding="utf-8")
    args.out.write_text(markdown.page(found, with_pictures=pictures), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
