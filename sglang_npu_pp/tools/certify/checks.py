"""What was observed of both servers, judged: a question a check, and none is passed by asking nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from ...observe.trace import Event
from . import order
from .battery import Run
from .comparison import Comparison, compare
from .examine import Observed, Traces
from .results import Check, Side, Verdict

ALIVE = "servers"
IN_FORCE = "patches in force"
ONE_BY_ONE = "answers one by one"
TOGETHER = "answers in company"
MICROBATCHES = "microbatches"
PROXIES_SENT = "proxies are sent behind the launch"
PROXIES_WAITED_FOR = "proxies are waited for last"
TOKENS_WAITED_FOR = "tokens are waited for behind the launch"
OUTPUTS = "outputs come from the last stage"
RECEIVES = "receives are posted with their header"
FORWARDS = "forwards run one after another"
ABORTS = "aborts"
LOST_PEER = "lost peer"

REQUIRED = (ALIVE, IN_FORCE, ONE_BY_ONE, MICROBATCHES, PROXIES_SENT, PROXIES_WAITED_FOR, OUTPUTS)
"""A certificate needs these passed; the others must not have failed."""

LEAST_LAUNCHES = 20  # of a trace that shows an order
LEAST_SLOTS = 2  # of the device lane: a setting may give it more
MOST_LINES = 20  # of details


def checks(observed: Sequence[Observed]) -> list[Check]:
    """All checks of a whole examination: of both sides, of every turn."""
    unpatched = [one for one in observed if one.side is Side.UNPATCHED]
    patched = [one for one in observed if one.side is Side.PATCHED]
    return [
        _alive(observed),
        _in_force(unpatched, patched),
        _one_by_one(unpatched, patched),
        _together(unpatched, patched),
        *_order(patched),
        _aborts(unpatched, patched),
        _lost_peer(patched),
    ]


def may_be_certified(found: Iterable[Check]) -> bool:
    """Whether nothing failed, and nothing that matters was left out."""
    verdicts = {check.name: check.verdict for check in found}
    failed = Verdict.FAILED in verdicts.values()
    return not failed and all(verdicts.get(name) is Verdict.PASSED for name in REQUIRED)


# --- servers -----------------------------------------------------------------------------------------


def _alive(observed: Sequence[Observed]) -> Check:
    ended = [f"{_turn(one)}: {one.ended}" for one in observed if one.ended]
    if ended:
        return _failed(ALIVE, "A server did not answer to the end.", ended)
    if len({one.side for one in observed}) < 2:
        return Check(ALIVE, Verdict.LEFT_OUT, "Only one side was observed.")
    return Check(ALIVE, Verdict.PASSED, f"All {len(observed)} servers answered to the end.")


def _in_force(unpatched: Sequence[Observed], patched: Sequence[Observed]) -> Check:
    wrong = [f"{_turn(one)}: {', '.join(one.in_force)} is patched" for one in unpatched if one.in_force]
    wrong += [
        f"{_turn(one)}: {len(one.in_force)} of {one.schedulers} schedulers say that they are patched"
        for one in patched
        if one.schedulers not in (len(one.in_force), sum(map(len, one.traces.values())))
    ]
    if wrong:
        return _failed(IN_FORCE, "The patches are not in force where they should be, or where not.", wrong)
    if not sum(one.schedulers for one in patched):
        return Check(IN_FORCE, Verdict.LEFT_OUT, "No scheduler of a patched server was seen.")
    return Check(
        IN_FORCE,
        Verdict.PASSED,
        "Every scheduler of the patched server says that the patches are in force, or has written a trace.",
    )


# --- answers -----------------------------------------------------------------------------------------


def _one_by_one(unpatched: Sequence[Observed], patched: Sequence[Observed]) -> Check:
    reference = [run for one in unpatched for run in one.one_by_one]
    found = [run for one in patched for run in one.one_by_one]
    return _answers(ONE_BY_ONE, reference, found, unpatched, _asked(unpatched, lambda one: one.asked))


def _together(unpatched: Sequence[Observed], patched: Sequence[Observed]) -> Check:
    """The reference is what the unpatched server answers alone and in company: it may differ by itself."""
    alone = [run for one in unpatched for run in one.one_by_one]
    reference = [one.concurrent for one in unpatched if one.concurrent is not None]
    found = [one.concurrent for one in patched if one.concurrent is not None]
    names = _asked(unpatched, lambda one: one.asked_together)
    return _answers(TOGETHER, [*alone, *reference] if reference else [], found, unpatched, names)


def _asked(unpatched: Sequence[Observed], names: Callable[[Observed], Sequence[str]]) -> list[str]:
    """Cases that the unpatched server was asked and has not refused."""
    refused = {name for one in unpatched for name in one.refused}
    return [name for name in dict.fromkeys(n for one in unpatched for n in names(one)) if name not in refused]


def _answers(
    name: str,
    reference: Sequence[Run],
    found: Sequence[Run],
    unpatched: Sequence[Observed],
    names: Sequence[str],
) -> Check:
    if not reference or not found:
        return Check(name, Verdict.LEFT_OUT, "One side was not asked.")
    result = compare([run.answers for run in reference], [run.answers for run in found], names)
    refused = {case: error for run in found for case, error in run.refused.items() if case in names}
    notes = [*_notes(unpatched, result), *(f"patched, {case}: {error}" for case, error in refused.items())]
    if result.differences:
        lines = [*result.differences[:MOST_LINES], *_more(result.differences), *notes]
        return Check(name, Verdict.FAILED, f"{_count(result.differences)} differ. {_words(result)}", lines)
    if 2 * result.compared < len(names) or not result.compared:
        return Check(name, Verdict.LEFT_OUT, f"Too little could be compared. {_words(result)}", notes)
    return Check(name, Verdict.PASSED, _words(result), notes)


def _words(result: Comparison) -> str:
    words = f"{result.exact} cases were compared exactly"
    if result.within:
        words += f", {result.within} within the spread of the unpatched server ({result.spread:.1e})"
    if result.left_out:
        words += f", {len(result.left_out)} could not be compared"
    return f"{words}."


def _notes(unpatched: Sequence[Observed], result: Comparison) -> Iterator[str]:
    """What was not compared, and why."""
    reasons: dict[str, str] = {}
    for one in unpatched:
        reasons |= {**one.left_out, **{case: f"refused, {error}" for case, error in one.refused.items()}}
    for case, reason in {**reasons, **result.left_out}.items():
        yield f"not compared, {case}: {reason}"


# --- order -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rank:
    """The traces of one rank of every stage on this node, from where all of them have it."""

    turn: str
    stages: int  # of the whole server
    traces: Traces
    early_send: bool = True
    early_receive: bool = True

    @property
    def senders(self) -> Iterator[tuple[int, Sequence[Event]]]:
        return ((stage, trace) for stage, trace in self.traces.items() if stage < self.stages - 1)

    @property
    def receivers(self) -> Iterator[tuple[int, Sequence[Event]]]:
        return ((stage, trace) for stage, trace in self.traces.items() if stage > 0)


Lines = list[str]
OrderCheck = Callable[[_Rank], Lines | None]
"""What is wrong, a line each; None where there is nothing to look at."""


def _microbatches(rank: _Rank) -> Lines | None:
    launched = {stage: order.launches(trace) for stage, trace in rank.traces.items()}
    if len(launched) < 2:
        return None
    first, *others = launched
    if len(launched[first]) < LEAST_LAUNCHES:
        return [f"only {len(launched[first])} launches were recorded"]
    return [
        f"stage {stage} launched other microbatches than stage {first}"
        for stage in others
        if launched[stage] != launched[first]
    ]


def _proxies_sent(rank: _Rank) -> Lines | None:
    if not rank.early_send:
        return _of_launches(rank.senders, order.proxies_leave_at_the_end_of_the_iteration)
    return _of_launches(rank.senders, order.proxies_leave_right_behind_the_launch)


def _proxies_waited_for(rank: _Rank) -> Lines | None:
    return _of_launches(rank.receivers, order.proxies_are_waited_for_last)


def _tokens_waited_for(rank: _Rank) -> Lines | None:
    return _of_launches(rank.traces.items(), order.tokens_are_waited_for_behind_the_launch)


def _outputs(rank: _Rank) -> Lines | None:
    last = rank.traces.get(rank.stages - 1, ())
    if len(rank.traces) < 2 or not any((event.name, event.kind) == ("push", "output") for event in last):
        return None
    return order.outputs_come_from_the_last_stage(rank.traces)


def _receives(rank: _Rank) -> Lines | None:
    """Of the device lane."""
    posting = [trace for _, trace in rank.receivers if any(event.name == "post_receive" for event in trace)]
    if not posting:
        return None
    if not rank.early_receive:
        return [line for trace in posting for line in order.receives_are_posted_in_their_wait(trace)]
    return [
        line for trace in posting for line in order.receives_are_posted_with_their_header(trace, LEAST_SLOTS)
    ]


def _forwards(rank: _Rank) -> Lines | None:
    """Of a device."""
    timed = [trace for trace in rank.traces.values() if any(event.name == "ran" for event in trace)]
    return (
        [line for trace in timed for line in order.forwards_ran_one_after_another(trace)] if timed else None
    )


def _of_launches(
    traces: Iterable[tuple[int, Sequence[Event]]], check: Callable[[Sequence[Event]], Lines]
) -> Lines | None:
    """Of all traces that have launches."""
    launching = [(stage, trace) for stage, trace in traces if order.launches(trace)]
    if not launching:
        return None
    return [f"stage {stage}: {line}" for stage, trace in launching for line in check(trace)]


ORDER: Mapping[str, tuple[OrderCheck, str]] = {
    MICROBATCHES: (_microbatches, "All stages launched the same microbatches in the same order."),
    PROXIES_SENT: (
        _proxies_sent,
        "Proxies leave where the settings have it; by default right behind the launch.",
    ),
    PROXIES_WAITED_FOR: (_proxies_waited_for, "Proxies are waited for just before the launch."),
    TOKENS_WAITED_FOR: (_tokens_waited_for, "No launch waits for tokens of an earlier one."),
    OUTPUTS: (_outputs, "Every stage gets each output of the last stage once."),
    RECEIVES: (
        _receives,
        "Receives of device tensors are posted where the settings have it; by default at once.",
    ),
    FORWARDS: (_forwards, "Forwards ran on the device in the order of their launches."),
}
"""Check -> how, and what is true if nothing is wrong."""


def _order(patched: Sequence[Observed]) -> list[Check]:
    ranks = [rank for one in patched for rank in _ranks(one)]
    missing = [f"{_turn(one)}: {one.no_traces}" for one in patched if one.no_traces]
    return [_one_order(name, check, words, ranks, missing) for name, (check, words) in ORDER.items()]


def _one_order(
    name: str, check: OrderCheck, words: str, ranks: Sequence[_Rank], missing: Sequence[str]
) -> Check:
    found = [(rank, check(rank)) for rank in ranks]
    wrong = [f"{rank.turn}: {line}" for rank, lines in found for line in lines or ()]
    if wrong:
        return _failed(name, f"The recorded order is wrong {_count(wrong, 'time')}.", wrong)
    if missing or all(lines is None for _, lines in found):
        return Check(name, Verdict.LEFT_OUT, "There is nothing of the kind in the traces.", missing)
    return Check(name, Verdict.PASSED, words)


def _ranks(one: Observed) -> Iterator[_Rank]:
    for name, traces in one.traces.items():
        where, traces = f"{_turn(one)}, {name}", _from_a_common_start(traces)
        yield _Rank(where, one.stages, traces, one.early_send, one.early_receive)


def _from_a_common_start(traces: Traces) -> dict[int, list[Event]]:
    """Behind the begin of an iteration that all have: a full buffer forgets, each rank at its own time.

    Events of earlier iterations are left out, too.
    """
    begun = [[event.iteration for event in trace if event.name == "iteration"] for trace in traces.values()]
    if not begun or not all(begun):
        return {stage: [] for stage in traces}
    first = max(iterations[0] for iterations in begun)
    common = {}
    for stage, trace in traces.items():
        names = [(event.name, event.iteration) for event in trace]
        start = names.index(("iteration", first)) if ("iteration", first) in names else len(names)
        common[stage] = [event for event in trace[start:] if event.iteration < 0 or event.iteration >= first]
    return common


# --- aborts and a lost peer --------------------------------------------------------------------------


def _aborts(unpatched: Sequence[Observed], patched: Sequence[Observed]) -> Check:
    tried = [one for one in patched if one.abort_problems is not None]
    problems = [f"{_turn(one)}: {line}" for one in tried for line in one.abort_problems or ()]
    if problems:
        return _failed(ABORTS, "Aborted requests did not end as they should.", problems)
    if not tried:
        return Check(ABORTS, Verdict.LEFT_OUT, "No request was aborted.")
    reference = [run for one in unpatched for run in one.one_by_one]
    behind = [one.after_aborts for one in tried if one.after_aborts is not None]
    after = _answers(ABORTS, reference, behind, unpatched, _asked(unpatched, lambda one: one.asked))
    if after.verdict is not Verdict.PASSED:
        return Check(ABORTS, after.verdict, f"Behind the aborts: {after.text}", after.details)
    return Check(
        ABORTS, Verdict.PASSED, "Aborted requests ended, and the server then answers as before and is idle."
    )


def _lost_peer(patched: Sequence[Observed]) -> Check:
    tried = [one for one in patched if one.lost_peer_problems is not None]
    problems = [f"{_turn(one)}: {line}" for one in tried for line in one.lost_peer_problems or ()]
    if problems:
        return _failed(LOST_PEER, "A killed scheduler did not end the server as it should.", problems)
    if not tried:
        return Check(LOST_PEER, Verdict.LEFT_OUT, "Not asked for (--faults).")
    return Check(
        LOST_PEER,
        Verdict.PASSED,
        "A killed scheduler of the last stage ended the whole server, and its log says which it was.",
    )


# --- words -------------------------------------------------------------------------------------------


def _failed(name: str, text: str, lines: Sequence[str]) -> Check:
    return Check(name, Verdict.FAILED, text, [*lines[:MOST_LINES], *_more(lines)])


def _more(lines: Sequence[str]) -> list[str]:
    return [f"and {len(lines) - MOST_LINES} more"] if len(lines) > MOST_LINES else []


def _count(lines: Sequence[str], noun: str = "value") -> str:
    return f"{len(lines)} {noun}{'s' if len(lines) > 1 else ''}"


def _turn(one: Observed) -> str:
    return f"{one.side.value} server, turn {one.round}"
