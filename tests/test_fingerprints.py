"""Fingerprints see the program and not its spelling: SGLang's own functions, mutated both ways."""

from __future__ import annotations

import ast
import copy
import io
import textwrap
import tokenize
from collections.abc import Callable, Iterator
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
import sglang
from hypothesis import assume, given
from hypothesis import strategies as st

from sglang_npu_pp.fingerprints import fingerprint_in_file, fingerprint_of_source, source_in_file
from sglang_npu_pp.patches import PATCHES
from sglang_npu_pp.patching import contract_targets

assert sglang.__file__
PACKAGE = Path(sglang.__file__).parent
LOGGERS = ("logger", "logging")
LEVELS = ("debug", "info", "warning", "error", "exception")


def sources() -> dict[str, str]:
    """Of all functions of the installed SGLang that our patches replace or rely on."""
    found = {}
    for target in contract_targets(PATCHES):
        module, _, qualname = target.partition(":")
        path = PACKAGE.parent / (module.replace(".", "/") + ".py")
        text = source_in_file(path.read_text(), qualname) if path.is_file() else None
        if text is not None:
            found[target] = textwrap.dedent(text)
    return found


SOURCES = sources()
FUNCTIONS = st.sampled_from(sorted(SOURCES)).map(SOURCES.__getitem__)
WORDS = st.text("abc %d{}'\"\\\n#é", max_size=12)

pytestmark = pytest.mark.filterwarnings("ignore::SyntaxWarning")  # of what is mutated


# --- what does not count --------------------------------------------------------------------------


@given(source=FUNCTIONS, data=st.data())
def test_spelling_does_not_count(source: str, data: st.DataObject) -> None:
    tree: Any = ast.parse(source)
    for change in data.draw(st.lists(st.sampled_from(HARMLESS), min_size=1, max_size=4)):
        change(tree.body[0], data)
    changed = ast.unparse(ast.fix_missing_locations(tree))
    assert fingerprint_of_source(changed) == fingerprint_of_source(source)


@given(source=FUNCTIONS, data=st.data())
def test_comments_and_blank_lines_do_not_count(source: str, data: st.DataObject) -> None:
    lines = source.splitlines()
    ends = {
        token.end[0]
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.NEWLINE
    }
    for end in sorted(data.draw(st.sets(st.sampled_from(sorted(ends)))), reverse=True):
        lines[end - 1] += data.draw(st.sampled_from(["", "   ", "  # said = 1"]))
        lines[end:end] = data.draw(st.sampled_from([[""], ["", ""], ["# return None"], ["", "      # ."]]))
    assert fingerprint_of_source("\n".join(lines)) == fingerprint_of_source(source)


@given(source=FUNCTIONS, depth=st.integers(0, 3))
def test_indentation_does_not_count(source: str, depth: int) -> None:
    """`inspect` gives a method as it stands in its class, and so do its texts stay as they are."""
    text = textwrap.indent(source, " " * 4 * depth) if '"""' not in source else source
    assert fingerprint_of_source(text) == fingerprint_of_source(source)


def change_docstring(function: Any, data: st.DataObject) -> None:
    for each in functions(function):
        if ast.get_docstring(each, clean=False) is not None:
            del each.body[0]
            each.body = each.body or [ast.Pass()]
        if data.draw(st.booleans()):
            each.body.insert(0, ast.Expr(ast.Constant(data.draw(WORDS))))


def change_signature(function: Any, data: st.DataObject) -> None:
    for each in functions(function):
        each.returns = data.draw(ANNOTATIONS)
        for argument in arguments(each):
            argument.annotation = data.draw(ANNOTATIONS)


def change_annotated_variables(function: Any, data: st.DataObject) -> None:
    for owner, field, place, node in statements(function):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            (target,) = node.targets
            if isinstance(target, ast.Name | ast.Attribute | ast.Subscript) and not is_declared(
                function, target
            ):
                annotation = data.draw(ANNOTATIONS) or ast.Name("Any")
                simple = int(isinstance(target, ast.Name))
                getattr(owner, field)[place] = ast.AnnAssign(target, annotation, node.value, simple)
        elif isinstance(node, ast.AnnAssign) and node.value is not None:
            getattr(owner, field)[place] = ast.Assign([node.target], node.value)


def change_log_texts(function: Any, data: st.DataObject) -> None:
    calls: list[Any] = [node for node in ast.walk(function) if is_log_call(node)]
    for call in calls:
        if call.args:
            for text in constants_of_text(call.args[0]):
                words = data.draw(WORDS).replace("%", "")
                text.value = words + text.value if len(call.args) > 1 else words  # conversions count


def change_nothing(function: Any, data: st.DataObject) -> None:
    """What `ast.unparse` does by itself: other quotes, brackets, line breaks, no comments."""


