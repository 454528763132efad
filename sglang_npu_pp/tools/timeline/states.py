"""Where the time of every pipeline stage went, from the traces that its ranks wrote (`SGLANG_NPU_PP_TRACE`).

At every moment a stage is in exactly one state. All times are on stage 0's clock.

compute
    A forward runs: from the beginning of its launch to the end, which on CPU is all of it; on a device, where
    the launch returns early, between the events that the device recorded around it.
exposed communication, by kind (requests, proxy, output)
    No forward runs, and the scheduler thread is blocked waiting for a message that its sender has pushed
    already: there is something to run, and only the link (and the receiver's unpacking) is in the way. Also
    the time in which a launched forward of a later stage waits on the device, for its tensors and to begin.
    Requests count only in an iteration that launches something.
back-pressure, by kind
    No forward runs, and the scheduler thread is blocked because as many messages are in flight as may be;
    in upstream, one of a kind.
bubble
    There is no batch to run. The scheduler thread waits for a message that its sender has not pushed yet (it
    still computes, or has nothing to send), or it is in an iteration that neither launches anything nor gets
    outputs.
host work
    All the rest: scheduling, processing results, packing, sending; the device has nothing to do meanwhile.
idle
    All stages have a bubble at once, so there is nothing to do. It is left out of the ratios, which are
    shares of the remaining time.

A wait for a message is cut in two by the moment at which its sender pushed it: before it, the stage had
nothing to run (a bubble: stages that are not equally long, too few microbatches); from it on, communication
was exposed. The cut is as exact as the clocks are: to half a round trip of the host lane at the start.
"""

from __future__ import annotations

import heapq
import itertools
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import NamedTuple

from ...observe.trace import Event, RankTrace
from ...text import number_table

COMPUTE, EXPOSED, BACK_PRESSURE = "compute", "exposed", "back-pressure"
BUBBLE, HOST, IDLE = "bubble", "host work", "idle"
KINDS = ("requests", "proxy", "output")

# Where two overlap, the first of these is the state.
_PRIORITY = {state: rank for rank, state in enumerate([IDLE, COMPUTE, BACK_PRESSURE, EXPOSED, BUBBLE, HOST])}

Interval = tuple[int, int]


class Span(NamedTuple):
    """A stage was in one state from `begin_ns` to `end_ns`, of stage 0's clock."""

    begin_ns: int
    end_ns: int
    state: str
    kind: str = ""  # of the message, where the state is about one
    slot: int = -1
    iteration: int = -1


@dataclass(frozen=True)
class StageTimeline:
    """The states of one stage, one behind the other without a gap."""

    stage: int
    spans: list[Span]

    @property
    def launches(self) -> int:
        return len({span.iteration for span in self.spans if span.state == COMPUTE})

    def seconds(self, state: str, kind: str | None = None) -> float:
        """Time in a state; of one message kind, or of all."""
        chosen = (s for s in self.spans if s.state == state and kind in (None, s.kind))
        return sum(span.end_ns - span.begin_ns for span in chosen) / 1e9

    def share(self, state: str, kind: str | None = None) -> float:
        """`seconds` as a part of the time in which the pipeline was not idle."""
        busy = sum(s.end_ns - s.begin_ns for s in self.spans if s.state != IDLE) / 1e9
        return self.seconds(state, kind) / busy if busy else 0.0


