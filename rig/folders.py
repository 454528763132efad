"""Folders for what a run leaves."""

from __future__ import annotations

import tempfile
from pathlib import Path


def new_folder(parent: Path, name: str) -> Path:
    """A folder in `parent` that is this run's alone: a process number comes again, beside what was left."""
    parent.mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=parent)).resolve()
