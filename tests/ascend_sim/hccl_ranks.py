"""What rank processes do in the tests of the simulated HCCL, and how a test looks at them.

A message holds its number everywhere, so that one look tells whether it is the right one, and all of it.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from ascend_sim.controls import Simulator, Task
from rig.harness import Here

LIMIT_S = 20.0
TIME_OUT, EXCEPTION = 507048, 507049  # aclError of a stream: for the time limit of HCCL, and for the rest


def numbered(here: Here, number: int, elements: int) -> torch.Tensor:
    return torch.full((elements,), number, dtype=torch.int32).to(here.device)


def room(here: Here, elements: int) -> torch.Tensor:
    return numbered(here, -1, elements)


def numbers_in(tensor: torch.Tensor) -> list[int]:
    """All different numbers of a tensor, in order; one unless the message is damaged."""
    numbers: list[int] = tensor.cpu().unique().tolist()
    return numbers


def synchronize(here: Here) -> None:
    torch.get_device_module(here.device).synchronize()


def send_numbers(here: Here, peer: int, sizes: Sequence[int]) -> None:
    """Messages of these sizes; each holds its number."""
    for number, elements in enumerate(sizes):
        dist.send(numbered(here, number, elements), peer)
    synchronize(here)


def receive_numbers(here: Here, peer: int, sizes: Sequence[int]) -> list[list[int]]:
    received = [room(here, elements) for elements in sizes]
    for tensor in received:
        dist.recv(tensor, peer)
    return [numbers_in(tensor) for tensor in received]


def warm_up(here: Here) -> None:
    """The communicators of the pairs 0:1, 1:2 and 0:2, and that of the group."""
    for low, high in ((0, 1), (1, 2), (0, 2)):
        if here.index == low:
            send_numbers(here, high, [1])
        elif here.index == high:
            receive_numbers(here, low, [1])
    dist.all_reduce(numbered(here, 1, 1))
    synchronize(here)


# --- in the test's process -----------------------------------------------------------------------


def running(simulator: Simulator, name: str) -> list[Task]:
    """The tasks of that name that run now."""
    tasks = [stream.running for stream in simulator.listing().streams]
    return [task for task in tasks if task is not None and task.name == name]


def wait_for(simulator: Simulator, name: str, reason: str) -> Task:
    """Returns when a task of that name stands still for a reason that contains these words."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        for task in running(simulator, name):
            if task.waiting is not None and reason in task.waiting.reason:
                return task
        time.sleep(0.005)
    raise AssertionError(f"no {name} waits because {reason!r}:\n{simulator.listing()}")
