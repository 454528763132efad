"""What ZeroMQ says about the connections of a socket."""

from __future__ import annotations

import zmq


def open_monitor(socket: zmq.Socket, events: int) -> zmq.Socket:
    """A socket on which `events` of `socket` arrive (`zmq.utils.monitor.recv_monitor_message`).

    Without a high-water mark: ZeroMQ's network thread waits for the listener, and with it all connections
    of this process and their heartbeats, while the listener may wait for Python's lock. An event takes some
    hundred bytes until it is read.
    """
    address = f"inproc://monitor-{socket.FD}"
    socket.monitor(address, events)
    monitor = socket.context.socket(zmq.PAIR)
    monitor.setsockopt(zmq.LINGER, 0)
    monitor.setsockopt(zmq.RCVHWM, 0)
    monitor.connect(address)
    return monitor
