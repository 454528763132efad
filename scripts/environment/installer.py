"""Installs exactly what a lock says, with uv, from the package indexes that pip is set up for here.

uv (https://docs.astral.sh/uv) checks the hashes of a lock, downloads side by side and takes a tenth of pip's
time. It lies in `.venv/uv`, itself installed from a lock by the pip of the Python that runs this. Standard
library only.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOME = ROOT / ".venv" / "uv"
UV = HOME / "bin" / "uv"
UV_LOCK = ROOT / "requirements" / "lock" / "installer.txt"
CPU_TORCH = "https://download.pytorch.org/whl/cpu/torch/"
NO_CPU_TORCH = (
    f"No package index of this machine has the CPU build of torch for Python {sys.version_info.major}."
    f"{sys.version_info.minor}, so PyTorch's page of them was asked too, which has not helped"
)
LIMIT_S = 1800  # torch over a slow line

# Options of pip, by the variables that say the same to uv, and what separates their values there.
PIP_OPTIONS: Mapping[str, tuple[str, str]] = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "no-index": ("UV_OFFLINE", " "),  # uv has no variable for it; folders of find-links stay
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "cert": ("SSL_CERT_FILE", " "),
    "client-cert": ("SSL_CLIENT_CERT", " "),
    "proxy": ("ALL_PROXY", " "),
    "timeout": ("UV_HTTP_TIMEOUT", " "),
    "default-timeout": ("UV_HTTP_TIMEOUT", " "),  # pip's name for the same in PIP_DEFAULT_TIMEOUT
}
SECTIONS = ("global", "install", ":env:")  # the later wins


class InstallerError(RuntimeError):
    """What was asked for could not be installed; the message says what the installer said."""


def sync(lock: Path) -> None:
    """Make the environment of this Python what the lock says: nothing missing, nothing more.

    Raises:
        InstallerError
    """
    environ = settings()
    with_page = with_cpu_torch(environ, lock)
    try:
        uv("pip", "sync", *_options(), str(lock), environ=with_page)
    except InstallerError as error:
        if with_page == environ:
            raise
        raise InstallerError(f"{NO_CPU_TORCH}:\n{error}") from error


def install_into(folder: Path, lock: Path, environ: Mapping[str, str] | None = None) -> None:
    """Install what the lock says into a folder that does not exist yet.

    Raises:
        InstallerError
    """
    uv("pip", "install", *_options(), "--no-deps", "--target", str(folder), "-r", str(lock), environ=environ)


def _options() -> Sequence[str]:
    """Compiled ahead, as pip does: many processes of one server would otherwise compile at once.

    What comes as source only is built with the setuptools of this environment, which its lock names.
    """
    return ("--quiet", "--python", sys.executable, "--compile-bytecode", "--no-build-isolation")


def uv(*arguments: str, environ: Mapping[str, str] | None = None) -> str:
    """Run uv, which is installed first where it is missing; what it printed.

    Raises:
        InstallerError: it failed, took too long or could not be installed.
    """
    if not UV.is_file() or not _is_current():
        _install_uv()
    return _run([str(UV), *arguments], environ or settings())


def _is_current() -> bool:
    stamp = HOME / UV_LOCK.name
    return stamp.is_file() and stamp.read_bytes() == UV_LOCK.read_bytes()


def _install_uv() -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--require-hashes", "--upgrade", "--target", str(HOME), "-r", str(UV_LOCK)]
    _run(command, os.environ)
    (HOME / UV_LOCK.name).write_bytes(UV_LOCK.read_bytes())


def _run(command: Sequence[str], environ: Mapping[str, str]) -> str:
    try:
        done = subprocess.run(
            command, env=dict(environ), capture_output=True, text=True, timeout=LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise InstallerError(f"{' '.join(command[:3])} had not finished after {LIMIT_S} s") from error
    if done.returncode:
        raise InstallerError(done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}")
    return done.stdout


# --- where packages come from --------------------------------------------------------------------


def settings(environ: Mapping[str, str] = os.environ) -> Mapping[str, str]:
    """`environ` for uv, with pip's options (pip.conf, PIP_*) in uv's variables where these are not set.

    As pip does, uv then takes a version from whichever index has it: a hash says whether it is the right one.
    """
    listed = _run([sys.executable, "-m", "pip", "config", "list"], environ)
    translated = {
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_LINK_MODE": "copy",  # who edits an installed file does not edit the cache of all environments
        **from_pip(listed),
    }
    return {**translated, **environ}


def from_pip(listed: str) -> Mapping[str, str]:
    """Variables of uv for what `pip config list` prints, lines of SECTION.OPTION='VALUE'."""
    found: dict[str, str] = {}
    for section in SECTIONS:
        for line in listed.splitlines():
            match = re.fullmatch(rf"{re.escape(section)}\.([\w-]+)=(.+)", line)
            if match and match[1] in PIP_OPTIONS:
                variable, separator = PIP_OPTIONS[match[1]]
                found[variable] = separator.join(ast.literal_eval(match[2]).split())
    return found


def with_cpu_torch(environ: Mapping[str, str], requirements: Path) -> Mapping[str, str]:
    """Add PyTorch's own page of CPU builds, unless the machine's indexes have the one that is required.

    The page lists torch and nothing else, so that no other package comes from there.
    """
    torch = re.search(r"^torch==\S+", requirements.read_text(), re.MULTILINE)
    if torch is None:
        return environ
    try:
        uv("pip", "install", "--python", sys.executable, "--dry-run", "--no-deps", torch[0], environ=environ)
    except InstallerError:
        links = filter(None, [environ.get("UV_FIND_LINKS"), CPU_TORCH])
        return {**environ, "UV_FIND_LINKS": ",".join(links)}
    return environ
