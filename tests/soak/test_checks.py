"""What the soak looks at, on samples of a server that is well and of servers that are not."""

from __future__ import annotations

import math
import os
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from scripts.soak.checks import Sample, errors_in, in_flight, trends
from sglang_npu_pp.observe.telemetry import ChannelCounters, Snapshot, Telemetry

EVERY_S, COUNT = 35.0, 50


def recorded(stage: int = 0, leak_mib: float = 0.0, **of_the_last: Any) -> list[Sample]:
    """Half an hour of a process whose memory finds its level and then grows by `leak_mib` a minute."""
    generator = random.Random(stage)
    samples = []
    for index in range(COUNT):
        at_s = EVERY_S * (index + 1)
        level = 900 - 60 * math.exp(-at_s / 120) + leak_mib * at_s / 60
        samples.append(Sample(at_s, stage, level + generator.uniform(-3, 3), 60, 20))
    samples[-1] = replace(samples[-1], **of_the_last)
    return samples


def complaints(samples: list[Sample]) -> list[str]:
    return [line for trend in trends(samples, 450) for line in trend.complaints()]


def test_a_process_whose_memory_finds_its_level_is_well() -> None:
    assert not complaints(recorded(0) + recorded(1))


def test_one_sample_that_stands_out_is_no_growth() -> None:
    assert not complaints(recorded(rss_mib=2000.0))


@pytest.mark.parametrize("leak_mib", [1.2, 3.0])
def test_a_leak_of_a_kibibyte_for_each_microbatch_is_found(leak_mib: float) -> None:
    (line,) = complaints(recorded(0) + recorded(1, leak_mib))
    assert line.startswith("the memory of stage 1 grows by")


def test_descriptors_and_threads_that_stay_are_found() -> None:
    (line,) = complaints(recorded(descriptors=70))
    assert line == "stage 0 had 60 open descriptors and then 70"
    (line,) = complaints(recorded(threads=30))
    assert line == "stage 0 had 20 threads and then 30"


def test_a_trend_needs_two_samples_of_each_stage() -> None:
    with pytest.raises(ValueError, match="too short"):
        trends(recorded(0) + recorded(1)[:13], 450)


def test_a_sample_of_this_process() -> None:
    sample = Sample.of(os.getpid(), 2, 1.5)
    assert (sample.stage, sample.at_s) == (2, 1.5)
    assert sample.rss_mib > 10
    assert min(sample.descriptors, sample.threads) >= 1


def at_rest() -> list[Snapshot]:
    """Two stages that have taken everything; the second one waits for its next requests."""
    first, second = Telemetry(0, 0), Telemetry(1, 0)
    first.sent = {"requests": ChannelCounters(messages=9), "proxy": ChannelCounters(messages=5)}
    first.received = {"output": ChannelCounters(messages=5, waits=5)}
    second.sent = {"output": ChannelCounters(messages=5)}
    second.received = {
        "requests": ChannelCounters(messages=9, waits=10),
        "proxy": ChannelCounters(messages=5, waits=5),
    }
    return [first.snapshot(), second.snapshot()]


def test_at_rest_nothing_is_in_flight() -> None:
    assert in_flight(at_rest()) == {}


def test_a_message_on_its_way_and_one_that_nobody_takes_are_found() -> None:
    first, second = at_rest()
    first.sent["proxy"]["messages"] += 1
    assert in_flight([first, second]) == {"proxy": (1, 0)}
    second.received["proxy"]["messages"] += 1
    assert in_flight([first, second]) == {"proxy": (0, 1)}


def test_lines_that_are_errors() -> None:
    log = Path(__file__).with_name("lines.log").read_text()
    assert errors_in(log) == [line for line in log.splitlines() if line.endswith("<- wrong")]
