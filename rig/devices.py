"""What a server needs for the device it runs on: environment variables and arguments of SGLang."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from scripts.environment.parts import PartError, provide

ROOT = Path(__file__).resolve().parents[1]

EAGER = ("--disable-cuda-graph",)  # arguments of a server that decodes without graphs

# For either device. One thread per rank: two ranks that each start a thread per core wait for each other's
# threads, and a forward pass of 20 ms takes a second. torch.compile is off because its warm-up costs 14 s
# per start and a C++ compiler. Gloo would otherwise listen on the interface of the host name.
ONE_MACHINE: Mapping[str, str] = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCH_COMPILE_DISABLE": "1",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}


class DeviceUnavailableError(RuntimeError):
    """This machine cannot provide the device; the message is one sentence."""


@dataclass(frozen=True)
class Device:
    """A device as a server sees it.

    `environment(ranks)` gives the variables of a server with so many ranks on one machine; it may raise
    `DeviceUnavailableError`. `real`: an accelerator, on which a server gets its user's arguments and none of
    those for a tiny model on a small machine.
    """

    title: str
    environment: Callable[[int], Mapping[str, str]]
    arguments: tuple[str, ...]
    real: bool = False


def cpu_environment(ranks: int) -> Mapping[str, str]:
    return {
        **ONE_MACHINE,
        "SGLANG_USE_CPU_ENGINE": "1",
        "SGLANG_CPU_OMP_THREADS_BIND": cores_per_rank(ranks),
    }


def cores_per_rank(ranks: int) -> str:
    """SGLANG_CPU_OMP_THREADS_BIND: one core per rank, round robin over those we may use."""
    cores = sorted(os.sched_getaffinity(0))
    return "|".join(str(cores[rank % len(cores)]) for rank in range(ranks))


def simulated_npu_environment(ranks: int) -> Mapping[str, str]:
    """torch_npu on the simulated Ascend, one device a rank, and what SGLang expects on an Ascend machine."""
    from ascend_sim import sglang_on_sim
    from ascend_sim.build import torch_npu, unavailable
    from ascend_sim.environment import environment

    if torch_npu() is None:
        try:
            provide("ascend_sim")
        except PartError as error:
            raise DeviceUnavailableError(str(error)) from error
    if reason := unavailable():
        raise DeviceUnavailableError(reason)
    simulator = environment(devices=ranks)
    paths = [str(sglang_on_sim.STARTUP), simulator["PYTHONPATH"]]
    return {
        **ONE_MACHINE,
        **simulator,
        "PYTHONPATH": os.pathsep.join(paths),
        # Weights stay in the format they have: the formats of the matrix unit are not simulated.
        "SGLANG_NPU_DISABLE_ACL_FORMAT_WEIGHT": "1",
    }


def no_environment(ranks: int) -> Mapping[str, str]:
    """A real machine has been set up by its owner."""
    return {}


def simulated_npu(flag: str) -> Device:
    """Decode replays graphs unless EAGER is among a server's arguments. Few sizes, after the flag that takes
    them: each is captured at the start, after two forwards of it."""
    arguments = ("--device", "npu", flag, "1", "2", "4", "8")
    return Device("the simulated Ascend", simulated_npu_environment, arguments)


SIMULATED, SIMULATED_BEFORE_0_5_15 = "npu-sim", "npu-sim before 0.5.15"
DEVICES: Mapping[str, Device] = {
    "cpu": Device("CPU", cpu_environment, ("--device", "cpu")),
    SIMULATED: simulated_npu("--cuda-graph-bs-decode"),
    SIMULATED_BEFORE_0_5_15: simulated_npu("--cuda-graph-bs"),
    "npu": Device("Ascend", no_environment, ("--device", "npu"), real=True),
    "auto": Device("the device that SGLang finds", no_environment, (), real=True),
}