HARMLESS: list[Callable[[Any, st.DataObject], None]] = [
    change_docstring,
    change_signature,
    change_annotated_variables,
    change_log_texts,
    change_nothing,
]
ANNOTATIONS = st.sampled_from(["int", "dict[str, Any]", "'Later'", "f(1)", None]).map(
    lambda text: None if text is None else ast.parse(text, mode="eval").body
)


# --- what counts ------------------------------------------------------------------------------------


@given(source=FUNCTIONS, data=st.data())
def test_the_program_counts(source: str, data: st.DataObject) -> None:
    """Whatever changes its bytecode; of log calls not the texts."""
    tree: Any = ast.parse(source)
    before = copy.deepcopy(tree)
    changes = [(change, node) for node in counted(tree.body[0]) for change in HARMFUL if change(node, True)]
    assume(changes)
    change, node = data.draw(st.sampled_from(changes))
    change(node, False)
    try:
        differs = code_of(tree) != code_of(before)
    except (SyntaxError, ValueError):  # `return` moved out of its function, and the like
        differs = False
    assume(differs)
    changed = ast.unparse(ast.fix_missing_locations(tree))
    assert fingerprint_of_source(changed) != fingerprint_of_source(source), changed


def code_of(tree: Any) -> Any:
    """The bytecode with all that it refers to, without docstrings and line numbers."""
    program = copy.deepcopy(tree)
    for function in functions(program):
        if ast.get_docstring(function, clean=False) is not None:
            function.body[0] = ast.Pass()
    return essence(compile(ast.unparse(ast.fix_missing_locations(program)), "", "exec"))


def essence(code: Any) -> Any:
    if not isinstance(code, CodeType):
        return type(code), code
    inside = [essence(each) for each in code.co_consts]
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    return code.co_code, inside, names, code.co_flags, code.co_argcount, code.co_kwonlyargcount


def other_constant(node: Any, ask: bool) -> bool:
    if not isinstance(node, ast.Constant) or isinstance(node.value, bytes | complex):
        return False
    if not ask:
        value = node.value
        if isinstance(value, bool):
            node.value = int(value)
        elif isinstance(value, int | float):
            node.value = value + 1
        elif isinstance(value, str):
            node.value = value + " "
        else:
            node.value = 0
    return True


OTHER_OPERATORS: dict[type, Any] = {ast.Add: ast.Sub, ast.And: ast.Or, ast.Or: ast.And, ast.Not: ast.Invert}


def other_operator(node: Any, ask: bool) -> bool:
    if isinstance(node, ast.Compare):
        if not ask:
            node.ops[0] = ast.NotEq() if isinstance(node.ops[0], ast.Eq) else ast.Eq()
        return True
    known = type(getattr(node, "op", None)) in OTHER_OPERATORS
    if known and not ask:
        node.op = OTHER_OPERATORS[type(node.op)]()
    return known


def other_name(node: Any, ask: bool) -> bool:
    for kind, field in (
        (ast.Name, "id"),
        (ast.Attribute, "attr"),
        (ast.arg, "arg"),
        (ast.FunctionDef, "name"),
    ):
        if isinstance(node, kind):
            if not ask:
                setattr(node, field, getattr(node, field) + "_")
            return True
    if isinstance(node, ast.keyword) and node.arg:
        if not ask:
            node.arg += "_"
        return True
    return False


def other_arguments(node: Any, ask: bool) -> bool:
    """Of a call: the last two change places, or the only one is dropped."""
    if not isinstance(node, ast.Call) or not node.args:
        return False
    if not ask:
        node.args[-2:] = reversed(node.args[-2:]) if len(node.args) > 1 else []
    return True


def other_default(node: Any, ask: bool) -> bool:
    if not isinstance(node, ast.arguments) or not node.defaults:
        return False
    if not ask:
        node.defaults[-1] = ast.Constant("another default")
    return True


def other_decorators(node: Any, ask: bool) -> bool:
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    if not ask:
        node.decorator_list = node.decorator_list[1:] if node.decorator_list else [ast.Name("staticmethod")]
    return True


def other_order(node: Any, ask: bool) -> bool:
    body = getattr(node, "body", None)
    if not isinstance(body, list) or len(body) < 2 or not all(map(does_something, body[-2:])):
        return False
    if not ask:
        body[-2:] = reversed(body[-2:])
    return True


def without_last_statement(node: Any, ask: bool) -> bool:
    body = getattr(node, "body", None)
    if not isinstance(body, list) or not does_something(body[-1]):
        return False
    if not ask:
        body[-1:] = [] if len(body) > 1 else [ast.Pass()]
    return True


def other_level(node: Any, ask: bool) -> bool:
    if not is_log_call(node):
        return False
    if not ask:
        node.func.attr = "info" if node.func.attr == "error" else "error"
    return True


