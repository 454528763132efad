"""What stage 0 tells, and that ranks decide alike from it: SGLang's own classes, on ranks that differ."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from sglang.srt.lora.lora_drainer import LoRADrainer
from sglang.srt.lora.lora_overlap_loader import LoRAOverlapLoader
from sglang.srt.managers import schedule_policy
from sglang.srt.managers.io_struct import AbortReq
from sglang.srt.managers.schedule_policy import CacheAgnosticPolicy, SchedulePolicy
from sglang.srt.managers.scheduler_components.request_receiver import SchedulerRequestReceiver

from sglang_npu_pp.decisions import Decisions, Grammars, SharedDecisions
from sglang_npu_pp.patches import PATCHES, decisions, grammars, lora, pipeline, queue_order, time_limits
from sglang_npu_pp.patches.pipeline import set_current
from sglang_npu_pp.patching import AppliedPatches


def scheduler(**options: Any) -> Any:
    """An idle one."""
    defaults: dict[str, Any] = {
        "session_controller": SimpleNamespace(sessions={}, _last_reap_time=0.0),
        "flush_wrapper": SimpleNamespace(_pending=None),
        "grammar_manager": SimpleNamespace(grammar_queue=[]),
        "lora_drainer": None,
        "waiting_queue": [],
    }
    return SimpleNamespace(**{**defaults, **options})


@pytest.fixture
def rank() -> Iterator[Any]:
    """The pipeline of this process, as far as decisions go."""
    made = SimpleNamespace(decisions=SharedDecisions(), scheduler=scheduler())
    set_current(made)  # type: ignore[arg-type]
    yield made
    set_current(None)


def broadcast(_receiver: Any, requests: Any, *local: Any) -> list[Any]:
    """Upstream's, on a leader without followers."""
    return [*requests, *(local[0] if local else ())]


def decided_with(rank: Any, requests: Any, *local: Any) -> Decisions | None:
    assert decisions.broadcast_requests(broadcast, None, requests, *local) == broadcast(
        None, requests, *local
    )
    found: Decisions | None = rank.decisions.this_iteration
    return found


def test_nothing_is_told_where_there_is_nothing_to_decide(rank: Any) -> None:
    assert decided_with(rank, []) is None
    assert decided_with(rank, [], []) is None


def test_the_time_is_told_with_requests(rank: Any) -> None:
    assert decided_with(rank, ["request"]) is not None
    assert decided_with(rank, [], ["abort of a time limit"]) is not None


def test_the_time_is_told_when_a_session_may_be_over_or_a_flush_has_waited(rank: Any) -> None:
    rank.scheduler.session_controller.sessions = {"session": object()}
    found = decided_with(rank, [])
    assert found is not None
    rank.scheduler.session_controller._last_reap_time = found.now
    assert decided_with(rank, []) is None, "upstream looks once a second"
    rank.scheduler.flush_wrapper._pending = (None, found.now)
    assert decided_with(rank, []) is not None


def test_ranks_that_are_told_add_nothing(rank: Any) -> None:
    told = Decisions(3.0)
    requests = decisions.broadcast_requests(lambda *_: ["request", told], None, None)
    assert requests == ["request"]
    assert rank.decisions.now == 3.0


def test_what_is_told_stays_in_its_group_of_data_parallel_ranks() -> None:
    told, abort = Decisions(1.0), AbortReq(rid="x")
    split = SchedulerRequestReceiver._split_work_and_control_reqs
    work, control = decisions.split_requests(split, None, [abort, told])
    assert (work, control) == ([told], [abort])


# --- LoRA ----------------------------------------------------------------------------------------

ADAPTERS = [f"adapter-{letter}" for letter in "abcdef"]


def request(adapter: str, *, given: int = 0) -> Any:
    return SimpleNamespace(
        lora_id=adapter,
        output_ids=[0] * given,
        sampling_params=SimpleNamespace(max_new_tokens=100),
        time_stats=SimpleNamespace(wait_queue_entry_time=0.0),
    )


@pytest.fixture
def lora_patches() -> Iterator[None]:
    targets = {patch.target for patch in lora.PATCHES}
    applied = AppliedPatches([patch for patch in PATCHES if patch.target in targets])
    yield
    applied.undo()


def drained(shared: SharedDecisions, times: list[float]) -> list[Any]:
    """What a rank lets in, one after another, where three adapters run and three wait."""
    drainer = LoRADrainer(max_loras_per_batch=3, max_wait_time_secs=10.0)
    running = [request(adapter) for adapter in ADAPTERS[:3]]
    waiting = [request(adapter) for adapter in reversed(ADAPTERS)]
    found = []
    for now in times:
        shared.take([Decisions(now)])
        drainer.update_draining_state(waiting, running)
        found.append({adapter: drainer.adapter_to_stats[adapter].is_draining_for for adapter in ADAPTERS})
    return found


