"""The reference kernels of speculation against their formulas, written a second time, request by request."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from ascend_sim.sglang_on_sim import reference_draft_kernels as kernels
from ascend_sim.sglang_on_sim import reference_kernels
from ascend_sim.sglang_on_sim import reference_triton_kernels as triton_kernels

pytestmark = pytest.mark.thorough

ROWS, CONTEXT = 6, 20
REQUESTS = torch.tensor([4, 0, 3])  # rows of three requests
LENGTHS = torch.tensor([7, 1, 12])
STEPS = 3
WIDTH = STEPS + 1
# Of _verify_commit_outputs_kernel: requests, tokens, strides and a block; and what it need not write.
SIZES = (3, 3 * WIDTH, 1, WIDTH, 1, 1, 1, 128)
NO_MORE = (None,) * 5


def pool() -> Tensor:
    """Every entry another slot."""
    return torch.randperm(ROWS * CONTEXT).view(ROWS, CONTEXT).int()


def test_new_slots_go_behind_those_that_a_request_has() -> None:
    ends = LENGTHS + torch.tensor([4, 0, 1])
    slots, new = pool(), torch.arange(1000, 1005)
    expected, rest = slots.clone(), iter(new.tolist())
    for row, begin, end in zip(REQUESTS.tolist(), LENGTHS.tolist(), ends.tolist(), strict=True):
        for column in range(begin, end):
            expected[row, column] = next(rest)
    kernels.assign_req_to_token_pool(REQUESTS, slots, LENGTHS.int(), ends.int(), new, CONTEXT, 4)
    assert torch.equal(slots, expected)


@pytest.mark.parametrize("topk", [1, 2])
def test_slots_of_drafts_are_those_behind_a_request(topk: int) -> None:
    slots, found = pool(), torch.empty(len(REQUESTS) * topk * STEPS, dtype=torch.int64)
    positions = torch.empty(len(REQUESTS) * topk, dtype=torch.int64)
    kernels.assign_draft_cache_locs_contiguous(
        REQUESTS, slots, LENGTHS, found, CONTEXT, topk, STEPS, positions=positions, BS=len(REQUESTS)
    )
    expected = [
        slots[row, length : length + topk * STEPS]
        for row, length in zip(REQUESTS.tolist(), LENGTHS.tolist(), strict=True)
    ]
    assert torch.equal(found, torch.cat(expected).long())
    assert positions.tolist() == [length for length in LENGTHS.tolist() for _ in range(topk)]


def test_slots_of_ranges_are_read_one_behind_the_other() -> None:
    """Of a request that has none, too."""
    slots, ends = pool(), LENGTHS + torch.tensor([3, 0, 2])
    found = torch.empty(5, dtype=torch.int32)
    kernels.cache_loc_update(REQUESTS, slots, LENGTHS, ends, found)
    expected = [
        slots[row, begin:end]
        for row, begin, end in zip(REQUESTS.tolist(), LENGTHS.tolist(), ends.tolist(), strict=True)
    ]
    assert torch.equal(found, torch.cat(expected))


@pytest.mark.parametrize("count", [3, 4])
def test_rows_of_several_tables(count: int) -> None:
    rows = torch.tensor([2, 0])
    tables = [torch.rand(5, 1), torch.arange(5).view(5, 1), torch.arange(5), torch.rand(5, 7)]
    targets = [torch.zeros(2, *table.shape[1:], dtype=table.dtype) for table in tables]
    arguments: list[Any] = [rows]
    for table, target in zip(tables, targets, strict=True):
        arguments += [table, target, target[0].numel()]
    kernels.gather_rows(*[*arguments, count == 4, 8])
    for index, (table, target) in enumerate(zip(tables, targets, strict=True)):
        assert torch.equal(target, table[rows] if index < count else torch.zeros_like(target))


def chains(mode: int = kernels.FULL_MASK, topk: int = 1, depth: int = STEPS) -> dict[str, Tensor]:
    """What there is of the chains of all requests; what is not written is as SGLang prepares it."""
    columns = LENGTHS if mode == kernels.FULL_MASK else torch.zeros_like(LENGTHS)
    links = torch.full((3, len(LENGTHS), WIDTH), -1)
    mask = torch.full((int((WIDTH * (columns + WIDTH)).sum()),), True)
    positions = torch.empty(len(LENGTHS) * WIDTH, dtype=torch.int64)
    parents = torch.arange(-1, STEPS - 1).expand(len(LENGTHS), -1)
    chosen = torch.arange(STEPS).expand(len(LENGTHS), -1)
    index, following, sibling = links.unbind()
    kernels.build_tree_kernel_efficient(
        *(parents, chosen, LENGTHS, mask, positions, index, following, sibling),
        *(topk, depth, WIDTH, mode),
    )
    return {"mask": mask, "positions": positions, "index": index, "next": following, "sibling": sibling}


@pytest.mark.parametrize("mode", [kernels.FULL_MASK, kernels.MASK_OF_DRAFTS])
def test_chains_are_laid_out(mode: int) -> None:
    made = chains(mode)
    masks = iter(made["mask"].tolist())
    for request, length in enumerate(LENGTHS.tolist()):
        rows = slice(request * WIDTH, (request + 1) * WIDTH)
        assert made["positions"][rows].tolist() == [length + place for place in range(WIDTH)]
        assert made["index"][request].tolist() == list(range(rows.start, rows.stop))
        assert made["next"][request].tolist() == [1, 2, 3, -1]
        assert made["sibling"][request].tolist() == [-1] * WIDTH
        before = length if mode == kernels.FULL_MASK else 0
        for place in range(WIDTH):
            row = [next(masks) for _ in range(before + WIDTH)]
            assert row == [column <= before + place for column in range(before + WIDTH)]
    assert not list(masks)


def verified(candidates: Tensor, said: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    requests, width = candidates.shape
    predicts = torch.zeros(requests * width, dtype=torch.int32)
    index = torch.full((requests, width), -1, dtype=torch.int32)
    accepted = torch.empty(requests, dtype=torch.int32)
    made = chains()
    kernels.verify_tree_greedy(
        predicts, index, accepted, candidates, made["index"], made["next"], made["sibling"], said
    )
    return predicts, index, accepted


def test_drafts_are_accepted_up_to_the_first_that_is_wrong() -> None:
    """None is right, the first two are (and the one behind a wrong one says nothing), all are."""
    candidates = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]])
    said = torch.tensor([[9, 3, 4, 5], [6, 7, 9, 9], [10, 11, 12, 13]])
    predicts, index, accepted = verified(candidates, said)
    assert accepted.tolist() == [0, 2, 3]
    assert index.tolist() == [[0, -1, -1, -1], [4, 5, 6, -1], [8, 9, 10, 11]]
    assert predicts.view(3, 4).tolist() == [[9, 0, 0, 0], [6, 7, 9, 0], [10, 11, 12, 13]]


@pytest.mark.parametrize("width", [0, WIDTH])
def test_what_the_next_round_needs(width: int) -> None:
    candidates = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 11, 12]])
    said = torch.tensor([[9, 3, 4, 5], [6, 7, 20, 9], [10, 11, 12, 13]])
    predicts, index, accepted = verified(candidates, said)
    lengths, bonus = torch.empty(3, dtype=torch.int64), torch.empty(3, dtype=torch.int32)
    last, select = torch.empty(2, 3, dtype=torch.int64)
    correct, ids = torch.empty(3, dtype=torch.int32), torch.empty(3 * WIDTH, dtype=torch.int64)
    more: Sequence[Any] = (last, None, correct, select, ids) if width else NO_MORE
    made = (predicts, index, accepted + 1, LENGTHS, lengths, bonus)
    kernels.verify_commit_outputs(*[*made, *SIZES, *more, width, 0])
    assert lengths.tolist() == [8, 4, 16]
    assert bonus.tolist() == [9, 20, 13]
    if width:
        assert last.tolist() == correct.tolist() == [0, 2, 3]
        assert select.tolist() == [0, 6, 11]
        assert torch.equal(ids, predicts.long())


def test_they_are_installed() -> None:
    assert triton_kernels.TRITON_KERNELS.items() >= kernels.TRITON_KERNELS.items()
    assert reference_kernels.ADDED_OPERATORS.items() >= kernels.ADDED_OPERATORS.items()
    assert reference_kernels.PACKAGE_KERNELS.items() >= kernels.PACKAGE_KERNELS.items()


nothing = torch.zeros(1)
four = (nothing, nothing, nothing, nothing)
REFUSED: Sequence[tuple[str, Callable[[], object]]] = (
    ("build_tree_kernel_efficient", lambda: chains(topk=2)),
    ("build_tree_kernel_efficient", lambda: chains(depth=STEPS - 1)),
    ("build_tree_kernel_efficient", lambda: chains(mode=2)),
    (
        "verify_tree_greedy",
        lambda: kernels.verify_tree_greedy(nothing, torch.zeros(1, 3), nothing, torch.zeros(1, 4), *four),
    ),
    (
        "assign_draft_cache_locs_contiguous",
        lambda: kernels.assign_draft_cache_locs_contiguous(*four, 1, 1, 1, mrope=nothing),
    ),
    (
        "_verify_commit_outputs_kernel",
        lambda: kernels.verify_commit_outputs(*four, nothing, nothing, *SIZES, *NO_MORE, 0, 64),
    ),
)


@pytest.mark.parametrize(("name", "call"), REFUSED)
def test_other_forms_are_refused_by_name(name: str, call: Callable[[], object]) -> None:
    with pytest.raises(NotImplementedError, match=name):
        call()
