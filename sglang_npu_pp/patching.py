"""What a patch is: a replacement with a reason, checked against the release, applied all or nothing.

A patch names the upstream function it replaces and says why, how, from which upstream work the idea comes and
when it can go. A contract is what is known of one release: the fingerprint of every upstream function that is
replaced, or whose behaviour a replacement relies on, and which of them the release does not have. What of an
SGLang is known, and which patches it gets for that, says builds.py.

Releases differ. A patch that not every release needs says so by naming functions (`optional`, `unless`); the
contract says which of these a release has, so no version numbers are compared.
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
from .fingerprints import decorators_in_source, fingerprint_of_source, fingerprint_on_disk

Contract = Mapping[str, str | None]
"""Target -> fingerprint, None for a function that the release does not have."""

Contracts = Mapping[str, Contract]
"""Release -> contract."""


@dataclass(frozen=True)
class Patch:
    """One replaced (or added) function.

    `wrapper(original, *args, **kwargs)` runs in the place of the function at `target`
    ("module:Class.method"); `original` is what was there, None for an added method. `relies_on` lists
    further targets whose behaviour the wrapper depends on. `when` gets the arguments of a call and says
    whether the wrapper runs; where it says no, the original runs with these very arguments.
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
        """Whether these exist decides whether a release needs the patch."""
        return (*((self.target,) if self.optional else ()), *((self.unless,) if self.unless else ()))

    def checked_targets(self, contract: Contract) -> tuple[str, ...]:
        """What must be as the contract says before an SGLang of that release is touched."""
        return self.contract_targets if self.is_needed(contract) else self._decisive_targets

    def is_needed(self, contract: Contract) -> bool:
        """Whether a release with this contract needs the patch."""
        if self.unless is not None and contract.get(self.unless) is not None:
            return False
        return not (self.optional and contract.get(self.target) is None)


def fingerprint(target: str) -> str | None:
    """Fingerprint of the function that is at `target` in this process, None if there is none.

    A module that nobody has imported yet is read, and stays so: some of SGLang's import what must not be
    imported before it has set it up (prometheus_client before its directory, for one). Raises
    ContractError when its source cannot be read, or is not all that runs.
    """
    folder = _folder_of_unloaded(target)
    if folder is not None:
        return fingerprint_on_disk(target, folder)
    try:
        owner, name = _resolve(target)
    except ContractError:
        return None
    function = inspect.getattr_static(owner, name, None)
    if isinstance(function, staticmethod | classmethod):
        function = function.__func__
    if function is None:
        return None
    try:
        source = inspect.getsource(function)  # of what its decorators wrap
    except (OSError, TypeError) as error:
        raise ContractError(f"The source of {target} cannot be read: {error}.") from None
    if _layers(function) > decorators_in_source(source):
        code = function.__code__
        raise ContractError(
            f"{target} is wrapped by something that is not SGLang's ({code.co_filename}, line "
            f"{code.co_firstlineno}; another plugin?)."
        )
    return fingerprint_of_source(source)


def _folder_of_unloaded(target: str) -> Path | None:
    """Of its package. None if the module is imported already, or does not come from a package's file."""
    module, _, _ = target.partition(":")
    package = None if module in sys.modules else importlib.util.find_spec(module.partition(".")[0])
    if package is None or not package.submodule_search_locations:
        return None
    return Path(package.submodule_search_locations[0])


def _layers(function: Any) -> int:
    """How many functions are wrapped around the one whose source `inspect` finds."""
    layers = 0
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
        layers += 1
    return layers


def contract_targets(patches: Iterable[Patch]) -> list[str]:
    """Every target that a contract must know, sorted."""
    return sorted({target for patch in patches for target in patch.contract_targets})


def import_what_is_replaced(patches: Iterable[Patch]) -> None:
    """It is about to be imported anyway, and a function that is loaded is looked at faster than a file."""
    for patch in patches:
        with suppress(ImportError):  # what is missing is found when it is looked at
            importlib.import_module(patch.target.partition(":")[0])


class AppliedPatches:
    """Patches that are in force; `undo()` puts everything back."""

    def __init__(self, patches: Sequence[Patch]) -> None:
        """Apply all of `patches`. If one fails, none is in force. Raises ContractError."""
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
    """A copy of an upstream function in which these global names mean something else."""
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
    """What stands in the place of `original` while `patch` is applied."""
    wrapper, when = patch.wrapper, patch.when

    @functools.wraps(original)
    def patched(*args: Any, **kwargs: Any) -> Any:
        if when is not None and not when(*args, **kwargs):
            return original(*args, **kwargs)
        return wrapper(original, *args, **kwargs)

    return patched


def _resolve(target: str) -> tuple[Any, str]:
    """The object that holds the target, and the target's name in it."""
    module_name, _, qualname = target.partition(":")
    *path, name = qualname.split(".")
    try:
        owner: Any = importlib.import_module(module_name)
        for part in path:
            owner = getattr(owner, part)
    except (ImportError, AttributeError) as error:
        raise ContractError(f"{target} does not exist in this SGLang ({error}).") from None
    return owner, name