def test_adapters_are_drained_by_shared_time_and_in_one_order(rank: Any, lora_patches: None) -> None:
    """Those that wait began to at the same shared time, and all that run have equally much to do: in their
    order in the queue they are given the adapters in order of their names."""
    early, late = drained(rank.decisions, [100.0, 111.0])
    assert not any(early.values())
    assert late == {
        "adapter-a": "adapter-f",
        "adapter-b": "adapter-e",
        "adapter-c": "adapter-d",
        **dict.fromkeys(ADAPTERS[3:]),
    }


class Copy:
    """An event behind a copy that has ended only for who waits."""

    def __init__(self) -> None:
        self.ended = False

    def query(self) -> bool:
        return self.ended

    def synchronize(self) -> None:
        self.ended = True


class Pool:
    """Of a LoRA manager, with room for two adapters."""

    def __init__(self) -> None:
        self.uid_to_buffer_id: dict[str, int] = {}


def loader() -> Any:
    made = object.__new__(LoRAOverlapLoader)
    pool = Pool()
    made.lora_manager = SimpleNamespace(
        memory_pool=pool,
        validate_lora_batch=lambda names: len(names) <= 2,
        fetch_new_loras=lambda new, _running: pool.uid_to_buffer_id.update(dict.fromkeys(new, 0)),
    )
    made.lora_to_overlap_load_event = {}
    made.load_stream = None
    made.load_stream_context = pipeline.nullcontext()
    current_stream = SimpleNamespace(wait_event=lambda _event: None)
    made.device_module = SimpleNamespace(
        current_stream=lambda: current_stream, Event=lambda: recorded(Copy())
    )
    return made


def recorded(copy: Any) -> Any:
    copy.record = lambda _stream: None
    return copy


def test_an_adapter_that_there_is_room_for_runs_at_once(rank: Any, lora_patches: None) -> None:
    loads = loader()
    assert loads.try_overlap_load_lora("a", set())
    assert loads.try_overlap_load_lora("b", {"a"})
    assert not loads.try_overlap_load_lora("c", {"a", "b"})


def test_whether_one_is_loaded_already_makes_no_difference(rank: Any, lora_patches: None) -> None:
    """Which are still there differs between ranks: each throws one out in an order of its own."""
    loads = loader()
    loads.lora_manager.memory_pool.uid_to_buffer_id = {"c": 0}
    assert not loads.try_overlap_load_lora("c", {"a", "b"})
    assert loads.try_overlap_load_lora("c", {"a"})


def test_without_a_pipeline_an_adapter_is_loaded_beside_the_forwards(lora_patches: None) -> None:
    loads = loader()
    assert not loads.try_overlap_load_lora("a", set()), "the copy has not ended"
    (copy,) = loads.lora_to_overlap_load_event.values()
    copy.synchronize()
    assert loads.try_overlap_load_lora("a", set())


# --- orders --------------------------------------------------------------------------------------


@pytest.fixture
def order_patches() -> Iterator[None]:
    applied = AppliedPatches(queue_order.PATCHES)
    yield
    applied.undo()


def shuffled(drawn: int) -> list[int]:
    """The queue of a rank that has drawn so many random numbers for something else."""
    policy = object.__new__(SchedulePolicy)
    policy.policy = CacheAgnosticPolicy.RANDOM
    policy._determine_active_policy = lambda _queue: policy.policy
    policy.tree_cache = SimpleNamespace(disable=True, supports_fast_match_prefix=lambda: False)
    policy.enable_priority_scheduling = False
    queue = list(range(50))
    random.seed(7)
    for _ in range(drawn):
        random.random()
    policy.calc_priority(queue, SimpleNamespace(reqs=[]))
    return queue


def test_a_random_order_is_one_on_all_ranks_and_another_in_each_iteration(
    rank: Any, order_patches: None
) -> None:
    orders = []
    for rank.iteration in (3, 4):
        assert shuffled(0) == shuffled(5)
        orders.append(shuffled(0))
    assert orders[0] != orders[1]
    assert all(order != sorted(order) for order in orders)


# --- time limits, up to 0.5.18 ---------------------------------------------------------------------


