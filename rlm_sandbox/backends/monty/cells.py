"""A cell's source, read on the host: which names it binds, its last expression, and the operators Monty lacks.

Monty sends method calls on a host object to the host, but not ``len(ctx)``, ``ctx[a:b]``, ``x in ctx`` or iteration.
Where ``ctx`` is a bound name, these become method calls here. Only text between expressions is replaced, never a line
break, so that line numbers stay right.

The source is hostile: it is parsed, never compiled, and only walked without recursion. What the host's parser does
not take (too deep, or newer syntax than the host's) goes to the engine as it is, which has the last word.
"""

from __future__ import annotations

import ast
import builtins
import re
import warnings
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from ...protocol import Feature
from .remedy import remedy

__all__ = ("ECHO", "OPERATOR_METHODS", "SLICE_METHOD", "Cell", "read_cell")

ECHO: Final = "_rlm_echo"
#: Longer cells are given to the engine unread.
MAX_READ_CHARS: Final = 200_000
#: The method a guest's operator becomes, by the name of the operator in `expose`.
OPERATOR_METHODS: Final = {
    "len": "rlm_len", "getitem": "rlm_getitem", "contains": "rlm_contains", "iter": "rlm_iter", "bool": "rlm_bool", "str": "rlm_str",
}  # fmt: skip
#: ``getitem`` with the three parts of a slice, which the engine would turn into text.
SLICE_METHOD: Final = "rlm_slice"
_ITERATING: Final = frozenset(
    {"list", "tuple", "set", "sorted", "enumerate", "frozenset", "reversed", "iter", "zip", "sum", "any", "all"}
)
#: What a parser may warn of: unknown escapes, and numbers that run into words.
_WARNS: Final = re.compile(r"\\|\d[A-Za-z_]")
#: Nodes that bind names otherwise than by a `Name`, or in a scope of their own.
_SCOPES: Final = frozenset(
    {
        ast.FunctionDef,
        ast.AsyncFunctionDef,
        ast.ClassDef,
        ast.comprehension,
        ast.alias,
        ast.MatchAs,
        ast.MatchStar,
        ast.MatchMapping,
    }
)
_CALLS: Final = {"len": "len", "bool": "bool", "str": "str"}


@dataclass(frozen=True, slots=True)
class Cell:
    """A cell ready for the engine. ``echoes``: its value is the text of the last expression's repr, or None."""

    source: str
    names: frozenset[str] = frozenset()
    echoes: bool = False
    problem: str = ""
    """Why the engine must not run it, as ``"Type: message"``; empty if it may."""

    def shown(self, output: object) -> str | None:
        """What the cell's value is, by what the engine returned for it."""
        if output is None or (self.echoes and isinstance(output, str)):
            return output
        # The cell was not read on the host (too long, or newer syntax): its value is the engine's, not a repr.
        return repr(output) if type(output) in (bool, float, str, bytes, list, dict, tuple, set) else str(output)[:4_000]


def _parse(code: str) -> ast.Module | None:
    try:
        if not _WARNS.search(code):
            return ast.parse(code)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def read_cell(code: str, objects: Mapping[str, Collection[str]]) -> Cell:
    """Prepare ``code``. ``objects``: names bound to host objects, with the operators each one allows."""
    if not _is_unicode(code):
        return Cell(code, problem="SyntaxError: the source has lone surrogates, which this language subset cannot hold")
    if len(code) > MAX_READ_CHARS:
        return Cell(code)
    tree = _parse(code)
    if tree is None:
        return Cell(code)
    nodes = _walk(tree)
    kinds = {type(node) for node in nodes}
    if "\\u" in code or "\\U" in code or not code.isascii():
        for node in nodes:
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and not _is_unicode(node.value):
                return Cell(
                    code,
                    problem=f"ValueError: line {node.lineno}: a text with lone surrogates does not exist in this language "
                    f"subset; {remedy(Feature.CPYTHON)}",
                )
    ignored = _ignored_method(nodes) if ast.ClassDef in kinds else None
    if ignored is not None:
        return Cell(
            code,
            problem=f"NotImplementedError: line {ignored.lineno}: this subset of Python does not call {ignored.name} of a class; "
            f"give the method a name of its own and call it, or {remedy(Feature.CPYTHON)}",
        )
    stray = _stray_return(tree) if ast.Return in kinds else None
    if stray is not None:
        # The engine would take it as the cell's end.
        return Cell(code, problem=f"SyntaxError: 'return' outside function (line {stray})")
    if kinds.isdisjoint(_SCOPES):
        names = frozenset([node.id for node in nodes if type(node) is ast.Name and type(node.ctx) is ast.Store])
    else:
        names = frozenset(_bound_names(tree))
    last = tree.body[-1] if tree.body else None
    echoes = isinstance(last, ast.Expr)
    usable = {}
    if objects:
        usable = {name: allowed for name, allowed in objects.items() if allowed and not _is_rebound(name, nodes)}
    if not (echoes or usable or ast.Raise in kinds):
        return Cell(code, names)
    edits, plain = _Edits(code), _Edits(code)
    for node in nodes:
        if usable:
            _rewrite(node, usable, edits)
        if isinstance(node, ast.Raise):
            _text_argument(node, edits)
            _text_argument(node, plain)
    for each in (edits, plain):
        if isinstance(last, ast.Expr):
            each.insert(each.start(last), f"{ECHO}((", first=True)
            each.insert(each.end(last), "))")
    source = edits.apply()
    if usable and _parse(source) is None:
        source = plain.apply()
    return Cell(source, names, echoes)


