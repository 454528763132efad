"""Tensor dicts and objects through SGLang's own `GroupCoordinator`, four processes: tp 2 pp 2.

The same exchanges four ways: upstream's functions; a group without lanes (the same, and the two that are
added, over torch.distributed); and ours over the lanes, as the pipeline group of a patched server has them:
the host lane alone, and with a device lane over gloo, whose device is the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from rig.harness import Here, Rank, Team, results, trace_of

from .coordinators import gloo_coordinator

pytestmark = pytest.mark.slow

WAYS = ("upstream", "torch", "host lane", "both lanes")

# What a rank process keeps for the whole module: `Here.kept` goes with every test.
_groups: dict[str, Any] = {}


def sample(seed: int) -> dict[str, Any]:
    """The same on every rank: tensor-parallel ranks hold equal proxies."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden": torch.randn(6, 8, generator=generator),
        "count": seed,
        "odd": torch.randn(3, 5, generator=generator),
        "half": torch.randn(4, 4, generator=generator).to(torch.bfloat16),
        "empty": torch.empty(0, 4),
        "ids": torch.randint(0, 500, (7,), generator=generator),
        "nothing": None,
        "nested": ["text", (1, 2.5)],
    }


def assert_equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(found) == list(expected)
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            assert found[name].dtype == value.dtype
            assert found[name].shape == value.shape
            assert torch.equal(found[name], value), name
        else:
            assert found[name] == value


# --- in the rank's process ---------------------------------------------------------------------


def make_groups(here: Here) -> None:
    for name, layout in (("pp", [[0, 2], [1, 3]]), ("tp", [[0, 1], [2, 3]])):
        _groups[name] = gloo_coordinator(f"test-{name}", layout)


def choose(here: Here, way: str) -> None:
    """Put the functions of `way` in force."""
    import sglang_npu_pp
    from sglang_npu_pp.patches import groups

    sglang_npu_pp.deactivate()
    vars(_groups["pp"]).pop("_npu_pp_link", None)
    if way != "upstream":
        assert sglang_npu_pp.activate()
    if way in ("host lane", "both lanes"):
        groups.attach_link(_groups["pp"], here.link)


def send_and_receive(here: Here, gather: bool, count: int) -> None:
    """Stage 0 sends `count` dicts without waiting, stage 1 receives them one after another."""
    pp, all_gather_group = _groups["pp"], _groups["tp"] if gather else None
    if pp.is_first_rank:
        works = []
        for seed in range(count):
            works += pp.send_tensor_dict(sample(seed), all_gather_group=all_gather_group, async_send=True)
        for work in works:
            work.work.wait()
    else:
        for seed in range(count):
            assert_equal(pp.recv_tensor_dict(all_gather_group=all_gather_group), sample(seed))


def blocking_send(here: Here) -> None:
    pp = _groups["pp"]
    if pp.is_first_rank:
        assert pp.send_tensor_dict(sample(1)) == []
    else:
        assert_equal(pp.recv_tensor_dict(src=0), sample(1))


def swap(here: Here) -> None:
    """Both stages send and receive at the same time."""
    pp = _groups["pp"]
    found = pp.send_recv_tensor_dict(
        sample(pp.rank_in_group), send_all_gather_group=_groups["tp"], recv_all_gather_group=_groups["tp"]
    )
    expected = sample(1 - pp.rank_in_group)
    assert found.keys() == expected.keys()  # upstream's paired exchange puts tensors last
    assert_equal({name: found[name] for name in expected}, expected)


def objects(here: Here) -> None:
    pp = _groups["pp"]
    payload = ({1, 2}, {"tensor": torch.arange(3)})
    if pp.is_first_rank:
        pp.send_object(payload, dst=1, tag=5)
        for work in pp.send_object("second", dst=1, async_send=True, tag=5):
            work.work.wait()
    else:
        first = pp.recv_object(src=0, tag=5)
        assert first[0] == {1, 2}
        assert torch.equal(first[1]["tensor"], torch.arange(3))
        assert pp.recv_object(src=0, tag=5) == "second"


def object_with_tag(here: Here, tag: int) -> None:
    pp = _groups["pp"]
    if pp.is_first_rank:
        pp.send_object("tagged", dst=1, tag=tag)
    else:
        assert pp.recv_object(src=0, tag=tag) == "tagged"


def isend(here: Here, seeds: range, gather: bool) -> None:
    pp = _groups["pp"]
    for seed in seeds:
        tensors = sample(seed)
        handles = pp.isend_tensor_dict(tensors, all_gather_group=_groups["tp"] if gather else None)
        for handle in handles:
            handle.wait()
        tensors["hidden"].zero_()  # a send owns its bytes


