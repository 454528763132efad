"""What goes wrong in HCCL on simulated Ascend: calls that differ, peers that are missing or killed."""

from __future__ import annotations

from typing import Any

import pytest
import torch.distributed as dist

from ascend_sim.controls import Simulator
from rig.harness import Call, Here
from rig.npu_ranks import run_program, start_team

from .hccl_ranks import (
    EXCEPTION,
    LIMIT_S,
    TIME_OUT,
    numbered,
    receive_numbers,
    send_numbers,
    synchronize,
    wait_for,
)

pytestmark = pytest.mark.thorough

DIFFERENT_CALLS = {
    "sizes": ("all_reduce(8)", "all_reduce(9)", "calls HcclAllReduce of 9 int32, sum"),
    "types": ("all_reduce(8)", "all_reduce(8, FLOAT32)", "calls HcclAllReduce of 8 float32, sum"),
    "reductions": ("all_reduce(8)", "all_reduce(8, INT32, MAXIMUM)", "of 8 int32, maximum"),
    "roots": ("broadcast(8, 0)", "broadcast(8, 1)", "of 8 int32, root 0"),
    "functions": ("all_reduce(8)", "broadcast(8, 1)", "calls HcclBroadcast of 8 int32, root 1"),
    "messages": ("send(8, 1)", "receive(9, 0)", "is sent with 32 bytes and received with 36"),
    "long messages": (
        "send(100_000, 1)",
        "receive(99_999, 0)",
        "sent with 400000 bytes and received with 399996",
    ),
}


@pytest.mark.parametrize("case", DIFFERENT_CALLS)
def test_calls_that_differ_fail_on_both_sides(case: str) -> None:
    one, other, sentence = DIFFERENT_CALLS[case]
    ended = run_program(
        f"""
from tests.ascend_sim.hccl_direct import FLOAT32, INT32, MAXIMUM, members
first, second = both = members(2)
first.{one}
second.{other}
assert [member.synchronize() for member in both] == [{EXCEPTION}, {EXCEPTION}]
assert all(member.async_error() for member in both)
"""
    )
    assert ended.returncode == 0, ended.stderr
    explained = [line for line in ended.stderr.splitlines() if sentence in line]
    assert {line.split("given up by ")[1][:6] for line in explained} == {"rank 0", "rank 1"}, ended.stderr


def test_parts_that_differ_fail_where_they_are_taken() -> None:
    """The member whose own parts are right may end before; it learns of it from HcclGetCommAsyncError."""
    ended = run_program(
        f"""
from tests.ascend_sim.hccl_direct import members
first, second = both = members(2)
first.all_to_all([0, 3], [0, 1])
second.all_to_all([1, 0], [4, 0])
assert second.synchronize() == {EXCEPTION}
assert all(member.async_error() for member in both)
first.all_reduce(8)
assert first.synchronize() == {EXCEPTION}
"""
    )
    assert ended.returncode == 0, ended.stderr
    assert "rank 1 of unnamed" in ended.stderr
    assert "expects 16 bytes of rank 0 in HcclAlltoAllV of int32, and gets 12" in ended.stderr