def _walk(tree: ast.AST) -> list[ast.AST]:
    """As `ast.walk`, in a third of its time."""
    nodes = [tree]
    for node in nodes:
        for field in node._fields:
            value = getattr(node, field, None)
            if type(value) is list:
                if value:
                    nodes += [item for item in value if isinstance(item, ast.AST)]
            elif isinstance(value, ast.AST) and value._fields:  # no contexts and operators
                nodes.append(value)
    return nodes


def _is_unicode(text: str) -> bool:
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# ---- names


def _bound_names(tree: ast.Module) -> Iterator[str]:
    """Names a cell may bind in the module: by assignment, import, definition, loop, ``with``, pattern or walrus."""
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
            for inner in ast.walk(node):
                if isinstance(inner, ast.Global):
                    yield from inner.names
            pending.extend(node.decorator_list)
            continue
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.alias):
            yield node.asname or node.name.partition(".")[0]
        elif isinstance(node, ast.MatchAs | ast.MatchStar) and node.name:
            yield node.name
        elif isinstance(node, ast.MatchMapping) and node.rest:
            yield node.rest
        elif isinstance(node, ast.comprehension):
            pending += (node.iter, *node.ifs)  # its target is a scope of its own
            continue
        pending.extend(ast.iter_child_nodes(node))


def _is_rebound(name: str, nodes: list[ast.AST]) -> bool:
    """True if the cell gives ``name`` another meaning anywhere, also as a parameter: then its operators are left alone."""
    for node in nodes:
        if isinstance(node, ast.Name) and node.id == name and not isinstance(node.ctx, ast.Load):
            return True
        if isinstance(node, ast.arg) and node.arg == name:
            return True
        if (
            isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.MatchAs | ast.MatchStar)
            and node.name == name
        ):
            return True
        if isinstance(node, ast.alias) and (node.asname or node.name) == name:
            return True
    return False


def _stray_return(tree: ast.Module) -> int | None:
    pending: list[ast.AST] = list(tree.body)
    while pending:
        node = pending.pop()
        if isinstance(node, ast.Return):
            return node.lineno
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            pending.extend(ast.iter_child_nodes(node))
    return None


#: Special methods that the engine never calls, nor says that it does not.
_IGNORED: Final = frozenset(
    f"__{name}__"
    for name in (
        "len", "bool", "lt", "le", "gt", "ge", "ne", "getattr", "getattribute", "setattr", "delattr", "delitem", "format", "bytes",
        "complex", "reversed", "new", "del", "class_getitem", "init_subclass", "set_name", "get", "set", "await", "fspath", "dir",
        "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "ilshift", "irshift", "imatmul",
    )
)  # fmt: skip


def _ignored_method(nodes: list[ast.AST]) -> ast.FunctionDef | ast.AsyncFunctionDef | None:
    for node in nodes:
        if isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef) and item.name in _IGNORED:
                    return item
    return None


# ---- exceptions

_EXCEPTIONS: Final = frozenset(
    name for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, BaseException)
)


def _text_argument(node: ast.Raise, edits: _Edits) -> None:
    """``ValueError(3)`` to ``ValueError(str(3))``: the engine's exceptions take a text only, and fail on anything else."""
    call = node.exc
    if not isinstance(call, ast.Call):
        return
    if not isinstance(call.func, ast.Name) or call.func.id not in _EXCEPTIONS or len(call.args) != 1 or call.keywords:
        return
    arg = call.args[0]
    if isinstance(arg, ast.Starred | ast.JoinedStr) or (isinstance(arg, ast.Constant) and isinstance(arg.value, str)):
        return
    edits.insert(edits.start(arg), "str((", first=True)
    edits.insert(edits.end(arg), "))")


