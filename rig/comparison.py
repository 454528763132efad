"""One layout of one release, unpatched against patched: the core that the tests and `make matrix` share.

`compare` starts the two servers one after the other and asks both the same requests. `complaints` says what
is wrong, by check; the checks are the functions in `CHECKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from rig import battery
from rig.launcher import Launcher, point_to_point_counts, traces
from rig.releases import IN_VENV, RELEASES, Release
from sglang_npu_pp.observe.trace import Event
from sglang_npu_pp.tools.certify import order

Answers = dict[str, Any]

CONCURRENCY = 16


class Layout(NamedTuple):
    """A server as it is compared with its twin."""

    name: str
    tp: int
    pp: int
    options: dict[str, Any] = {}  # noqa: RUF012 - for both servers; a NamedTuple default, never written
    patched_env: dict[str, str] = {}  # noqa: RUF012

    @property
    def device_lane(self) -> bool:
        return self.patched_env.get("SGLANG_NPU_PP_PROXY_LANE") == "device"

    @property
    def early_send(self) -> bool:
        return self.patched_env.get("SGLANG_NPU_PP_EARLY_SEND") != "0"

    @property
    def early_receive(self) -> bool:
        return self.patched_env.get("SGLANG_NPU_PP_EARLY_RECEIVE") != "0"


SWITCHES_OFF = {
    "SGLANG_NPU_PP_PIN_MEMORY": "0",
    "SGLANG_NPU_PP_EARLY_SEND": "0",
    "SGLANG_NPU_PP_EARLY_RECEIVE": "0",
    "SGLANG_NPU_PP_AHEAD": "0",
}


def depth(value: int) -> tuple[str, str]:
    return ("--pp-async-batch-depth", str(value))


@dataclass
class Observed:
    """What one server answered and did."""

    one_by_one: Answers
    concurrent: Answers
    point_to_point: int  # torch.distributed sends and receives during the battery, all ranks
    log: str
    traces: dict[int, list[Event]] = field(default_factory=dict)


@dataclass
class Pair:
    layout: Layout
    release: Release
    upstream: Observed
    patched: Observed

    @property
    def senders(self) -> list[list[Event]]:
        """Traces of the stages that send proxies."""
        return [self.patched.traces[stage] for stage in range(self.layout.pp - 1)]

    @property
    def receivers(self) -> list[list[Event]]:
        """Traces of the stages that receive proxies."""
        return [self.patched.traces[stage] for stage in range(1, self.layout.pp)]


def observe(launcher: Launcher, layout: Layout, release: Release, *, patched: bool) -> Observed:
    """Start a server, run the battery one by one and sixteen at a time, stop it."""
    options = dict(layout.options)
    if patched:
        options["env"] = {**options.get("env", {}), **layout.patched_env}
    server = launcher.start(layout.tp, layout.pp, patched=patched, release=release, **options)
    try:
        before = sum(point_to_point_counts(server).values())
        (one_by_one,) = battery.run(server, without=release.left_out)
        (concurrent,) = battery.run(server, concurrency=CONCURRENCY, without=release.not_in_company)
        after = sum(point_to_point_counts(server).values())
        recorded = traces(server) if patched else {}
        log = server.log_text()  # of the first node
    finally:
        launcher.stop_all()
    return Observed(one_by_one, concurrent, after - before, log, recorded)


def compare(
    launcher: Launcher,
    layout: Layout,
    release: Release = RELEASES[IN_VENV],
    upstream: Observed | None = None,
) -> Pair:
    """`upstream`: what was observed of it before, when its answers are those of this layout."""
    upstream = upstream or observe(launcher, layout, release, patched=False)
    return Pair(layout, release, upstream, observe(launcher, layout, release, patched=True))


# --- checks: what is wrong with a pair, a line each ------------------------------------------------


def upstream_answers_depend_on_company(pair: Pair) -> list[str]:
    """Otherwise the comparison of concurrent requests would mean nothing."""
    return battery.differences(
        pair.upstream.one_by_one, pair.upstream.concurrent, pair.release.not_in_company
    )


def answers_one_by_one_differ(pair: Pair) -> list[str]:
    return battery.differences(pair.upstream.one_by_one, pair.patched.one_by_one)


def concurrent_answers_differ(pair: Pair) -> list[str]:
    return battery.differences(pair.upstream.one_by_one, pair.patched.concurrent, pair.release.not_in_company)


def patches_are_not_in_force(pair: Pair) -> list[str]:
    """Every scheduler says it once; the number depends on the release."""
    said = pair.patched.log.count(f"patches in force for SGLang {pair.release.name}, all features; stage ")
    expected = pair.layout.tp * pair.layout.pp // pair.layout.options.get("nnodes", 1)  # on the first node
    return [] if said == expected else [f"{said} schedulers say that they are patched, not {expected}"]


def gloo_carries_messages(pair: Pair) -> list[str]:
    """Proxies on the device lane are torch.distributed by choice; nothing else is."""
    if pair.upstream.point_to_point <= 1000:
        return ["the probe does not count: the unpatched server sent next to nothing"]
    proxies = sum(event.name == "post_send" for trace in pair.senders for event in trace)
    allowed = 2 * proxies * pair.layout.tp if pair.layout.device_lane else 0
    found = pair.patched.point_to_point
    return [] if found <= allowed else [f"{found} torch.distributed sends and receives, {allowed} allowed"]


def stages_launch_different_microbatches(pair: Pair) -> list[str]:
    first = order.launches(pair.patched.traces[0])
    if len(first) <= 100:
        return [f"only {len(first)} launches were recorded"]
    return [
        f"stage {stage} did not launch what stage 0 launched"
        for stage, trace in enumerate(pair.receivers, start=1)
        if order.launches(trace) != first
    ]


def proxies_leave_at_another_place(pair: Pair) -> list[str]:
    early = pair.layout.early_send
    expected = (
        order.proxies_leave_right_behind_the_launch
        if early
        else order.proxies_leave_at_the_end_of_the_iteration
    )
    return [line for trace in pair.senders for line in expected(trace)]


def proxies_are_waited_for_early(pair: Pair) -> list[str]:
    return [line for trace in pair.receivers for line in order.proxies_are_waited_for_last(trace)]


def tokens_are_waited_for_before_the_launch(pair: Pair) -> list[str]:
    recorded = pair.patched.traces.values()
    return [line for trace in recorded for line in order.tokens_are_waited_for_behind_the_launch(trace)]


def outputs_do_not_come_from_the_last_stage(pair: Pair) -> list[str]:
    return order.outputs_come_from_the_last_stage(pair.patched.traces)


def no_message_is_early(pair: Pair) -> list[str]:
    """Messages are there before they are asked for, unless they are sent late."""
    if not pair.layout.early_send:
        return []
    return [
        f"no proxies of stage {stage} arrived before stage {stage + 1} asked for them"
        for stage, trace in enumerate(pair.receivers)
        if not order.arrived_unasked(trace, "proxy")
    ]


def device_receives_are_posted_at_another_place(pair: Pair) -> list[str]:
    lines = []
    for stage, trace in enumerate(pair.receivers, start=1):
        if any(event.name == "post_receive" for event in trace) != pair.layout.device_lane:
            lines.append(f"stage {stage} does not use the lane that it was given")
        if pair.layout.device_lane and pair.layout.early_receive:
            lines += order.receives_are_posted_with_their_header(trace, slots=4)
        elif pair.layout.device_lane:
            lines += order.receives_are_posted_in_their_wait(trace)
    return lines


CHECKS: tuple[Callable[[Pair], list[str]], ...] = (
    upstream_answers_depend_on_company,
    answers_one_by_one_differ,
    concurrent_answers_differ,
    patches_are_not_in_force,
    gloo_carries_messages,
    stages_launch_different_microbatches,
    proxies_leave_at_another_place,
    proxies_are_waited_for_early,
    tokens_are_waited_for_before_the_launch,
    outputs_do_not_come_from_the_last_stage,
    no_message_is_early,
    device_receives_are_posted_at_another_place,
)


def complaints(pair: Pair) -> Mapping[str, list[str]]:
    """What is wrong, by check; empty when all is well."""
    found = {check.__name__.replace("_", " "): check(pair) for check in CHECKS}
    return {name: lines for name, lines in found.items() if lines}
