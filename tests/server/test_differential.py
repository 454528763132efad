"""The same requests to SGLang 0.5.21, unpatched and patched: equal tokens, equal log-probabilities.

The model has random weights: on it, faults at the stage boundary that leave a trained model's answers alone
change the text (field notes, section 5).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest

from . import battery
from .conftest import DIGITS_MODEL, RANDOM_MODEL, Launcher

pytestmark = pytest.mark.server


class Layout(NamedTuple):
    """A server as it is compared with its twin."""

    name: str
    tp: int
    pp: int
    options: dict[str, Any]  # for both servers
    patched_env: dict[str, str] = {}  # noqa: RUF012 - a NamedTuple default, never written


def depth(value: int) -> tuple[str, str]:
    return ("--pp-async-batch-depth", str(value))


SKIP_OUTPUTS = {"SGLANG_PP_SKIP_PURE_CHUNKED_OUTPUT_COMM": "1"}
LAYOUTS = [
    Layout("tp1-pp2", 1, 2, {}),
    Layout("tp1-pp2-depth1-skip", 1, 2, {"args": depth(1), "env": SKIP_OUTPUTS}),
    Layout("tp2-pp2", 2, 2, {}, {"SGLANG_NPU_PP_HOST_TRANSPORT": "tcp"}),
    Layout("tp2-pp2-depth1-device-lane", 2, 2, {"args": depth(1)}, {"SGLANG_NPU_PP_PROXY_LANE": "device"}),
    Layout("tp1-pp4", 1, 4, {}, {"SGLANG_NPU_PP_CHECKSUM": "full"}),
    Layout("tp1-pp4-depth1-trained", 1, 4, {"args": depth(1), "model": DIGITS_MODEL}),
]


def serve(launcher: Launcher, layout: Layout, *, patched: bool) -> list[list[dict[str, Any]]]:
    """Results of the battery one by one and sixteen at a time."""
    options = {"model": RANDOM_MODEL, **layout.options}
    if patched:
        options["env"] = {**options.get("env", {}), **layout.patched_env}
    server = launcher.start(layout.tp, layout.pp, patched=patched, **options)
    try:
        return [battery.run(server), battery.run(server, concurrency=16, rounds=2 if patched else 1)]
    finally:
        launcher.stop_all()


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_patched_answers_equal_upstreams(layout: Layout, make_launcher: Callable[[str], Launcher]) -> None:
    (expected,), (upstream_16,) = serve(make_launcher("upstream"), layout, patched=False)
    (one_by_one,), concurrent = serve(make_launcher("patched"), layout, patched=True)
    assert not battery.differences(expected, one_by_one)
    noise = battery.differences(expected, upstream_16)
    assert not noise, "upstream itself differs between 1 and 16 at a time"
    for round_ in concurrent:
        assert not battery.differences(expected, round_)
