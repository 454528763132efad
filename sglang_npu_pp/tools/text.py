"""Plain-text tables for the command line."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

WIDTH = 110  # columns that a table may take; the last cell of a row is wrapped to fit
_LEAST = 40  # columns that the last cell gets in any case


def table(rows: Iterable[Sequence[str]], indent: str = "") -> str:
    """Rows of equally many cells, left-aligned; the last column is wrapped."""
    rows = [list(row) for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    used = len(indent) + sum(width + 2 for width in widths)
    lines: list[str] = []
    for *cells, last in rows:
        begin = indent + "".join(cell.ljust(width + 2) for cell, width in zip(cells, widths, strict=True))
        first, *more = textwrap.wrap(last, max(_LEAST, WIDTH - used), break_on_hyphens=False) or [""]
        lines += [(begin + first).rstrip(), *(" " * used + line for line in more)]
    return "\n".join(lines)