def other_format(node: Any, ask: bool) -> bool:
    """In a log text as well: `repr` of an object may do what its `str` does not."""
    if not isinstance(node, ast.FormattedValue):
        return False
    if not ask:
        node.conversion = ord("r") if node.conversion == -1 else -1
    return True


def with_side_effect(node: Any, ask: bool) -> bool:
    """An expression in a call, a log call included, that does something."""
    if not isinstance(node, ast.Call) or not node.args:
        return False
    if not ask:
        node.args[-1] = ast.Call(ast.Name("f"), [node.args[-1]], [])
    return True


def awaited_or_returned_otherwise(node: Any, ask: bool) -> bool:
    if not isinstance(node, ast.Return) or node.value is None:
        return False
    if not ask:
        node.value = None
    return True


HARMFUL = [
    other_constant,
    other_operator,
    other_name,
    other_arguments,
    other_default,
    other_decorators,
    other_order,
    without_last_statement,
    other_level,
    other_format,
    with_side_effect,
    awaited_or_returned_otherwise,
]


# --- cases that the properties may not come across -----------------------------------------------------


def is_same(before: str, after: str) -> bool:
    return fingerprint_of_source(textwrap.dedent(before)) == fingerprint_of_source(textwrap.dedent(after))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("def f():\n    pass", 'def f():\n    """Says what it does."""'),
        ("def f():\n    'a'\n    'b'\n    return 1", "def f():\n    return 1"),
        ("def f(a): return (a)", "def f(a, ):\n    return a  # a"),
        ("def f(a, *b, c=1, **d): ...", "def f(a: int, *b: str, c: 'C' = 0x1, **d: Any) -> None: ..."),
        ("def f():\n    x = 1\n    return x", "def f():\n    x: int\n    x: int = 1\n    return x"),
        ("def f(x):\n    return x", "def f(x):\n    x: int\n    return x"),
        ("def f():\n    self.x = g()", "def f():\n    self.x: int = g()"),
        ("def f():\n    logger.info('a')", "def f():\n    logger.info(f'b' 'c')"),
        ("def f():\n    logger.info(f'a {x!r:>3} b')", "def f():\n    logger.info(f'{x!r:>3} said {{}}')"),
        ("def f():\n    logger.info('a %s, 5 %%', x)", "def f():\n    logger.info('%s', x)"),
        ("def f():\n    logger.log(level, 'a')", "def f():\n    logger.log(level, 'b')"),
        ("def f():\n    logger.error('a' + str(e))", "def f():\n    logger.error('b' + str(e))"),
        ("@property\ndef f(): return 1", "@property\ndef f() -> int:\n    'One.'\n    return 1"),
        ("def f():\n    def g(): return 1", "def f():\n    def g() -> int:\n        'g'\n        return 1"),
        ("@lru_cache(None)\ndef f(a): ...", "@lru_cache(None)\ndef f(a: int): ..."),
    ],
)
def test_the_same_program(before: str, after: str) -> None:
    assert is_same(before, after)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("def f(): return 1", "def f(): return True"),
        ("def f(): return 0", "def f(): return 0.0"),
        ("def f(): return 'a'", "def f(): return b'a'"),
        ("def f(): return None", "def f(): return ..."),
        ("def f(): return [None]", "def f(): return []"),
        ("def f(a): ...", "async def f(a): ..."),
        ("def f(a, /): ...", "def f(a): ..."),
        ("def f(*, a): ...", "def f(a): ..."),
        ("def f(*, a, b=1): ...", "def f(*, a=1, b): ..."),
        ("def f(): g(*a)", "def f(): g(a)"),
        ("def f(): return {**a, 'b': 1}", "def f(): return {'b': 1, **a}"),
        ("def f():\n    x = 1", "def f():\n    global x\n    x = 1"),
        ("def f():\n    return x", "def f():\n    x: int\n    return x"),  # now it is local, and unbound
        ("def f():\n    return [x for x in y]", "def f():\n    x: int\n    return [x for x in y]"),
        ("def f():\n    f().x: int", "def f():\n    pass"),
        # Annotations that are read when the program runs
        ("@dataclass\nclass A:\n    x: int = 1", "@dataclass\nclass A:\n    x = 1"),
        ("def f():\n    class A:\n        x: int", "def f():\n    class A:\n        x: str"),
        ("@app.post('/')\ndef f(a: A): ...", "@app.post('/')\ndef f(a: B): ..."),
        ("@torch.jit.script\ndef f(a):\n    x: int = a", "@torch.jit.script\ndef f(a):\n    x: str = a"),
        ("def f():\n    def g(a: A): ...\n    return get_type_hints(g)",)
        + ("def f():\n    def g(a: B): ...\n    return get_type_hints(g)",),
        ("def f():\n    'a'\n    return f.__doc__", "def f():\n    'b'\n    return f.__doc__"),
        (
            "def f(a: A): return getattr(f, '__annotations__')",
            "def f(a: B): return getattr(f, '__annotations__')",
        ),
        (
            "def f():\n    class A:\n        x: int\n        'a'",
            "def f():\n    class A:\n        x: int\n        'b'",
        ),
        ("@command\ndef f():\n    'a'", "@command\ndef f():\n    'b'"),
        # Log calls that do more than to log a text
        ("def f():\n    logger.info('a')", "def f():\n    pass"),
        ("def f():\n    logger.info('a')", "def f():\n    logger.info(g())"),
        ("def f():\n    logger.info(f'a')", "def f():\n    logger.info(f'a{g()}')"),
        ("def f():\n    logger.info(f'{a}{b}')", "def f():\n    logger.info(f'{b}{a}')"),
        ("def f():\n    logger.info(f'{a}')", "def f():\n    logger.info(f'{a:.2f}')"),
        ("def f():\n    logger.info('%s', a)", "def f():\n    logger.info('%r', a)"),
        ("def f():\n    logger.info('%s', a)", "def f():\n    logger.info('%s', b)"),
        ("def f():\n    logger.info('a' % b)", "def f():\n    logger.info('c' % b)"),
        ("def f():\n    logger.info('a', exc_info=True)", "def f():\n    logger.info('a')"),
        ("def f():\n    logger.log('a', 'b')", "def f():\n    logger.log('b', 'b')"),
        ("def f(logger):\n    logger.info('a')", "def f(logger):\n    logger.info('b')"),  # not a module's
        ("def f():\n    queue.info('a')", "def f():\n    queue.info('b')"),
        ("def f():\n    raise E('a')", "def f():\n    raise E('b')"),
        ("def f():\n    print('a')", "def f():\n    print('b')"),
        ("def f():\n    match a:\n        case None: ...", "def f():\n    match a:\n        case True: ..."),
    ],
)
def test_another_program(before: str, after: str) -> None:
    assert not is_same(before, after)


