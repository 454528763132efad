"""The launch of a middle stage on a simulated NPU: what it sends is intact, sent early or late.

Real are the patches of the launch and of the send, the pipeline, and both lanes; SGLang's forward, batch and
scheduler are stand-ins. The forward changes the received tensor in place and sends that, as a fused norm does
with the residual.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rig.harness import Here, Team, await_message
from sglang_npu_pp.settings import Settings
from sglang_npu_pp.streams import DeviceStreams
from sglang_npu_pp.transport.message import Kind

from . import ranks
from .mutation import Rule, broken
from .rest import at_rest, holding
from .test_outputs import IMPORT_LIMIT_S, import_sglang

SLOTS = 3  # of the loop
WORDS = "decode of 1 requests, 1 tokens (e8b7be43)"
ADDED = 1000

RELEASE = Rule(
    "a received tensor is let go of when what is sent is packed",
    "sglang_npu_pp.patches.proxies",
    "_send_proxies",
    "pipeline.send_proxies(proxies, batch, _gather_group(scheduler))",
    "pipeline.link.release(pipeline.streams.record()); pipeline.send_proxies(proxies, batch, None)",
)


def push(here: Here, numbers: range) -> None:
    with ranks.on_forward_stream(here):
        for number in numbers:
            here.link.push_tensors(
                Kind.PROXY,
                1,
                {"hidden_states": ranks.numbered(here, number)},
                slot=number % SLOTS,
                iteration=number,
                batch=WORDS,
            )
    ranks.flush(here)


def open_pipeline(here: Here, early_send: bool) -> None:
    from sglang.srt.disaggregation.utils import DisaggregationMode

    from sglang_npu_pp.patches.pipeline import AsyncPipeline, LoopPosition, Parts, set_current

    scheduler = SimpleNamespace(
        mbs=[None] * SLOTS,
        forward_stream_ctx=ranks.on_forward_stream(here),
        attn_tp_group=None,
        disaggregation_mode=DisaggregationMode.NULL,
    )
    reporter: Any = None
    loop = LoopPosition(here.link, SLOTS)
    pipeline = AsyncPipeline(Parts(scheduler, here.link, DeviceStreams(here.device), loop, reporter))
    pipeline.early_send = early_send
    here.kept["pipeline"] = pipeline
    set_current(pipeline)
    here.closers.append(lambda: set_current(None))


def run_iterations(here: Here, count: int, rule: Rule | None) -> None:
    """What the loop calls, from the post of the receive on."""
    from sglang.srt.model_executor.forward_batch_info import ForwardMode

    from sglang_npu_pp.patches import proxies

    pipeline = here.kept["pipeline"]
    scheduler = pipeline.scheduler

    def forward(scheduler: Any, slot: int, received: Any, *rest: Any) -> Any:
        with scheduler.forward_stream_ctx:
            if isinstance(received, proxies.Incoming):
                received = received.take()
            received.tensors["hidden_states"] += ADDED
            return SimpleNamespace(pp_hidden_states_proxy_tensors=received), ranks.event(here)

    with broken(rule):
        for _ in range(count):
            pipeline.begin_iteration()
            slot = pipeline.slot
            scheduler.mbs[slot] = SimpleNamespace(
                forward_mode=ForwardMode.DECODE, reqs=[SimpleNamespace(rid="a")]
            )
            pending = proxies.recv_proxy_tensors(None, scheduler)
            result, _ = proxies.launch_batch(forward, scheduler, slot, pending, [], None)
            tensors = result.pp_hidden_states_proxy_tensors.tensors
            proxies.send_dict_to_next_stage(None, scheduler, tensors, msg_type="proxy")
    ranks.flush(here)


def take(here: Here, numbers: range) -> list[int | str]:
    found = []
    with ranks.on_forward_stream(here):
        for number in numbers:
            received = here.link.post(Kind.PROXY, 1, slot=number % SLOTS, iteration=number).wait()
            found.append(ranks.number_of(received["hidden_states"]))
            here.link.release(ranks.event(here))
    return found


@pytest.mark.parametrize("early_send", [True, False], ids=["early", "late"])
@pytest.mark.parametrize("rule", [None, RELEASE], ids=["kept", "broken"])
def test_a_proxy_that_was_received_is_sent_before_its_slot_is_used_again(
    npu_team: Team, rule: Rule | None, early_send: bool
) -> None:
    """The first message of the middle stage does not leave, so the second waits to be packed into the one
    send slot, while a third arrives in the one receive slot."""
    first, middle, last = npu_team.open_links(3, slots=1)
    middle.start(import_sglang).result(IMPORT_LIMIT_S)
    middle.call(open_pipeline, early_send)
    with holding(middle, "HcclSend"):
        first.call(push, range(3))
        middle.call(run_iterations, 2, rule)
        middle.call(await_message, 0, Kind.PROXY, 2)
        at_rest(first, middle)
    middle.call(run_iterations, 1, None)
    found = last.call(take, range(3))
    assert (found == [ADDED, ADDED + 1, ADDED + 2]) == (rule is None), found


def launch_on_two_streams(here: Here) -> list[str]:
    """What is current behind two launches whose proxies are waited for inside: the stream of before?"""
    here.kept["pipeline"].waits_last = True
    current_stream = ranks.npu(here).current_stream
    before = current_stream()
    assert before != ranks.forward_stream(here)
    found = []
    for _ in range(2):
        run_iterations(here, 1, None)
        found.append("as before" if current_stream() == before else "another")
    return found


def test_behind_a_launch_the_loop_is_on_its_own_stream_again(npu_team: Team) -> None:
    """SGLang's context of the forward stream, entered within itself, ends on that stream."""
    first, middle, last = npu_team.open_links(3, slots=2)
    middle.start(import_sglang).result(IMPORT_LIMIT_S)
    middle.call(open_pipeline, True)
    first.call(push, range(2))
    assert middle.call(launch_on_two_streams) == ["as before"] * 2
    assert last.call(take, range(2)) == [ADDED, ADDED + 1]


@pytest.mark.parametrize("early_receive", ["1", "0"], ids=["early", "late"])
def test_a_receive_is_queued_at_its_header_or_in_its_wait(npu_team: Team, early_receive: str) -> None:
    """Late, the stream of receives stays empty while headers are here; then each wait queues one, and the
    host goes on although nothing has arrived."""
    first, second = npu_team.open_links(2, Settings(wait_limit_s=20, early_receive=early_receive))
    with holding(second, "HcclRecv"):
        first.call(ranks.push, range(2))
        second.call(await_message, 0, Kind.PROXY, 1)
        assert second.call(posted) == (2 if early_receive == "1" else 0)
        second.call(ranks.take, [0])
        assert second.call(posted) == (2 if early_receive == "1" else 1)
        second.call(ranks.take, [1])
        at_rest(first, second)
    assert second.call(ranks.read_numbers) == [0, 1]


def posted(here: Here) -> int:
    return sum(event.name == "post_receive" for event in here.trace.events())
