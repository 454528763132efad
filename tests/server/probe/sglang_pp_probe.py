"""A second SGLang plugin, for tests only: counts what upstream would do, and fills gaps of the CPU path.

Loaded when its directory is on PYTHONPATH, in patched and unpatched servers alike. What it does is chosen by
environment variables:

PP_PROBE_DIR          count torch.distributed point-to-point operations; one file a process
PP_PROBE_FAKE_KV=1    a disaggregated server moves its KV cache with SGLang's own fake backend
PP_PROBE_RELEASE=X    SGLang calls itself release X
PP_PROBE_FAIL_PATCH=1 the last patch cannot be applied
"""

from __future__ import annotations

import mmap
import multiprocessing
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any


def register() -> None:
    if os.environ.get("PP_PROBE_FAKE_KV") == "1":
        use_fake_kv_transfer()
    if release := os.environ.get("PP_PROBE_RELEASE"):
        import sglang.version

        sglang.version.__version__ = release
    if os.environ.get("PP_PROBE_FAIL_PATCH") == "1":
        fail_the_last_patch()
    directory = os.environ.get("PP_PROBE_DIR")
    if directory and multiprocessing.parent_process() is not None:
        count_point_to_point(Path(directory) / f"{os.getpid()}.p2p")


def count_point_to_point(path: Path) -> None:
    """Count sends and receives of every process group of this process, as a u64 in `path`.

    At the binding below `torch.distributed.send`, `isend`, `recv`, `irecv` and the batched calls, so that
    nothing slips by. A mapped file, so that the count can be read while the process runs.
    """
    import torch.distributed as dist

    path.write_bytes(bytes(8))
    with path.open("r+b") as file:
        counter = mmap.mmap(file.fileno(), 8)

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            (count,) = struct.unpack("<Q", counter[:8])
            counter[:8] = struct.pack("<Q", count + 1)
            return function(*args, **kwargs)

        return call

    for name in ("send", "recv", "recv_anysource"):
        setattr(dist.ProcessGroup, name, counted(getattr(dist.ProcessGroup, name)))


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
