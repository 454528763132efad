"""What a scheduler does on its host before a prefill, in a rank process with a simulated NPU.

Real are SGLang's page allocator of the NPU and its `ForwardBatch`, as far as multimodal positions.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from ascend_sim.kernels import occupy
from rig.harness import Here
from sglang_npu_pp.streams import DeviceStreams

from . import ranks

PAGE = 4
PAGES = 12
CONTEXT = 32
PREFIXES, TOTALS = [4, 0, 6], [11, 3, 7]


def open_prefill(here: Here, *, patched: bool, pinned: bool = True) -> None:
    """With the patches of a prefill in force, or with upstream's functions."""
    here.device = torch.device(f"npu:{here.index}")

    from sglang_npu_pp.patches import load_contracts, prefill, sglang_release
    from sglang_npu_pp.patches.pipeline import set_current
    from sglang_npu_pp.patching import AppliedPatches

    contract = load_contracts()[sglang_release()]
    needed = [patch for patch in prefill.PATCHES if patch.is_needed(contract)]
    patches = AppliedPatches(needed if patched else [])
    pipeline: Any = SimpleNamespace(streams=DeviceStreams(here.device, pinned=pinned))
    set_current(pipeline)

    def close() -> None:
        set_current(None)
        patches.undo()

    here.closers.append(close)


def allocate(here: Here) -> None:
    """Slots for three requests, behind a task "occupy"; comes back when all is launched."""
    from sglang.srt.hardware_backend.npu.allocator_npu import NPUPagedTokenToKVPoolAllocator

    with ranks.on_forward_stream(here):
        on_host = [torch.tensor(lengths).pin_memory() for lengths in (PREFIXES, TOTALS)]
        prefixes, totals = (lengths.to(here.device, non_blocking=True) for lengths in on_host)
        pages = NPUPagedTokenToKVPoolAllocator(
            PAGE * PAGES, PAGE, torch.float32, str(here.device), None, need_sort=True
        )
        here.kept["prefix slots"] = [pages.alloc(8)[:length].long() for length in PREFIXES]
        last = torch.tensor([-1]).pin_memory().to(here.device, non_blocking=True)
        last_loc = torch.cat([slots[-1:] if len(slots) else last for slots in here.kept["prefix slots"]])
        occupy(1)
        slots = pages.alloc_extend(
            prefixes, on_host[0], totals, on_host[1], last_loc, sum(TOTALS) - sum(PREFIXES)
        )
        here.kept["read"] = [slots, pages.free_pages]
        here.kept["lengths"] = [prefixes, totals]
    ranks.flush(here)


def write_rows(here: Here) -> None:
    """The slots of `allocate` go to rows 3, 0 and 2 of the table of requests, behind a task "occupy"."""
    from sglang.kernels.ops.memory.common import write_req_to_token_pool_triton

    prefix_slots = here.kept["prefix slots"]
    prefixes, totals = here.kept["lengths"]
    with ranks.on_forward_stream(here):
        table = torch.full((4, CONTEXT), -1, dtype=torch.int32, device=here.device)
        addresses = torch.tensor(
            [slots.data_ptr() for slots in prefix_slots], dtype=torch.uint64
        ).pin_memory()
        rows = torch.tensor([3, 0, 2]).pin_memory().to(here.device, non_blocking=True)
        occupy(1)
        write_req_to_token_pool_triton[(len(TOTALS),)](
            table,
            rows,
            addresses.to(here.device, non_blocking=True),
            prefixes,
            totals,
            totals - prefixes,
            here.kept["read"][0],
            CONTEXT,
        )
        here.kept["read"] = [table, *prefix_slots, here.kept["read"][0]]
    ranks.flush(here)


def compute_positions(here: Here, *, decode: bool) -> None:
    """Multimodal positions of a request of text and one with a picture, behind a task "occupy"."""
    from sglang.srt.model_executor import forward_batch_info
    from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode

    execution = SimpleNamespace(deterministic=SimpleNamespace(rl_on_policy_target=None))
    forward_batch_info.get_exec = lambda: execution  # the arguments of a server
    picture = SimpleNamespace(
        mrope_positions=torch.arange(24).view(3, 8) % 5,
        mrope_position_delta=torch.tensor([[-3]]),
        mrope_position_delta_repeated_cache=None,
    )
    batch = SimpleNamespace(
        multimodal_inputs=[None, picture],
        extend_lens=[4, 5],
        prefix_lens=[2, 3],
        reqs=[SimpleNamespace(session=None)] * 2,
    )
    forward: Any = object.__new__(ForwardBatch)
    forward.forward_mode = ForwardMode.DECODE if decode else ForwardMode.EXTEND
    forward.seq_lens_cpu = torch.tensor([16, 20])
    with ranks.on_forward_stream(here):
        forward.seq_lens = forward.seq_lens_cpu.pin_memory().to(here.device, non_blocking=True)
        occupy(1)
        forward._compute_mrope_positions(SimpleNamespace(device=here.device), batch)
        here.kept["read"] = [forward.mrope_positions]
    ranks.flush(here)


def read(here: Here) -> list[Any]:
    """What the last of these made, as lists. Waits for the device."""
    with ranks.on_forward_stream(here):
        return [tensor.tolist() for tensor in here.kept["read"]]
