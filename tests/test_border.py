"""The border: package and patches lie in one tree, and nothing below imports what is above.

Imports are read from the source, those inside functions and for types only included.
"""

from __future__ import annotations

import ast
import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import sglang_npu_pp
from sglang_npu_pp import patches

ROOT = Path(__file__).parents[1]
PACKAGE = "sglang_npu_pp"

ERRORS, PARTS, PATCHES, PLUGIN, PACKAGE_ITSELF, TOOLS = range(6)
"""Floors, lowest first. A module imports from its own floor and from those below."""

FLOORS = {
    "errors": ERRORS,
    "patches": PATCHES,
    "plugin": PLUGIN,
    "": PACKAGE_ITSELF,
    "__main__": TOOLS,
}
"""Of the modules and folders in the package; those that are not named are parts of a server."""

ROOMS = {
    PACKAGE: {PACKAGE},
    "ascend_sim": {"ascend_sim"},
    "rig": {PACKAGE, "ascend_sim", "rig"},
    "scripts": {PACKAGE, "ascend_sim", "rig", "scripts"},
    "tests": {PACKAGE, "ascend_sim", "rig", "scripts", "tests"},
}
"""Top-level folders, and those that each imports from."""

INSTALLER = "scripts.environment"  # of parts of the environment, which the rig asks for
TRANSPORT_USES = {"errors", "observe", "settings", "streams", "transport"}
PATCHES_ARE_USED_BY = {"", "plugin", "patches", "tools.doctor", "tools.ledger"}

Graph = Mapping[str, set[str]]
"""Module -> modules that it imports, of those that are in this repository."""


def sources() -> dict[str, Path]:
    """Every module of the repository with its file."""
    found = {}
    for folder, prefix in (
        *((room, room) for room in ROOMS),
        ("patches", f"{PACKAGE}.patches"),  # which Python finds by the link, and rglob does not follow
    ):
        for path in (ROOT / folder).rglob("*.py"):
            parts = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join((prefix, *parts)).removesuffix(".__init__")] = path
    return found


SOURCES = sources()


@functools.cache
def graph() -> Graph:
    return {module: set(imports(module, path.read_text())) for module, path in SOURCES.items()}


def with_line(module: str, line: str) -> Graph:
    """What the graph would be if the module had that line, too."""
    return {**graph(), module: graph()[module].union(imports(module, line))}


def imports(module: str, source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name in SOURCES)
        elif isinstance(node, ast.ImportFrom):
            origin = ".".join((*_package(module, node.level), *([node.module] if node.module else [])))
            for name in node.names:
                found = f"{origin}.{name.name}"  # a module, or something that is in one
                yield from [each for each in (found, origin) if each in SOURCES][:1]
        elif isinstance(node, ast.Call) and _is_import_by_name(node):
            yield ast.literal_eval(node.args[0])


def _package(module: str, level: int) -> list[str]:
    """Of an import with so many dots in front of it."""
    if level == 0:
        return []
    parts = module.split(".")
    up = level - 1 if SOURCES[module].name == "__init__.py" else level
    return parts[: len(parts) - up]


def _is_import_by_name(call: ast.Call) -> bool:
    """`importlib.import_module("sglang_npu_pp...")` and the like, which no tool follows."""
    if "import" not in ast.unparse(call.func) or not call.args:
        return False
    argument = call.args[0]
    return isinstance(argument, ast.Constant) and argument.value in SOURCES


def room(module: str) -> str:
    """The module or folder in the package, the tool in tools/: "" for the package itself."""
    parts = module.removeprefix(PACKAGE).removeprefix(".").split(".")
    return ".".join(parts[:2] if parts[0] == "tools" else parts[:1])


def floor(room: str) -> int:
    return TOOLS if room.startswith("tools") else FLOORS.get(room, PARTS)


def wrong_way(found: Graph) -> list[str]:
    """Imports that lead up, "importer -> imported"."""
    return [
        f"{module} -> {other}"
        for module, others in found.items()
        for other in sorted(others)
        if not _may_import(module, other)
    ]


def _may_import(importer: str, imported: str) -> bool:
    uses = ROOMS[importer.partition(".")[0]]
    if imported.startswith(INSTALLER) and "ascend_sim" in uses:
        return True
    if imported.partition(".")[0] not in uses:
        return False
    return not in_package(importer) or _may_import_in_package(room(importer), room(imported))


def in_package(module: str) -> bool:
    return module.partition(".")[0] == PACKAGE


def _may_import_in_package(importer: str, imported: str) -> bool:
    if importer == "transport" and imported not in TRANSPORT_USES:
        return False
    if imported == "patches" and importer not in PATCHES_ARE_USED_BY:
        return False
    return floor(imported) <= floor(importer)


