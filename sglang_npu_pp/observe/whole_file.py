"""Files that a reader finds whole or not at all."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

_numbers = itertools.count()


def write_whole(path: Path, content: bytes) -> None:
    """Write beside `path` and rename, so a reader never sees half a file, and a full disk keeps the old one.

    The name beside it is of this call alone: a signal may come in the middle, and write the same file.
    Raises OSError, and then leaves nothing of its own.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}-{next(_numbers)}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