def post(here: Here, count: int, gather: bool) -> None:
    """Post `count` receives. On the lanes nothing has been sent yet, so none of them may wait."""
    pp = _groups["pp"]
    here.kept["posted"] = [
        pp.irecv_tensor_dict(all_gather_group=_groups["tp"] if gather else None) for _ in range(count)
    ]


def finish(here: Here, seeds: range) -> list[str]:
    for received, seed in zip(here.kept["posted"], seeds, strict=True):
        tensors, handles, postprocess = received
        for handle in handles:
            handle.wait()
        for step in postprocess:
            step()
        assert_equal(tensors, sample(seed))
    return [event.name for event in here.trace.events() if event.name in ("post", "wait")]


def post_and_finish(here: Here, seeds: range, gather: bool) -> None:
    """Off the lanes a posted receive waits for the dict's description, so sender and receiver meet."""
    post(here, len(seeds), gather)
    finish(here, seeds)


def refuse(here: Here) -> list[str]:
    pp = _groups["pp"]
    complaints = []
    for call in (
        lambda: pp.isend_tensor_dict(sample(0), dst=pp.rank_in_group),
        lambda: pp.isend_tensor_dict(sample(0), dst=7),
        lambda: pp.isend_tensor_dict([torch.zeros(1)]),
        lambda: pp.isend_tensor_dict({1: torch.zeros(1)}),
    ):
        try:
            call()
        except (TypeError, ValueError) as error:
            complaints.append(str(error))
    return complaints


# --- in the test's process ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def square() -> Iterator[Team]:
    """Four ranks with real pipeline and tensor-parallel groups."""
    team = Team(4, process_group=True, environment={"SGLANG_USE_CPU_ENGINE": "1"})
    results([rank.start(make_groups) for rank in team.ranks], limit_s=120)
    yield team
    team.close()


def prepare(square: Team, way: str) -> tuple[list[Rank], list[Rank]]:
    """The ranks of stage 0 and of stage 1, with the functions of `way` in force."""
    square.open_columns(slots=4 if way == "both lanes" else None)
    results([rank.start(choose, way) for rank in square.ranks], limit_s=60)
    return square.ranks[:2], square.ranks[2:]


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("gather", [False, True], ids=["whole", "gathered"])
def test_dicts_arrive_in_order_and_equal(square: Team, way: str, gather: bool) -> None:
    first, _ = prepare(square, way)
    square.each(send_and_receive, gather, 4)
    for rank in first:
        sends = [event.name for event in rank.call(trace_of)]
        assert sends.count("push") == (4 if "lane" in way else 0)
        assert sends.count("post_send") == (4 if way == "both lanes" else 0)


@pytest.mark.parametrize("way", WAYS)
def test_blocking_send_and_named_source(square: Team, way: str) -> None:
    prepare(square, way)
    square.each(blocking_send)


@pytest.mark.parametrize("way", WAYS)
def test_both_stages_may_send_at_the_same_time(square: Team, way: str) -> None:
    prepare(square, way)
    square.each(swap)


@pytest.mark.parametrize("way", WAYS)
def test_objects_arrive(square: Team, way: str) -> None:
    prepare(square, way)
    square.each(objects)


@pytest.mark.parametrize("way", ["host lane", "both lanes"])
@pytest.mark.parametrize("gather", [False, True], ids=["whole", "gathered"])
def test_receives_are_posted_before_anything_is_sent(square: Team, way: str, gather: bool) -> None:
    first, second = prepare(square, way)
    results([rank.start(post, 3, gather) for rank in second])
    results([rank.start(isend, range(3), gather) for rank in first])
    for order in results([rank.start(finish, range(3)) for rank in second]):
        assert order == ["post"] * 3 + ["wait"] * 3


def test_an_object_with_another_tag_is_refused(square: Team) -> None:
    (first, _), (second, _) = prepare(square, "host lane")
    first.call(object_with_tag, 5)
    with pytest.raises(
        RuntimeError, match="expected an object with tag 6 from stage 0, but it sent .* tag 5"
    ):
        second.call(object_with_tag, 6)


def test_a_group_without_lanes_keeps_torch_distributed(square: Team) -> None:
    first, second = prepare(square, "torch")
    calls = [rank.start(isend, range(3), True) for rank in first]
    calls += [rank.start(post_and_finish, range(3), True) for rank in second]
    results(calls)


def test_what_cannot_be_sent_is_refused_with_a_sentence(square: Team) -> None:
    first, _ = prepare(square, "host lane")
    same, outside, no_dict, no_string = first[0].call(refuse)
    assert same == "rank 0 of a group of 2 cannot exchange a tensor dict with rank 0."
    assert outside == "rank 0 of a group of 2 cannot exchange a tensor dict with rank 7."
    assert no_dict == "isend_tensor_dict needs a dict, not a list."
    assert no_string == "stage 0 rank 0: a tensor dict needs string keys, not 1."