class Running:
    """A request that runs."""

    def __init__(self, rid: str) -> None:
        self.rid = rid
        self.to_finish: Any = None
        self.time_stats = SimpleNamespace(wait_queue_entry_time=1.0)

    def finished(self) -> bool:
        return False


@pytest.mark.parametrize("as_argument", [False, True])  # as in 0.5.15, and in 0.5.18
def test_only_requests_that_stage_0_named_have_run_too_long(rank: Any, as_argument: bool) -> None:
    batch = SimpleNamespace(reqs=[Running("named"), Running("another")])
    given = [batch] if as_argument else []
    owner = scheduler(running_batch=None if as_argument else batch)
    rank.decisions.take([Decisions(1.0, overdue=frozenset({"named"}))])
    time_limits.abort_on_running_timeout(unused, owner, *given)
    named, another = batch.reqs
    assert another.to_finish is None
    assert "running timeout" in named.to_finish.message


def unused(*_: Any) -> None:
    raise AssertionError("upstream's own clock was asked")


def test_only_requests_that_stage_0_named_have_waited_too_long(rank: Any) -> None:
    """Upstream's function sees no others, and every time is too long."""
    ended = []

    def upstream(owner: Any) -> None:
        for one in owner.waiting_queue:
            if one.time_stats.wait_queue_entry_time < time.perf_counter() - 3600:
                ended.append(one.rid)
        owner.waiting_queue = []

    owner = scheduler(waiting_queue=[Running("first"), Running("named"), Running("last")])
    time_limits.abort_on_waiting_timeout(upstream, owner)
    assert ended == []
    rank.decisions.take([Decisions(1.0, overdue=frozenset({"named"}))])
    time_limits.abort_on_waiting_timeout(upstream, owner)
    assert ended == ["named"]
    assert [one.rid for one in owner.waiting_queue] == ["first", "last"]


# --- grammars, in 0.5.15 -----------------------------------------------------------------------------


def test_a_grammar_is_ready_where_stage_0_says_so(rank: Any) -> None:
    """What the rank itself has found does not count; one that was aborted meanwhile has not failed."""
    queue = [SimpleNamespace(rid=rid, grammar=object()) for rid in "abcd"]
    queue[3].grammar = None  # aborted
    told = Grammars(ready=frozenset("b"), failed=frozenset("cd"))
    assert grammars._indices(queue, told) == ({1, 3}, {2})
    gathered: list[Any] = [None, None]
    found = grammars._gathers(({1, 3}, {2}))
    found.distributed.all_gather_object(gathered, "what this rank has found", group=None)
    assert gathered == [({1, 3}, {2})] * 2


class Preemptible:
    """A request that runs, at an address of its own."""

    def __init__(self, place: int, address: int) -> None:
        self.place, self.address = place, address
        self.priority = 0
        self.time_stats = SimpleNamespace(wait_queue_entry_time=float(place))

    def __hash__(self) -> int:
        return self.address

    def finished(self) -> bool:
        return False


def given_way(addresses: list[int], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Places in the batch of those that gave way, in the order in which they are queued again."""
    options = SimpleNamespace(schedule_low_priority_values_first=False)
    monkeypatch.setattr(schedule_policy, "get_schedule", lambda: options)
    running = [Preemptible(place, address) for place, address in enumerate(addresses)]
    batch = SimpleNamespace(reqs=running, release_req=lambda *_: None, filter_batch=lambda **_: None)
    adder: Any = object.__new__(schedule_policy.PrefillAdder)
    adder.preempt_list, adder.running_batch = [], batch
    adder.priority_scheduling_preemption_threshold = 10
    adder.memory_budget = SimpleNamespace(remaining_total=0, total_offset=0)
    adder._get_running_request_total_token_offset = lambda _running: 100
    sampling = SimpleNamespace(max_new_tokens=1)
    urgent = SimpleNamespace(
        priority=100, full_untruncated_fill_ids=[0] * 299, prefix_indices=[], sampling_params=sampling
    )
    assert adder.preempt_to_schedule(urgent)
    return [one.place for one in adder.preempt_list]


ADDRESSES = [[1, 2, 3, 4], [4, 3, 2, 1]]  # of the same requests in two processes


def test_those_that_give_way_are_queued_in_one_order(
    rank: Any, order_patches: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert [given_way(addresses, monkeypatch) for addresses in ADDRESSES] == [[1, 2, 3], [1, 2, 3]]


def test_without_us_those_that_give_way_are_queued_by_address(monkeypatch: pytest.MonkeyPatch) -> None:
    one, another = (given_way(addresses, monkeypatch) for addresses in ADDRESSES)
    assert sorted(one) == sorted(another)
    assert one != another
