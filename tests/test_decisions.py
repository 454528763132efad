"""Shared decisions are in force from their iteration on."""

from __future__ import annotations

from sglang_npu_pp.decisions import NO_GRAMMARS, Decisions, Grammars, SharedDecisions


def test_shared_time_stands_still_between_decisions() -> None:
    shared = SharedDecisions()
    first = Decisions(5.0)
    assert shared.take(["a", first, "b"]) == ["a", "b"]
    assert shared.take(["c"]) == ["c"]
    assert shared.clock.monotonic() == shared.clock.perf_counter() == 5.0
    shared.take([Decisions(6.5)])
    assert shared.now == 6.5


def test_what_is_named_holds_for_one_iteration() -> None:
    shared = SharedDecisions()
    shared.take([Decisions(1.0, frozenset({"late"}), Grammars(ready=frozenset({"compiled"})))])
    assert shared.overdue == {"late"}
    assert shared.grammars.ready == {"compiled"}
    shared.take([])
    assert shared.overdue == frozenset()
    assert shared.grammars == NO_GRAMMARS


def test_a_rank_passes_on_what_it_received() -> None:
    first, second = SharedDecisions(), SharedDecisions()
    decisions = Decisions(7.0, frozenset({"late"}))
    requests = first.take([decisions, "request"])
    assert second.take(first.pass_on(requests)) == ["request"]
    assert second.this_iteration == decisions
    first.take(["another"])
    assert first.pass_on(["another"]) == ["another"]
