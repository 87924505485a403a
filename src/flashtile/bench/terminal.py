"""How the benchmarks' tables and sentences look in a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from flashtile.bench.baselines import FLASHTILE
from flashtile.bench.timing import Timing


def print_lines(lines: Iterable[str], console: Console) -> None:
    """Prints sentences as they are; nothing in them is markup."""
    for line in lines:
        console.print(Text(line), soft_wrap=True)


def print_whole(table: Table, console: Console) -> None:
    """Prints a table in its full width: a narrow terminal breaks lines, which is ugly; cut figures would be wrong."""
    table.width = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    console.print(table, crop=False)


def empty_table(title: str, words: Sequence[str], figures: Sequence[str]) -> Table:
    """A table with these headings; figures stand to the right."""
    table = Table(title=title, title_justify="left", title_style="bold", box=box.HORIZONTALS, show_lines=True)
    for heading in words:
        table.add_column(heading, no_wrap=True)
    for heading in figures:
        table.add_column(heading, justify="right", no_wrap=True)
    return table


def stacked(lines: Sequence[Sequence[str]]) -> list[Text]:
    """One cell for each column of lines that begin with the name of a peer; flashtile's are bold."""
    return [
        Text("\n").join(Text(line[idx], style="bold" if line[0] == FLASHTILE else "") for line in lines)
        for idx in range(len(lines[0]))
    ]


def spread(timing: Timing) -> str:
    """Half the distance of the quartiles, relative to the median."""
    return f"±{(timing.q75_ms - timing.q25_ms) / 2 / timing.median_ms:.0%}"
