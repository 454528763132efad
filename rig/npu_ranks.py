"""Processes of tests on the simulated Ascend: ranks that stay, and programs that run once."""

from __future__ import annotations

import contextlib
import importlib
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from unittest import mock

from ascend_sim import build
from ascend_sim.environment import environment
from rig.harness import Here, Team, join_process_group

MEMORY_MB = 1024
PROGRAM_LIMIT_S = 60.0


def start_team(
    size: int,
    *,
    devices: int | None = None,
    memory_mb: int = MEMORY_MB,
    process_group: bool = False,
    kernels: bool = False,
    variables: Mapping[str, str] | None = None,
    **settings: str | int,
) -> Team:
    """So many rank processes, each with torch_npu loaded and the device of its number made current.

    `devices`: of each process, if not as many as ranks. `process_group`: they join one over HCCL. `kernels`:
    aten operators get theirs. `variables` go to the environment, `settings` are those of `environment`.
    """
    needed = {**environment(devices=devices or size, memory_mb=memory_mb, **settings), **(variables or {})}
    with mock.patch.dict(os.environ, needed):  # the loader reads them when a process starts
        team = Team(size)
    team.each(load_torch_npu, kernels)
    if process_group:
        team.each(join_process_group, "world", size, "npu")
    return team


def load_torch_npu(here: Here, with_kernels: bool) -> None:
    """multiprocessing gives a child its parent's search path, on which torch_npu is not."""
    package = build.torch_npu()
    assert package is not None
    sys.path.insert(0, str(package.parent))
    importlib.import_module("torch_npu").npu.set_device(here.index)
    if with_kernels:
        from ascend_sim import kernels

        kernels.install()


def run_program(
    source: str,
    *arguments: str,
    memory_mb: int = MEMORY_MB,
    limit_s: float = PROGRAM_LIMIT_S,
    **settings: str | int,
) -> subprocess.CompletedProcess[str]:
    """A Python program in a process of its own, with one device, from its beginning to its end."""
    with start_program(source, *arguments, memory_mb=memory_mb, **settings) as program:
        output, errors = program.communicate(timeout=limit_s)
        return subprocess.CompletedProcess(program.args, program.returncode, output, errors)


@contextlib.contextmanager
def start_program(
    source: str, *arguments: str, memory_mb: int = MEMORY_MB, **settings: str | int
) -> Iterator[subprocess.Popen[str]]:
    """A Python program that is running, with one device; it is killed at the end."""
    needed = environment(devices=1, memory_mb=memory_mb, **settings)
    needed["PYTHONPATH"] += f"{os.pathsep}{build.REPOSITORY}"
    with subprocess.Popen(
        [sys.executable, "-c", source, *arguments],
        env={**os.environ, **needed, "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as program:
        try:
            yield program
        finally:
            program.kill()
