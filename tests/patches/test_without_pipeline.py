"""Where a server stays on upstream's path, every patched function is upstream's: same call, same answer."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from sglang.srt import runtime_context
from sglang.srt.distributed import parallel_state

from sglang_npu_pp.errors import PeerLostError
from sglang_npu_pp.patches import PATCHES, ending, pipeline, startup
from sglang_npu_pp.patching import Patch, bind

# These run before it is known whether there will be a pipeline, or where there is none by nature; below.
STARTS = ("init_idle_sleeper", "init_torch_distributed", "_launch_scheduler_processes")
REPLACED = [patch for patch in PATCHES if not patch.adds and not patch.target.endswith(STARTS)]


@pytest.fixture(autouse=True)
def upstreams_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after the start of a server whose configuration has no asynchronous path."""
    monkeypatch.setattr(pipeline, "_current", None)
    monkeypatch.setattr(ending, "_node", None)
    monkeypatch.setattr(pipeline, "_left_to_upstream", False)
    pipeline.leave_to_upstream()


class Original:
    """Stands for upstream's function: remembers how it was called."""

    def __init__(self, answer: Any = None) -> None:
        self.answer, self.calls = answer or object(), list[tuple[Any, ...]]()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls.append((args, kwargs))
        return self.answer


@pytest.mark.parametrize("patch", REPLACED, ids=lambda patch: patch.target.rpartition(".")[2])
def test_a_patched_function_is_upstreams(patch: Patch) -> None:
    """Its arguments are not looked at, so that it does not matter what a release calls them."""
    original = Original()
    for args, kwargs in (
        ((object(),), {}),
        ((object(), object(), object()), {}),
        ((object(),), {"a new argument": object()}),
    ):
        assert bind(patch, original)(*args, **kwargs) is original.answer
        assert original.calls.pop() == (args, kwargs)


def test_only_what_upstream_does_not_have_is_added() -> None:
    added = {patch.target.rpartition(".")[2] for patch in PATCHES if patch.adds}
    assert added == {"isend_tensor_dict", "irecv_tensor_dict"}


def test_a_failure_of_upstreams_loop_is_upstreams() -> None:
    """`dispatch_event_loop` ends a node that has lost a peer of ours: without a pipeline there are none."""

    def fail(scheduler: Any) -> Any:
        raise PeerLostError("somebody else's")

    with pytest.raises(PeerLostError, match="somebody else's"):
        ending.dispatch_event_loop(fail, object())


def test_the_start_of_a_server_with_unsupported_speculation_leaves_everything_to_upstream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pipeline, "_left_to_upstream", False)
    parallel = SimpleNamespace(pp_rank=0, tp_rank=0, pp_size=2)
    monkeypatch.setattr(runtime_context, "get_parallel", lambda: parallel)
    monkeypatch.setattr(parallel_state, "model_parallel_is_initialized", lambda: True)
    agreed = []
    monkeypatch.setattr(startup, "_agree_with_all_ranks", lambda settings, reason: agreed.append(reason))
    arguments = SimpleNamespace(pp_size=2, speculative_algorithm="DFLASH")
    speculating = SimpleNamespace(
        server_args=arguments,
        idle_sleeper=None,
    )
    original = Original()
    startup.init_idle_sleeper(original, speculating)
    assert original.calls == [((speculating,), {})]
    assert agreed == ["speculative decoding by DFLASH with pipeline parallelism is not supported yet"]
    assert pipeline.current_or_none() is None
    assert speculating.idle_sleeper is None
    assert not pipeline.is_ours()


def test_a_launcher_of_a_server_with_speculation_calls_upstreams(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    monkeypatch.setattr(ending, "Watch", lambda *args, **kwargs: started.append(args))
    arguments = SimpleNamespace(pp_size=2, speculative_algorithm="DFLASH")
    ports = SimpleNamespace(instance_id="test")
    original = Original((SimpleNamespace(), ["process"]))
    result = ending.launch_scheduler_processes(original, "Engine", arguments, ports, 1, a=2)
    assert result == original.answer
    assert original.calls == [(("Engine", arguments, ports, 1), {"a": 2})]
    assert started == []


def test_a_group_without_lanes_receives_as_upstream_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor by tensor: each is waited for before the next is posted."""
    from sglang.srt.distributed.parallel_state import GroupCoordinator, TensorMetadata

    steps: list[str] = []
    work = SimpleNamespace(wait=lambda: steps.append("wait"))

    def irecv(*args: Any, **kwargs: Any) -> Any:
        steps.append("post")
        return work

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "irecv", irecv)
    described = [(name, TensorMetadata("cpu", torch.float32, torch.Size([2]))) for name in "ab"]
    group: Any = SimpleNamespace(
        world_size=2,
        rank_in_group=1,
        ranks=[0, 1],
        device_group=None,
        cpu_group=None,
        recv_object=lambda src: described,
    )
    (patch,) = (patch for patch in PATCHES if patch.target.endswith("GroupCoordinator.recv_tensor_dict"))
    original = getattr(GroupCoordinator.recv_tensor_dict, "__wrapped__", GroupCoordinator.recv_tensor_dict)
    assert list(bind(patch, original)(group)) == ["a", "b"]
    assert steps == ["post", "wait", "post", "wait"]
