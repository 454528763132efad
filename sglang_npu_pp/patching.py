"""A patch: a replaced function with a reason, checked against the release, applied all or nothing.

A contract holds the fingerprints of one release: of every function replaced or relied on, or its absence.
builds.py compares an SGLang with all contracts and picks its patches. Existing functions (`optional`,
`unless`), not version numbers, decide whether a release needs a patch.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

from .errors import ContractError
from .fingerprints import fingerprint_of_own_node, fingerprint_on_disk, parsed_alone

Contract = Mapping[str, str | None]
"""Target -> fingerprint, None for a function that the release does not have."""

Contracts = Mapping[str, Contract]
"""Release -> contract."""


@dataclass(frozen=True)
class Patch:
    """One replaced (or added) function.

    `wrapper(original, *args, **kwargs)` replaces the function at `target` ("module:Class.method"); `original`
    is None for an added method. `relies_on`: further targets whose behaviour matters. `when` gets the
    arguments of a call; if false, the original runs.
    """

    target: str
    wrapper: Callable[..., Any]
    why: str
    how: str
    upstream: str  # the upstream work that the idea comes from or that would make this unnecessary
    plan: str  # when and how the patch goes away
    relies_on: tuple[str, ...] = ()
    adds: bool = False  # the target must not exist upstream
    device: str | None = None  # only where SGLang serves on it; None: everywhere
    optional: bool = False  # a release without the target does not need the patch
    unless: str | None = None  # a release that has this function does not need the patch
    when: Callable[..., bool] | None = None  # None: always

    @property
    def contract_targets(self) -> tuple[str, ...]:
        own = () if self.adds else (self.target,)
        return (*own, *self.relies_on, *self._decisive_targets)

    @property
    def _decisive_targets(self) -> tuple[str, ...]:
        """Their existence decides whether a release needs the patch."""
        return (*((self.target,) if self.optional else ()), *((self.unless,) if self.unless else ()))

    def checked_targets(self, contract: Contract) -> tuple[str, ...]:
        """Targets to compare with the contract."""
        return self.contract_targets if self.is_needed(contract) else self._decisive_targets

    def is_needed(self, contract: Contract) -> bool:
        """Whether a release with this contract needs the patch."""
        if self.unless is not None and contract.get(self.unless) is not None:
            return False
        return not (self.optional and contract.get(self.target) is None)


def fingerprint(target: str) -> str | None:
    """Fingerprint of the function at `target` in this process, None if absent or inherited, as in its file.

    A module not imported yet is read from its file: some imports must wait for SGLang's set-up
    (prometheus_client's directory). Raises ContractError for unreadable or wrapped source.
    """
    folder = _folder_of_unloaded(target)
    if folder is not None:
        return fingerprint_on_disk(target, folder)
    try:
        owner, name = _resolve(target)
    except ContractError:
        return None
    function = vars(owner).get(name)
    if isinstance(function, staticmethod | classmethod):
        function = function.__func__
    if function is None:
        return None
    try:
        source = inspect.getsource(function)  # of the function inside its decorators
    except (OSError, TypeError) as error:
        raise ContractError(f"The source of {target} cannot be read: {error}.") from None
    node = parsed_alone(source)
    if _layers(function) > len(getattr(node, "decorator_list", ())):
        code = function.__code__
        raise ContractError(
            f"{target} is wrapped by something that is not SGLang's ({code.co_filename}, line "
            f"{code.co_firstlineno}; another plugin?)."
        )
    return fingerprint_of_own_node(node)


def _folder_of_unloaded(target: str) -> Path | None:
    """Folder of its package. None for an imported module, or one outside a file of its package."""
    module, _, _ = target.partition(":")
    package = None if module in sys.modules else importlib.util.find_spec(module.partition(".")[0])
    if package is None or not package.submodule_search_locations:
        return None
    return Path(package.submodule_search_locations[0])


def _layers(function: Any) -> int:
    """Number of wrappers around the source that `inspect` finds."""
    layers = 0
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
        layers += 1
    return layers


def contract_targets(patches: Iterable[Patch]) -> list[str]:
    """All targets of a contract, sorted."""
    return sorted({target for patch in patches for target in patch.contract_targets})


def import_what_is_replaced(patches: Iterable[Patch]) -> None:
    """Needed soon anyway; a loaded function is read faster than a file."""
    for patch in patches:
        with suppress(ImportError):  # reading reports a missing one
            importlib.import_module(patch.target.partition(":")[0])


class AppliedPatches:
    """Patches in force; `undo()` restores everything."""

    def __init__(self, patches: Sequence[Patch]) -> None:
        """Apply all of `patches`, or none if one fails (ContractError)."""
        self._restore: list[Callable[[], None]] = []
        for patch in patches:
            try:
                self._apply(patch)
            except Exception as error:
                self.undo()
                raise ContractError(f"The patch of {patch.target} could not be applied ({error}).") from error

    def undo(self) -> None:
        while self._restore:
            self._restore.pop()()

    def _apply(self, patch: Patch) -> None:
        owner, name = _resolve(patch.target)
        if patch.adds:
            setattr(owner, name, patch.wrapper)
            self._restore.append(lambda: delattr(owner, name))
            return
        original = inspect.getattr_static(owner, name)
        if isinstance(original, staticmethod):
            raise TypeError("static methods are not supported")
        bound: Any = bind(patch, getattr(original, "__func__", original))
        setattr(owner, name, classmethod(bound) if isinstance(original, classmethod) else bound)
        self._restore.append(lambda: setattr(owner, name, original))


def with_names(function: Callable[..., Any], **names: Any) -> Callable[..., Any]:
    """A copy of an upstream function with these global names replaced."""
    assert isinstance(function, FunctionType)
    copy = FunctionType(
        function.__code__,
        {**function.__globals__, **names},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


def bind(patch: Patch, original: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement of `original` while `patch` is applied."""
    wrapper, when = patch.wrapper, patch.when

    @functools.wraps(original)
    def patched(*args: Any, **kwargs: Any) -> Any:
        if when is not None and not when(*args, **kwargs):
            return original(*args, **kwargs)
        return wrapper(original, *args, **kwargs)

    return patched


def _resolve(target: str) -> tuple[Any, str]:
    """The object with the target, and the target's name in it."""
    module_name, _, qualname = target.partition(":")
    *path, name = qualname.split(".")
    try:
        owner: Any = importlib.import_module(module_name)
        for part in path:
            owner = getattr(owner, part)
    except (ImportError, AttributeError) as error:
        raise ContractError(f"{target} does not exist in this SGLang ({error}).") from None
    return owner, name
