"""Servers of two stages whose cache has three levels, unpatched against patched: KV pool, host memory, files.

On CPU, and on the simulated Ascend; with plain torch in the place of the kernel that copies between the first
two. The KV pool has room for three prompts, or two, host memory for all. A request waits for what storage has
of its prompt (`wait_complete`), so what is cached does not depend on time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rig import battery
from rig.agreement import assert_stages_agree
from rig.devices import EAGER
from rig.launcher import ROOT, Launcher, point_to_point_counts, take_cpu_compat
from rig.probes import probe_variables
from rig.server import Server

pytestmark = pytest.mark.thorough

STAGES, CONCURRENCY, BURST = 2, 8, 24
PREFIX, TOKENS = 300, 8
PREFIXES = range(1, 7)
LIMIT_S, POLL_S = 60.0, 0.05
ARGUMENTS = (
    *("--enable-hierarchical-cache", "--hicache-ratio", "8"),
    *("--hicache-storage-backend", "file", "--hicache-storage-prefetch-policy", "wait_complete"),
    *("--max-total-tokens", "1024", "--chunked-prefill-size", "128"),
)


@dataclass(frozen=True)
class Device:
    name: str
    page: int  # tokens
    messages: int  # of torch.distributed, a forward: proxies take the device lane, or the host's
    arguments: tuple[str, ...]

    @property
    def pages(self) -> int:
        """Whole ones of a prefix."""
        return PREFIX // self.page

    @property
    def kept(self) -> int:
        """Tokens of a prefix that are in whole pages."""
        return self.pages * self.page


CPU = Device("cpu", 1, 0, ("--hicache-io-backend", "direct", "--hicache-mem-layout", "layer_first"))
ASCEND = Device("npu-sim", 128, 1, EAGER)  # whose backend and layout SGLang chooses itself


@dataclass(frozen=True)
class Served:
    device: Device
    upstream: Mapping[str, Any]  # what an unpatched server answered, which has ended
    found: Mapping[str, Any]  # what the patched one did
    server: Server

    @property
    def folder(self) -> Path:
        return self.server.log.parent

    def files(self, stage: int) -> int:
        """Pages of this stage in storage."""
        return sum(1 for _ in (self.folder / "storage").glob(f"*_{STAGES}_{stage}.bin"))


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(CPU, id=CPU.name),
        pytest.param(ASCEND, id=ASCEND.name, marks=pytest.mark.release),
    ],
)
def served(request: pytest.FixtureRequest, make_launcher: Callable[[str], Launcher]) -> Iterator[Served]:
    device, launcher = request.param, make_launcher("hierarchical")
    try:
        upstream = exercise(start(launcher, device, patched=False))
        launcher.stop_all()
        server = start(launcher, device, patched=True)
        yield Served(device, upstream, exercise(server), server)
    finally:
        launcher.stop_all()


def start(launcher: Launcher, device: Device, *, patched: bool) -> Server:
    arguments = (*ARGUMENTS, *device.arguments)
    server = launcher.configure(1, STAGES, patched=patched, device=device.name, args=arguments)
    storage = server.log.parent / "storage"
    storage.mkdir()  # by hand: upstream's stages both make it, and one fails
    server.env |= probe_variables("sglang_pp_probe", "storage_probe", paths=[ROOT])
    if device is CPU:
        take_cpu_compat(server)
    server.env |= {
        "SGLANG_HICACHE_FILE_BACKEND_STORAGE_DIR": str(storage),
        "STORAGE_PROBE_GATE": str(server.log.parent),
        "PP_PROBE_STATES": "1",
    }
    return launcher.servers.enter_context(server)


def ask(server: Server, prefix: int, suffix: int = 0) -> dict[str, Any]:
    ids = battery.prompt(PREFIX, seed=prefix) + battery.prompt(5, seed=100 + suffix)
    sampling = {"max_new_tokens": TOKENS, "ignore_eos": True, "temperature": 0}
    response = server.post("/generate", {"input_ids": ids, "sampling_params": sampling}, timeout_s=LIMIT_S)
    response.raise_for_status()
    answer = response.json()
    meta = answer["meta_info"]
    return {
        "ids": answer["output_ids"],
        "cached": meta["cached_tokens"],
        "from": {name: count for name, count in (meta.get("cached_tokens_details") or {}).items() if count},
    }


def exercise(server: Server) -> dict[str, Any]:
    """All prompts for the first time, from host memory, and some from storage, one after another."""
    new = [ask(server, prefix) for prefix in PREFIXES]
    again = [ask(server, prefix) for prefix in PREFIXES]
    forget(server)
    stored = [ask(server, prefix) for prefix in PREFIXES[:2]]
    return {"new": new, "again": again, "stored": stored}


def forget(server: Server) -> None:
    """Empty the first two levels, once all is written to the third."""
    until(lambda: server.post("/flush_cache").ok, "the cache was not flushed")


def until(condition: Callable[[], bool], complaint: str) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"{complaint} within {LIMIT_S:.0f} s"
        time.sleep(POLL_S)


def ids(answers: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    return [answer["ids"] for answer in answers]


def test_answers_and_what_was_cached_are_upstreams(served: Served) -> None:
    assert served.found == served.upstream
    new, again, stored = (served.found[name] for name in ("new", "again", "stored"))
    assert ids(again) == ids(new)
    assert ids(stored) == ids(new)[:2]
    assert {answer["cached"] for answer in new} == {0}
    kept = served.device.kept
    assert all(answer["from"].get("host", 0) >= kept for answer in again), "nothing came from host memory"
    assert all(answer["from"].get("storage", 0) >= kept for answer in stored), "nothing came from storage"


def test_a_burst_over_shared_prefixes(served: Served) -> None:
    """As each request alone; and the stages end alike, without a message of upstream's."""
    requests = [(prefix, suffix) for suffix in range(BURST // len(PREFIXES)) for prefix in PREFIXES]
    alone = [ask(served.server, *request)["ids"] for request in requests]
    begin = assert_stages_agree(served.server)
    before = point_to_point_counts(served.server)
    with ThreadPoolExecutor(CONCURRENCY) as pool:
        found = list(pool.map(lambda request: ask(served.server, *request), requests))
    assert ids(found) == alone
    assert sum(answer["from"].get("host", 0) for answer in found) > 0
    end = assert_stages_agree(served.server)
    forwards = sum(end["forwards"].values()) - sum(begin["forwards"].values())
    expected = {pid: count + forwards * served.device.messages for pid, count in before.items()}
    assert point_to_point_counts(served.server) == expected


@pytest.mark.parametrize("stage", range(STAGES))
def test_slow_writes_to_storage_stop_no_request(served: Served, stage: int) -> None:
    """Upstream's second stage waits for its own once the first has written."""
    other, prefix = 1 - stage, 50 + stage
    gate, before = served.folder / f"write{stage}", served.files(other)
    gate.touch()
    try:
        ask(served.server, prefix)
        until(
            lambda: served.files(other) >= before + served.device.pages,
            "the other stage has not written its pages",
        )
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            answers = list(pool.map(lambda each: ask(served.server, each), PREFIXES))
        assert served.files(stage) < served.files(other), "the writes were not held back"
    finally:
        gate.unlink()
    assert ids(answers) == ids(served.found["new"])
    forget(served.server)
    assert served.files(stage) == served.files(other)


@pytest.mark.parametrize("stage", range(STAGES))
def test_slow_reads_of_storage_stop_the_request_that_needs_them_only(served: Served, stage: int) -> None:
    forget(served.server)
    gate = served.folder / f"read{stage}"
    gate.touch()
    try:
        with ThreadPoolExecutor(1 + CONCURRENCY) as pool:
            waiting = pool.submit(ask, served.server, PREFIXES[0])
            others = list(
                pool.map(lambda each: ask(served.server, 60 + each + 10 * stage), range(CONCURRENCY))
            )
            assert not waiting.done()
            gate.unlink()
            answer = waiting.result(timeout=LIMIT_S)
    finally:
        gate.unlink(missing_ok=True)
    assert {each["cached"] for each in others} == {0}
    assert answer == served.found["stored"][0]
    assert_stages_agree(served.server)


@pytest.mark.release
@pytest.mark.parametrize("trouble", ["lost", "broken"])
@pytest.mark.parametrize("stage", range(STAGES))
def test_dead_storage_of_one_stage_stops_no_request(served: Served, stage: int, trouble: str) -> None:
    """Its pages are gone, or reading them fails: prompts are computed again, on both stages."""
    prefix = 80 + 2 * stage + (trouble == "broken")
    first = ask(served.server, prefix)
    forget(served.server)
    pages = list((served.folder / "storage").glob(f"*_{STAGES}_{stage}.bin"))
    gate = served.folder / f"broken{stage}"
    if trouble == "lost":
        for page in pages:
            page.unlink()
    else:
        gate.touch()
    try:
        with ThreadPoolExecutor(CONCURRENCY) as pool:
            asked = [prefix, *PREFIXES[2:]]
            answers = list(pool.map(lambda each: ask(served.server, each), asked))
    finally:
        gate.unlink(missing_ok=True)
    assert ids(answers) == [first["ids"], *ids(served.found["new"])[2:]]
    assert {answer["cached"] for answer in answers} == {0}
    assert_stages_agree(served.server)


def test_it_is_in_force(served: Served) -> None:
    log = served.server.log_text()
    assert log.count("hierarchical cache, preparing ahead, end of a server") == STAGES
    assert "stays on upstream's path" not in log
