"""Atomic writes of files."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

_numbers = itertools.count()


def write_whole(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Write beside `path`, then rename: never half a file, and a full disk keeps the old one.

    `mode`: permissions, less the umask. The temporary name is unique, for reentrancy from signal handlers.
    Raises OSError, leaving no file.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}-{next(_numbers)}.partial")
    try:
        with open(partial, "wb", opener=lambda name, flags: os.open(name, flags, mode)) as file:
            file.write(content)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
