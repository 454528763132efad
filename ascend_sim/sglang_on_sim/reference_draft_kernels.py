"""Plain torch in the place of the kernels that SGLang launches on an NPU to draft with EAGLE or NEXTN and to
verify drafts: its own Triton kernels, and those of sgl_kernel_npu.

As in `reference_triton_kernels` and `reference_kernels`: parameters have the names and the order of the
kernel's own, every operation goes through torch_npu onto the current stream, and none waits for the device.

Shapes: requests B, tokens a request verifies W (the last one accepted before, then drafts), the longest
accepted chain A.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

FULL_MASK, MASK_OF_DRAFTS = 0, 1  # tree_mask_mode: with a column for each token before them, or without

# --- slots of the KV cache ------------------------------------------------------------------------


def assign_req_to_token_pool(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    start_offset: Tensor,
    end_offset: Tensor,
    out_cache_loc: Tensor,
    pool_len: int,
    bs_upper: int,
) -> None:
    """Write new slots to each request's row, from its start on, up to its end.

    req_to_token [rows, pool_len]; row, start and end of each request [B]; out_cache_loc [new slots of all].
    Rows are written whole, behind each request's end as they were.
    """
    column = torch.arange(pool_len, device=req_to_token.device)
    start, end = start_offset.long().unsqueeze(1), end_offset.long().unsqueeze(1)
    first_new = (end - start).cumsum(0) - (end - start)
    nth_new = (first_new + column - start).clamp(0, len(out_cache_loc) - 1)
    rows = req_to_token[req_pool_indices]
    new = out_cache_loc[nth_new].to(rows.dtype)
    req_to_token[req_pool_indices] = torch.where((column >= start) & (column < end), new, rows)


def assign_draft_cache_locs_contiguous(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    seq_lens: Tensor,
    out_cache_loc: Tensor,
    pool_len: int,
    topk: int,
    speculative_num_steps: int,
    positions: Tensor | None = None,
    mrope: Tensor | None = None,
    **_options: int,
) -> None:
    """Read the slots of each request's drafts, those behind its `seq_lens` tokens: out_cache_loc [B topk
    steps]; and the position of the first, positions [B topk], where asked for."""
    if mrope is not None:
        raise NotImplementedError("assign_draft_cache_locs_contiguous with mrope on the simulated Ascend")
    drafts = torch.arange(topk * speculative_num_steps, device=seq_lens.device)
    begin = req_pool_indices.long() * pool_len + seq_lens.long()
    slots = req_to_token.view(-1)[begin.unsqueeze(1) + drafts]
    out_cache_loc.copy_(slots.flatten())
    if positions is not None:
        positions.copy_(seq_lens.repeat_interleave(topk))


def cache_loc_update(
    req_indices: Tensor, token_pool: Tensor, start_offset: Tensor, end_offset: Tensor, cache_loc: Tensor
) -> Tensor:
    """Read the slots of each request from its start to its end, the requests one behind the other.

    token_pool [rows, context]; row, start and end of each request [B]; cache_loc [slots of all].
    """
    ends = (end_offset.long() - start_offset.long()).cumsum(0)
    token = torch.arange(len(cache_loc), device=cache_loc.device)
    request = torch.searchsorted(ends, token, right=True).clamp(max=len(ends) - 1)
    # `ends - token` tokens of the request are left, this one included.
    column = end_offset.long()[request] - ends[request] + token
    return cache_loc.copy_(token_pool[req_indices[request], column])


# --- drafts ---------------------------------------------------------------------------------------


def gather_rows(
    idx_ptr: Tensor,
    s0: Tensor,
    d0: Tensor,
    n0: int,
    s1: Tensor,
    d1: Tensor,
    n1: int,
    s2: Tensor,
    d2: Tensor,
    n2: int,
    s3: Tensor,
    d3: Tensor,
    n3: int,
    HAS3: bool,  # noqa: N803 - the kernel's own name
    BLOCK: int,  # noqa: N803
) -> None:
    """Gather the same rows of three tables, or of four: d [B, n] of s [rows, n]."""
    tables = [(s0, d0), (s1, d1), (s2, d2)] + [(s3, d3)] * HAS3
    for source, target in tables:
        target.copy_(source[idx_ptr.long()])


def build_tree_kernel_efficient(
    parent_list: Tensor,
    selected_index: Tensor,
    verified_seq_len: Tensor,
    tree_mask: Tensor,
    positions: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    topk: int,
    depth: int,
    draft_token_num: int,
    tree_mask_mode: int,
) -> None:
    """Lay out the chain of each request, drafts that follow each other; W is `draft_token_num`.

    verified_seq_len [B], the tokens before -> positions [B W]; places of all in one row, retrive_index
    [B, W]; in the request's own W the one that follows, retrive_next_token, and the next of equal depth,
    retrive_next_sibling, -1 for none. tree_mask: of each of the W what it attends to, behind the columns for
    the tokens before, which are True already. `parent_list` and `selected_index` say which draft follows
    which: in a chain, the next one.
    """
    if topk != 1 or depth != draft_token_num - 1 or tree_mask_mode not in (FULL_MASK, MASK_OF_DRAFTS):
        form = f"topk {topk}, depth {depth} of {draft_token_num}, mask {tree_mask_mode}"
        raise NotImplementedError(
            f"build_tree_kernel_efficient in another form ({form}) on the simulated Ascend"
        )
    lengths, width = verified_seq_len.long(), draft_token_num
    place = torch.arange(width, device=lengths.device)
    request = torch.arange(len(lengths), device=lengths.device)
    positions.copy_((lengths.unsqueeze(1) + place).flatten())
    retrive_index.copy_(request.unsqueeze(1) * width + place)
    retrive_next_token.copy_(torch.where(place < width - 1, place + 1, -1).expand_as(retrive_next_token))
    retrive_next_sibling.fill_(-1)
    before = lengths if tree_mask_mode == FULL_MASK else torch.zeros_like(lengths)
    begin = width * (before.cumsum(0) - before) + width * width * request
    row = begin.unsqueeze(1) + (before.unsqueeze(1) + width) * place  # where each row of a mask begins
    cells = row.unsqueeze(2) + before.view(-1, 1, 1) + place
    attended = (place <= place.unsqueeze(1)).expand(cells.shape)
    tree_mask[cells.flatten()] = attended.flatten()


# --- which drafts are right -----------------------------------------------------------------------


def verify_tree_greedy(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    target_predict: Tensor,
) -> None:
    """Accept drafts from the first on, as long as each is what the model says behind the one before.

    candidates [B, W], the last token accepted before and drafts, in the order of a chain (as
    `build_tree_kernel_efficient` lays them out); target_predict [B, W], what the model says behind each ->
    accept_token_num [B], drafts accepted; accept_index [B, A], their places in one row of all, the first is
    that of the token before, -1 behind the last; predicts [B W], what the model says up to the first draft
    that is wrong, elsewhere as it was. Links are those of a chain: they are not followed.
    """
    if accept_index.shape[1] != candidates.shape[1]:
        raise NotImplementedError("verify_tree_greedy of a tree on the simulated Ascend")
    right = (candidates[:, 1:] == target_predict[:, :-1]).long().cumprod(1)
    accepted = torch.cat([torch.ones_like(right[:, :1]), right], 1).bool()
    accept_token_num.copy_(right.sum(1))
    accept_index.copy_(torch.where(accepted, retrive_index, accept_index.long()))
    said = predicts.view(candidates.shape)
    said.copy_(torch.where(accepted, target_predict.to(said.dtype), said))


def verify_commit_outputs(
    predict: Tensor,
    accept_index: Tensor,
    accept_lens: Tensor,
    seq_lens: Tensor,
    new_seq_lens: Tensor,
    bonus: Tensor,
    BS: int,  # noqa: N803 - the kernel's own names
    PREDICT_SIZE: int,  # noqa: N803
    PREDICT_STRIDE: int,  # noqa: N803
    INDEX_STRIDE_0: int,  # noqa: N803
    INDEX_STRIDE_1: int,  # noqa: N803
    ACCEPT_STRIDE: int,  # noqa: N803
    SEQ_STRIDE: int,  # noqa: N803
    BLOCK: int,  # noqa: N803
    last_steps: Tensor | None,
    track_steps: Tensor | None,
    correct: Tensor | None,
    select: Tensor | None,
    ids: Tensor | None,
    DRAFT_WIDTH: int,  # noqa: N803
    TRACK_INTERVAL: int,  # noqa: N803
) -> None:
    """What the next round needs of `verify_tree_greedy`: new_seq_lens [B], and bonus [B], the last token.

    accept_lens [B], accepted tokens, the last one included. With a DRAFT_WIDTH also the place of the last
    one in its request, in its order (last_steps) and among all rows (select), accepted drafts (correct), and
    all that was said (ids).
    """
    if TRACK_INTERVAL:
        raise NotImplementedError("_verify_commit_outputs_kernel with states on the simulated Ascend")
    accepted = accept_lens.long()
    last = accept_index.long().gather(1, (accepted - 1).unsqueeze(1)).squeeze(1)
    new_seq_lens.copy_(seq_lens.long() + accepted)
    bonus.copy_(predict[last])
    if DRAFT_WIDTH:
        assert last_steps is not None
        assert correct is not None
        assert select is not None
        assert ids is not None
        begin = torch.arange(BS, device=last.device) * DRAFT_WIDTH
        last_steps.copy_(last - begin)
        correct.copy_(accepted - 1)
        select.copy_(begin + accepted - 1)
        ids.copy_(predict)


# --- where they go --------------------------------------------------------------------------------

TRITON_KERNELS: Mapping[str, Callable[..., None]] = {
    "assign_req_to_token_pool": assign_req_to_token_pool,
    "assign_draft_cache_locs_contiguous": assign_draft_cache_locs_contiguous,
    "_gather_rows_kernel": gather_rows,
    "_verify_commit_outputs_kernel": verify_commit_outputs,
}

# Operators that sgl_kernel_npu registers when it is imported, by their schemas.
ADDED_OPERATORS: Mapping[str, Callable[..., Any]] = {
    "cache_loc_update(Tensor req_indices, Tensor token_pool, Tensor start_offset, Tensor end_offset, "
    "Tensor(a!) cache_loc) -> Tensor(a!)": cache_loc_update,
    "build_tree_kernel_efficient(Tensor parent_list, Tensor selected_index, Tensor verified_seq_len, "
    "Tensor(a!) tree_mask, Tensor(b!) positions, Tensor(c!) retrive_index, Tensor(d!) retrive_next_token, "
    "Tensor(e!) retrive_next_sibling, int topk, int depth, int draft_token_num, int tree_mask_mode) -> ()": (
        build_tree_kernel_efficient
    ),
}

PACKAGE_KERNELS: Mapping[str, Any] = {
    "sgl_kernel_npu.sample.verify_tree_greedy.verify_tree_greedy": verify_tree_greedy,
}