def test_texts_that_begin_left_of_their_function_are_read() -> None:
    method = "    def f(self):\n        return '''\na\n  b\n'''\n"
    inside = fingerprint_in_file(f"class A:\n{method}", "A.f")
    assert fingerprint_of_source(method) == inside
    assert fingerprint_of_source(method.replace("\na", "\n a")) != inside


# --- helpers ------------------------------------------------------------------------------------------


def functions(function: Any) -> list[Any]:
    """It and those inside it, as far as nothing reads their annotations and docstrings."""
    return [each for each in ast.walk(function) if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef)]


def arguments(function: Any) -> list[ast.arg]:
    return [each for each in ast.walk(function.args) if isinstance(each, ast.arg)]


def statements(function: Any) -> Iterator[tuple[Any, str, int, Any]]:
    for owner in ast.walk(function):
        for field in ("body", "orelse", "finalbody"):
            block = getattr(owner, field, None)
            if isinstance(block, list):
                for place, node in enumerate(block):
                    yield owner, field, place, node


def does_something(statement: Any) -> bool:
    is_constant = isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
    return not (is_constant or isinstance(statement, ast.Pass))


def is_declared(function: Any, target: Any) -> bool:
    """A name that is global or of a function around cannot be annotated."""
    names = {
        name
        for each in ast.walk(function)
        if isinstance(each, ast.Global | ast.Nonlocal)
        for name in each.names
    }
    return isinstance(target, ast.Name) and target.id in names


def is_log_call(node: Any) -> bool:
    return bool(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id in LOGGERS
        and node.func.attr in LEVELS
    )


def constants_of_text(text: Any) -> list[Any]:
    """Of a log text; what is in the brackets of an f-string is none."""
    if isinstance(text, ast.JoinedStr):
        return [part for part in text.values if isinstance(part, ast.Constant)]
    return [text] if isinstance(text, ast.Constant) and isinstance(text.value, str) else []


def counted(function: Any) -> list[Any]:
    """All nodes but docstrings, annotations and the constants of log texts."""
    left_out: set[int] = set()
    nodes: list[Any] = list(ast.walk(function))
    for each in nodes:
        found: list[Any] = []
        if isinstance(each, ast.FunctionDef | ast.AsyncFunctionDef):
            found = [each.returns, *([each.body[0]] if ast.get_docstring(each) is not None else [])]
        elif isinstance(each, ast.arg | ast.AnnAssign):
            found = [each.annotation]
        elif is_log_call(each) and each.args:
            found = constants_of_text(each.args[0])
        left_out |= {id(inside) for root in found if root is not None for inside in ast.walk(root)}
    return [node for node in nodes if id(node) not in left_out]
