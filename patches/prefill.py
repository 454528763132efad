"""Seam: host-device synchronisation while a prefill is prepared on NPU.

The page allocator reads the number of new pages from the device, though it follows from lengths on the host.
Multimodal positions go to the device from unpinned memory, on the forward stream, so the copy and every later
launch wait for the proxies.
"""

from __future__ import annotations

from typing import Any

from sglang_npu_pp.host_copies import Uploads
from sglang_npu_pp.patching import Patch

from .pipeline import current

_ALLOCATOR = "sglang.srt.hardware_backend.npu.allocator_npu:NPUPagedTokenToKVPoolAllocator"
_BATCH = "sglang.srt.model_executor.forward_batch_info:ForwardBatch"
_NEW_PAGES = "sglang.srt.utils.common:get_num_new_pages"


def alloc_extend(
    original: Any,
    allocator: Any,
    prefix_lens: Any,
    prefix_lens_cpu: Any,
    seq_lens: Any,
    seq_lens_cpu: Any,
    last_loc: Any,
    extend_num_tokens: int,
    num_new_pages: int | None = None,
) -> Any:
    """The device decides as before which token gets which slot."""
    if num_new_pages is None:
        from sglang.srt.utils.common import get_num_new_pages

        num_new_pages = get_num_new_pages(
            seq_lens=seq_lens_cpu, page_size=allocator.page_size, prefix_lens=prefix_lens_cpu
        )
    lengths = (prefix_lens, prefix_lens_cpu, seq_lens, seq_lens_cpu)
    return original(allocator, *lengths, last_loc, extend_num_tokens, num_new_pages)


def compute_mrope_positions(original: Any, forward_batch: Any, model_runner: Any, batch: Any) -> None:
    """In decode, too."""
    with Uploads(current().streams):
        original(forward_batch, model_runner, batch)


PATCHES = (
    Patch(
        target=f"{_ALLOCATOR}.alloc_extend",
        wrapper=alloc_extend,
        device="npu",
        why="the number of new pages is summed on the device and read back: the host waits for the stream "
        "and for cores that a forward occupies",
        how="passes upstream's own count, from the host's copies of the same lengths",
        upstream="its allocator for other devices counts on the host",
        plan="goes when upstream counts on the host on NPU, too",
        relies_on=(_NEW_PAGES,),
    ),
    Patch(
        target=f"{_BATCH}._compute_mrope_positions",
        wrapper=compute_mrope_positions,
        device="npu",
        why="positions are copied from unpinned memory behind the proxies; launches wait until that has run",
        how="the same copy from pinned memory",
        upstream="none known; other arguments of the forward are pinned from 0.5.21 on",
        plan="goes when upstream pins them",
        relies_on=(
            f"{_BATCH}._compute_mrope_positions_extend",
            f"{_BATCH}._compute_mrope_positions_decode",
            f"{_BATCH}._expand_mrope_from_input",
        ),
    ),
)
