"""Selection of one iteration's requests on stage 0."""

from __future__ import annotations

from collections import deque
from typing import Any

# Control requests of which every stage makes the same because all get them in the same iteration, or which
# only read the state of stage 0. All others may end differently on one stage: files, memory, a device, an
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
    """Whether stages must agree on the outcome of this type of control request."""
    return kind.__module__.endswith(".io_struct") and kind.__name__ not in _DECIDED_BY_THE_LIST


class Intake:
    """Cuts a list after a control request that needs agreement, and keeps the rest for the next iteration,
    since later requests (for new weights, say) depend on it."""

    def __init__(self) -> None:
        self._waiting: deque[Any] = deque()

    @property
    def keeps_some(self) -> bool:
        """Whether the next iteration has requests without arrivals."""
        return bool(self._waiting)

    def next_list(self, received: list[Any]) -> list[Any]:
        """This iteration's requests, in order of arrival."""
        self._waiting.extend(received)
        requests: list[Any] = []
        while self._waiting:
            requests.append(self._waiting.popleft())
            if needs_agreement(type(requests[-1])):
                break
        return requests
