"""What is said of installed versions."""

from __future__ import annotations

import sys

import pytest

from sglang_npu_pp.tools.doctor import versions
from sglang_npu_pp.tools.doctor.findings import Level


@pytest.mark.parametrize(
    ("version", "level", "remark"),
    [
        ("3.11.7", Level.OK, ""),
        ("3.12.1", Level.NOTE, "; on 3.12 sglang-npu-pp was tested without a server"),
        ("3.13.0", Level.WARNING, "; on 3.13 sglang-npu-pp was not tested, use Python 3.11 or 3.12."),
        ("3.14.0rc1", Level.WARNING, "; on 3.14 sglang-npu-pp was not tested, use Python 3.11 or 3.12."),
    ],
)
def test_what_was_tested_with_a_python(version: str, level: Level, remark: str) -> None:
    finding = versions.python(version, "/usr/bin/python3")
    assert (finding.level, finding.text) == (level, f"{version} at /usr/bin/python3{remark}")


def test_this_python_is_one_of_them() -> None:
    finding = versions.check({})[0]
    assert finding.text.startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert finding.level is not Level.WARNING
