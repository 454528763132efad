"""Which requests stage 0 takes into one iteration, before the other stages hear of them."""

from __future__ import annotations

from collections import deque
from typing import Any

# Control requests of which every stage makes the same because all get them in the same iteration, or which
# only read what stage 0 has. All others may end differently on one stage: files, memory, a device, an
# exception. Names, because not every release has all of them.
_DECIDED_BY_THE_LIST = frozenset(
    (
        "TokenizedGenerateReqInput",
        "TokenizedEmbeddingReqInput",
        "BatchTokenizedGenerateReqInput",
        "BatchTokenizedEmbeddingReqInput",
        "AbortReq",
        "OpenSessionReqInput",
        "CloseSessionReqInput",
        "PauseGenerationReqInput",
        "ContinueGenerationReqInput",
        "FlushCacheReqInput",  # whether a stage is idle follows from the list; its time limit: decisions.py
        "GetInternalStateReq",
        "GetLoadsReqInput",
        "ShutdownReq",
    )
)


def needs_agreement(kind: type) -> bool:
    """Whether the stages have to agree on the outcome of a control request of upstream of this type."""
    return kind.__module__.endswith(".io_struct") and kind.__name__ not in _DECIDED_BY_THE_LIST


class Intake:
    """Ends a list behind a control request that needs agreement, and keeps the rest for the next iteration.

    What comes behind it, a request for the new weights for one, must find the agreement made.
    """

    def __init__(self) -> None:
        self._waiting: deque[Any] = deque()

    @property
    def keeps_some(self) -> bool:
        """Whether the next iteration has requests, even if none arrive."""
        return bool(self._waiting)

    def next_list(self, received: list[Any]) -> list[Any]:
        """The requests of this iteration, in the order in which they came."""
        self._waiting.extend(received)
        requests: list[Any] = []
        while self._waiting:
            requests.append(self._waiting.popleft())
            if needs_agreement(type(requests[-1])):
                break
        return requests
