"""The plain torch versions of kernels that SGLang calls on CPU, each against its formula.

Formulas are written out token by token here, without the operations of torch that the kernels use.
"""

from __future__ import annotations

import importlib.util
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch

FILE = Path(__file__).parents[2] / "scripts/cpu_compat/cpu_reference_kernels.py"
POOL, ROWS, POSITIONS = 64, 3, 20  # locations in the KV pool; requests that have a row, and its length
LENGTHS = [5, 2, 7]  # of the requests in a batch
REQUESTS = torch.tensor([2, 0, 1])  # their rows
QLEN_ONLY = 1


@pytest.fixture(scope="module")
def kernels() -> Any:
    spec = importlib.util.spec_from_file_location("cpu_reference_kernels", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def table() -> torch.Tensor:
    """Which location each position of a row has: all different."""
    generator = torch.Generator().manual_seed(1)
    return torch.randperm(ROWS * POSITIONS, generator=generator).view(ROWS, POSITIONS).int()


def test_locations_are_written_and_read_request_by_request(kernels: Any) -> None:
    start, end = torch.tensor(LENGTHS), torch.tensor(LENGTHS) + torch.tensor([1, 3, 2])
    req_to_token, locations = table(), torch.arange(100, 106)
    kernels.assign_req_to_token_pool_cpu(REQUESTS, req_to_token, start, end, locations, POSITIONS)
    expected = table()
    expected[2, 5] = 100
    expected[0, 2:5] = torch.tensor([101, 102, 103])
    expected[1, 7:9] = torch.tensor([104, 105])
    assert torch.equal(req_to_token, expected)
    out = torch.zeros(6, dtype=torch.int64)
    kernels.assign_extend_cache_locs_cpu(REQUESTS, req_to_token, start, end, out, POSITIONS)
    assert torch.equal(out, locations)


def test_tokens_are_copied_between_a_pool_and_its_host_pool(kernels: Any) -> None:
    pool = [torch.arange(6.0).view(6, 1) + 10 * layer for layer in range(2)]
    host = [torch.zeros(8, 1) for _ in pool]
    kernels.transfer_kv_direct(pool, host, torch.tensor([4, 1]), torch.tensor([0, 7]), page_size=1)
    assert [each.flatten().tolist() for each in host] == [
        [4, 0, 0, 0, 0, 0, 0, 1],
        [14, 0, 0, 0, 0, 0, 0, 11],
    ]


def test_a_branch_of_a_draft_sees_its_request_and_its_own_steps(kernels: Any) -> None:
    topk, steps, req_to_token = 2, 3, table()
    lengths = torch.tensor(LENGTHS)
    out = torch.zeros(ROWS * topk * steps, dtype=torch.int64)
    kernels.assign_draft_cache_locs_contiguous_cpu(
        REQUESTS, req_to_token, lengths, out, POSITIONS, topk, steps
    )
    written = out.view(ROWS, topk, steps)
    rows = kernels.build_draft_decode_metadata_cpu(req_to_token, REQUESTS, lengths, topk, steps, POSITIONS)
    for index, (row, length) in enumerate(zip(REQUESTS.tolist(), LENGTHS, strict=True)):
        for branch in range(topk):
            found = rows[index * topk + branch]
            assert found[:length].tolist() == req_to_token[row, :length].tolist()
            assert found[length : length + steps].tolist() == written[index, branch].tolist()
    assert torch.equal(req_to_token, table())


def test_rows_of_all_layers_move_though_they_overlap(kernels: Any) -> None:
    layers = [torch.arange(40.0).view(10, 4) + 100 * layer for layer in range(3)]
    before = [layer.clone() for layer in layers]
    target, source = torch.tensor([1, 2, 3]), torch.tensor([2, 3, 9])
    addresses = torch.tensor([layer.data_ptr() for layer in layers], dtype=torch.uint64)
    strides = torch.tensor([layer.stride(0) * layer.element_size() for layer in layers])
    kernels.copy_all_layer_kv_cache_cpu(addresses, strides, target, source)
    for layer, was in zip(layers, before, strict=True):
        for row in range(10):
            assert torch.equal(layer[row], was[{1: 2, 2: 3, 3: 9}.get(row, row)])


# --- trees ----------------------------------------------------------------------------------------

# topk 2, three steps. Candidates 0 and 1 hang below the root, 2 and 3 below the first of the last step's
# best, and so on: `parent_list[c // topk]` is the candidate above c.
PARENT_LIST = torch.tensor([[-1, 1, 0, 2, 3]])
SELECTED = torch.tensor([[0, 1, 2, 4, 7]])  # candidates that became nodes 1 to 5


def built(kernels: Any, parent_list: torch.Tensor, selected: torch.Tensor, topk: int) -> Any:
    nodes = selected.shape[1] + 1
    mask = torch.ones(nodes * nodes, dtype=torch.bool)
    links = torch.full((3, 1, nodes), -1)
    positions = torch.zeros(nodes, dtype=torch.int64)
    kernels.build_tree_kernel_efficient_cpu(
        parent_list, selected, torch.tensor([10]), mask, positions, *links, topk, 3, nodes, QLEN_ONLY
    )
    return mask.view(nodes, nodes), positions, links[:, 0]


def test_a_tree_links_what_it_was_selected_from(kernels: Any) -> None:
    mask, positions, (index, following, sibling) = built(kernels, PARENT_LIST, SELECTED, topk=2)
    above = {1: 0, 2: 0, 3: 2, 4: 1}  # node 5 is candidate 7, below candidate 2, node 3
    above[5] = 3
    assert index.tolist() == [0, 1, 2, 3, 4, 5]
    assert following.tolist() == [1, 4, 3, 5, -1, -1]
    assert sibling.tolist() == [-1, 2, -1, -1, -1, -1]
    for node in range(6):
        seen, at = {0}, node
        while at != 0:
            seen.add(at)
            at = above[at]
        assert set(mask[node].nonzero().flatten().tolist()) == seen
        assert positions[node] == 10 + len(seen) - 1


def test_a_node_below_nothing_that_was_selected_is_never_reached(kernels: Any) -> None:
    orphaned = torch.tensor([[0, 2]])  # candidate 2 is below candidate 1, which is not a node
    _, _, (_, following, sibling) = built(kernels, PARENT_LIST, orphaned, topk=2)
    assert following.tolist() == [1, -1, -1]
    assert sibling.tolist() == [-1, -1, -1]


@pytest.mark.parametrize("seed", range(20))
def test_the_accepted_path_is_the_one_that_the_target_says(kernels: Any, seed: int) -> None:
    """Among few tokens, so that drafts are right by chance; two requests, and the longest path is cut."""
    chance = random.Random(seed)
    trees = [built(kernels, PARENT_LIST, SELECTED, topk=2)[2] for _ in range(2)]
    nodes, depth = 6, 3
    links = torch.stack(trees, dim=1)
    links[0, 1] += nodes  # positions of nodes in the whole batch
    candidates = torch.tensor([[chance.randrange(3) for _ in range(nodes)] for _ in range(2)])
    said = torch.tensor([[chance.randrange(3) for _ in range(nodes)] for _ in range(2)])
    predicts = torch.full((2 * nodes,), -7, dtype=torch.int32)
    accept_index = torch.full((2, depth), -1, dtype=torch.int32)
    correct = torch.full((2,), -7, dtype=torch.int32)
    kernels.verify_tree_greedy_cpu(
        predicts=predicts,
        accept_index=accept_index,
        accept_token_num=correct,
        candidates=candidates,
        retrive_index=links[0],
        retrive_next_token=links[1],
        retrive_next_sibling=links[2],
        target_predict=said,
    )
    above = {1: 0, 2: 0, 3: 2, 4: 1, 5: 3}
    for row in range(2):
        path = [0]
        while len(path) < depth:
            right = [
                child
                for child, parent in above.items()
                if parent == path[-1] and candidates[row, child] == said[row, path[-1]]
            ]
            if not right:
                break
            path.append(right[0])
        assert accept_index[row].tolist() == [row * nodes + node for node in path] + [-1] * (
            depth - len(path)
        )
        assert correct[row] == len(path) - 1
        for node in range(nodes):
            expected = int(said[row, node]) if node in path else -7
            assert predicts[row * nodes + node] == expected


def test_bonus_tokens_and_locations_of_what_was_accepted(kernels: Any) -> None:
    bonus = torch.zeros(2, dtype=torch.int32)
    kernels.fill_bonus_tokens_cpu(torch.tensor([[1, 2, 3], [4, 5, 6]]), torch.tensor([3, 1]), bonus, 3)
    assert bonus.tolist() == [3, 4]
    out = torch.zeros(6, dtype=torch.int64)
    accepted = torch.tensor([[0, 2, -1], [3, -1, -1]])
    kernels.fill_accept_out_cache_loc_cpu(accepted, torch.tensor([50, 51, 52, 53]), out)
    assert out.tolist() == [50, 52, 53, 0, 0, 0]


# --- attention ------------------------------------------------------------------------------------

HEADS, KEY_HEADS, WIDTH, SCALE = 4, 2, 8, 0.3


def pool(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(POOL, KEY_HEADS, WIDTH, generator=generator) for _ in range(2))
    return keys, values


def attended(query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, at: list[int]) -> torch.Tensor:
    """Of one token over the locations `at`, head by head."""
    heads = []
    for head in range(HEADS):
        shared = head // (HEADS // KEY_HEADS)
        scores = [SCALE * float(query[head] @ keys[location, shared]) for location in at]
        weights = [math.exp(score - max(scores)) for score in scores]
        heads.append(
            sum(
                weight / sum(weights) * values[location, shared]
                for weight, location in zip(weights, at, strict=True)
            )
        )
    return torch.stack(heads)  # type: ignore[arg-type]


def test_a_decoding_token_attends_to_its_request_and_itself(kernels: Any) -> None:
    (keys, values), req_to_token = pool(2), table()
    query = torch.randn(ROWS, HEADS, WIDTH, generator=torch.Generator().manual_seed(3))
    key, value = (torch.full((ROWS, KEY_HEADS * WIDTH), number) for number in (0.5, -0.5))
    lengths = torch.tensor(LENGTHS)
    own = [int(req_to_token[row, length - 1]) for row, length in zip(REQUESTS, LENGTHS, strict=True)]
    out = torch.zeros(ROWS, HEADS, WIDTH)
    kernels.decode_attention_cpu(
        *(query, keys, values, 1.0, 1.0, out, key, value, torch.tensor(own), torch.empty(0)),
        *(req_to_token, REQUESTS, lengths, SCALE, 0.0, False, 0, None, None),
    )
    for index, (row, length) in enumerate(zip(REQUESTS.tolist(), LENGTHS, strict=True)):
        assert torch.all(keys[own[index]] == 0.5)
        assert torch.all(values[own[index]] == -0.5)
        expected = attended(query[index], keys, values, req_to_token[row, :length].tolist())
        torch.testing.assert_close(out[index], expected)


@pytest.mark.parametrize("given", [False, True], ids=["kept", "given"])
@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
def test_new_tokens_attend_to_the_prefix_and_to_those_above_them(
    kernels: Any, tree: bool, given: bool
) -> None:
    """`given`: their own keys and values are, and the pool has others in their place."""
    (keys, values), req_to_token = pool(4), table()
    new = [3, 2, 3]
    kept = [
        req_to_token[row, end - count : end] for row, end, count in zip(REQUESTS, LENGTHS, new, strict=True)
    ]
    own = torch.cat(kept).long()
    given_key, given_value = (each[own].flatten(1) if given else None for each in (keys, values))
    in_pool = [each.index_fill(0, own, math.nan) if given else each for each in (keys, values)]
    starts = torch.tensor([0, 3, 5])
    query = torch.randn(sum(new), HEADS, WIDTH, generator=torch.Generator().manual_seed(5))
    masks = [torch.eye(count, dtype=torch.bool) for count in new]
    for mask in masks:
        mask[:, 0] = True  # all below the root, none below another
    out = torch.zeros_like(query)
    kernels.extend_attention_cpu(
        *(query, given_key, given_value, out, *in_pool, 1.0, 1.0, req_to_token, REQUESTS),
        *(torch.tensor(LENGTHS), torch.tensor(new), starts, max(new), SCALE, 0.0, False, 0, None, None),
        *(torch.cat([mask.flatten() for mask in masks]) if tree else None, True),
    )
    for index, (row, length, count) in enumerate(zip(REQUESTS.tolist(), LENGTHS, new, strict=True)):
        for token in range(count):
            among = [0, token] if tree else list(range(token + 1))
            seen = [*range(length - count), *(length - count + other for other in sorted(set(among)))]
            at = req_to_token[row, seen].tolist()
            expected = attended(query[starts[index] + token], keys, values, at)
            torch.testing.assert_close(out[starts[index] + token], expected)


def test_keys_of_another_width_than_the_pool_are_enough_without_a_prefix(kernels: Any) -> None:
    """Latent attention prefills so: the pool keeps what keys and values are computed from."""
    (keys, values), req_to_token = pool(7), table()
    count = LENGTHS[0]
    query = torch.randn(count, HEADS, WIDTH, generator=torch.Generator().manual_seed(8))
    latent = torch.full((POOL, 1, 3), math.nan)
    out = torch.zeros_like(query)
    kernels.extend_attention_cpu(
        *(query, keys[:count], values[:count], out, latent, latent, 1.0, 1.0, req_to_token, REQUESTS[:1]),
        *(torch.tensor([count]), torch.tensor([count]), torch.tensor([0]), count, SCALE, 0.0, False, 0, None),
        *(None, None, True),
    )
    for token in range(count):
        torch.testing.assert_close(out[token], attended(query[token], keys, values, list(range(token + 1))))


def test_what_the_reference_does_not_know_is_refused(kernels: Any) -> None:
    (keys, values), req_to_token = pool(6), table()
    query = torch.zeros(ROWS, HEADS, WIDTH)
    for logit_cap, window in ((30.0, 0), (0.0, 128)):
        with pytest.raises(NotImplementedError, match="the reference attention for the CPU knows no"):
            kernels.decode_attention_cpu(
                *(query, keys, values, 1.0, 1.0, query, None, None, REQUESTS, query, req_to_token),
                *(REQUESTS, torch.tensor(LENGTHS), SCALE, logit_cap, False, window, None, None),
            )
