"""What a rank was told is in force from the iteration on in which it was told."""

from __future__ import annotations

from sglang_npu_pp.decisions import NO_GRAMMARS, Decisions, Grammars, Told


def test_told_time_stands_still_between_decisions() -> None:
    told = Told()
    first = Decisions(5.0)
    assert told.take(["a", first, "b"]) == ["a", "b"]
    assert told.take(["c"]) == ["c"]
    assert told.clock.monotonic() == told.clock.perf_counter() == 5.0
    told.take([Decisions(6.5)])
    assert told.now == 6.5


def test_what_is_named_holds_for_one_iteration() -> None:
    told = Told()
    told.take([Decisions(1.0, frozenset({"late"}), Grammars(ready=frozenset({"compiled"})))])
    assert told.overdue == {"late"}
    assert told.grammars.ready == {"compiled"}
    told.take([])
    assert told.overdue == frozenset()
    assert told.grammars == NO_GRAMMARS


def test_a_rank_passes_on_what_it_was_told() -> None:
    first, second = Told(), Told()
    decisions = Decisions(7.0, frozenset({"late"}))
    requests = first.take([decisions, "request"])
    assert second.take(first.pass_on(requests)) == ["request"]
    assert second.this_iteration == decisions
    first.take(["another"])
    assert first.pass_on(["another"]) == ["another"]
