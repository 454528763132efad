"""Hold an environment against its lock.

    python -m scripts.environment.check          of this Python and of all parts that are installed

Complains about a package that the lock does not name, that it names and is not there, or that has another
version; and about what `pip check` finds, except where it is intended: what is left out on purpose
(requirements/left_out*.txt) and releases that run with other versions than they ask for
(requirements/conflicts.txt).
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

from packaging.utils import canonicalize_name

from scripts.environment.lock import applicable, left_out_files, read, requirements, versions
from scripts.environment.parts import LOCKS, REQUIREMENTS, VENV, parts

OURS = "sglang-npu-pp"  # editable, from this clone
CHECK_LIMIT_S = 120
ADVICE = (
    "What is wanted belongs into a short file of requirements/, then make lock. To get what the locks say: "
    "rm -r .venv/setup.stamp .venv/beside; make setup"
)
MISSING = re.compile(r"(?P<asker>\S+) \S+ requires (?P<asked>\S+), which is not installed\.")
CONFLICT = re.compile(r"(?P<asker>\S+) \S+ has requirement (?P<asked>[\w.-]+).*, but you have .*")


def main() -> int:
    found = list(complaints())
    print("\n".join([*found, ADVICE] if found else ["as the lock says"]))
    return 1 if found else 0


def complaints() -> Iterator[str]:
    """What is wrong with .venv and with every part that is there."""
    yield from of_folder(VENV, Path(sysconfig.get_path("purelib")))
    yield from imports()
    for part in parts().values():
        if part.is_installed:
            yield from of_folder(part.name, part.folder, part.folder)


def of_folder(name: str, site: Path, *before: Path) -> Iterator[str]:
    """What is wrong with a folder of packages; `before`: what its users have in front on their path."""
    yield from against_lock(site, LOCKS / f"{name}.txt")
    yield from unexpected(pip_check(*before), left_out(name), conflicts().get(name, ()))


def against_lock(site: Path, lock: Path) -> Iterator[str]:
    """Where the packages in a folder are not those of a lock, one sentence each."""
    pinned, there = versions(applicable(read(lock))), installed(site)
    for name in sorted({*pinned, *there}):
        if name not in pinned:
            yield f"{name} {there[name]} is in {site} but not in {lock.name}"
        elif name not in there:
            yield f"{name} {pinned[name]} is in {lock.name} but not in {site}"
        elif there[name] != pinned[name]:
            yield f"{name} is {there[name]} in {site} and {pinned[name]} in {lock.name}"


def installed(site: Path) -> Mapping[str, str]:
    """Versions of the packages in a folder, by normalized name, without our own."""
    found = {canonicalize_name(each.name): each.version for each in metadata.distributions(path=[str(site)])}
    return {name: version for name, version in found.items() if name != OURS}


def pip_check(*before: Path) -> Sequence[str]:
    """What `pip check` says of the environment, with folders in front of it on the path."""
    path = [str(folder) for folder in before]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "check", "--disable-pip-version-check"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        capture_output=True,
        text=True,
        timeout=CHECK_LIMIT_S,
        check=False,
    )
    if done.returncode == 0:
        return ()
    return done.stdout.splitlines() or [f"pip check failed: {done.stderr.strip()}"]


def unexpected(said: Sequence[str], missing: Sequence[str], conflicting: Sequence[str]) -> Iterator[str]:
    """Lines of `pip check`, without those that are intended.

    `missing`: packages that anybody may miss. `conflicting`: those that SGLang may want in another version.
    """
    for line in said:
        absent, other = MISSING.fullmatch(line), CONFLICT.fullmatch(line)
        if absent and canonicalize_name(absent["asked"]) in missing:
            continue
        if other and other["asker"] == "sglang" and canonicalize_name(other["asked"]) in conflicting:
            continue
        yield f"pip check: {line}"


def left_out(name: str) -> Sequence[str]:
    """Packages that must not come with .venv or a part, normalized."""
    files = left_out_files(REQUIREMENTS, name)
    return [canonicalize_name(each.name) for file in files for each in requirements(file.read_text())]


def conflicts(file: Path = REQUIREMENTS / "conflicts.txt") -> Mapping[str, Sequence[str]]:
    """By part, the packages of which it asks for another version than .venv has."""
    lines = [line.partition("#")[0].strip() for line in file.read_text().splitlines()]
    return {name: packages.split() for name, _, packages in (line.partition(":") for line in lines if line)}


def imports() -> Iterator[str]:
    """What is there can be used: a CPU torch beside a torchvision for CUDA, an import stub for kernels."""
    for module in ("torch", "torchvision", "sgl_kernel", "sglang", "sglang_npu_pp"):
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever a package does when it cannot be used
            yield f"{module} cannot be imported ({type(error).__name__}: {error})"


if __name__ == "__main__":
    sys.exit(main())
