"""State of every pipeline stage at every moment, from the traces of its ranks (`SGLANG_NPU_PP_TRACE`).

docs/measuring.md defines the states: compute, exposed communication, back-pressure, bubble, host work, idle.
All times are on stage 0's clock, exact to half a round trip of the host lane at start. The push of a message
cuts the wait for it in two: bubble before, exposed communication after.
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
    """One stage in one state from `begin_ns` to `end_ns`, of stage 0's clock."""

    begin_ns: int
    end_ns: int
    state: str
    kind: str = ""  # of the message, where the state is about one
    slot: int = -1
    iteration: int = -1


@dataclass(frozen=True)
class StageTimeline:
    """The states of one stage, without gaps."""

    stage: int
    spans: list[Span]

    @property
    def launches(self) -> int:
        return len({span.iteration for span in self.spans if span.state == COMPUTE})

    def seconds(self, state: str, kind: str | None = None) -> float:
        """Time in a state, of one kind or all."""
        chosen = (s for s in self.spans if s.state == state and kind in (None, s.kind))
        return sum(span.end_ns - span.begin_ns for span in chosen) / 1e9

    def share(self, state: str, kind: str | None = None) -> float:
        """`seconds` as a share of the pipeline's busy time."""
        busy = sum(s.end_ns - s.begin_ns for s in self.spans if s.state != IDLE) / 1e9
        return self.seconds(state, kind) / busy if busy else 0.0


@dataclass(frozen=True)
class Timeline:
    """All stages from `begin_ns` to `end_ns` of stage 0's clock."""

    begin_ns: int
    end_ns: int
    stages: list[StageTimeline]

    def cut(self, begin_ns: int, end_ns: int) -> Timeline:
        """The part between two times."""
        begin_ns, end_ns = max(begin_ns, self.begin_ns), min(end_ns, self.end_ns)
        stages = [StageTimeline(s.stage, list(_clip(s.spans, begin_ns, end_ns))) for s in self.stages]
        return Timeline(begin_ns, end_ns, stages)

    def iterations(self, first: int, last: int) -> Timeline:
        """From the first forward of iteration `first` to the end of `last`. Raises ValueError if there is
        none."""
        forwards = [span for stage in self.stages for span in stage.spans if span.state == COMPUTE]
        chosen = [span for span in forwards if first <= span.iteration <= last]
        if not chosen:
            there = sorted(span.iteration for span in forwards)
            raise ValueError(
                f"There is no forward of iterations {first} to {last}, but of {there[0]} to {there[-1]}."
            )
        return self.cut(min(span.begin_ns for span in chosen), max(span.end_ns for span in chosen))

    def middle(self, launches: int) -> Timeline:
        """The part with the first stage's middle `launches` forwards."""
        forwards = [span for span in self.stages[0].spans if span.state == COMPUTE]
        first = max(0, (len(forwards) - launches) // 2)
        chosen = forwards[first : first + launches]
        return self.cut(chosen[0].begin_ns, chosen[-1].end_ns) if chosen else self


def analyse(traces: Sequence[RankTrace]) -> Timeline:
    """The states of all stages, from the first launch to the end of the last.

    `traces`: one rank of every stage, by stage. Raises ValueError for a missing stage or no launch.
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
    """Plain text: per stage, ms per launched microbatch and share of the busy time."""
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
    """From the first launch to the end of the last, while all stages still have events."""
    begins = [event.time_ns for events in recorded for event in events if event.name == "launch"]
    ends = [e.time_ns for events in recorded for e in events if e.name in ("launched", "ran")]
    begin = max(min(begins, default=0), *(events[0].time_ns for events in recorded if events))
    end = max(ends, default=0)
    if not begins or end <= begin:
        raise ValueError("All stages together recorded no forward.")
    return begin, end


def _pushes(events: Iterable[Event]) -> Mapping[tuple[str, int], list[int]]:
    """Push times of a stage by kind and iteration, one per receiver in stage order."""
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
    """Known states of a stage, overlapping; gaps are host work."""
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
    """Begin events with their end times; for open ones the time of the report."""
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
    """Push time of the awaited message; long ago if not recorded (any more)."""
    message = (wait.kind, wait.iteration)
    if wait.kind != "output" or (stage > 0 and message in pushes[stage - 1]):
        times = pushes[stage - 1].get(message, [])
        return times[0] if times else 0
    times = pushes[-1].get(message, [])
    return times[min(stage, len(times) - 1)] if times else 0


def _empty_iterations(events: Iterable[Event], written_ns: int) -> Iterator[Span]:
    """Iterations without launch and outputs, as bubbles."""
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
    """Spans without overlap; the more important state wins."""
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
    """Bubbles of all stages at once."""
    bubbles = [[span[:2] for span in spans if span.state == BUBBLE] for spans in painted]
    return reduce(_intersection, bubbles)


def _intersection(first: Sequence[Interval], second: Sequence[Interval]) -> list[Interval]:
    """Times in both of two ordered sequences."""
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