def cycle(found: Graph) -> list[str]:
    """Modules that import each other in a circle, [] if none do."""
    try:
        TopologicalSorter(found).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_nothing_below_imports_what_is_above() -> None:
    assert wrong_way(graph()) == []


def test_no_modules_import_each_other() -> None:
    assert cycle(graph()) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("errors", "from .settings import Settings"),
        ("settings", "from . import patches"),
        ("observe.trace", "import sglang_npu_pp.patches.pipeline"),
        (
            "observe.reporting",
            "if TYPE_CHECKING:\n    from sglang_npu_pp.patches.pipeline import AsyncPipeline",
        ),
        ("transport.window", "def late():\n    from ..patches import pipeline"),
        ("transport.clock", "from .. import token_return"),
        ("transport.host_lane", "from ..tools.doctor.findings import Level"),
        ("patches.startup", "import sglang_npu_pp"),
        ("patches.startup", "from ..plugin import decision"),
        ("patches", "from sglang_npu_pp.tools.doctor import versions"),
        ("plugin", "from . import __version__"),
        ("plugin", "import importlib\nimportlib.import_module('sglang_npu_pp.tools.ledger')"),
        ("tools.timeline.states", "from ...patches.pipeline import current"),
        ("tools.doctor.peer", "from tests import small_node"),
    ],
)
def test_an_import_that_leads_up_is_seen(module: str, line: str) -> None:
    (found,) = wrong_way(with_line(f"{PACKAGE}.{module}", line))
    assert found.startswith(f"{PACKAGE}.{module} -> ")


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("ascend_sim.controls", "from sglang_npu_pp.errors import PipelineError"),
        ("ascend_sim.build", "from rig import folders"),
        ("rig.battery", "from scripts.bench import plan"),
        ("rig.npu_ranks", "from tests.ascend_sim import hccl_ranks"),
        ("scripts.serve", "def late():\n    from tests.server import clocks"),
        ("scripts.environment.parts", "import tests.small_node"),
    ],
)
def test_an_import_from_a_room_above_is_seen(module: str, line: str) -> None:
    assert len(wrong_way(with_line(module, line))) == 1


def test_a_room_above_is_seen_in_every_file() -> None:
    assert {module.partition(".")[0] for module in SOURCES} == set(ROOMS)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("sglang_npu_pp.observe.telemetry", "if TYPE_CHECKING:\n    from .trace import Event"),
        ("sglang_npu_pp.patches.pipeline", "if TYPE_CHECKING:\n    from .dp_metadata import DPMetadata"),
        ("scripts.bench.npu_sim_report", "from .npu_sim import QUICK"),
    ],
)
def test_a_circle_is_seen(module: str, line: str) -> None:
    assert module in cycle(with_line(module, line))


def test_no_module_of_the_package_is_imported_by_a_name_in_a_string() -> None:
    for module, path in SOURCES.items():
        if in_package(module):
            calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
            assert not any(map(_is_import_by_name, calls)), module


def test_package_and_patches_lie_in_one_tree() -> None:
    assert patches.__file__
    assert Path(patches.__file__).parent == Path(sglang_npu_pp.__file__).parent / "patches"
    assert Path(patches.__file__).resolve() == ROOT / "patches/__init__.py"


def test_another_checkout_on_the_path_brings_its_own_patches(tmp_path: Path) -> None:
    """Whoever works with two checkouts must not test the patches of the one that pip installed."""
    unread = shutil.ignore_patterns("__pycache__")
    for name in (PACKAGE, "patches"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=unread)
    assert (tmp_path / PACKAGE / "patches").is_symlink()
    files = json.loads(
        run(
            "import json, sglang_npu_pp; from sglang_npu_pp import patches; "
            "print(json.dumps([sglang_npu_pp.__file__, patches.__file__, patches.startup.__file__]))",
            PYTHONPATH=str(tmp_path),
            TORCH_DEVICE_BACKEND_AUTOLOAD="0",
        )
    )
    assert [Path(file).resolve() for file in files] == [
        tmp_path / PACKAGE / "__init__.py",
        tmp_path / "patches/__init__.py",
        tmp_path / "patches/startup.py",
    ]


def test_the_package_itself_is_imported_without_torch() -> None:
    """SGLang loads the plugin in every process, also in those in which it is off."""
    program = (
        "import sys, sglang_npu_pp.plugin; "
        "print([name for name in ('torch', 'zmq', 'sglang') if name in sys.modules])"
    )
    assert run(program).strip() == "[]"


def run(program: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd="/",
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
