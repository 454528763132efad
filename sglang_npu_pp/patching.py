"""What a patch is: a replacement with a reason, checked against the release, applied all or nothing.

A patch names the upstream function it replaces and says why, how, from which upstream work the idea comes and
when it can go. A contract is the fingerprint of an upstream function in one release: of those that are
replaced, and of those whose behaviour a replacement relies on. Nothing is applied to an SGLang whose
fingerprints are not known.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import inspect
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import ContractError

Contracts = Mapping[str, Mapping[str, str]]
"""Release -> target -> fingerprint."""


@dataclass(frozen=True)
class Patch:
    """One replaced (or added) function.

    `wrapper(original, *args, **kwargs)` runs in the place of the function at `target`
    ("module:Class.method"); `original` is what was there, None for an added method. `relies_on` lists
    further targets whose behaviour the wrapper depends on.
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

    @property
    def contract_targets(self) -> tuple[str, ...]:
        return self.relies_on if self.adds else (self.target, *self.relies_on)


def fingerprint_source(source: str) -> str:
    """Fingerprint of a function's source text, decorators included, indentation removed."""
    text = textwrap.dedent(source).strip()
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint(target: str) -> str:
    """Fingerprint of the function that is at `target` in this process.

    Raises ContractError when there is none or its source cannot be read.
    """
    owner, name = _resolve(target)
    function = inspect.getattr_static(owner, name, None)
    if isinstance(function, staticmethod | classmethod):
        function = function.__func__
    if function is None:
        raise ContractError(f"{target} does not exist in this SGLang.")
    try:
        source = inspect.getsource(function)  # of what its decorators wrap
    except (OSError, TypeError) as error:
        raise ContractError(f"The source of {target} cannot be read: {error}.") from None
    if _layers(function) > _decorators(source):
        code = function.__code__
        raise ContractError(
            f"{target} is wrapped by something that is not SGLang's ({code.co_filename}, line "
            f"{code.co_firstlineno}; another plugin?)."
        )
    return fingerprint_source(source)


def _layers(function: Any) -> int:
    """How many functions are wrapped around the one whose source `inspect` finds."""
    layers = 0
    while hasattr(function, "__wrapped__"):
        function = function.__wrapped__
        layers += 1
    return layers


def _decorators(source: str) -> int:
    (node,) = ast.parse(textwrap.dedent(source)).body
    return len(getattr(node, "decorator_list", ()))


def fingerprint_in_file(source: str, qualname: str) -> str | None:
    """Fingerprint of `Class.method` or `function` in the text of a module, None if it is not there.

    Gives the same value as `fingerprint` without importing the module.
    """
    node: ast.AST = ast.parse(source)
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
    return fingerprint_source("\n".join(source.splitlines()[first - 1 : node.end_lineno]))


def contract_targets(patches: Iterable[Patch]) -> list[str]:
    """Every target that a contract must know, sorted."""
    return sorted({target for patch in patches for target in patch.contract_targets})


def check_contracts(patches: Sequence[Patch], release: str, contracts: Contracts) -> None:
    """Raise ContractError unless every function is the one that we know in this release."""
    known = contracts.get(release)
    if known is None:
        raise ContractError(
            f"SGLang {release} is not a release that sglang-npu-pp knows ({', '.join(sorted(contracts))})."
        )
    different = [
        target
        for target in contract_targets(patches)
        if target not in known or fingerprint(target) != known[target]
    ]
    if different:
        raise ContractError(
            f"This SGLang calls itself {release}, but {', '.join(different)} "
            f"{'differs' if len(different) == 1 else 'differ'} from that release "
            "(another plugin, or an edited file?)."
        )
    for patch in patches:
        if patch.adds and hasattr(*_resolve(patch.target)):
            raise ContractError(f"SGLang {release} already has {patch.target}, which we would add.")


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
        if isinstance(original, staticmethod | classmethod):
            raise TypeError("static and class methods are not supported")
        setattr(owner, name, _bind(patch.wrapper, original))
        self._restore.append(lambda: setattr(owner, name, original))


def _bind(wrapper: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def patched(*args: Any, **kwargs: Any) -> Any:
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
