"""Fingerprints of functions: equal where two texts are the same program, whatever they look like.

Not part of a fingerprint: comments, blank lines, formatting, docstrings, annotations, and the texts of log
calls (`logger.info("...")`). Everything else is: names, constants, operators, defaults, decorators, order. In
doubt a difference counts:

- Docstrings and annotations count where they may be read at run time: in a function with a decorator that is
  none of `_TRANSPARENT`, in a class inside a function (its fields), and wherever the text itself names
  something that reads them.
- Of a log call only constant text is left out. What is computed for it stays, each with its format: it may
  have side effects, or fail.
- A declaration without a value (`x: int`) stays where nothing else makes the name local.

A fingerprint is the same for every version of Python that can parse the text.
"""

from __future__ import annotations

import ast
import copy
import functools
import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_Scope = ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda | ast.ClassDef

_TRANSPARENT = frozenset(
    (
        *(
            "staticmethod",
            "classmethod",
            "property",
            "contextmanager",
            "asynccontextmanager",
            "abstractmethod",
        ),
        *("wraps", "cache", "lru_cache", "cached_property", "no_grad", "inference_mode", "override"),
        *("DynamicGradMode", "scheduler_nvtx_method", "scheduler_stage_method"),  # SGLang's
    )
)
"""Decorators that read neither annotations nor docstrings: the last part of their names."""

_READS_ANNOTATIONS = frozenset(
    ("__annotations__", "get_annotations", "get_type_hints", "signature", "getfullargspec")
)
_READS_DOCSTRINGS = frozenset(("__doc__", "getdoc"))

_LOGGERS = frozenset(("logger", "_logger", "logging"))
_LOG_CALLS = frozenset(
    (
        *("debug", "info", "warning", "warn", "error", "exception", "critical", "fatal", "log"),
        *("debug_once", "info_once", "warning_once"),  # SGLang's
    )
)
_CONVERSION = re.compile(r"%(?:\(\w*\))?[#0 +-]*(?:\*|\d+)?(?:\.(?:\*|\d+))?[hlL]?[a-zA-Z]")


def fingerprint_of_source(text: str) -> str:
    """Of one function or class as it stands in a file, decorators included, indented or not."""
    return fingerprint_of_own_node(parsed_alone(text))


def fingerprint_on_disk(target: str, package: Path) -> str | None:
    """Of `target` below the top package's folder, None if absent. Imports nothing."""
    module, _, qualname = target.partition(":")
    path = package.parent / (module.replace(".", "/") + ".py")
    return fingerprint_in_file(path.read_text(), qualname) if path.is_file() else None


def fingerprint_in_file(source: str, qualname: str) -> str | None:
    """Of `Class.method` or `function` in the text of a module, None if absent."""
    node = _find(source, qualname)
    return None if node is None else fingerprint_of_node(node)


def source_in_file(source: str, qualname: str) -> str | None:
    """Text of `Class.method` or `function`, None if absent."""
    node = _find(source, qualname)
    if node is None:
        return None
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    return "\n".join(source.splitlines()[first - 1 : node.end_lineno])


def parsed_alone(text: str) -> ast.stmt:
    """Tree of one function or class, indented or not.

    Of an indented text only the first line is looked at: lines of its strings may begin anywhere.
    """
    indented = text[:1].isspace()
    body: Any = ast.parse(f"if True:\n{text}" if indented else text).body
    (node,) = body[0].body if indented else body
    assert isinstance(node, ast.stmt)
    return node


def fingerprint_of_node(node: ast.AST) -> str:
    return fingerprint_of_own_node(copy.deepcopy(node))


def fingerprint_of_own_node(node: ast.AST) -> str:
    """Of a tree that nothing else needs: a copy of it costs half of the time, at every start of a server."""
    return hashlib.sha256(_program(node).encode()).hexdigest()[:16]


def _program(node: ast.AST) -> str:
    """What a fingerprint is made of: the syntax tree, without what does not count. Changes it."""
    names = set(_names(node))
    reduced = _Reduction(
        annotations=bool(names & _READS_ANNOTATIONS),
        docstrings=bool(names & _READS_DOCSTRINGS),
        loggers=_LOGGERS - _bound_anywhere(node),
    ).visit(node)
    return _serialized(reduced)


def _find(source: str, qualname: str) -> ast.ClassDef | _Function | None:
    node: Any = _parsed(source)
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
    return node


@functools.lru_cache(maxsize=16)
def _parsed(source: str) -> ast.Module:
    """Cached: parsing a module takes 0.1 s."""
    return ast.parse(source)


# --- what is left out ----------------------------------------------------------------------------


