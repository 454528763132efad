"""Kernels of `sgl_kernel` for the CPU that speculative decoding and the hierarchical cache call, in plain
torch: slow, and correct.

Names, arguments and results are those that SGLang 0.5.21 uses. Each is checked against its formula by
`tests/environment/test_cpu_reference_kernels.py`. Tensors named "out" are written in place.
"""

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# --- where tokens lie in the KV pool --------------------------------------------------------------


def assign_req_to_token_pool_cpu(
    requests: Tensor, req_to_token: Tensor, start: Tensor, end: Tensor, locations: Tensor, pool_len: int
) -> None:
    """Write `locations`, one request after another, into positions start to end of each request."""
    taken = 0
    for row, first, last in _spans(requests, start, end):
        req_to_token[row, first:last] = locations[taken : taken + last - first].to(req_to_token.dtype)
        taken += last - first


def assign_extend_cache_locs_cpu(
    requests: Tensor, req_to_token: Tensor, start: Tensor, end: Tensor, out: Tensor, pool_len: int
) -> None:
    """Read the locations of positions start to end of each request, one request after another."""
    taken = 0
    for row, first, last in _spans(requests, start, end):
        out[taken : taken + last - first] = req_to_token[row, first:last].to(out.dtype)
        taken += last - first


def assign_draft_cache_locs_contiguous_cpu(
    requests: Tensor, req_to_token: Tensor, lengths: Tensor, out: Tensor, pool_len: int, topk: int, steps: int
) -> None:
    """The locations of the topk x steps positions behind each request."""
    assign_extend_cache_locs_cpu(requests, req_to_token, lengths, lengths + topk * steps, out, pool_len)


def build_draft_decode_metadata_cpu(
    req_to_token: Tensor, requests: Tensor, lengths: Tensor, topk: int, steps: int, pool_len: int
) -> Tensor:
    """A row for each branch of each request: the request's prefix, then the branch's `steps` locations."""
    rows = req_to_token[requests.long()].repeat_interleave(topk, dim=0)
    for index, length in enumerate(lengths.tolist()):
        behind = req_to_token[requests[index], length : length + topk * steps].view(topk, steps)
        rows[index * topk : (index + 1) * topk, length : length + steps] = behind
    return rows


def copy_all_layer_kv_cache_cpu(addresses: Tensor, strides: Tensor, target: Tensor, source: Tensor) -> None:
    """Move rows `source` to rows `target` in buffers given by address and bytes a row; all are read before
    any is written."""
    if not target.numel():
        return
    rows = int(torch.maximum(target.max(), source.max())) + 1
    for address, stride in zip(addresses.tolist(), strides.tolist(), strict=True):
        memory = (ctypes.c_uint8 * (rows * stride)).from_address(address)
        buffer = torch.frombuffer(memory, dtype=torch.uint8).view(rows, stride)
        buffer[target.long()] = buffer[source.long()].clone()


def transfer_kv_direct(
    src_layers: list[Tensor],
    dst_layers: list[Tensor],
    src_indices: Tensor,
    dst_indices: Tensor,
    page_size: int,
) -> None:
    """Copy tokens between a KV pool and its host pool; indices name the tokens of whole pages one by one."""
    for source, target in zip(src_layers, dst_layers, strict=True):
        target[dst_indices] = source[src_indices]


def _spans(requests: Tensor, start: Tensor, end: Tensor) -> list[tuple[int, int, int]]:
    return list(zip(requests.tolist(), start.tolist(), end.tolist(), strict=True))


# --- the draft tree and what is accepted of it ----------------------------------------------------


def build_tree_kernel_efficient_cpu(
    parent_list: Tensor,
    selected: Tensor,
    lengths: Tensor,
    mask_out: Tensor,
    positions_out: Tensor,
    retrieve_index_out: Tensor,
    next_token_out: Tensor,
    next_sibling_out: Tensor,
    topk: int,
    depth: int,
    nodes: int,
    mask_mode: int,
) -> None:
    """Links, positions and visibility (nodes x nodes a request) of the trees; node 0 is the root.

    `selected[b, i - 1]` is the candidate that node i is; candidate c hangs below the root if c < topk, else
    below candidate `parent_list[b, c // topk]`. If that one was not selected, nothing leads to c.
    """
    if int(mask_mode) != 1:
        raise NotImplementedError("only the mask among draft tokens (QLEN_ONLY)")
    mask = mask_out[: len(lengths) * nodes * nodes].view(len(lengths), nodes, nodes)
    mask.fill_(False)
    for row, length in enumerate(lengths.tolist()):
        parents = _parents(parent_list[row].tolist(), selected[row].tolist(), topk)
        retrieve_index_out[row] = torch.arange(row * nodes, (row + 1) * nodes)
        for node in range(nodes):
            path = _path_to_root(node, parents)
            mask[row, node, path] = True
            positions_out[row * nodes + node] = length + len(path) - 1
            children = [child for child, parent in parents.items() if parent == node]
            for before, child in zip([None, *children], children, strict=False):
                if before is None:
                    next_token_out[row, node] = child
                else:
                    next_sibling_out[row, before] = child


