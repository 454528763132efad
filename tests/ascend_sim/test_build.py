"""Building the simulated CANN: what comes out, when it is made again, and what happens when it cannot be."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import shutil
from collections.abc import Callable
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from unittest import mock

import pytest

from ascend_sim import build
from ascend_sim.environment import environment

pytestmark = pytest.mark.thorough

BUILD_LIMIT_S = 120.0

HEADER = "int answer();\n"
SOURCE = '#include "answer.h"\nint answer() { return 42; }\n'


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A simulator of two small files, and a cache of its own."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "answer.h").write_text(HEADER)
    (sources / "answer.cpp").write_text(SOURCE)
    (sources / "other.cpp").write_text("int other() { return 1; }\n")
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setenv("ASCEND_SIM_CACHE", str(tmp_path / "cache"))
    return sources


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the sources that are compiled from now on."""
    names: list[str] = []
    original = build._run

    def noted(command: list[str]) -> str:
        if "-c" in command:
            names.append(Path(command[command.index("-c") + 1]).name)
        return original(command)

    monkeypatch.setattr(build, "_run", noted)
    return names


def cache_of(sources: Path) -> set[str]:
    return {path.name for path in (sources.parent / "cache").iterdir()}


def test_the_libraries_of_cann_are_one_file() -> None:
    made = build.build()
    assert {(made / name).resolve() for name in build.NAMES_IN_CANN} == {made / build.LIBRARY}
    assert (made / build.KERNEL_LIBRARY).is_file()
    assert all((made / build.HOME / name).is_dir() for name in build.DIRECTORIES_IN_HOME)


def test_what_was_built_is_not_built_again(compiled: list[str]) -> None:
    build.build()
    compiled.clear()
    assert build.build() == build.build()
    assert not compiled


def test_only_what_changed_is_compiled_again(small: Path, compiled: list[str]) -> None:
    first = build.build()
    assert sorted(compiled) == ["answer.cpp", "other.cpp", "refusals.cpp"]
    compiled.clear()
    (small / "answer.h").write_text(HEADER.replace("int", "long"))
    (small / "answer.cpp").write_text(SOURCE.replace("int", "long"))
    second = build.build()
    assert second != first
    assert sorted(compiled) == ["answer.cpp", "refusals.cpp"]
    compiled.clear()
    (small / "answer.h").write_text(HEADER)
    (small / "answer.cpp").write_text(SOURCE)
    assert build.build() == first
    assert not compiled


@pytest.mark.parametrize("changed", ["answer.h", "answer.cpp", "new.cpp"])
def test_every_source_counts(small: Path, changed: str) -> None:
    first = build.build()
    with (small / changed).open("a") as file:
        file.write("// more\n")
    assert build.build() != first


def test_the_version_of_torch_counts(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build.build()
    monkeypatch.setattr(build.importlib.metadata, "version", lambda name: "1.0")
    assert build.build() != first


def test_nothing_but_the_build_is_left(small: Path) -> None:
    made = build.build()
    assert cache_of(small) == {made.name, build.OBJECTS, "build.lock"}


def test_an_error_says_what_the_compiler_said_and_leaves_nothing(small: Path) -> None:
    (small / "answer.cpp").write_text("int answer() { return nothing; }\n")
    with pytest.raises(build.BuildError, match=r"(?s)answer\.cpp.*nothing"):
        build.build()
    assert cache_of(small) == {build.OBJECTS, "build.lock"}


def _build_in_process(sources: Path, barrier: Barrier, answers: Queue[Path]) -> None:
    with mock.patch.object(build, "SOURCES", sources):
        barrier.wait(BUILD_LIMIT_S)
        answers.put(build.build())


def test_two_processes_that_build_at_once_get_the_same(small: Path) -> None:
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(2), context.Queue()
    processes = [
        context.Process(target=_build_in_process, args=(small, barrier, answers), daemon=True)
        for _ in range(2)
    ]
    for process in processes:
        process.start()
    made = {answers.get(timeout=BUILD_LIMIT_S) for _ in processes}
    for process in processes:
        process.join(BUILD_LIMIT_S)
    assert len(made) == 1
    assert cache_of(small) == {made.pop().name, build.OBJECTS, "build.lock"}


def test_a_build_that_somebody_else_finished_first_is_dropped(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original: Callable[..., None] = build._build_into

    def overtaken(target: Path, *others: object) -> None:
        original(target, *others)
        theirs = small.parent / "cache" / f"build-{build._key(small.iterdir(), build._torch_npu())}"
        shutil.copytree(target, theirs, symlinks=True)
        (theirs / "theirs").touch()

    monkeypatch.setattr(build, "_build_into", overtaken)
    made = build.build()
    assert (made / "theirs").exists()
    assert cache_of(small) == {made.name, build.OBJECTS, "build.lock"}


def test_a_builder_that_takes_too_long_is_overtaken(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "OTHER_BUILD_LIMIT_S", 0.2)
    cache = small.parent / "cache"
    cache.mkdir()
    with build._only_builder(cache):
        assert build.build().is_dir()


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert build.unavailable() is None
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "which", lambda name: None)
        assert "g++" in str(build.unavailable())
        with pytest.raises(build.BuildError, match=r"g\+\+"):
            build.build()
    with monkeypatch.context() as patch:
        patch.setattr(build, "SITE", tmp_path)
        patch.setattr(build, "_package", lambda name: tmp_path if name == "torch" else None)
        assert "torch_npu wheel" in str(build.unavailable())
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        assert "needs torch," in str(build.unavailable())


def test_the_environment_of_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/mine")
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    made = environment(devices=3, memory_mb=100, eager_bytes=5, hccl_exec_timeout=7)
    assert made["LD_LIBRARY_PATH"] == str(build.build())
    assert made["PYTHONPATH"].split(os.pathsep)[1:] == ["/mine"]
    assert {name: made[name] for name in made if name.startswith(("ASCEND_SIM", "HCCL"))} == {
        "ASCEND_SIM_DEVICES": "3",
        "ASCEND_SIM_MEMORY_MB": "100",
        "ASCEND_SIM_EAGER_BYTES": "5",
        "HCCL_EXEC_TIMEOUT": "7",
    }
    for name, value in made.items():
        monkeypatch.setenv(name, value)
    assert environment(devices=3)["PYTHONPATH"] == made["PYTHONPATH"], "nothing is added twice"
