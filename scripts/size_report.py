"""Prints the size of the package per folder, and every file and function that outgrew its room.

The limits are style.md's rule 13 of thumb: files near 500 lines, host functions near 60, kernels near 150. Going over a
soft limit is reported; going over twice the file limit fails, because by then an object is missing.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILE_LINES, FUNCTION_LINES, KERNEL_LINES = 500, 60, 150


def body_lines(node: ast.FunctionDef) -> int:
    """Lines of a function without its signature and docstring."""
    has_docstring = ast.get_docstring(node) is not None
    body = node.body[1:] if has_docstring and len(node.body) > 1 else node.body
    return (body[-1].end_lineno or body[-1].lineno) - body[0].lineno + 1


def is_kernel(node: ast.FunctionDef) -> bool:
    return any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)


def long_functions(path: Path) -> list[str]:
    """The functions of a file that are longer than their kind should be."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            limit = KERNEL_LINES if is_kernel(node) else FUNCTION_LINES
            if body_lines(node) > limit:
                found.append(
                    f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {body_lines(node)} lines ({limit})"
                )
    return found


def main() -> int:
    lines_by_folder: Counter[str] = Counter()
    remarks: list[str] = []
    too_long = False
    for path in sorted((ROOT / "src").rglob("*.py")):
        num_lines = len(path.read_text().splitlines())
        lines_by_folder[str(path.parent.relative_to(ROOT / "src"))] += num_lines
        remarks += long_functions(path)
        if num_lines > FILE_LINES:
            remarks.append(f"{path.relative_to(ROOT)} has {num_lines} lines ({FILE_LINES})")
            too_long |= num_lines > 2 * FILE_LINES
    for folder, num_lines in sorted(lines_by_folder.items()):
        print(f"{num_lines:6}  {folder}")
    print(f"{sum(lines_by_folder.values()):6}  in all")
    print(
        "\n".join(["", "Outgrown their room:", *(f"  {remark}" for remark in remarks)])
        if remarks
        else "\nNothing outgrew its room."
    )
    return int(too_long)


if __name__ == "__main__":
    sys.exit(main())
