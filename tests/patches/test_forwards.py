"""A forward is ready before what it waits for has come: the order, with stand-ins of SGLang's runners.

That what is planned is what upstream plans at the launch is shown in servers (tests/server/test_ahead.py),
and that graphs get their proxies by answers on the simulated Ascend (tests/server/test_ascend.py).
"""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode, PPProxyTensors

from sglang_npu_pp.patches import forwards
from sglang_npu_pp.patches.forwards import Incoming

HIDDEN = torch.arange(6.0).reshape(3, 2)  # of two requests; the third row is padding


class Runner:
    """Notes what is asked of it."""

    def __init__(self, device: str, replays: bool) -> None:
        self.device, self.steps = device, list[str]()
        self.model, self.hisparse_coordinator = SimpleNamespace(), None
        self.inputs = {"hidden_states": torch.full((4, 2), -1.0)}
        self.attn_backend = SimpleNamespace(
            init_forward_metadata=lambda batch: self.steps.append("attention planned")
        )
        self.decode_cuda_graph_runner = SimpleNamespace(
            can_run_graph=lambda batch: replays,
            load_batch=lambda batch: self.steps.append("graph loaded"),
            buffers=SimpleNamespace(pp_proxy_tensors=self.inputs),
        )

    def launch(self, mode: ForwardMode, **model: Any) -> list[str]:
        self.model = SimpleNamespace(**model)
        batch = SimpleNamespace(
            forward_mode=mode, mark_forward_metadata_ready=lambda **_: self.steps.append("marked")
        )

        def wait() -> PPProxyTensors:
            self.steps.append("proxies")
            return PPProxyTensors({"hidden_states": HIDDEN, "not an input": HIDDEN})

        def original(runner: Any, batch: Any, pp_proxy_tensors: PPProxyTensors) -> None:
            assert pp_proxy_tensors.tensors["hidden_states"] is HIDDEN
            self.steps.append("forward")

        forwards.forward(original, self, batch, pp_proxy_tensors=Incoming(wait))
        return self.steps


@pytest.mark.parametrize("device", ["npu", "cuda", "cpu"])
def test_a_decode_is_planned_before_its_proxies(device: str) -> None:
    assert Runner(device, replays=False).launch(ForwardMode.DECODE) == [
        *("attention planned", "marked", "proxies", "forward")
    ]


@pytest.mark.parametrize("device", ["npu", "cuda"])
def test_a_graph_is_loaded_before_its_proxies(device: str) -> None:
    """On an NPU they are put into its inputs here, since its replay of a planned batch leaves them out."""
    runner = Runner(device, replays=True)
    assert runner.launch(ForwardMode.DECODE) == ["graph loaded", "marked", "proxies", "forward"]
    expected = torch.cat([HIDDEN, torch.full((1, 2), -1.0)])
    assert torch.equal(runner.inputs["hidden_states"], expected) is (device == "npu")


def test_what_is_planned_elsewhere_is_left_to_upstream() -> None:
    """A compiled graph on a CPU, a model with plans of its own, a prefill."""
    assert Runner("cpu", replays=True).launch(ForwardMode.DECODE) == ["proxies", "forward"]
    for method in ("prepare_forward_batch", "prepare_for_forward"):
        assert Runner("npu", replays=True).launch(ForwardMode.DECODE, **{method: print}) == [
            *("proxies", "forward")
        ]
    assert Runner("npu", replays=True).launch(ForwardMode.EXTEND) == ["proxies", "forward"]


def test_what_stands_for_ids_are_ids_of_every_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs keep them as padding: rows of requests, which grow beyond a vocabulary, would end a server."""
    from sglang.srt.model_executor import forward_batch_info

    class Planned:
        @staticmethod
        def init_new(batch: Any, runner: Any, **options: bool) -> Any:
            return SimpleNamespace(forward_mode=ForwardMode.EXTEND, input_ids=batch.input_ids)

    monkeypatch.setattr(forward_batch_info, "ForwardBatch", Planned)
    scheduler = SimpleNamespace(
        model_worker=SimpleNamespace(model_runner=Runner("npu", replays=True)),
        forward_stream_ctx=nullcontext(),
        _pp_wait_forward_dependencies=lambda: None,
    )
    batch = SimpleNamespace(req_pool_indices=torch.tensor([2047, 5]), input_ids="those of the last launch")
    planned = forwards.planned_without_ids(scheduler, batch)
    assert planned.input_ids.tolist() == [0, 0]
    assert batch.input_ids is None


def test_upstreams_own_proxies_are_left_alone() -> None:
    runner: Any = Runner("npu", replays=True)
    seen = []
    forwards.forward(
        lambda runner, batch, **options: seen.append(options), runner, None, pp_proxy_tensors="given"
    )
    assert seen == [{"pp_proxy_tensors": "given"}]
    assert not runner.steps


def test_a_worker_that_looks_at_its_proxies_waits_for_them_once() -> None:
    waits: list[str] = []

    def wait() -> PPProxyTensors:
        waits.append("proxies")
        return PPProxyTensors({"hidden_states": HIDDEN})

    incoming = Incoming(wait)
    assert not incoming.taken
    assert incoming["hidden_states"] is HIDDEN
    assert incoming.taken
    assert incoming.tensors == incoming.take().tensors == {"hidden_states": HIDDEN}
    assert waits == ["proxies"]


PLAIN: dict[str, Any] = {
    "is_generation": True,
    "dllm_config": None,
    "require_mlp_sync": False,
}


@pytest.mark.parametrize(
    "change",
    [
        {"is_generation": False},
        {"dllm_config": "a config"},
        {"require_mlp_sync": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_server_whose_proxies_are_looked_at_before_its_model_waits_first(change: dict[str, Any]) -> None:
    assert forwards.waits_last(SimpleNamespace(**PLAIN))
    assert not forwards.waits_last(SimpleNamespace(**{**PLAIN, **change}))
