"""Copies of the installed SGLang, renamed and changed: other builds, for real servers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

import sglang

LABEL = "0.5.24.dev7+gabc"
CACHE = "__pycache__"

Changes = Mapping[str, Callable[[str], str]]
"""Module ("sglang.srt.server") -> its text -> the text in the copy."""


def make_copy(folder: Path, changes: Changes, label: str = LABEL) -> dict[str, str]:
    """Make the copy in `folder`, as links but for what is changed; returns variables of its servers."""
    assert sglang.__file__
    site = Path(sglang.__file__).parents[1]
    changed = {name.replace(".", "/") + ".py": change for name, change in changes.items()}
    version = f"__version__ = version = '{label}'\n__version_tuple__ = ()\n"
    changed["sglang/_version.py"] = lambda _text: version
    _link(site / "sglang", folder / "sglang", {Path(name).parent for name in changed}, site)
    for name, change in changed.items():
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_text(change((site / name).read_text()))
    _name(folder, label)
    # Compiled files are shared with the original, so none may be written.
    return {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}


def _link(original: Path, copied: Path, opened: set[Path], site: Path) -> None:
    """A folder of links; folders on the way to what is changed are folders again."""
    copied.mkdir(parents=True)
    for each in original.iterdir():
        name = each.relative_to(site)
        if each.name != CACHE and any(name == one or name in one.parents for one in opened):
            _link(each, copied / each.name, opened, site)
        else:
            os.symlink(each, copied / each.name)


def _name(folder: Path, label: str) -> None:
    """What importlib.metadata says of it."""
    distribution = metadata.distribution("sglang")
    found = folder / f"sglang-{label}.dist-info"
    found.mkdir()
    text = distribution.read_text("METADATA") or ""
    (found / "METADATA").write_text(
        text.replace(f"\nVersion: {distribution.version}\n", f"\nVersion: {label}\n", 1)
    )
    if entry_points := distribution.read_text("entry_points.txt"):
        (found / "entry_points.txt").write_text(entry_points)
