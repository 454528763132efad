"""SGLang 0.5.21 `--device npu` on the simulated Ascend, unpatched and patched, next to a CPU server.

Everything is float32, so greedy tokens and log-probabilities are those of a CPU server. A start takes
25 to 40 s on two cores: every server is started once, asked everything, and looked at afterwards.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest

from ascend_sim.controls import Simulator
from ascend_sim.deadlock import find_deadlock
from ascend_sim.sglang_on_sim.start_check import EXPECTED_ATTENTION, REPLAYS, REPORT
from rig import battery
from rig.comparison import SWITCHES_OFF
from rig.devices import EAGER
from rig.launcher import Launcher, traces
from rig.loads import Pool, make_pool
from rig.server import Server
from sglang_npu_pp.observe.trace import Event
from sglang_npu_pp.tools.certify import order
from tests.field_cases import field_case
from tests.upstream_cases import upstream_case

from .held_receive import Held, hold_a_prefill, hold_a_receive
from .regression.test_soak import soak

CONCURRENCY = 24
CHUNK = 256  # tokens; of tests.server.conftest.ARGUMENTS
PAGE = 128  # tokens; SGLang's own choice on an NPU, and the unit of its radix cache there
PREFIX = 600  # tokens that several requests share
BATTERY_LIMIT_S = 240.0
NATIVE_MODEL = "sglang.srt.models.qwen3_vl.Qwen3VLForConditionalGeneration"


class Layout(NamedTuple):
    tp: int
    pp: int
    patched: bool
    switches: bool = True  # pinned memory, early sends, early receives
    graphs: bool = True  # in decode, for batches of up to 8 requests

    def __str__(self) -> str:
        without = ("" if self.switches else "-switches-off") + ("" if self.graphs else "-eager")
        return f"tp{self.tp}-pp{self.pp}-{'patched' if self.patched else 'upstream'}{without}"


# What all are compared with is the CPU server; unpatched servers show that the probes see what they do.
LAYOUTS = [
    *(Layout(tp, pp, patched=True) for tp, pp in ((1, 2), (1, 4), (2, 2), (2, 4))),
    Layout(1, 2, patched=True, graphs=False),
    Layout(1, 2, patched=True, switches=False),
    Layout(1, 2, patched=False),
    Layout(1, 2, patched=False, graphs=False),
    Layout(1, 1, patched=False),
]
SOAKED = Layout(1, 2, patched=True)
SOAK_REQUESTS = 300


@dataclass
class Observed:
    """What one server answered and did."""

    answers: dict[str, Any]
    prefixed: list[dict[str, Any]]  # answers to requests that begin alike
    cached_tokens: list[int]  # of those requests
    log: str = ""
    results: int = 0  # batches whose results a scheduler processed
    device_reads: int = 0  # reads of device tensors by the host on the way
    batch_reads: int = 0  # the same while it makes a batch, with copies of positions that it waits for
    traces: dict[int, list[Event]] = field(default_factory=dict)
    held: Held | None = None  # in decode
    held_prefill: Held | None = None
    soak: tuple[int, list[str]] | None = None  # requests that were ended early; wrong answers


@pytest.fixture(scope="module")
def launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    launcher = Launcher(tmp_path_factory.mktemp("ascend"))
    yield launcher
    launcher.stop_all()


class OnCPU(NamedTuple):
    """Answers of an unpatched CPU server with one stage."""

    observed: Observed
    pool: Pool


@pytest.fixture(scope="module")
def reference(launcher: Launcher) -> OnCPU:
    with launcher.configure(1, 1, patched=False) as server:
        return OnCPU(ask_everything(server), Pool.asked_alone(server, make_pool(24, seed=3)))


@pytest.fixture(scope="module")
def on_cpu(reference: OnCPU) -> Observed:
    return reference.observed


def marks_of(layout: Layout) -> list[pytest.MarkDecorator]:
    """Servers of two ranks take three minutes each, of four six."""
    return [] if layout == SOAKED else [pytest.mark.release]


@pytest.fixture(
    scope="module",
    params=[pytest.param(layout, id=str(layout), marks=marks_of(layout)) for layout in LAYOUTS],
)
def on_npu(request: pytest.FixtureRequest, launcher: Launcher, reference: OnCPU) -> Observed:
    """The same of a server on the simulated Ascend, with what it did. Memory that is freed is overwritten."""
    layout: Layout = request.param
    env = {
        "PP_PROBE_DEVICE_READS": "fail" if layout.patched else "count",
        "PP_PROBE_KEEP_FREE_PAGES": "0" if layout.patched else "1",  # a patch does that
        "ASCEND_SIM_POISON": "1",
        **({} if layout.switches else SWITCHES_OFF),
    }
    args = () if layout.graphs else EAGER
    with launcher.configure(
        layout.tp, layout.pp, patched=layout.patched, device="npu-sim", args=args, env=env
    ) as server:
        observed = ask_everything(server)
        if layout.pp == 2 and layout.tp == 1:
            observed.held = hold_a_receive(server)
            observed.held_prefill = hold_a_prefill(server)
        if layout == SOAKED:
            observed.soak = within_limit(server, lambda: soak(server, reference.pool, SOAK_REQUESTS))
        observed.log = server.log_text()
        for pid in server.scheduler_pids():
            counted = struct.unpack("<QQQ", (server.log.parent / f"{pid}.reads").read_bytes())
            observed.results += counted[0]
            observed.device_reads += counted[1]
            observed.batch_reads += counted[2]
        if layout.patched:
            observed.traces = {stage: of_scheduler(trace) for stage, trace in traces(server).items()}
    return observed


@pytest.fixture
def layout(request: pytest.FixtureRequest) -> Layout:
    layout: Layout = request.node.callspec.params["on_npu"]
    return layout


def of_scheduler(trace: list[Event]) -> list[Event]:
    """Without what the thread that sends outputs records, at times of its own."""
    return [event for event in trace if (event.name, event.kind) != ("push", "output")]


def ask_everything(server: Server) -> Observed:
    """The battery, many requests at a time, and requests with a common beginning."""
    (answers,) = within_limit(server, lambda: battery.run(server, concurrency=CONCURRENCY))
    prefixed, cached_tokens = within_limit(server, lambda: ask_with_prefix(server))
    return Observed(answers, prefixed, cached_tokens)


def ask_with_prefix(server: Server, count: int = 8) -> tuple[list[dict[str, Any]], list[int]]:
    """One request, then several at a time that begin as it does: their answers, and what was cached."""

    def ask(suffix: int) -> dict[str, Any]:
        ids = battery.prompt(PREFIX, seed=31) + battery.prompt(5, seed=suffix)
        return battery.generate(server, input_ids=ids, sampling_params={"ignore_eos": True})

    first = ask(0)
    with ThreadPoolExecutor(count) as pool:
        answers = [first, *pool.map(ask, range(1, count))]
    return [battery.summary(answer) for answer in answers], [
        answer["meta_info"]["cached_tokens"] for answer in answers
    ]


def within_limit(server: Server, asking: Callable[[], Any]) -> Any:
    """The result of `asking`; a server that stands still is described, not waited for."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(asking)
    try:
        return future.result(BATTERY_LIMIT_S)
    except FutureTimeoutError:
        pytest.fail(f"no answers in {BATTERY_LIMIT_S:.0f} s; {standing_still(server)}")
    finally:
        pool.shutdown(wait=False)  # the requests end with the server


