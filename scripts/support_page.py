"""Writes docs/support.md: what each backend takes on each kind of device, by asking them."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import flashtile

ROOT = Path(__file__).resolve().parent.parent
DEVICES = ("cpu", "a100", "h200", "mi300x")
_HEAD = """# What runs where

`make support` writes this page from what the backends answer to one small problem for each feature
(`flashtile.support_matrix`), and a test holds it to them. Any mix of the features works as well: the last row has all
at once. For one call of yours, with the reasons of every backend that declines it:

```bash
flashtile explain --device h200 --seqlen 4096 --heads 16 --head-dim 128 --causal --bias
```
"""


def page() -> str:
    """The whole page."""
    matrix = flashtile.support_matrix(DEVICES)
    legend = "\n".join(f"- {line}" for line in matrix.legend())
    return f"{_HEAD}\n{matrix.to_markdown()}\n\n{legend}\n"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "support.md", help="page to write")
    args = parser.parse_args(argv)
    args.out.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
