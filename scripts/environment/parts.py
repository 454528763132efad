"""What is installed here: `.venv`, and parts beside it that only what needs them has on its PYTHONPATH.

Each has a short file of what is wanted, `requirements/NAME.in`, and a lock of all that comes with it,
`requirements/lock/NAME.txt`. A part is installed on demand, with `provide`. Standard library only: set-up
runs this before anything else is there.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from scripts.environment import installer
from scripts.environment.installer import ROOT

REQUIREMENTS = ROOT / "requirements"
LOCKS = REQUIREMENTS / "lock"
BESIDE = ROOT / ".venv" / "beside"
STAMP = "installed.txt"
REASON_LENGTH = 400  # the end of what an installer says names the package

# What is no part: `.venv` itself, what installs all the rest, and environments of other Pythons.
VENV, INSTALLER, WITHOUT_TORCH = "venv", "installer", "without_torch"
LIBRARIES = "lib"  # folder of a part with shared libraries that the machine does not have


class PartError(RuntimeError):
    """A part could not be installed; the message is one sentence."""


@dataclass(frozen=True)
class Part:
    """Packages in a folder of their own, which use those of the environment beside it."""

    name: str

    @property
    def wanted(self) -> Path:
        return REQUIREMENTS / f"{self.name}.in"

    @property
    def lock(self) -> Path:
        return LOCKS / f"{self.name}.txt"

    @property
    def folder(self) -> Path:
        """What goes on PYTHONPATH."""
        return BESIDE / self.name

    @property
    def is_installed(self) -> bool:
        """Whether it is there, for this Python, as its lock says."""
        stamp = self.folder / STAMP
        return stamp.is_file() and stamp.read_text() == self._stamp()

    def install(self) -> None:
        """Into another folder, which is renamed last: a half-finished one is never taken for a part.

        Raises:
            PartError: the installer could not.
        """
        partial = BESIDE / f"{self.name}.{os.getpid()}"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            installer.install_into(partial, self.lock)
            COMPLETED_BY.get(self.name, lambda folder: None)(partial)
        except (installer.InstallerError, OSError, subprocess.SubprocessError) as error:
            shutil.rmtree(partial, ignore_errors=True)
            reason = " ".join(str(error).split())[-REASON_LENGTH:]
            raise PartError(
                f"{self.name} could not be installed ({reason}); check the package index and run this again"
            ) from error
        (partial / STAMP).write_text(self._stamp())
        shutil.rmtree(self.folder, ignore_errors=True)
        partial.rename(self.folder)

    def _stamp(self) -> str:
        """Compiled modules are for one Python."""
        digest = hashlib.sha256(self.lock.read_bytes()).hexdigest()
        return f"{sys.implementation.cache_tag} {digest}\n"


def part_names(requirements: Path = REQUIREMENTS) -> Sequence[str]:
    """Of all parts that have a short file in the folder."""
    return sorted({path.stem for path in requirements.glob("*.in")} - {VENV, INSTALLER, WITHOUT_TORCH})


def lock_names(requirements: Path = REQUIREMENTS) -> Sequence[str]:
    """Of all short files in the folder, in an order in which each can lean on those before it."""
    there = [name for name in (VENV, INSTALLER, WITHOUT_TORCH) if (requirements / f"{name}.in").is_file()]
    return [*there, *part_names(requirements)]


def parts() -> Mapping[str, Part]:
    """All parts, by name."""
    return {name: Part(name) for name in part_names()}


def provide(*names: str) -> None:
    """Install those of the parts that are not there yet; a few seconds each.

    Raises:
        PartError: one could not be installed; or there is none of that name.
    """
    known = parts()
    for name in names:
        if name not in known:
            raise PartError(f"there is no part {name}; the parts are {', '.join(known)}")
        if not known[name].is_installed:
            known[name].install()


def add_verbs_library(folder: Path) -> None:
    """Mooncake's library is linked with libibverbs, also where it uses TCP.

    Unpacked from Debian's packages where the machine has none, so that root is not needed.
    """
    if "libibverbs.so.1" in _output("ldconfig", "-p"):
        return
    packages, libraries = folder / "debian", folder / LIBRARIES
    packages.mkdir()
    libraries.mkdir()
    _output("apt-get", "download", "libibverbs1", "libnl-3-200", "libnl-route-3-200", cwd=packages)
    for package in sorted(packages.glob("*.deb")):
        _output("dpkg-deb", "--extract", str(package), str(packages))
    for library in list(packages.rglob("*.so.*")):
        shutil.move(library, libraries / library.name)
    shutil.rmtree(packages)


COMPLETED_BY: Mapping[str, Callable[[Path], None]] = {"mooncake": add_verbs_library}
"""What a part needs that is no Python package."""


def _output(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise installer.InstallerError(f"{' '.join(command)} failed ({reason})")
    return done.stdout
