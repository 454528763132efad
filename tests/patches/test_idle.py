"""When an idle server may sleep: each thing that upstream polls, with upstream's own parts where possible."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import zmq
from sglang.srt import runtime_context
from sglang.srt.disaggregation.encoder.receiver import MMReceiverHTTP
from sglang.srt.disaggregation.utils import DisaggregationMode
from sglang.srt.managers.io_struct import CloseSessionReqInput, FlushCacheReqInput, OpenSessionReqInput
from sglang.srt.managers.scheduler import Scheduler
from sglang.srt.managers.scheduler_components.flush_wrapper import SchedulerFlushWrapper
from sglang.srt.managers.scheduler_components.idle_sleeper import IdleSleeper
from sglang.srt.session.session_controller import SessionController

from sglang_npu_pp.patches.idle import AskingSleeper, may_sleep, sleep_when_idle


class Parts:
    """An idle scheduler of which only is made what upstream polls; `answers` is what it told clients."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.idle, self.answers, self.sleeps = True, list[Any](), 0
        sender = SimpleNamespace(send_output=lambda output, request=None: self.answers.append(output))
        channels = SimpleNamespace(send_to_tokenizer=sender)
        tree = SimpleNamespace(release_session=lambda name: None, release_radix_session=lambda name: None)
        self.parallel = SimpleNamespace(attn_dp_size=1)
        monkeypatch.setattr(runtime_context, "get_parallel", lambda: self.parallel)
        self.memory = SimpleNamespace(enable_flexkv=False)
        monkeypatch.setattr(runtime_context, "get_memory", lambda: self.memory)
        self.scheduler: Any = SimpleNamespace(
            disaggregation_mode=DisaggregationMode.NULL,
            server_args=SimpleNamespace(),
            enable_hierarchical_cache=False,
            request_receiver=SimpleNamespace(
                mm_receiver=None, input_blocker=None, scripted_scheduler_hook=None
            ),
            flush_wrapper=SchedulerFlushWrapper(
                flush_cache=lambda: True, is_fully_idle=lambda: self.idle, ipc_channels=channels
            ),
            session_controller=SessionController(tree),
            return_health_check_ipcs=deque(),
            ipc_channels=channels,
        )

    def sleep(self) -> None:
        """In the place of upstream's poller."""
        self.sleeps += 1

    def iterate(self) -> int:
        """What the end of an idle iteration does, and whether it slept (0 or 1)."""
        before = self.sleeps
        AskingSleeper(self.scheduler, SimpleNamespace(maybe_sleep=self.sleep)).maybe_sleep()
        return self.sleeps - before


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Parts:
    return Parts(monkeypatch)


def test_with_nothing_to_poll_it_sleeps(parts: Parts) -> None:
    assert parts.iterate() == 1


def test_an_embedding_that_is_waited_for_is_asked_for_without_a_sleep(parts: Parts) -> None:
    receiver: Any = object.__new__(MMReceiverHTTP)
    receiver.waiting_list = [SimpleNamespace(rid="picture")]
    parts.scheduler.request_receiver.mm_receiver = receiver
    assert [parts.iterate() for _ in range(3)] == [0, 0, 0]
    receiver.waiting_list = []  # as `process_waiting_requests` leaves it when the embedding is there
    assert parts.iterate() == 1


def test_a_flush_that_waits_for_idleness_comes_before_a_sleep(parts: Parts) -> None:
    parts.idle = False
    assert parts.scheduler.flush_wrapper.handle(FlushCacheReqInput(timeout_s=60)) is None
    parts.idle = True
    assert parts.iterate() == 0
    parts.scheduler.flush_wrapper.check_pending()  # the next iteration begins with it
    assert [answer.success for answer in parts.answers] == [True]
    assert parts.iterate() == 1


def test_a_session_with_a_time_out_keeps_it_awake_until_it_is_closed(parts: Parts) -> None:
    sessions = parts.scheduler.session_controller
    sessions.open(OpenSessionReqInput(capacity_of_str_len=10, session_id="for ever"))
    assert parts.iterate() == 1
    sessions.open(OpenSessionReqInput(capacity_of_str_len=10, session_id="a minute", timeout=60.0))
    assert parts.iterate() == 0
    sessions.sessions["a minute"].last_active_time -= 61
    sessions.maybe_reap(1e12)
    assert list(sessions.sessions) == ["for ever"]
    assert parts.iterate() == 1


