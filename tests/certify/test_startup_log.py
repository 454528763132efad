"""What a log says about a start and an end."""

from __future__ import annotations

import pytest

from sglang_npu_pp.tools.certify.startup_log import likely_cause, reached


def test_the_last_part_of_a_start_is_named() -> None:
    assert reached("") == "spawning"
    assert reached("Load weight begin. avail mem\nLoad weight end.\n") == "memory pools"
    assert reached("Load weight end.\nThe server is fired up and ready to roll!\n") == "ready"


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        ("all is well\nwarning: not this\n", ""),
        ("Traceback\nValueError: one\nmore\nOSError: two\nbye\n", "OSError: two"),
        (
            "launch_server.py: error: unrecognized arguments: --x\n",
            "launch_server.py: error: unrecognized arguments: --x",
        ),
        (
            "sglang_npu_pp.errors.SequenceError: stage 0\nsglang_npu_pp.errors.PeerLostError: stage 1\n",
            "sglang_npu_pp.errors.SequenceError: stage 0",
        ),
        ("sglang_npu_pp.errors.PeerLostError: stage 1\n", "sglang_npu_pp.errors.PeerLostError: stage 1"),
        ("[PP0] an Error: within a line\n", ""),
    ],
)
def test_the_cause_of_an_end_is_the_last_error_that_no_other_explains(log: str, cause: str) -> None:
    assert likely_cause(log) == cause
