"""Both lanes together: post, wait, release; what was posted when; slices; and mistakes that are caught."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st

from rig.harness import Here, Rank, Team, await_message, push_dict, results, take_dict, telemetry_of, trace_of
from rig.samples import Sample, assert_same, assert_same_tensor, python_values, realise, tensor_dicts
from sglang_npu_pp.errors import SequenceError, WaitLimitError
from sglang_npu_pp.settings import Settings
from sglang_npu_pp.streams import PassedEvent
from sglang_npu_pp.transport.message import Kind
from tests.field_cases import field_case

pytestmark = pytest.mark.timeout(180)

LARGE = (2048, 1024)
DICT_KINDS = [Kind.PROXY, Kind.OUTPUT, Kind.TENSORS]
HIDDEN = {
    "hidden_states": Sample(torch.bfloat16, (6, 8), 1),
    "residual": Sample(torch.float32, (6, 8), 2),
}


def open_links(team: Team, stages: int, lanes: str, slots: int = 4) -> list[Rank]:
    """`lanes` "both": tensors for the next stage take the device lane."""
    settings = Settings(wait_limit_s=20)
    if lanes == "host":
        return team.open_lanes(stages, settings)
    return team.open_links(stages, settings, slots=slots)


on_lanes = pytest.mark.parametrize("lanes", ["host", "both"])


# --- values ------------------------------------------------------------------------------------


def push_all(here: Here, peer: int, messages: Sequence[tuple[Kind, dict[str, Any]]]) -> None:
    for index, (kind, values) in enumerate(messages):
        push_dict(here, kind, peer, values, slot=index % 3, iteration=index)


def take_all(
    here: Here, source: int, messages: Sequence[tuple[Kind, dict[str, Any]]], order: Sequence[Kind]
) -> None:
    """Take one message of each kind in `order`."""
    waiting: dict[Kind, deque[int]] = {kind: deque() for kind in DICT_KINDS}
    for index, (kind, _) in enumerate(messages):
        waiting[kind].append(index)
    for kind in order:
        index = waiting[kind].popleft()
        take_dict(here, kind, source, messages[index][1], slot=index % 3, iteration=index)


@on_lanes
@settings(max_examples=20)
@given(data=st.data())
def test_tensor_dicts_arrive_as_they_were_in_the_order_of_their_kind(
    team: Team, lanes: str, data: st.DataObject
) -> None:
    messages = data.draw(st.lists(st.tuples(st.sampled_from(DICT_KINDS), tensor_dicts), max_size=8))
    order = data.draw(st.permutations([kind for kind, _ in messages]))
    a, b = open_links(team, 2, lanes, slots=8)
    results([a.start(push_all, 1, messages), b.start(take_all, 0, messages, order)])


def push_and_spoil(here: Here, count: int) -> None:
    """One buffer for all messages, as a replayed graph has it; too large to be copied on the way."""
    buffer = torch.empty(LARGE, dtype=torch.bfloat16)
    for number in range(count):
        buffer.fill_(number)
        here.link.push_tensors(Kind.PROXY, here.link.stage + 1, {"hidden": buffer, "mean": buffer[0]})
        buffer.fill_(-1)


def take_filled(here: Here, count: int) -> None:
    for number in range(count):
        found = here.link.post(Kind.PROXY, here.link.stage - 1).wait()
        assert_same_tensor(found["hidden"], torch.full(LARGE, number, dtype=torch.bfloat16))
        assert_same_tensor(found["mean"], torch.full(LARGE[1:], number, dtype=torch.bfloat16))
        here.link.release(PassedEvent())


@on_lanes
def test_the_source_may_be_overwritten_behind_a_push(team: Team, lanes: str) -> None:
    a, b = open_links(team, 2, lanes, slots=2)
    results([a.start(push_and_spoil, 12), b.start(take_filled, 12)])


NESTED = ("object", "array in an object", "nested in a dict", "array in a dict")


def push_and_spoil_nested(here: Here, how: str, nbytes: int) -> None:
    array = np.zeros(nbytes, dtype=np.uint8)
    tensor = torch.zeros(nbytes, dtype=torch.uint8)
    if how == "object":
        here.link.push(Kind.OBJECT, 1, {"features": [tensor]})
    elif how == "array in an object":
        here.link.push(Kind.REQUESTS, 1, [array])
    else:
        here.link.push_tensors(Kind.TENSORS, 1, {"x": [tensor] if how == "nested in a dict" else array})
    array[:] = 1
    tensor.fill_(1)


def count_spoiled(here: Here, how: str) -> int:
    if how == "object":
        found = here.link.post(Kind.OBJECT, 0).wait_values()["features"][0]
    elif how == "array in an object":
        found = here.link.post(Kind.REQUESTS, 0).wait_values()[0]
    else:
        found = here.link.post(Kind.TENSORS, 0).wait()["x"]
        found = found[0] if isinstance(found, list) else found
    return int(np.asarray(found).sum())


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
@pytest.mark.parametrize("how", NESTED)
def test_values_may_be_overwritten_behind_a_push(team: Team, how: str, transport: str) -> None:
    """Arrays and tensors inside other values, of sizes at which ZeroMQ could have taken their memory."""
    for nbytes in (1 << 17, 1 << 20, 32 << 20):
        a, b = team.open_lanes(2, Settings(host_transport=transport, wait_limit_s=20))
        a.call(push_and_spoil_nested, how, nbytes)
        assert b.call(count_spoiled, how) == 0


def push_value(here: Here, peer: int, *values: Any) -> None:
    for value in values:
        here.link.push(Kind.REQUESTS, peer, realise(value))


def take_values(here: Here, source: int, *values: Any) -> None:
    for value in values:
        assert_same(here.link.post(Kind.REQUESTS, source).wait_values(), realise(value))


@settings(max_examples=20)
@given(values=st.lists(python_values, max_size=6))
def test_objects_arrive_as_they_were(team: Team, values: list[Any]) -> None:
    a, b = team.open_lanes(2)
    a.call(push_value, 1, *values)
    b.call(take_values, 0, *values)


@on_lanes
def test_tensors_for_a_stage_further_away_take_the_host_lane(team: Team, lanes: str) -> None:
    ranks = open_links(team, 3, lanes)
    ranks[0].call(push_dict, Kind.PROXY, 2, HIDDEN)
    ranks[2].call(push_dict, Kind.OUTPUT, 0, HIDDEN)
    ranks[2].call(take_dict, Kind.PROXY, 0, HIDDEN)
    ranks[0].call(take_dict, Kind.OUTPUT, 2, HIDDEN)
    assert "post_send" not in {event.name for rank in ranks for event in rank.call(trace_of)}


def test_a_key_that_is_no_string_raises_and_uses_up_no_number(team: Team) -> None:
    a, b = team.open_lanes(2)
    with pytest.raises(TypeError, match="stage 0 rank 0: a tensor dict needs string keys, not 7"):
        a.call(push_dict, Kind.PROXY, 1, {7: 1})
    a.call(push_dict, Kind.PROXY, 1, HIDDEN)
    b.call(take_dict, Kind.PROXY, 0, HIDDEN)


def test_bytes_of_both_lanes_are_counted_alike_on_both_sides(team: Team) -> None:
    a, b = team.open_links(2)
    for _ in range(3):
        a.call(push_dict, Kind.PROXY, 1, {**HIDDEN, "top_k": 5})
        b.call(take_dict, Kind.PROXY, 0, {**HIDDEN, "top_k": 5})
    sent, received = a.call(telemetry_of).sent["proxy"], b.call(telemetry_of).received["proxy"]
    assert (sent.messages, sent.bytes) == (received.messages, received.bytes)
    assert sent.bytes > 3 * sum(sample.tensor().nbytes for sample in HIDDEN.values())


# --- order of posts and waits ------------------------------------------------------------------


def names(rank: Rank, *kinds: str) -> list[tuple[str, int]]:
    """What the rank did, by name and iteration, for messages of these kinds."""
    return [(event.name, event.iteration) for event in rank.call(trace_of) if event.kind in kinds]


def test_receives_are_posted_by_their_headers_before_any_of_them_is_waited_for(team: Team) -> None:
    a, b = team.open_links(2, slots=4)
    for iteration in range(3):
        a.call(push_dict, Kind.PROXY, 1, HIDDEN, slot=iteration, iteration=iteration)
    b.call(await_message, 0, Kind.PROXY, 2)
    for iteration in range(3):
        b.call(take_dict, Kind.PROXY, 0, HIDDEN, slot=iteration, iteration=iteration)
    headers = [step for i in range(3) for step in [("arrive", i), ("post_receive", i)]]
    program = [step for i in range(3) for step in [("post", i), ("wait", i), ("ready", i)]]
    assert names(b, "proxy") == [*headers, *program]
    sends = [step for i in range(3) for step in [("push", i), ("post_send", i)]]
    assert names(a, "proxy") == sends


def hold_one_and_watch_the_next(here: Here) -> None:
    """Use the tensors of iteration 0, as a forward does, while iteration 1 arrives."""
    first = here.link.post(Kind.PROXY, 0, slot=0, iteration=0).wait()
    here.note("forward of iteration 0")
    await_message(here, 0, Kind.PROXY, 1)
    assert_same(first, realise(HIDDEN))
    here.trace.record("forward ends", "proxy", 0, 0)
    here.link.release(PassedEvent())


def test_the_next_receive_is_posted_while_the_tensors_of_the_last_are_in_use(team: Team) -> None:
    a, b = team.open_links(2, slots=2)
    a.call(push_dict, Kind.PROXY, 1, HIDDEN, slot=0, iteration=0)
    holding = b.start(hold_one_and_watch_the_next)
    assert holding.note() == "forward of iteration 0"
    a.call(push_dict, Kind.PROXY, 1, HIDDEN, slot=1, iteration=1)
    holding.result()
    steps = names(b, "proxy")
    assert steps.index(("ready", 0)) < steps.index(("post_receive", 1)) < steps.index(("forward ends", 0))


def push_more_than_there_are_slots(here: Here, count: int) -> None:
    """Sends the note "full" before it waits for a slot."""
    original = here.trace.record

    def noted(name: str, *place: Any) -> None:
        original(name, *place)
        if name == "full":
            here.note("full")

    setattr(here.trace, "record", noted)  # noqa: B010
    for iteration in range(count):
        tensors = {"t": torch.full((1 << 20,), float(iteration))}
        here.link.push_tensors(Kind.PROXY, 1, tensors, slot=iteration, iteration=iteration)


def take_large(here: Here, count: int) -> None:
    for number in range(count):
        found = here.link.post(Kind.PROXY, 0).wait()
        assert_same(found, {"t": torch.full((1 << 20,), float(number))})
        here.link.release(PassedEvent())


def test_a_sender_that_waits_for_a_slot_of_the_device_lane_is_recorded(team: Team) -> None:
    a, b = team.open_links(2, slots=2)
    sending = a.start(push_more_than_there_are_slots, 3)  # gloo sends nothing before the receive is posted
    assert sending.note() == "full"
    taking = b.start(take_large, 3)
    sending.result()
    taking.result()
    free, held = [("push", 0), ("post_send", 0)], [("push", 2), ("full", 2), ("post_send", 2)]
    assert names(a, "proxy") == [*free, ("push", 1), ("post_send", 1), *held]


def wait_for_requests(here: Here) -> list[tuple[str, str]]:
    """What the rank did until a message of another kind was there."""
    assert here.link.post(Kind.REQUESTS, 0, iteration=0).wait_values() == "requests"
    steps = [(event.name, event.kind) for event in here.trace.events()]
    assert_same(here.link.post(Kind.PROXY, 0).wait(), realise(HIDDEN))
    return steps


def wait_and_count_receives(here: Here, iteration: int) -> int:
    """How many receives are posted when a wait for requests returns, before anything else is asked for."""
    pending = here.link.post(Kind.REQUESTS, 0, iteration=iteration)
    here.note("posted")
    assert here.lane._inbox._poller.poll(5000)
    pending.wait_values()
    posted = [event.name for event in here.trace.events()].count("post_receive")
    take_dict(here, Kind.PROXY, 0, HIDDEN)
    return posted


def push_requests_and_proxies(here: Here, iteration: int) -> None:
    here.link.push(Kind.REQUESTS, 1, "requests", iteration=iteration)
    push_dict(here, Kind.PROXY, 1, HIDDEN)


def test_a_wait_posts_the_receive_of_a_header_that_lies_behind_its_message(team: Team) -> None:
    a, b = team.open_links(2)
    for iteration in range(50):  # until one header came fast enough, which the first one does as a rule
        waiting = b.start(wait_and_count_receives, iteration)
        assert waiting.note() == "posted"
        a.call(push_requests_and_proxies, iteration)
        if waiting.result() == iteration + 1:
            return
    raise AssertionError("no header posted its receive")


def test_a_device_message_is_posted_while_the_program_waits_for_something_else(team: Team) -> None:
    a, b = team.open_links(2)
    waiting = b.start(wait_for_requests)
    a.call(push_dict, Kind.PROXY, 1, HIDDEN)
    a.call(push_requests, 0)
    steps = waiting.result()
    proxy = [steps.index((name, "proxy")) for name in ("arrive", "post_receive")]
    assert proxy == sorted(proxy)
    assert proxy[-1] < steps.index(("ready", "requests"))


def push_requests(here: Here, iteration: int) -> None:
    here.link.push(Kind.REQUESTS, 1, "requests", iteration=iteration)


# --- receive slots -----------------------------------------------------------------------------


def take_and_keep(here: Here, count: int, *, owned: bool = False) -> None:
    """Take messages and never release what they refer to."""
    found = [here.link.post(Kind.PROXY, 0).wait(owned=owned) for _ in range(count)]
    for number, tensors in enumerate(found):
        assert_same(tensors, {"t": torch.full((1000,), float(number))})


def push_filled(here: Here, begin: int, count: int) -> None:
    for number in range(begin, begin + count):
        here.link.push_tensors(Kind.PROXY, 1, {"t": torch.full((1000,), float(number))})


def release_all(here: Here) -> None:
    here.link.release(PassedEvent())


def take_one_filled(here: Here, number: int) -> None:
    found = here.link.post(Kind.PROXY, 0).wait()
    assert_same(found, {"t": torch.full((1000,), float(number))})


def test_without_a_release_the_receive_slots_run_out_with_a_clear_error(team: Team) -> None:
    a, b = team.open_links(2, slots=2)
    sending = a.start(push_filled, 0, 3)
    with pytest.raises(
        SequenceError, match=r"stage 1 rank 0: all receive slots are held .* SGLANG_NPU_PP_SLOTS"
    ):
        b.call(take_and_keep, 3)
    b.call(release_all)
    sending.result()


def test_a_release_posts_the_receive_that_had_no_slot(team: Team) -> None:
    a, b = team.open_links(2, slots=2)
    sending = a.start(push_filled, 0, 4)
    for number in range(2):
        b.call(take_one_filled, number)
    b.call(await_message, 0, Kind.PROXY, 3)
    assert [event.name for event in b.call(trace_of)].count("post_receive") == 2
    b.call(release_all)
    assert [event.name for event in b.call(trace_of)].count("post_receive") == 4
    for number in range(2, 4):
        b.call(take_one_filled, number)
    sending.result()


def test_owned_tensors_need_no_release_and_stay_as_they_are(team: Team) -> None:
    a, b = team.open_links(2, slots=2)
    sending = a.start(push_filled, 0, 7)
    b.call(take_and_keep, 7, owned=True)
    sending.result()


# --- slices ------------------------------------------------------------------------------------


class GatherDouble:
    """A double of a tensor-parallel group: it knows what the other ranks hold.

    `whole` are the tensors that will be gathered, in the order in which they must be.
    """

    def __init__(self, world_size: int, rank_in_group: int, whole: Sequence[torch.Tensor]) -> None:
        self.world_size, self.rank_in_group = world_size, rank_in_group
        self.whole = deque(whole)

    def all_gather(self, tensor: torch.Tensor, dim: int) -> torch.Tensor:
        assert dim == 0
        whole = self.whole.popleft()
        parts = whole.reshape(self.world_size, -1)
        assert_same_tensor(tensor, parts[self.rank_in_group], "our slice")
        return parts.reshape(-1).clone()


SLICED: Mapping[str, Any] = {
    "b": Sample(torch.bfloat16, (4, 6), 1),
    "odd": Sample(torch.float32, (3,), 2),
    "text": "not a tensor",
    "a": Sample(torch.float8_e5m2, (2, 2, 2), 3),
    "none": Sample(torch.float32, (0, 4), 4),
    "one": Sample(torch.int64, (), 5),
}


def whole_of(world_size: int) -> list[torch.Tensor]:
    """What travels in slices, in the order of the dict."""
    if world_size == 1:
        return []
    tensors = [value.tensor() for value in SLICED.values() if isinstance(value, Sample)]
    return [tensor for tensor in tensors if tensor.numel() and tensor.numel() % world_size == 0]


def push_slices(here: Here, world_size: int, rank: int) -> int:
    """Returns the bytes that travelled."""
    gather = GatherDouble(world_size, rank, [])
    here.link.push_tensors(Kind.PROXY, 1, realise(SLICED), gather=gather)
    return here.telemetry.sending("proxy").bytes


def take_slices(here: Here, world_size: int, rank: int, owned: bool) -> None:
    gather = GatherDouble(world_size, rank, whole_of(world_size))
    assert_same(here.link.post(Kind.PROXY, 0).wait(gather, owned=owned), realise(SLICED))
    assert not gather.whole, "not everything was gathered"
    here.link.release(PassedEvent())


@field_case("sglang-15843")
@on_lanes
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("owned", [False, True])
def test_each_rank_sends_its_slice_and_the_receivers_gather(
    team: Team, lanes: str, world_size: int, owned: bool
) -> None:
    a, b = open_links(team, 2, lanes)
    for rank in range(world_size):
        a.call(push_slices, world_size, rank)
        b.call(take_slices, world_size, rank, owned)


def exchange_shapes(here: Here) -> list[int]:
    """Two stages tell each other two shapes, in one order, over torch.distributed: what each takes for the
    shape of its previous and of its next stage. The stage before and the stage behind are the same."""
    peer = 1 - here.index
    to_previous, to_next = torch.tensor([10 + here.index]), torch.tensor([20 + here.index])
    from_previous, from_next = torch.zeros_like(to_previous), torch.zeros_like(to_next)
    operations = [
        dist.P2POp(dist.isend, to_previous, peer),
        dist.P2POp(dist.irecv, from_previous, peer),
        dist.P2POp(dist.isend, to_next, peer),
        dist.P2POp(dist.irecv, from_next, peer),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return [int(from_previous), int(from_next)]


def exchange_dicts(here: Here) -> list[int]:
    """The same with tensors of those shapes through the link: proxies to the next stage, outputs back."""
    peer = 1 - here.index
    for kind, rows in ((Kind.OUTPUT, 10 + here.index), (Kind.PROXY, 20 + here.index)):
        here.link.push_tensors(kind, peer, {"rows": torch.zeros(rows, 2)})
    from_previous, from_next = here.link.post(Kind.PROXY, peer), here.link.post(Kind.OUTPUT, peer)
    shapes = [len(from_previous.wait()["rows"]), len(from_next.wait()["rows"])]
    here.link.release(PassedEvent())
    return shapes


@field_case("megatron-5100")
def test_shapes_that_are_sent_in_one_order_on_both_sides(team: Team) -> None:
    """What the previous stage says to its next one (20 and more) is taken for the other."""
    a, b = open_links(team, 2, "both")
    assert results([a.start(exchange_shapes), b.start(exchange_shapes)]) == [[11, 21], [10, 20]]
    assert results([a.start(exchange_dicts), b.start(exchange_dicts)]) == [[21, 11], [20, 10]]


def take_without_gathering(here: Here, world_size: int) -> None:
    gather = GatherDouble(world_size, 0, []) if world_size > 1 else None
    here.link.post(Kind.PROXY, 0).wait(gather)


@on_lanes
@pytest.mark.parametrize("world_size", [1, 4])
def test_slices_for_another_number_of_ranks_are_refused(team: Team, lanes: str, world_size: int) -> None:
    a, b = open_links(team, 2, lanes)
    a.call(push_slices, 2, 0)
    with pytest.raises(
        SequenceError, match=f"stage 1 rank 0: a tensor arrived in 2 slices, but .* over {world_size} ranks"
    ):
        b.call(take_without_gathering, world_size)


# --- mistakes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("slot", "iteration"), [(2, 9), (1, 8)], ids=["slot", "iteration"])
@on_lanes
def test_a_message_of_another_microbatch_is_never_used(
    team: Team, lanes: str, slot: int, iteration: int
) -> None:
    a, b = open_links(team, 2, lanes)
    a.call(push_dict, Kind.PROXY, 1, HIDDEN, slot=1, iteration=9)
    with pytest.raises(
        SequenceError,
        match=r"stage 1 rank 0: expected the proxy message of microbatch "
        rf"slot {slot}, iteration {iteration}, "
        r"but stage 0 sent slot 1, iteration 9",
    ):
        b.call(take_dict, Kind.PROXY, 0, HIDDEN, slot=slot, iteration=iteration)


def test_who_expects_no_iteration_takes_what_comes(team: Team) -> None:
    a, b = team.open_lanes(2)
    a.call(push_dict, Kind.TENSORS, 1, HIDDEN, slot=1, iteration=9)
    b.call(take_dict, Kind.TENSORS, 0, HIDDEN)


# --- stages that decide differently ------------------------------------------------------------

TWO = "decode of 2 requests, 2 tokens (00c0ffee)"
THREE = "decode of 3 requests, 3 tokens (0badcafe)"


def run_microbatch(here: Here, batch: str, iteration: int) -> None:
    """What stage 0 sends in an iteration: requests, and the proxies of a microbatch unless it has none."""
    here.link.push(Kind.REQUESTS, 1, iteration=iteration)
    if batch:
        proxies = realise(HIDDEN)
        here.link.push_tensors(Kind.PROXY, 1, proxies, slot=iteration % 2, iteration=iteration, batch=batch)


def expect_microbatch(here: Here, batch: str, iteration: int) -> None:
    """The same for stage 1, as the scheduler does it."""
    here.link.post(Kind.REQUESTS, 0, iteration=iteration).wait_values()
    here.link.refuse_leftovers(Kind.PROXY, 0, iteration)
    if batch:
        pending = here.link.post(
            Kind.PROXY, 0, slot=iteration % 2, iteration=iteration, overtaken_by=Kind.REQUESTS
        )
        pending.batch = batch
        pending.wait()
        here.link.release(PassedEvent())


def run_microbatches(here: Here, batches: Sequence[str]) -> None:
    for iteration, batch in enumerate(batches):
        run_microbatch(here, batch, iteration)


def expect_microbatches(here: Here, batches: Sequence[str]) -> None:
    for iteration, batch in enumerate(batches):
        expect_microbatch(here, batch, iteration)


@on_lanes
@pytest.mark.parametrize("first_comes", ["first", "last"])
def test_stages_that_decide_alike_are_left_alone(team: Team, lanes: str, first_comes: str) -> None:
    """Also when everything of stage 0 is there before stage 1 looks."""
    batches = ["", TWO, "", THREE, TWO, "", ""]
    a, b = open_links(team, 2, lanes, slots=8)
    if first_comes == "first":
        a.call(run_microbatches, batches)
        b.call(expect_microbatches, batches)
    else:
        receiving = b.start(expect_microbatches, batches)
        a.call(run_microbatches, batches)
        receiving.result()


@field_case("sglang-25887", "sglang-28424")
@on_lanes
def test_a_microbatch_of_other_requests_is_never_used(team: Team, lanes: str) -> None:
    a, b = open_links(team, 2, lanes)
    a.call(run_microbatches, [TWO, THREE])
    with pytest.raises(
        SequenceError,
        match=r"stage 1 rank 0: microbatch slot 1, iteration 1, is decode of 3 requests, 3 tokens "
        r"\(0badcafe\) on stage 0, but decode of 2 requests, 2 tokens \(00c0ffee\) here: the stages decided "
        r"differently",
    ):
        b.call(expect_microbatches, [TWO, TWO])


@on_lanes
def test_a_microbatch_that_only_the_sender_runs_is_noticed_an_iteration_later(team: Team, lanes: str) -> None:
    a, b = open_links(team, 2, lanes)
    a.call(run_microbatches, ["", TWO, ""])
    with pytest.raises(
        SequenceError, match=r"microbatch slot 1, iteration 1, was run on stage 0 \(decode of 2 .*\), but not"
    ):
        b.call(expect_microbatches, ["", "", ""])


@on_lanes
def test_a_microbatch_that_only_the_receiver_runs_is_not_waited_for(team: Team, lanes: str) -> None:
    """It waits until the sender's next iteration, not for ever. The same wait without that rule runs into
    its limit."""
    a, b = open_links(team, 2, lanes)
    waiting = b.start(expect_microbatches, ["", TWO])
    a.call(run_microbatches, ["", "", ""])
    with pytest.raises(
        SequenceError,
        match=r"iteration 1, is decode of 2 requests.* here, but stage 0 ran nothing in it and has gone on "
        r"to iteration 2",
    ):
        waiting.result()


def test_without_the_rule_the_receiver_would_wait_for_ever(team: Team) -> None:
    a, b = team.open_lanes(2, Settings(wait_limit_s=0.5))
    a.call(run_microbatches, ["", "", ""])
    with pytest.raises(WaitLimitError):
        b.call(take_dict, Kind.PROXY, 0, HIDDEN, slot=1, iteration=1)
