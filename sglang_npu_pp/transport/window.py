"""Bounded in-flight memory: how much of one kind a sender may have outstanding at one peer.

The receiver returns credit when its program has TAKEN a message, not when it arrived, so what is bounded
is the memory of both ends together: at most `messages` messages and about `nbytes` bytes a channel. One
message that is too large for that may be on top of it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Window:
    """Sender's view of one channel. Counts run from the start of the connection and only grow."""

    messages: int
    nbytes: int
    sent_messages: int = 0
    sent_bytes: int = 0
    taken_messages: int = 0
    taken_bytes: int = 0

    def has_room(self, nbytes: int) -> bool:
        """A message that does not fit may go when nothing is in flight, or so little that all of it may
        have been taken without being reported (`CreditMeter`): nobody would ever tell us."""
        in_flight = self.sent_messages - self.taken_messages
        in_flight_bytes = self.sent_bytes - self.taken_bytes
        if in_flight == 0:
            return True
        fits = in_flight_bytes + nbytes <= self.nbytes
        all_may_be_taken = in_flight < self.messages // 4 and in_flight_bytes < self.nbytes // 4
        return in_flight < self.messages and (fits or all_may_be_taken)

    def sent(self, nbytes: int) -> None:
        self.sent_messages += 1
        self.sent_bytes += nbytes

    def credit(self, taken_messages: int, taken_bytes: int) -> None:
        """Credit is cumulative, so a late or repeated one changes nothing."""
        self.taken_messages = max(self.taken_messages, taken_messages)
        self.taken_bytes = max(self.taken_bytes, taken_bytes)


@dataclass(slots=True)
class CreditMeter:
    """Receiver's view of one channel: when to tell the sender what was taken.

    Credit is returned every quarter of the window rather than for every message; what stays unreported is
    always less than a quarter, and `Window.has_room` knows that, so the sender cannot starve.
    """

    messages: int
    nbytes: int
    taken_messages: int = 0
    taken_bytes: int = 0
    reported_messages: int = 0
    reported_bytes: int = 0

    def take(self, nbytes: int) -> bool:
        """Count one message; True when it is time to report."""
        self.taken_messages += 1
        self.taken_bytes += nbytes
        due = (
            self.taken_messages - self.reported_messages >= max(1, self.messages // 4)
            or self.taken_bytes - self.reported_bytes >= self.nbytes // 4
        )
        if due:
            self.reported_messages = self.taken_messages
            self.reported_bytes = self.taken_bytes
        return due
