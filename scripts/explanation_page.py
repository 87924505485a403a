"""Writes docs/how_it_works.md from the template and the numbers in ``flashtile.report``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from flashtile.report import explanation

ROOT = Path(__file__).resolve().parent.parent


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "how_it_works.md", help="page to write")
    args = parser.parse_args(argv)
    args.out.write_text(explanation.markdown(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
