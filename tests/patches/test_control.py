"""The answers to control requests: what upstream's own answers say when some rank failed."""

from __future__ import annotations

import asyncio
import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import HTTPException
from sglang.srt.managers import io_struct

from sglang_npu_pp.outcomes import Outcome
from sglang_npu_pp.patches import control

TOLD = "stage 1 rank 0: no such file"


@pytest.mark.parametrize("succeeded_here", [True, False], ids=["here it succeeded", "here it raised"])
def test_an_answer_that_can_say_no_does(succeeded_here: bool) -> None:
    request = io_struct.UpdateWeightFromDiskReqInput(model_path="new")
    here = io_struct.UpdateWeightFromDiskReqOutput(success=True, message="Succeeded.")
    answer = control._refusal(request, here if succeeded_here else None, TOLD)
    assert (answer.success, answer.message) == (False, TOLD)


def test_an_adapter_that_was_taken_back_is_not_listed() -> None:
    request = io_struct.LoadLoRAAdapterReqInput(lora_name="one", lora_path="new")
    here = io_struct.LoRAUpdateOutput(success=True, loaded_adapters={"one": "new", "old": "path"})
    answer = control._refusal(request, here, TOLD)
    assert (answer.success, answer.error_message) == (False, TOLD)
    assert answer.loaded_adapters == {"old": "path"}
    assert control._refusal(request, None, TOLD).error_message == TOLD


@pytest.mark.parametrize(
    "kind",
    ["ExpertDistributionReqOutput", "ReleaseMemoryOccupationReqOutput", "GetWeightsByNameReqOutput"],
)
def test_an_answer_without_words_becomes_an_error_of_the_request(kind: str) -> None:
    refusal = control._refusal(_named(kind), None, TOLD)

    async def replies(communicator: Any, asked: Any) -> list[Any]:
        return [refusal]

    with pytest.raises(HTTPException) as raised:
        asyncio.run(control.collect_replies(replies, None, None))
    assert raised.value.detail == f"sglang-npu-pp: {TOLD}"


def _named(kind: str) -> Any:
    """A request whose answer is of this kind."""
    return type(kind.removesuffix("Output"), (), {})()


def test_answers_that_are_none_of_ours_pass() -> None:
    usual = [io_struct.FlushCacheReqOutput(success=True, rid="1"), io_struct.SlowDownReqOutput()]

    async def replies(communicator: Any, asked: Any) -> list[Any]:
        return usual

    assert asyncio.run(control.collect_replies(replies, None, None)) is usual


def test_a_request_that_has_no_answer_gets_none() -> None:
    assert control._refusal(io_struct.ConfigureLoggingReq(), None, TOLD) is None


def test_an_adapter_is_taken_back_where_it_was_loaded() -> None:
    """LoRA does not start on a CPU (upstream asks for pinned memory), so this is without a server."""
    unloaded: list[Any] = []
    scheduler = SimpleNamespace(tp_worker=SimpleNamespace(unload_lora_adapter=unloaded.append))
    request = io_struct.LoadLoRAAdapterReqInput(lora_name="one", lora_path="new", lora_id="7")
    outcomes = [Outcome(0, 0), Outcome(1, 0, "no such file")]
    for stage in (0, 1):
        pipeline: Any = SimpleNamespace(link=SimpleNamespace(stage=stage, rank=0))
        told = control._undo(scheduler, pipeline, None, request, outcomes, None)
        assert told == "; it was undone where it had succeeded"
    assert [(each.lora_name, each.lora_id) for each in unloaded] == [("one", "7")]


def test_consequences_are_left_for_later() -> None:
    request = io_struct.UpdateWeightFromDiskReqInput(model_path="new", weight_version="2")
    alone = control._without_consequences(request)
    assert (alone.model_path, alone.flush_cache, alone.weight_version) == ("new", False, None)
    assert (request.flush_cache, request.weight_version) == (True, "2")
    other = io_struct.SlowDownReqInput(forward_sleep_time=1.0)
    assert control._without_consequences(other) is other


def test_a_weight_of_another_stage() -> None:
    here = io_struct.GetWeightsByNameReqOutput(parameter=None)
    assert control._answer(here, [Outcome(0, 0), Outcome(1, 0, value=[1.0])]).parameter == [1.0]
    own = io_struct.GetWeightsByNameReqOutput(parameter=[2.0])
    assert control._answer(own, [Outcome(0, 0, value=[2.0])]) is own


# --- 0.5.14, whose messages are dataclasses -----------------------------------------------------------


@dataclasses.dataclass
class OldOutput:
    success: bool
    message: str
    loaded_adapters: dict[str, str] = dataclasses.field(default_factory=dict)
    rid: str | None = dataclasses.field(default=None, kw_only=True)


@dataclasses.dataclass
class OldRequest:
    path: str
    flush_cache: bool = True
    weight_version: str | None = "2"


def test_messages_of_old_releases_are_changed_alike() -> None:
    here = OldOutput(True, "Succeeded.")
    answer = control._refusal(OldRequest("new"), here, TOLD)
    assert (answer.success, answer.message) == (False, TOLD)
    assert here == OldOutput(True, "Succeeded.")
    later = control._without_consequences(OldRequest("new"))
    assert later == OldRequest("new", flush_cache=False, weight_version=None)
    assert control._required(OldOutput) == ["success", "message"]
