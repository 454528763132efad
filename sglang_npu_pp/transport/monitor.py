"""ZeroMQ connection events."""

from __future__ import annotations

import zmq


def open_monitor(socket: zmq.Socket, events: int) -> zmq.Socket:
    """A socket that receives `events` of `socket` (`zmq.utils.monitor.recv_monitor_message`)."""
    # No high-water mark: ZeroMQ's network thread would wait for the listener, and with it all connections of
    # this process and their heartbeats, while the listener may wait for the GIL. An unread event takes some
    # hundred bytes.
    address = f"inproc://monitor-{socket.FD}"
    socket.monitor(address, events)
    monitor = socket.context.socket(zmq.PAIR)
    monitor.setsockopt(zmq.LINGER, 0)
    monitor.setsockopt(zmq.RCVHWM, 0)
    monitor.connect(address)
    return monitor
