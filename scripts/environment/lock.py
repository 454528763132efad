"""Write the locks, requirements/lock/*.txt, from the short files beside them; print what changes.

    make lock                                       versions stay; what is wanted now is added, the rest goes
    make lock ARGS="--upgrade"                      the newest versions that the short files allow
    make lock ARGS="--upgrade-package ruff"         of one package

Then it prints what `--upgrade` would change, so that a lock does not grow old unseen. A lock holds for Python
3.11 and later: where versions or packages differ, the line says for which. requirements/README.md says what
each file is for.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.console import Console
from rich.table import Table

from scripts.environment import installer
from scripts.environment.parts import INSTALLER, LOCKS, REQUIREMENTS, VENV, WITHOUT_TORCH, lock_names

OLDEST_PYTHON = "3.11"
CONSTRAINTS = "constraints.txt"
HEADER = """\
# Made by `make lock` from requirements/{wanted}; do not edit. All that comes with it, with the hashes
# of every file that the package index has for a version.
"""
MACHINES = [
    {
        "sys_platform": "linux",
        "platform_machine": machine,
        "python_version": python,
        "python_full_version": python,
    }
    for machine in ("x86_64", "aarch64")
    for python in ("3.11", "3.12", "3.13")
]
# Its CPU build comes from a folder, an index or PyTorch's page, and no two of them need have the same file.
WITHOUT_HASH = "torch"

Pins = Mapping[str, Requirement]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions")
    parser.add_argument("--upgrade-package", action="append", default=[], metavar="NAME")
    options = parser.parse_args()
    console = Console(highlight=False)
    upgrades = [f"--upgrade-package={name}" for name in options.upgrade_package]
    upgrades += ["--upgrade"] * options.upgrade
    try:
        show(console, "Locked", lock_all(REQUIREMENTS, LOCKS, upgrades))
        if not options.upgrade:
            with tempfile.TemporaryDirectory() as folder:
                title = 'make lock ARGS="--upgrade" would change'
                show(console, title, lock_all(REQUIREMENTS, Path(folder), ["--upgrade"], LOCKS))
    except installer.InstallerError as error:
        print(f"lock: {error}", file=sys.stderr)
        return 1
    return 0


def lock_all(
    source: Path, target: Path, options: Sequence[str] = (), before: Path | None = None
) -> Mapping[str, Sequence[str]]:
    """Lock every short file of `source` into `target`: what changed against `before`, by lock.

    Versions in `before` (`target` if it is None) are kept where the short files allow them, unless `options`
    of `uv pip compile` say otherwise.
    """
    before = target if before is None else before
    environ = installer.with_cpu_torch(one_index(), source / f"{VENV}.in")
    changed = {}
    for name in lock_names(source):
        old = read(before / f"{name}.txt")
        if before != target and (before / f"{name}.txt").is_file():
            (target / f"{name}.txt").write_text((before / f"{name}.txt").read_text())
        compile_lock(source, target, name, options, environ)
        changed[name] = differences(old, read(target / f"{name}.txt"))
    return changed


def compile_lock(
    source: Path, target: Path, name: str, options: Sequence[str], environ: Mapping[str, str]
) -> None:
    """Resolve one short file. A part takes its versions from .venv, and lists only what .venv lacks.

    Environments of other Pythons take their versions from .venv, too, and have none beside them.
    """
    lock = target / f"{name}.txt"
    with tempfile.TemporaryDirectory() as folder:
        overrides = Path(folder) / "overrides.txt"
        alone = name in (VENV, INSTALLER, WITHOUT_TORCH)
        here = {} if alone else shared(target, source / f"{name}.in")
        like_venv = [f"--constraints={target / VENV}.txt"] if name == WITHOUT_TORCH else []
        overrides.write_text("".join(f"{pin}\n" for pin in here.values()))
        installer.uv(
            *("pip", "compile", "--quiet", "--universal", f"--python-version={OLDEST_PYTHON}"),
            *("--fork-strategy=fewest", "--generate-hashes", "--no-header", f"--output-file={lock}"),
            *(f"--constraints={source / CONSTRAINTS}", f"--overrides={overrides}"),
            *(f"--excludes={file}" for file in left_out_files(source, name)),
            *like_venv,
            *(f"--no-emit-package={package}" for package in here),
            *options,
            str(source / f"{name}.in"),
            environ=environ,
        )
    lock.write_text(HEADER.format(wanted=f"{name}.in") + "".join(tidy(lock.read_text())))


def left_out_files(source: Path, name: str) -> Sequence[Path]:
    """What must not come with any lock, and what not with this one."""
    files = (source / "left_out.txt", source / f"left_out-{name}.txt")
    return [file for file in files if file.is_file()]


def shared(target: Path, wanted: Path) -> Pins:
    """What .venv has here and the part does not bring itself, as a release brings its own SGLang."""
    own = {canonicalize_name(requirement.name) for requirement in requirements(wanted.read_text())}
    return {name: pin for name, pin in applicable(read(target / f"{VENV}.txt")).items() if name not in own}


def one_index() -> Mapping[str, str]:
    """Without extra indexes: hashes are those of the first that has a version, and it may lack some files."""
    return {name: value for name, value in installer.settings().items() if name != "UV_INDEX"}


def tidy(text: str) -> Iterator[str]:
    """The packages of a lock that Linux may get, each with its hashes and with who asks for it."""
    for block in re.findall(r"^[A-Za-z0-9].*\n(?:[ ].*\n)*", text, re.MULTILINE):
        (pin,) = requirements(block)
        if pin.marker is None or any(pin.marker.evaluate(machine) for machine in MACHINES):
            yield re.sub(r" \\\n    --hash=\S+", "", block) if pin.name == WITHOUT_HASH else block


def read(lock: Path) -> Pins:
    """What a lock pins, by normalized name; nothing where there is no such file yet."""
    found = requirements(lock.read_text()) if lock.is_file() else ()
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def requirements(text: str) -> Iterable[Requirement]:
    """Those of a requirements file, without hashes and comments."""
    for line in text.splitlines():
        plain = re.sub(r"(^|\s)#.*", "", line).rstrip("\\ ").strip()
        if plain and not plain.startswith("--"):
            yield Requirement(plain)


def applicable(pins: Pins, environment: Mapping[str, str] | None = None) -> Pins:
    """Those whose marker holds here, or in `environment` (variables of markers that differ from here)."""
    known = dict(environment or {})
    return {
        name: without_marker(pin)
        for name, pin in pins.items()
        if pin.marker is None or pin.marker.evaluate(known)
    }


def without_marker(pin: Requirement) -> Requirement:
    return Requirement(f"{pin.name}{pin.specifier}")


def versions(pins: Pins) -> Mapping[str, str]:
    return {name: str(pin.specifier).removeprefix("==") for name, pin in pins.items()}


def differences(old: Pins, new: Pins) -> Sequence[str]:
    """A line a package: "name 1.0 -> 2.0", "name 1.0 is new", "name 1.0 goes"."""
    lines = []
    olds, news = versions(old), versions(new)
    for name in sorted({*old, *new}):
        before, after = olds.get(name), news.get(name)
        if before and after and before != after:
            lines.append(f"{name} {before} -> {after}")
        elif not before or not after:
            lines.append(f"{name} {after} is new" if after else f"{name} {before} goes")
    return lines


def show(console: Console, title: str, changed: Mapping[str, Sequence[str]]) -> None:
    table = Table("lock", "change", title=title, title_justify="left")
    for name, lines in changed.items():
        for line in lines:
            table.add_row(name, line)
    console.print(table if table.row_count else f"{title}: nothing.")


if __name__ == "__main__":
    sys.exit(main())
