"""A hierarchical cache whose host memory is a staging buffer only (`buffer_only`), on two stages, unpatched
against patched: what the KV pool has no room for is in Mooncake's store.

On the simulated Ascend, with the layout that SGLang takes there. Up to 0.5.22, with other storage, the stages
of such a server decide each for itself what they have read (`HybridCacheController.attach_storage_backend`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pytest
import requests

from rig import disaggregated
from rig.agreement import assert_stages_agree
from rig.devices import EAGER
from rig.faults import Faults
from rig.launcher import ROOT, Launcher
from rig.mooncake_store import mooncake_store
from rig.probes import probe_variables
from rig.probes.sglang_pp_feature_faults import DECISION_BEFORE
from rig.server import Server

from .test_hierarchical_cache import ASCEND, BURST, CONCURRENCY, PREFIXES, ask, forget, ids

pytestmark = [
    pytest.mark.release,
    pytest.mark.skipif(
        disaggregated.engine_missing() is not None, reason=str(disaggregated.engine_missing())
    ),
]

STAGES = 2
WAIT_LIMIT_S, END_LIMIT_S = 30, 90.0  # of a stage for a message, of a server that ends
# SGLang's own check, and ours where a stage runs its next microbatch before that.
UNEQUAL = (
    "PP prefetch became ready before local state existed",
    "the stages decided differently which requests to run",
)
ARGUMENTS = (
    *EAGER,
    *("--enable-hierarchical-cache", "--hicache-host-memory-mode", "buffer_only", "--hicache-ratio", "2"),
    *("--hicache-storage-backend", "mooncake", "--hicache-storage-prefetch-policy", "wait_complete"),
    *("--max-total-tokens", "1024", "--chunked-prefill-size", "128"),
)


@dataclass(frozen=True)
class Served:
    upstream: Mapping[str, Any]  # what an unpatched server answered, which has ended
    found: Mapping[str, Any]  # what the patched one did
    server: Server
    faults: Faults


@pytest.fixture(scope="module")
def served(make_launcher: Callable[[str], Launcher]) -> Iterator[Served]:
    launcher = make_launcher("staging")
    faults = Faults(launcher.directory / "fault")
    try:
        with mooncake_store(launcher.directory / "upstreams-master.log") as store:
            upstream = exercise(start(launcher, store, faults, patched=False))
            launcher.stop_all()
        with mooncake_store(launcher.directory / "master.log") as store:
            server = start(launcher, store, faults, patched=True)
            yield Served(upstream, exercise(server), server, faults)
            launcher.stop_all()
    finally:
        launcher.stop_all()


def start(launcher: Launcher, store: Mapping[str, str], faults: Faults, *, patched: bool) -> Server:
    server = launcher.configure(1, STAGES, patched=patched, device=ASCEND.name, args=ARGUMENTS)
    server.env |= probe_variables("sglang_pp_probe", paths=[ROOT, disaggregated.ENGINE.folder])
    server.env |= {**store, **faults.variables, "PP_PROBE_STATES": "1"}
    server.env["SGLANG_NPU_PP_WAIT_LIMIT_S"] = str(WAIT_LIMIT_S)
    return launcher.servers.enter_context(server)


def exercise(server: Server) -> dict[str, Any]:
    """All prompts for the first time, from the store, and once more: the KV pool has room for two."""
    new = [ask(server, prefix) for prefix in PREFIXES]
    forget(server)
    return {
        "new": new,
        "stored": [ask(server, prefix) for prefix in PREFIXES],
        "again": [ask(server, prefix) for prefix in PREFIXES],
    }


def test_answers_and_what_was_cached_are_upstreams(served: Served) -> None:
    assert served.found == served.upstream
    new, stored, again = (served.found[name] for name in ("new", "stored", "again"))
    assert ids(stored) == ids(again) == ids(new)
    assert {answer["cached"] for answer in new} == {0}
    for answer in (*stored, *again):
        assert answer["from"].get("storage", 0) >= ASCEND.kept, "nothing came from the store"


def test_a_burst(served: Served) -> None:
    """As each request alone; and the stages end alike."""
    requests = [(prefix, suffix) for suffix in range(BURST // len(PREFIXES)) for prefix in PREFIXES]
    alone = [ask(served.server, *request) for request in requests]
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        found = list(pool.map(lambda request: ask(served.server, *request), requests))
    assert ids(found) == ids(alone)
    assert sum(answer["from"].get("storage", 0) for answer in found) > 0
    assert_stages_agree(served.server)


def test_stages_that_decide_unequally_end_with_a_sentence(served: Served) -> None:
    """The last test of this server. SGLang waits a minute before it ends."""
    forget(served.server)
    served.faults.arm(DECISION_BEFORE)
    with pytest.raises((requests.ConnectionError, requests.Timeout)):
        exercise(served.server)
    served.server.wait_end(END_LIMIT_S)
    assert served.faults.struck > 0
    log = served.server.log_text()
    assert any(sentence in log for sentence in UNEQUAL), "it ended without a sentence that says why"
