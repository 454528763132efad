"""Long frames in parts: frames come back from their parts, and no part is longer than allowed."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_npu_pp.settings import Settings
from sglang_npu_pp.transport import parts
from sglang_npu_pp.transport.message import Kind
from sglang_npu_pp.transport.parts import PART_BYTES, cut, join

from .harness import Team, receive, results, send

pytestmark = pytest.mark.timeout(180)

SMALL_PART = 4


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", SMALL_PART)


@given(frames=st.lists(st.binary(max_size=3 * SMALL_PART + 1), min_size=1, max_size=6))
def test_frames_come_back_from_their_parts(small_parts: None, frames: list[bytes]) -> None:
    travelling = [bytes(part) for part in cut(list(frames))]
    assert max(map(len, travelling)) <= SMALL_PART
    assert [bytes(frame) for frame in join(travelling)] == frames


def test_frames_that_are_short_are_not_touched() -> None:
    frames: list[parts.Buffer] = [b"", b"x" * (PART_BYTES - 1)]
    assert cut(frames) is frames
    assert all(one is other for one, other in zip(join(frames), frames, strict=True))


def test_what_was_cut_can_be_written_to() -> None:
    """Tensors lie over it."""
    (frame,) = join(cut([bytes(PART_BYTES)]))
    assert isinstance(frame, bytearray)


def test_a_message_that_lost_its_end_is_too_short(small_parts: None) -> None:
    travelling = cut([b"head", b"12345678"])
    assert [bytes(frame) for frame in join(travelling[:-1])] == [b"head", b"12345678"]
    assert [bytes(frame) for frame in join(travelling[:-2])] == [b"head", b"1234"]


@pytest.mark.parametrize("transport", ["ipc", "tcp"])
def test_messages_of_every_length_around_a_part_arrive(team: Team, transport: str) -> None:
    a, b = team.open_lanes(2, Settings(host_transport=transport, wait_limit_s=20, checksum="full"))
    lengths = [PART_BYTES - 1, PART_BYTES, PART_BYTES + 1, 2 * PART_BYTES, 5 * PART_BYTES + 17]
    values = [bytes([number]) * length for number, length in enumerate(lengths)]
    numbers = range(len(values))
    _, found = results([a.start(send, 1, Kind.PROXY, *values), b.start(receive, 0, Kind.PROXY, numbers)])
    assert found == values
