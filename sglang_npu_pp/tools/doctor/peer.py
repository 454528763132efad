"""The link to another node: `doctor --listen` there, `doctor --peer` here.

Stages 0 and 1 of a pipeline without a model compare versions and settings, open a host lane as a server would
(TCP, CURVE, address and port of the settings), and measure it.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import msgspec

import sglang_npu_pp

from ...agreement import Statement, differences
from ...errors import ContractError, PipelineError
from ...patches import installed
from ...settings import Settings, load_settings
from ...transport.context import RankContext
from ...transport.host_lane import HostLane
from ...transport.message import PROTOCOL
from .findings import Finding, Level
from .link_test import FORWARDS_MS, LinkReport, measure
from .rendezvous import ANSWER_LIMIT_S, Rendezvous
from .versions import version_of

_PROTOCOL = "protocol"
_DIALLED = "dialled"  # of a statement: the address at which the other side was found


@dataclass(frozen=True)
class PeerTest:
    """The user's options."""

    host: str  # where this side listens ("" for everywhere), or where the other one does
    port: int
    key: str = field(repr=False)
    listens: bool
    limit_s: float  # the listener waits so long for the other node
    stages: int
    forward_ms: float | None  # of one stage; None: suggest a depth for several

    @property
    def stage(self) -> int:
        return 0 if self.listens else 1


def check(test: PeerTest, settings: Settings) -> tuple[list[Finding], dict[str, Any]]:
    """Findings and measurements, equal on both sides."""
    findings: list[Finding] = []
    limit_s = test.limit_s if test.listens else ANSWER_LIMIT_S
    host = test.host or "*"
    try:
        with Rendezvous(host, test.port, test.key, listens=test.listens, limit_s=limit_s) as rendezvous:
            statements = _exchange_statements(rendezvous, settings)
            dialled = statements[1].pop(_DIALLED)
            findings += [
                Finding(Level.WRONG, "versions and settings", f"{each}; make them equal on all nodes.")
                for each in differences(statements)
            ]
            if statements[0].get(_PROTOCOL) != statements[1].get(_PROTOCOL):
                return findings, {}
            report, endpoint = _measure(rendezvous, test, _agreed(settings, statements[0]), dialled)
    except PipelineError as error:
        return [*findings, Finding(Level.WRONG, "link", str(error))], {}
    forwards = (test.forward_ms,) if test.forward_ms else FORWARDS_MS
    depths = {forward: report.depth(forward, test.stages) for forward in forwards}
    findings += [
        Finding(Level.OK, "link", f"{report}; the other node answers at {endpoint}"),
        Finding(Level.OK, "--pp-async-batch-depth", _suggestion(depths, test.stages)),
    ]
    suggested = {f"{forward:g}": depth for forward, depth in depths.items()}
    return findings, {**asdict(report), "one_way_s": report.one_way_s, "depth_by_forward_ms": suggested}


def _suggestion(depths: dict[float, int], stages: int) -> str:
    each = ", ".join(f"{depth} for forwards of {forward:g} ms" for forward, depth in depths.items())
    return (
        f"with {stages} stages, each hop as long as this: {each}. Host work is not counted, nor the time "
        "that bytes of proxies need; device tensors go over HCCL, which was not measured. Stage 0 of a busy "
        "server says it better"
    )


def _agreed(settings: Settings, listener: Statement) -> Settings:
    """Our settings, with the listener's shared ones: the link is measured even if they differ."""
    theirs = load_settings(
        {name: listener.get(name, value) for name, value in settings.shared_values().items()}
    )
    shared = {each.name: getattr(theirs, each.name) for each in fields(Settings) if each.metadata["shared"]}
    limits = {"start_limit_s": ANSWER_LIMIT_S, "wait_limit_s": ANSWER_LIMIT_S}
    return replace(settings, **{**shared, **limits, "host_transport": "tcp"})


def _measure(
    rendezvous: Rendezvous, test: PeerTest, settings: Settings, dialled: str
) -> tuple[LinkReport, str]:
    """Open a host lane as a server would, and measure it; returns the other side's address too. Raises
    PipelineError."""
    lane = HostLane(
        RankContext.begin(test.stage, 2, settings),
        host=settings.host or (test.host if test.listens else ""),
        master=f"{dialled}:{test.port}",
        port=settings.port + test.stage if settings.port else 0,
    )
    try:
        lane.open(rendezvous.exchange)
        return measure(lane, ANSWER_LIMIT_S), lane.endpoint_of(1 - test.stage)
    finally:
        lane.close()


def _exchange_statements(rendezvous: Rendezvous, settings: Settings) -> list[Statement]:
    try:
        release = installed.release()
    except ContractError:
        release = "not installed"
    mine = {
        "SGLang": release,
        "sglang-npu-pp": sglang_npu_pp.__version__,
        _PROTOCOL: str(PROTOCOL),
        "torch": str(version_of("torch")),
        "torch_npu": str(version_of("torch_npu")),
        **settings.shared_values(),
    }
    if rendezvous.dialled:
        mine[_DIALLED] = rendezvous.dialled
    decoder = msgspec.json.Decoder(Statement)
    return [decoder.decode(each) for each in rendezvous.exchange(msgspec.json.encode(mine))]