def test_a_message_and_a_collective_wait_for_each_other() -> None:
    """That is a deadlock of the program, not a difference between calls."""
    ended = run_program(
        f"""
import time
from ascend_sim.controls import Simulator
from tests.ascend_sim.hccl_direct import members
first, second = both = members(2)
first.send(8, 1)
second.all_reduce(8)
with Simulator() as simulator:
    for _ in range(1000):
        running = [stream.running for stream in simulator.listing().streams]
        if sum(task is not None and task.waiting is not None for task in running) == 2:
            break
        time.sleep(0.01)
    print(sorted(task.waiting.reason.split(": ")[1] for task in running))
    assert [member.async_error() for member in both] == [0, 0]
first.all_reduce(8)
second.receive(8, 0)
assert [member.synchronize() for member in both] == [{TIME_OUT}, {TIME_OUT}]
""",
        hccl_exec_timeout=1,
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "['its HcclRecv has not begun', 'rank 0 not in it yet']\n"


def test_operations_of_a_destroyed_communicator_end() -> None:
    ended = run_program(
        f"""
from tests.ascend_sim.hccl_direct import members
first, second = members(2)
first.send(8, 1)
first.destroy()
assert first.synchronize() == {EXCEPTION}
second.destroy()
"""
    )
    assert ended.returncode == 0, ended.stderr
    assert "given up because the communicator is destroyed" in ended.stderr


def test_members_that_disagree_about_their_number_do_not_meet() -> None:
    ended = run_program(
        """
import ctypes
from tests.ascend_sim.hccl_direct import ROOT_INFO_BYTES
hccl, communicator = ctypes.CDLL("libhccl.so"), ctypes.c_void_p()
root_info = ctypes.create_string_buffer(ROOT_INFO_BYTES)
assert hccl.HcclGetRootInfo(root_info) == 0
join = hccl.HcclCommInitRootInfo
assert join(2, root_info, 0, ctypes.byref(communicator)) == 9  # HCCL_E_TIMEOUT: nobody else came
assert join(3, root_info, 1, ctypes.byref(communicator)) == 11  # HCCL_E_TCP_CONNECT: the root has given up
assert join(2, ctypes.create_string_buffer(ROOT_INFO_BYTES), 0, ctypes.byref(communicator)) == 1
""",
        hccl_connect_timeout=1,
    )
    assert ended.returncode == 0, ended.stderr
    assert "rank 1 not here yet, given up after 1 s (HCCL_CONNECT_TIMEOUT)" in ended.stderr
    assert "has ended or has given up" in ended.stderr


# --- through torch_npu ---------------------------------------------------------------------------


def assert_fails(call: Call[Any], text: str) -> None:
    """The call raises an error with that text, unless torch_npu's watchdog takes the process down before."""
    with pytest.raises((RuntimeError, AssertionError), match=rf"{text}|SIGABRT"):
        call.result(LIMIT_S)


def one_more(here: Here) -> None:
    dist.all_reduce(numbered(here, 1, here.index + 1))
    synchronize(here)


def test_the_watchdog_of_torch_npu_reports_what_failed(capfd: pytest.CaptureFixture[str]) -> None:
    team = start_team(2, process_group=True)
    try:
        for call in [rank.start(one_more) for rank in team.ranks]:
            assert_fails(call, str(EXCEPTION))
        for rank in team.ranks:
            rank.await_end()  # the watchdog takes the process down
    finally:
        team.close()
    errors = capfd.readouterr().err
    assert "calls HcclAllReduce of 1 int32, sum" in errors
    assert "calls HcclAllReduce of 2 int32, sum" in errors
    assert "got ERROR via HcclGetCommAsyncError" in errors


def exchange_once(here: Here) -> None:
    if here.index == 0:
        receive_numbers(here, 1, [4])
    else:
        send_numbers(here, 0, [4])


@pytest.mark.parametrize("moment", ["before it sends", "in the middle of a message"])
def test_a_peer_that_is_killed(moment: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The other side ends within HCCL_EXEC_TIMEOUT, and nothing is left behind that could hang it."""
    team = start_team(2, process_group=True, hccl_exec_timeout=2)
    try:
        team.each(exchange_once)
        survivor, victim = team.ranks
        with Simulator(survivor.pid) as simulator, Simulator(victim.pid) as theirs:
            receiving = survivor.start(receive_numbers, 1, [300_001])
            reason = "its HcclSend has not begun"
            if moment != "before it sends":
                theirs.links(us_per_message=60_000_000)
                victim.start(send_numbers, 0, [300_001])
                reason = "its message has not arrived"
            wait_for(simulator, "HcclRecv", reason)
            victim.kill()
            assert_fails(receiving, str(TIME_OUT))
        survivor.await_end()
    finally:
        team.close()
    errors = capfd.readouterr().err
    assert f"{reason}, given up after 2 s (HCCL_EXEC_TIMEOUT)" in errors
    assert "got ERROR via HcclGetCommAsyncError" in errors


def test_a_cold_communicator_that_nobody_else_joins(capfd: pytest.CaptureFixture[str]) -> None:
    team = start_team(2, process_group=True, hccl_connect_timeout=1)
    try:
        assert_fails(team.ranks[0].start(send_numbers, 1, [4]), "timeout")
    finally:
        team.close()
    assert "rank 1 not here yet, given up after 1 s (HCCL_CONNECT_TIMEOUT)" in capfd.readouterr().err
