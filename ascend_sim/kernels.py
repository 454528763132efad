"""Kernels of the simulated Ascend: aten operators run PyTorch's own CPU kernels, on the stream's thread.

For processes that were started with `environment(...)`, in which `torch_npu` is the real one. What they
compute is what the CPU computes; they say nothing about the numerics or the speed of a real device.
"""

from __future__ import annotations

import ctypes
import functools
import os
from typing import NamedTuple

_STRETCHES_AT_A_TIME = 256
_REPORT = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_long)


class KernelCounts(NamedTuple):
    enqueued: int  # put on a stream; the host went on
    synchronous: int  # the host waited: a value or a size was asked for, or there is no Meta kernel


def install() -> int:
    """Give aten operators their kernels, and scaled_dot_product_attention its math kernel; return how many.

    With ASCEND_SIM_POISON=1 also `poison_freed_blocks()`.
    """
    installed: int = _library().ascend_sim_install_kernels()
    if os.environ.get("ASCEND_SIM_POISON", "0") == "1":
        poison_freed_blocks()
    return installed


def counts() -> KernelCounts:
    """How many operators have run since this process started."""
    enqueued, synchronous = ctypes.c_long(), ctypes.c_long()
    _library().ascend_sim_kernel_counts(ctypes.byref(enqueued), ctypes.byref(synchronous))
    return KernelCounts(enqueued.value, synchronous.value)


def synchronous_operators() -> dict[str, int]:
    """The operators that have made the host wait, and how often."""
    found: dict[str, int] = {}

    def report(name: bytes, calls: int) -> None:
        found[name.decode()] = calls

    _library().ascend_sim_synchronous_operators(_REPORT(report))
    return found


def occupy(milliseconds: int) -> None:
    """Make the current stream take so long, like a kernel: through torch_npu's task queue, using no core."""
    _library().ascend_sim_occupy(milliseconds)


class Stretch(NamedTuple):
    """A stretch of a stream, in nanoseconds. `begin` and `end` are of `time.monotonic_ns`, which all
    processes share. The others are what the stream had done before, and by the end: its tasks, and how much
    of that it only waited."""

    begin: int
    end: int
    tasks_before: int
    waited_before: int
    tasks_by_end: int
    waited_by_end: int


def begin_stretch() -> None:
    """A stretch of the current stream begins behind what has been launched on it so far."""
    _library().ascend_sim_begin_stretch()


def end_stretch(at_least_us: int = 0) -> None:
    """It ends behind what has been launched by now, and not before it has lasted so long: kernels are
    padded to the time that a device would take, without using a core."""
    _library().ascend_sim_end_stretch(ctypes.c_long(at_least_us))


def take_stretches() -> list[Stretch]:
    """The stretches of all streams that have ended since the last call, in the order of their ends."""
    size = len(Stretch._fields)
    numbers = (ctypes.c_uint64 * (size * _STRETCHES_AT_A_TIME))()
    found: list[Stretch] = []
    while count := _library().ascend_sim_take_stretches(numbers, ctypes.c_long(_STRETCHES_AT_A_TIME)):
        found += [Stretch(*numbers[size * number : size * (number + 1)]) for number in range(count)]
    return found


class HostWaits(NamedTuple):
    """Of one host thread: how long it stood still in calls of CANN, and how often."""

    nanoseconds: int
    waits: int


def host_waits() -> HostWaits:
    """Those of the calling thread so far: blocking copies, synchronisation with streams and events."""
    nanoseconds, count = ctypes.c_uint64(), ctypes.c_uint64()
    _library().ascend_sim_times_waited(ctypes.byref(nanoseconds), ctypes.byref(count))
    return HostWaits(nanoseconds.value, count.value)


def poison_freed_blocks() -> None:
    """From now on, overwrite memory with 0xff (NaN, -1) once torch_npu's caching allocator takes it back.

    That happens in stream order: a task "poison" takes its place behind what has been launched so far on
    the stream that owns the block, where a later allocation could write next. Memory is not poisoned when
    it is freed by something other than the caching allocator (workspaces of torch_npu, pinned host memory).
    When memory of a graph is poisoned, `cann/aten_poison.cpp` says.
    """
    import torch_npu

    torch_npu.npu._lazy_call(_library().ascend_sim_poison_freed_blocks)  # needs the allocator


@functools.cache
def _library() -> ctypes.CDLL:
    import torch_npu  # noqa: F401  (the library uses its symbols)

    return ctypes.CDLL("libascend_sim_kernels.so")
