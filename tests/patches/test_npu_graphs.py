"""Where the host takes lengths from, and what it does in the place of waiting for the previous replay.

That the order holds on a device is shown on simulated Ascend, by tests/ascend/test_graphs.py.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sglang_npu_pp.patches import npu_graphs
from sglang_npu_pp.patches.npu_graphs import execute, replay_with_input_update


def batch_of(mode: str = "decode", on_host: bool = True) -> Any:
    """Lengths on the "device" differ from the host's, which has one more, so that a test sees which were
    read."""
    return SimpleNamespace(
        seq_lens=torch.tensor([-1, -2]),
        seq_lens_cpu=torch.tensor([5, 9, 7]) if on_host else None,
        forward_mode=SimpleNamespace(is_decode_or_idle=lambda: mode == "decode"),
    )


def lengths_read(runner: Any, forward_batch: Any, proxies: Any = None) -> list[int]:
    """Upstream's function, as far as it matters here."""
    assert torch.tensor([3]).cpu().tolist() == [3]
    lengths: list[int] = forward_batch.seq_lens.cpu().tolist()
    return lengths


def test_lengths_of_decode_come_from_the_host() -> None:
    assert execute(lengths_read, None, batch_of(), None) == [5, 9]


@pytest.mark.parametrize("batch", [batch_of("target_verify"), batch_of(on_host=False)])
def test_lengths_that_the_host_may_not_know_are_read(batch: Any) -> None:
    assert execute(lengths_read, None, batch) == [-1, -2]


class Recorder:
    """Streams, an event and upstream's backend: what is done, in order."""

    def __init__(self, update_stream: bool = True) -> None:
        self.done: list[str] = []
        self.streams = SimpleNamespace(record=self._record)
        stream = SimpleNamespace(wait_event=lambda event: self.done.append(f"updates wait for {event.name}"))
        mode = SimpleNamespace(update_stream=stream) if update_stream else None
        self.backend = SimpleBackend({4: SimpleNamespace(graph_dispatch_mode=mode)})

    def replay(self, backend: Any, shape_key: int, seq_lens: list[int]) -> str:
        if backend._rebind_fence is not None:
            self.done.append("the host waits")
        backend._rebind_fence = "upstream's event"
        self.done.append(f"replay {shape_key} {seq_lens}")
        return "output"

    def _record(self) -> Any:
        name = f"event {sum(entry.startswith('replay') for entry in self.done)}"
        return SimpleNamespace(name=name, synchronize=lambda: self.done.append(f"the host waits for {name}"))


class SimpleBackend:
    def __init__(self, graphs: dict[int, Any]) -> None:
        self._graphs, self._rebind_fence = graphs, None


def replay_twice(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(npu_graphs, "current", lambda: recorder)
    for lengths in ([1], [2]):
        assert replay_with_input_update(recorder.replay, recorder.backend, 4, seq_lens=lengths) == "output"
    return recorder.done


def test_updates_wait_for_the_previous_replay_and_the_host_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    assert replay_twice(Recorder(), monkeypatch) == [
        "updates wait for event 0",  # behind all that was launched before
        "replay 4 [1]",
        "updates wait for event 1",
        "replay 4 [2]",
    ]


def test_the_host_waits_where_updates_have_no_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    done = replay_twice(Recorder(update_stream=False), monkeypatch)
    assert done == [
        "the host waits for event 0",
        "replay 4 [1]",
        "the host waits for event 1",
        "replay 4 [2]",
    ]
