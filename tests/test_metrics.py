"""What of the counters reaches Prometheus: every series once, right at idle, nothing while nobody asks."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import prometheus_client
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sglang_npu_pp.observe import metrics
from sglang_npu_pp.observe.metrics import COUNTERS, LIMITS, Exporter
from sglang_npu_pp.observe.telemetry import ChannelCounters, Telemetry

ROOT = Path(__file__).parents[1]


class Exported:
    """An exporter with a registry of its own, and what /metrics would show."""

    def __init__(self, telemetry: Telemetry, **options: object) -> None:
        self.registry = prometheus_client.CollectorRegistry()
        limits = {metric: float(number) for number, metric in enumerate(LIMITS)}
        self.exporter = Exporter(telemetry, limits, registry=self.registry, **options)  # type: ignore[arg-type]

    def value(self, metric: metrics.Metric, *labels: str) -> float | None:
        own = {"stage": "1", "rank": "3", **dict(zip(metric.labels, labels, strict=True))}
        return self.registry.get_sample_value(metric.name, own)

    def names(self) -> set[str]:
        samples = [sample for family in self.registry.collect() for sample in family.samples]
        return {sample.name for sample in samples if not sample.name.endswith("_created")}


def busy() -> Telemetry:
    telemetry = Telemetry(1, 3, phases_s={"forward": 0.5}, refused=2, refused_connections=5)
    telemetry.sent["proxy"] = ChannelCounters(3, 1000, backpressure=4, backpressure_s=0.25)
    telemetry.received["requests"] = ChannelCounters(7, 70, waits=8, wait_s=1.5)
    return telemetry


def test_every_counter_arrives_with_its_labels() -> None:
    exported = Exported(busy())
    exported.exporter.copy()
    assert exported.value(metrics.MESSAGES, "proxy", "sent") == 3
    assert exported.value(metrics.BYTES, "proxy", "sent") == 1000
    assert exported.value(metrics.BACKPRESSURE, "proxy") == 4
    assert exported.value(metrics.BACKPRESSURE_SECONDS, "proxy") == 0.25
    assert exported.value(metrics.MESSAGES, "requests", "received") == 7
    assert exported.value(metrics.BYTES, "requests", "received") == 70
    assert exported.value(metrics.WAITS, "requests") == 8
    assert exported.value(metrics.WAIT_SECONDS, "requests") == 1.5
    assert exported.value(metrics.PHASE_SECONDS, "forward") == 0.5
    assert exported.value(metrics.REFUSED) == 2
    assert exported.value(metrics.REFUSED_CONNECTIONS) == 5
    assert [exported.value(metric) for metric in LIMITS] == [0, 1, 2, 3]
    assert exported.names() == {metric.name for metric in (*COUNTERS, *LIMITS)}


def test_no_counter_of_the_telemetry_is_forgotten() -> None:
    """A field that is added to `ChannelCounters` must be exported too."""
    telemetry = Telemetry(0, 0)
    fields = list(asdict(ChannelCounters()))
    numbers = iter(range(1, 100))
    for channels in (telemetry.sent, telemetry.received):
        channels["kind"] = ChannelCounters(**{name: next(numbers) for name in fields})
    values = {value for _, value in metrics.read_counters(telemetry)}
    waits = {"waits", "wait_s"}
    expected = {getattr(telemetry.sent["kind"], name) for name in fields if name not in waits}
    received = {"messages", "bytes", *waits}
    expected |= {getattr(telemetry.received["kind"], name) for name in received}
    assert values == expected | {0}


@given(st.lists(st.tuples(st.sampled_from(["requests", "proxy"]), st.integers(0, 5)), max_size=12))
def test_copies_add_up_to_the_total_however_often_they_are_made(steps: list[tuple[str, int]]) -> None:
    telemetry = Telemetry(1, 3)
    exported = Exported(telemetry)
    for kind, count in steps:
        telemetry.sending(kind).messages += count
        telemetry.sending(kind).bytes += 100 * count
        if count % 2:
            exported.exporter.copy()
    exported.exporter.copy()
    for kind, counters in telemetry.sent.items():
        assert exported.value(metrics.MESSAGES, kind, "sent") == counters.messages
        assert exported.value(metrics.BYTES, kind, "sent") == counters.bytes


def test_each_feature_says_whether_it_is_in_force() -> None:
    exported = Exported(busy(), features={"core": True, "LoRA": False})
    assert exported.value(metrics.FEATURE, "core") == 1
    assert exported.value(metrics.FEATURE, "LoRA") == 0


def test_more_labels_tell_replicas_apart() -> None:
    exported = Exported(busy(), labels={"dp_rank": "1"})
    exported.exporter.copy()
    own = {"stage": "1", "rank": "3", "dp_rank": "1"}
    assert exported.registry.get_sample_value(metrics.REFUSED.name, own) == 2


def test_the_last_counts_arrive_although_the_program_does_nothing_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The copying thread is followed step by step: it copies once each time its wait is over."""
    waits = iter([False, False, True])
    telemetry = Telemetry(1, 3)
    exported = Exported(telemetry)

    def wait(seconds: float) -> bool:
        assert seconds == metrics.COPY_EVERY_S
        telemetry.sending("proxy").messages += 1
        return next(waits)

    monkeypatch.setattr(exported.exporter._end, "wait", wait)
    exported.exporter._run()
    assert exported.value(metrics.MESSAGES, "proxy", "sent") == 2


