"""Operators to be tried on the simulated Ascend and on the CPU, with several types.

A case is a function of `Inputs` and is called once for each device; the results must be equal to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from torch.utils._pytree import tree_leaves

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NUMBERS = (*FLOATS, torch.float64, torch.int64, torch.int32, torch.uint8)
ALL = (*NUMBERS, torch.bool)
FLOAT = (torch.float32,)
WHOLE = (torch.int64, torch.int32)


@dataclass
class Inputs:
    """Makes the same tensors for every device."""

    device: str
    dtype: torch.dtype
    made: int = 0

    def tensor(self, *sizes: int) -> torch.Tensor:
        """Numbers around zero, or from 0 to 9."""
        made = self._generator()
        if self.dtype.is_floating_point:
            numbers = torch.randn(sizes, generator=made)
        else:
            numbers = torch.randint(0, 2 if self.dtype == torch.bool else 10, sizes, generator=made)
        return numbers.to(self.dtype).to(self.device)

    def positive(self, *sizes: int) -> torch.Tensor:
        return self.tensor(*sizes).abs() + 1

    def indices(self, high: int, *sizes: int) -> torch.Tensor:
        return torch.randint(0, high, sizes, generator=self._generator()).to(self.device)

    def mask(self, *sizes: int) -> torch.Tensor:
        return (torch.rand(sizes, generator=self._generator()) < 0.5).to(self.device)

    def _generator(self) -> torch.Generator:
        self.made += 1
        return torch.Generator().manual_seed(self.made)


Case = Callable[[Inputs], Any]
TABLE: dict[str, tuple[Sequence[torch.dtype], Case]] = {
    # views of the tensor itself: what changes is its shape, on the host
    "unsqueeze in place": (ALL, lambda x: x.tensor(3).unsqueeze_(1)),
    "squeeze in place": (ALL, lambda x: x.tensor(3, 1).squeeze_()),
    "transpose in place": (ALL, lambda x: (x.tensor(3, 4).transpose_(0, 1), x.tensor(3, 4).t_())),
    "as_strided in place": (ALL, lambda x: x.tensor(3, 4).as_strided_((2, 2), (4, 1), 1)),
    # arithmetic
    "add": (NUMBERS, lambda x: x.tensor(3, 4) + x.tensor(4)),
    "add a number": (NUMBERS, lambda x: (x.tensor(3) + 1, 2 + x.tensor(3))),
    "add with alpha": (NUMBERS, lambda x: torch.add(x.tensor(3), x.tensor(3), alpha=2)),
    "add a number on the host": (NUMBERS, lambda x: x.tensor(3) + torch.tensor(2.5)),
    "add in place": (NUMBERS, lambda x: x.tensor(3, 4).add_(x.tensor(3, 1))),
    "add into a part": (NUMBERS, lambda x: into_a_part(x)),
    "add with out=": (NUMBERS, lambda x: torch.add(x.tensor(3), x.tensor(3), out=x.tensor(3))),
    "add with out= of another size": (NUMBERS, lambda x: torch.add(x.tensor(3), 1, out=x.tensor(0))),
    "mixed types": (NUMBERS, lambda x: x.tensor(3) * x.indices(5, 3)),
    "sub, mul, div": (FLOATS, lambda x: ((x.tensor(5) - x.tensor(5)) * x.tensor(5)) / x.positive(5)),
    "whole division": (WHOLE, lambda x: (x.tensor(5) // x.positive(5), x.tensor(5) % x.positive(5))),
    "shift and bits": (WHOLE, lambda x: (x.tensor(5) << 2, x.tensor(5) & x.tensor(5), ~x.tensor(5))),
    "pow, sqrt, rsqrt": (FLOATS, lambda x: (x.tensor(5) ** 2, x.positive(5).sqrt(), x.positive(5).rsqrt())),
    "exp, log, sigmoid": (FLOATS, lambda x: (x.tensor(5).exp(), x.positive(5).log(), x.tensor(5).sigmoid())),
    "clamp": (NUMBERS, lambda x: (x.tensor(5).clamp(0, 1), x.tensor(5).clamp_(max=1))),
    "neg, abs": (NUMBERS, lambda x: (-x.tensor(5), x.tensor(5).abs())),
    "maximum": (NUMBERS, lambda x: torch.maximum(x.tensor(5), x.tensor(5))),
    "lerp, addcmul": (FLOATS, lambda x: (x.tensor(3).lerp(x.tensor(3), 0.5), addcmul(x))),
    "foreach": (FLOATS, lambda x: torch._foreach_add([x.tensor(3), x.tensor(2, 2)], 1.0)),
    "foreach in place": (FLOATS, lambda x: foreach_in_place(x)),
    # comparison
    "eq, lt, ge": (ALL, lambda x: (x.tensor(5) == x.tensor(5), x.tensor(5) < 1, x.tensor(5) >= x.tensor(1))),
    "logical": (ALL, lambda x: (x.tensor(5).logical_not(), x.tensor(5).logical_and(x.tensor(5)))),
    "where": (ALL, lambda x: torch.where(x.mask(3, 4), x.tensor(3, 4), x.tensor(4))),
    "where with a number": (NUMBERS, lambda x: torch.where(x.mask(4), x.tensor(4), 0)),
    "isnan, isfinite": (FLOATS, lambda x: (x.tensor(5).isnan(), x.tensor(5).isfinite())),
    "any, all": (ALL, lambda x: (x.tensor(3, 4).any(), x.tensor(3, 4).all(dim=1))),
    "equal": (NUMBERS, lambda x: (x.tensor(5).equal(x.tensor(5)), x.tensor(5).equal(x.tensor(6)))),
    # reduction
    "sum, mean": (FLOATS, lambda x: (x.tensor(3, 4).sum(), x.tensor(3, 4).mean(-1, keepdim=True))),
    "sum of whole numbers": (WHOLE, lambda x: x.tensor(3, 4).sum(0)),
    "cumsum": (NUMBERS, lambda x: x.tensor(3, 4).cumsum(1)),
    "max, argmax": (NUMBERS, lambda x: (x.tensor(3, 4).max(), x.tensor(3, 4).max(1), x.tensor(9).argmax())),
    "min, amin": (NUMBERS, lambda x: (x.tensor(3, 4).min(dim=0), x.tensor(3, 4).amin(1))),
    "var, norm": (FLOATS, lambda x: (x.tensor(3, 4).var(-1), x.tensor(3, 4).norm(dim=-1))),
    "topk, sort": (FLOATS, lambda x: (x.tensor(3, 9).topk(2), x.tensor(3, 9).sort(descending=True))),
    "unique": (NUMBERS, lambda x: x.tensor(9).unique(return_counts=True)),
    "logsumexp": (FLOATS, lambda x: x.tensor(3, 4).logsumexp(-1)),
    # shape and memory
    "cat, stack": (
        ALL,
        lambda x: (torch.cat([x.tensor(2, 3), x.tensor(1, 3)]), torch.stack([x.tensor(2)] * 2)),
    ),
    "split and chunk": (ALL, lambda x: (x.tensor(7, 2).split(3), x.tensor(6).chunk(3), x.tensor(4).unbind())),
    "views": (ALL, lambda x: views(x.tensor(4, 6))),
    "flip, roll, repeat": (
        ALL,
        lambda x: (x.tensor(5).flip(0), x.tensor(5).roll(2), x.tensor(2).repeat(2, 2)),
    ),
    "repeat_interleave": (ALL, lambda x: x.tensor(4).repeat_interleave(3)),
    "repeat_interleave by a tensor": (ALL, lambda x: x.tensor(4).repeat_interleave(x.indices(3, 4))),
    "tril": (NUMBERS, lambda x: (x.tensor(4, 4).tril(), x.tensor(4, 4).triu(1))),
    "pad": (NUMBERS, lambda x: functional.pad(x.tensor(2, 3), (1, 2, 0, 1), value=3)),
    "clone": (ALL, lambda x: (x.tensor(3, 4).t().clone(), x.tensor(3, 4).t().contiguous())),
    "unfold": (NUMBERS, lambda x: x.tensor(9).unfold(0, 3, 2).clone()),
    "zero sizes": (
        NUMBERS,
        lambda x: (x.tensor(0, 3) + 1, torch.cat([x.tensor(0), x.tensor(2)]), no_rows(x)),
    ),
    # copies, which are torch_npu's own
    "copy between types": (NUMBERS, lambda x: copies(x, x.tensor(3, 4))),
    "copy to a part": (NUMBERS, lambda x: copy_to_a_part(x)),
    "copy of a part": (NUMBERS, lambda x: x.tensor(4, 6)[1:3, ::2].t().to(torch.float32)),
    "copy of one row to many": (NUMBERS, lambda x: x.tensor(4, 3).copy_(x.tensor(3))),
    "fill, zero": (
        NUMBERS,
        lambda x: (x.tensor(4).fill_(3), x.tensor(4, 4)[:, 1].zero_(), x.tensor(2).fill_(x.tensor())),
    ),
    "factories": (NUMBERS, lambda x: factories(x)),
    "large whole numbers": ((torch.int64,), lambda x: x.tensor(3) + (2**60 + 1)),
    # indices
    "index": (
        ALL,
        lambda x: (x.tensor(5, 3)[x.indices(5, 4)], x.tensor(5, 3)[x.indices(5, 2), x.indices(3, 2)]),
    ),
    "index by a mask": (
        ALL,
        lambda x: (x.tensor(9)[x.mask(9)], x.mask(9).nonzero(), x.tensor(9).masked_select(x.mask(9))),
    ),
    "index by host indices": (ALL, lambda x: x.tensor(5, 3)[torch.tensor([4, 0])]),
    "index_put": (ALL, lambda x: index_put(x)),
    "index_select, gather": (ALL, lambda x: (x.tensor(5, 3).index_select(1, x.indices(3, 2)), gather(x))),
    "scatter": (NUMBERS, lambda x: x.tensor(3, 5).scatter_(1, x.indices(5, 3, 1), x.tensor(3, 1))),
    "index_add, index_copy": (NUMBERS, lambda x: index_add(x)),
    "masked_fill": (
        NUMBERS,
        lambda x: (x.tensor(5).masked_fill(x.mask(5), 1), x.tensor(5).masked_fill_(x.mask(5), 0)),
    ),
    "embedding": (FLOATS, lambda x: functional.embedding(x.indices(7, 2, 3), x.tensor(7, 4))),
    "searchsorted": (NUMBERS, lambda x: torch.searchsorted(x.tensor(9).sort()[0], x.tensor(3))),
    "bincount": (WHOLE, lambda x: torch.bincount(x.tensor(9), minlength=4)),
    "one_hot": (((torch.int64,)), lambda x: functional.one_hot(x.tensor(5), 10)),
    # matrices and layers
    "mm, bmm, matmul": (FLOATS, lambda x: matmuls(x)),
    "products of two types": (FLOATS, lambda x: products_of_two_types(x)),
    "linear": (
        FLOATS,
        lambda x: (
            functional.linear(x.tensor(2, 8), x.tensor(4, 8), x.tensor(4)),
            functional.linear(x.tensor(8), x.tensor(4, 8)),
        ),
    ),
    "einsum": (FLOAT, lambda x: torch.einsum("bij,bjk->bik", x.tensor(2, 3, 4), x.tensor(2, 4, 5))),
    "softmax": (
        FLOATS,
        lambda x: (x.tensor(3, 4).softmax(-1), x.tensor(3, 4).log_softmax(0), float_softmax(x)),
    ),
    "silu, gelu, relu": (
        FLOATS,
        lambda x: (functional.silu(x.tensor(9)), functional.gelu(x.tensor(9)), functional.relu_(x.tensor(9))),
    ),
    "layer_norm, rms_norm": (
        FLOATS,
        lambda x: (
            functional.layer_norm(x.tensor(3, 8), (8,), x.tensor(8)),
            functional.rms_norm(x.tensor(3, 8), (8,)),
        ),
    ),
    "attention": (FLOATS, lambda x: attention(x)),
    "cross_entropy": (FLOAT, lambda x: functional.cross_entropy(x.tensor(3, 9), x.indices(9, 3))),
    "conv2d": (FLOAT, lambda x: functional.conv2d(x.tensor(1, 3, 8, 8), x.tensor(4, 3, 3, 3), padding=1)),
    "complex": (FLOAT, lambda x: torch.view_as_real(torch.polar(x.positive(3), x.tensor(3)).conj() * 2)),
    # what the host asks for
    "item, tolist": (NUMBERS, lambda x: (x.tensor().item(), x.tensor(3).tolist(), bool(x.tensor(1) > 0))),
}


def into_a_part(x: Inputs) -> torch.Tensor:
    whole = x.tensor(4, 6)
    whole[1:3, ::2] += x.tensor(2, 3)
    return whole


def addcmul(x: Inputs) -> torch.Tensor:
    return x.tensor(3).addcmul(x.tensor(3), x.tensor(3), value=0.5)


def foreach_in_place(x: Inputs) -> list[torch.Tensor]:
    tensors = [x.tensor(3), x.tensor(2, 2)]
    torch._foreach_mul_(tensors, 2.0)
    return tensors


def views(tensor: torch.Tensor) -> list[torch.Tensor]:
    part = tensor[1:, ::2]
    return [
        part,
        part.t(),
        tensor.view(2, 12)[1],
        tensor.reshape(-1)[3:7],
        part.reshape(-1),
        tensor.permute(1, 0).unsqueeze(0).expand(2, 6, 4),
        tensor.diagonal(),
        tensor.select(1, 2).view(2, 2),
        tensor.narrow(0, 1, 2).flatten(),
    ]


def no_rows(x: Inputs) -> list[torch.Tensor]:
    rows = x.tensor(0, 8)
    return [rows.sum(), rows.reshape(0, 2, 4), rows[:, 2:4].clone(), rows.to(torch.float32)]


def copies(x: Inputs, tensor: torch.Tensor) -> list[torch.Tensor]:
    return [torch.empty(3, 4, dtype=dtype, device=x.device).copy_(tensor.abs()) for dtype in ALL]


def copy_to_a_part(x: Inputs) -> torch.Tensor:
    whole = torch.zeros(4, 6, device=x.device)
    whole[1:3, ::2].copy_(x.tensor(3, 2).t())
    return whole


def factories(x: Inputs) -> list[torch.Tensor]:
    where: dict[str, Any] = {"dtype": x.dtype, "device": x.device}
    like = x.tensor(2, 3)
    return [
        torch.zeros(3, **where),
        torch.ones(2, 2, **where),
        torch.full((3,), 5, **where),
        torch.arange(7, **where),
        torch.arange(2, 9, 3, **where),
        torch.eye(3, **where),
        torch.linspace(0, 8, 5, **where),
        torch.tensor([1, 2, 3], **where),
        torch.zeros_like(like),
        like.new_full((2,), 4),
        torch.scalar_tensor(3, **where),
        torch.tril_indices(3, 3, device=x.device),
    ]


def index_put(x: Inputs) -> list[torch.Tensor]:
    to, masked, added = x.tensor(5, 3), x.tensor(5, 3), x.tensor(5, 3)
    to[torch.tensor([0, 3], device=x.device)] = x.tensor(2, 3)
    masked[x.mask(5, 3)] = 1
    added.index_put_((x.indices(5, 1),), x.tensor(1, 3), accumulate=True)
    return [to, masked, added]


def gather(x: Inputs) -> torch.Tensor:
    return x.tensor(3, 5).gather(1, x.indices(5, 3, 2))


def index_add(x: Inputs) -> list[torch.Tensor]:
    rows = torch.tensor([2, 0], device=x.device)
    return [
        x.tensor(4, 3).index_add_(0, rows, x.tensor(2, 3)),
        x.tensor(4, 3).index_copy(0, rows, x.tensor(2, 3)),
    ]


def products_of_two_types(x: Inputs) -> Any:
    """PyTorch's CPU kernels refuse them, CANN's compute in the wider type."""
    rows, columns = x.tensor(3, 4), x.tensor(4, 5).bfloat16()
    if x.device == "cpu":
        wider = torch.promote_types(rows.dtype, columns.dtype)
        rows, columns = rows.to(wider), columns.to(wider)
    return rows @ columns, functional.linear(rows, columns.t())


def matmuls(x: Inputs) -> list[torch.Tensor]:
    return [
        x.tensor(3, 4) @ x.tensor(4, 5),
        x.tensor(4, 3).t() @ x.tensor(4, 5),
        torch.bmm(x.tensor(2, 3, 4), x.tensor(2, 4, 5)),
        x.tensor(2, 3, 4) @ x.tensor(4, 5),
        x.tensor(3, 4) @ x.tensor(4),
        torch.addmm(x.tensor(5), x.tensor(3, 4), x.tensor(4, 5)),
        torch.baddbmm(x.tensor(2, 3, 5), x.tensor(2, 3, 4), x.tensor(2, 4, 5), alpha=0.5),
        torch.mm(x.tensor(3, 4), x.tensor(4, 5), out=x.tensor(3, 5)),
    ]


def float_softmax(x: Inputs) -> torch.Tensor:
    return torch.softmax(x.tensor(3, 4), dim=-1, dtype=torch.float32)


def attention(x: Inputs) -> list[torch.Tensor]:
    query, key, value = x.tensor(1, 4, 5, 8), x.tensor(1, 2, 5, 8), x.tensor(1, 2, 5, 8)
    attend = functional.scaled_dot_product_attention if x.device != "cpu" else math_attention
    masked = attend(query, query, query, attn_mask=x.mask(5, 5) | torch.eye(5, device=x.device).bool())
    return [attend(query, key, value, is_causal=True, enable_gqa=True), masked]


def math_attention(*arguments: torch.Tensor, **settings: Any) -> torch.Tensor:
    """scaled_dot_product_attention as the simulated device has it, for the CPU."""
    result: torch.Tensor = torch.ops.aten._scaled_dot_product_attention_math(*arguments, **settings)[0]
    return result


def names() -> list[str]:
    return [name for name, _, _ in _cases()]


def problems(device: str) -> dict[str, str | None]:
    """For each case what is wrong with it on `device`, in either of the modes that servers use, or None."""
    modes: list[Callable[[], AbstractContextManager[Any]]] = [torch.no_grad, torch.inference_mode]
    found: dict[str, str | None] = {}
    for name, dtype, case in _cases():
        for mode in modes:
            with mode():
                found[name] = found.get(name) or _problem_of(case, dtype, device)
    return found


def _cases() -> Iterator[tuple[str, torch.dtype, Case]]:
    for name, (dtypes, case) in TABLE.items():
        for dtype in dtypes:
            yield f"{name}, {str(dtype).removeprefix('torch.')}", dtype, case


def _problem_of(case: Case, dtype: torch.dtype, device: str) -> str | None:
    expected = tree_leaves(case(Inputs("cpu", dtype)))
    try:
        actual = tree_leaves(case(Inputs(device, dtype)))
        assert len(actual) == len(expected), f"{len(actual)} results, not {len(expected)}"
        for one, other in zip(actual, expected, strict=True):
            if isinstance(other, torch.Tensor):
                assert one.device.type == torch.device(device).type, f"a result on {one.device}"
                torch.testing.assert_close(one.cpu(), other, rtol=0, atol=0, equal_nan=True)
            else:
                assert one == other, f"{one}, not {other}"
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