def standing_still(server: Server) -> str:
    """What the streams of every scheduler do, and the deadlock among them if there is one."""
    if server.device.title == "CPU":
        return f"see {server.log}"
    listings = []
    for pid in server.scheduler_pids():
        with Simulator(pid) as simulator:
            listings.append(simulator.listing())
    return "\n".join([f"see {server.log}", str(find_deadlock(listings)), *map(str, listings)])


def test_every_scheduler_took_the_npu_path(on_npu: Observed, layout: Layout) -> None:
    """As the schedulers say themselves; one that did not would have ended (`start_check`). With graphs, also
    one that left one out, and batches of 3 and of 5 to 7 requests, among others, were padded."""
    said = [line for line in on_npu.log.splitlines() if line.startswith(REPORT)]
    sizes = (1, 2, 4, 8) if layout.graphs else ()
    decode = "graphs of 1, 2, 4, 8 requests" if layout.graphs else "no graphs"
    expected = f"{REPORT} platform npu, attention {EXPECTED_ATTENTION}, model {NATIVE_MODEL}, decode {decode}"
    ranks = layout.tp * layout.pp
    assert sorted(said) == sorted([expected, *(f"{REPLAYS} {size}" for size in sizes)] * ranks)


@field_case("gpustack-3452")
@upstream_case("Ascend/sglang-149")  # at tp 2 pp 4
@upstream_case(
    "TestPPAccuracy.test_gsm8k", "TestQwenVLPPAccuracy.test_gsm8k", "TestQwenVLPPAccuracy.test_mmmu"
)
def test_greedy_tokens_equal_the_cpu_servers(on_cpu: Observed, on_npu: Observed) -> None:
    """Of 24 requests at a time, prompts of 1 to 1500 tokens, pictures, grammars and stop strings among them;
    and log-probabilities within 1e-3."""
    assert not battery.differences(on_cpu.answers, on_npu.answers)


