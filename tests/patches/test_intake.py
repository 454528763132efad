"""Which requests stage 0 takes into one iteration."""

from __future__ import annotations

from typing import Any

from sglang.srt.managers import io_struct

from sglang_npu_pp.patches.intake import Intake, needs_agreement


def abort(name: str) -> Any:
    return io_struct.AbortReq(rid=name)


def update(path: str) -> Any:
    return io_struct.UpdateWeightFromDiskReqInput(model_path=path)


def test_a_control_request_is_the_last_of_its_list() -> None:
    first, second, third = abort("1"), abort("2"), abort("3")
    one, another = update("one"), update("another")
    intake = Intake()
    assert intake.next_list([first, one, second, another]) == [first, one]
    assert intake.keeps_some
    assert intake.next_list([third]) == [second, another]
    assert intake.next_list([]) == [third]
    assert not intake.keeps_some
    assert intake.next_list([]) == []


def test_which_requests_need_agreement() -> None:
    """A new one does, until it has been shown that it cannot end differently on two stages."""
    for kind in (
        io_struct.LoadLoRAAdapterReqInput,
        io_struct.UpdateWeightsFromTensorReqInput,
        io_struct.ReleaseMemoryOccupationReqInput,
        io_struct.ExpertDistributionReq,
        io_struct.ProfileReq,
        io_struct.RpcReqInput,
    ):
        assert needs_agreement(kind)
    for kind in (
        io_struct.TokenizedGenerateReqInput,
        io_struct.AbortReq,
        io_struct.OpenSessionReqInput,
        io_struct.FlushCacheReqInput,
        io_struct.GetInternalStateReq,
    ):
        assert not needs_agreement(kind)
    assert not needs_agreement(str)
