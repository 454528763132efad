"""A probe for tests: counts what upstream would do, and fills gaps of the CPU path.

What it does is chosen by environment variables:

PP_PROBE_DIR          count torch.distributed point-to-point operations; one file a process
PP_PROBE_DEVICE_READS the host reads a device tensor while it handles results or prepares a batch, or copies
                      multimodal positions so that it waits: "fail" raises; "count" counts, in a file a
                      process in PP_PROBE_DIR
PP_PROBE_KEEP_FREE_PAGES=1
                      the first list of free pages is not freed while a stream still reads it
PP_PROBE_FAKE_KV=1    a disaggregated server moves its KV cache with SGLang's own fake backend
PP_PROBE_RELEASE=X    SGLang calls itself release X
PP_PROBE_CHANGED=module:Class.method
                      this function of SGLang is not as in any release, and does what it does
PP_PROBE_FAIL_PATCH=1 the last patch cannot be applied
PP_PROBE_FAULT_FILE   which fault strikes between two stages, see sglang_pp_faults.py
PP_PROBE_STATES=1     schedulers say what they hold when they are idle: see sglang_pp_states.py
PP_PROBE_SLEEPS=1     count what idle schedulers do before they sleep: see sglang_pp_sleeps.py
PP_PROBE_CLOCKS=1     stages have clocks that are apart, see sglang_pp_clocks.py
PP_PROBE_PHASES, PP_PROBE_SLOW_GRAMMARS, PP_PROBE_DIVERGE, PP_PROBE_ONLY_ON_STAGE_0, PP_PROBE_LATE_CLOCK
                      see sglang_pp_phases.py
"""

from __future__ import annotations

import functools
import importlib
import mmap
import multiprocessing
import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

BATCHES = 2  # of the counters of device reads


def register() -> None:
    if os.environ.get("PP_PROBE_FAKE_KV") == "1":
        use_fake_kv_transfer()
    if os.environ.get("PP_PROBE_KEEP_FREE_PAGES") == "1":
        keep_free_pages()
    if release := os.environ.get("PP_PROBE_RELEASE"):
        import sglang.version

        sglang.version.__version__ = release
    if changed := os.environ.get("PP_PROBE_CHANGED"):
        change(changed)
    if os.environ.get("PP_PROBE_FAIL_PATCH") == "1":
        fail_the_last_patch()
    if faults := os.environ.get("PP_PROBE_FAULT_FILE"):
        importlib.import_module("sglang_pp_faults").plant(Path(faults))
    directory = os.environ.get("PP_PROBE_DIR")
    if directory and multiprocessing.parent_process() is not None:
        import sglang_pp_phases
        import sglang_pp_states

        count_point_to_point(Path(directory) / f"{os.getpid()}.p2p")
        if os.environ.get("PP_PROBE_STATES") == "1":
            sglang_pp_states.report_states(Path(directory))
        if os.environ.get("PP_PROBE_SLEEPS") == "1":
            importlib.import_module("sglang_pp_sleeps").count_sleeps(Path(directory))
        sglang_pp_phases.register(Path(directory))
        if os.environ.get("PP_PROBE_CLOCKS") == "1":
            importlib.import_module("sglang_pp_clocks").set_apart(Path(directory) / "clocks")
        if wanted := os.environ.get("PP_PROBE_DEVICE_READS"):
            watch_device_reads(Path(directory) / f"{os.getpid()}.reads", fail=wanted == "fail")


