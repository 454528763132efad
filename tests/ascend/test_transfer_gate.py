"""KV chunks on a simulated NPU: queued while their forward has not run, read when it has."""

from __future__ import annotations

import queue
import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from ascend_sim.kernels import occupy
from rig.harness import Here, Rank, Team
from sglang_npu_pp.observe.trace import Trace
from sglang_npu_pp.streams import DeviceStreams
from sglang_npu_pp.transfer_gate import LateIndices, TransferGate

from . import ranks
from .mutation import Rule, broken
from .rest import at_rest, holding

PAGES = 64
LIMIT_S = 30.0

WAITING = Rule(
    "the engine's thread waits for the forward",
    "sglang_npu_pp.transfer_gate",
    "TransferGate.taken",
    "event.synchronize()",
)
ADOPTION = Rule(
    "the engine's thread has the device of its scheduler",
    "sglang_npu_pp.transfer_gate",
    "TransferGate.taken",
    "self.streams.adopt_thread()",
)
"""An event is waited for in the context of a device, and torch_npu silently takes device 0."""


def open_engine(here: Here, rule: Rule | None = None, pinned: bool = True) -> None:
    """A thread that takes chunks and reads the KV cache, as that of a transfer engine."""
    gate = TransferGate(DeviceStreams(here.device, pinned=pinned), Trace())
    chunks: queue.SimpleQueue[Any] = queue.SimpleQueue()
    here.kept.update(gate=gate, chunks=chunks, read=[], cache=ranks.numbered(here, -1))

    def run() -> None:
        with broken(rule):
            while (chunk := chunks.get()) is not None:
                gate.taken(chunk)
                device = ranks.npu(here).current_device()
                here.kept["read"].append((ranks.number_of(here.kept["cache"]), chunk.pages.tolist(), device))

    thread = here.kept["thread"] = threading.Thread(target=run, daemon=True)
    thread.start()

    def close() -> None:
        chunks.put(None)
        thread.join(LIMIT_S)

    here.closers.append(close)


def launch_and_queue(here: Here, number: int) -> None:
    """A forward that writes `number` to the cache; right behind its launch the chunk is queued."""
    gate = here.kept["gate"]
    pages = torch.arange(PAGES, dtype=torch.int32, device=here.device)
    with ranks.on_forward_stream(here):
        occupy(1)
        here.kept["cache"].fill_(number)
        written = ranks.event(here)
    chunk = SimpleNamespace(pages=LateIndices(pages, gate.streams), state=None)
    with gate.behind(written):
        gate.queued(chunk)
    here.kept["chunks"].put(chunk)
    ranks.flush(here)


def what_was_read(here: Here) -> Any:
    here.kept["chunks"].put(None)
    here.kept["thread"].join(LIMIT_S)
    assert not here.kept["thread"].is_alive(), "the engine's thread has not ended"
    return here.kept["read"]


def start(team: Team, rule: Rule | None = None, pinned: bool = True) -> Rank:
    rank = team.open_lanes(3)[2]
    rank.call(open_engine, rule, pinned)
    return rank


@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "plain"])
def test_a_chunk_is_queued_at_once_and_read_when_it_is_computed(npu_team: Team, pinned: bool) -> None:
    rank = start(npu_team, pinned=pinned)
    with holding(rank, "occupy"):
        rank.call(launch_and_queue, 41)  # comes back although the forward has not run
        at_rest(rank)
    assert rank.call(what_was_read) == [(41, list(range(PAGES)), 2)]


def test_the_rule_is_what_keeps_it(npu_team: Team) -> None:
    rank = start(npu_team, ADOPTION)
    rank.call(launch_and_queue, 41)
    assert rank.call(what_was_read)[0][2] == 0


def test_without_the_wait_the_engine_reads_what_was_there_before(npu_team: Team) -> None:
    rank = start(npu_team, WAITING)
    with holding(rank, "occupy"):
        rank.call(launch_and_queue, 41)
        ((read, _, _),) = rank.call(what_was_read)
    assert read == -1


PRODUCED = Rule(
    "page numbers are copied to plain memory when they are computed",
    "sglang_npu_pp.transfer_gate",
    "LateIndices.wait",
    "self._passed.synchronize()",
)


def compute_page_numbers(here: Here, first: int) -> None:
    with ranks.on_forward_stream(here):
        occupy(1)
        pages = torch.arange(PAGES, dtype=torch.int32, device=here.device) + first
        here.kept["late"] = LateIndices(pages, DeviceStreams(here.device, pinned=False))
    ranks.flush(here)


def read_page_numbers(here: Here, rule: Rule | None) -> list[int]:
    with broken(rule):
        pages: list[int] = here.kept["late"].wait().tolist()
    return pages


@pytest.mark.parametrize("rule", [None, PRODUCED], ids=["kept", "broken"])
def test_who_reads_page_numbers_into_plain_memory_waits_for_them(npu_team: Team, rule: Rule | None) -> None:
    (rank,) = npu_team.open_lanes(1)
    with holding(rank, "occupy"):
        rank.call(compute_page_numbers, 1000)  # comes back although no page number is computed
        reading = rank.start(read_page_numbers, rule)
        if rule is not None:
            assert reading.result() != list(range(1000, 1000 + PAGES))
        else:
            at_rest(rank)
            assert not reading.has_answer
    if rule is None:
        assert reading.result() == list(range(1000, 1000 + PAGES))
