"""Plain-text tables, for the command line and the log."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

WIDTH = 110  # columns that a table may take; the last cell of a row is wrapped to fit
_LEAST = 40  # columns that the last cell gets in any case


def table(rows: Iterable[Sequence[str]], indent: str = "") -> str:
    """Rows of equally many cells, left-aligned; the last column is wrapped."""
    rows = [list(row) for row in rows]
    widths = _widths([row[:-1] for row in rows])
    used = len(indent) + sum(width + 2 for width in widths)
    lines: list[str] = []
    for *cells, last in rows:
        begin = indent + "".join(cell.ljust(width + 2) for cell, width in zip(cells, widths, strict=True))
        first, *more = textwrap.wrap(last, max(_LEAST, WIDTH - used), break_on_hyphens=False) or [""]
        lines += [(begin + first).rstrip(), *(" " * used + line for line in more)]
    return "\n".join(lines)


def number_table(rows: Iterable[Sequence[str]], left: int = 0) -> str:
    """A head, a rule, and rows of numbers; the first `left` columns are text, aligned left."""
    rows = [list(row) for row in rows]
    widths = _widths(rows)
    lines = [
        "  ".join(
            cell.ljust(width) if column < left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def _widths(rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(map(len, column)) for column in zip(*rows, strict=True)]
