"""Builds the simulated CANN with g++: `python -m ascend_sim.build` prints where it is.

The sources in `cann/` become two libraries. One stands in for all of CANN, under the names of the libraries
that torch_npu is linked with; the other one has the kernels of aten operators (the sources `aten_*.cpp`) and
is linked with torch and torch_npu. What torch_npu is linked with and nobody wrote becomes a function that
aborts with its own name.

The first library alone can be built against another torch_npu than the one here, without its torch
(`symbols.py`).

A build is kept in a directory named after everything that it depends on, so that it is made once. Compiled
sources are kept as well, because the kernels take far longer than the rest.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
SOURCES = Path(__file__).resolve().parent / "cann"
SITE = REPOSITORY / ".venv" / "beside" / "ascend_sim"

CHOSEN = "ASCEND_SIM_TORCH_NPU"  # a folder with another one (scripts/environment/torch_npu.py)

LIBRARY = "libascend_sim.so"
KERNEL_LIBRARY = "libascend_sim_kernels.so"
# The libraries of CANN that torch_npu is linked with or opens: links to one file, which is loaded once.
NAMES_IN_CANN = (
    "libascendcl.so",
    "libacl_op_compiler.so",
    "libacl_tdt_channel.so",
    "libge_runner.so",
    "libgraph.so",
    "libhccl.so",
    "libnnopbase.so",
    "libopapi.so",
)
# Directories of an installed CANN that torch_npu looks for when it is imported. They are empty.
HOME = "cann"
DIRECTORIES_IN_HOME = ("runtime", "compiler", "opp")
FUNCTIONS_OF_CANN = re.compile(r"(?:acl[A-Za-z]|rt[A-Z]|Msprof|Hccl|Adx|mstx)\w*")

OBJECTS = "objects"
REFUSED = "refused.txt"  # names of the functions that abort, a line each
INCLUDE = re.compile(r'^#include "([^"]+)"', re.MULTILINE)
FLAGS = ("-std=c++20", "-O1", "-fPIC", "-pthread")
COMPILE_LIMIT_S = 300.0
OTHER_BUILD_LIMIT_S = 120.0


class BuildError(Exception):
    """The compiler or the linker refused; the text is what it said."""


def unavailable() -> str | None:
    """Why the simulated Ascend cannot be built here, in one sentence; None when it can."""
    if shutil.which("g++") is None:
        return "simulated Ascend needs g++, which is not installed"
    if _package("torch") is None:
        return "simulated Ascend needs torch, which is not installed"
    if torch_npu() is None:
        return (
            f"simulated Ascend needs the torch_npu wheel, installed or in {SITE} "
            "(python -m scripts.environment.install ascend_sim)"
        )
    return None


def torch_npu() -> Path | None:
    """The directory of the package torch_npu, which is not imported: one that was chosen, or the suite's."""
    if chosen := os.environ.get(CHOSEN):
        return Path(chosen) / "torch_npu"
    if (SITE / "torch_npu").is_dir():
        return SITE / "torch_npu"
    return _package("torch_npu")


def build() -> Path:
    """The directory with the libraries, made now unless it was made before.

    Processes that call this at the same time end up with the same directory. Raises BuildError.
    """
    reason = unavailable()
    if reason is not None:
        raise BuildError(reason)
    return _build("build", _torch_npu(), sorted(SOURCES.glob("aten_*.cpp")))


def build_cann(package: Path) -> Path:
    """The directory with the libraries of CANN for the torch_npu in a folder, without the kernels.

    Neither that torch_npu nor a torch is loaded. Raises BuildError.
    """
    return _build("cann", package, ())


def _build(name: str, package: Path, kernels: Sequence[Path]) -> Path:
    cache = Path(os.environ.get("ASCEND_SIM_CACHE") or REPOSITORY / ".venv" / "ascend_sim")
    target = cache / f"{name}-{_key([*SOURCES.glob('*.h'), *SOURCES.glob('*.cpp')], package)}"
    if target.is_dir():
        return target
    cache.mkdir(parents=True, exist_ok=True)
    with _only_builder(cache):
        if target.is_dir():
            return target
        with tempfile.TemporaryDirectory(prefix="building-", dir=cache) as scratch:
            finished = Path(scratch) / "finished"
            _build_into(finished, Path(scratch), cache / OBJECTS, package, kernels)
            with contextlib.suppress(OSError):  # somebody else was faster, with the same result
                finished.rename(target)
    assert target.is_dir(), f"{target} was not made"
    return target


def _package(name: str) -> Path | None:
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def _torch() -> Path:
    package = _package("torch")
    assert package is not None
    return package


def torch_libraries() -> Path:
    """The folder with the shared libraries of torch."""
    return _torch() / "lib"


def _torch_npu() -> Path:
    package = torch_npu()
    assert package is not None
    return package


def _key(sources: Iterable[Path], package: Path) -> str:
    """Of what is made from these files for a torch_npu, and of all else that it depends on."""
    digest = hashlib.sha256()
    for source in [Path(__file__), package / "version.py", *sorted(sources)]:
        digest.update(f"{source.name} {source.stat().st_size}\n".encode())
        digest.update(source.read_bytes())
    for part in (package, _torch(), importlib.metadata.version("torch"), _compiler()):
        digest.update(f"{part}\n".encode())
    return digest.hexdigest()[:16]


