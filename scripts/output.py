"""What scripts print: a console and tables, all alike."""

from __future__ import annotations

import sys

from rich.console import Console
from rich.table import Table


def plain_console(width: int = 140) -> Console:
    """For standard output. `width`: where that is a file, which rich would take for 80 columns."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else width)


def number_table(title: str | None, *columns: str, left: int = 1) -> Table:
    """Without rows yet. The first `left` columns are text, the others numbers, aligned right on one line."""
    table = Table(title=title)
    for index, name in enumerate(columns):
        is_number = index >= left
        table.add_column(name, justify="right" if is_number else "left", no_wrap=is_number)
    return table
