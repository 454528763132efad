"""Folders for what a run leaves."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def short_directory() -> Iterator[Path]:
    """A temporary directory whose path leaves room for a socket name (107 bytes in all)."""
    with tempfile.TemporaryDirectory(prefix="pp-", dir="/tmp") as path:
        yield Path(path)


def new_folder(parent: Path, name: str) -> Path:
    """A folder in `parent` that is this run's alone: a process number comes again, beside what was left."""
    parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=parent)).resolve()
