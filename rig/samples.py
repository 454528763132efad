"""Tensors and Python values for tests: described by plain data, so that two processes make the same ones."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st


def _is_plain(dtype: torch.dtype) -> bool:
    """Whether torch can hold and copy a tensor of this dtype (not quantized, no part of a byte)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "ComplexHalf support is experimental"
            torch.zeros(2, dtype=dtype).clone().view(torch.uint8)
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _dtypes() -> tuple[torch.dtype, ...]:
    found = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    names = ("qint", "quint")
    return tuple(
        sorted(
            (d for d in found if not str(d).removeprefix("torch.").startswith(names) and _is_plain(d)),
            key=str,
        )
    )


DTYPES = _dtypes()
LAYOUTS = ("contiguous", "transposed", "strided", "expanded", "offset")


class Sample(NamedTuple):
    """A tensor of random bytes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    seed: int = 0
    layout: str = "contiguous"

    def tensor(self) -> torch.Tensor:
        if self.layout == "transposed" and len(self.shape) > 1:
            return _random(self.dtype, self.shape[::-1], self.seed).permute(*range(len(self.shape))[::-1])
        if self.layout == "strided" and self.shape:
            return _random(self.dtype, (*self.shape[:-1], 2 * self.shape[-1]), self.seed)[..., ::2]
        if self.layout == "expanded" and self.shape:
            return _random(self.dtype, (1, *self.shape[1:]), self.seed).expand(self.shape)
        if self.layout == "offset":
            return _random(self.dtype, (math.prod(self.shape) + 3,), self.seed)[3:].view(self.shape)
        return _random(self.dtype, self.shape, self.seed)


def _random(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.random.default_rng(seed).integers(0, 256, nbytes, dtype=np.uint8)
    if dtype == torch.bool:
        raw &= 1
    return torch.from_numpy(raw).view(dtype).view(shape) if nbytes else torch.empty(shape, dtype=dtype)


def bits(tensor: torch.Tensor) -> bytes:
    """All bytes of a tensor in element order: equal for NaNs with equal payloads, too."""
    dense = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor)
    return dense.reshape(-1).view(torch.uint8).numpy().tobytes() if dense.numel() else b""


def assert_same_tensor(found: object, expected: torch.Tensor, name: str = "the tensor") -> None:
    """Same type, dtype, shape and bits."""
    assert isinstance(found, torch.Tensor), f"{name} is a {type(found).__name__}"
    assert found.dtype == expected.dtype, name
    assert found.shape == expected.shape, name
    assert bits(found) == bits(expected), f"{name} has other bits"


def realise(value: Any) -> Any:
    """`value` with every `Sample` in it replaced by its tensor."""
    if isinstance(value, Sample):
        return value.tensor()
    if isinstance(value, dict):
        return {key: realise(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(realise(item) for item in value)
    return value


def assert_same(found: Any, expected: Any, where: str = "value") -> None:
    """Same structure, types and bits, tensors and arrays included; dicts in the same order."""
    if isinstance(expected, torch.Tensor):
        assert_same_tensor(found, expected, where)
        return
    assert type(found) is type(expected), f"{where}: {type(found)} for {type(expected)}"
    if isinstance(expected, np.ndarray):
        assert found.dtype == expected.dtype, where
        assert found.shape == expected.shape, where
        assert found.tobytes() == expected.tobytes(), where
    elif isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}[{key!r}]")
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected), where
        for index, item in enumerate(expected):
            assert_same(found[index], item, f"{where}[{index}]")
    else:
        assert found == expected, where


# --- hypothesis --------------------------------------------------------------------------------

seeds = st.integers(0, 2**16)
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)

samples = st.builds(
    Sample,
    dtype=st.sampled_from(DTYPES),
    shape=st.one_of(shapes, st.sampled_from([(1000,), (17, 129)])),
    seed=seeds,
    layout=st.sampled_from(LAYOUTS),
)

keys = st.text(max_size=8)

_arrays = st.builds(
    lambda dtype, shape, seed: np.random.default_rng(seed).integers(0, 100, shape).astype(dtype),
    dtype=st.sampled_from(["float32", "int64", "bool", "uint8", "complex64"]),
    shape=shapes,
    seed=seeds,
)
_plain_values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(max_size=8), st.binary()
)
python_values = st.recursive(
    st.one_of(_plain_values, samples, _arrays),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(keys, inner, max_size=3),
    ),
    max_leaves=8,
)
"""Nested Python values; `realise` makes tensors of the samples in them."""

tensor_dicts: st.SearchStrategy[Mapping[str, Any]] = st.dictionaries(
    keys, st.one_of(samples, samples, python_values), max_size=6
)
"""Dicts of tensors and Python values, as stages exchange them."""