def test_a_session_that_closes_when_its_request_has_ended_keeps_it_awake(parts: Parts) -> None:
    sessions = parts.scheduler.session_controller
    sessions.open(OpenSessionReqInput(capacity_of_str_len=10, session_id="closing", streaming=True))
    running = SimpleNamespace(finished=lambda: False, multimodal_inputs=None, session=None)
    sessions.sessions["closing"].req_nodes["request"] = SimpleNamespace(req=running)
    sessions.close(CloseSessionReqInput(session_id="closing"))
    assert parts.iterate() == 0
    running.finished = lambda: True
    sessions.maybe_reap(1e12)
    assert parts.iterate() == 1


def test_every_health_check_is_answered_before_a_sleep(parts: Parts) -> None:
    """Upstream answers one an idle iteration."""
    parts.scheduler.return_health_check_ipcs.extend(["first", "second"])
    parts.scheduler.rust_server = None
    slept = []
    for _ in range(3):
        Scheduler.maybe_send_health_check_signal(parts.scheduler)
        slept.append(parts.iterate())
    assert [answer.http_worker_ipc for answer in parts.answers] == ["first", "second"]
    assert slept == [0, 1, 1]


def set_role(parts: Parts) -> None:
    parts.scheduler.disaggregation_mode = DisaggregationMode.DECODE


def attend_data_parallel(parts: Parts) -> None:
    parts.parallel.attn_dp_size = 2


def join_elastically(parts: Parts) -> None:
    parts.parallel.attn_dp_enabled = True


def cache_hierarchically(parts: Parts) -> None:
    parts.scheduler.enable_hierarchical_cache = True


def cache_by_lmcache(parts: Parts) -> None:
    parts.scheduler.server_args.enable_lmcache = True


def cache_by_flexkv(parts: Parts) -> None:
    parts.memory.enable_flexkv = True


def cache_by_a_linker(parts: Parts) -> None:
    parts.scheduler.enable_unified_cache_external_linker = True


def stage_sparsely(parts: Parts) -> None:
    parts.scheduler.enable_hisparse = True


def block_input(parts: Parts) -> None:
    parts.scheduler.request_receiver.input_blocker = object()


def follow_a_script(parts: Parts) -> None:
    parts.scheduler.request_receiver.scripted_scheduler_hook = object()


@pytest.mark.parametrize(
    "configure",
    [
        set_role,
        attend_data_parallel,
        join_elastically,
        cache_hierarchically,
        cache_by_lmcache,
        cache_by_flexkv,
        cache_by_a_linker,
        stage_sparsely,
        block_input,
        follow_a_script,
    ],
)
def test_a_server_that_always_polls_never_sleeps(parts: Parts, configure: Callable[[Parts], None]) -> None:
    configure(parts)
    assert not may_sleep(parts.scheduler)
    assert parts.iterate() == 0


def test_what_cannot_be_asked_keeps_it_awake(parts: Parts) -> None:
    """As in a build of SGLang that keeps it somewhere else: upstream would serve, so do we."""
    del parts.scheduler.flush_wrapper._pending
    assert parts.iterate() == 0


@pytest.mark.parametrize(
    ("stage", "attention_rank", "own", "sleeps"),
    [(0, 0, None, True), (1, 0, None, False), (0, 1, None, False), (0, 0, "upstream's", False)],
)
def test_only_the_rank_that_listens_to_clients_gets_a_sleeper(
    stage: int, attention_rank: int, own: str | None, sleeps: bool
) -> None:
    """And not where upstream has given it one (--sleep-on-idle, the Rust server)."""
    context = zmq.Context()
    sockets = [context.socket(zmq.PULL) for _ in range(2)]
    scheduler = SimpleNamespace(
        idle_sleeper=own,
        _engine_paused=False,
        ipc_channels=SimpleNamespace(recv_from_tokenizer=sockets[0], recv_from_rpc=sockets[1]),
    )
    sleep_when_idle(scheduler, SimpleNamespace(pp_rank=stage, attn_tp_rank=attention_rank, attn_cp_rank=0))
    assert isinstance(scheduler.idle_sleeper, AskingSleeper) == sleeps
    if sleeps:
        sleeper: Any = scheduler.idle_sleeper
        assert isinstance(sleeper._sleeper, IdleSleeper)
        assert set(dict(sleeper._sleeper.poller.sockets)) == set(sockets)
    context.destroy(linger=0)
