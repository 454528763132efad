"""Texts of known releases, to compare with: this package ships none.

They come from `--reference` (a folder that holds `sglang/`, or a wheel), else from a wheel that pip downloads
into a cache. Wheels are read, never installed: only files that end in .py.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from ...errors import PipelineError

PACKAGE = "sglang"
LIMIT_S = 180.0
_WHEEL = re.compile(rf"{PACKAGE}-(?P<release>[^-]+)-.*\.whl")
_VERSION = re.compile(r"^__version__\b[^=\n]*(?:= *version\b[^=\n]*)?= *['\"](.+?)['\"]$", re.M)
# Wheels are of one Python and one platform; their texts are the same on all. Never a source distribution:
# pip would run its build to learn its name.
_ANY_WHEEL = (
    *("--no-deps", "--only-binary", ":all:", "--python-version", "3.11", "--implementation", "cp"),
    *("--abi", "cp311", "--abi", "abi3"),
    *("--platform", "manylinux_2_34_x86_64", "--platform", "manylinux_2_28_x86_64"),
    *("--platform", "manylinux2014_x86_64"),
)
_QUIETLY = ("--quiet", "--no-input", "--disable-pip-version-check", "--retries", "1", "--timeout", "20")


class NoTextError(PipelineError):
    """No text of a release: why, and what to do."""


class Texts(Protocol):
    """A release that can be read."""

    release: str

    def module(self, name: str) -> str | None:
        """Text of "sglang.srt.server", None if absent."""
        ...


class FolderTexts:
    """Of a folder that holds `sglang/`: an installation, or `python/` of a clone."""

    def __init__(self, folder: Path, release: str | None = None) -> None:
        self._folder = folder
        self.release = release or _release_of_folder(folder)

    def module(self, name: str) -> str | None:
        path = self._folder / _path(name)
        return path.read_text() if path.is_file() else None


class WheelTexts:
    """Of a wheel file, which stays packed."""

    def __init__(self, wheel: Path) -> None:
        try:
            self._files = zipfile.ZipFile(wheel)
            self._names = set(self._files.namelist())
        except (OSError, zipfile.BadZipFile) as error:
            raise NoTextError(f"{wheel.name} is not a wheel that can be read ({error}).") from None
        match = _WHEEL.fullmatch(wheel.name)
        self.release = match["release"] if match else "of an unknown release"

    def module(self, name: str) -> str | None:
        path = _path(name)
        if path not in self._names:
            return None
        try:
            return self._files.read(path).decode()
        except (OSError, ValueError, zipfile.BadZipFile) as error:
            raise NoTextError(f"{path} of the wheel is damaged ({error}).") from None


class Releases:
    """Texts by release; each is looked for once.

    `reference` is used for every release if it is there.
    """

    def __init__(self, reference: Path | None, cache: Path | None = None, limit_s: float = LIMIT_S) -> None:
        self._reference = None if reference is None else given(reference)
        self._cache = cache or default_cache()
        self._limit_s = limit_s
        self._found: dict[str, Texts | NoTextError] = {}

    def of(self, release: str) -> Texts:
        """Raises NoTextError."""
        if self._reference is not None:
            return self._reference
        if release not in self._found:
            try:
                self._found[release] = WheelTexts(fetch(release, self._cache, self._limit_s))
            except NoTextError as error:
                self._found[release] = error
        found = self._found[release]
        if isinstance(found, NoTextError):
            raise found
        return found


def given(reference: Path) -> Texts:
    """What `--reference` names. Raises NoTextError."""
    if reference.is_file():
        return WheelTexts(reference)
    if (reference / PACKAGE).is_dir():
        return FolderTexts(reference)
    raise NoTextError(
        f"--reference {reference} is neither a wheel of SGLang nor a folder that holds {PACKAGE}/."
    )


def default_cache(environ: Mapping[str, str] = os.environ) -> Path:
    home = environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(home) / "sglang-npu-pp" / "releases"


def fetch(release: str, cache: Path, limit_s: float = LIMIT_S) -> Path:
    """The release's wheel in the cache, downloaded unless it is there. Raises NoTextError."""
    for path in sorted(cache.glob(f"{PACKAGE}-{release}-*.whl")):
        if zipfile.is_zipfile(path):
            return path
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            downloaded = _download(release, Path(folder), limit_s)
            return Path(shutil.move(downloaded, cache / downloaded.name))  # whole, or not there
    except OSError as error:
        raise NoTextError(f"SGLang {release} cannot be kept for comparing ({error}).") from None


def _download(release: str, folder: Path, limit_s: float) -> Path:
    command = [sys.executable, "-m", "pip", "download", f"{PACKAGE}=={release}", *_ANY_WHEEL, *_QUIETLY]
    try:
        done = subprocess.run(
            [*command, "--dest", str(folder)],
            env={**os.environ, "PIP_CONSTRAINT": os.devnull},  # which may ask for another release
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise NoTextError(f"pip did not download SGLang {release} within {limit_s:g} s.") from None
    wheels = list(folder.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
        raise NoTextError(f"pip cannot download SGLang {release} ({lines[-1]}).")
    return wheels[0]


def _path(module: str) -> str:
    return module.replace(".", "/") + ".py"


def _release_of_folder(folder: Path) -> str:
    for name in ("_version.py", "version.py"):
        path = folder / PACKAGE / name
        found = _VERSION.search(path.read_text()) if path.is_file() else None
        if found:
            return found[1]
    names = [path.name.split("-")[1] for path in folder.glob(f"{PACKAGE}-*.dist-info")]
    return names[0].removesuffix(".dist") if len(names) == 1 else "of an unknown release"