class _Reduction(ast.NodeTransformer):
    """Takes out of a function's tree what does not count."""

    def __init__(self, annotations: bool, docstrings: bool, loggers: frozenset[str]) -> None:
        self._annotations, self._docstrings, self._loggers = annotations, docstrings, loggers
        self._local: list[set[str]] = []  # of each function around: names that are local without annotations
        self._in_class = False
        self._read: set[int] = set()  # docstrings that may be, by id

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        return self._function(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        return self._function(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        """Its fields and its docstring may be read; its methods are functions like others."""
        outside, self._in_class = self._in_class, True
        self.generic_visit(node)
        self._in_class = outside
        return node

    def _function(self, node: _Function) -> ast.AST:
        around = self._annotations, self._docstrings, self._in_class
        self._in_class = False
        if not all(_is_transparent(decorator) for decorator in node.decorator_list):
            self._annotations = self._docstrings = True
        if not self._annotations:
            node.returns = None
            for argument in _arguments(node.args):
                argument.annotation = None
        if self._docstrings and ast.get_docstring(node, clean=False) is not None:
            self._read.add(id(node.body[0]))
        self._local.append(set(_assigned(node)))
        self.generic_visit(node)
        self._local.pop()
        self._annotations, self._docstrings, self._in_class = around
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST | None:
        if self._in_class or self._annotations or not self._local:
            return self.generic_visit(node)
        target = node.target
        if node.value is not None:
            return self.generic_visit(ast.Assign(targets=[target], value=node.value))
        if isinstance(target, ast.Name) and node.simple and target.id in self._local[-1]:
            return None
        node.annotation = ast.Constant(value=None)
        return self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        """A constant does nothing, unless it is a docstring that may be read (of a field, in a class)."""
        if isinstance(node.value, ast.Constant) and id(node) not in self._read and not self._in_class:
            return None
        return self.generic_visit(node)

    def visit_Pass(self, node: ast.Pass) -> None:
        return None

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        function = node.func
        if (
            isinstance(function, ast.Attribute)
            and function.attr in _LOG_CALLS
            and isinstance(function.value, ast.Name)
            and function.value.id in self._loggers
        ):
            place = 1 if function.attr == "log" else 0
            if len(node.args) > place and not any(
                isinstance(each, ast.Starred) for each in node.args[:place]
            ):
                node.args[place] = _without_text(node.args[place], interpolated=len(node.args) > place + 1)
        return node


def _without_text(text: ast.expr, interpolated: bool) -> ast.expr:
    """What a log text computes: its expressions, and the conversions of its arguments."""
    if isinstance(text, ast.BinOp) and isinstance(text.op, ast.Add):
        text.left = _without_text(text.left, interpolated)
        text.right = _without_text(text.right, interpolated)
    elif isinstance(text, ast.JoinedStr):
        constant = "".join(str(part.value) for part in text.values if isinstance(part, ast.Constant))
        computed = [part for part in text.values if not isinstance(part, ast.Constant)]
        kept = _conversions(constant, interpolated)
        left: list[ast.expr] = [ast.Constant(value=kept), *computed]
        return ast.JoinedStr(values=left) if computed else left[0]
    elif isinstance(text, ast.Constant) and isinstance(text.value, str):
        return ast.Constant(value=_conversions(text.value, interpolated))
    return text


def _conversions(text: str, interpolated: bool) -> str:
    return "".join(_CONVERSION.findall(text.replace("%%", ""))) if interpolated else ""


def _is_transparent(decorator: ast.expr) -> bool:
    function = decorator.func if isinstance(decorator, ast.Call) else decorator
    if isinstance(function, ast.Attribute):
        return function.attr in _TRANSPARENT or function.attr in ("setter", "deleter")
    return isinstance(function, ast.Name) and function.id in _TRANSPARENT


# --- what a function binds and names --------------------------------------------------------------


def _arguments(arguments: ast.arguments) -> list[ast.arg]:
    rest = [each for each in (arguments.vararg, arguments.kwarg) if each is not None]
    return [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, *rest]


def _assigned(node: _Function) -> Iterator[str]:
    """Names that are local to this function, whatever its annotations say; perhaps not all of them."""
    yield from (argument.arg for argument in _arguments(node.args))
    inside: list[ast.AST] = [*node.body]
    while inside:
        each = inside.pop()
        if isinstance(each, ast.AnnAssign) and each.value is None:
            continue
        if isinstance(each, ast.Name) and isinstance(each.ctx, ast.Store):
            yield each.id
        if not isinstance(each, _Scope | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp):
            inside += ast.iter_child_nodes(each)


def _bound_anywhere(node: ast.AST) -> set[str]:
    found = set()
    for each in ast.walk(node):
        if isinstance(each, ast.Name) and not isinstance(each.ctx, ast.Load):
            found.add(each.id)
        elif isinstance(each, ast.arg):
            found.add(each.arg)
        elif isinstance(each, ast.alias):
            found.add((each.asname or each.name).partition(".")[0])
        elif isinstance(each, _Function | ast.ClassDef) or (
            isinstance(each, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and each.name
        ):
            found.add(each.name or "")
    return found


def _names(node: ast.AST) -> Iterator[str]:
    for each in ast.walk(node):
        if isinstance(each, ast.Name):
            yield each.id
        elif isinstance(each, ast.Attribute):
            yield each.attr
        elif isinstance(each, ast.Constant) and isinstance(each.value, str):  # getattr(function, "__doc__")
            yield each.value


# --- text of a tree --------------------------------------------------------------------------------


def _serialized(value: Any) -> str:
    """Fields that are empty are left out, so that a field that a later Python adds changes nothing."""
    if isinstance(value, ast.Constant | ast.MatchSingleton):
        return f"{type(value).__name__}({type(value.value).__name__} {value.value!r})"
    if isinstance(value, ast.JoinedStr):
        return f"JoinedStr({','.join(_serialized(part) for part in _joined(value.values))})"
    if isinstance(value, ast.AST):
        fields = [
            f"{name}={_serialized(field)}"
            for name, field in ast.iter_fields(value)
            if name not in ("ctx", "type_comment") and field is not None and field != []
        ]
        return f"{type(value).__name__}({','.join(fields)})"
    if isinstance(value, list):
        return f"[{','.join(_serialized(each) for each in value)}]"
    return repr(value)


def _joined(parts: list[ast.expr]) -> list[ast.expr]:
    """Neighbouring constants as one, which versions of Python split at different places."""
    found: list[ast.expr] = []
    for part in parts:
        last = found[-1] if found else None
        if isinstance(part, ast.Constant) and isinstance(last, ast.Constant):
            found[-1] = ast.Constant(value=str(last.value) + str(part.value))
        elif not (isinstance(part, ast.Constant) and part.value == ""):
            found.append(part)
    return found
