"""`CellPolicy`: which Python a cell may write, on top of RestrictedPython's list of known syntax.

Names of hooks begin with a dot, so that no source can spell, shadow or rebind one. Guards that RestrictedPython puts on every
attribute, item and loop are decided here, from the source, wherever a name in the source is enough to decide: what is left
for run time is rare, and ordinary code runs at nearly full speed.
"""

# ruff: noqa: N802, N815 - a visitor is named for the syntax it visits
from __future__ import annotations

import ast
import re
from typing import Any, Final

from RestrictedPython.transformer import INSPECT_ATTRIBUTES, RestrictingNodeTransformer

__all__ = (
    "CLASS_NAMES",
    "ELSEWHERE",
    "GUARDED_ATTRIBUTES",
    "INSPECT_ATTRIBUTES",
    "LOADABLE",
    "MAX_WIDTH",
    "CellPolicy",
    "check_width",
)

_DOUBLE = (
    "init repr str bytes format lt le eq ne gt ge hash bool len getitem setitem delitem contains iter next reversed missing "
    "call enter exit add sub mul truediv floordiv mod pow and or xor lshift rshift neg pos abs invert radd rsub rmul rtruediv "
    "rfloordiv rmod iadd isub imul int float index round complex divmod matmul post_init length_hint"
)
#: Special methods a class may define. Not ``__del__`` (it runs when no cell does), nor what changes how names are looked up, nor
#: ``__new__``: what made an instance by it (`copy` does) writes attributes to whatever it returned.
_METHODS: Final = frozenset(f"__{name}__" for name in _DOUBLE.split()) | {"__getattr__"}
#: What may be assigned in a class body. Not what other code believes of a class: ``__annotations__`` (`dataclasses` makes source code of its
#: keys), ``__class__``, ``__module__``, ``__match_args__``.
CLASS_NAMES: Final = _METHODS | {"__slots__", "__doc__"}
#: Special attributes that may be read; the guard says of which objects.
LOADABLE: Final = (_METHODS - {"__getattr__"}) | {"__name__", "__doc__", "__dict__", "__class__"}
#: Ordinary names that lead somewhere on some objects: decided at run time.
GUARDED_ATTRIBUTES: Final = frozenset({"format", "format_map", "mro", "obj", "register"})
#: The end of every refusal: who has what was refused.
ELSEWHERE: Final = "use a backend whose capabilities list 'cpython' (docker, jail, wasm)"
_SPOKEN: Final = {
    "AsyncFor": "async for", "AsyncFunctionDef": "async def", "AsyncWith": "async with", "Await": "await", "TryStar": "except*",
    "TypeAlias": "the type statement",
}  # fmt: skip
#: Fields wider than this are refused: they are memory, not text.
MAX_WIDTH: Final = 1_000_000
#: Builtins that keep all they are given.
_CONTAINERS: Final = frozenset({"bytes", "dict", "frozenset", "list", "set", "tuple"})
_DIGITS: Final = re.compile(r"\d{7,}")


def check_width(spec: str) -> str:
    """A format's text, if no number in it asks for a field of millions of characters.

    Raises:
        ValueError: one does.
    """
    for found in _DIGITS.findall(spec):
        if len(found) > 12 or int(found) > MAX_WIDTH:
            raise ValueError(f"a format may not be wider than {MAX_WIDTH:,} characters")
    return spec


