"""What a torch_npu wants of CANN, and which of it the simulated CANN has.

    python -m ascend_sim.symbols                                of the torch_npu that the simulator uses
    python -m ascend_sim.symbols --torch-npu 2.10.0 2.14.0      of others: downloaded, 40 MB each, and kept
    python -m ascend_sim.symbols --names                        with all names

The simulated CANN is built against the headers of that wheel, and the dynamic loader says which symbols it
does not find. This is the link level: neither torch_npu nor a torch of its version is loaded.

Exit status: 0, or 1 if there is a symbol that is neither written, accepted nor refused by name.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass, fields
from pathlib import Path

from ascend_sim import build

KEPT = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sglang-npu-pp" / "torch_npu"
"""Other versions of torch_npu: a folder each, named by the version."""

DOWNLOAD_LIMIT_S = 600
LOADER_LIMIT_S = 120
NEEDED = re.compile(r"torch_npu/(version\.py|_C[^/]*\.so|lib/[^/]*\.so|include/.*)")  # of a wheel
NAME_IN_LIBRARY = re.compile(rb"(?<=\0)(?:%s)(?=\0)" % build.FUNCTIONS_OF_CANN.pattern.encode())
NOT_FOUND = re.compile(r"^undefined symbol: (\w+)", re.MULTILINE)  # as `ldd -r` says it
OF_TORCH = re.compile(r"_Z\w*?(?<!\d)(?:2at|3c10|4c10d|5torch|6caffe2)\w*")  # by namespace, mangled
OF_PYTHON = re.compile(r"_?Py\w*")


class WheelError(Exception):
    """A torch_npu could not be had; the message is one sentence."""


@dataclass(frozen=True)
class Comparison:
    """Functions of CANN that a torch_npu uses, by what becomes of them on the simulated one."""

    written: list[str]
    """Linked with, and simulated or accepted with a reason."""
    refused: list[str]
    """Linked with; a call aborts with the name."""
    found: list[str]
    """Looked up by name while torch_npu runs, and there."""
    left_out: list[str]
    """Looked up by name and not there: torch_npu goes without, or raises an error with the name."""
    unresolved: list[str]
    """Not found by the dynamic loader, and not from torch: torch_npu could not be loaded."""
    of_another_torch: list[str]
    """Not found by the dynamic loader because the torch here is not the one of this torch_npu."""


def compare(package: Path) -> Comparison:
    """Of the torch_npu in a folder.

    Raises:
        build.BuildError: the simulated CANN does not fit its headers.
    """
    cann = build.build_cann(package)
    linked = build.linked_functions(package)
    refused = set((cann / build.REFUSED).read_text().split())
    exported = build.symbols([cann / build.LIBRARY], "-D", "--defined-only")
    looked_up = (_names_inside(package) & (_declared(package) | exported)) - linked
    missing = _not_found(package, cann)
    torch = {name for name in missing if OF_TORCH.fullmatch(name)}
    return Comparison(
        written=sorted(linked & exported - refused),
        refused=sorted(linked & refused),
        found=sorted(looked_up & exported),
        left_out=sorted(looked_up - exported),
        unresolved=sorted(missing - torch),
        of_another_torch=sorted(torch),
    )


def _names_inside(package: Path) -> set[str]:
    """Texts in its libraries that look like functions of CANN: dlsym gets them as such."""
    texts = (library.read_bytes() for library in build.libraries(package))
    return {match[0].decode() for text in texts for match in NAME_IN_LIBRARY.finditer(text)}


def _declared(package: Path) -> set[str]:
    """Functions of CANN in the headers: other texts that look like them are messages, or parts of names."""
    headers = sorted((package / "include").rglob("*.h"))
    function = re.compile(rf"\b({build.FUNCTIONS_OF_CANN.pattern})\s*\(")
    return {match[1] for header in headers for match in function.finditer(header.read_text(errors="ignore"))}


def _not_found(package: Path, cann: Path) -> set[str]:
    """Symbols that the dynamic loader misses with the simulated CANN and the torch here.

    Asked for what Python loads: the other libraries use each other's functions.
    """
    torch = build.torch_libraries()
    environ = {**os.environ, "LD_LIBRARY_PATH": f"{cann}:{package / 'lib'}:{torch}"}
    missing: set[str] = set()
    for library in (package / "lib" / "libtorch_npu.so", *package.glob("_C*.so")):
        done = subprocess.run(
            ["ldd", "-r", str(library)],
            env=environ,
            capture_output=True,
            text=True,
            timeout=LOADER_LIMIT_S,
            check=False,
        )
        missing |= set(NOT_FOUND.findall(done.stdout + done.stderr))
    return {name for name in missing if not OF_PYTHON.fullmatch(name)}


# --- other versions ------------------------------------------------------------------------------


def version_of(text: str) -> str:
    """As the package index writes it: "2.10" is 2.10.0."""
    if not re.fullmatch(r"\d+\.\d+(\.\d+)?(\.post\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a version of torch_npu, such as 2.10.0")
    return f"{text}.0" if text.count(".") == 1 else text


def kept(version: str) -> Path | None:
    """The folder of the package torch_npu, None if that version was not downloaded yet."""
    package = KEPT / version / "torch_npu"
    return package if package.is_dir() else None


def fetch(version: str) -> Path:
    """The folder of the package torch_npu: downloaded now, unless it was before.

    Raises:
        WheelError: the package index does not have it for this Python and machine, or does not answer.
    """
    if (package := kept(version)) is not None:
        return package
    KEPT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="download-", dir=KEPT) as folder:
        with zipfile.ZipFile(_download(version, Path(folder))) as wheel:
            names = [name for name in wheel.namelist() if NEEDED.fullmatch(name)]
            wheel.extractall(Path(folder) / "unpacked", names)
        (Path(folder) / "unpacked").rename(KEPT / version)
    return KEPT / version / "torch_npu"


def _download(version: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    try:
        done = subprocess.run(
            [*command, "-d", str(folder), f"torch_npu=={version}"],
            capture_output=True,
            text=True,
            timeout=DOWNLOAD_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise WheelError(
            f"torch_npu {version} was not downloaded within {DOWNLOAD_LIMIT_S} s; try again."
        ) from None
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise WheelError(f"torch_npu {version} cannot be downloaded ({reason}); name another version.")
    return wheels[0]


# --- command -------------------------------------------------------------------------------------


def report(version: str, comparison: Comparison, names: bool) -> str:
    """A line for each group of functions; with `names`, what is in it."""
    lines = [f"torch_npu {version} on the simulated CANN"]
    for each in fields(Comparison):
        group: list[str] = getattr(comparison, each.name)
        lines.append(f"  {TITLES[each.name]:<42}{len(group):>4}")
        if group and (names or each.name == "unresolved"):
            lines.append(f"    {', '.join(group)}")
    return "\n".join(lines)


TITLES = {
    "written": "linked with, simulated or accepted",
    "refused": "linked with, refused by name",
    "found": "looked up by name, there",
    "left_out": "looked up by name, not there",
    "unresolved": "unresolved",
    "of_another_torch": "of torch, which is another one here",
}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--torch-npu", nargs="+", type=version_of, default=[], metavar="VERSION")
    parser.add_argument("--names", action="store_true", help="print the names of all functions")
    options = parser.parse_args()
    try:
        packages = [fetch(version) for version in options.torch_npu] or _here()
        comparisons = {package: compare(package) for package in packages}
    except (WheelError, build.BuildError) as error:
        print(f"symbols: {error}", file=sys.stderr)
        return 1
    if not comparisons:
        print(f"symbols: {build.unavailable()}", file=sys.stderr)
        return 1
    for package, comparison in comparisons.items():
        print(report(version_in(package), comparison, options.names))
    return 1 if any(each.unresolved for each in comparisons.values()) else 0


def _here() -> list[Path]:
    package = build.torch_npu()
    return [] if package is None else [package]


def version_in(package: Path) -> str:
    """What the torch_npu in a folder calls itself."""
    match = re.search(r"__version__ = '(.+)'", (package / "version.py").read_text())
    return match[1] if match else "of an unknown version"


if __name__ == "__main__":
    sys.exit(main())
