"""Where the proxies of a launch leave, and when what was received is let go of.

The launch, the scheduler and the link are stand-ins that record calls; the loop around them is written out as
upstream's. That answers stay as they are is shown by the servers in tests/server.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from sglang_npu_pp.errors import PipelineError
from sglang_npu_pp.observe.telemetry import Telemetry
from sglang_npu_pp.observe.trace import Trace
from sglang_npu_pp.patches import proxies
from sglang_npu_pp.patches.pipeline import AsyncPipeline, LoopPosition, Parts, current, set_current
from sglang_npu_pp.settings import Settings
from sglang_npu_pp.streams import DeviceStreams
from sglang_npu_pp.transport.message import Kind

HIDDEN = {"hidden_states": "tensor"}


class Link:
    """Records in `steps`; the first or middle one of three stages."""

    def __init__(self, stage: int, early_send: bool, steps: list[str]) -> None:
        self.stage, self.stages = stage, 3
        settings = Settings(early_send="1" if early_send else "0")
        self.context = SimpleNamespace(settings=settings)
        self.trace, self.telemetry = Trace(), Telemetry(stage, rank=0)
        self.device_lane, self.host_lane = None, SimpleNamespace(is_local=lambda peer: True)
        self.steps = steps

    def push_tensors(self, kind: Kind, peer: int, tensors: Any, **place: Any) -> None:
        assert (peer, tensors) == (self.stage + 1, HIDDEN)
        self.steps.append(f"push {kind.label} {place['slot']} {place['iteration']} {place['batch']}")

    def release(self, reader: Any) -> None:
        self.steps.append("release")


@pytest.fixture(autouse=True)
def no_pipeline_afterwards() -> Iterator[None]:
    yield
    set_current(None)


def make_batch(mode: ForwardMode) -> Any:
    return SimpleNamespace(
        forward_mode=mode, reqs=[SimpleNamespace(rid="a", pending_bootstrap=False)], extend_num_tokens=7
    )


def run_iterations(stage: int, early_send: bool, modes: list[ForwardMode]) -> list[str]:
    """What upstream's loop calls in an iteration with one batch each, from the launch on."""
    steps: list[str] = []
    link: Any = Link(stage, early_send, steps)
    scheduler: Any = SimpleNamespace(
        mbs=[None] * 3,
        forward_stream_ctx=nullcontext(),
        attn_tp_group="group",
        disaggregation_mode=DisaggregationMode.NULL,
    )
    reporter: Any = None
    pipeline = AsyncPipeline(Parts(scheduler, link, DeviceStreams("cpu"), LoopPosition(link, 3), reporter))
    set_current(pipeline)

    def original(scheduler: Any, slot: int, *arguments: Any) -> Any:
        steps.append(f"launch {slot}")
        return SimpleNamespace(pp_hidden_states_proxy_tensors=SimpleNamespace(tensors=HIDDEN)), "event"

    for mode in modes:
        pipeline.begin_iteration()
        slot = pipeline.slot
        scheduler.mbs[slot] = make_batch(mode)
        result, event = proxies.launch_batch(original, scheduler, slot, None, [], None)
        assert event == "event"
        steps.append("outputs")
        if not mode.is_prebuilt():
            tensors = result.pp_hidden_states_proxy_tensors.tensors
            assert proxies.send_dict_to_next_stage(None, scheduler, tensors, msg_type="proxy") == []
    assert pipeline.unsent is None, "a result is kept"
    return steps


@pytest.mark.parametrize("stage", [0, 1])
@pytest.mark.parametrize("early_send", [True, False])
def test_proxies_leave_once_and_then_the_received_ones_are_let_go_of(stage: int, early_send: bool) -> None:
    """What is sent may be what was received, changed in place: its slot is free behind the packing."""
    found = run_iterations(stage, early_send, [ForwardMode.DECODE, ForwardMode.EXTEND])
    expected = []
    for index, batch in enumerate(["decode of 1 requests, 1 tokens", "extend of 1 requests, 7 tokens"]):
        sent = [f"push proxy {index} {index} {batch} (e8b7be43)", "release"]
        order = [*sent, "outputs"] if early_send else ["outputs", *sent]
        expected += [f"launch {index}", *order]
    assert found == expected


@pytest.mark.parametrize("early_send", [True, False])
def test_a_prebuilt_batch_has_no_proxies(early_send: bool) -> None:
    found = run_iterations(0, early_send, [ForwardMode.PREBUILT])
    assert found == ["launch 0", "outputs"]


class Waiting:
    """One launch of a middle stage, whose proxies are on their way."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, waits_last: bool) -> None:
        self.steps: list[str] = []
        link: Any = Link(1, True, self.steps)
        link.trace = SimpleNamespace(record=self.record, enabled=False)
        link.context.where = "stage 1 rank 0"
        self.scheduler: Any = SimpleNamespace(
            mbs=[make_batch(ForwardMode.DECODE)],
            forward_stream_ctx=nullcontext(),
            attn_tp_group="group",
            disaggregation_mode=DisaggregationMode.NULL,
        )
        reporter: Any = None
        loop = LoopPosition(link, 1)
        pipeline = AsyncPipeline(Parts(self.scheduler, link, DeviceStreams("cpu"), loop, reporter))
        pipeline.waits_last = waits_last
        set_current(pipeline)
        pipeline.begin_iteration()

        def wait(scheduler: Any, pending: Any, words: str) -> str:
            self.steps.append("proxies arrive")
            return "proxies"

        monkeypatch.setattr(proxies, "_wait_for_proxies", wait)

    def record(self, event: str, *place: Any) -> None:
        if event == "launch":
            self.steps.append("launch begins")

    def launch(self, take: bool) -> list[str]:
        def original(scheduler: Any, slot: int, given: Any, *rest: Any) -> Any:
            self.steps.append("made ready")
            if take and isinstance(given, proxies.Incoming):
                given = given.take()
            assert not take or given == "proxies"
            self.steps.append("forward")
            return SimpleNamespace(pp_hidden_states_proxy_tensors=SimpleNamespace(tensors=HIDDEN)), "event"

        channel: Any = None
        pending = proxies.Pending(current().link, channel, number=0, slot=0, iteration=0)
        proxies.launch_batch(original, self.scheduler, 0, pending, [], None)
        return self.steps


def test_a_launch_begins_when_all_is_ready_and_its_proxies_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Waiting(monkeypatch, waits_last=True).launch(take=True)
    assert found[:4] == ["made ready", "proxies arrive", "launch begins", "forward"]


def test_with_the_setting_off_proxies_are_waited_for_first(monkeypatch: pytest.MonkeyPatch) -> None:
    found = Waiting(monkeypatch, waits_last=False).launch(take=True)
    assert found[:4] == ["proxies arrive", "launch begins", "made ready", "forward"]


def test_a_launch_without_its_proxies_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(PipelineError, match="stage 1 rank 0: .*decode of 1 requests.* without its proxies"):
        Waiting(monkeypatch, waits_last=True).launch(take=False)
