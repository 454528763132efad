"""An early and the newest supported release, each patched against itself; `make matrix` runs them all."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest

from rig import battery, disaggregated
from rig.comparison import Layout, compare, complaints
from rig.launcher import ROOT, Launcher
from rig.releases import EARLY, NEWEST, RELEASES
from rig.server import PATH
from sglang_npu_pp.tools.certify.ports import free_ports

from .installed import if_installed

pytestmark = pytest.mark.release

# The first whose stages share a store of transfers; 0.5.23 asks for pinned memory, which the CPU has none of.
STORE = RELEASES["0.5.22"]


@pytest.mark.parametrize("release", [EARLY, NEWEST])
def test_nothing_is_wrong(make_launcher: Callable[[str], Launcher], release: str) -> None:
    pair = compare(make_launcher("release"), Layout("tp1-pp2", 1, 2), RELEASES[release])
    assert not complaints(pair)


@pytest.mark.skipif(disaggregated.engine_missing() is not None, reason=str(disaggregated.engine_missing()))
@if_installed(STORE)
def test_a_prefill_server_whose_stages_share_a_store(make_launcher: Callable[[str], Launcher]) -> None:
    """It has keys here: answers are those of an unpatched server that does both, and all notes were taken."""
    launcher = make_launcher("store")
    sampling = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    bodies: list[dict[str, Any]] = [
        {"input_ids": battery.prompt(length), "sampling_params": sampling} for length in (1, 17, 257, 600)
    ]
    with launcher.configure(1, 1, patched=False, release=STORE) as server:
        expected = [battery.generate(server, **body)["output_ids"] for body in bodies]
    (bootstrap_port,) = free_ports(1)
    servers = []
    for mode, stages in (("prefill", 2), ("decode", 1)):
        environment = disaggregated.engine_environment("sglang_pp_probe")
        server = launcher.configure(
            1,
            stages,
            patched=stages > 1,
            args=disaggregated.arguments(mode, bootstrap_port),
            env=environment,
            release=STORE,
        )
        server.env[PATH] = os.pathsep.join([environment[PATH], str(STORE.folder), str(ROOT)])
        servers.append(server)
    try:
        pair = disaggregated.start_pair(launcher.servers.enter_context, servers, bootstrap_port)
        answers = pair.generate_all(bodies, concurrency=4)
        assert [answer["output_ids"] for answer in answers] == expected
        assert "PPConsensusStore connected" in pair.prefill.log_text()
        assert "PPConsensusStore dropped" not in pair.prefill.log_text()
    finally:
        launcher.stop_all()
