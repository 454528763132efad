"""Every function of CANN that a torch_npu wants is written, accepted or refused by name."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import pytest

from ascend_sim import build, symbols

pytestmark = pytest.mark.thorough

TESTED = "2.13.0"  # what tests/ascend runs on
OTHERS = (
    "2.10.0",
    "2.10.0.post7",
    "2.14.0",
)  # the version of the images with CANN 9.0, its newest, the newest

CANN = """
#include <acl/acl.h>
#include <cstdlib>
namespace sim { [[noreturn]] void not_simulated(const char*) { std::abort(); } }
extern "C" aclError aclrtGetDeviceCount(uint32_t* count) { *count = 1; return ACL_SUCCESS; }
extern "C" int HcclGetRankSize(void*, uint32_t*) { return 0; }
"""
PROGRAM = """
#include <cstdio>
extern "C" int aclrtGetDeviceCount(unsigned* count);
extern "C" int aclrtOfTomorrow();
%s
extern "C" const char* by_name(int which) {
  static const char* const names[] = {"aclrtMemcpyBatch", "aclInBrackets", "HcclGetRankSize"};
  return names[which];
}
extern "C" int call() { unsigned count; return aclrtGetDeviceCount(&count) + aclrtOfTomorrow() %s; }
"""


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a torch_npu: its libraries and the simulated CANN are the test's, the headers real."""
    monkeypatch.setenv("ASCEND_SIM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build, "SOURCES", tmp_path / "sources")
    build.SOURCES.mkdir()
    (build.SOURCES / "cann.cpp").write_text(CANN)
    package, real = tmp_path / "torch_npu", build.torch_npu()
    assert real is not None
    (package / "lib").mkdir(parents=True)
    (package / "include").symlink_to(real / "include")
    (package / "version.py").write_text("__version__ = '9.9.0'\n")
    for name in ("libnpu_profiler", "libtensorpipe"):
        compile_library(package / "lib" / f"{name}.so", "")
    return package


def compile_library(target: Path, program: str) -> None:
    """Linked with a library of CANN, of which the linker only notes the name."""
    stub = target.parent / "stub"
    link: list[str] = []
    if target.stem != "libascendcl":
        stub.mkdir(exist_ok=True)
        compile_library(stub / "libascendcl.so", "")
        link = [f"-L{stub}", "-Wl,--no-as-needed", "-lascendcl"]
    command = ["g++", "-shared", "-fPIC", "-x", "c++", "-", "-x", "none", *link, "-o", str(target)]
    subprocess.run(command, input=program, text=True, check=True, timeout=60)


def test_functions_are_told_apart(planted: Path) -> None:
    compile_library(planted / "lib/libtorch_npu.so", PROGRAM % ("", ""))
    comparison = symbols.compare(planted)
    assert comparison.written == ["aclrtGetDeviceCount"]
    assert comparison.refused == ["aclrtOfTomorrow"]
    assert comparison.found == ["HcclGetRankSize"]
    assert comparison.left_out == ["aclrtMemcpyBatch"], "a text that no header declares is no function"


@pytest.mark.parametrize(
    ("declaration", "call", "unresolved", "of_torch"),
    [
        ('extern "C" int ofNoLibrary();', "+ ofNoLibrary()", ["ofNoLibrary"], 0),
        ("namespace ge { int graph(); }", "+ ge::graph()", ["_ZN2ge5graphEv"], 0),
        ("namespace c10 { int of_tomorrow(); }", "+ c10::of_tomorrow()", [], 1),
    ],
    ids=["another name", "a function of C++", "of another torch"],
)
def test_what_has_no_name_of_cann_is_not_overlooked(
    planted: Path, declaration: str, call: str, unresolved: list[str], of_torch: int
) -> None:
    compile_library(planted / "lib/libtorch_npu.so", PROGRAM % (declaration, call))
    comparison = symbols.compare(planted)
    assert comparison.unresolved == unresolved
    assert len(comparison.of_another_torch) == of_torch


def test_headers_that_do_not_fit_are_an_error(planted: Path) -> None:
    compile_library(planted / "lib/libtorch_npu.so", "")
    (planted / "include").unlink()
    (planted / "include").mkdir()
    with pytest.raises(build.BuildError, match="acl/acl.h"):
        symbols.compare(planted)


def test_the_torch_npu_that_tests_run_on_is_complete() -> None:
    package = build.torch_npu()
    assert package is not None
    assert symbols.version_in(package) == TESTED
    comparison = symbols.compare(package)
    assert not comparison.unresolved
    assert not comparison.of_another_torch
    assert {"aclrtSynchronizeStream", "aclrtMemcpyAsync"} <= set(comparison.written)
    assert "aclopCompileAndExecute" in comparison.refused
    assert {"HcclSend", "HcclRecv", "HcclBatchSendRecv", "aclnnInplaceCopy"} <= set(comparison.found)
    assert {"aclmdlRICaptureBegin", "aclmdlRIExecuteAsync", "aclrtValueWait"} <= set(comparison.found)
    assert "aclmdlRIAddCondTask" in comparison.left_out


@pytest.mark.parametrize("version", OTHERS)
def test_other_versions_are_complete(version: str) -> None:
    """And they want nothing that the tested one does not want, so that its tests stand for theirs."""
    package, tested = symbols.kept(version), build.torch_npu()
    if package is None:
        pytest.skip(
            f"torch_npu {version} is not kept here: python -m ascend_sim.symbols --torch-npu {version} "
            "downloads it (40 MB)"
        )
    assert tested is not None
    assert symbols.version_in(package) == version
    comparison, run = symbols.compare(package), symbols.compare(tested)
    assert not comparison.unresolved
    assert comparison.of_another_torch, "this torch would do: tests/ascend can run on it"
    assert set(comparison.written) <= set(run.written)
    assert set(comparison.refused) <= set(run.refused)
    assert set(comparison.found) <= {*run.found, *run.written}
    assert set(comparison.left_out) <= {*run.left_out, *run.refused}


def test_the_command_prints_a_line_a_group(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["symbols"])
    assert symbols.main() == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"torch_npu {TESTED} on the simulated CANN"
    assert len(lines) == len(symbols.TITLES)


def test_unresolved_symbols_are_named_and_an_exit_status(
    planted: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_library(
        planted / "lib/libtorch_npu.so", PROGRAM % ('extern "C" int of_nowhere();', "+ of_nowhere()")
    )
    monkeypatch.setattr(sys, "argv", ["symbols", "--torch-npu", "9.9"])
    monkeypatch.setattr(symbols, "fetch", {"9.9.0": planted}.__getitem__)
    assert symbols.main() == 1
    assert "    of_nowhere\n" in capsys.readouterr().out


def test_a_version_that_does_not_exist_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(symbols, "KEPT", tmp_path / "kept")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setattr(sys, "argv", ["symbols", "--torch-npu", "9.9"])
    assert symbols.main() == 1
    assert capsys.readouterr().err.startswith("symbols: torch_npu 9.9.0 cannot be downloaded (")
    assert not list((tmp_path / "kept").iterdir())


def test_versions_are_those_of_the_index() -> None:
    assert [symbols.version_of(text) for text in ("2.10", "2.10.0.post7")] == ["2.10.0", "2.10.0.post7"]
    with pytest.raises(argparse.ArgumentTypeError, match="'newest' is not a version of torch_npu"):
        symbols.version_of("newest")
