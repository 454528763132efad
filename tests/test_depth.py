"""The advice about --pp-async-batch-depth: its model against the loop itself, step by step, and its words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_npu_pp.observe.depth import (
    HIDDEN,
    StageTimes,
    advise,
    is_hidden,
    microbatch_size,
    needed_depth,
    period_s,
    round_s,
    shortest_period_s,
)


def simulated_period_s(stages: Sequence[StageTimes], depth: int, iterations: int) -> float:
    """Runs the loop of all stages as it is written, with clocks instead of work: who waits for what, where.

    The mean over the second half of `iterations`.
    """
    last = len(stages) - 1
    slots = len(stages) + depth
    host = [0.0] * len(stages)  # when the scheduler thread of a stage gets to its next step
    device = [0.0] * len(stages)  # when the forward stream of a stage is free
    outputs: list[float] = []  # when the last stage had them, by iteration
    launches: list[float] = []  # of stage 0
    for iteration in range(iterations):
        requests = header = tensors = 0.0  # when they leave the stage before
        for number, stage in enumerate(stages):
            hop_s = stages[number - 1].hop_s if number else 0.0
            now = max(host[number], requests + hop_s)  # ingest_requests
            requests = now + 0.5 * stage.host_s  # process_input_requests
            now += stage.host_s  # get_next_batch_to_run; processing results belongs here as well
            now = max(now, header + hop_s)  # Pending.wait, on the host
            begin = max(now, device[number], tensors + hop_s)
            device[number] = begin + stage.forward_s
            host[number] = now if stage.asynchronous else device[number]
            header, tensors = host[number], device[number]  # send_proxies
            if number == 0:
                launches.append(begin)
        outputs.append(device[last])
        awaited = iteration + 1 - slots
        if awaited >= 0:  # OutputTicket.synchronize
            for number in range(len(stages)):
                hop_s = stages[last].hop_s if number < last else 0.0
                host[number] = max(host[number], outputs[awaited] + hop_s)
    half = iterations // 2
    return (launches[-1] - launches[half - 1]) / (iterations - half)


SECONDS = st.floats(1e-4, 0.1)


@st.composite
def pipelines(draw: st.DrawFn) -> list[StageTimes]:
    """2 to 5 stages with forwards and hops of their own. Host work is alike on all and no longer than a
    forward: a later stage begins with it when the request list comes, a forward ahead of the proxies."""
    times = draw(st.lists(st.tuples(SECONDS, st.floats(0, 0.1)), min_size=2, max_size=5))
    host_s = draw(st.floats(0, 1)) * min(forward_s for forward_s, _ in times)
    asynchronous = draw(st.booleans())
    return [StageTimes(forward_s, host_s, hop_s, asynchronous) for forward_s, hop_s in times]


@given(pipelines(), st.integers(0, 6))
def test_the_model_is_what_the_loop_does(stages: list[StageTimes], depth: int) -> None:
    iterations = 2000
    simulated = simulated_period_s(stages, depth, iterations)
    slack = 3 * round_s(stages) / iterations  # the loop repeats after some rounds, not after each iteration
    assert simulated == pytest.approx(period_s(stages, depth), abs=slack)


@given(pipelines())
def test_the_needed_depth_hides_the_link_and_one_less_does_not(stages: list[StageTimes]) -> None:
    needed = needed_depth(stages)
    assert is_hidden(stages, needed)
    assert period_s(stages, needed) * (1 - HIDDEN) <= shortest_period_s(stages) * (1 + 1e-9)
    if needed:
        assert not is_hidden(stages, needed - 1)


@given(SECONDS, st.floats(1e-5, 0.2), st.integers(2, 6), st.booleans())
def test_equal_stages_without_host_work_follow_the_rule_of_thumb(
    forward_s: float, hop_s: float, count: int, asynchronous: bool
) -> None:
    """Depth d covers a one-way latency of d * T / pp_size, and depth 0 pays exactly one hop."""
    stages = [StageTimes(forward_s, 0.0, hop_s, asynchronous)] * count
    assert period_s(stages, 0) == pytest.approx(forward_s + hop_s)
    covered = [replace(stage, hop_s=2 * forward_s / count) for stage in stages]
    assert period_s(covered, 2) == pytest.approx(forward_s)
    assert period_s(covered, 1) > forward_s * 1.0001


@given(st.integers(1, 500), st.integers(2, 9), st.none() | st.integers(1, 600))
def test_microbatches_share_the_requests(requests: int, slots: int, limit: int | None) -> None:
    size = microbatch_size(requests, slots, limit)
    assert size >= 1
    assert size == 1 or size * slots <= requests
    assert limit is None or size <= max(limit, 1)


def two_stages(forward_ms: float, hop_ms: float = 5.0) -> list[StageTimes]:
    return [StageTimes(forward_ms / 1e3, 0.0, hop_ms / 1e3)] * 2


def test_a_link_that_is_exposed() -> None:
    measured = {"prefill": two_stages(30), "decode": two_stages(9)}
    assert advise(measured, depth=0, max_requests=32, limit=None, proxy_bytes=5 << 18).split(": ", 1) == [
        "2 stages, hops of 5 ms one way, forwards of 30 ms (prefill) and 9 ms (decode)",
        "5.0 of 35.0 ms (prefill) and 5.0 of 14.0 ms (decode) of an iteration go into waiting for the link; "
        "--pp-async-batch-depth 1 (prefill) and 2 (decode) would hide it; "
        "a full microbatch then holds 10 at depth 1, 8 at depth 2 instead of 16 requests "
        "(set --pp-max-micro-batch-size to it, or the first slots take all); "
        "decoding gains only if more requests may run (--max-running-requests) or a forward with fewer of "
        "them is shorter; the time that bytes need is not in this, a proxy has up to 1.2 MiB",
    ]


def test_a_kind_that_is_not_exposed_is_not_mentioned_again() -> None:
    measured = {"prefill": two_stages(500), "decode": two_stages(9)}
    text = advise(measured, depth=0, max_requests=32, limit=None, proxy_bytes=1000)
    assert ": 5.0 of 14.0 ms (decode) of an iteration go into waiting for the link; " in text
    assert "; --pp-async-batch-depth 2 (decode) would hide it; " in text


def test_a_limit_that_is_smaller_anyway_costs_nothing() -> None:
    text = advise({"prefill": two_stages(30)}, depth=0, max_requests=32, limit=4, proxy_bytes=1000)
    assert "a microbatch holds at most 4 requests as before" in text
    assert "--pp-max-micro-batch-size" not in text


def test_a_link_that_is_hidden_is_said_to_be() -> None:
    text = advise({"prefill": two_stages(30, 0.05)}, depth=0, max_requests=32, limit=None, proxy_bytes=1000)
    assert text.split(": ") == [
        "2 stages, hops of 0.05 ms one way, forwards of 30 ms (prefill)",
        "--pp-async-batch-depth 0 hides the link",
    ]


def test_a_depth_that_is_larger_than_needed_is_said_to_be() -> None:
    text = advise({"decode": two_stages(30)}, depth=3, max_requests=30, limit=None, proxy_bytes=1000)
    assert text.endswith(
        "--pp-async-batch-depth 3 hides the link, and 1 would, with 10 instead of 6 requests a microbatch"
    )


def test_on_a_device_the_host_work_of_stage_0_is_waited_for_too() -> None:
    stages = [StageTimes(0.030, 0.008, 0.0001, asynchronous=True)] * 2
    text = advise({"prefill": stages}, depth=0, max_requests=32, limit=None, proxy_bytes=1000)
    assert ": 4.1 of 34.1 ms (prefill) of an iteration go into waiting for the link and the scheduler" in text
    hidden = advise({"prefill": stages}, depth=1, max_requests=32, limit=None, proxy_bytes=1000)
    assert hidden.endswith("--pp-async-batch-depth 1 hides the link and the scheduler of stage 0")


def test_what_stage_0_does_before_its_tokens_arrive_is_not_waited_for() -> None:
    stages = [StageTimes(0.030, 0.008, 0.0001, asynchronous=True, turn_s=0.002)] * 2
    text = advise({"prefill": stages}, depth=0, max_requests=32, limit=None, proxy_bytes=1000)
    assert ": 1.1 of 31.1 ms (prefill) of an iteration go into waiting for the link and the scheduler" in text


def test_stages_and_hops_that_differ_are_given_as_a_range() -> None:
    stages = [StageTimes(0.030, 0.001, 0.0001), StageTimes(0.020, 0.001, 0.005)]
    text = advise({"prefill": stages}, depth=0, max_requests=32, limit=None, proxy_bytes=1000)
    assert text.startswith("2 stages, hops of 0.1 to 5 ms one way, forwards of 20 to 30 ms (prefill): ")
    assert text.endswith("--pp-async-batch-depth 0 hides the link")  # the faster stage has 10 ms to spare
