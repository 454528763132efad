"""The self-test over the real host lane; and that it notices a lane that does not work."""

from __future__ import annotations

from pathlib import Path

import pytest

from sglang_npu_pp.errors import MessageError
from sglang_npu_pp.settings import Settings
from sglang_npu_pp.tools.doctor import link_test, loopback
from sglang_npu_pp.tools.doctor.findings import Level
from sglang_npu_pp.transport.endpoints import Exchange
from sglang_npu_pp.transport.host_lane import HostLane
from sglang_npu_pp.transport.message import Kind, Message

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link_test, "AIM_S", 0.02)
    monkeypatch.setattr(link_test, "ROUND_TRIPS", 5)


def test_both_transports_are_measured(ipc_dir: Path) -> None:
    findings, data = loopback.check(Settings(ipc_dir=ipc_dir))
    assert [(finding.subject, finding.level) for finding in findings] == [
        ("ipc", Level.OK),
        ("TCP + CURVE", Level.OK),
    ]
    for report in data.values():
        assert report["shortest_round_trip_s"] > 0
        assert report["median_round_trip_s"] > 0
        assert report["sent_mib_per_s"] > 0
        assert report["received_mib_per_s"] > 0
    assert not list(ipc_dir.iterdir()), "it leaves something behind"


def test_only_what_the_setting_allows_is_tried(ipc_dir: Path) -> None:
    findings, _ = loopback.check(Settings(ipc_dir=ipc_dir, host_transport="tcp"))
    assert [finding.subject for finding in findings] == ["TCP + CURVE"]


def test_a_lane_that_cannot_be_opened_is_named_as_the_server_names_it(tmp_path: Path) -> None:
    findings, _ = loopback.check(Settings(ipc_dir=tmp_path / "missing", host_transport="ipc"))
    (finding,) = findings
    assert finding.level is Level.WRONG
    assert f"cannot make a directory for ipc sockets in {tmp_path / 'missing'}" in finding.text


def test_bytes_that_change_on_their_way_are_noticed(ipc_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The lane's own checksum does not cover frames of this size unless it is asked to."""
    send = HostLane.send

    def corrupting(lane: HostLane, peer: int, message: Message) -> None:
        if message.kind is Kind.PROXY and lane.stage == 1:
            chunk = message.tensors["chunk"].clone()
            chunk[-1] ^= 1
            message = Message(Kind.PROXY, tensors={"chunk": chunk})
        send(lane, peer, message)

    monkeypatch.setattr(HostLane, "send", corrupting)
    with pytest.raises(MessageError, match=r"^stage 0 rank 0: bytes of stage 1 did not arrive as they left"):
        loopback.run(Settings(ipc_dir=ipc_dir, host_transport="ipc"))


def test_a_side_that_does_not_come_is_waited_for_with_a_limit(
    ipc_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loopback, "LIMIT_S", 0.2)
    opened = HostLane.open

    def one_opens(lane: HostLane, exchange: Exchange) -> None:
        if lane.stage == 0:
            opened(lane, exchange)

    monkeypatch.setattr(HostLane, "open", one_opens)
    monkeypatch.setattr(loopback, "measure", lambda lane, limit_s: None)
    (finding,), _ = loopback.check(Settings(ipc_dir=ipc_dir, host_transport="ipc"))
    assert (finding.level, finding.text) == (Level.WRONG, "the two ends did not meet")


@pytest.mark.parametrize(
    ("round_trip_ms", "forward_ms", "stages", "depth"),
    [(0.1, 20, 2, 0), (10, 20, 2, 1), (20, 20, 2, 1), (40, 20, 2, 2), (20, 20, 4, 2), (20, 5, 2, 4)],
)
def test_the_depth_follows_the_rule(round_trip_ms: float, forward_ms: float, stages: int, depth: int) -> None:
    """A depth of d covers a one-way latency of d * T / pp_size (depth.py)."""
    report = link_test.LinkReport(round_trip_ms / 1e3, 1.0, 1.0, 1.0)
    assert report.depth(forward_ms, stages) == depth
