"""Arms the faults of a running server (`rig/probes/sglang_pp_faults.py`)."""

from __future__ import annotations

from pathlib import Path

AGAIN = " again"  # ends the name of a fault that has its second turn


class Faults:
    """The file that says which fault is in force."""

    def __init__(self, path: Path) -> None:
        self._path, self._struck = path, path.with_name(f"{path.name}.struck")

    @property
    def variables(self) -> dict[str, str]:
        """Of the server."""
        return {"PP_PROBE_FAULT_FILE": str(self._path)}

    def arm(self, fault: str) -> None:
        """At once: a half-written name is never read."""
        self._struck.unlink(missing_ok=True)
        part = self._path.with_name(f"{self._path.name}.part")
        part.write_text(f"{fault.removesuffix(AGAIN)} {fault.replace(' ', '-')}")
        part.rename(self._path)

    @property
    def struck(self) -> int:
        return int(self._struck.read_text()) if self._struck.exists() else 0