def change(target: str) -> None:
    module, _, qualname = target.partition(":")
    *path, name = qualname.split(".")
    owner = functools.reduce(getattr, path, importlib.import_module(module))
    original = getattr(owner, name)

    @functools.wraps(original)
    def changed(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    setattr(owner, name, changed)


def count_point_to_point(path: Path) -> None:
    """Count sends and receives of every process group of this process, as a u64 in `path`.

    At the binding below `torch.distributed.send`, `isend`, `recv`, `irecv` and the batched calls, so that
    nothing slips by.
    """
    import torch.distributed as dist

    counters = Counters(path, 1)

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counters.add(0)
            return function(*args, **kwargs)

        return call

    for name in ("send", "recv", "recv_anysource"):
        setattr(dist.ProcessGroup, name, counted(getattr(dist.ProcessGroup, name)))


def watch_device_reads(path: Path, fail: bool) -> None:
    """Look for reads of device tensors by the host, which wait for the device.

    Any read where the outputs of a microbatch are exchanged and processed, and where a batch is made, however
    it is written (`tolist`, `item`, `cpu`, `int`, a copy to memory that is not pinned); `tolist` anywhere but
    in a forward, where input log-probabilities are read; and where multimodal positions are made, copies from
    memory that is not pinned, on the stream of the forward. `path` gets three numbers: batches looked at,
    reads, and reads or copies of these where a batch is made.
    """
    import torch
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType
    from torch.utils._python_dispatch import TorchDispatchMode

    counters = Counters(path, 3)
    in_forward = threading.local()

    def found(what: str, counter: int = 1) -> None:
        counters.add(counter)
        if fail:
            raise RuntimeError(f"the probe saw {what} on a device tensor")

    class Watch(TorchDispatchMode):
        def __init__(self, counter: int = 1) -> None:
            super().__init__()
            self.counter = counter

        def __torch_dispatch__(
            self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            result = operator(*args, **(kwargs or {}))
            name = operator.overloadpacket.__name__
            if name == "_local_scalar_dense" and not args[0].is_cpu:
                found(name, self.counter)
            elif name in ("_to_copy", "copy_") and result.is_cpu and not result.is_pinned():
                source = args[1] if name == "copy_" else args[0]
                if not source.is_cpu:
                    found(name, self.counter)
            return result

    class WatchCopies(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.npu: Any = torch.get_device_module("npu")
            self.stream = self.npu.current_stream()

        def __torch_dispatch__(
            self, operator: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            name = operator.overloadpacket.__name__
            result = operator(*args, **(kwargs or {}))
            if name in ("_to_copy", "copy_") and not result.is_cpu:
                source = args[1] if name == "copy_" else args[0]
                if source.is_cpu and not source.is_pinned() and self.npu.current_stream() == self.stream:
                    found(f"{name} from memory that is not pinned", BATCHES)
            return result

    def watched(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with Watch():
            return original(*args, **kwargs)

    def watched_batch(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with Watch(BATCHES):
            return original(*args, **kwargs)

    def watched_positions(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with WatchCopies():
            return original(*args, **kwargs)

    def watched_and_counted(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        counters.add(0)
        return watched(original, *args, **kwargs)

    def in_a_forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        in_forward.now = True
        try:
            return original(*args, **kwargs)
        finally:
            in_forward.now = False

    tolist = torch.Tensor.tolist

    def checked_tolist(tensor: Any) -> Any:
        if not tensor.is_cpu and not getattr(in_forward, "now", False):
            found("tolist")
        return tolist(tensor)

    mixin = "sglang.srt.managers.scheduler_pp_mixin.SchedulerPPMixin"
    scheduler = "sglang.srt.managers.scheduler.Scheduler"
    positions = "sglang.srt.model_executor.forward_batch_info.ForwardBatch._compute_mrope_positions"
    HookRegistry.register(f"{scheduler}.get_next_batch_to_run", watched_batch, HookType.AROUND)
    HookRegistry.register(positions, watched_positions, HookType.AROUND)
    HookRegistry.register(f"{mixin}._pp_process_batch_result", watched_and_counted, HookType.AROUND)
    HookRegistry.register(f"{mixin}._pp_prep_batch_result", watched, HookType.AROUND)
    HookRegistry.register(f"{scheduler}.run_batch", in_a_forward, HookType.AROUND)
    torch.Tensor.tolist = checked_tolist  # type: ignore[assignment, method-assign]


def keep_free_pages() -> None:
    """Give the loop a list of free pages in memory of its own stream.

    SGLang makes the first one on the default stream, and lets go of it behind `torch.cat` on the loop's
    stream, without waiting: where freed memory is overwritten at once, page numbers become -1.
    """
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    kept: list[Any] = []

    def copy(scheduler: Any) -> None:
        allocator = scheduler.token_to_kv_pool_allocator
        kept.append(allocator.free_pages)
        allocator.free_pages = allocator.free_pages.clone()

    for function in (
        "scheduler_pp_mixin.SchedulerPPMixin.init_pp_loop_state",
        "scheduler.Scheduler.event_loop_overlap",  # with one stage
    ):
        HookRegistry.register(f"sglang.srt.managers.{function}", copy, HookType.BEFORE)


class Counters:
    """Numbers in a mapped file, so that they can be read while the process runs."""

    def __init__(self, path: Path, count: int) -> None:
        path.write_bytes(bytes(8 * count))
        with path.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), 8 * count)

    def add(self, index: int) -> None:
        where = slice(8 * index, 8 * index + 8)
        (count,) = struct.unpack("<Q", self._memory[where])
        self._memory[where] = struct.pack("<Q", count + 1)


def fail_the_last_patch() -> None:
    """Behind the contract check, so that all the other patches are in force when it fails."""
    import sglang_npu_pp.patching as patching

    apply_patch = patching.AppliedPatches._apply

    def apply(self: Any, patch: Any) -> None:
        if patch.target.endswith("_pp_send_recv_and_preprocess_output_tensors"):
            raise RuntimeError("the probe does not let it")
        apply_patch(self, patch)

    patching.AppliedPatches._apply = apply  # type: ignore[method-assign]


def use_fake_kv_transfer() -> None:
    """SGLang's fake KV backend for every request, and no page-locking where there is no CUDA.

    Upstream offers the fake backend to decode servers only; for a prefill server the real classes are
    swapped for it here. No KV cache moves; the scheduler loops, which are what is tested, are real.
    """
    from sglang.srt.disaggregation import decode, prefill, utils
    from sglang.srt.mem_cache.pool_host import common

    original = utils.get_kv_class

    def get_kv_class(backend: Any, class_type: Any) -> Any:
        if class_type == utils.KVClassType.BOOTSTRAP_SERVER:
            return original(backend, class_type)
        return original(utils.TransferBackend.FAKE, class_type)

    for module in (utils, prefill, decode):
        module.get_kv_class = get_kv_class
    common._cuda_host_register = lambda *args, **kwargs: None
