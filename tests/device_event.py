"""A double of a device's event, for tests without a device."""

from __future__ import annotations

import threading

LIMIT_S = 20


class DeviceEvent:
    """Double of a device's event: passes when the test says so."""

    def __init__(self) -> None:
        self.passed = threading.Event()
        self.awaited = threading.Event()

    def synchronize(self) -> None:
        self.awaited.set()
        assert self.passed.wait(LIMIT_S), "the test never let the event pass"

    def query(self) -> bool:
        return self.passed.is_set()
