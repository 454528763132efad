"""Ranks that do not agree end with a sentence that names them; over a real TCPStore, a thread a rank."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from sglang_npu_pp import agreement
from sglang_npu_pp.agreement import Statement, agree
from sglang_npu_pp.errors import AgreementError

SAME = {"sglang": "0.5.21", "path": "asynchronous"}


class CountingStore:
    """A real store, and how often each of its verbs was used by all ranks together."""

    def __init__(self, store: Any, used: Counter[str]) -> None:
        self._store, self._used = store, used

    def __getattr__(self, verb: str) -> Any:
        self._used[verb] += 1
        return getattr(self._store, verb)


def run(
    statements: list[Statement | None], limit_s: float = 20, used: Counter[str] | None = None
) -> list[BaseException | None]:
    """What every rank that makes a statement (not None) got."""
    counter = Counter[str]() if used is None else used
    master = dist.TCPStore("127.0.0.1", 0, is_master=True, timeout=timedelta(seconds=30))

    def rank(index: int) -> BaseException | None:
        statement = statements[index]
        if statement is None:
            return None
        client = dist.TCPStore("127.0.0.1", master.port, is_master=False, timeout=timedelta(seconds=30))
        store = CountingStore(client, counter)
        size = len(statements)
        try:
            agree(store, rank=index, world_size=size, statement=statement, limit_s=limit_s)
        except BaseException as error:
            return error
        return None

    with ThreadPoolExecutor(len(statements)) as pool:
        return list(pool.map(rank, range(len(statements))))


def test_equal_statements_agree() -> None:
    assert run([SAME, dict(SAME), dict(SAME)]) == [None, None, None]


@pytest.mark.slow
def test_the_store_is_asked_a_few_times_a_rank() -> None:
    """Every rank once read every statement: 65,536 questions to one store among 256 ranks."""
    ranks, used = 48, Counter[str]()
    assert run([SAME] * ranks, used=used) == [None] * ranks
    assert used.total() <= 5 * ranks


def test_the_first_rank_of_a_bad_verdict_ends_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process has the store, from which the others read what was wrong."""
    ended: list[int] = []
    wait_for_readers = agreement._wait_for_readers

    def noted(*arguments: Any) -> None:
        wait_for_readers(*arguments)
        assert sum(arguments[0].check([agreement._READ.format(rank)]) for rank in (1, 2)) == 2
        ended.append(0)

    monkeypatch.setattr(agreement, "_wait_for_readers", noted)
    errors = run([SAME, {**SAME, "path": "upstream"}, SAME])
    assert all(isinstance(error, AgreementError) for error in errors)
    assert ended == [0]


def test_a_different_value_is_named_on_every_rank() -> None:
    errors = run([SAME, {**SAME, "path": "upstream"}, SAME])
    for error in errors:
        assert isinstance(error, AgreementError)
        assert "path is 'asynchronous' on rank 0, 2 but 'upstream' on rank 1" in str(error)


def test_a_name_that_only_one_rank_has_is_a_difference() -> None:
    (error, _) = run([{**SAME, "new": "1"}, SAME])
    assert "new is '1' on rank 0 but 'nothing' on rank 1" in str(error)


def test_a_silent_rank_is_named_by_all_others() -> None:
    first, _, last = run([SAME, None, SAME], limit_s=1)
    for rank, error in ((0, first), (2, last)):
        with pytest.raises(AgreementError, match=rf"^rank {rank}: after 1 s there is no word from rank 1;"):
            raise error or AssertionError("no error")
