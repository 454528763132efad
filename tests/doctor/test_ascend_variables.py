"""Advice on variables of HCCL and torch_npu: what they cost, and which values are refused."""

from __future__ import annotations

import pytest

from sglang_npu_pp.tools.doctor import ascend_variables
from sglang_npu_pp.tools.doctor.findings import Finding, Level


def found(subject: str, **environ: str) -> Finding:
    (finding,) = (each for each in ascend_variables.check(environ) if each.subject == subject)
    return finding


def test_nothing_set_is_nothing_wrong() -> None:
    findings = ascend_variables.check({})
    assert {finding.level for finding in findings} == {Level.OK, Level.NOTE}
    assert len({finding.subject for finding in findings}) == len(ascend_variables.RULES) + 1
    assert findings[-1].subject == "marks"


@pytest.mark.parametrize(
    ("environ", "megabytes"),
    [
        ({}, 40),  # 2 x 20: P2P_HCCL_BUFFSIZE
        ({"P2P_HCCL_BUFFSIZE": "64"}, 128),
        ({"P2P_HCCL_BUFFSIZE": "0"}, 400),  # 2 x 200: HCCL_BUFFSIZE
        ({"P2P_HCCL_BUFFSIZE": "0", "HCCL_BUFFSIZE": "50"}, 100),
        ({"HCCL_BUFFSIZE": "1000"}, 40),
    ],
)
def test_what_a_pair_of_stages_costs(environ: dict[str, str], megabytes: int) -> None:
    assert ascend_variables.pair_group_mb(environ) == megabytes
    text = found("P2P_HCCL_BUFFSIZE", **environ).text
    assert f"{megabytes} MB on the first and the last stage, {2 * megabytes} MB between" in text


@pytest.mark.parametrize(
    ("name", "text", "level"),
    [
        ("P2P_HCCL_BUFFSIZE", "-1", Level.WRONG),
        ("P2P_HCCL_BUFFSIZE", "0", Level.WARNING),
        ("HCCL_BUFFSIZE", "0", Level.WRONG),
        ("HCCL_BUFFSIZE", "1e3", Level.WRONG),
        ("MULTI_STREAM_MEMORY_REUSE", "4", Level.WRONG),
        ("MULTI_STREAM_MEMORY_REUSE", "2", Level.OK),
        ("PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True", Level.OK),
        ("PYTORCH_NPU_ALLOC_CONF", "expandable_segments:True,max_split_size_mb:256", Level.WARNING),
        ("PYTORCH_NPU_ALLOC_CONF", "pin_memory_expandable_segments:True", Level.WARNING),
        ("PYTORCH_NO_NPU_MEMORY_CACHING", "1", Level.WARNING),
        ("HCCL_CONNECT_TIMEOUT", "60", Level.WRONG),
        ("HCCL_CONNECT_TIMEOUT", "600", Level.OK),
        ("HCCL_EXEC_TIMEOUT", "0", Level.WARNING),
        ("HCCL_EXEC_TIMEOUT", "68", Level.WARNING),
        ("HCCL_EXEC_TIMEOUT", "soon", Level.WRONG),
        ("ASCEND_LAUNCH_BLOCKING", "1", Level.WARNING),
        ("ASCEND_LAUNCH_BLOCKING", "0", Level.OK),
        ("TASK_QUEUE_ENABLE", "0", Level.WARNING),
        ("TASK_QUEUE_ENABLE", "2", Level.NOTE),
        ("TASK_QUEUE_ENABLE", "3", Level.WRONG),
        ("HCCL_BLOCKING_WAIT", "1", Level.WARNING),
        ("TORCH_HCCL_BLOCKING_WAIT", "true", Level.WARNING),
        ("HCCL_OP_EXPANSION_MODE", "AIV", Level.OK),
        ("HCCL_OP_EXPANSION_MODE", "aiv", Level.WARNING),
        ("GLOO_SOCKET_IFNAME", "lo", Level.OK),
        ("GLOO_SOCKET_IFNAME", "none0", Level.WRONG),
        ("HCCL_SOCKET_IFNAME", "=lo", Level.OK),
        ("HCCL_SOCKET_IFNAME", "^none", Level.OK),
    ],
)
def test_values(name: str, text: str, level: Level) -> None:
    finding = found(name, **{name: text})
    assert finding.level is level, finding
    assert level is Level.OK or finding.text.endswith((".", "it to 1."))


def test_an_interface_that_does_not_exist_is_answered_with_those_that_do() -> None:
    text = found("GLOO_SOCKET_IFNAME", GLOO_SOCKET_IFNAME="eth77").text
    assert text.startswith("'eth77' is no interface of this machine, which has ")
    assert "lo" in text
