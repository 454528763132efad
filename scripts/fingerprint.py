"""Write patches/contracts.json: fingerprints of the upstream functions that our patches rely on.

    python scripts/fingerprint.py 0.5.24      # adds a release, or reads it again
    python scripts/fingerprint.py --all       # reads all known releases again: after a change of patches
    python scripts/fingerprint.py --diff      # which functions changed in which release
    python scripts/fingerprint.py --source _pp_launch_batch 0.5.20 0.5.21      # and how

Wheels are downloaded and read, never imported or installed. A function that a release does not have is
recorded as absent: a patch that must replace it will refuse that release.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import functools
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from packaging.version import InvalidVersion, Version
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # as a script, only its own folder would be on the path

from scripts.output import number_table, plain_console  # noqa: E402
from sglang_npu_pp.fingerprints import fingerprint_in_file, source_in_file  # noqa: E402
from sglang_npu_pp.patches import ABSENT, PATCHES, load_contracts  # noqa: E402
from sglang_npu_pp.patching import Contract, contract_targets  # noqa: E402

CONTRACTS = ROOT / "patches" / "contracts.json"


@contextmanager
def downloaded(release: str) -> Iterator[zipfile.ZipFile]:
    """The wheel of an SGLang release, from the configured package index."""
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        if subprocess.run([*command, "-d", directory, f"sglang=={release}"], check=False).returncode:
            sys.exit(f"The package index gives no wheel of SGLang {release}; pip says why above.")
        with zipfile.ZipFile(next(Path(directory).glob(f"sglang-{release}-*.whl"))) as wheel:
            yield wheel


def read(wheel: zipfile.ZipFile, target: str, what: Callable[[str, str], str | None]) -> str | None:
    """`what` of the function at `target`, given its module's text; None if the release does not have it."""
    module, _, qualname = target.partition(":")
    name = module.replace(".", "/") + ".py"
    return what(wheel.read(name).decode(), qualname) if name in wheel.namelist() else None


def release_name(text: str) -> str:
    """As pip writes it, for argparse. Post-releases, candidates and builds from source have one, too."""
    try:
        return str(Version(text))
    except InvalidVersion:
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a release") from None


def read_contract(release: str) -> Contract:
    """Says, too, what the patches would import in vain."""
    with downloaded(release) as wheel:
        for line in missing_imports(wheel):
            print(f"{release}: {line}, which is not there")
        return {target: read(wheel, target, fingerprint_in_file) for target in contract_targets(PATCHES)}


def imports_of_patches() -> Iterator[tuple[str, str, str]]:
    """File, module and name of what the patches import from SGLang, but where they can do without."""
    for path in sorted(CONTRACTS.parent.glob("*.py")):
        inside: list[tuple[ast.AST, bool]] = [(ast.parse(path.read_text()), False)]
        while inside:
            node, guarded = inside.pop()
            guarded = guarded or (isinstance(node, ast.Try | ast.With) and "ImportError" in ast.unparse(node))
            inside += [(child, guarded) for child in ast.iter_child_nodes(node)]
            module = node.module if isinstance(node, ast.ImportFrom) else None
            if module and module.startswith("sglang.") and not guarded:
                assert isinstance(node, ast.ImportFrom)
                yield from ((path.name, module, name.name) for name in node.names)


def missing_imports(wheel: zipfile.ZipFile) -> list[str]:
    """What the patches import and this release does not have, a line each."""
    files = set(wheel.namelist())
    lines = []
    for file, module, name in imports_of_patches():
        folder = module.replace(".", "/")
        source = next((each for each in (f"{folder}.py", f"{folder}/__init__.py") if each in files), None)
        known = _names(wheel.read(source).decode()) if source else set()
        if not {name, "*"} & known and not {f"{folder}/{name}.py", f"{folder}/{name}/__init__.py"} & files:
            lines.append(f"patches/{file} imports {name} from {module}")
    return lines


@functools.cache
def _names(source: str) -> frozenset[str]:
    """Bound anywhere in the text of a module."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.alias):
            found.add(node.asname or node.name)
        elif isinstance(node, ast.Name):
            found.add(node.id)
    return frozenset(found)


def write(contracts: Mapping[str, Contract]) -> None:
    """By function: which fingerprint it has in which releases, a line each, so that a diff can be read."""
    releases = sorted(contracts, key=Version)
    blocks = []
    for target in contract_targets(PATCHES):
        by_print: dict[str, list[str]] = {}
        for release in releases:
            if target in contracts[release]:
                by_print.setdefault(contracts[release][target] or ABSENT, []).append(release)
        lines = [f"   {json.dumps(found)}: {json.dumps(where)}" for found, where in by_print.items()]
        blocks.append(f"  {json.dumps(target)}: {{\n" + ",\n".join(lines) + "\n  }")
    text = f'{{\n "releases": {json.dumps(releases)},\n "functions": {{\n' + ",\n".join(blocks) + "\n }\n}\n"
    CONTRACTS.write_text(text)


def differences(contracts: Mapping[str, Contract]) -> Table:
    """A row a function that changed: a letter for each of its versions, - where a release has none."""
    table = number_table(None, *contracts, "function", left=len(contracts) + 1)
    for target in contract_targets(PATCHES):
        letters: dict[str, str] = {}
        row = []
        for contract in contracts.values():
            found = contract.get(target)
            row.append("-" if found is None else letters.setdefault(found, chr(ord("A") + len(letters))))
        if len(set(row)) > 1:
            table.add_row(*row, target.rpartition("sglang.srt.")[2])
    same = len(contract_targets(PATCHES)) - table.row_count
    table.caption = f"{same} more functions are equal in all releases."
    return table


def source_difference(name: str, old: str, new: str) -> list[str]:
    """How the functions whose name ends with `name` changed from one release to another."""
    lines: list[str] = []
    with downloaded(old) as before, downloaded(new) as after:
        for target in contract_targets(PATCHES):
            if target.endswith(name):
                a, b = ((read(wheel, target, source_in_file) or "").splitlines() for wheel in (before, after))
                lines += difflib.unified_diff(a, b, f"{old} {target}", f"{new} {target}", lineterm="")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("releases", nargs="*", type=release_name, help="SGLang releases to (re)fingerprint")
    parser.add_argument("--all", action="store_true", help="(re)fingerprint all releases that are known")
    parser.add_argument("--diff", action="store_true", help="print what changed in which release")
    parser.add_argument("--source", nargs=3, metavar=("NAME", "OLD", "NEW"), help="print how it changed")
    arguments = parser.parse_args()
    contracts = dict(load_contracts()) if CONTRACTS.exists() else {}
    releases = [*(contracts if arguments.all else ()), *arguments.releases]
    for release in releases:
        contracts[release] = read_contract(release)
        absent = list(contracts[release].values()).count(None)
        print(f"{release}: {len(contracts[release]) - absent} functions, {absent} absent")
    if releases:
        write(contracts)
    if arguments.diff or not (releases or arguments.source):
        plain_console(240).print(differences(load_contracts()))
    if arguments.source:
        print("\n".join(source_difference(*arguments.source)))


if __name__ == "__main__":
    main()
