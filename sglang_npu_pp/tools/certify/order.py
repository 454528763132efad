"""What must hold for the recorded order of posts, waits and launches, on every layout and at every depth.

Functions return complaints, empty when all is well. They look at order only; the times in a trace are not
used.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from sglang_npu_pp.observe.trace import Event

# Recorded when a message happens to come in or a window to be full: these, and what other threads record, may
# stand between any two others.
_INCIDENTAL = ("arrive", "post_receive", "full")


def _of_other_threads(event: Event) -> bool:
    """On a device: what the threads record that time forwards and, on the last stage, send its outputs."""
    return event.name in ("run", "ran", "chunk_taken") or (event.name, event.kind) == ("push", "output")


def program_order(events: Sequence[Event]) -> list[Event]:
    """What the scheduler did, without what merely arrived meanwhile."""
    return [e for e in events if e.name not in _INCIDENTAL and not _of_other_threads(e)]


def launches(events: Sequence[Event]) -> list[int]:
    return [event.iteration for event in events if event.name == "launch"]


def proxies_leave_right_behind_the_launch(events: Sequence[Event]) -> list[str]:
    """The event behind "launched" is the push of that microbatch's proxies: before its outputs, or
    anyone's, are processed."""
    order = program_order(events)
    return [
        f"behind the launch of iteration {event.iteration} came {order[index + 1 :][:1]}"
        for index, event in enumerate(order)
        if event.name == "launched" and not _is(order[index + 1 :][:1], "push", "proxy", event.iteration)
    ]


def proxies_are_waited_for_last(events: Sequence[Event]) -> list[str]:
    """The event before "launch" is the arrival of that microbatch's proxies in the program's hands."""
    order = program_order(events)
    return [
        f"before the launch of iteration {event.iteration} came {order[:index][-1:]}"
        for index, event in enumerate(order)
        if event.name == "launch" and not _is(order[:index][-1:], "ready", "proxy", event.iteration)
    ]


def tokens_are_waited_for_behind_the_launch(events: Sequence[Event]) -> list[str]:
    """Between the requests of an iteration and its launch, outputs may be posted but not waited for."""
    complaints = []
    waited: list[Event] = []
    for event in program_order(events):
        if event.kind == "requests" and event.name in ("push", "ready"):
            waited = []
        elif event.kind == "output" and event.name == "wait":
            waited.append(event)
        elif event.name == "launch" and waited:
            complaints.append(f"iteration {event.iteration} waited for {waited} before its launch")
    return complaints


def outputs_leave_right_behind_the_launch(events: Sequence[Event]) -> list[str]:
    """On the last stage, where its scheduler sends them itself (on CPU): before it, or anyone, processes
    outputs."""
    steps = [event for event in events if event.name not in _INCIDENTAL]
    complaints = []
    for before, event in itertools.pairwise(steps):
        if (event.name, event.kind) == ("push", "output"):
            pushed = (before.name, before.kind) == ("push", "output")  # to another stage
            if not (pushed or before.name == "launched") or before.iteration != event.iteration:
                complaints.append(f"outputs of iteration {event.iteration} left behind {before}")
    return complaints


def receives_are_posted_with_their_header(events: Sequence[Event], slots: int) -> list[str]:
    """On the device lane: when the header of a microbatch arrives and a slot is free, the very next
    event of that thread is the post of its receive, whatever forward is running or being waited for."""
    complaints = []
    held = 0  # posted or handed out, not yet released by the launch behind them
    for event, following in itertools.pairwise(event for event in events if not _of_other_threads(event)):
        if event.name == "launched":
            held = max(0, held - 1)
        if event.name == "post_receive":
            held += 1
        if (event.name, event.kind) == ("arrive", "proxy") and held < slots:
            expected = ("post_receive", "proxy", event.iteration)
            if (following.name, following.kind, following.iteration) != expected:
                complaints.append(f"behind {event} came {following}")
    return complaints


