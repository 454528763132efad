"""`python -m sglang_npu_pp settings`: every environment variable, its default and its meaning.

From the `Settings` dataclass; docs/settings.md is the output of `--markdown`.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from ..settings import Settings
from ..text import table

_HEADER = ("variable", "default", "meaning")


def add(commands: Any) -> None:
    """Add the command to an argparse parser's commands."""
    parser = commands.add_parser(
        "settings",
        help="every environment variable: default, meaning",
        description="Prints every environment variable of this package with its default and its meaning. "
        "`doctor` checks the values that are set.",
    )
    parser.add_argument("--markdown", action="store_true", help="as docs/settings.md has it")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    print(markdown() if options.markdown else text())
    return 0


def text() -> str:
    """For the terminal: a table."""
    return table([_HEADER, *_rows()])


def markdown() -> str:
    """docs/settings.md."""
    lines = [
        "# Settings",
        "",
        "<!-- Written by `python -m sglang_npu_pp settings --markdown > docs/settings.md`; do not edit. -->",
        "",
        "Environment variables, read once at start. A value that cannot be used, or an unknown variable with "
        "this prefix, stops the start with an error that names it. [operating.md](operating.md#what-to-set) "
        "says which of them most servers need, and how much memory the windows and slots take.",
        "",
        f"| {' | '.join(_HEADER)} |",
        "|---|---|---|",
    ]
    for variable, default, meaning in _rows():
        lines.append(f"| `{variable}` | {f'`{default}`' if default else ''} | {meaning} |")
    return "\n".join(lines)


def _rows() -> list[tuple[str, str, str]]:
    """Variable, default (empty: unset) and meaning of each setting."""
    return [
        (
            setting.metadata["variable"],
            setting.metadata["default"],
            setting.metadata["meaning"] + ("; equal on all ranks" if setting.metadata["shared"] else ""),
        )
        for setting in fields(Settings)
    ]
