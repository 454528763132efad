"""The device in words: a simulated one is called simulated."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from sglang_npu_pp.tools.certify import machine

TORCH = """
class _Device:
    @staticmethod
    def is_available(): return {count} > 0
    @staticmethod
    def device_count(): return {count}
    @staticmethod
    def get_device_name(index): return "Ascend910_9382"
cuda = npu = _Device
"""


def environ(folder: Path, count: int, torch_npu: str | None = "") -> dict[str, str]:
    """In which torch is a double with so many devices."""
    (folder / "torch.py").write_text(TORCH.format(count=count))
    if torch_npu is not None:
        (folder / "torch_npu.py").write_text(torch_npu)
    return {**os.environ, "PYTHONPATH": str(folder)}


def test_a_cpu_is_a_cpu_whatever_is_installed(tmp_path: Path) -> None:
    found = machine.device(["--device", "cpu"], environ(tmp_path, 8))
    assert found.startswith(f"CPU ({len(os.sched_getaffinity(0))} cores")
    assert "Ascend" not in found


def test_torch_npu_names_its_devices(tmp_path: Path) -> None:
    assert machine.device(["--device", "npu"], environ(tmp_path, 8)) == "8 x Ascend910_9382"
    assert machine.device([], environ(tmp_path, 8)) == "8 x Ascend910_9382"


def test_the_simulated_ascend_is_called_simulated(tmp_path: Path) -> None:
    found = machine.device(["--device", "npu"], {**environ(tmp_path, 2), "ASCEND_SIM_DEVICES": "2"})
    assert found.startswith("simulated Ascend (2 devices")
    assert "no Ascend hardware" in found


def test_without_an_accelerator_it_is_the_cpu(tmp_path: Path) -> None:
    assert machine.device([], environ(tmp_path, 0)).startswith("CPU (")


def test_a_device_that_cannot_be_asked_says_why(tmp_path: Path) -> None:
    broken = environ(tmp_path, 8, "raise OSError('libascendcl.so: cannot open')")
    found = machine.device(["--device", "npu"], broken)
    assert found == "npu, which cannot be asked (OSError: libascendcl.so: cannot open)"


@pytest.mark.parametrize("limit_s", [0.5])
def test_a_device_that_hangs_says_so(tmp_path: Path, limit_s: float) -> None:
    hangs = environ(tmp_path, 8, "import threading; threading.Event().wait()")
    found = machine.device(["--device", "npu"], hangs, limit_s)
    assert found == "npu, which does not answer within 0.5 s"
