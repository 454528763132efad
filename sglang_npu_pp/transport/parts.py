"""Frames in parts, so that a socket of the network can refuse whatever is longer.

ZeroMQ makes room for a frame as soon as its length is announced and fills it as bytes come, before it knows
who sends them. On connections between nodes no frame is therefore longer than a part, and a socket closes a
connection that announces more: an unauthenticated client costs one part at most. A frame of ours that is
longer travels as several frames of the same message: a full part is continued by the next one.
"""

from __future__ import annotations

import weakref
from collections import deque
from typing import Any

import numpy as np
import zmq

from .message import Buffer

PART_BYTES = 1 << 20
KEPT_BYTES = 256 << 20  # of memory that is free
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


class _Block:
    """Some memory, and what it was last lent as: it is free when that is gone."""

    def __init__(self, nbytes: int) -> None:
        self._memory = np.empty(nbytes, np.uint8)
        self._lent: weakref.ref[Any] | None = None

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    def is_free(self) -> bool:
        return self._lent is None or self._lent() is None

    def lend(self, nbytes: int) -> memoryview:
        view = self._memory[:nbytes]
        self._lent = weakref.ref(view)
        return view.data  # which, as all that is made of it, keeps `view` alive


class Blocks:
    """Memory for frames that came in parts, used again as soon as nothing refers to it any more.

    New memory costs several times the copying of the bytes, because the kernel hands it out page by page.
    Owned by one thread.
    """

    def __init__(self) -> None:
        self._blocks: list[_Block] = []  # what was used last comes last

    def take(self, nbytes: int) -> memoryview:
        """Writable memory of `nbytes` bytes, lent for as long as the view or anything made of it lives."""
        fitting = [block for block in self._blocks if nbytes <= block.nbytes <= 2 * nbytes]
        block = next((block for block in reversed(fitting) if block.is_free()), None)
        if block is None:
            self._trim()
            block = _Block(nbytes)
        else:
            self._blocks.remove(block)
        self._blocks.append(block)
        return block.lend(nbytes)

    def _trim(self) -> None:
        """Of the free blocks only those stay that were used last."""
        kept_bytes = 0
        for block in reversed(self._blocks.copy()):
            if block.is_free():
                kept_bytes += block.nbytes
                if kept_bytes > KEPT_BYTES:
                    self._blocks.remove(block)


def join(parts: list[Buffer], blocks: Blocks) -> list[Buffer]:
    """The frames of which these are the parts: writable copies of those that were cut, the others as they
    are.

    Takes `parts` apart, so that their memory goes as it is copied. Of a message that has lost its end the
    last frame is too short, as its header will tell.
    """
    if all(len(part) < PART_BYTES for part in parts):
        return parts
    frames: list[Buffer] = []
    begun: deque[Buffer] = deque()
    parts.reverse()
    while parts:
        begun.append(parts.pop())
        if len(begun[-1]) != PART_BYTES or not parts:
            frames.append(begun.pop() if len(begun) == 1 else _copied(begun, blocks))
            begun.clear()
    return frames


def _copied(parts: deque[Buffer], blocks: Blocks) -> memoryview:
    whole = blocks.take(sum(map(len, parts)))
    at = 0
    while parts:
        part = parts.popleft()
        whole[at : at + len(part)] = part
        at += len(part)
    return whole
