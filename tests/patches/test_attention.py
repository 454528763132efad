"""What the Ascend attention backend gets instead of reads of the device: the same values.

That the host then does not wait is shown on simulated Ascend, by tests/server/test_ascend.py.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sglang_npu_pp.patches.attention import WithoutWaiting
from sglang_npu_pp.streams import DeviceStreams


@pytest.fixture
def batch() -> SimpleNamespace:
    """Lengths on the "device" differ from the host's, so that a test sees which were read."""
    return SimpleNamespace(
        seq_lens=torch.tensor([-1, -2]),
        seq_lens_cpu=torch.tensor([5, 9]),
        extend_seq_lens=torch.tensor([-3, -4], dtype=torch.int32),
        extend_seq_lens_cpu=[5, 2],
    )


def test_lengths_come_from_the_host(batch: SimpleNamespace) -> None:
    with WithoutWaiting(batch, DeviceStreams("cpu")):
        widest, extended = batch.seq_lens.max(), batch.extend_seq_lens.cpu().int()
    assert list(range(12))[:widest] == list(range(9))
    assert extended.tolist() == [5, 2]
    assert extended.dtype == torch.int32


def test_everything_else_is_untouched(batch: SimpleNamespace) -> None:
    with WithoutWaiting(batch, DeviceStreams("cpu")):
        assert batch.seq_lens.max(0).values == -1
        assert batch.seq_lens.int().tolist() == [-1, -2]
        assert torch.tensor([7]).max() == 7
        made = torch.tensor([1, 2], dtype=torch.int32, device="cpu")
        assert torch.tensor([1.5]).dtype == torch.float32
    assert made.tolist() == [1, 2]
    assert made.dtype == torch.int32
    assert batch.seq_lens.max() == -1  # the mode is over


def test_without_lengths_on_the_host_the_device_is_read(batch: SimpleNamespace) -> None:
    batch.seq_lens_cpu = batch.extend_seq_lens_cpu = None
    with WithoutWaiting(batch, DeviceStreams("cpu")):
        assert batch.seq_lens.max() == -1
        assert batch.extend_seq_lens.cpu().tolist() == [-3, -4]
