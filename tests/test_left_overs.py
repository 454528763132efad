"""What runs that were killed have left, and process numbers that come again, disturb no later run."""

from __future__ import annotations

from pathlib import Path

from rig.folders import new_folder
from scripts.bench.link import EmulatedLink


def test_a_run_has_a_folder_of_its_own(tmp_path: Path) -> None:
    """Also a second one of the same process number."""
    logs = tmp_path / "not" / "there"
    first, second = new_folder(logs, "bench"), new_folder(logs, "bench")
    assert first != second
    assert {path.parent for path in (first, second)} == {logs}
    assert all(path.is_dir() and path.name.startswith("bench-") for path in (first, second))


def test_an_emulated_link_has_namespaces_of_its_own(tmp_path: Path) -> None:
    names = [name for _ in range(2) for name in EmulatedLink(tmp_path)._names]
    assert len(set(names)) == 4