def forwards_ran_one_after_another(events: Sequence[Event]) -> list[str]:
    """On a device: every forward that was launched was timed, but for the last few, in the order of their
    launches and none before its own."""
    launched = {event.iteration: event.time_ns for event in events if event.name == "launch"}
    runs = [event for event in events if event.name in ("run", "ran")]
    ran = [event.iteration for event in runs if event.name == "ran"]
    complaints = []
    if ran != list(launched)[: len(ran)] or len(ran) < len(launched) - 4:
        complaints.append(f"{len(launched)} forwards were launched, but {len(ran)} ran: {ran[:3]} ...")
    for event, following in itertools.pairwise(runs):
        if event.time_ns > following.time_ns:
            complaints.append(f"{following} is before {event}")
    return complaints + [f"{e} is before its launch" for e in runs if e.time_ns < launched[e.iteration]]


def outputs_come_from_the_last_stage(traces: Mapping[int, Sequence[Event]]) -> list[str]:
    """Every stage but the last receives the outputs of each microbatch that the last stage sent, once; the
    last receives none."""
    last = max(traces)
    sent = [e.iteration for e in traces[last] if (e.name, e.kind) == ("push", "output")]
    complaints = []
    for stage, trace in traces.items():
        received = [e.iteration for e in trace if (e.name, e.kind) == ("ready", "output")]
        asked = [e.iteration for e in trace if (e.name, e.kind) == ("post", "output")]
        if stage == last and (received or asked):
            complaints.append(
                f"stage {stage} samples, and yet asks for outputs of iterations {asked[:3]} ..."
            )
        elif stage != last and received != sorted(set(sent)):
            missing = sorted(set(sent) - set(received))
            complaints.append(f"stage {stage} has no outputs of iterations {missing[:3]} ...")
    return complaints


# --- with a switch off: the other order, which must hold instead ------------------------------------


def proxies_leave_at_the_end_of_the_iteration(events: Sequence[Event]) -> list[str]:
    """With SGLANG_NPU_PP_EARLY_SEND=0: an iteration with a launch ends with the push of its proxies, and some
    outputs are taken between the two."""
    order = [event for event in program_order(events) if event.name != "post_send"]
    steps = [(event.name, event.kind, event.iteration) for event in order]
    complaints = []
    behind_outputs = 0
    for index, event in enumerate(order):
        if event.name != "launched":
            continue
        end = next((i for i in range(index, len(order)) if order[i].name == "iteration"), len(order))
        if end == len(order):  # the trace may end anywhere in the last iteration
            break
        if steps[end - 1] != ("push", "proxy", event.iteration):
            complaints.append(f"the last step of iteration {event.iteration} is {order[end - 1]}")
        behind_outputs += any(step[:2] == ("ready", "output") for step in steps[index:end])
    return complaints if behind_outputs else [*complaints, "no proxies left behind outputs"]


def receives_are_posted_in_their_wait(events: Sequence[Event]) -> list[str]:
    """With SGLANG_NPU_PP_EARLY_RECEIVE=0, on the device lane: a receive is posted between the "wait" of its
    message and "ready"."""
    complaints = []
    waiting: Event | None = None
    for event in events:
        if event.name in ("wait", "ready"):
            waiting = event if event.name == "wait" else None
        elif event.name == "post_receive" and (
            waiting is None or (waiting.kind, waiting.iteration) != (event.kind, event.iteration)
        ):
            complaints.append(f"{event} came while the program waited for {waiting}")
    return complaints


def arrived_unasked(events: Sequence[Event], kind: str) -> int:
    """Messages of `kind` that were here before the program expected them."""
    posted = set()
    early = 0
    for event in events:
        if event.kind == kind and event.name == "post":
            posted.add(event.iteration)
        elif event.kind == kind and event.name == "arrive":
            early += event.iteration not in posted
    return early


def _is(events: Sequence[Event], name: str, kind: str, iteration: int) -> bool:
    return [(e.name, e.kind, e.iteration) for e in events] == [(name, kind, iteration)]
