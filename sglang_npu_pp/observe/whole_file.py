"""Atomic writes of files."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

_numbers = itertools.count()


def write_whole(path: Path, content: bytes) -> None:
    """Write beside `path`, then rename: never half a file, and a full disk keeps the old one.

    The temporary name is unique, for reentrancy from signal handlers. Raises OSError, leaving no file.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}-{next(_numbers)}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
