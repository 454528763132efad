"""Environments of other Pythons, beside `.venv`: all that tests without torch need, and no SGLang.

Which interpreters a machine has differs: python3.12 on PATH, or one of pyenv's.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from scripts.environment import installer
from scripts.environment.parts import BESIDE, LOCKS, WITHOUT_TORCH

STAMP = "installed.txt"
ASK_LIMIT_S = 30
_ASK = "import sys; print('%d.%d' % sys.version_info[:2])"


def interpreter(version: str) -> Path | None:
    """An interpreter of this machine for a version such as "3.12", None if there is none that works."""
    return next((python for python in _candidates(version) if _version(python) == version), None)


def _candidates(version: str) -> Iterator[Path]:
    found = shutil.which(f"python{version}")
    if found is not None:
        yield Path(found)
    versions = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
    yield from sorted(versions.glob(f"{version}*/bin/python{version}"), reverse=True)


def _version(python: Path) -> str | None:
    """What it says itself: a shim of pyenv may lead to no interpreter."""
    try:
        done = subprocess.run(
            [python, "-c", _ASK], capture_output=True, text=True, timeout=ASK_LIMIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def environment(version: str, python: Path) -> Path:
    """The interpreter of the environment, which is made where it is missing or not as its lock says.

    Raises:
        installer.InstallerError: it could not be made.
    """
    folder, lock = BESIDE / f"python-{version}", LOCKS / f"{WITHOUT_TORCH}.txt"
    inside, stamp = folder / "bin" / "python", folder / STAMP
    wanted = f"{python.resolve()} {hashlib.sha256(lock.read_bytes()).hexdigest()}\n"
    if not (stamp.is_file() and stamp.read_text() == wanted and _version(inside) == version):
        shutil.rmtree(folder, ignore_errors=True)
        installer.uv("venv", "--quiet", "--python", str(python), str(folder))
        installer.uv("pip", "sync", "--quiet", "--compile-bytecode", "--python", str(inside), str(lock))
        stamp.write_text(wanted)
    return inside
