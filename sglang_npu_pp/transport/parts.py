"""Frames in parts, so that a socket of the network can refuse whatever is longer.

ZeroMQ makes room for a frame as soon as its length is announced and fills it as bytes come, before it knows
who sends them. On connections between nodes no frame is therefore longer than a part, and a socket closes a
connection that announces more: a stranger costs one part at most. A frame of ours that is longer travels as
several frames of the same message: a full part is continued by the next one.
"""

from __future__ import annotations

from collections.abc import Sequence

import zmq

from .message import Buffer

PART_BYTES = 1 << 20
_ENVELOPE_BYTES = 64  # CURVE puts 33 around every frame


def refuse_longer_frames(socket: zmq.Socket) -> None:
    """Close connections of `socket` that announce more than a part. Before it is bound or connected."""
    socket.setsockopt(zmq.MAXMSGSIZE, PART_BYTES + _ENVELOPE_BYTES)


def cut(frames: list[Buffer]) -> list[Buffer]:
    """The parts of `frames`. Those of a frame that is cut refer to its memory."""
    if all(len(frame) < PART_BYTES for frame in frames):
        return frames
    parts: list[Buffer] = []
    for frame in frames:
        view = memoryview(frame)
        # One part more than are full: behind a frame of full parts only, an empty one.
        parts += [view[at : at + PART_BYTES] for at in range(0, len(view) + 1, PART_BYTES)]
    return parts


def join(parts: Sequence[Buffer]) -> list[Buffer]:
    """The frames of which these are the parts: writable copies of those that were cut, the others as they
    are.

    Of a message that has lost its end the last frame is too short, as its header will tell.
    """
    frames: list[Buffer] = []
    begun: list[Buffer] = []
    for part in parts:
        begun.append(part)
        if len(part) != PART_BYTES:
            frames.append(part if len(begun) == 1 else bytearray().join(begun))
            begun = []
    return [*frames, bytearray().join(begun)] if begun else frames
