"""Copies of a hierarchical cache on a simulated NPU: pages leave for the host when their forward has written
them. SGLang's engine and its streams are real; its memory pools are stand-ins."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ascend_sim.kernels import occupy
from rig.harness import Here, Rank

from . import ranks
from .mutation import Rule, broken
from .rest import at_rest, holding

pytestmark = pytest.mark.release

BEFORE, WRITTEN = -1, 7
IMPORT_LIMIT_S = 120.0

WAITING = Rule(
    "a copy to the host waits for the last launch",
    "sglang_npu_pp.patches.hierarchical_cache",
    "start_writing",
    '_wait_for_launch(_stream(controller, "write_stream", "device_to_host_stream"))',
)


class Host:
    """A pool on the host, of as many pages as the device has."""

    def __init__(self, pages: torch.Tensor) -> None:
        self.pages = torch.empty(pages.shape, dtype=pages.dtype, pin_memory=True)

    def prepare_transfer_indices(self, host: torch.Tensor, device: torch.Tensor, _: str) -> Any:
        return host, device

    def backup_from_device_all_layer_physical(self, device_pool: Any, *_: Any) -> None:
        self.pages.copy_(device_pool.pages, non_blocking=True)


def open_cache(here: Here) -> None:
    """On the device all pages are as they were before."""
    from sglang.srt.mem_cache.l2_transfer import L2TransferEngine

    here.device = torch.device("npu:0")
    with ranks.on_forward_stream(here):
        pages = ranks.numbered(here, BEFORE)
    ranks.npu(here).synchronize()
    here.kept.update(engine=L2TransferEngine("direct"), pages=pages, host=Host(pages))


def launch_and_copy(here: Here, rule: Rule | None) -> None:
    """A forward that writes the pages, and right behind its launch their copy."""
    from sglang.srt.mem_cache.l2_transfer import L2Transfer

    from sglang_npu_pp.patches.hierarchical_cache import start_writing
    from sglang_npu_pp.patches.pipeline import set_current

    engine, pages = here.kept["engine"], here.kept["pages"]
    with ranks.on_forward_stream(here):
        occupy(1)
        pages.fill_(WRITTEN)
        launched = ranks.event(here)
    places = torch.arange(len(pages))
    transfer = L2Transfer(here.kept["host"], SimpleNamespace(pages=pages), places, places)
    set_current(SimpleNamespace(last_launched=launched))  # type: ignore[arg-type]
    try:
        with broken(rule):
            start_writing(
                lambda controller: controller.l2_transfer_engine.submit_device_to_host([transfer]),
                SimpleNamespace(l2_transfer_engine=engine),
            )
    finally:
        set_current(None)
    ranks.flush(here)


def read_copy(here: Here) -> int | str:
    ranks.npu(here).synchronize()
    return ranks.number_of(here.kept["host"].pages)


@pytest.mark.parametrize("rule", [None, WAITING], ids=["kept", "broken"])
def test_a_page_is_copied_when_its_forward_has_written_it(rank: Rank, rule: Rule | None) -> None:
    rank.start(open_cache).result(IMPORT_LIMIT_S)
    with holding(rank, "occupy"):
        rank.call(launch_and_copy, rule)  # comes back although the forward has not run
        at_rest(rank)
    assert rank.call(read_copy) == (WRITTEN if rule is None else BEFORE)
