"""Frames in parts, so that a TCP socket can refuse longer ones.

ZeroMQ allocates a frame's announced length before authentication. So between nodes frames are at most a part,
and sockets close connections that announce more: an unauthenticated client costs one part. A full part is
continued by the message's next frame.
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
    """Close connections announcing more than a part. Before `socket` is bound or connected."""
    socket.setsockopt(zmq.MAXMSGSIZE, PART_BYTES + _ENVELOPE_BYTES)


def cut(frames: list[Buffer]) -> list[Buffer]:
    """The parts of `frames`, as views of their memory."""
    if max(map(len, frames)) < PART_BYTES:
        return frames
    parts: list[Buffer] = []
    for frame in frames:
        view = memoryview(frame)
        # One part more than are full: behind a frame of full parts only, an empty one.
        parts += [view[at : at + PART_BYTES] for at in range(0, len(view) + 1, PART_BYTES)]
    return parts


class _Block:
    """Memory, free again when its last view is gone."""

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
    """Memory for joined frames, reused when unreferenced. Owned by one thread."""

    # New memory costs several times the copying of the bytes: the kernel hands it out page by page.

    def __init__(self) -> None:
        self._blocks: list[_Block] = []  # what was used last comes last

    def take(self, nbytes: int) -> memoryview:
        """Writable memory of `nbytes` bytes, lent while the view or a derivative lives."""
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
        """Keep only the most recently used free blocks."""
        kept_bytes = 0
        for block in reversed(self._blocks.copy()):
            if block.is_free():
                kept_bytes += block.nbytes
                if kept_bytes > KEPT_BYTES:
                    self._blocks.remove(block)


def join(parts: list[Buffer], blocks: Blocks) -> list[Buffer]:
    """The frames of `parts`: writable copies of cut ones, others unchanged.

    Empties `parts` as it copies. In a truncated message the last frame is too short for its header.
    """
    if max(map(len, parts)) < PART_BYTES:
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