@dataclass(frozen=True)
class Timeline:
    """All stages over the same time, from `begin_ns` to `end_ns` of stage 0's clock."""

    begin_ns: int
    end_ns: int
    stages: list[StageTimeline]

    def cut(self, begin_ns: int, end_ns: int) -> Timeline:
        """The part between two times."""
        begin_ns, end_ns = max(begin_ns, self.begin_ns), min(end_ns, self.end_ns)
        stages = [StageTimeline(s.stage, list(_clip(s.spans, begin_ns, end_ns))) for s in self.stages]
        return Timeline(begin_ns, end_ns, stages)

    def iterations(self, first: int, last: int) -> Timeline:
        """The part from the first forward of iteration `first` to the end of the last of iteration `last`.

        Raises ValueError, in one sentence, when there is none.
        """
        forwards = [span for stage in self.stages for span in stage.spans if span.state == COMPUTE]
        chosen = [span for span in forwards if first <= span.iteration <= last]
        if not chosen:
            there = sorted(span.iteration for span in forwards)
            raise ValueError(
                f"There is no forward of iterations {first} to {last}, but of {there[0]} to {there[-1]}."
            )
        return self.cut(min(span.begin_ns for span in chosen), max(span.end_ns for span in chosen))

    def middle(self, launches: int) -> Timeline:
        """The part in which the first stage has its middle `launches` forwards."""
        forwards = [span for span in self.stages[0].spans if span.state == COMPUTE]
        first = max(0, (len(forwards) - launches) // 2)
        chosen = forwards[first : first + launches]
        return self.cut(chosen[0].begin_ns, chosen[-1].end_ns) if chosen else self


def analyse(traces: Sequence[RankTrace]) -> Timeline:
    """The states of all stages, between the first launch and the end of the last.

    `traces`: one rank of every stage, by stage. Raises ValueError, in one sentence, when a stage is missing
    or nothing was launched.
    """
    if [trace.stage for trace in traces] != list(range(len(traces))) or not traces:
        found = ", ".join(str(trace.stage) for trace in traces) or "none"
        raise ValueError(f"The traces of all stages are needed, from 0 on, but there are those of: {found}.")
    recorded = [trace.on_stage_0() for trace in traces]
    begin, end = _window(recorded)
    pushes = [_pushes(events) for events in recorded]
    painted = []
    for trace, events in zip(traces, recorded, strict=True):
        spans = _states(events, trace.stage, pushes, trace.written_ns + trace.offset_ns)
        painted.append(_paint([Span(begin, end, HOST), *spans], begin, end))
    nothing_to_do = [Span(*interval, IDLE) for interval in _common_bubbles(painted)]
    stages = [
        StageTimeline(trace.stage, _paint([*spans, *nothing_to_do], begin, end))
        for trace, spans in zip(traces, painted, strict=True)
    ]
    return Timeline(begin, end, stages)


def table(timeline: Timeline) -> str:
    """Plain text: per stage, milliseconds a launched microbatch and share of the time that was not idle."""
    stages = timeline.stages
    rows = [["", *(f"stage {stage.stage}" for stage in stages)]]
    rows.append(["microbatches", *(str(stage.launches) for stage in stages)])
    shown: list[tuple[str, str, str | None]] = [(COMPUTE, COMPUTE, None), (HOST, HOST, None)]
    shown += [("bubble ratio", BUBBLE, None), ("exposed communication", EXPOSED, None)]
    others = {span.kind for stage in stages for span in stage.spans if span.state == EXPOSED}
    shown += [(f"  {kind}", EXPOSED, kind) for kind in (*KINDS, *sorted(others.difference(KINDS)))]
    shown.append((BACK_PRESSURE, BACK_PRESSURE, None))
    for label, state, kind in shown:
        rows.append([label, *(_cell(stage, state, kind) for stage in stages)])
    return number_table(rows, left=1)


def _cell(stage: StageTimeline, state: str, kind: str | None) -> str:
    each = 1e3 * stage.seconds(state, kind) / max(1, stage.launches)
    return f"{each:8.3f} ms {100 * stage.share(state, kind):5.1f} %"


# --- from events to states ---------------------------------------------------------------------


def _window(recorded: Sequence[list[Event]]) -> Interval:
    """From the first launch to the end of the last, as far as every stage still has its events."""
    begins = [event.time_ns for events in recorded for event in events if event.name == "launch"]
    ends = [e.time_ns for events in recorded for e in events if e.name in ("launched", "ran")]
    begin = max(min(begins, default=0), *(events[0].time_ns for events in recorded if events))
    end = max(ends, default=0)
    if not begins or end <= begin:
        raise ValueError("All stages together recorded no forward.")
    return begin, end


def _pushes(events: Iterable[Event]) -> Mapping[tuple[str, int], list[int]]:
    """When a stage pushed a message, by kind and iteration: once for each receiver, in stage order."""
    times = defaultdict(list)
    for event in events:
        if event.name == "push":
            times[event.kind, event.iteration].append(event.time_ns)
    return times


def _states(
    events: Sequence[Event],
    stage: int,
    pushes: Sequence[Mapping[tuple[str, int], list[int]]],
    written_ns: int,
) -> Iterator[Span]:
    """What is known of one stage, overlapping; where nothing is said it was at host work."""
    launches = {event.iteration: event for event in events if event.name == "launch"}
    on_device = any(event.name == "run" for event in events)
    for began, end_ns in _pairs(events, written_ns):
        place = (began.slot, began.iteration)
        if began.name == ("run" if on_device else "launch"):
            yield Span(began.time_ns, end_ns, COMPUTE, "", *place)
        if began.name == "run" and began.iteration in launches and stage > 0:
            yield Span(launches[began.iteration].time_ns, began.time_ns, EXPOSED, "proxy", *place)
        if began.name == "full":
            yield Span(began.time_ns, end_ns, BACK_PRESSURE, began.kind, *place)
        if began.name == "wait":
            pushed_ns = _pushed_ns(began, stage, pushes)
            if began.kind == "requests" and began.iteration not in launches:
                pushed_ns = end_ns  # there was nothing to run, whatever came
            middle_ns = min(max(began.time_ns, pushed_ns), end_ns)
            yield Span(began.time_ns, middle_ns, BUBBLE, began.kind, *place)
            yield Span(middle_ns, end_ns, EXPOSED, began.kind, *place)
    yield from _empty_iterations(events, written_ns)


_ENDS = {
    "launched": ("launch",),
    "ran": ("run",),
    "ready": ("wait",),
    "push": ("full",),
    "post_send": ("full",),
}
_BEGINNINGS = {name for names in _ENDS.values() for name in names}


def _pairs(events: Iterable[Event], written_ns: int) -> Iterator[tuple[Event, int]]:
    """Beginnings, each with the time of its end; of those without one, with the time of the report."""
    begun: dict[tuple[str, str], Event] = {}
    for event in events:
        for name in _ENDS.get(event.name, ()):
            began = begun.pop((name, event.kind), None)
            if began is not None:
                yield began, event.time_ns
        if event.name in _BEGINNINGS:
            begun[event.name, event.kind] = event
    yield from ((began, written_ns) for began in begun.values())


def _pushed_ns(wait: Event, stage: int, pushes: Sequence[Mapping[tuple[str, int], list[int]]]) -> int:
    """When the message that is waited for was pushed; long ago if that is not recorded (any more).

    Outputs come from the last stage, a push for each receiver; in upstream's ring, from the stage before.
    """
    message = (wait.kind, wait.iteration)
    if wait.kind != "output" or (stage > 0 and message in pushes[stage - 1]):
        times = pushes[stage - 1].get(message, [])
        return times[0] if times else 0
    times = pushes[-1].get(message, [])
    return times[min(stage, len(times) - 1)] if times else 0


def _empty_iterations(events: Iterable[Event], written_ns: int) -> Iterator[Span]:
    """Iterations that neither launch anything nor get outputs: a bubble from their beginning to their end."""
    began: Event | None = None
    for event in events:
        if event.name == "iteration":
            if began is not None:
                yield Span(began.time_ns, event.time_ns, BUBBLE)
            began = event
        elif event.name == "launch" or (event.name, event.kind) == ("ready", "output"):
            began = None
    if began is not None:
        yield Span(began.time_ns, written_ns, BUBBLE)


# --- intervals ---------------------------------------------------------------------------------


def _paint(spans: Iterable[Span], begin_ns: int, end_ns: int) -> list[Span]:
    """The one state of every moment: spans that overlap nowhere, the more important one where they did."""
    waiting = sorted(_clip(spans, begin_ns, end_ns))
    times = sorted({time for span in waiting for time in span[:2]})
    open_spans: list[tuple[int, int, Span]] = []
    painted: list[Span] = []
    position = 0
    for time, following in itertools.pairwise(times):
        while position < len(waiting) and waiting[position].begin_ns <= time:
            span = waiting[position]
            heapq.heappush(open_spans, (_PRIORITY[span.state], position, span))
            position += 1
        while open_spans and open_spans[0][2].end_ns <= time:
            heapq.heappop(open_spans)
        if not open_spans:
            continue
        piece = open_spans[0][2]._replace(begin_ns=time, end_ns=following)
        if painted and painted[-1][1:] == (time, *piece[2:]):
            piece = piece._replace(begin_ns=painted.pop().begin_ns)
        painted.append(piece)
    return painted


def _clip(spans: Iterable[Span], begin_ns: int, end_ns: int) -> Iterator[Span]:
    for span in spans:
        begin, end = max(span.begin_ns, begin_ns), min(span.end_ns, end_ns)
        if begin < end:
            yield span._replace(begin_ns=begin, end_ns=end)


def _common_bubbles(painted: Sequence[Sequence[Span]]) -> list[Interval]:
    """When all stages have a bubble."""
    bubbles = [[span[:2] for span in spans if span.state == BUBBLE] for spans in painted]
    return reduce(_intersection, bubbles)


def _intersection(first: Sequence[Interval], second: Sequence[Interval]) -> list[Interval]:
    """Times that are in both of two ordered sequences."""
    common = []
    i = j = 0
    while i < len(first) and j < len(second):
        begin, end = max(first[i][0], second[j][0]), min(first[i][1], second[j][1])
        if begin < end:
            common.append((begin, end))
        if first[i][1] < second[j][1]:
            i += 1
        else:
            j += 1
    return common
