"""Import hook that lets a CUDA build of torchvision be imported next to a CPU torch and completes SGLang's
attention and hierarchical cache for the CPU; and faster starts.

Loaded by a .pth file at the start of every Python process of the environment. So it imports nothing
but what the interpreter has loaded already, and does its work when torchvision is first imported.
"""

import gc
import sys

TYPE_CHECKING = False  # typing.TYPE_CHECKING without the cost of importing typing
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

# torchvision describes these two with torch.library.register_fake while it is imported, which
# fails when nobody has declared them.
SCHEMAS = (
    "nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor",
)


def declare_missing_operators(torchvision_folders: "Sequence[str]") -> None:
    """Declare torchvision's operator schemas unless its own library can provide them.

    A declared operator has no implementation: calling it raises `NotImplementedError`. A second
    call (an import that failed half-way and is tried again) changes nothing.
    """
    if _keep_alive:
        return
    from pathlib import Path

    import torch

    for folder in torchvision_folders:
        for library_file in Path(folder).glob("_C*.so"):
            try:
                torch.ops.load_library(str(library_file))
            except OSError:
                continue  # built for another torch: its CUDA libraries are not here
            return
    library = torch.library.Library("torchvision", "DEF")
    for schema in SCHEMAS:
        library.define(schema)
    _keep_alive.append(library)


_keep_alive: "list[object]" = []  # schemas disappear with the Library object that declared them


def complete_attention(module: "ModuleType") -> None:
    """Add the length of the padding that fills up a batch where attention is data-parallel: that of
    upstream's other backend for the CPU, intel_amx."""
    backend = module.TorchNativeAttnBackend
    if not hasattr(backend, "get_cpu_graph_seq_len_fill_value"):
        backend.get_cpu_graph_seq_len_fill_value = lambda self: 1


def complete_tree_attention(module: "ModuleType") -> None:
    """Let a stage look at its own first layer: upstream asks each for layer 0, of which later stages find
    another by a negative index, or none."""
    backend = module.IntelAMXAttnBackend
    make = backend.__init__

    def make_for_stage(self: "object", runner: "Any", *args: "object", **kwargs: "object") -> None:
        pool = runner.token_to_kv_pool
        if hasattr(pool, "full_attention_layer_id_mapping"):
            make(self, runner, *args, **kwargs)
            return
        pool.full_attention_layer_id_mapping = {pool.start_layer: 0}
        try:
            make(self, runner, *args, **kwargs)
        finally:
            del pool.full_attention_layer_id_mapping

    backend.__init__ = make_for_stage


def complete_host_memory(module: "ModuleType") -> None:
    """There is no CUDA that would have to know the memory of a host pool."""
    vars(module)["_cuda_host_register"] = lambda *args, **kwargs: None


def complete_host_pool(module: "ModuleType") -> None:
    """Add the copy between a pool and its host pool (`--hicache-io-backend direct`), which upstream imports
    on CUDA only; a host pool has no pinned memory here."""
    if not hasattr(module, "transfer_kv_direct"):
        from cpu_reference_kernels import transfer_kv_direct

        vars(module)["transfer_kv_direct"] = transfer_kv_direct
    pool = module.MHATokenToKVPoolHost
    make = pool.__init__

    def make_unpinned(self: "object", *args: "object", **kwargs: "object") -> None:
        make(self, *args, **kwargs)
        vars(self)["pin_memory"] = False

    pool.__init__ = make_unpinned


COMPLETED = {
    "sglang.srt.layers.attention.torch_native_backend": complete_attention,
    "sglang.srt.layers.attention.intel_amx_backend": complete_tree_attention,
    "sglang.srt.mem_cache.pool_host.common": complete_host_memory,
    "sglang.srt.mem_cache.pool_host.mha": complete_host_pool,
}


class Finder:
    """Finds some modules as usual: torchvision, and runs `declare_missing_operators` before its first line;
    those of `COMPLETED`, and completes each behind its last."""

    def find_spec(
        self,
        name: str,
        path: "Sequence[str] | None" = None,
        target: "ModuleType | None" = None,
    ) -> "ModuleSpec | None":
        if name != "torchvision" and name not in COMPLETED:
            return None
        from importlib.machinery import PathFinder

        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.loader is None:
            return None
        folders = spec.submodule_search_locations or ()
        loader = spec.loader
        run_module = loader.exec_module

        def exec_module(module: "ModuleType") -> None:
            if name == "torchvision":
                declare_missing_operators(folders)
            run_module(module)
            if name in COMPLETED:
                COMPLETED[name](module)

        # Only looking torchvision up (importlib.util.find_spec) must not import torch: the work
        # hangs on the loader of this one spec.
        loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Finder())

# Importing SGLang makes millions of objects that stay, which the collector looks through again and again:
# with Python's 700 it takes a fifth of the 7 seconds, in each of a server's four or more processes.
gc.set_threshold(20_000, 10, 10)
