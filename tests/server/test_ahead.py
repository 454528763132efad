"""Decodes that are prepared while their tokens are on their way.

Under a load of every kind of request, from a KV pool that is too small for them, answers stay what they are
alone, and what is taken back leaves nothing.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from rig.agreement import assert_stages_agree
from rig.launcher import Launcher, traces
from rig.mixtures import GRAMMARS, Mixture
from rig.releases import IN_VENV, RELEASES
from rig.server import Server
from sglang_npu_pp.observe.telemetry import Snapshot, read_snapshots
from sglang_npu_pp.observe.trace import Event

from .installed import if_installed

pytestmark = pytest.mark.thorough

SEED = 19
REQUESTS, BODIES = 160, 40
PLACES = 2048  # tokens of the KV pool: some 8 of the requests, of which up to 32 come at a time
ARGUMENTS = ("--max-total-tokens", str(PLACES), "--constrained-json-disable-any-whitespace")


@dataclass(frozen=True)
class Served:
    server: Server
    launch_first: bool
    alone: Mixture  # from a server that prepares nothing ahead

    def snapshots(self) -> list[Snapshot]:
        self.server.dump_telemetry()
        return read_snapshots(self.server.log.parent)


@pytest.fixture(scope="module")
def alone(make_launcher: Callable[[str], Launcher]) -> Callable[[str], Mixture]:
    """By release."""

    @functools.cache
    def of(release: str) -> Mixture:
        server = make_launcher(f"behind {release}").configure(
            1,
            2,
            patched=True,
            args=ARGUMENTS,
            env={"SGLANG_NPU_PP_AHEAD": "0"},
            release=RELEASES[release],
        )
        with server:
            # With a grammar an earlier release may forbid tokens to other requests (rig/releases.py).
            without = () if release == IN_VENV else GRAMMARS
            return Mixture.asked_alone(server, BODIES, SEED, without)

    return of


def other(release: str) -> Any:
    marks = (pytest.mark.release, if_installed(RELEASES[release]))
    return pytest.param((1, 2, "1", release), id=release, marks=marks)


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((1, 2, "1", IN_VENV), id="launched first"),
        pytest.param((1, 2, "auto", IN_VENV), id="processed first", marks=pytest.mark.release),
        pytest.param((2, 2, "1", IN_VENV), id="two ranks a stage", marks=pytest.mark.release),
        pytest.param((1, 4, "1", IN_VENV), id="four stages", marks=pytest.mark.release),
        *(other(release) for release in RELEASES if release != IN_VENV),
    ],
)
def served(
    request: pytest.FixtureRequest,
    make_launcher: Callable[[str], Launcher],
    alone: Callable[[str], Mixture],
) -> Iterator[Served]:
    tp, pp, wanted, release = request.param
    expected = alone(release)
    launcher = make_launcher("ahead")
    server = launcher.configure(tp, pp, patched=True, args=ARGUMENTS, release=RELEASES[release])
    folder = str(server.log.parent)
    server.env |= {
        "SGLANG_NPU_PP_AHEAD": wanted,
        "AHEAD_PROBE_DIR": folder,
        "PP_PROBE_STATES": "1",
        "PP_PROBES": "sglang_pp_probe,ahead_probe",
    }
    with server:
        yield Served(server, wanted == "1", expected)


@pytest.mark.timeout(900)
def test_every_answer_under_load_is_the_one_that_the_request_gets_alone(served: Served) -> None:
    ended, wrong = served.alone.ask_many(served.server, REQUESTS, SEED)
    assert not wrong, f"seed {SEED}"
    assert 0 < ended < REQUESTS / 2
    assert served.server.log_text().count("Retract requests") >= served.server.pp, "nothing was retracted"
    assert_stages_agree(served.server)


def test_what_is_taken_back_leaves_everything_as_it_was(served: Served) -> None:
    """The probe takes every preparation back and compares all fields, then lets it be made again."""
    found = [json.loads(path.read_text()) for path in served.server.log.parent.glob("*.ahead")]
    assert len(found) == served.server.tp  # stage 0's
    for each in found:
        assert each["looked at"] == each["changed"] > REQUESTS
        assert each["differences"] == []
        assert each["forwards"] > REQUESTS, "no forward was planned before its tokens"


def test_most_of_what_is_prepared_is_used(served: Served) -> None:
    """Nothing is, on later stages; some requests did end in between."""
    for snapshot in served.snapshots():
        if snapshot.stage > 0:
            assert (snapshot.prepared, snapshot.taken_back) == (0, 0)
        else:
            assert snapshot.prepared > 2 * snapshot.taken_back > 20


def test_it_is_prepared_before_the_tokens_and_launched_before_they_are_processed(served: Served) -> None:
    complaints = order_of(traces(served.server)[0], served.launch_first)
    assert not complaints


def order_of(events: list[Event], launch_first: bool) -> list[str]:
    """What is wrong with the order on stage 0."""
    complaints: list[str] = []
    prepared: dict[int, bool] = {}  # by slot: whether its tokens are there
    launched = -1  # the slot of this iteration, once it is
    for event in events:
        if event.name == "iteration":
            launched = -1
        elif event.name == "launched":
            launched = event.slot
        elif event.name == "prepared":
            prepared[event.slot] = False
        elif (event.name, event.kind) == ("ready", "output") and event.slot in prepared:
            prepared[event.slot] = True
        elif event.name == "processed":
            if not prepared.pop(event.slot, False):
                complaints.append(f"processed without tokens: {event}")
            if (event.slot == launched) is not launch_first:
                complaints.append(f"behind the launch of {launched}: {event}")
    return complaints


def test_the_check_of_the_order_can_fail() -> None:
    def event(name: str, slot: int = 1, kind: str = "") -> Event:
        return Event(0, name, kind, slot, 5)

    prepared, tokens, processed = event("prepared"), event("ready", kind="output"), event("processed")
    begin, launched = event("iteration"), event("launched")
    assert not order_of([prepared, tokens, begin, launched, processed], launch_first=True)
    assert order_of([prepared, tokens, begin, launched, processed], launch_first=False)
    assert order_of([prepared, tokens, processed, begin, launched], launch_first=True)
    assert not order_of([prepared, tokens, processed, begin, launched], launch_first=False)
    assert order_of([tokens, prepared, begin, launched, processed], launch_first=True)
