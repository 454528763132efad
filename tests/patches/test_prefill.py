"""Pages are given out as by upstream's own allocator of the NPU, whatever is asked of it before.

The allocator is SGLang's, on the CPU; its kernel is the reference of the simulated Ascend. That the host does
not wait is shown there: tests/ascend/test_prefill.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sglang.srt.hardware_backend.npu.allocator_npu import NPUPagedTokenToKVPoolAllocator

from ascend_sim.sglang_on_sim.reference_kernels import AllocateExtend
from sglang_npu_pp.host_copies import Uploads
from sglang_npu_pp.patches import prefill
from tests.test_host_copies import PlainStreams

SMALL = (4, 8)  # tokens a page, pages: soon exhausted
LARGE = (2, 700)  # upstream's other way, from 200 new pages on

EXTENSIONS = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 12)), min_size=1, max_size=3)
LARGE_EXTENSIONS = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 500)), min_size=1, max_size=3)
OTHER_STEPS = st.one_of(
    st.tuples(st.just("decode"), st.sets(st.integers(0, 5), min_size=1)),
    st.tuples(st.just("free"), st.sets(st.integers(0, 5), min_size=1)),
)


def steps(extensions: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(st.one_of(st.tuples(st.just("extend"), extensions), OTHER_STEPS), max_size=25)


@pytest.fixture(scope="module", autouse=True)
def _kernel() -> Iterator[None]:
    package = ModuleType("sgl_kernel_npu.mem_cache.allocator")
    package.alloc_extend_kernel = AllocateExtend()  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, package.__name__, package)
        yield


class Pool:
    """An allocator, and the slots that each request has."""

    def __init__(self, page: int, pages: int, need_sort: bool, patched: bool) -> None:
        self.allocator = NPUPagedTokenToKVPoolAllocator(
            page * pages, page, torch.float32, "cpu", None, need_sort=need_sort
        )
        self.patched = patched
        self.slots: dict[int, torch.Tensor] = {}

    def state(self) -> Any:
        staged = [pages.tolist() for pages in self.allocator.staged_pages]
        slots = {request: slots.tolist() for request, slots in sorted(self.slots.items())}
        return self.allocator.free_pages.tolist(), staged, slots

    def take(self, step: tuple[str, Any]) -> Any:
        """What the step is answered with."""
        kind, what = step
        if kind == "extend":
            return self.extend(dict(what))
        held = sorted(what & self.slots.keys())
        return (self.decode if kind == "decode" else self.free)(held)

    def extend(self, tokens: dict[int, int]) -> Any:
        have = [self.slots.get(request, torch.empty(0, dtype=torch.int32)) for request in tokens]
        prefixes = torch.tensor([len(slots) for slots in have])
        totals = prefixes + torch.tensor(list(tokens.values()))
        last = torch.tensor([int(slots[-1]) if len(slots) else -1 for slots in have])
        arguments = (prefixes.clone(), prefixes, totals.clone(), totals, last, sum(tokens.values()))
        original = NPUPagedTokenToKVPoolAllocator.alloc_extend
        if self.patched:
            return self.give(list(tokens), prefill.alloc_extend(original, self.allocator, *arguments), tokens)
        return self.give(list(tokens), original(self.allocator, *arguments), tokens)

    def decode(self, requests: list[int]) -> Any:
        if not requests:
            return None
        totals = torch.tensor([len(self.slots[request]) + 1 for request in requests])
        last = torch.tensor([int(self.slots[request][-1]) for request in requests])
        return self.give(requests, self.allocator.alloc_decode(totals.clone(), totals, last))

    def free(self, requests: list[int]) -> None:
        """In one group, as those of a batch."""
        self.allocator.free_group_begin()
        for request in requests:
            self.allocator.free(self.slots.pop(request))
        self.allocator.free_group_end()

    def give(self, requests: Sequence[int], out: Any, tokens: dict[int, int] | None = None) -> Any:
        if out is None:
            return None
        counts = [1 if tokens is None else tokens[request] for request in requests]
        for request, new in zip(requests, out.split(counts), strict=True):
            self.slots[request] = torch.cat([self.slots.get(request, new[:0]), new])
        return out.dtype, out.tolist()


def compare(taken: Sequence[tuple[str, Any]], page: int, pages: int, need_sort: bool) -> None:
    upstream, ours = (Pool(page, pages, need_sort, patched) for patched in (False, True))
    for step in taken:
        assert ours.take(step) == upstream.take(step)
        assert ours.state() == upstream.state()


@given(taken=steps(EXTENSIONS), need_sort=st.booleans())
def test_slots_and_free_pages_are_upstreams(taken: Any, need_sort: bool) -> None:
    compare(taken, *SMALL, need_sort)


@given(taken=steps(LARGE_EXTENSIONS), need_sort=st.booleans())
def test_slots_and_free_pages_of_long_prompts_are_upstreams(taken: Any, need_sort: bool) -> None:
    compare(taken, *LARGE, need_sort)


def test_a_count_that_is_given_is_passed_on() -> None:
    """Of an allocator that has others inside."""
    allocator: Any = object()  # has no page size
    given = (allocator, 1, 2, 3, 4, 5, 6, 7)
    assert prefill.alloc_extend(lambda *args: args, *given) == given


def test_only_copies_from_the_host_to_the_device_are_uploads(monkeypatch: pytest.MonkeyPatch) -> None:
    uploaded: list[torch.Tensor] = []

    def upload(tensor: torch.Tensor, _: Any) -> torch.Tensor:
        uploaded.append(tensor)
        return tensor

    monkeypatch.setattr("sglang_npu_pp.host_copies.upload", upload)
    streams = PlainStreams()
    streams.device = torch.device("meta")
    value = torch.tensor([1, 2])
    with Uploads(streams):
        assert value.to(torch.int32).dtype == torch.int32
        assert value.to(dtype=torch.int32, device="cpu").tolist() == [1, 2]
        assert torch.tensor([1], device="cpu").tolist() == [1]
        assert torch.zeros(2, device="meta").to(device="meta").is_meta
        assert not uploaded
        value.to(dtype=torch.int32, device="meta", non_blocking=True)
        torch.tensor([3], dtype=torch.int16, device="meta")
    assert [each.tolist() for each in uploaded] == [[1, 2], [3]]
    assert [each.dtype for each in uploaded] == [torch.int32, torch.int16]
