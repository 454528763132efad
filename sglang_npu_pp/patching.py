"""A patch: a replaced function with a reason, checked against the release, applied all or nothing.

A contract holds the fingerprints of one release: of every function replaced or relied on, or its absence.
Without a matching contract nothing is applied. Existing functions (`optional`, `unless`), not version
numbers, decide whether a release needs a patch.
"""

from __future__ import annotations

import ast
import enum
import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

from .errors import ContractError

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


def fingerprint_source(source: str) -> str:
    """Fingerprint of a function's source text, with decorators, without indentation."""
    text = textwrap.dedent(source).strip()
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint(target: str) -> str:
    """Fingerprint of the function at `target` in this process.

    A module not imported yet is read from its file: some imports must wait for SGLang's set-up
    (prometheus_client's directory). Raises ContractError without such a function or readable source.
    """
    unloaded = _fingerprint_of_unloaded(target)
    if unloaded is not None:
        return unloaded
    owner, name = _resolve(target)
    function = inspect.getattr_static(owner, name, None)
    if isinstance(function, staticmethod | classmethod):
        function = function.__func__
    if function is None:
        raise ContractError(f"{target} does not exist in this SGLang.")
    try:
        source = inspect.getsource(function)  # of the function inside its decorators
    except (OSError, TypeError) as error:
        raise ContractError(f"The source of {target} cannot be read: {error}.") from None
    if _layers(function) > _decorators(source):
        code = function.__code__
        raise ContractError(
            f"{target} is wrapped by something that is not SGLang's ({code.co_filename}, line "
            f"{code.co_firstlineno}; another plugin?)."
        )
    return fingerprint_source(source)


def _fingerprint_of_unloaded(target: str) -> str | None:
    """None for an imported module, or one outside a file of its package."""
    module, _, _ = target.partition(":")
    package = None if module in sys.modules else importlib.util.find_spec(module.partition(".")[0])
    if package is None or not package.submodule_search_locations:
        return None
    return fingerprint_on_disk(target, Path(package.submodule_search_locations[0]))


def fingerprint_on_disk(target: str, package: Path) -> str | None:
    """Fingerprint of `target` below the top package's folder, None if absent. Imports nothing."""
    module, _, qualname = target.partition(":")
    path = package.parent / (module.replace(".", "/") + ".py")
    return fingerprint_in_file(path.read_text(), qualname) if path.is_file() else None


def _layers(function: Any) -> int:
    """Number of wrappers around the source that `inspect` finds."""
    layers = 0
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
        layers += 1
    return layers


def _decorators(source: str) -> int:
    (node,) = ast.parse(textwrap.dedent(source)).body
    return len(getattr(node, "decorator_list", ()))


def fingerprint_in_file(source: str, qualname: str) -> str | None:
    """`fingerprint` from the text of a module, without importing it; None if absent."""
    found = source_in_file(source, qualname)
    return None if found is None else fingerprint_source(found)


def source_in_file(source: str, qualname: str) -> str | None:
    """Text of `Class.method` or `function`, None if absent."""
    node: ast.AST = _parsed(source)
    for part in qualname.split("."):
        found = None
        for child in ast.iter_child_nodes(node):
            named = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            if named and child.name == part:  # type: ignore[attr-defined]
                found = child  # the last definition wins, as at run time
        if found is None:
            return None
        node = found
    assert isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return "\n".join(source.splitlines()[first - 1 : node.end_lineno])


@functools.lru_cache(maxsize=16)
def _parsed(source: str) -> ast.Module:
    """Cached: parsing a module takes 0.1 s."""
    return ast.parse(source)


def contract_targets(patches: Iterable[Patch]) -> list[str]:
    """All targets of a contract, sorted."""
    return sorted({target for patch in patches for target in patch.contract_targets})


def known_contract(release: str, contracts: Contracts) -> Contract:
    """The contract of a release. Raises ContractError without one."""
    contract = contracts.get(release)
    if contract is None:
        raise ContractError(
            f"SGLang {release} is not a release that sglang-npu-pp knows ({', '.join(contracts)})."
        )
    return contract


class Why(enum.Enum):
    """Reasons against a patch."""

    DIFFERS = enum.auto()  # functions are not as its release has them
    PRESENT = enum.auto()  # it has the function that would be added
    ABSENT = enum.auto()  # it does not have the function that would be replaced


@dataclass(frozen=True)
class Misfit:
    """One patch that cannot be applied."""

    why: Why
    targets: tuple[str, ...]


IsAsKnown = Callable[[str, str | None], bool]
"""Whether the function at a target has this fingerprint; with None, whether there is no such function."""


def misfit(patch: Patch, contract: Contract, is_as_known: IsAsKnown) -> Misfit | None:
    """The one rule of whether a patch fits, for server (`check_contracts`) and doctor; None if it does, or is
    not needed."""
    different = tuple(
        target
        for target in patch.checked_targets(contract)
        if target not in contract or not is_as_known(target, contract[target])
    )
    if different:
        return Misfit(Why.DIFFERS, different)
    if not patch.is_needed(contract):
        return None
    if patch.adds:
        return None if is_as_known(patch.target, None) else Misfit(Why.PRESENT, (patch.target,))
    return Misfit(Why.ABSENT, (patch.target,)) if contract[patch.target] is None else None


def check_contracts(patches: Sequence[Patch], release: str, contracts: Contracts) -> tuple[Patch, ...]:
    """Return those of `patches` that this release needs. Raises ContractError unless all targets match."""
    contract = known_contract(release, contracts)
    _import_what_is_replaced(patch for patch in patches if patch.is_needed(contract))
    is_as_known = functools.cache(_is_as_known)  # many patches rely on the same functions
    found = [misfit(patch, contract, is_as_known) for patch in patches]
    different = sorted(
        {target for each in found if each and each.why is Why.DIFFERS for target in each.targets}
    )
    if different:
        raise ContractError(
            f"This SGLang calls itself {release}, but {', '.join(different)} "
            f"{'differs' if len(different) == 1 else 'differ'} from that release "
            "(another plugin, or an edited file?)."
        )
    for patch, each in zip(patches, found, strict=True):
        if each and each.why is Why.PRESENT:
            raise ContractError(f"SGLang {release} already has {patch.target}, which we would add.")
        if each and each.why is Why.ABSENT:
            raise ContractError(f"SGLang {release} has no {patch.target}, which we would replace.")
    return tuple(patch for patch in patches if patch.is_needed(contract))


def _import_what_is_replaced(patches: Iterable[Patch]) -> None:
    """Needed soon anyway; a loaded function is read faster than a file."""
    for patch in patches:
        with suppress(ImportError):  # the check reports a missing one
            importlib.import_module(patch.target.partition(":")[0])


def _is_as_known(target: str, known: str | None) -> bool:
    """For this process. Raises ContractError if a known function cannot be read."""
    return not _exists(target) if known is None else fingerprint(target) == known


def _exists(target: str) -> bool:
    try:
        owner, name = _resolve(target)
    except ContractError:
        return False
    return inspect.getattr_static(owner, name, None) is not None


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
