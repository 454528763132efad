"""Long frames in parts: frames come back from their parts, and no part is longer than allowed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rig.harness import Team, receive, results, send
from sglang_npu_pp.settings import Settings
from sglang_npu_pp.transport import parts
from sglang_npu_pp.transport.message import Kind
from sglang_npu_pp.transport.parts import PART_BYTES, Blocks, cut, join

pytestmark = pytest.mark.timeout(180)

SMALL_PART = 4


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", SMALL_PART)


@given(frames=st.lists(st.binary(max_size=3 * SMALL_PART + 1), min_size=1, max_size=6))
def test_frames_come_back_from_their_parts(small_parts: None, frames: list[bytes]) -> None:
    travelling: list[parts.Buffer] = [bytes(part) for part in cut(list(frames))]
    assert max(map(len, travelling)) <= SMALL_PART
    assert [bytes(frame) for frame in join(travelling, Blocks())] == frames


def test_frames_that_are_short_are_not_touched() -> None:
    frames: list[parts.Buffer] = [b"", b"x" * (PART_BYTES - 1)]
    assert cut(frames) is frames
    assert all(one is other for one, other in zip(join(frames, Blocks()), frames, strict=True))


def test_what_was_cut_can_be_written_to() -> None:
    """Tensors lie over it."""
    (frame,) = join(cut([bytes(PART_BYTES)]), Blocks())
    assert not memoryview(frame).readonly


def test_a_message_that_lost_its_end_is_too_short(small_parts: None) -> None:
    travelling = cut([b"head", b"12345678"])
    assert [bytes(frame) for frame in join(travelling[:-1], Blocks())] == [b"head", b"12345678"]
    assert [bytes(frame) for frame in join(travelling[:-2], Blocks())] == [b"head", b"1234"]


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_messages_of_every_length_around_a_part_arrive(team: Team, transport: str) -> None:
    a, b = team.open_lanes(2, Settings(host_transport=transport, wait_limit_s=20, checksum="full"))
    lengths = [PART_BYTES - 1, PART_BYTES, PART_BYTES + 1, 2 * PART_BYTES, 5 * PART_BYTES + 17]
    values = [bytes([number]) * length for number, length in enumerate(lengths)]
    numbers = range(len(values))
    _, found = results([a.start(send, 1, Kind.PROXY, *values), b.start(receive, 0, Kind.PROXY, numbers)])
    assert found == values


# --- memory that is used again ---------------------------------------------------------------------


def address(frame: parts.Buffer) -> int:
    return np.frombuffer(frame, np.uint8).ctypes.data


def joined(content: bytes, blocks: Blocks) -> parts.Buffer:
    (frame,) = join(cut([content]), blocks)
    return frame


def test_memory_is_used_again_when_nothing_refers_to_it() -> None:
    blocks = Blocks()
    first = joined(bytes(3 * PART_BYTES), blocks)
    used = address(first)
    tensor = torch.frombuffer(first[PART_BYTES:], dtype=torch.uint8)[7:]
    del first
    second = joined(b"\1" * (3 * PART_BYTES), blocks)
    assert address(second) != used  # a tensor lies over a part of it
    assert not tensor.any()
    del tensor
    assert address(joined(bytes(2 * PART_BYTES), blocks)) == used


@given(steps=st.lists(st.tuples(st.integers(1, 40), st.integers(0, 4)), max_size=30))
def test_no_frame_is_written_to_by_a_later_one(small_parts: None, steps: list[tuple[int, int]]) -> None:
    """`steps`: the length of a frame that comes, and which of those kept is then forgotten."""
    blocks, kept = Blocks(), list[tuple[parts.Buffer, bytes]]()
    for number, (length, forgotten) in enumerate(steps):
        content = bytes([number]) * length
        kept.append((joined(content, blocks), content))
        del kept[forgotten : forgotten + 1]
        assert all(bytes(frame) == content for frame, content in kept)


def test_memory_that_is_free_is_bounded(small_parts: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "KEPT_BYTES", 100)
    blocks = Blocks()
    frames = [joined(bytes(30), blocks) for _ in range(20)]
    del frames
    kept = joined(bytes(5), blocks)
    assert [block.nbytes for block in blocks._blocks] == [30, 30, 30, 5]
    del kept


def test_parts_go_as_they_are_copied() -> None:
    travelling = cut([bytes(4 * PART_BYTES)])
    (frame,) = join(travelling, Blocks())
    assert travelling == []
    assert len(frame) == 4 * PART_BYTES