@functools.cache
def _compiler() -> str:
    return _run(["g++", "--version"])


def _with_headers(source: Path) -> set[Path]:
    """A source and all of ours that it includes."""
    found: set[Path] = set()
    todo = [source]
    while todo:
        found.add(file := todo.pop())
        included = {SOURCES / name for name in INCLUDE.findall(file.read_text())}
        todo += sorted(included - found)
    return found


@contextlib.contextmanager
def _only_builder(cache: Path) -> Iterator[None]:
    """Waits for another process that builds. One that takes too long is overtaken, which only costs time."""
    deadline = time.monotonic() + OTHER_BUILD_LIMIT_S
    with (cache / "build.lock").open("w") as lock:
        while time.monotonic() < deadline:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
        yield


def _build_into(
    target: Path, scratch: Path, objects_made_before: Path, package: Path, kernel_sources: Sequence[Path]
) -> None:
    target.mkdir()
    objects_made_before.mkdir(exist_ok=True)

    def compile_once(source: Path, includes: Sequence[str]) -> Path:
        compiled = objects_made_before / f"{source.stem}-{_key(_with_headers(source), package)}.o"
        if not compiled.exists():
            _compile(source, scratch, includes).rename(compiled)
        return compiled

    sources = sorted(set(SOURCES.glob("*.cpp")) - set(SOURCES.glob("aten_*.cpp")))
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the kernels first, because they take longest
        kernels = [pool.submit(compile_once, source, _kernel_includes()) for source in kernel_sources]
        parts = [pool.submit(compile_once, source, _includes(package)) for source in sources]
        objects = [part.result() for part in parts]
        refused = sorted(linked_functions(package) - symbols(objects, "--defined-only"))
        (target / REFUSED).write_text("".join(f"{name}\n" for name in refused))
        objects.append(_compile(_write_refusals(scratch / "refusals.cpp", refused), scratch, ()))
        _link(target / LIBRARY, objects)
        for name in NAMES_IN_CANN:
            (target / name).symlink_to(LIBRARY)
        for name in DIRECTORIES_IN_HOME:
            (target / HOME / name).mkdir(parents=True)
        if kernels:
            _link(target / KERNEL_LIBRARY, [kernel.result() for kernel in kernels], _kernel_libraries(target))


def _includes(package: Path) -> list[str]:
    include = package / "include"
    cann = include / "third_party"
    # As the headers of a system, so that our warnings are about our sources.
    return [
        argument
        for path in (cann / "acl" / "inc", cann / "hccl" / "inc", include)
        for argument in ("-isystem", str(path))
    ]


def _kernel_includes() -> list[str]:
    include = _torch() / "include"
    paths = (include, include / "torch" / "csrc" / "api" / "include", Path(sysconfig.get_paths()["include"]))
    return [argument for path in paths for argument in ("-isystem", str(path))] + _includes(_torch_npu())


def _kernel_libraries(target: Path) -> list[str]:
    of_torch, of_torch_npu = torch_libraries(), _torch_npu() / "lib"
    return [
        f"-L{of_torch}",
        "-ltorch_cpu",
        "-lc10",
        f"-L{of_torch_npu}",
        "-ltorch_npu",
        f"-L{target}",
        "-lascendcl",
        f"-Wl,-rpath,{of_torch}:{of_torch_npu}:$ORIGIN",
        "-Wl,--allow-shlib-undefined",
    ]


def _compile(source: Path, scratch: Path, includes: Sequence[str]) -> Path:
    compiled = scratch / f"{source.stem}.o"
    _run(["g++", *FLAGS, "-Wall", "-Wextra", *includes, "-c", str(source), "-o", str(compiled)])
    return compiled


def _link(library: Path, objects: Iterable[Path], libraries: Sequence[str] = ()) -> None:
    _run(["g++", *FLAGS, "-shared", *map(str, objects), *libraries, "-o", str(library)])


def _write_refusals(target: Path, names: Iterable[str]) -> Path:
    functions = [f'extern "C" void {name}() {{ sim::not_simulated("{name}"); }}' for name in names]
    declaration = "namespace sim { [[noreturn]] void not_simulated(const char* what); }"
    target.write_text("\n".join([declaration, *functions, ""]))
    return target


def libraries(package: Path) -> list[Path]:
    """Of a torch_npu, those that are loaded when it is imported."""
    names = ("libtorch_npu.so", "libnpu_profiler.so", "libtensorpipe.so")
    return [*(package / "lib" / name for name in names), *sorted(package.glob("_C*.so"))]


def linked_functions(package: Path) -> set[str]:
    """Functions of CANN that a torch_npu is linked with."""
    undefined = symbols(libraries(package), "-D", "--undefined-only")
    return {name for name in undefined if FUNCTIONS_OF_CANN.fullmatch(name)}


def symbols(files: Iterable[Path], *options: str) -> set[str]:
    """Names that `nm` lists for these files, without versions."""
    lines = _run(["nm", *options, *map(str, files)]).splitlines()
    return {line.split()[-1].split("@")[0] for line in lines if line and not line.endswith(":")}


def _run(command: Sequence[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_LIMIT_S, check=False)
    if result.returncode != 0:
        raise BuildError(f"{' '.join(command)}\n{result.stderr}")
    return result.stdout


if __name__ == "__main__":
    print(build())
