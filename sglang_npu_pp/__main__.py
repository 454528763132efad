"""Command line: python -m sglang_npu_pp COMMAND."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from .tools import ledger, settings_command, topologies
from .tools.certify import command as certify_command
from .tools.doctor import command as doctor_command
from .tools.timeline import command as timeline_command

COMMANDS = (
    certify_command.add,
    doctor_command.add,
    ledger.add,
    settings_command.add,
    timeline_command.add,
    topologies.add,
)
"""Each adds one command to the parser, and sets `run`, which gives the exit code, as its default."""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m sglang_npu_pp", description="Tools of sglang-npu-pp.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in COMMANDS:
        add(commands)
    options = parser.parse_args(arguments)
    exit_code: int = options.run(options)
    return exit_code


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BrokenPipeError:  # the reader of the output has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