# ---- operators


class _Edits:
    """Replacements of character ranges of a source, none overlapping."""

    def __init__(self, code: str) -> None:
        self._code = code
        self._lines = code.encode().splitlines(keepends=True)  # of bytes: at \n, \r and \r\n only, as the parser does
        self._starts = [0]
        for line in self._lines:
            self._starts.append(self._starts[-1] + len(line.decode()))
        self._edits: list[tuple[int, int, int, str]] = []

    def _offset(self, line: int, column: int) -> int:
        return (
            self._starts[line - 1] + len(self._lines[line - 1][:column].decode()) if line <= len(self._lines) else len(self._code)
        )

    def start(self, node: ast.expr | ast.stmt) -> int:
        return self._offset(node.lineno, node.col_offset)

    def end(self, node: ast.expr | ast.stmt) -> int:
        return self._offset(node.end_lineno or node.lineno, node.end_col_offset or node.col_offset)

    def text(self, node: ast.expr) -> str:
        return self._code[self.start(node) : self.end(node)]

    def insert(self, at: int, text: str, *, first: bool = False) -> None:
        self._edits.append((at, 0 if first else 2, at, text))

    def replace(self, start: int, end: int, text: str) -> None:
        """Line breaks of what is replaced are kept, after ``text``."""
        self._edits.append((start, 1, end, text + "\n" * self._code.count("\n", start, end)))

    def apply(self) -> str:
        parts: list[str] = []
        at = 0
        for start, _, end, text in sorted(self._edits, key=lambda edit: edit[:3]):
            parts += (self._code[at:start], text)
            at = max(at, end)
        parts.append(self._code[at:])
        return "".join(parts)


def _rewrite(node: ast.AST, objects: Mapping[str, Collection[str]], edits: _Edits) -> None:
    def is_object(value: ast.AST | None, operator: str) -> bool:
        # Before Python 3.12 positions inside an f-string can be wrong: then the text there is not the name.
        return isinstance(value, ast.Name) and operator in objects.get(value.id, ()) and edits.text(value) == value.id

    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        function, args = node.func.id, node.args
        operator = _CALLS.get(function)
        if operator and len(args) == 1 and is_object(args[0], operator):
            assert isinstance(args[0], ast.Name)
            edits.replace(edits.start(node), edits.end(node), f"{args[0].id}.{OPERATOR_METHODS[operator]}()")
        elif function in _ITERATING:
            for arg in args:
                if is_object(arg, "iter"):
                    edits.insert(edits.end(arg), f".{OPERATOR_METHODS['iter']}()")
    elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Load) and is_object(node.value, "getitem"):
        _rewrite_subscript(node, edits)
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and isinstance(node.ops[0], ast.In | ast.NotIn):
        holder = node.comparators[0]
        if is_object(holder, "contains") and isinstance(holder, ast.Name):
            negated = isinstance(node.ops[0], ast.NotIn)
            call = f"{holder.id}.{OPERATOR_METHODS['contains']}("
            edits.replace(edits.start(node), edits.start(node.left), f"(not {call}" if negated else call)
            edits.replace(edits.end(node.left), edits.end(node), "))" if negated else ")")
    elif isinstance(node, ast.For | ast.comprehension) and is_object(node.iter, "iter"):
        edits.insert(edits.end(node.iter), f".{OPERATOR_METHODS['iter']}()")


def _rewrite_subscript(node: ast.Subscript, edits: _Edits) -> None:
    """``ctx[a:b]`` to ``ctx.rlm_slice(a, b, None)``, ``ctx[a]`` to ``ctx.rlm_getitem(a)``."""
    at, end = edits.end(node.value), edits.end(node)
    parts: tuple[ast.expr | None, ...]
    if isinstance(node.slice, ast.Slice):
        parts, gap = (node.slice.lower, node.slice.upper, node.slice.step), f".{SLICE_METHOD}("
    else:
        parts, gap = (node.slice,), f".{OPERATOR_METHODS['getitem']}("
    for index, part in enumerate(parts):
        if index:
            gap += ", "
        if part is None:
            gap += "None"
            continue
        edits.replace(at, edits.start(part), gap)
        at, gap = edits.end(part), ""
    edits.replace(at, end, gap + ")")
