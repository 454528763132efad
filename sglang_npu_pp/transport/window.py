"""Back-pressure: a bound on one kind's messages in flight to one peer.

Credit returns when the receiver's program has TAKEN a message, not on arrival: memory at both ends is
bounded. The bound in messages always holds, the bound in bytes but for `always` messages of any size, and for
less than a quarter, taken and unreported. No bound forms a circle (comment at `Bounds`);
`tests/transport/test_circles.py` searches for a counterexample.
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass, field


# Why no bound forms a circle. A stage in iteration i waits for the outputs of iteration i - slots + 1, and
# the last stage has those only when every stage has taken the requests and proxies of that iteration. So when
# a stage pushes, at most `slots` messages of a kind, this one included, are not taken: with `always` = slots
# no push of an iteration that has a batch ever waits, for any sizes, depth or number of stages. Iterations
# without a batch push requests only, and a stage that has not taken those does not wait for the sender's next
# ones: it waits for proxies, which were pushed before, or for outputs, whose sender does not wait either. Of
# outcomes of a control request there are two at most, which every stage takes before it handles the next one.
@dataclass(frozen=True)
class Bounds:
    """Of every channel of a lane; equal at both ends.

    `messages` and `nbytes` as set; `always`: messages in flight whatever their size, at least 1.
    """

    messages: int
    nbytes: int
    always: int = 1

    @classmethod
    def for_loops(cls, messages: int, nbytes: int, slots: int) -> Bounds:
        """For loops with `slots` microbatch slots; raises `messages` if too few for them.

        Credit for up to a quarter of the messages may be outstanding (`CreditMeter`).
        """
        enough = slots
        while enough - unreported_messages(enough) < slots:
            enough += 1
        return cls(max(messages, enough), nbytes, always=slots)


def unreported_messages(messages: int) -> int:
    """Most messages taken but unreported, in a window of `messages`."""
    return max(1, messages // 4) - 1


@dataclass(slots=True)
class Window:
    """Sender's view of one channel. Counts are cumulative over the connection."""

    bounds: Bounds
    sent_messages: int = 0
    sent_bytes: int = 0
    taken_messages: int = 0
    taken_bytes: int = 0
    _sizes: deque[int] = field(default_factory=deque)  # of what is in flight

    def has_room(self, nbytes: int) -> bool:
        """Whether a message of `nbytes` bytes may go."""
        # What is in flight may have been taken without being reported, oldest first, and no credit for it
        # would ever come.
        bounds = self.bounds
        in_flight = self.sent_messages - self.taken_messages
        if in_flight < bounds.always:
            return True
        if in_flight >= bounds.messages:
            return False
        if self.sent_bytes - self.taken_bytes + nbytes <= bounds.nbytes:
            return True
        must_be_taken = in_flight - bounds.always + 1
        if must_be_taken > unreported_messages(bounds.messages):
            return False
        return sum(itertools.islice(self._sizes, must_be_taken)) < bounds.nbytes // 4

    def sent(self, nbytes: int) -> None:
        self.sent_messages += 1
        self.sent_bytes += nbytes
        self._sizes.append(nbytes)

    def credit(self, taken_messages: int, taken_bytes: int) -> None:
        """Cumulative: late or repeated credit changes nothing."""
        for _ in range(taken_messages - self.taken_messages):
            self._sizes.popleft()
        self.taken_messages = max(self.taken_messages, taken_messages)
        self.taken_bytes = max(self.taken_bytes, taken_bytes)


@dataclass(slots=True)
class CreditMeter:
    """Receiver's view of one channel: reports taken messages every quarter of the window."""

    # What stays unreported is less than a quarter, and `Window.has_room` knows that, so the sender cannot
    # starve.

    bounds: Bounds
    taken_messages: int = 0
    taken_bytes: int = 0
    reported_messages: int = 0
    reported_bytes: int = 0
    # The next report is due above the one, or from the other on.
    _due_messages: int = field(init=False)
    _due_bytes: int = field(init=False)

    def __post_init__(self) -> None:
        self._report()

    def take(self, nbytes: int) -> bool:
        """Count one message; True when a report is due."""
        self.taken_messages += 1
        self.taken_bytes += nbytes
        if self.taken_messages <= self._due_messages and self.taken_bytes < self._due_bytes:
            return False
        self._report()
        return True

    def _report(self) -> None:
        self.reported_messages, self.reported_bytes = self.taken_messages, self.taken_bytes
        self._due_messages = self.taken_messages + unreported_messages(self.bounds.messages)
        self._due_bytes = self.taken_bytes + self.bounds.nbytes // 4
