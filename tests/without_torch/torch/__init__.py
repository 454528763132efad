"""Names of torch, for a Python without torch: a use raises the ModuleNotFoundError of a failed import.

Most modules of the package import torch, and use it only where a tensor is at hand. With this folder on
PYTHONPATH they can be imported, and tests that never need a tensor run as everywhere else. No behaviour of
torch is imitated.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import NoReturn


def missing(*arguments: object, **named: object) -> NoReturn:
    raise ModuleNotFoundError("No module named 'torch'", name="torch")


class Subclass:
    """In the place of a class of torch that another one derives from: that can be named, too."""

    __new__ = __enter__ = __exit__ = missing


class Name:
    """`torch.anything`: may be named, compared by identity, and written into an annotation."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text

    def __getattr__(self, name: str) -> Name:
        return _inside(self._text, name)

    def __instancecheck__(self, value: object) -> bool:
        """Nothing is an instance of a class of torch, but what only a name stands for might be."""
        return missing() if isinstance(value, Name) else False

    def __or__(self, other: object) -> Name:
        return self

    __ror__ = __or__

    def __mro_entries__(self, bases: object) -> tuple[type, ...]:
        return (Subclass,)

    __mul__ = __rmul__ = __call__ = __iter__ = __getitem__ = __enter__ = __exit__ = __int__ = missing


@functools.cache
def _named(text: str) -> Name:
    return Name(text)


def _inside(text: str, name: str) -> Name:
    if name.startswith("__"):  # protocols of Python, which ask whether there is something
        raise AttributeError(name)
    return _named(f"{text}.{name}")


class _Submodules(MetaPathFinder, Loader):
    """For `import torch.distributed`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, self, is_package=True) if fullname.startswith("torch.") else None

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__getattr__"] = functools.partial(_inside, module.__name__)


def __getattr__(name: str) -> Name:
    return _inside("torch", name)


dtype = _named("torch.dtype")  # for those that look through the names in this module


sys.meta_path.append(_Submodules())