class CellPolicy(RestrictingNodeTransformer):  # type: ignore[misc, unused-ignore]
    """Rewrites one cell's tree; ``refused`` says what it may not do, with lines."""

    def __init__(self) -> None:
        super().__init__()
        self.refused: list[tuple[int, str]] = []
        self._class_body = False
        self._class_name = ""

    def _mangled(self, name: str) -> str:
        """A private name of the class around it, as the compiler would have it: ``__x`` in ``class C`` is ``_C__x``."""
        stripped = self._class_name.lstrip("_")
        return f"_{stripped}{name}" if stripped and name.startswith("__") and not name.endswith("__") else name

    # ---- what the base class asks for

    def error(self, node: Any, info: str) -> None:
        """Note a refusal."""
        self.refused.append((getattr(node, "lineno", 0) or 0, info))

    def not_allowed(self, node: Any) -> None:
        """Refuse a kind of statement."""
        kind = type(node).__name__
        self.error(node, f"{_SPOKEN.get(kind, kind)} is not in the restricted language")

    def check_name(self, node: Any, name: str | None, allow_magic_methods: bool = False) -> None:
        """Refuse names of the interpreter's own."""
        if name is None or not name.startswith("__"):
            return
        if self._class_body and name in CLASS_NAMES:
            return
        self.error(node, f"the name {name!r} belongs to the interpreter")

    def inject_print_collector(self, node: Any, position: int = 0) -> None:
        """``print`` is an ordinary function here."""

    # ---- names, attributes, calls

    def visit_Name(self, node: ast.Name) -> Any:
        node.id = self._mangled(node.id)
        if node.id == "super":
            self.error(node, "super is allowed only as super()")
        elif not (node.id == "__name__" and isinstance(node.ctx, ast.Load)):
            self.check_name(node, node.id)
        return node

    def visit_Attribute(self, node: ast.Attribute) -> Any:
        node = self.node_contents_visit(node)
        node.attr = self._mangled(node.attr)
        if isinstance(node.ctx, ast.Load):
            if node.attr.startswith("_") or node.attr in GUARDED_ATTRIBUTES or node.attr in INSPECT_ATTRIBUTES:
                guarded = _call(".getattr", node.value, ast.Constant(node.attr))
                if isinstance(node.value, ast.Name) and node.attr.startswith("_") and not node.attr.startswith("__"):
                    return _at(node, ast.IfExp(_is_guests(node.value), node, guarded))  # the cell's own objects are quick
                return _at(node, guarded)
            return node
        if node.attr.startswith("__") or node.attr in INSPECT_ATTRIBUTES:
            self.error(node, f"the attribute {node.attr!r} cannot be assigned")
        guarded = _call(".write", node.value)
        if isinstance(node.value, ast.Name):
            node.value = _at(node.value, ast.IfExp(_is_guests(node.value), node.value, guarded))
        else:
            node.value = _at(node.value, guarded)
        return node

    def visit_Call(self, node: ast.Call) -> Any:
        if isinstance(node.func, ast.Name) and node.func.id == "super" and not node.args and not node.keywords:
            return node
        node = self.node_contents_visit(node)
        if (
            isinstance(node.func, ast.Name)
            and node.func.id in _CONTAINERS
            and len(node.args) == 1
            and not isinstance(node.args[0], ast.Starred)
        ):
            node.args[0] = _at(node.args[0], _call(".stored", node.args[0]))
        return node

    def visit_Subscript(self, node: ast.Subscript) -> Any:
        return self.node_contents_visit(node)

    def visit_Assign(self, node: ast.Assign) -> Any:
        return self.node_contents_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> Any:
        """It reads its target, too, and hands what it read to an operator of the cell's."""
        if isinstance(node.target, ast.Attribute) and node.target.attr in GUARDED_ATTRIBUTES:
            self.error(node, f"the attribute {node.target.attr!r} cannot be assigned in place")
        return self.node_contents_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
        return self.node_contents_visit(node)

    def visit_With(self, node: ast.With) -> Any:
        return self.node_contents_visit(node)

    def visit_Global(self, node: ast.Global) -> Any:
        for name in node.names:
            self.check_name(node, name)
        return node

    def visit_Nonlocal(self, node: ast.Nonlocal) -> Any:
        for name in node.names:
            self.check_name(node, name)
        return node

    def visit_Expression(self, node: ast.Expression) -> Any:
        return self.node_contents_visit(node)

    # ---- sizes that the source shows

    def visit_BinOp(self, node: ast.BinOp) -> Any:
        """Powers and shifts grow without bound, and so does a literal text or list times a number: those are looked at."""
        if isinstance(node.op, ast.Mod) and isinstance(node.left, ast.Constant) and isinstance(node.left.value, str | bytes):
            text = node.left.value if isinstance(node.left.value, str) else node.left.value.decode("latin-1")
            self._check_spec(node, text)
        node = self.node_contents_visit(node)
        if isinstance(node.op, ast.Pow | ast.LShift) and not _is_small(node.right):
            return _at(node, _call(".pow" if isinstance(node.op, ast.Pow) else ".lshift", node.left, node.right))
        if isinstance(node.op, ast.Mult) and (_is_sequence(node.left) or _is_sequence(node.right)):
            return _at(node, _call(".repeat", node.left, node.right))
        return node

    def _check_spec(self, node: ast.AST, spec: str) -> None:
        try:
            check_width(spec)
        except ValueError as exc:
            self.error(node, str(exc))

    def visit_FormattedValue(self, node: ast.FormattedValue) -> Any:
        for part in node.format_spec.values if isinstance(node.format_spec, ast.JoinedStr) else ():
            if isinstance(part, ast.Constant):
                self._check_spec(node, str(part.value))
        return self.node_contents_visit(node)

    # ---- what runs often looks at the clock

    def visit_For(self, node: ast.For) -> Any:
        node = self.node_contents_visit(node)
        node.body.insert(0, _tick(node.body[0]))
        return node

    def visit_While(self, node: ast.While) -> Any:
        node = self.node_contents_visit(node)
        node.body.insert(0, _tick(node.body[0]))
        return node

    def visit_Try(self, node: ast.Try) -> Any:
        """A stop that was caught is raised again by the handler, and by a finally."""
        node = self.node_contents_visit(node)
        if node.finalbody:
            node.finalbody.insert(0, _tick(node.finalbody[0]))
        return node

    def visit_ExceptHandler(self, node: ast.ExceptHandler) -> Any:
        self.check_name(node, node.name)
        node = self.node_contents_visit(node)
        node.body.insert(0, _tick(node.body[0]))
        return node

    def visit_comprehension(self, node: ast.comprehension) -> Any:
        if node.is_async:
            self.error(node.iter, "asynchronous comprehensions are not in the restricted language")
        node = self.node_contents_visit(node)
        go_on = ast.BoolOp(ast.Or(), [ast.UnaryOp(ast.Not(), _load(".stop")), _call(".halt")])
        node.ifs.insert(0, _at(node.iter, go_on))
        return node

    def visit_Lambda(self, node: ast.Lambda) -> Any:
        self.check_function_argument_names(node)
        node = self.node_contents_visit(node)
        node.body = _at(node.body, ast.IfExp(_load(".stop"), _call(".halt"), node.body))
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
        node.name = self._mangled(node.name)
        self.check_name(node, node.name)
        in_class, self._class_body = self._class_body, False
        try:
            self.check_function_argument_names(node)
            node = self.node_contents_visit(node)
        finally:
            self._class_body = in_class
        has_doc = ast.get_docstring(node, clean=False) is not None
        node.body.insert(1 if has_doc else 0, _tick(node.body[0]))
        return node

    def visit_ClassDef(self, node: ast.ClassDef) -> Any:
        written, node.name = node.name, self._mangled(node.name)
        self.check_name(node, node.name)
        if node.keywords:
            self.error(node, "a class takes no keywords such as metaclass")
        for part in ("bases", "decorator_list"):  # of the scope around it
            setattr(node, part, [self.visit(item) for item in getattr(node, part)])
        outside = self._class_body, self._class_name
        self._class_body, self._class_name = True, written
        try:
            node.body = [self.visit(item) for item in node.body]
            for parameter in getattr(node, "type_params", ()):
                self.visit(parameter)
        finally:
            self._class_body, self._class_name = outside
        node.keywords = [ast.keyword("metaclass", _load(".class"))]
        return node

    # ---- match

    def _visit_pattern(self, node: Any) -> Any:
        self.check_name(node, getattr(node, "name", None))
        self.check_name(node, getattr(node, "rest", None))
        return self.node_contents_visit(node)

    visit_Match = visit_match_case = _visit_pattern
    visit_MatchValue = visit_MatchSingleton = visit_MatchSequence = visit_MatchMapping = _visit_pattern
    visit_MatchStar = visit_MatchAs = visit_MatchOr = _visit_pattern

    def visit_MatchClass(self, node: ast.MatchClass) -> Any:
        """Its keywords read attributes, without a guard."""
        for name in node.kwd_attrs:
            if name.startswith("_") or name in GUARDED_ATTRIBUTES or name in INSPECT_ATTRIBUTES:
                self.error(node, f"the attribute {name!r} cannot be matched")
        return self.node_contents_visit(node)


def _load(name: str) -> ast.Name:
    return ast.Name(name, ast.Load())


def _call(name: str, *args: ast.expr) -> ast.Call:
    return ast.Call(_load(name), list(args), [])


def _is_guests(name: ast.Name) -> ast.Compare:
    """Whether a variable holds an instance of a cell's class, without a call of a function of ours. A look at a variable has no effect,
    so that it may be taken twice."""
    return ast.Compare(_call(".type", _call(".type", _load(name.id))), [ast.Is()], [_load(".guests")])


def _at(old: Any, new: Any) -> Any:
    return ast.fix_missing_locations(ast.copy_location(new, old))


def _tick(before: ast.stmt) -> ast.stmt:
    """``if .stop: .halt()``, on the line of the statement it comes before. Two instructions where there is nothing to stop."""
    tick: ast.stmt = _at(before, ast.If(_load(".stop"), [ast.Expr(_call(".halt"))], []))
    return tick


def _is_small(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and (type(node.value) is not int or node.value <= 64)


def _is_sequence(node: ast.expr) -> bool:
    if isinstance(node, ast.Constant):
        return isinstance(node.value, str | bytes)
    return isinstance(node, ast.List | ast.Tuple | ast.JoinedStr)