def _parents(parent_list: list[int], selected: list[int], topk: int) -> dict[int, int]:
    """Node -> its parent, in the order of nodes."""
    nodes = {candidate: index + 1 for index, candidate in enumerate(selected)}
    parents = {
        node: 0 if candidate < topk else nodes.get(parent_list[candidate // topk])
        for candidate, node in nodes.items()
    }
    return {node: parent for node, parent in parents.items() if parent is not None}


def _path_to_root(node: int, parents: dict[int, int]) -> list[int]:
    path = [node]
    while path[-1] != 0:
        path.append(parents.get(path[-1], 0))
    return path


def verify_tree_greedy_cpu(
    *,
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    target_predict: Tensor,
) -> None:
    """Follow from each root the child that is what the target says; `accept_token_num` does not count the
    root. (Spelled as SGLang does.)"""
    said = target_predict.flatten()
    for row in range(len(candidates)):
        node, accepted = 0, [int(retrive_index[row, 0])]
        while len(accepted) < accept_index.shape[1]:
            wanted = int(said[accepted[-1]])
            node = int(retrive_next_token[row, node])
            while node != -1 and int(candidates[row, node]) != wanted:
                node = int(retrive_next_sibling[row, node])
            if node == -1:
                break
            accepted.append(int(retrive_index[row, node]))
        accept_index[row, : len(accepted)] = torch.tensor(accepted, dtype=accept_index.dtype)
        accept_token_num[row] = len(accepted) - 1
        predicts[accepted] = said[accepted].to(predicts.dtype)


def fill_bonus_tokens_cpu(accepted: Tensor, lengths: Tensor, out: Tensor, stride: int) -> None:
    """The last accepted token of each request."""
    rows = torch.arange(len(lengths)) * stride
    out.copy_(accepted.flatten()[rows + lengths.long() - 1])


def fill_accept_out_cache_loc_cpu(accept_index: Tensor, locations: Tensor, out: Tensor) -> None:
    """Locations of the accepted nodes, one behind another."""
    found = locations[accept_index[accept_index > -1].long()]
    out[: len(found)] = found


# --- attention over the KV pool -------------------------------------------------------------------


def decode_attention_cpu(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scale: float,
    value_scale: float,
    out: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    locations: Tensor,
    scratch: Tensor,
    req_to_token: Tensor,
    requests: Tensor,
    lengths: Tensor,
    scaling: float,
    logit_cap: float,
    is_cross_attention: bool,
    sliding_window: int,
    encoder_lengths: Tensor | None,
    sinks: Tensor | None,
) -> None:
    """One query a row, over its first `lengths` positions. Stores the rows' own keys and values first."""
    _refuse(logit_cap, is_cross_attention, sliding_window, encoder_lengths, sinks, key_scale, value_scale)
    if key is not None and value is not None:
        keys[locations] = key.view(-1, *keys.shape[1:])
        values[locations] = value.view(-1, *values.shape[1:])
    for row, length in enumerate(lengths.tolist()):
        at = req_to_token[requests[row], :length].long()
        out[row] = _attend(query[row : row + 1], keys[at], values[at], None, scaling)[0]


def extend_attention_cpu(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    out: Tensor,
    keys: Tensor,
    values: Tensor,
    key_scale: float,
    value_scale: float,
    req_to_token: Tensor,
    requests: Tensor,
    lengths: Tensor,
    new_lengths: Tensor,
    starts: Tensor,
    longest: int,
    scaling: float,
    logit_cap: float,
    is_cross_attention: bool,
    sliding_window: int,
    encoder_lengths: Tensor | None,
    sinks: Tensor | None,
    tree_mask: Tensor | None,
    is_causal: bool,
) -> None:
    """The last `new_lengths` positions of each request over all before them, and among each other over
    earlier ones, or over those that `tree_mask` names. Where their own keys and values are given, these are
    taken, and only those before them from the pool, which may keep others (of latent attention)."""
    _refuse(logit_cap, is_cross_attention, sliding_window, encoder_lengths, sinks, key_scale, value_scale)
    taken = 0  # of the mask
    for row, (length, new) in enumerate(zip(lengths.tolist(), new_lengths.tolist(), strict=True)):
        among = torch.ones(new, new, dtype=torch.bool)
        if tree_mask is not None:
            among = tree_mask[taken : taken + new * new].view(new, new)
            taken += new * new
        elif is_causal:
            among = among.tril()
        visible = torch.cat([torch.ones(new, length - new, dtype=torch.bool), among], dim=1)
        here = slice(int(starts[row]), int(starts[row]) + new)
        at = req_to_token[requests[row], :length].long()
        if key is None or value is None:
            seen_keys, seen_values = keys[at], values[at]
        else:
            seen_keys = key[here].view(new, -1, query.shape[-1])
            seen_values = value[here].view(new, -1, out.shape[-1])
            if before := length - new:
                seen_keys = torch.cat([keys[at[:before]], seen_keys])
                seen_values = torch.cat([values[at[:before]], seen_values])
        out[here] = _attend(query[here], seen_keys, seen_values, visible, scaling)


def _attend(query: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, scaling: float) -> Tensor:
    """[tokens, heads, width], for fewer heads of keys too."""
    by_head = [each.transpose(0, 1).unsqueeze(0) for each in (query, keys, values)]
    attended = scaled_dot_product_attention(
        by_head[0],
        by_head[1],
        by_head[2],
        attn_mask=visible,
        scale=scaling,
        enable_gqa=query.shape[1] != keys.shape[1],
    )
    return attended.squeeze(0).transpose(0, 1)


def _refuse(
    logit_cap: float,
    is_cross_attention: bool,
    sliding_window: int,
    encoder_lengths: Tensor | None,
    sinks: Tensor | None,
    *scales: float,
) -> None:
    unknown = {
        "a cap of logits": logit_cap > 0,
        "cross attention": is_cross_attention or encoder_lengths is not None,
        "a sliding window": sliding_window > 0,
        "sinks": sinks is not None,
        "scaled keys and values": any(scale != 1.0 for scale in scales),
    }
    if found := [name for name, is_so in unknown.items() if is_so]:
        raise NotImplementedError(f"the reference attention for the CPU knows no {', no '.join(found)}")


KERNELS: dict[str, Callable[..., Tensor | None]] = {
    function.__name__: function
    for function in (
        assign_req_to_token_pool_cpu,
        assign_extend_cache_locs_cpu,
        assign_draft_cache_locs_contiguous_cpu,
        build_draft_decode_metadata_cpu,
        copy_all_layer_kv_cache_cpu,
        build_tree_kernel_efficient_cpu,
        verify_tree_greedy_cpu,
        fill_bonus_tokens_cpu,
        fill_accept_out_cache_loc_cpu,
    )
}

OPERATORS: dict[Callable[..., None], str] = {
    decode_attention_cpu: (
        "(Tensor query, Tensor(a!) keys, Tensor(b!) values, float key_scale, float value_scale, "
        "Tensor(c!) out, Tensor? key, Tensor? value, Tensor locations, Tensor(d!) scratch, "
        "Tensor req_to_token, Tensor requests, Tensor lengths, float scaling, float logit_cap, "
        "bool is_cross_attention, int sliding_window, Tensor? encoder_lengths, Tensor? sinks) -> ()"
    ),
    extend_attention_cpu: (
        "(Tensor query, Tensor? key, Tensor? value, Tensor(a!) out, Tensor keys, Tensor values, "
        "float key_scale, float value_scale, Tensor req_to_token, Tensor requests, Tensor lengths, "
        "Tensor new_lengths, Tensor starts, int longest, float scaling, float logit_cap, "
        "bool is_cross_attention, int sliding_window, Tensor? encoder_lengths, Tensor? sinks, "
        "Tensor? tree_mask, bool is_causal) -> ()"
    ),
}
"""Reached as `torch.ops.sgl_kernel.NAME`; with their schemas."""
