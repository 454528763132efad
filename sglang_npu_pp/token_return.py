"""Sampled token ids: last stage to every stage.

On an accelerator a thread waits until they are on the host (`host_copies`), and sends them; on CPU the caller
sends at launch.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from .host_copies import HostCopy
from .transport.message import Kind
from .transport.outbox import Outbox
from .transport.stage_link import StageLink

logger = logging.getLogger("sglang_npu_pp")

PORT = "tokens"
FOR_FIRST_STAGE = (
    "for_first_stage."  # begins the names of outputs that only stage 0 gets, which tells clients
)
LOOK_S = 0.1  # how often the sending thread looks at its connections when it has nothing to send
CLOSE_LIMIT_S = 5.0  # for what is queued when the server ends
ABANDON_LIMIT_S = 1.0  # then, for a sender that waits for room


@dataclass(frozen=True)
class _Outgoing:
    copy: HostCopy
    slot: int
    iteration: int


class TokenReturn:
    """Sender of outputs, on the last stage, to all others.

    `outboxes`: owned by the sending thread (device outputs); None sends complete copies on the caller's
    thread (CPU). `adopt_thread` runs first in the thread. Its failure is raised by the next call or wait for
    a message (`HostLane.watch`).
    """

    def __init__(
        self,
        link: StageLink,
        outboxes: Mapping[int, Outbox] | None,
        adopt_thread: Callable[[], None] = lambda: None,
    ) -> None:
        self._link, self._outboxes, self._adopt_thread = link, outboxes, adopt_thread
        self._failure: BaseException | None = None
        self._queue: queue.SimpleQueue[_Outgoing | None] = queue.SimpleQueue()
        self._sent = -1  # iteration
        self._sending = threading.Condition()
        self._thread: threading.Thread | None = None
        if outboxes is not None:
            link.host_lane.watch(self.check, outboxes.values())
            self._thread = threading.Thread(target=self._run, name="token-return", daemon=True)
            self._thread.start()

    def post(self, copy: HostCopy, slot: int, iteration: int) -> None:
        """Send to all other stages, once on the host."""
        self.check()
        outgoing = _Outgoing(copy, slot, iteration)
        if self._thread is None:
            self._send(outgoing)
        else:
            self._queue.put(outgoing)

    def wait(self, copy: HostCopy, iteration: int) -> Mapping[str, Any]:
        """This stage's own outputs, posted for `iteration`, when they are on the host and were sent.

        Raises PeerLostError if a stage is gone, which the device may wait for, and the thread's failure.
        """
        # Both threads wait for the same event. The one that goes on with results would keep the interpreter
        # from the one that sends, for up to its switch interval of 5 ms.
        lane = self._link.host_lane
        with self._sending:
            while self._thread is not None and self._sent < iteration:
                if not self._sending.wait(LOOK_S):
                    lane.poll()
                    lane.check()
        self.check()
        return copy.wait()

    def close(self) -> None:
        """Send the queue and end the thread, within seconds.

        A thread blocked on a device keeps its connections.
        """
        if self._thread is None:
            return
        self._queue.put(None)
        self._thread.join(CLOSE_LIMIT_S)
        for outbox in (self._outboxes or {}).values():
            outbox.abandon()
        self._thread.join(ABANDON_LIMIT_S)
        if self._thread.is_alive():
            logger.warning(
                "%s: outputs are not on the host after %g s, so they were not sent at the end.",
                self._link.context.where,
                CLOSE_LIMIT_S,
            )

    def _run(self) -> None:
        assert self._outboxes is not None
        try:
            self._adopt_thread()
            while self._send_next():
                pass
        except BaseException as error:
            self._failure = error
        for outbox in self._outboxes.values():
            outbox.close()

    def _send_next(self) -> bool:
        """False at the end. Keeps no reference to tensors."""
        outgoing = self._next()
        if outgoing is None:
            return False
        self._send(outgoing)
        with self._sending:
            self._sent = outgoing.iteration
            self._sending.notify()
        return True

    def _next(self) -> _Outgoing | None:
        """Blocks, checking the connections. None at the end."""
        assert self._outboxes is not None
        while True:
            with suppress(queue.Empty):
                return self._queue.get(timeout=LOOK_S)
            for outbox in self._outboxes.values():
                outbox.check()

    def _send(self, outgoing: _Outgoing) -> None:
        values = outgoing.copy.wait()
        for_all = {name: value for name, value in values.items() if not name.startswith(FOR_FIRST_STAGE)}
        for peer in range(self._link.stages):
            if peer != self._link.stage:
                self._link.push_tensors(
                    Kind.OUTPUT,
                    peer,
                    for_all if peer else values,
                    slot=outgoing.slot,
                    iteration=outgoing.iteration,
                    owned=True,
                    outboxes=self._outboxes,
                )

    def check(self) -> None:
        """Raise the failure of the sending thread."""
        if self._failure is not None:
            raise self._failure
