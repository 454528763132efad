"""All ranks decide the same, or none serves.

Statements go through the key-value store of the process group, not a collective, which a rank without the
plugin would never join.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import suppress
from datetime import timedelta
from typing import Protocol

import msgspec

from .errors import AgreementError, DifferenceError

_KEY = "sglang_npu_pp/statement/{}"
_VERDICT = "sglang_npu_pp/verdict"
_READ = "sglang_npu_pp/heard/{}"
_ARBITER = 0  # reads all statements; with every rank reading every other's, 256 take seconds
_READ_LIMIT_S = 5.0  # the process of rank 0 has the store: when it ends, the verdict cannot be read any more


class KeyValueStore(Protocol):
    """The part of torch.distributed.Store in use."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...

    def wait(self, keys: list[str], timeout: timedelta) -> None: ...


Statement = dict[str, str]
"""What a rank says of itself, as name -> value; all ranks must say the same."""


class Verdict(msgspec.Struct):
    """Result of the arbiter (rank 0): ranks without a statement in time, and differences."""

    silent: list[int] = []
    differences: list[str] = []


def agree(store: KeyValueStore, *, rank: int, world_size: int, statement: Statement, limit_s: float) -> None:
    """Return when every rank of the world has made an equal statement.

    Raises AgreementError when one is missing after `limit_s` seconds, DifferenceError when one differs.
    """
    store.set(_KEY.format(rank), msgspec.json.encode(statement).decode())
    if rank == _ARBITER:
        verdict = _judge(store, world_size, limit_s)
        store.set(_VERDICT, msgspec.json.encode(verdict).decode())
        if verdict.silent or verdict.differences:
            _wait_for_readers(store, world_size, verdict)
    else:
        verdict = _await_verdict(store, world_size, limit_s)
        store.set(_READ.format(rank), "")
    if verdict.silent:
        raise AgreementError(
            f"rank {rank}: after {limit_s:g} s there is no word from rank "
            f"{', '.join(map(str, verdict.silent))}; "
            "install sglang-npu-pp for every rank and give all of them the same SGLANG_NPU_PP."
        )
    if verdict.differences:
        raise DifferenceError(
            f"rank {rank}: the ranks do not run the same pipeline ({'; '.join(verdict.differences)}); "
            "make versions and settings equal on all nodes."
        )


def _judge(store: KeyValueStore, world_size: int, limit_s: float) -> Verdict:
    keys = [_KEY.format(other) for other in range(world_size)]
    try:
        store.wait(keys, timedelta(seconds=limit_s))
    except RuntimeError:
        return Verdict(silent=[other for other, key in enumerate(keys) if not store.check([key])])
    decoder = msgspec.json.Decoder(Statement)
    return Verdict(differences=differences([decoder.decode(store.get(key)) for key in keys]))


def _wait_for_readers(store: KeyValueStore, world_size: int, verdict: Verdict) -> None:
    others = [other for other in range(world_size) if other not in (_ARBITER, *verdict.silent)]
    with suppress(RuntimeError):
        store.wait([_READ.format(other) for other in others], timedelta(seconds=_READ_LIMIT_S))


def _await_verdict(store: KeyValueStore, world_size: int, limit_s: float) -> Verdict:
    """Twice the limit: the arbiter may have started later."""
    try:
        store.wait([_VERDICT], timedelta(seconds=2 * limit_s))
    except RuntimeError:
        silent = [other for other in range(world_size) if not store.check([_KEY.format(other)])]
        return Verdict(silent=silent or [_ARBITER])
    return msgspec.json.decode(store.get(_VERDICT), type=Verdict)


def differences(statements: list[Statement]) -> list[str]:
    """Differences between `statements` (by rank), in words."""
    found = []
    for name in sorted(set().union(*statements)):
        by_value: defaultdict[str, list[int]] = defaultdict(list)
        for rank, statement in enumerate(statements):
            by_value[statement.get(name, "nothing")].append(rank)
        if len(by_value) > 1:
            sides = [f"{value!r} on rank {', '.join(map(str, ranks))}" for value, ranks in by_value.items()]
            found.append(f"{name} is {' but '.join(sides)}")
    return found