def test_a_thread_that_fails_says_so_and_harms_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    exported = Exported(busy())
    monkeypatch.setattr(exported.exporter._end, "wait", lambda seconds: False)
    monkeypatch.setattr(exported.exporter, "copy", _full_disk)
    exported.exporter._run()
    assert "metrics of this rank are not updated any more" in caplog.text
    assert "No space left" in caplog.text


def _full_disk() -> None:
    raise OSError("No space left on device")


RANK = """
import sys
import sglang_npu_pp.observe.metrics as metrics  # before the directory is known, as a plugin is loaded
assert "prometheus_client" not in sys.modules
import os
os.environ["PROMETHEUS_MULTIPROC_DIR"] = sys.argv[1]
from sglang_npu_pp.observe.telemetry import Telemetry
telemetry = Telemetry(int(sys.argv[2]), int(sys.argv[3]))
telemetry.sending("proxy").messages = 10 + telemetry.stage
exporter = metrics.Exporter(telemetry, {metrics.SLOTS: 2})
exporter.start()
print("started", flush=True)
sys.stdin.read()
"""

SERVER = """
import prometheus_client, prometheus_client.multiprocess
registry = prometheus_client.CollectorRegistry()
prometheus_client.multiprocess.MultiProcessCollector(registry)
print(prometheus_client.generate_latest(registry).decode())
"""


@pytest.fixture
def rank_process(tmp_path: Path) -> object:
    """Starts processes that export as a rank does, in multiprocess mode."""
    started: list[subprocess.Popen[str]] = []

    def start(stage: int, rank: int) -> None:
        process = subprocess.Popen(
            [sys.executable, "-c", RANK, str(tmp_path), str(stage), str(rank)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "started\n"

    yield start
    for process in started:
        process.communicate(timeout=30)


def test_every_rank_is_seen_once_by_the_process_that_serves_metrics(
    rank_process: Callable[[int, int], None], tmp_path: Path
) -> None:
    for stage in (0, 1):
        for rank in (0, 1):
            rank_process(stage, rank)
    page = subprocess.run(
        [sys.executable, "-c", SERVER],
        env={**os.environ, "PROMETHEUS_MULTIPROC_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout
    lines = re.findall(r"^sglang_npu_pp_messages_total\{(.*)\} (\S+)$", page, re.MULTILINE)
    seen = sorted((json.dumps(sorted(labels.split(","))), float(value)) for labels, value in lines)
    assert seen == [
        (json.dumps(['direction="sent"', 'kind="proxy"', f'rank="{rank}"', f'stage="{stage}"']), 10.0 + stage)
        for rank in (0, 1)
        for stage in (0, 1)
    ]
    slots = re.findall(r"^sglang_npu_pp_microbatch_slots\{.*\} 2.0$", page, re.MULTILINE)
    assert len(slots) == 4
    assert "# TYPE sglang_npu_pp_messages_total counter" in page
