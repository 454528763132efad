"""What SGLang's own /metrics shows of us on a real server, next to the counters that the ranks dump."""

from __future__ import annotations

import time

import pytest
from prometheus_client.parser import text_string_to_metric_families

from rig import battery
from rig.server import Server
from sglang_npu_pp.observe import metrics
from sglang_npu_pp.observe.telemetry import Snapshot, read_snapshots

LIMIT_S = 30.0  # counters are copied once a second
Labels = frozenset[tuple[str, str]]


def page(server: Server) -> dict[str, dict[Labels, float]]:
    """Our series on /metrics by name and labels; none may be there twice."""
    found: dict[str, dict[Labels, float]] = {}
    for family in text_string_to_metric_families(server.get("/metrics").text):
        for sample in family.samples:
            if sample.name.startswith(metrics.PREFIX):
                series = found.setdefault(sample.name, {})
                labels = frozenset(sample.labels.items())
                assert labels not in series, (sample.name, sample.labels)
                series[labels] = sample.value
    return found


def dump(server: Server) -> list[Snapshot]:
    server.dump_telemetry()
    return read_snapshots(server.log.parent)


def expected(snapshots: list[Snapshot], kind: str) -> dict[str, dict[Labels, float]]:
    """The series of one message kind, as the dumped counters have them."""
    series: dict[str, dict[Labels, float]] = {}

    def add(metric: metrics.Metric, snapshot: Snapshot, value: float, *labels: str) -> None:
        own = {"stage": str(snapshot.stage), "rank": str(snapshot.rank)}
        key = frozenset({**own, **dict(zip(metric.labels, labels, strict=True))}.items())
        series.setdefault(metric.name, {})[key] = value

    for snapshot in snapshots:
        for direction, channels in (("sent", snapshot.sent), ("received", snapshot.received)):
            if (counters := channels.get(kind)) is None:
                continue
            add(metrics.MESSAGES, snapshot, counters["messages"], kind, direction)
            add(metrics.BYTES, snapshot, counters["bytes"], kind, direction)
            if direction == "sent":
                add(metrics.BACKPRESSURE, snapshot, counters["backpressure"], kind)
                add(metrics.BACKPRESSURE_SECONDS, snapshot, counters["backpressure_s"], kind)
            else:
                add(metrics.WAITS, snapshot, counters["waits"], kind)
                add(metrics.WAIT_SECONDS, snapshot, counters["wait_s"], kind)
    return series


def of_kind(found: dict[str, dict[Labels, float]], kind: str) -> dict[str, dict[Labels, float]]:
    chosen = {
        name: {labels: value for labels, value in series.items() if ("kind", kind) in labels}
        for name, series in found.items()
    }
    return {name: series for name, series in chosen.items() if series}


def agree(found: dict[str, dict[Labels, float]], wanted: dict[str, dict[Labels, float]]) -> bool:
    return {name: pytest.approx(series, rel=1e-9) for name, series in wanted.items()} == found


def test_metrics_of_an_idle_server_are_what_its_ranks_counted(patched: Server) -> None:
    for length in (20, 300):
        battery.generate(patched, input_ids=battery.prompt(length), sampling_params={"ignore_eos": True})
    deadline = time.monotonic() + LIMIT_S
    while True:  # proxies and outputs rest when no request runs, only empty request lists go on
        before = dump(patched)
        found = page(patched)
        if all(agree(of_kind(found, kind), expected(before, kind)) for kind in ("proxy", "output")):
            break
        if time.monotonic() > deadline:
            pytest.fail(f"after {LIMIT_S:g} s /metrics shows {found}, but the ranks say {before}")
    after = dump(patched)
    requests = of_kind(found, "requests")[metrics.MESSAGES.name]
    sent = requests[frozenset({"stage": "0", "rank": "0", "kind": "requests", "direction": "sent"}.items())]
    assert 0 < sent <= after[0].sent["requests"]["messages"]
    ranks = {frozenset({"stage": str(stage), "rank": "0"}.items()) for stage in range(2)}
    assert set(found[metrics.REFUSED.name]) == ranks
    assert found[metrics.SLOTS.name] == dict.fromkeys(ranks, 2.0)
    assert set(found) == {metric.name for metric in (*metrics.COUNTERS, *metrics.LIMITS, metrics.FEATURE)}


def test_sglang_still_exports_its_own(patched: Server) -> None:
    battery.generate(patched, input_ids=battery.prompt(20), sampling_params={"ignore_eos": True})
    text = patched.get("/metrics").text
    assert "sglang:num_requests_total" in text
    assert "sglang:max_total_num_tokens" in text


def test_later_stages_say_how_long_they_received_requests(patched: Server) -> None:
    """That is where a later stage spends its time, most of it waiting; upstream counts it there, too."""
    name, wanted = "sglang:scheduler_stage_seconds_total", {"0", "1"}
    deadline = time.monotonic() + LIMIT_S
    while True:  # SGLang adds up its stages once in a while
        battery.generate(patched, input_ids=battery.prompt(20), sampling_params={"ignore_eos": True})
        seconds = {
            sample.labels["pp_rank"]: sample.value
            for family in text_string_to_metric_families(patched.get("/metrics").text)
            for sample in family.samples
            if sample.name == name and sample.labels["category"] == "recv_requests"
        }
        if {stage for stage, value in seconds.items() if value > 0} == wanted:
            break
        if time.monotonic() > deadline:
            pytest.fail(f"after {LIMIT_S:g} s the seconds of each stage are {seconds}")
