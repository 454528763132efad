"""Where a launch waits for its proxies: behind upstream's preparation, in front of the forward.

That real servers do it in this order, and that the host goes on, is shown in tests/server.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_npu_pp.patches import proxies
from sglang_npu_pp.patches.pipeline import AsyncPipeline, current, set_current
from sglang_npu_pp.streams import DeviceStreams
from sglang_npu_pp.telemetry import Telemetry
from sglang_npu_pp.trace import Trace
from sglang_npu_pp.transport.message import Kind
from sglang_npu_pp.transport.stage_link import Pending

SLOT, ITERATION = 1, 3


class Link:
    """The link of stage 1 of 3, as far as a launch needs it; notes what is done in the trace."""

    stage, stages, rank = 1, 3, 0
    device_lane = None
    host_lane = SimpleNamespace(is_local=lambda stage: True)

    def __init__(self) -> None:
        self.telemetry, self.trace = Telemetry(1, 0), Trace(enabled=True)

    def take(self, pending: Pending) -> Any:
        self.trace.record("wait", pending.batch)
        return "message"

    def finish(self, message: Any, gather: Any, *, owned: bool) -> dict[str, Any]:
        return {"hidden_states": message}

    def record(self, name: str, message: Any) -> None:
        self.trace.record(name)

    def release(self, reader: Any) -> None:
        self.trace.record("release")

    def push_tensors(self, kind: Kind, *arguments: Any, **options: Any) -> None:
        self.trace.record("push", kind.label)


@pytest.fixture
def link() -> Iterator[Link]:
    link = Link()
    pipeline = AsyncPipeline(link, None, DeviceStreams("cpu"), slots=3)
    pipeline.iteration = ITERATION
    set_current(pipeline)
    yield link
    set_current(None)


def launch(link: Link, *, forwards: int) -> list[Any]:
    """One launch of an upstream that so often prepares a batch and runs its forward; returns what the
    forwards got."""
    mode = SimpleNamespace(is_prebuilt=lambda: False, is_extend=lambda: False, name="DECODE")
    batch = SimpleNamespace(forward_mode=mode, reqs=[SimpleNamespace(rid="a")])
    scheduler = SimpleNamespace(mbs=[None, batch], forward_stream_ctx=nullcontext(), attn_tp_group=None)
    pending = Pending(link, Kind.PROXY, 0, 0, SLOT, ITERATION, None)  # type: ignore[arg-type]
    got: list[Any] = []

    def init_new(kind: type, batch: Any) -> SimpleNamespace:
        link.trace.record("upstream prepares")
        return SimpleNamespace(input_ids=object(), sampling_info=SimpleNamespace(temperatures=object()))

    def upstream(scheduler: Any, slot: int, batch: Any, pp_proxy_tensors: Any, *rest: Any) -> Any:
        for _ in range(forwards):
            proxies.prepare_batch(init_new, object, batch)
            link.trace.record("forward")
            got.append(pp_proxy_tensors.tensors)
        return SimpleNamespace(pp_hidden_states_proxy_tensors=SimpleNamespace(tensors={})), None

    proxies.launch_batch(upstream, scheduler, SLOT, batch, pending, None, None)
    return got


def test_upstream_prepares_while_proxies_are_on_the_way(link: Link) -> None:
    assert launch(link, forwards=1) == [{"hidden_states": "message"}]
    order = [event.name for event in link.trace.events()]
    assert order == [
        "prepare",
        "upstream prepares",
        "wait",
        "ready",
        "launch",
        "forward",
        "launched",
        "release",
        "push",
    ]
    wait = link.trace.events()[2]
    assert wait.kind.startswith("decode of 1 requests")  # compared with what the message says


def test_proxies_are_waited_for_once(link: Link) -> None:
    """Whether a launch has several forwards, or none: the message is taken out of its slot."""
    assert launch(link, forwards=2) == [{"hidden_states": "message"}] * 2
    launch(link, forwards=0)
    assert [event.name for event in link.trace.events()].count("wait") == 2


def test_batches_outside_of_a_launch_wait_for_nothing(link: Link) -> None:
    """As those of a warm-up."""
    assert proxies.prepare_batch(lambda kind, batch: batch, object, "batch") == "batch"
    launch(link, forwards=1)
    assert proxies.prepare_batch(lambda kind, batch: batch, object, "batch") == "batch"
    assert [event.name for event in link.trace.events()].count("wait") == 1


class Event:
    passed = False

    def query(self) -> bool:
        return self.passed


def test_what_a_forward_reads_is_kept_until_it_has_run(link: Link) -> None:
    """Whatever upstream does with its batch meanwhile."""
    pipeline = current()
    assert pipeline is not None
    pipeline.streams.asynchronous = True
    first, second, third = Event(), Event(), Event()
    tensors = [torch.ones(1), torch.ones(1), torch.ones(1)]
    alive = [weakref.ref(tensor) for tensor in tensors]
    sampling = SimpleNamespace(temperatures=tensors[1])
    batch = SimpleNamespace(input_ids=tensors[0], sampling_info=sampling)
    pipeline.keep_until(first, proxies._parts(batch))
    pipeline.keep_until(second, [tensors[2]])
    tensors.clear()
    batch.input_ids = sampling.temperatures = None
    assert all(reference() is not None for reference in alive)
    first.passed = True
    pipeline.keep_until(third, [])
    assert [reference() is None for reference in alive] == [True, True, False]