@field_case("vllm-54962", "megatron-4047")
def test_a_soak_on_memory_that_is_overwritten_when_it_is_freed(on_npu: Observed, layout: Layout) -> None:
    """Streams, aborts and disconnects among 300 requests: the answers that are given are the CPU server's.
    Patched, the host runs further ahead of the device than upstream's does, so early frees would show."""
    if layout == SOAKED:
        assert on_npu.soak is not None
        ended, wrong = on_npu.soak
        assert not wrong
        assert 0 < ended < SOAK_REQUESTS / 2


def test_long_prompts_are_prefilled_in_chunks(on_npu: Observed) -> None:
    sizes = [int(size) for size in re.findall(r"Prefill batch.*?#new-token: (\d+)", on_npu.log)]
    assert max(sizes) == CHUNK < max(battery.LENGTHS)


def test_a_repeated_prefix_comes_from_the_radix_cache(on_cpu: Observed, on_npu: Observed) -> None:
    whole_pages = PREFIX // PAGE * PAGE
    assert on_npu.cached_tokens == [0] + [whole_pages] * (len(on_npu.prefixed) - 1)
    assert on_npu.prefixed == on_cpu.prefixed


def test_results_reach_the_host_without_reading_the_device(on_npu: Observed, layout: Layout) -> None:
    """In a patched server such a read would have raised; an unpatched one shows that the probe sees them, in
    the loops of a pipeline."""
    assert (on_npu.results > 0) == (layout.pp > 1)
    if layout.pp > 1:
        assert (on_npu.device_reads == 0) == layout.patched, on_npu.device_reads


def test_batches_are_made_without_reading_the_device(on_npu: Observed, layout: Layout) -> None:
    """Pages are given out and multimodal positions copied: as above, it would have raised. An unpatched
    server does both in every prefill."""
    prefills = on_npu.log.count("Prefill batch")
    assert prefills > 0
    assert on_npu.batch_reads == 0 if layout.patched else on_npu.batch_reads >= 2 * prefills


def test_order_of_the_patched_servers(on_npu: Observed, layout: Layout) -> None:
    """As on the CPU: launch, send, only then wait for tokens; receives posted with their header. With the
    switches off: launch, wait for tokens, send; receives posted in their wait."""
    if not layout.patched:
        return
    for stage, trace in on_npu.traces.items():
        assert len(order.launches(trace)) > 100
        assert not order.forwards_ran_one_after_another(trace)
        assert not order.tokens_are_waited_for_behind_the_launch(trace)
        if stage < layout.pp - 1:
            assert not (
                order.proxies_leave_right_behind_the_launch(trace)
                if layout.switches
                else order.proxies_leave_at_the_end_of_the_iteration(trace)
            )
        if stage > 0:
            assert not order.proxies_are_waited_for_last(trace)
            assert not (
                order.receives_are_posted_with_their_header(trace, slots=4)
                if layout.switches
                else order.receives_are_posted_in_their_wait(trace)
            )


def test_a_held_receive_stops_the_host_of_upstream_only(on_npu: Observed, layout: Layout) -> None:
    """Upstream's host waits for the device in the forward whose proxies do not come. The patched one launches
    that forward, goes on to the next microbatch and launches that too; then there is nothing left to do
    without a token. With the switches off it launches one: the next one's proxies leave stage 0 behind the
    outputs of the held one."""
    if on_npu.held is not None:
        expected = 0 if not layout.patched else 2 if layout.switches else 1
        assert on_npu.held.launched == expected, on_npu.held.described


def test_a_prefill_is_launched_before_its_proxies_are_there(on_npu: Observed, layout: Layout) -> None:
    """As far as its sampling. Upstream's host stands at the copy of its positions, behind the proxies."""
    if on_npu.held_prefill is not None:
        assert (on_npu.held_prefill.launched > 0) == layout.patched, on_npu.held_prefill.described
