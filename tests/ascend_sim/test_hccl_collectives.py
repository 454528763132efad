"""Collectives of the simulated HCCL, called by the real ProcessGroupHCCL: their values."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch
import torch.distributed as dist

from rig.harness import Here, Team

pytestmark = pytest.mark.thorough

MEMBERS = 3
DATA_TYPES = [
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
]
SIZES = [1, 7, 1000, 70_001]  # the last one is more than what a member shows at a time, 64 KiB


# --- in the rank processes -----------------------------------------------------------------------


def values(rank: int, elements: int, data_type: torch.dtype, part: int = 0) -> torch.Tensor:
    """What a rank contributes: small numbers, of which every type holds the sum and the product of three."""
    pattern = torch.arange(elements) % 3 + rank % 2
    pattern[0] = rank + part + 1
    return pattern.to(data_type)


def on_device(tensor: torch.Tensor, here: Here) -> torch.Tensor:
    return tensor.to(here.device)


def room(here: Here, elements: int, data_type: torch.dtype) -> torch.Tensor:
    return torch.empty(elements, dtype=data_type, device=here.device)


def assert_equal(found: torch.Tensor, expected: torch.Tensor) -> None:
    on_host = found.cpu()
    assert on_host.dtype == expected.dtype
    assert torch.equal(on_host, expected), f"{on_host.float() - expected.float()} off"


def all_contributions(elements: int, data_type: torch.dtype, part: int = 0) -> torch.Tensor:
    """One row a rank."""
    return torch.stack([values(rank, elements, data_type, part) for rank in range(MEMBERS)])


def reduced(rows: torch.Tensor, operation: dist.ReduceOp.RedOpType) -> torch.Tensor:
    """By hand, in the order of ranks."""
    result = rows[0].clone()
    for row in rows[1:]:
        if operation == dist.ReduceOp.SUM:
            result += row
        elif operation == dist.ReduceOp.PRODUCT:
            result *= row
        else:
            result = (torch.maximum if operation == dist.ReduceOp.MAX else torch.minimum)(result, row)
    return result


def check_all_reduce(here: Here, elements: int, data_type: torch.dtype) -> None:
    operations = dist.ReduceOp.SUM, dist.ReduceOp.PRODUCT, dist.ReduceOp.MAX, dist.ReduceOp.MIN
    for operation in operations:
        tensor = on_device(values(here.index, elements, data_type), here)
        dist.all_reduce(tensor, operation)
        assert_equal(tensor, reduced(all_contributions(elements, data_type), operation))


def check_reduce(here: Here, elements: int, data_type: torch.dtype) -> None:
    for root in range(MEMBERS):
        tensor = on_device(values(here.index, elements, data_type), here)
        dist.reduce(tensor, root)
        if here.index == root:
            assert_equal(tensor, reduced(all_contributions(elements, data_type), dist.ReduceOp.SUM))


def check_reduce_scatter(here: Here, elements: int, data_type: torch.dtype) -> None:
    parts = [values(here.index, elements, data_type, part) for part in range(MEMBERS)]
    expected = reduced(all_contributions(elements, data_type, here.index), dist.ReduceOp.SUM)
    output = room(here, elements, data_type)
    dist.reduce_scatter_tensor(output, on_device(torch.cat(parts), here))
    assert_equal(output, expected)
    listed = room(here, elements, data_type)
    dist.reduce_scatter(listed, [on_device(part, here) for part in parts])
    assert_equal(listed, expected)


def check_all_gather(here: Here, elements: int, data_type: torch.dtype) -> None:
    own = on_device(values(here.index, elements, data_type), here)
    expected = all_contributions(elements, data_type)
    output = room(here, MEMBERS * elements, data_type)
    dist.all_gather_into_tensor(output, own)
    assert_equal(output, expected.flatten())
    listed = [room(here, elements, data_type) for _ in range(MEMBERS)]
    dist.all_gather(listed, own)
    for found, row in zip(listed, expected, strict=True):
        assert_equal(found, row)


def check_all_gather_of_different_sizes(here: Here, elements: int, data_type: torch.dtype) -> None:
    listed = [room(here, elements + rank, data_type) for rank in range(MEMBERS)]
    dist.all_gather(listed, on_device(values(here.index, elements + here.index, data_type), here))
    for rank, found in enumerate(listed):
        assert_equal(found, values(rank, elements + rank, data_type))


def check_broadcast(here: Here, elements: int, data_type: torch.dtype) -> None:
    for root in range(MEMBERS):
        tensor = on_device(values(here.index, elements, data_type), here)
        dist.broadcast(tensor, root)
        assert_equal(tensor, values(root, elements, data_type))


def check_scatter(here: Here, elements: int, data_type: torch.dtype) -> None:
    for root in range(MEMBERS):
        parts = [on_device(values(root, elements, data_type, part), here) for part in range(MEMBERS)]
        output = room(here, elements, data_type)
        dist.scatter(output, parts if here.index == root else None, root)
        assert_equal(output, values(root, elements, data_type, here.index))


def check_gather(here: Here, elements: int, data_type: torch.dtype) -> None:
    for root in range(MEMBERS):
        listed = [room(here, elements, data_type) for _ in range(MEMBERS)]
        own = on_device(values(here.index, elements, data_type), here)
        dist.gather(own, listed if here.index == root else None, root)
        if here.index == root:
            for found, row in zip(listed, all_contributions(elements, data_type), strict=True):
                assert_equal(found, row)


def check_all_to_all(here: Here, elements: int, data_type: torch.dtype) -> None:
    parts = [values(here.index, elements, data_type, part) for part in range(MEMBERS)]
    expected = all_contributions(elements, data_type, here.index)
    output = room(here, MEMBERS * elements, data_type)
    dist.all_to_all_single(output, on_device(torch.cat(parts), here))
    assert_equal(output, expected.flatten())
    listed = [room(here, elements, data_type) for _ in range(MEMBERS)]
    dist.all_to_all(listed, [on_device(part, here) for part in parts])
    for found, row in zip(listed, expected, strict=True):
        assert_equal(found, row)


def check_all_to_all_of_different_sizes(here: Here, elements: int, data_type: torch.dtype) -> None:
    """Rank r sends `elements` + r + 2 p to rank p, and nothing to itself."""

    def size(source: int, target: int) -> int:
        return 0 if source == target else elements + source + 2 * target

    sent = [size(here.index, peer) for peer in range(MEMBERS)]
    received = [size(peer, here.index) for peer in range(MEMBERS)]
    parts = [values(here.index, max(n, 1), data_type, peer)[:n] for peer, n in enumerate(sent)]
    output = room(here, sum(received), data_type)
    dist.all_to_all_single(output, on_device(torch.cat(parts), here), received, sent)
    expected = [values(peer, max(n, 1), data_type, here.index)[:n] for peer, n in enumerate(received)]
    assert_equal(output, torch.cat(expected))


CHECKS: list[Callable[[Here, int, torch.dtype], None]] = [
    check_all_reduce,
    check_reduce,
    check_reduce_scatter,
    check_all_gather,
    check_all_gather_of_different_sizes,
    check_broadcast,
    check_scatter,
    check_gather,
    check_all_to_all,
    check_all_to_all_of_different_sizes,
]


def check_each(
    here: Here,
    check: Callable[[Here, int, torch.dtype], None],
    sizes: Sequence[int],
    data_types: Sequence[torch.dtype],
) -> None:
    for data_type in data_types:
        for elements in sizes:
            try:
                check(here, elements, data_type)
            except BaseException as error:
                error.add_note(f"with {elements} elements of {data_type}")
                raise


def sum_of_thirds(here: Here, data_type: torch.dtype) -> None:
    """Numbers that the 16-bit types round, at every step."""
    rows = torch.stack(
        [torch.linspace(0.1, 3.0, 999).mul(rank + 1 / 3).to(data_type) for rank in range(MEMBERS)]
    )
    tensor = on_device(rows[here.index], here)
    dist.all_reduce(tensor)
    assert_equal(tensor, reduced(rows, dist.ReduceOp.SUM))


def nothing_at_all(here: Here) -> None:
    """No elements: nothing is sent, and nobody is waited for."""
    dist.all_reduce(room(here, 0, torch.float32))
    dist.broadcast(room(here, 0, torch.float32), 0)
    torch.get_device_module(here.device).synchronize()


def in_pairs(here: Here) -> list[float]:
    """Two communicators of two members at the same time, one of which this rank is in twice over."""
    groups = [dist.new_group([0, 1]), dist.new_group([1, 2]), dist.new_group([0, 2])]
    sums = []
    for group in groups:
        if here.index in dist.get_process_group_ranks(group):
            tensor = on_device(torch.tensor([2.0**here.index]), here)
            dist.all_reduce(tensor, group=group)
            sums.append(tensor.item())
    return sums


# --- the tests -----------------------------------------------------------------------------------


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_values(hccl_team: Team, check: Callable[[Here, int, torch.dtype], None]) -> None:
    hccl_team.each(check_each, check, SIZES, DATA_TYPES)


@pytest.mark.parametrize("data_type", [torch.float16, torch.bfloat16], ids=str)
def test_rounding_of_16_bit_floats(hccl_team: Team, data_type: torch.dtype) -> None:
    hccl_team.each(sum_of_thirds, data_type)


def test_no_elements_wait_for_nobody(hccl_team: Team) -> None:
    hccl_team.ranks[0].call(nothing_at_all)


def test_communicators_do_not_meet(hccl_team: Team) -> None:
    assert hccl_team.each(in_pairs) == [[3.0, 5.0], [3.0, 6.0], [6.0, 5.0]]
