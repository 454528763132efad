"""What the Ascend attention backend gets instead of reads of the device: the same values.

That the host then does not wait is shown on simulated Ascend, by tests/server/test_ascend.py.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sglang_npu_pp.patches import attention
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


def test_what_is_copied_to_the_device_goes_through_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `ForwardBatch` copies positions; other copies are left alone."""
    uploaded: list[torch.Tensor] = []

    def upload(tensor: torch.Tensor, streams: DeviceStreams) -> torch.Tensor:
        uploaded.append(tensor)
        return tensor

    monkeypatch.setattr(attention, "upload", upload)
    positions = torch.arange(6, dtype=torch.int32).reshape(3, 2)
    with attention.PinnedUploads(DeviceStreams("cpu")):
        copied = positions.to(dtype=torch.int64, device="cpu", non_blocking=True)
        as_they_are = positions.to(device="cpu", non_blocking=True)
        assert positions.to(torch.int64).dtype == torch.int64
        assert positions.to(device="cpu").dtype == torch.int32
    assert copied.dtype == torch.int64
    assert copied.tolist() == positions.tolist()
    assert as_they_are.dtype == torch.int32
    assert len(uploaded) == 2


def test_the_number_of_new_pages_is_known_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lengths on the "device" would give another number."""
    monkeypatch.setattr(attention, "current", lambda: "a pipeline")
    prefixes, totals = torch.tensor([0, 128, 130]), torch.tensor([1, 129, 200])
    wrong = torch.zeros(3, dtype=torch.int64)
    allocator = SimpleNamespace(page_size=128)

    def original(allocator: object, *arguments: object) -> object:
        return arguments

    *given, pages = attention.alloc_extend(original, allocator, wrong, prefixes, wrong, totals, wrong, 72)
    assert pages == 1 + 1 + 0
    assert given == [wrong, prefixes, wrong, totals, wrong, 72]
    assert attention.alloc_extend(original, allocator, wrong, prefixes, wrong, totals, wrong, 72, 9)[-1] == 9
    monkeypatch.setattr(attention, "current", lambda: None)
    assert attention.alloc_extend(original, allocator, wrong, prefixes, wrong, totals, wrong, 72)[-1] is None


def test_without_lengths_on_the_host_the_device_is_read(batch: SimpleNamespace) -> None:
    batch.seq_lens_cpu = batch.extend_seq_lens_cpu = None
    with WithoutWaiting(batch, DeviceStreams("cpu")):
        assert batch.seq_lens.max() == -1
        assert batch.extend_seq_lens.cpu().tolist() == [-3, -4]
